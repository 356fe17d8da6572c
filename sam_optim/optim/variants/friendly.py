"""Friendly SAM."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sam_optim.optim.sam import SAM, check_number


class FriendlySAM(SAM):
    """Ascends along g - sigma m,   then   m <- lmbda m + (1 - lmbda) g,   g = grad L(w).

    m estimates the gradient over all data, so that what is left of g is the noise of its batch. In the first step m is
    g, and the ascent goes along g.

    Args:
        params, base_optimizer, kwargs: as for `SAM`.
        sigma: how much of m is taken away.
        lmbda: the share of m that stays in each step, in [0, 1).

    Source: Li et al. (2024), arXiv:2403.12350.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: Callable[..., Optimizer] = torch.optim.SGD,
        *,
        sigma: float = 1.0,
        lmbda: float = 0.95,
        **kwargs: Any,
    ):
        self.configure(sigma=sigma, lmbda=lmbda)
        super().__init__(params, base_optimizer, **kwargs)

    gradient_means = ("ascent_mean",)

    def configure(self, *, sigma: float, lmbda: float) -> None:  # type: ignore[override]
        self.sigma, self.lmbda = check_number("sigma", sigma), check_number("lmbda", lmbda, below=1.0)

    def ascent_gradient(self, params: Sequence[Tensor], grads: Sequence[Tensor] | None) -> Sequence[Tensor]:
        assert grads is not None
        directions = []
        for p, g in zip(params, grads, strict=True):
            m = self.recall(p, "ascent_mean")
            directions.append(g if m is None else torch.sub(g, m, alpha=self.sigma))
            self.remember(p, "ascent_mean", g.clone() if m is None else torch.lerp(m, g, 1 - self.lmbda))
        return directions
