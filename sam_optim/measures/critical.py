"""The step at which going downhill stops to pay: a curvature from forward passes alone."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import Tensor

from sam_optim.core.results import Estimate
from sam_optim.loss import Loss
from sam_optim.measures.shared import Progress, Ticks, estimate, settings

MOST = 80  # evaluations of the loss


def critical_sharpness(
    loss: Loss,
    direction: Sequence[Tensor] | None = None,
    *,
    tol: float = 1e-4,
    progress: Progress | None = None,
) -> Estimate:
    """The curvature that decides which step along an update is too long.

        lambda_c = 2 / t_c,   t_c = min {t > 0 : L(w - t d) > L(w)},   d = grad L(w) or the direction of another update

    For a quadratic loss lambda_c = d^T H d / <g, d>, along the gradient g^T H g / g^T g, which is at most lambda_max;
    gradient descent with a learning rate above 2 / lambda_c raises the loss. One gradient, then five to fifteen forward
    passes: a step is tried, moved by the parabola through it with the slope at w, until t_c is bracketed, and bisected.

    Args:
        loss: L, at the weights w.
        direction: d, in the shapes of `loss.params`, such as the update of an optimizer. Its sign does not matter:
            steps go where the loss falls at first. lambda_c is in units of 1 / t, so it is inverse to the length of d.
        tol: of t_c, relative: the bracket is as narrow.
        progress: called with (evaluations done, the most that there can be).

    Returns:
        `value` in units of L per squared unit of w, for the gradient. `details`: `step` t_c; `slope`, |<g, d>|;
        `num_evaluations`. Not converged, with a `reason`: nan where the slope is 0 or not finite, 0 where the loss does
        not rise along d as far as was looked.

    Raises:
        ValueError: a direction of other shapes, tol <= 0.

    Source: arXiv:2601.16979.
    """
    if not tol > 0:
        raise ValueError(f"tol must be > 0, got {tol}")
    base, gradient = loss.value_and_gradient()
    d = gradient if direction is None else [x.detach() for x in direction]
    if (got := [tuple(x.shape) for x in d]) != [tuple(w.shape) for w in loss.params]:
        raise ValueError(
            f"direction needs one tensor for each parameter, of its shape (see `params`), got shapes {got}"
        )
    inner = math.fsum(float((g.double() * x.to(g.device).double()).sum()) for g, x in zip(gradient, d, strict=True))
    slope, sign = abs(inner), math.copysign(1.0, inner)
    tick = Ticks(progress, MOST)
    num = 0

    def rise(t: float) -> float:
        nonlocal num
        num += 1
        with loss.displaced([(-sign * t * x).to(w.dtype) for x, w in zip(d, loss.params, strict=True)]):
            value = float(loss.value() - base)
        tick()
        return value

    low, high, reason = 0.0, math.inf, None
    if slope and math.isfinite(slope):
        t = _first_step(loss.params, d)
        while num < MOST and not high - low <= tol * low:
            r = rise(t)
            if r > 0 or math.isnan(r):
                high = t
            else:
                low = t
            t = _next_step(t, r, slope, low, high, tol)
    else:
        reason = "the slope along the direction is 0" if slope == 0 else None
    step = (low + high) / 2
    if reason is None and math.isinf(high) and math.isfinite(slope):
        reason = f"the loss does not rise along the direction up to t = {low:.2g}"
    converged = math.isfinite(step) and high - low <= tol * low
    return estimate(
        2 / step if slope and math.isfinite(slope) else math.nan,
        math.nan,
        converged=converged,
        reason=reason if reason or converged else f"t_c is not bracketed to tol after {num} evaluations",
        details={"step": step if math.isfinite(step) else None, "slope": slope, "num_evaluations": num},
        settings=settings("critical_sharpness", loss, along="gradient" if direction is None else "direction", tol=tol),
    )


def _first_step(params: Sequence[Tensor], d: Sequence[Tensor]) -> float:
    """A step of a thousandth of the weights."""
    lengths = [math.sqrt(math.fsum(float(x.detach().double().square().sum()) for x in v)) for v in (params, d)]
    return 1e-3 * (lengths[0] or 1.0) / lengths[1]


def _next_step(t: float, rise: float, slope: float, low: float, high: float, tol: float) -> float:
    """A little beyond where the parabola with this slope at 0 through (t, rise) is 0 again; the middle of the bracket
    where that is outside of it."""
    curvature = rise + slope * t  # times t^2
    guess = slope * t * t / curvature if curvature > 0 else math.inf
    guess *= 1 + tol / 4 if guess >= t else 1 - tol / 4
    if math.isinf(high):
        return min(max(guess, 2 * t if math.isinf(guess) else t * (1 + tol / 2)), 16 * t)
    if not low:
        return max(min(guess, t / 2 if not math.isfinite(guess) else t * (1 - tol / 2)), t / 16)
    return guess if low < guess < high and abs(guess - t) < (high - low) / 2 else (low + high) / 2
