"""SAM with a stale ascent."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from sam_optim.optim.sam import SAM


class StaleSAM(SAM):
    """w <- base(w, grad L(w + e)),   e along the descent gradient of the step before: one pass a step.

    e = rho T^2 h / ||T h||_2, h = grad L(w' + e') of the last step; 0 in the first one. Closures run once, and return
    the loss at w + e; in two phases forward and backward run inside `with optimizer.perturbed():`. BatchNorm's running
    statistics are those at w + e, see `MSAM`.

    Args:
        as for `SAM`. replay_rng has nothing to do.

    Source: the direction of the step before is that of Jo et al. (2025), arXiv:2503.11147, who compute it at w beside
    the descent; here it is the gradient that was computed anyway.
    """

    one_pass = True

    def ascent_gradient(self, params: Sequence[Tensor], grads: Sequence[Tensor] | None) -> list[Tensor | None]:
        return [self.recall(p, "last_gradient") for p in params]

    def update_gradient(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], scale: Tensor | None
    ) -> Sequence[Tensor]:
        for p, g in zip(params, grads, strict=True):
            self.remember(p, "last_gradient", g.clone())
        return grads
