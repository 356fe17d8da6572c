"""Training on several ranks: which ranks hold copies of the model, which hold shards, and what they must do together.

DistributedDataParallel holds copies; FSDP (1, 2 and hybrid) and tensor parallelism hold shards.
"""

from __future__ import annotations

import math
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sam_optim.optim.kernels import dtensor
from sam_optim.optim.kernels.bucket import Groups, Scalar


class Ranks:
    """What the wrappers and parameters of a model say about other ranks.

    Args:
        modules: all modules of the model, its wrappers first; empty if nobody passed it.
        params: all parameters that the optimizer has.
        sync_ascent: whether the ascent follows the gradient of all ranks. None: not of DDP, where each rank then has
            its own perturbation (m-sharpness with m = its batch); parts of one model can only move together.

    Raises:
        ValueError: sync_ascent=False for a model that is spread over ranks.
        RuntimeError: parameters of FSDP1, and no module that tells whose they are.
    """

    def __init__(self, modules: Sequence[nn.Module], params: Sequence[Tensor], sync_ascent: bool | None):
        self.types = {type(m) for m in modules}
        self.replicas = [m for m in modules if isinstance(m, DistributedDataParallel) and _size(m.process_group) > 1]
        self._flat = _flat_params(modules)
        self.fully_sharded = [m for m in modules if hasattr(m, "_get_fsdp_state")]
        spread = [self.groups_of(p) for p in params]
        self.is_sharded = any(groups is not None for groups in spread)
        if self.is_sharded and sync_ascent is False:
            raise ValueError(
                "sync_ascent=False asks for one perturbation per rank, but the ranks hold parts of one model "
                "(FSDP, tensor parallel), which can only move together: use sync_ascent=None or DDP"
            )
        self.may_lack_gradients = any(self._flat.values())  # FSDP1 cuts across parameters: a rank can have none of any
        self.per_rank = bool(self.replicas) and not self.is_sharded and not sync_ascent
        # a parameter that the last of several closures does not use would keep what this rank had of it before
        self.averages_once = bool(self.replicas) and not any(m.find_unused_parameters for m in self.replicas)
        if self.per_rank and any(m.static_graph for m in self.replicas):
            raise ValueError(
                "DDP(static_graph=True) expects every backward to average gradients, and the first one of SAM does not "
                "where each rank has its own perturbation: pass sync_ascent=True, or leave static_graph out"
            )
        # DDP counts a parameter as used that only the first pass has used, and then wants a gradient of it
        self.needs_zeros = self.per_rank and any(m.find_unused_parameters for m in self.replicas)
        parts: dict[Any, None] = {}
        for p in params:
            parts |= dict.fromkeys(_mesh_groups(p))
        parts |= {g: None for groups in self._flat.values() for g in groups}
        self._parts: Groups = tuple(parts)
        self.are_alone = not (self.replicas or self.is_sharded or self.are_several)
        self._compared = False

    @property
    def are_several(self) -> bool:
        distributed = torch.distributed
        return distributed.is_available() and distributed.is_initialized() and distributed.get_world_size() > 1

    @property
    def together(self) -> Groups:
        """The process groups whose ranks must all take a step, or none of them."""
        # not inside DDP's `join`, where ranks that have run out of inputs answer only to its own exchanges; what those
        # average is the same on all ranks anyway
        copies = dict.fromkeys(m.process_group for m in self.replicas if not m._join_config.enable)
        return (*copies, *self._parts)

    def groups_of(self, p: Tensor) -> Groups | None:
        """The process groups over which a parameter is spread; None for one that is whole, and only this rank's."""
        if id(p) in self._flat:
            return self._flat[id(p)]
        if getattr(p, "_fsdp_flattened", False) or type(p).__name__ == "FlatParameter":
            raise RuntimeError(
                "these are parameters of FullyShardedDataParallel, of which each rank has a part: pass module=, the "
                "wrapped model, or the norm would be that of one part"
            )
        return dtensor.groups_of(p)

    def check_resharded(self) -> None:
        """FSDP2 that keeps the gathered weights for the second pass would compute it at w."""
        for m in self.fully_sharded:
            state = m._get_fsdp_state()  # type: ignore[operator]
            groups = getattr(state, "_fsdp_param_groups", None) or [getattr(state, "_fsdp_param_group", None)]
            if any(getattr(g, "is_unsharded", False) for g in groups):
                raise RuntimeError(
                    "FSDP2 holds gathered weights, and the second pass would use those in place of the perturbed ones: "
                    "leave set_reshard_after_backward at True (reshard_after_forward=False is fine)"
                )

    def compare(self, norm: Scalar) -> None:
        """Warns, once, if the ascent gradients of all ranks are the same where each should have its own."""
        if self._compared or not self.per_rank:
            return
        self._compared = True
        group = self.replicas[0].process_group
        device = self.replicas[0].device or torch.device("cpu")
        local_norm = torch.as_tensor(norm, dtype=torch.float64).to(device).reshape(1)
        low, high = local_norm.clone(), local_norm.clone()
        torch.distributed.all_reduce(low, op=torch.distributed.ReduceOp.MIN, group=group)
        torch.distributed.all_reduce(high, op=torch.distributed.ReduceOp.MAX, group=group)
        if float(low) == float(high) and 0 < float(low) < math.inf:
            warnings.warn(
                "the ascent gradients of all ranks are the same, so this is SAM of the global batch, not of each "
                "rank's: DDP decides in the forward pass whether to average gradients. Run the first forward and "
                "backward inside microbatch() or no_sync(), use step(closure), or pass sync_ascent=True",
                stacklevel=6,
            )

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        """DDP's own no_sync, of all its wrappers here."""
        before = [m.require_backward_grad_sync for m in self.replicas]
        try:
            for m in self.replicas:
                m.require_backward_grad_sync = False
            yield
        finally:
            for m, sync in zip(self.replicas, before, strict=True):
                m.require_backward_grad_sync = sync


class FirstPass:
    """DDP's exchange of gradients is as the first pass needs it, until `end`, which may be called again."""

    def __init__(self, ranks: Ranks):
        self._before = [(m, m.require_backward_grad_sync) for m in ranks.replicas]
        # a DDP wrapper that was not passed as `module` may average the second pass's gradients, too
        self.then_syncs = any([sync for _, sync in self._before]) if self._before else ranks.are_several
        for m, _ in self._before:
            m.require_backward_grad_sync = not ranks.per_rank

    def end(self) -> None:
        for m, sync in self._before:
            m.require_backward_grad_sync = sync


def _flat_params(modules: Sequence[nn.Module]) -> dict[int, Groups]:
    """The parameters of FSDP1, and over which groups each is spread."""
    fsdp = sys.modules.get("torch.distributed.fsdp")
    groups_by_id: dict[int, Groups] = {}
    for m in modules:
        handle = getattr(m, "_handle", None) if fsdp and isinstance(m, fsdp.FullyShardedDataParallel) else None
        if handle is None:
            continue
        whole = m.sharding_strategy == fsdp.ShardingStrategy.NO_SHARD or _size(m.process_group) == 1  # type: ignore[union-attr,arg-type]
        groups = () if whole else (m.process_group,)
        flat = handle.flat_param  # type: ignore[union-attr]
        groups_by_id |= {id(p): groups for p in (flat, *(getattr(flat, "_params", None) or ()))}
    return groups_by_id


def _mesh_groups(p: Tensor) -> list[Any]:
    """All process groups of a DTensor's mesh, also those that hold copies."""
    if not dtensor.is_dtensor(p):
        return []
    mesh = p.device_mesh  # type: ignore[attr-defined]
    return [mesh.get_group(d) for d in range(mesh.ndim) if mesh.size(d) > 1]


def _size(group: Any) -> int:
    return torch.distributed.get_world_size(group)
