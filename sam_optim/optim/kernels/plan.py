"""Which parameters move in a step, and by what: from parameter groups to the buckets that the kernels move."""

from __future__ import annotations

import functools
import operator
from typing import Any

import torch
from torch import Tensor, nn

from sam_optim.core import random as rng
from sam_optim.core.geometry import canonical_adaptive, canonical_norm, scale
from sam_optim.optim import kernels
from sam_optim.optim.distributed import Ranks
from sam_optim.optim.kernels import dtensor as shards
from sam_optim.optim.param_groups import check_group, is_zero
from sam_optim.optim.precision import Float32Pass

ROUNDING = ("nearest", "stochastic", "float32")


class Plan:
    """Made anew only where parameters or gradients change their kind.

    Args:
        module, sync_ascent: what `Ranks` has to know.
        foreach, fused: as in torch.optim.
        rounding: "nearest", "stochastic" or "float32".
        noise: draws for stochastic rounding, or None.
    """

    def __init__(
        self,
        module: nn.Module | None,
        sync_ascent: bool | None,
        foreach: bool | None,
        rounding: str,
        noise: rng.Stream | None,
        fused: bool | None = None,
    ):
        if rounding not in ROUNDING:
            raise ValueError(f"rounding must be 'nearest', 'stochastic' or 'float32', got {rounding!r}")
        self.float32 = Float32Pass(module) if rounding == "float32" else None
        self._module = module
        self._sync_ascent = sync_ascent
        self._foreach = foreach
        self._noise = noise
        self._fused = fused
        self._stores: list[kernels.Store | None] = []
        self._ranks: tuple[list[Tensor], type, Ranks] | None = None

    def ranks(self, params: list[Tensor]) -> Ranks:
        """Of these parameters, as the model is wrapped now."""
        known = self._ranks
        if known is None or type(self._module) is not known[1] or not _same(params, known[0]):
            self._ranks = known = (params, type(self._module), Ranks(self._module, params, self._sync_ascent))
            self._stores.clear()
        return known[2]

    def buckets(self, groups: list[dict[str, Any]]) -> list[kernels.Bucket]:
        """The buckets of this step: parameters with a gradient in groups with rho > 0."""
        params = [p for group in groups for p in group["params"]]
        ranks = self.ranks(params)
        found: list[kernels.Bucket] = []
        wants_gradient = False
        del self._stores[len(groups) :]
        for k, group in enumerate(groups):
            check_group(group)
            rho, eta = group["rho"], float(group["eta"])
            if is_zero(rho):
                continue
            if isinstance(rho, Tensor):
                rho = rho.reshape(())
            wants_gradient = True
            adaptive = canonical_adaptive(group["adaptive"])
            self._stores += [None] * (k + 1 - len(self._stores))
            store = self._stores[k]
            if store is None or not store.matches(group["params"]):
                how = (self._foreach, self._noise, ranks.groups_of)
                store = self._stores[k] = kernels.Store(
                    group["params"], *how, in_float32=self.float32 is not None, fused=self._fused
                )
            found += store.buckets(
                canonical_norm(group["norm"]),
                -rho if group.get("maximize", False) else rho,
                eta if adaptive == "elementwise" else None,
                functools.partial(_slice_scale, adaptive=adaptive, eta=eta)
                if adaptive in ("filter", "layer")
                else None,
            )
        if wants_gradient and not ranks.may_lack_gradients and all(p.grad is None for p in params):
            raise RuntimeError(
                "no parameter has a gradient: run loss.backward() before the perturbed pass"
                + (", and with set_requires_gradient_sync(True): FSDP2 leaves no gradient else" * ranks.is_sharded)
            )
        return found


def _slice_scale(p: Tensor, adaptive: str, eta: float) -> Tensor:
    """T of one parameter, of its entries on this rank."""
    if getattr(p, "_fsdp_flattened", False) or type(p).__name__ == "FlatParameter":
        raise ValueError(
            f"adaptive={adaptive!r} needs the shapes that FSDP1 has flattened away: use FSDP2 (fully_shard)"
        )
    if not shards.is_dtensor(p):
        return scale(p, adaptive, eta)
    if adaptive == "filter" and p.ndim < 2:
        return scale(shards.local(p), adaptive, eta)
    norms = shards.slice_norms(p, range(1, p.ndim) if adaptive == "filter" else range(p.ndim))
    return norms.to(torch.float64 if p.dtype == torch.float64 else torch.float32) + eta


def _same(params: list[Tensor], others: list[Tensor]) -> bool:
    return len(params) == len(others) and all(map(operator.is_, params, others))
