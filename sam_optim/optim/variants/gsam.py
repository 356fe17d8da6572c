"""Surrogate gap guided SAM."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sam_optim.optim.sam import SAM, check_number


class GSAM(SAM):
    """Descends along g' - alpha (g - <g, g'> / ||g'||^2 g'),   g = grad L(w),   g' = grad L(w + e).

    What is subtracted is the part of g that is orthogonal to g': to first order that lowers L(w + e) - L(w) and leaves
    L(w + e) alone. Inner products run over all groups, tensors and ranks. The radius of the paper follows the learning
    rate: schedule=proportional_to_lr(rho_min, rho_max).

    Args:
        params, base_optimizer, kwargs: as for `SAM`.
        alpha: how much of the orthogonal part is subtracted; 0 is SAM.

    Source: Zhuang et al. (2022), arXiv:2203.08065.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: Callable[..., Optimizer] = torch.optim.SGD,
        *,
        alpha: float = 0.4,
        **kwargs: Any,
    ):
        self.configure(alpha=alpha)
        super().__init__(params, base_optimizer, **kwargs)

    def configure(self, *, alpha: float) -> None:  # type: ignore[override]
        self.alpha = check_number("alpha", alpha)

    def descent_gradient(
        self, params: Sequence[Tensor], grads_at_w: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> Iterable[Tensor]:
        square = self.dot(params, grads, grads)
        share = torch.where(square > 0, self.dot(params, grads_at_w, grads) / square, 0.0)
        scale = 1 + self.alpha * share
        return (torch.sub(scale.to(g) * g, a, alpha=self.alpha) for a, g in zip(grads_at_w, grads, strict=True))
