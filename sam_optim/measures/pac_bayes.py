"""How much noise, and how large a displacement, the weights tolerate: sigma, alpha, the bounds of arXiv:1912.02178."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sam_optim.core.geometry import canonical_adaptive, scale
from sam_optim.core.random import Stream
from sam_optim.core.results import Estimate
from sam_optim.loss import Loss
from sam_optim.measures.shared import Progress, Ticks, check_vector, checked, estimate, settings, student_half_width

RISES = ("loss", "error")
FURTHEST = 60  # factors of at most 10 between the first guess and where the search gives up
SLOPE = 1.1  # the slope at the end is that between sigma / 1.1 and sigma * 1.1


@checked
def pac_bayes_sigma(
    loss: Loss,
    *,
    target: float,
    of: str = "loss",
    adaptive: bool | str = False,
    eps: float = 1e-3,
    num_samples: int = 20,
    tol: float = 1e-3,
    seed: int = 0,
    progress: Progress | None = None,
) -> Estimate:
    """The largest noise on the weights under which the loss rises by no more than the target.

        sigma = max {s : E[L(w + s z)] - L(w) <= target},   z ~ N(0, I_P)
        adaptive:                            noise of each weight N(0, s^2 T^2 + eps^2),   T = |w| or another

    The draws z are the same for every s, in pairs z, -z, so the rise is a smooth function of s and the search does not
    chase noise. It ends at the first crossing of the target that it meets, which is the largest where the rise grows
    with s. For a quadratic loss and no eps, sigma = sqrt(2 target / tr(T H T)).

    Args:
        loss: L, at the weights w.
        target: of the rise, > 0: in units of L, or in [0, 1] for the error.
        of: whose rise, "loss" or "error", the share of examples whose largest output is not that of their target.
        adaptive: T. False: 1. True or "elementwise": |w|, the magnitude-aware noise of the source. "filter", "layer":
            their norms (see `Ball`).
        eps: noise that is added where adaptive, a standard deviation in units of w. The source has 1e-3. With 0,
            sigma changes under no rescaling of single weights that leaves the function as it is.
        num_samples: draws, rounded up to pairs: evaluations of L for each s.
        tol: of sigma, relative; the search stops at a bracket this narrow.
        seed: of the draws.
        progress: called with (evaluations done, a guess of how many there will be).

    Returns:
        `value`, a standard deviation (not a variance) in units of w, of T where adaptive. `stderr` over draws: that of
        the rise at sigma divided by its slope there; the batches are taken as they are. `details`:
        `rise` at sigma, and `rise_stderr`; `num_evaluations` of L. If no s reaches
        the target, or the noise of eps alone exceeds it, the value is nan and `reason` says which.

    Raises:
        ValueError: target <= 0 (or >= 1 for the error), num_samples < 2, tol or eps out of range, an unknown choice.

    Source: arXiv:1912.02178. Published code for it passes s^2 where the standard deviation belongs.
    """
    _check(target, of, eps)
    if num_samples < 2:
        raise ValueError(f"num_samples must be >= 2 (draws come in pairs z, -z), got {num_samples}")
    chosen = canonical_adaptive(adaptive)
    if not chosen:
        eps = 0.0
    measured = loss.with_criterion(share_wrong) if of == "error" else loss
    scales = [scale(w, chosen, 0.0) for w in loss.params]
    pairs, zeros = (num_samples + 1) // 2, loss.zeros()
    tick = Ticks(progress, 2 * pairs * 12)
    base = float(measured.value())

    def rises(s: float) -> list[float]:
        """The rise for each pair, at the standard deviation s."""
        stream, per_pair = Stream(seed), []
        widths = [(s * t) if not eps else ((s * t).square() + eps**2).sqrt() for t in scales]
        for _ in range(pairs):
            z = [width * stream.normal_like(x) for width, x in zip(widths, zeros, strict=True)]
            values = []
            for sign in (1, -1):
                with measured.displaced([sign * x for x in z]):
                    values.append(float(measured.value()))
                tick()
            per_pair.append(sum(values) / 2 - base)
        return per_pair

    search = _Search(lambda s: math.fsum(rises(s)) / pairs, target, tol)
    sigma, reason = search.run(_first_guess(loss, scales)) if math.isfinite(base) else (math.nan, None)
    details: dict[str, Any] = {}
    stderr = half_width = math.nan
    if math.isfinite(sigma):
        at = rises(sigma)
        low, high = math.fsum(rises(sigma / SLOPE)) / pairs, math.fsum(rises(sigma * SLOPE)) / pairs
        slope = (high - low) / (sigma * (SLOPE - 1 / SLOPE))
        spread = float(torch.tensor(at, dtype=torch.float64).std()) / math.sqrt(pairs) if pairs > 1 else math.nan
        stderr = spread / slope if slope > 0 else math.nan
        half_width = student_half_width(stderr, pairs)
        details = {
            "rise": math.fsum(at) / pairs,
            "rise_stderr": spread,
            "interval": [sigma - half_width, sigma + half_width] if math.isfinite(half_width) else None,
            "num_evaluations": 2 * pairs * (search.num_calls + 3),
        }
    options = {"target": target, "of": of, "adaptive": chosen or False, "eps": eps, "tol": tol}
    return estimate(
        loss,
        sigma,
        stderr,
        num_samples=2 * pairs,
        half_width=half_width,
        reason=reason,
        details=details,
        settings=settings("pac_bayes_sigma", loss, **options, num_samples=2 * pairs, seed=seed),
    )


@checked
def sharpness_alpha(
    loss: Loss,
    *,
    target: float,
    of: str = "loss",
    adaptive: bool | str = False,
    eps: float = 1e-3,
    num_steps: int = 20,
    tol: float = 1e-2,
    progress: Progress | None = None,
) -> Estimate:
    """The largest displacement of the weights under which the loss rises by no more than the target, at its worst.

        alpha = max {a : max_{|d_i| <= a T_i + eps} L(w + d) - L(w) <= target}       (eps only where adaptive)

    The maximum is over all batches together. It is searched by ascent along the signs of the gradient with steps that
    shrink, so the value is an upper bound of alpha, as good as the search.

    Args:
        loss, target, of, adaptive, eps: as in `pac_bayes_sigma`. With of="error" the ascent is that of the loss, and
            the largest rise of the error on its way counts.
        num_steps: gradients for each a.
        tol: of alpha, relative.
        progress: called with (gradients done, a guess of how many there will be).

    Returns:
        `value` in units of w, of T where adaptive. No draws, so `stderr` is nan. `details`: `rise` found at the value.

    Raises:
        ValueError: as `pac_bayes_sigma`.

    Source: arXiv:1912.02178.
    """
    _check(target, of, eps)
    if num_steps < 1:
        raise ValueError(f"num_steps must be >= 1, got {num_steps}")
    chosen = canonical_adaptive(adaptive)
    if not chosen:
        eps = 0.0
    scales = [scale(w, chosen, 0.0) for w in loss.params]
    error = loss.with_criterion(share_wrong) if of == "error" else None
    tick = Ticks(progress, num_steps * 10)
    base = float((error or loss).value())
    _, first = loss.value_and_gradient()
    if not any(g.any() for g in first):  # no sign to follow: the climb from a stationary point begins at some corner
        stream = Stream(0)
        first = [stream.rademacher_like(g) for g in first]

    def rise(a: float) -> float:
        """The highest found in the box |d| <= a T + eps: never below 0, which d = 0 gives."""
        widths = [a * t + eps for t in scales]
        u, gradient, best = [torch.zeros_like(g) for g in first], first, 0.0
        for k in range(num_steps):
            step = 2 * (1 - k / num_steps)
            u = [(x + step * (width * g).sign()).clamp(-1, 1) for x, width, g in zip(u, widths, gradient, strict=True)]
            with loss.displaced([width * x for width, x in zip(widths, u, strict=True)]):
                value, gradient = loss.value_and_gradient()
                reached = float(value) if error is None else float(error.value())
            tick()
            if not math.isfinite(reached):
                return math.nan
            best = max(best, reached - base)
        return best

    search = _Search(rise, target, tol)
    alpha, reason = search.run(_first_guess(loss, scales) / 10) if math.isfinite(base) else (math.nan, None)
    options = {"target": target, "of": of, "adaptive": chosen or False, "eps": eps, "num_steps": num_steps, "tol": tol}
    return estimate(
        loss,
        alpha,
        math.nan,
        reason=reason,
        details={"rise": search.rise_at_low} if math.isfinite(alpha) else {},
        settings=settings("sharpness_alpha", loss, **options),
    )


@checked
def flatness_bounds(
    loss: Loss,
    *,
    target: float = 0.1,
    of: str = "error",
    initial_weights: Sequence[Tensor] | None = None,
    eps: float = 1e-3,
    delta: float = 0.1,
    num_samples: int = 20,
    num_steps: int = 20,
    seed: int = 0,
    progress: Progress | None = None,
) -> dict[str, Estimate]:
    """The flatness measures of arXiv:1912.02178 that need the weights, the training data and nothing else.

        pacbayes_flatness         1 / sigma^2                                  sigma: `pac_bayes_sigma`
        sharpness_flatness        1 / alpha^2                                  alpha: `sharpness_alpha`
        pacbayes_orig             ||w||^2 / (4 sigma^2) + log(N / sigma) + 10
        sharpness_orig            ||w||^2 log(2 P) / (4 alpha^2) + log(N / alpha) + 10
        pacbayes_mag_flatness     1 / sigma'^2                                 sigma', alpha': the adaptive ones, |w|
        sharpness_mag_flatness    1 / alpha'^2
        pacbayes_mag_orig         1/4 sum_i log((eps^2 + (sigma'^2 + 1) ||w||^2 / P) / (eps^2 + sigma'^2 w_i^2))
                                  + log(N / sigma') + 10
        sharpness_mag_orig        1/4 sum_i log((eps^2 + (alpha'^2 + 4 log(2 P / delta)) ||w||^2 / P)
                                  / (eps^2 + alpha'^2 w_i^2)) + log(N / delta) + 10

    With `initial_weights` w0 also *_init: the same with w - w0 in place of w. N examples, P weights. These are the
    terms under the root of the bounds, which divides them by N - 1; none is a bound on anything without that.

    Args:
        loss: L of the training data at the weights w.
        target, of: the rise that is tolerated; the source has 0.1 of the error.
        initial_weights: w0, in the shapes of `loss.params`.
        eps: of the magnitude-aware ones, in units of w.
        delta: the probability with which a bound may fail.
        num_samples, seed: of the sigmas. num_steps: of the alphas.
        progress: called with (measures of sigma and alpha done, 4).

    Returns:
        An Estimate for each name, in the order above; `details`: `sigma` or `alpha`. `stderr` of those with sigma is
        that of sigma times the derivative; of the others nan.

    Raises:
        ValueError: as `pac_bayes_sigma`; initial weights of other shapes; delta not in (0, 1).
    """
    if not 0 < delta < 1:
        raise ValueError(f"delta is a probability between 0 and 1, got {delta}")
    if initial_weights is not None:
        check_vector("initial_weights", initial_weights, loss.params)
    tick = Ticks(progress, 4)
    options: dict[str, Any] = {"target": target, "of": of, "eps": eps}
    w = [p.detach().double() for p in loss.params]
    origins = {"orig": w}
    if initial_weights is not None:
        origins["init"] = [x - x0.detach().to(x) for x, x0 in zip(w, initial_weights, strict=True)]
    n, num = loss.num_examples, sum(x.numel() for x in w)
    estimates: dict[str, Estimate] = {}
    for mag, adaptive in (("", False), ("mag_", True)):
        sigma = pac_bayes_sigma(loss, **options, adaptive=adaptive, num_samples=num_samples, seed=seed)
        tick()
        alpha = sharpness_alpha(loss, **options, adaptive=adaptive, num_steps=num_steps)
        tick()
        for family, size in (("pacbayes", sigma), ("sharpness", alpha)):
            bounds = {"flatness": lambda s: s**-2}
            for name, d in origins.items():
                bounds[name] = _bound(family, mag, d, n, num, eps, delta)
            for name, bound in bounds.items():
                key = f"{family}_{mag}{name}"
                estimates[key] = _of(loss, size, bound, key, {"of": of, "target": target, "eps": eps, "delta": delta})
    return estimates


def _bound(
    family: str, mag: str, d: Sequence[Tensor], n: int, num: int, eps: float, delta: float
) -> Callable[[float], float]:
    squared = math.fsum(float(x.square().sum()) for x in d)
    sharpness = family == "sharpness"
    if not mag:
        factor = math.log(2 * num) if sharpness else 1.0
        return lambda s: squared * factor / (4 * s**2) + math.log(n / s) + 10

    def bound(s: float) -> float:
        above = eps**2 + (s**2 + (4 * math.log(2 * num / delta) if sharpness else 1.0)) * squared / num
        logs = math.fsum(float((above / (eps**2 + s**2 * x.square())).log().sum()) for x in d)
        return logs / 4 + math.log(n / (delta if sharpness else s)) + 10

    return bound


def _of(loss: Loss, size: Estimate, bound: Callable[[float], float], name: str, options: dict[str, Any]) -> Estimate:
    """The bound at sigma or alpha, its standard error by the derivative."""
    s = size.value
    value = bound(s) if math.isfinite(s) else math.nan
    slope = (bound(1.001 * s) - bound(0.999 * s)) / (0.002 * s) if math.isfinite(value) else math.nan
    return estimate(
        loss,
        value,
        abs(slope) * size.stderr,
        num_samples=size.num_samples,
        converged=size.converged,
        reason=size.reason,
        details={"sigma" if name.startswith("pacbayes") else "alpha": s},
        settings=dict(size.settings) | {"measure": name} | options,
    )


class _Search:
    """The s at which a rise that grows with s crosses the target: bracketed from a guess, then halved, in log s.

    Steps are those of a parabola through 0, which the rise is at small s; a rise that is not finite is above."""

    def __init__(self, rise: Callable[[float], float], target: float, tol: float):
        self._rise, self._target, self._tol = rise, target, tol
        self.num_calls = 0
        self.rise_at_low = 0.0

    def run(self, s: float) -> tuple[float, str | None]:
        low, high = 0.0, math.inf
        for k in range(FURTHEST):
            rise = self._rise(s)
            self.num_calls += 1
            if rise <= self._target:  # never with nan
                low, self.rise_at_low = s, rise
            else:
                high = s
            if low and high / low <= 1 + self._tol:
                return low, None
            s = self._next(s, rise, low, high, k)
        if math.isinf(high):
            return math.nan, f"the rise stays below the target up to {low:.2g}: choose a smaller target"
        if not low:
            return math.nan, f"the rise is above the target down to {high:.2g}: choose a larger target, or smaller eps"
        return low, None

    def _next(self, s: float, rise: float, low: float, high: float, k: int) -> float:
        ratio = self._target / rise if rise > 0 and math.isfinite(rise) else (100.0 if s == low else 0.01)
        guess = s * min(max(math.sqrt(ratio), 0.1), 10.0)
        if math.isinf(high):
            return max(guess * (1 + self._tol / 2), s * (1 + self._tol))
        if not low:
            return min(guess * (1 - self._tol / 2), s / (1 + self._tol))
        # on the far side of the guess, so that a good one closes the bracket; in between halves, against bad ones
        guess *= (1 + self._tol / 3) if s == low else (1 - self._tol / 3)
        return guess if k % 3 and low < guess < high else math.sqrt(low * high)


def _first_guess(loss: Loss, scales: Sequence[Tensor]) -> float:
    """A percent of the weights' size in units of T."""
    squares = math.fsum(float(w.detach().double().square().sum()) for w in loss.params)
    lengths = math.fsum(
        float((t.double().expand_as(w)).square().sum()) for t, w in zip(scales, loss.params, strict=True)
    )
    return 0.01 * math.sqrt(squares / lengths) if squares and lengths else 0.01


def share_wrong(outputs: Any, target: Any) -> Tensor:
    """The share of examples whose largest output is not that of their target."""
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or not isinstance(target, Tensor):
        got = f"shape {tuple(outputs.shape)}" if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(f"of='error' needs outputs (n, K) and targets that are tensors, got {got}; use of='loss'")
    labels = target.argmax(dim=1) if target.ndim == 2 else target
    return (outputs.argmax(dim=1) != labels).double().mean()


def _check(target: float, of: str, eps: float) -> None:
    if of not in RISES:
        raise ValueError(f"of must be 'loss' or 'error', got {of!r}")
    if not (math.isfinite(target) and target > 0) or (of == "error" and target >= 1):
        raise ValueError(f"target is a rise and must be > 0, and below 1 for the error, got {target}")
    if not (math.isfinite(eps) and eps >= 0):
        raise ValueError(f"eps is a standard deviation in units of w and must be >= 0, got {eps}")
