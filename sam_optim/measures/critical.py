"""The step at which the loss begins to rise along an update: a curvature from forward passes alone."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sam_optim.core.results import Estimate
from sam_optim.loss import Loss
from sam_optim.measures.shared import Progress, Ticks, check_vector, checked, estimate, settings, why_not_finite

MOST = 80  # evaluations of the loss


@checked
def critical_sharpness(
    loss: Loss,
    direction: Sequence[Tensor] | Loss | None = None,
    *,
    tol: float = 1e-4,
    first_step: float | None = None,
    max_evaluations: int = MOST,
    progress: Progress | None = None,
) -> Estimate:
    """The curvature that decides which step along an update is too long.

        lambda_c = 2 / t_c,   t_c = min {t > 0 : L(w - t d) > L(w)},   d = grad L(w) or the direction of another update

    For a quadratic loss lambda_c = d^T H d / |<g, d>|, along the gradient g^T H g / g^T g, which is at most lambda_max;
    gradient descent with a learning rate above 2 / lambda_c raises the loss. It takes one gradient
    if no direction is given, then forward passes alone: a step is tried, and moved to the root of a polynomial
    through the losses so far, until t_c is bracketed. With tol = 0.02 five to ten are enough, for models of any size.

    Args:
        loss: L, at the weights w.
        direction: d, in the shapes of `loss.params`, such as the update of an optimizer. Its sign does not matter:
            steps go where the loss falls at first. lambda_c is in units of 1 / t, so it is inverse to the length of d.
            Another Loss of the same weights: its gradient, for the relative critical sharpness, how far a step down the
            other loss may go before this one rises. Where this one rises at once, it is nan, with a reason.
        tol: width of the bracket of t_c, relative.
        first_step: the first t; with a direction also -t, for the slope. None: a hundredth of the weights' length,
            with a direction a thousandth.
        max_evaluations: of the loss at weights other than w; after them the best guess in the bracket, not converged.
        progress: called with (evaluations done, the most that there can be).

    Returns:
        `value` in units of L per squared unit of w, for the gradient. `details`: `step` t_c; `slope`, |<g, d>|, from
        two evaluations where a direction is given; `num_evaluations`. Not converged, with a `reason`: nan where the
        slope is 0 or not finite, 0 where the loss does not rise along d as far as it was evaluated. Where the loss is
        not finite from t_c on, `reason` says so; not converged where it is nan there.

    Raises:
        ValueError: a direction of other shapes, tol not between 0 and 1, first_step <= 0, max_evaluations < 3.

    Source: arXiv:2601.16979.
    """
    if not (first_step is None or first_step > 0) or max_evaluations < 3:
        raise ValueError(f"first_step must be > 0 and max_evaluations >= 3, got {first_step} and {max_evaluations}")
    other = direction if isinstance(direction, Loss) else None
    along = "gradient" if direction is None else "gradient of another loss" if other is not None else "direction"
    if isinstance(direction, Loss):
        direction = direction.gradient()
    if direction is not None:
        check_vector("direction", direction, loss.params)
    base, d = (loss.value(), list(direction)) if direction is not None else loss.value_and_gradient()
    is_finite = all(bool(x.isfinite().all()) for x in d)
    if direction is not None and other is None and not is_finite:
        raise ValueError("direction has entries that are not finite, so no step goes along it")
    tick, rises = Ticks(progress, max_evaluations), {0.0: 0.0}
    dtypes = [torch.promote_types(w.dtype, torch.float32) for w in loss.params]

    def rise(t: float) -> float:
        if t not in rises:
            with loss.displaced([-t * x.to(dtype) for x, dtype in zip(d, dtypes, strict=True)]):
                rises[t] = float(loss.value() - base)
            tick()
        return rises[t]

    t = first_step or _first_step(loss.params, d, 1e-2 if direction is None else 1e-3)
    if direction is None:
        slope = math.fsum(float(x.double().square().sum()) for x in d)
    else:
        slope = (rise(-t) - rise(t)) / (2 * t) if math.isfinite(t) else 0.0
    sign, slope = math.copysign(1.0, slope), abs(slope)
    is_defined = slope > 0 and math.isfinite(slope) and not (other is not None and sign < 0)
    low, high, below, num_low, num_high, reason = 0.0, math.inf, 0.0, 0, 0, None

    def ratio(t: float) -> float:
        """The rise divided by t, which is a straight line for a quadratic loss."""
        return rises[sign * t] / t if t else -slope

    if is_defined:
        while not high - low <= tol * low and (sign * t in rises or len(rises) <= max_evaluations):
            r = rise(sign * t)
            if r > 0 or math.isnan(r):
                high, num_low, num_high = t, 0, num_high + 1
            else:
                below, low, num_low, num_high = low, t, num_low + 1, 0
            if math.isinf(high):
                growth = 1 + tol / 2 if num_low <= 2 else 2.0 ** (num_low - 2)
                t = min(max(_root(ratio, below, low) * (1 + tol / 4), growth * low), 16 * low)
                num_low *= t < 16 * low  # a step that was cut says nothing against the next root
                continue
            rest = [sign * x for x in rises if sign * x >= 0 and sign * x not in (low, high)]
            third = min(rest, key=lambda x: min(abs(x - low), abs(x - high)), default=low)
            t = _bent_root(ratio, low, high, third) * (1 - tol / 4 if num_high else 1 + tol / 4)
            if not low:
                t = max(min(t, high * (1 - tol / 2)), high / 16) if math.isfinite(t) else high / 2
            elif max(num_low, num_high) % 3 == 0 or not math.isfinite(t):
                t = (low + high) / 2
            elif not low < t < high:  # the root is at one of the two: close the bracket there
                t = low * (1 + 0.75 * tol) if t <= low else high * (1 - 0.75 * tol)
    else:
        reason = "the slope along the direction is 0" if slope == 0 else None
        if slope and math.isfinite(slope):
            reason = "the loss rises at once along the gradient of the other loss"
        if other is not None and not is_finite:
            reason = f"of the other loss: {why_not_finite(other)}"
        elif math.isfinite(base) and not math.isfinite(slope):
            wrong = next((x for x in (t, -t) if not math.isfinite(rises.get(x, 0.0))), None)
            reason = None if wrong is None else f"the loss is {rises[wrong]} at w - t d for t = {wrong:.2g}"
    if is_defined and math.isfinite(high) and not math.isfinite(end := rises[sign * high]):
        reason = f"the loss is {end} from t = {high:.2g} on: it is not seen to rise before"
    num = len(rises) - 1
    converged = math.isfinite(high) and high - low <= tol * low and not math.isnan(rises[sign * high])
    step = (low + high) / 2 if high - low <= tol * low or math.isinf(high) else t
    if is_defined and math.isinf(high):
        reason = f"the loss does not rise along the direction up to t = {low:.2g}"
    reason = reason or (None if is_defined else why_not_finite(loss))
    return estimate(
        loss,
        2 / step if is_defined else math.nan,
        math.nan,
        converged=converged,
        reason=reason if reason or converged else f"t_c is not bracketed to tol after {num} evaluations",
        details={"step": step if math.isfinite(step) else None, "slope": slope, "num_evaluations": num},
        settings=settings("critical_sharpness", loss, along=along, tol=tol),
    )


def _first_step(params: Sequence[Tensor], d: Sequence[Tensor], share: float) -> float:
    """A step of this share of the weights."""
    lengths = [math.sqrt(math.fsum(float(x.detach().double().square().sum()) for x in v)) for v in (params, d)]
    return share * (lengths[0] or 1.0) / lengths[1] if lengths[1] else math.inf


def _root(f: Callable[[float], float], a: float, b: float) -> float:
    """The root of the straight line through f(a) and f(b) > f(a), a < b; inf if it has none."""
    fa, fb = f(a), f(b)
    return b - fb * (b - a) / (fb - fa) if fa < fb < math.inf else math.inf


def _bent_root(f: Callable[[float], float], a: float, b: float, c: float) -> float:
    """The root in (a, b) of the parabola through f(a) < 0 < f(b) and f(c)."""
    fa, fb, fc = f(a), f(b), f(c)
    slope = (fb - fa) / (b - a)
    bend = ((fc - fb) / (c - b) - slope) / (c - a) if c not in (a, b) and math.isfinite(fb + fc) else 0.0
    linear = slope - bend * (b - a)
    if fa == 0 or not fb < math.inf:
        return a if fa == 0 else math.inf
    return a - 2 * fa / (linear + math.sqrt(max(linear * linear - 4 * bend * fa, 0.0)))
