"""Which radius is large, and which is small, for the present weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sam_optim.core.geometry import Ball, ProductBall
from sam_optim.core.results import _Result, provenance
from sam_optim.core.scalars import real, shown
from sam_optim.loss import Loss
from sam_optim.measures.shared import Progress, Ticks, batch_mean, checked, settings, why_not_finite

NUM_HALVINGS = 5  # of the radius, and as many doublings


@dataclass(frozen=True, eq=False)
class RhoRange(_Result):
    """The rise of the loss along e(rho) = argmax <g, e> over ||T^-1 e||_p <= rho, for a grid of radii.

    radii: (n,), ascending, in units of T. rises: (n,), in units of L. stderr: (n,), over batches; nan for one.
    linear_share: (n,), what share of the rise is <g, e>, that of a straight line; nan where the loss does not
        rise. 1 where the loss is linear, 0.5 where the curvature adds as much again.
    half: the radius where it is 0.5, interpolated; None where that is outside the grid.
    reason: which loss is not finite, where one is.
    """

    radii: Tensor
    rises: Tensor
    stderr: Tensor
    linear_share: Tensor
    half: float | None
    settings: dict[str, Any] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    reason: str | None = None

    def __str__(self) -> str:
        rows = zip(self.radii.tolist(), self.rises.tolist(), self.linear_share.tolist(), strict=True)
        if self.reason and not self.rises.isfinite().any():
            return self.reason
        lines = [f"rho {r:<9.4g} loss {rise:+.4f}   a straight line explains {share:.0%}" for r, rise, share in rows]
        return "\n".join(lines).replace("a straight line explains nan%", "no rise")


@checked
def rho_range(
    loss: Loss, optimizer: Optimizer, *, radii: Sequence[float] | None = None, progress: Progress | None = None
) -> RhoRange:
    """How far the loss rises along SAM's own perturbation, and how much of that a straight line explains.

        rise(rho) = E_b [l_b(w + e_b(rho)) - l_b(w)],   linear_share(rho) = E_b <g_b, e_b(rho)> / rise(rho)

    Where the share is near 1, SAM sees the gradient alone: its step is that of a penalty rho ||T g||_q. Where it is
    small, the perturbation has left the region that the gradient describes. It takes one gradient, and a forward pass
    for each radius, at the present weights: the result changes during training, and says nothing about test error.

    Args:
        loss: L; each batch has its own perturbation (m-sharpness), so use the training batch size.
        optimizer: a SAM, whose T, p and groups are taken; for any other optimizer T = 1, p = 2.
        radii: None: eleven, from 1/32 of the optimizer's rho (0.05 if it has none) to 32 times as much. Groups with
            radii of their own keep their ratios; the largest of them is the one that counts.

    Raises:
        ValueError: a radius <= 0, an optimizer whose radii are all 0.

    Source: ours; the expansion of the rise is that of arXiv:2010.01412.
    """
    ball: Ball | ProductBall = getattr(optimizer, "neighborhood", Ball(0.05))
    if not ball.rho > 0:
        raise ValueError("all radii of the optimizer are 0, so nothing moves: give it a rho > 0")
    if radii is None:
        radii = [ball.rho * 2.0**k for k in range(-NUM_HALVINGS, NUM_HALVINGS + 1)]
    if isinstance(radii, str) or not isinstance(radii, Iterable) or getattr(radii, "ndim", 1) != 1:
        raise ValueError(f"radii must be a sequence of numbers > 0, got {shown(radii)}")
    grid = sorted(real("each of radii", r) for r in radii)
    if not grid or not grid[0] > 0:
        raise ValueError(f"radii must be finite and > 0, got {grid}")
    tick = Ticks(progress, loss.num_batches * len(grid))

    def of_batch(single: Loss) -> list[float]:
        """The slope in rho, then a rise for each radius."""
        base, gradient = single.value_and_gradient()
        e = ball.ascent(gradient, loss.params)
        slopes = [float((g * x).sum(dtype=torch.float64)) for g, x in zip(gradient, e, strict=True)]
        numbers = [math.fsum(slopes) / ball.rho]
        for r in grid:
            with single.displaced([(r / ball.rho * x).to(w.dtype) for x, w in zip(e, loss.params, strict=True)]):
                numbers.append(float(single.value() - base))
            tick()
        return numbers

    columns = list(zip(*loss.over_batches(of_batch), strict=True))
    slope, *means = [batch_mean(loss, column) for column in columns]
    rises, reason = torch.tensor(means, dtype=torch.float64), None
    if not rises[:, 0].isfinite().all():
        r, rise = next((r, x[0]) for r, x in zip(grid, means, strict=True) if not math.isfinite(x[0]))
        reason = f"the loss is {rise} at the perturbed weights for rho = {r:.4g}"
        if not all(x.isfinite() for x in loss.batch_values()):
            reason = why_not_finite(loss)
    shares = torch.tensor(grid, dtype=torch.float64) * slope[0] / rises[:, 0]
    shares = torch.where(rises[:, 0] > 0, shares, math.nan)
    return RhoRange(
        torch.tensor(grid, dtype=torch.float64),
        rises[:, 0],
        rises[:, 1],
        shares,
        _half(grid, shares.tolist()),
        settings=settings("rho_range", loss, ball=ball),
        provenance=provenance(),
        reason=reason,
    )


def _half(radii: Sequence[float], shares: Sequence[float]) -> float | None:
    """The radius at which the share first falls below 0.5, interpolated on a logarithmic scale."""
    for k in range(1, len(radii)):
        if shares[k - 1] > 0.5 >= shares[k]:
            part = math.log(shares[k - 1] / 0.5) / math.log(shares[k - 1] / shares[k])
            return float(radii[k - 1] * (radii[k] / radii[k - 1]) ** part)
    return None
