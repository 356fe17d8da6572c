"""How far the loss rises in a ball around the weights: at its worst, and on average (arXiv:2302.07011)."""

from __future__ import annotations

import math
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, overload

import torch
from torch import Tensor

from sam_optim.core.geometry import Ball, Chart, ProductBall, p_norm
from sam_optim.core.random import Stream
from sam_optim.core.results import Estimate
from sam_optim.loss import Loss
from sam_optim.measures.ascent import Maximum, Point, evaluate, random_points, search
from sam_optim.measures.shared import (
    Progress,
    Ticks,
    batch_mean,
    batch_weights,
    checked,
    estimate,
    settings,
    student_half_width,
)

RESTARTS = 8  # searches per batch
HEATS = 4  # random points from which each search but the first begins
AGREEMENT = 0.05  # of the two best of them, relative


@overload
def worst_case_sharpness(
    loss: Loss,
    ball: Ball | ProductBall,
    *,
    num_steps: int = ...,
    num_restarts: int | None = ...,
    seed: int = ...,
    progress: Progress | None = ...,
) -> Estimate: ...
@overload
def worst_case_sharpness(
    loss: Loss,
    ball: Sequence[Ball],
    *,
    num_steps: int = ...,
    num_restarts: int | None = ...,
    seed: int = ...,
    progress: Progress | None = ...,
) -> list[Estimate]: ...


@checked
def worst_case_sharpness(
    loss: Loss,
    ball: Ball | ProductBall | Sequence[Ball],
    *,
    num_steps: int = 40,
    num_restarts: int | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Estimate | list[Estimate]:
    """The highest rise of the loss in the ball, batch by batch.

        S(w) = sum_b n_b / N max_{||T^-1 d||_p <= rho} l_b(w + d) - l_b(w)

    Each maximum is searched in u = d / (rho T), where the ball is the unit ball, by steps to the maximum of the
    extrapolated linear part, from w and from random points (see `measures.ascent`). The value is that of the best
    point, at or inside the radius: a lower bound of S, never below 0, because d = 0 counts. With `num_steps=1` it is
    the rise at SAM's own perturbation, where radii are equal. The defaults take 320 gradients per batch. In 144
    cases with small fitted networks they reached at least 0.998 of the best value known; in 14 of 126 others, chosen to
    be hard, they were more than 5 % below it, in 9 of these without a sign of it in `converged`. `num_steps=20,
    num_restarts=1` takes 20 gradients, and in large balls may miss more than half of S.

    Where every batch is stationary, as with one batch at its minimum, 2 / rho^2 S -> lambda_max(T H T) for rho -> 0
    (p = 2); where the gradients of single batches do not vanish, S is rho E||T g_b|| to first order. With T = |w|
    (eta = 0) S does not change where single weights are rescaled and the function is not; with eta > 0 it does.

    Args:
        loss: L, at the weights w. Each of its batches has a maximum of its own (m-sharpness): S depends on their size.
        ball: rho, p and T; `optimizer.ball` is what SAM searched. A weight with T = 0 never moves. A sequence of balls
            that differ in rho alone gives a list of results, in its order, from one pass over the data: the gradient
            at w is shared, and what a smaller ball holds counts for the larger ones, so that S does not fall with rho.
        num_steps: gradients per search, including the one at its start; one more forward pass follows at the end.
        num_restarts: searches per batch and ball, the first from w, the others from random points of the ball:
            each gives 15 % of its steps to each of four, and the rest to the climb that is then highest. None: 8, or 1
            if num_steps = 1.
        seed: of the random points, which are the same for all batches.
        progress: called with (done, total) steps.

    Returns:
        `value` in units of L. `stderr` over batches: how far it would move with other ones of the distribution.
        `details`, one entry for each batch: `batch_values`, `base_losses`, `lengths` (||d||_2 of the best point, in
        units of w), `best_steps` (the step that led to it), `restart_values`, the rise of each search, and `spread`,
        how far the second best is below the best, relative to it. `converged` is False where the spread of a batch
        is above 5 %, and with a single search, which nothing confirms; `reason` says which.

    Raises:
        ValueError: rho is 0, balls that differ in more than rho, or num_steps or num_restarts < 1.

    Source: arXiv:2302.07011, whose search is Auto-PGD along T g. The point that maximizes the linear part is along
    T^2 g, as in SAM and ASAM (arXiv:2010.01412, arXiv:2102.11600): in adaptive balls it finds up to a third more.
    """
    _check_loss(loss)
    balls = _balls(ball)
    if num_restarts is None:
        num_restarts = 1 if num_steps == 1 else RESTARTS
    if num_steps < 1 or num_restarts < 1:
        raise ValueError(f"num_steps and num_restarts must be >= 1, got {num_steps} and {num_restarts}")
    tick = Ticks(progress, loss.num_batches * len(balls) * num_restarts * num_steps)
    by_radius = sorted(set(balls), key=lambda b: b.rho) if len(balls) > 1 else balls
    tables = loss.over_batches(lambda single: _peaks(single, by_radius, num_steps, num_restarts, seed, tick))
    results = {}
    for k, one in enumerate(by_radius):
        peaks: list[_Peak] = [table[k] for table in tables]
        value, stderr = batch_mean(loss, [p.rise for p in peaks])
        reason = _doubt(peaks, num_restarts)
        results[one] = estimate(
            loss,
            value,
            stderr,
            num_samples=loss.num_batches,
            converged=reason is None or num_steps == 1,
            reason=reason if num_steps > 1 or not math.isfinite(value) else None,
            details={
                "batch_values": [p.rise for p in peaks],
                "base_losses": [p.base for p in peaks],
                "lengths": [p.length for p in peaks],
                "best_steps": [p.step for p in peaks],
                "restart_values": [p.restarts for p in peaks],
                "spread": [p.spread for p in peaks],
            },
            settings=settings(
                "worst_case_sharpness", loss, ball=one, num_steps=num_steps, num_restarts=num_restarts, seed=seed
            ),
        )
    return [results[b] for b in balls] if isinstance(ball, Sequence) else results[balls[0]]


@dataclass(frozen=True)
class _Peak:
    """The maximum of one batch in one ball, in numbers alone: nothing of the size of the model is kept."""

    base: float
    rise: float
    length: float
    step: int
    restarts: list[float]

    @property
    def spread(self) -> float:
        """How far the second best search lies below the best point, relative; nan for a single search."""
        if len(self.restarts) < 2:
            return math.nan
        return 1 - sorted(self.restarts)[-2] / self.rise if self.rise else 0.0


def _doubt(peaks: Sequence[_Peak], num_restarts: int) -> str | None:
    """Why the maxima may be higher than what was seen."""
    for i, peak in enumerate(peaks):
        if not math.isfinite(peak.base):
            return f"the loss of batch {i} is {peak.base} at the weights"
        if not math.isfinite(peak.rise):
            return f"the loss of batch {i} is {peak.rise} at step {peak.step} of the search"
    if num_restarts == 1:
        return "a single search, which no other one confirms: raise num_restarts"
    worst = max(peak.spread for peak in peaks)
    if worst > AGREEMENT:
        return f"the two best searches of a batch differ by {worst:.0%}: raise num_restarts or num_steps"
    return None


def _peaks(
    loss: Loss,
    balls: Sequence[Ball | ProductBall],
    num_steps: int,
    num_restarts: int,
    seed: int,
    tick: Callable[[], None],
) -> list[_Peak]:
    """The highest rises of one batch, in balls of ascending radii."""
    value, gradient = loss.value_and_gradient()
    base, centre = float(value), loss.zeros()
    peaks: list[_Peak] = []
    smaller: tuple[Ball | ProductBall, Maximum] | None = None
    for ball in balls:
        chart, starts = Chart(ball, loss.params), [centre]
        points = random_points(chart, centre, seed)
        if smaller is not None and smaller[1].step:
            starts.append(smaller[1].u)
        maxima = []
        for k in range(num_restarts):
            u = starts[k] if k < len(starts) else next(points)
            at_start = (base, chart.pull_back(gradient)) if k == 0 else evaluate(loss, chart, u)
            heats = HEATS if k else 1
            maxima.append(search(loss, chart, (u, *at_start), num_steps, points, tick, heats=heats))
        best = next((m for m in maxima if not math.isfinite(m.value)), max(maxima, key=lambda m: m.value))
        if smaller is not None and smaller[1].value > best.value:
            inside = smaller[0].rho / ball.rho  # u of the same d
            best = Maximum(smaller[1].value, [x * inside for x in smaller[1].u], smaller[1].step)
        length = float(p_norm(chart.displacement(best.u), 2))
        peaks.append(_Peak(base, best.value - base, length, best.step, [m.value - base for m in maxima]))
        smaller = ball, best
    return peaks


@overload
def average_sharpness(
    loss: Loss, ball: Ball | ProductBall, *, num_samples: int = ..., seed: int = ..., progress: Progress | None = ...
) -> Estimate: ...
@overload
def average_sharpness(
    loss: Loss, ball: Sequence[Ball], *, num_samples: int = ..., seed: int = ..., progress: Progress | None = ...
) -> list[Estimate]: ...


@checked
def average_sharpness(
    loss: Loss,
    ball: Ball | ProductBall | Sequence[Ball],
    *,
    num_samples: int = 100,
    seed: int = 0,
    progress: Progress | None = None,
) -> Estimate | list[Estimate]:
    """The mean rise of the loss under random displacements of the weights.

        S(w) = E[L(w + sigma T z)] - L(w),   z ~ N(0, I_P)       (T = 1: sigma^2/2 tr H(w) + O(sigma^4))

    In a ball of the sup norm z ~ U(-1, 1)^P, as in the published code, and the limit is a third of that. Each batch
    has draws of its own. The slope dl_b/dw d of each draw, whose mean is 0, is subtracted with a coefficient that is
    fitted to the other draws of the batch: the value stays without bias, and where w is not stationary most of the
    variance goes.

    Args:
        loss: L, at the weights w, P entries in total.
        ball: T, and as its rho sigma, the standard deviation (p = 2) or largest size (p = inf) of the noise on each
            weight in units of T. The noise is not normalized: ||T^-1 d||_2 is about sigma sqrt(P), and not within a
            radius (see `average_in_ball`). A sequence of balls that differ in rho alone gives a list of results, in its
            order, with the same draws of z and one pass at w for all.
        num_samples: draws for each batch, each of them one evaluation of its loss.
        seed: of the draws; those of a batch depend on its data and not on its place.
        progress: called with (done, total) evaluations.

    Returns:
        `value` in units of L. `stderr` over draws and batches: how far it would move with other draws and with other
        batches from the same distribution. `details`: `stderr_draws`, that of the draws on these data, which falls as
        num_samples ** -0.5; `stderr_batches`, from the spread of the batches, which holds both; `batch_values`;
        `base_losses`. With one batch `stderr` is `stderr_draws`.

    Raises:
        ValueError: rho is 0, balls that differ in more than rho, or num_samples < 2 (one draw has no standard error).

    Source: average-case sharpness, arXiv:2302.07011.
    """
    _check_loss(loss)
    balls = _balls(ball)
    if num_samples < 2:
        raise ValueError(f"num_samples must be >= 2 (one draw has no standard error), got {num_samples}")
    tick = Ticks(progress, loss.num_batches * len(balls) * num_samples)
    seeds = _Seeds(seed)
    tables = loss.over_batches(lambda single: _means(single, balls, num_samples, seeds.of(single), tick))
    weights = batch_weights(loss).tolist()
    results = []
    for k, one in enumerate(balls):
        means = [table[k] for table in tables]
        value, batches = batch_mean(loss, [m.rise for m in means])
        draws = math.sqrt(math.fsum(p * p * m.variance for p, m in zip(weights, means, strict=True)))
        widths = student_half_width(draws, num_samples), student_half_width(batches, loss.num_batches)
        result = estimate(
            loss,
            value,
            draws if loss.num_batches == 1 else max(draws, batches),
            num_samples=num_samples,
            half_width=widths[0] if loss.num_batches == 1 else max(widths),
            reason=next((f"the loss of batch {i} is {m.wrong}" for i, m in enumerate(means) if m.wrong), None),
            details={
                "stderr_draws": draws,
                "stderr_batches": batches,
                "batch_values": [m.rise for m in means],
                "base_losses": [m.base for m in means],
            },
            settings=settings("average_sharpness", loss, ball=one, num_samples=num_samples, seed=seed),
        )
        results.append(result)
    return results if isinstance(ball, Sequence) else results[0]


@checked
def average_in_ball(
    loss: Loss,
    ball: Ball | ProductBall,
    *,
    num_samples: int = 100,
    seed: int = 0,
    progress: Progress | None = None,
) -> Estimate:
    """The mean rise of the loss under random displacements that are as long as the radius of the ball.

        S(w) = E[L(w + d)] - L(w),   d = rho / sqrt(P) T z,   z ~ N(0, I_P),   so that E ||T^-1 d||^2 = rho^2

    So it is `average_sharpness` with sigma = rho / sqrt(P), which is near the weights where the worst case of the same
    ball is. In a ball of the sup norm, whose noise is within rho anyway, it is `average_sharpness` itself.

    Args:
        loss, num_samples, seed, progress: as in `average_sharpness`, and so are results and errors. P parameters.
        ball: T, and rho, the root mean square of ||T^-1 d||_2.
    """
    _check_loss(loss)
    _check_ball(ball)
    num = 1.0 if ball.norm == math.inf else math.sqrt(sum(w.numel() for w in loss.params))
    if isinstance(ball, Ball):
        shorter: Ball | ProductBall = replace(ball, rho=ball.rho / num)
    else:
        shorter = ProductBall([(replace(b, rho=b.rho / num), params) for b, params in ball.groups])
    result = average_sharpness(loss, shorter, num_samples=num_samples, seed=seed, progress=progress)
    return replace(result, settings=dict(result.settings) | {"measure": "average_in_ball", "ball": ball.to_dict()})


@dataclass(frozen=True)
class _Mean:
    """The mean rise of one batch in one ball over its draws, and the variance of that mean. wrong: a loss that is not
    finite, and where."""

    base: float
    rise: float
    variance: float
    wrong: str | None


def _means(
    loss: Loss, balls: Sequence[Ball | ProductBall], num_samples: int, seed: int, tick: Callable[[], None]
) -> list[_Mean]:
    charts, stream = [Chart(ball, loss.params) for ball in balls], Stream(seed)
    base, gradient = _value_and_slope(loss)
    rises = torch.empty(len(balls), num_samples, dtype=torch.float64)
    slopes = torch.zeros(num_samples, dtype=torch.float64)  # in the first ball
    pulled = charts[0].pull_back(gradient) if gradient else []
    like = loss.zeros()
    for i in range(num_samples):
        z = _noise(charts[0].norm, like, stream)
        slopes[i] = math.fsum(float((v * x).sum(dtype=torch.float64)) for v, x in zip(pulled, z, strict=False))
        for k, chart in enumerate(charts):
            with loss.displaced(chart.displacement(z)):
                rises[k, i] = float(loss.value()) - base
            tick()
    spread = float(p_norm(pulled, 2)) ** 2 * (1 if charts[0].norm == 2 else 1 / 3) if pulled else 0.0
    means = []
    for ball, x in zip(balls, rises, strict=True):
        ratio, wrong = ball.rho / balls[0].rho, None if math.isfinite(base) else f"{base} at the weights"
        if wrong is None and not x.isfinite().all():
            wrong = f"{float(x[~x.isfinite()][0])} at displaced weights"
        x = _without_slope(x, ratio * slopes, ratio**2 * spread)
        means.append(_Mean(base, float(x.mean()), float(x.var() / num_samples), wrong))
    return means


def _value_and_slope(loss: Loss) -> tuple[float, Point]:
    """The loss and its gradient; no gradient for what has none, such as the share of errors."""
    try:
        value, gradient = loss.value_and_gradient()
    except ValueError:
        return float(loss.value()), []
    return float(value), gradient


def _without_slope(x: Tensor, slope: Tensor, variance: float) -> Tensor:
    """x - b_i slope, with b_i = 1 + the least-squares coefficient of x - slope on slope over all draws but the i-th.

    As b_i does not depend on draw i, the mean keeps its expectation. `variance` is that of the slope; once added to the
    sum of squares, it keeps few draws from a wild b_i.
    """
    if not (math.isfinite(variance) and variance > 0):
        return x
    n = len(x)
    rest = x - slope
    mean_of_others = (rest.sum() - rest) / (n - 1)
    products = (slope * rest).sum() - slope * rest - mean_of_others * (slope.sum() - slope)
    squares = variance + slope.square().sum() - slope.square()
    return rest - products / squares * slope


class _Seeds:
    """A seed for the draws of each batch, by its content: the same wherever it stands, other ones for its copies."""

    def __init__(self, seed: int):
        Stream(seed)  # refuses what is no seed
        self._seed, self._seen = seed, Counter[Any]()

    def of(self, single: Loss) -> int:
        data = single.settings()["data"]
        self._seen[data] += 1
        return zlib.crc32(f"{self._seed} {data} {self._seen[data]}".encode())


def _noise(norm: float, params: Point, stream: Stream) -> Point:
    if norm == math.inf:
        return [2 * stream.uniform_like(w) - 1 for w in params]
    return [stream.normal_like(w) for w in params]


def _check_loss(loss: Any) -> None:
    if not isinstance(loss, Loss):
        raise TypeError(
            f"sharpness is measured on a Loss: pass Loss(model, criterion, batches), got {type(loss).__name__}"
        )


def _balls(ball: Any) -> list[Any]:
    """The ball, or those of a sequence, which share p and T."""
    balls = list(ball) if isinstance(ball, Sequence) else [ball]
    for one in balls:
        _check_ball(one)
    if len(balls) != 1 and len({replace(b, rho=1.0) if isinstance(b, Ball) else None for b in balls} | {None}) != 2:
        raise ValueError(f"a sequence of balls holds Balls that differ in rho alone, got {balls}")
    return balls


def _check_ball(ball: Ball | ProductBall) -> None:
    if not isinstance(ball, (Ball, ProductBall)):
        raise TypeError(f"sharpness needs a ball: pass Ball(rho) or optimizer.ball, got {type(ball).__name__}")
    if not ball.rho > 0:
        raise ValueError(f"sharpness needs a ball with rho > 0 (at rho = 0 it is 0 for every loss), got rho={ball.rho}")
