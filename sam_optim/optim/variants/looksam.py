"""LookSAM."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sam_optim.optim.sam import SAM, check_number
from sam_optim.optim.schedules import periodic


class LookSAM(SAM):
    """SAM in every k-th step, and between them one pass:   g + alpha ||g|| / ||g_v|| g_v,   g = grad L(w).

    g_v is the part of the last grad L(w + e) that is orthogonal to grad L(w) of that step. Norms and inner products run
    over all groups, tensors and ranks. Closures run once in the steps between; in two phases `optimizer.ascends` says
    whether the second pass is needed. Gradient clipping acts on g, before the direction is added: the gradient that the
    base gets is at most 1 + alpha times the bound.

    Args:
        params, base_optimizer, kwargs: as for `SAM`. Where a `schedule` gives 0, the step is the base's.
        every: k.
        alpha: how much of the direction of g_v is added, relative to ||g||.

    Source: Liu et al. (2022), arXiv:2203.02714.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: Callable[..., Optimizer] = torch.optim.SGD,
        *,
        every: int = 5,
        alpha: float = 0.7,
        **kwargs: Any,
    ):
        self.configure(every=every, alpha=alpha)
        super().__init__(params, base_optimizer, **kwargs)

    def configure(self, *, every: int, alpha: float) -> None:  # type: ignore[override]
        self.alpha, self._is_due = check_number("alpha", alpha), periodic(every)

    def factor_of(self, step: int) -> float:
        has_direction = any(["orthogonal_gradient" in state for state in self.state.values()])
        return super().factor_of(step) * (self._is_due(step) if has_direction else 1.0)

    def ascent_gradient(self, params: Sequence[Tensor], grads: Sequence[Tensor] | None) -> Sequence[Tensor]:
        assert grads is not None
        for p, g in zip(params, grads, strict=True):
            earlier = self._pending.get((p, "gradient_at_w"))  # of an earlier micro-batch of this step
            self.remember(p, "gradient_at_w", g if earlier is None else earlier + g)
        return grads

    def update_gradient(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], scale: Tensor | None
    ) -> Sequence[Tensor]:
        at_w = {p: g for (p, name), g in self._pending.items() if name == "gradient_at_w"}
        self._pending.clear()
        if at_w:
            moved = [(p, at_w[p], g) for p, g in zip(params, grads, strict=True) if p in at_w]
            ps, hs, gs = (list(x) for x in zip(*moved, strict=True))
            square = self.dot(ps, hs, hs)
            share = torch.where(square > 0, self.dot(ps, hs, gs) / square, 0.0)
            for p, h, g in moved:
                self.remember(p, "orthogonal_gradient", torch.addcmul(g, h, -share.to(g)))
            return grads
        if super().factor_of(self.param_groups[0]["sam_step"]) == 0:
            return grads
        recalled = [self.recall(p, "orthogonal_gradient") for p in params]
        directions = [torch.zeros_like(g) if v is None else v for v, g in zip(recalled, grads, strict=True)]
        square = self.dot(params, directions, directions)
        factor = torch.where(square > 0, self.alpha * (self.dot(params, grads, grads) / square).sqrt(), 0.0)
        return [g.addcmul_(v, factor.to(g)) for g, v in zip(grads, directions, strict=True)]
