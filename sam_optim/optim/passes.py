"""The two passes of a step: what each of them changes, and how all of it comes back."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn

from sam_optim.core import random as rng
from sam_optim.core.module_state import Buffers
from sam_optim.optim import kernels
from sam_optim.optim.distributed import Ranks
from sam_optim.optim.kernels import dtensor as shards
from sam_optim.optim.param_groups import is_zero
from sam_optim.optim.precision import Float32Pass
from sam_optim.optim.transaction import CleanStateDict, EvaluationWarning, FirstForward

# ids of parameters -> whose they are; the pass that moved them holds them, so that no id is reused
_perturbed_now: dict[int, object] = {}
_HELD = (
    "another perturbation holds some of these parameters, and only one at a time can move them: finish its pass, or "
    "give it up with its exit(failed=True)"
)


class AscentPass:
    """The first pass: no gradient for parameters that will not move, and no exchange between DDP's ranks.

    Args:
        groups: of parameters. Those with rho = 0, beside others, do not move, and the ascent needs no gradient of them.
        computes_all: all gradients, also those.
        ranks: who else has this model; where they share one ascent, DDP synchronises here, too.
    """

    def __init__(self, groups: list[dict[str, Any]], ranks: Ranks, *, computes_all: bool):
        self._replicas = [(m, m.require_backward_grad_sync) for m in ranks.replicas]
        self._sync = not ranks.per_rank
        # what synchronises gradients waits for all of them
        waits = ranks.is_sharded or bool(self._replicas and self._sync)
        idle = [] if waits or computes_all else [p for g in groups if is_zero(g["rho"]) for p in g["params"]]
        self._moving = [p for g in groups if idle and not is_zero(g["rho"]) for p in g["params"]]
        self._idle = [p for p in idle if self._moving and p.requires_grad and p.is_leaf]
        self._lacking: list[Tensor] = []
        # DDP that nobody passed as `module` may average what the second pass leaves, too
        self.then_syncs = any(sync for _, sync in self._replicas) if self._replicas else ranks.are_several

    def begin(self) -> None:
        for p in self._idle:
            p.requires_grad_(False)
        for m, _ in self._replicas:
            m.require_backward_grad_sync = self._sync

    @property
    def is_partial(self) -> bool:
        return bool(self._idle)

    def compute_all(self) -> None:
        """From here on also the gradients that the ascent does not need."""
        for p in self._idle:
            p.requires_grad_(True)

    def note(self) -> None:
        """Before the gradients are cleared: which parameters that should move have none."""
        self._lacking = [p for p in self._moving if p.grad is None] if self._idle else []

    def lost(self) -> bool:
        """After the second pass: whether one of them has a gradient there. Reentrant activation checkpoints compute
        none where nothing before them needs one."""
        return any(p.grad is not None for p in self._lacking)

    def end(self) -> None:
        """May be called again."""
        self.compute_all()
        for m, sync in self._replicas:
            m.require_backward_grad_sync = sync


class PerturbedPass:
    """w -> w + e by `begin`, and back by `end`, which may be called again after an interrupt, also of `begin`.

    Args:
        params: all parameters, moved or not: no other perturbation may move them meanwhile.
        buckets: those that move.
        module, buffers: the model whose buffers the pass must not change, and storage for them.
        first_forward: what remembers the random state of the first pass, where the second has to draw the same.
        float32: what makes low-precision weights float32 ones meanwhile.
        agreeing: process groups whose ranks must all move, or none of them.
    """

    def __init__(
        self,
        params: list[Tensor],
        buckets: list[kernels.Bucket],
        module: nn.Module | None,
        buffers: Buffers,
        first_forward: FirstForward | None,
        float32: Float32Pass | None,
        agreeing: shards.Groups,
    ):
        if not _perturbed_now.keys().isdisjoint(map(id, params)):
            raise RuntimeError(_HELD)
        self._token = object()
        self._params = params
        self._buckets = buckets
        self._module = module
        self._buffers = buffers
        self._first_forward = first_forward
        self._float32 = float32
        self._agreeing = agreeing
        self._hooks: list[Any] = []
        self._rng: rng.GlobalState | None = None
        self._buffers_saved = False
        self._ended = True

    def begin(
        self, rng_state: Callable[[], rng.GlobalState], *, zero_grad: bool
    ) -> tuple[kernels.Ascent | None, kernels.Scalar | None]:
        """Moves the weights and clears the gradients. Returns the ascent and the share of it that rounding left."""
        self._ended = False
        self._claim()
        ascent = realized = None
        if self._module is not None:  # before anything moves: a signal handler may ask for a checkpoint at any moment
            self._buffers.save(self._module)
            self._buffers_saved = True
            self._hooks.append(CleanStateDict(self.clean))
            if self._module.training:
                self._hooks.append(EvaluationWarning())
            for hook in self._hooks:
                hook.register(self._module)
        if self._buckets:
            if self._float32 is not None and (moving := kernels.widening(self._buckets)):
                self._float32.enter(moving)
            ascent = kernels.ascend_(self._buckets, agreeing=self._agreeing)
            torch.clear_autocast_cache()  # or the second forward reuses low-precision copies of w: SAM without SAM
            if ascent.moved is not False:
                realized = kernels.realized(self._buckets, ascent.factors)
            for b in self._buckets:
                b.g, b.t = [], None  # the second pass needs their memory
        if zero_grad:
            for p in self._params:
                p.grad = None
        if self._first_forward is not None:
            self._rng = rng_state()
            self._first_forward.replay()
        return ascent, realized

    @property
    def moved(self) -> list[kernels.Bucket]:
        return self._buckets

    def end(self, *, is_updated: bool = False) -> None:
        """Every part is done, whatever another one raises, the last one here first. Weights that have been updated from
        where they are saved stay as they are."""
        with ExitStack() as parts:
            parts.callback(self._release)
            if self._first_forward is not None:
                parts.callback(self._first_forward.forget)
            if self._rng is not None:
                parts.callback(self._rng.restore)
            for hook in self._hooks:
                parts.callback(hook.remove, self._module)
            if self._buffers_saved:
                parts.callback(self._buffers.restore)
            parts.callback(torch.clear_autocast_cache)
            if self._float32 is not None:
                parts.callback(self._float32.leave)
            if not is_updated:
                with torch.no_grad():
                    kernels.restore_(self._buckets)
        self._ended = True

    def _claim(self) -> None:
        """Of two threads that come here at the same moment, one gets each parameter: `setdefault` is one operation."""
        for p in self._params:
            if _perturbed_now.setdefault(id(p), self._token) is not self._token:
                raise RuntimeError(_HELD)

    def _release(self) -> None:
        for p in self._params:
            if _perturbed_now.get(id(p)) is self._token:
                del _perturbed_now[id(p)]

    def __del__(self) -> None:
        """An optimizer that is dropped between its two passes does not leave its weights at w + e."""
        if not getattr(self, "_ended", True):
            self.end()

    def clean(self, tensor: Tensor) -> Tensor | None:
        """The clean value of a parameter or buffer; None of what is none of the model's."""
        for b in self._buckets:
            for param, saved, shared in zip(b.params, b.saved, b.shared, strict=False):
                if param is tensor:
                    clean = shards.whole(torch.view_as_complex(saved) if param.is_complex() else saved, param)
                    return clean.detach().clone() if shared else clean.detach()
        if self._float32 is not None and (own := self._float32.clean(tensor)) is not None:
            return own
        return self._buffers.clean_copy(tensor) if self._buffers_saved else None
