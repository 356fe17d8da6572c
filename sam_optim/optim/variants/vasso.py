"""SAM with variance suppression."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sam_optim.optim.sam import SAM, check_number


class VaSSO(SAM):
    """e = rho T^2 d / ||T d||_2,   d <- (1 - theta) d + theta g,   g = grad L(w): a mean over steps, with less noise.

    In the first step d is g.

    Args:
        params, base_optimizer, kwargs: as for `SAM`.
        theta: the share of the new gradient, in [0, 1]; 1 is SAM.

    Source: Li and Giannakis (2023), arXiv:2309.15639.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: Callable[..., Optimizer] = torch.optim.SGD,
        *,
        theta: float = 0.4,
        **kwargs: Any,
    ):
        self.configure(theta=theta)
        super().__init__(params, base_optimizer, **kwargs)

    gradient_means = ("ascent_mean",)

    def configure(self, *, theta: float) -> None:  # type: ignore[override]
        if check_number("theta", theta) > 1:
            raise ValueError(f"theta must be at most 1, got {theta!r}")
        self.theta = theta

    def ascent_gradient(self, params: Sequence[Tensor], grads: Sequence[Tensor] | None) -> list[Tensor]:
        assert grads is not None
        for p, g in zip(params, grads, strict=True):
            d = self.recall(p, "ascent_mean")
            self.remember(p, "ascent_mean", g.clone() if d is None else torch.lerp(d, g, self.theta))
        return [self._pending[p, "ascent_mean"] for p in params]
