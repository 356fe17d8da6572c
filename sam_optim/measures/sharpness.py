"""How far the loss rises in a ball around the weights: at its worst, and on average (arXiv:2302.07011)."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sam_optim.geometry import Ball, Chart, ProductBall, p_norm
from sam_optim.loss import Loss
from sam_optim.measures.record import Progress, Ticks, estimate, settings
from sam_optim.results import Estimate, mean_over_batches
from sam_optim.rng import Stream

Point = list[Tensor]


def worst_case_sharpness(
    loss: Loss,
    ball: Ball | ProductBall,
    *,
    num_steps: int = 20,
    num_restarts: int = 1,
    seed: int = 0,
    progress: Progress | None = None,
) -> Estimate:
    """The highest rise of the loss in the ball, batch by batch.

        S(w) = sum_b n_b / N max_{||T^-1 d||_p <= rho} l_b(w + d) - l_b(w)

    Each maximum is searched by Auto-PGD in u = d / (rho T), where the ball is the unit ball. The value is that of the
    best point found, at or inside the radius: a lower bound of S, never below 0, because d = 0 counts. With
    `num_steps=1` it is the rise at SAM's own perturbation.

    Args:
        loss: L, at the weights w. Each of its batches has a maximum of its own (m-sharpness): S depends on their size.
        ball: rho, p and T; `optimizer.ball` is what SAM searched. A weight with T = 0 never moves.
        num_steps: forward and backward passes per batch, beyond the one at w.
        num_restarts: searches per batch. The first starts at w, the others at random points of the ball.
        seed: of these random points, which are the same for all batches.
        progress: called with (done, total) steps.

    Returns:
        `value` in units of L. `stderr` over batches: how far it would move with others from the same distribution.
        `details`, one entry for each batch: `batch_values`, `base_losses`, `lengths` (||d||_2 of the point found, in
        units of w), `best_steps` (the step that found it; near `num_steps`, more steps would find more).

    Raises:
        ValueError: rho is 0, or num_steps or num_restarts < 1.

    Source: arXiv:2302.07011; Auto-PGD, arXiv:2003.01690. Ascent in u is what fits T: the published code steps along
    T g instead of T^2 g, and finds up to a quarter less in adaptive balls.
    """
    _check_ball(ball)
    if num_steps < 1 or num_restarts < 1:
        raise ValueError(f"num_steps and num_restarts must be >= 1, got {num_steps} and {num_restarts}")
    chart = Chart(ball, loss.params)
    tick = Ticks(progress, loss.num_batches * num_restarts * num_steps)
    found: list[_Search] = []
    bases: list[float] = []
    for single in loss.single_batches():
        starts = _starts(chart, loss.params, num_restarts, seed)
        searches = [_auto_pgd(single, chart, u, num_steps, tick) for u in starts]
        bases.append(searches[0].start_value)
        failed = [s for s in searches if not math.isfinite(s.value)]
        found.append(failed[0] if failed else max(searches, key=lambda s: s.value))
    rises = [s.value - base for s, base in zip(found, bases, strict=True)]
    value, stderr = mean_over_batches(rises, loss.batch_sizes)
    first = next((b for b, s in enumerate(found) if not math.isfinite(s.value)), None)
    return estimate(
        value,
        stderr,
        num_samples=loss.num_batches,
        reason=None if first is None else f"the loss of batch {first} is not finite at step {found[first].step}",
        details={
            "batch_values": rises,
            "base_losses": bases,
            "lengths": [float(p_norm(chart.displacement(s.u), 2)) for s in found],
            "best_steps": [s.step for s in found],
        },
        settings=settings(
            "worst_case_sharpness", loss, ball=ball, num_steps=num_steps, num_restarts=num_restarts, seed=seed
        ),
    )


def average_sharpness(
    loss: Loss, ball: Ball | ProductBall, *, num_samples: int = 100, seed: int = 0, progress: Progress | None = None
) -> Estimate:
    """The mean rise of the loss under random displacements of the weights.

        S(w) = E[L(w + rho T z)] - L(w),   z ~ N(0, I_P)         (T = 1: rho^2/2 tr H(w) + O(rho^4))

    In a ball of the sup norm z ~ U(-1, 1)^P, as in the published code, and the limit is a third of that. The draws come
    in pairs z, -z, each half of which has the distribution above: the slope of L, which dominates the variance where
    w is not stationary, cancels.

    Args:
        loss: L, at the weights w, P entries in total.
        ball: T, and rho, the standard deviation (p = 2) or largest size (p = inf) of the noise on each weight in units
            of T. The noise is not normalised: ||T^-1 d||_2 is about rho sqrt(P).
        num_samples: evaluations of L at displaced weights, rounded up to pairs. All batches see the same draws.
        seed: of the draws.
        progress: called with (done, total) evaluations.

    Returns:
        `value` in units of L. `stderr` over draws and batches: how far it would move with other draws and with other
        batches from the same distribution, from the two-way table of pairs by batches. `details`: `stderr_draws`, that
        of the draws on these data, which falls as num_samples ** -0.5; `stderr_batches`; `batch_values`; `base_losses`.
        With one batch `stderr` is `stderr_draws`; with one pair it is nan.

    Raises:
        ValueError: rho is 0, or num_samples < 2.

    Source: average-case sharpness, arXiv:2302.07011.
    """
    _check_ball(ball)
    if num_samples < 2:
        raise ValueError(f"num_samples must be >= 2 (draws come in pairs z, -z), got {num_samples}")
    num_pairs = (num_samples + 1) // 2
    chart, stream = Chart(ball, loss.params), Stream(seed)
    tick = Ticks(progress, 2 * num_pairs)
    base = loss.batch_values()
    noise = (_noise(ball.norm, loss.params, stream) for _ in range(num_pairs))
    rises = torch.stack([_mean_of_pair(loss, chart.displacement(z), tick) for z in noise]) - base
    weights = torch.tensor(loss.batch_sizes, dtype=torch.float64) / loss.num_examples
    value = float(rises.mean(dim=0) @ weights)
    stderr, draws, batches = _two_way_errors(rises, weights)
    return estimate(
        value,
        stderr,
        num_samples=num_samples,
        reason=None if math.isfinite(value) else "the loss is not finite at the weights or at a displaced point",
        details={
            "num_pairs": num_pairs,
            "stderr_draws": draws,
            "stderr_batches": batches,
            "batch_values": rises.mean(dim=0).tolist(),
            "base_losses": base.tolist(),
        },
        settings=settings("average_sharpness", loss, ball=ball, num_samples=num_samples, seed=seed),
    )


@dataclass
class _Search:
    """The best point so far: its loss, u, and the gradient with respect to u, found at `step`."""

    start_value: float
    value: float
    u: Point
    gradient: Point
    step: int = 0


def _auto_pgd(loss: Loss, chart: Chart, u: Point, num_steps: int, tick: Ticks) -> _Search:
    """Auto-PGD (arXiv:2003.01690, algorithm 1) in the unit ball, from u. One forward pass for each value and gradient.

    z = P(u + step ascent);  u' = P(u + 3/4 (z - u) + 1/4 (u - u_before));  the step halves where progress stalls, and
    the search then goes on from the best point, without its momentum.
    """
    value, v = _at(loss, chart, u)
    best = _Search(value, value, u, v)
    if not math.isfinite(value):
        return best
    before, step, momentum = u, 2.0, 0.0
    schedule = _checkpoints(num_steps)
    last, risen, last_step, last_best = 0, 0, step, value
    for k in range(1, num_steps + 1):
        z = chart.project([a + step * s for a, s in zip(u, chart.steepest(v), strict=True)])
        ahead = [a + (1 - momentum) * (c - a) + momentum * (a - b) for a, b, c in zip(u, before, z, strict=True)]
        before, u, momentum = u, chart.project(ahead), 0.25
        old, (value, v) = value, _at(loss, chart, u, gradient=k < num_steps)
        tick()
        if not math.isfinite(value):
            return _Search(best.start_value, math.nan, u, v, k)
        risen += value > old
        if value > best.value:
            best = _Search(best.start_value, value, u, v, k)
        if k in schedule:
            stalled = risen < 0.75 * (k - last) or (step == last_step and best.value == last_best)
            last, risen, last_step, last_best = k, 0, step, best.value
            if stalled:
                step, value, u, v, before = step / 2, best.value, best.u, best.gradient, best.u
    return best


def _at(loss: Loss, chart: Chart, u: Point, *, gradient: bool = True) -> tuple[float, Point]:
    """The loss at w + d(u) and its gradient with respect to u, from one forward pass."""
    with loss.displaced(chart.displacement(u)):
        if not gradient:
            return float(loss.value()), []
        value, g = loss.value_and_gradient()
    return float(value), chart.pull_back(g)


def _checkpoints(num_steps: int) -> set[int]:
    """The steps after which progress is judged: p num_steps, p = 0.22, 0.41, 0.57, 0.70, 0.80, 0.87, 0.93, 0.99."""
    percent, stretch, found = 22, 19, set()  # whole numbers: 0.7 * 20 is a little above 14
    while percent <= 100:
        found.add(-(-percent * num_steps // 100))
        percent, stretch = percent + stretch, max(stretch - 3, 6)
    return found


def _starts(chart: Chart, params: Point, num: int, seed: int) -> Iterator[Point]:
    """u = 0, then random points: uniform on the sphere, or in the cube. Entries that cannot move (T = 0) are 0."""
    yield [torch.zeros_like(w, requires_grad=False) for w in params]
    stream = Stream(seed)
    for _ in range(num - 1):
        z = [x * (s != 0) for x, s in zip(_noise(chart.norm, params, stream), chart.scales, strict=True)]
        yield z if chart.norm == math.inf else chart.steepest(z)


def _noise(norm: float, params: Point, stream: Stream) -> Point:
    if norm == math.inf:
        return [2 * stream.uniform_like(w) - 1 for w in params]
    return [stream.normal_like(w) for w in params]


def _mean_of_pair(loss: Loss, d: Point, tick: Ticks) -> Tensor:
    """(L(w + d) + L(w - d)) / 2 of each batch, (num_batches,)."""
    values = []
    for sign in (1, -1):
        with loss.displaced([sign * x for x in d]):
            values.append(loss.batch_values())
        tick()
    return (values[0] + values[1]) / 2


def _two_way_errors(x: Tensor, p: Tensor) -> tuple[float, float, float]:
    """Standard errors of m = sum_b p_b mean_k x_kb over rows and columns, over rows alone, over columns alone.

    Rows (pairs of draws) and columns (batches) each have an effect that all their entries share, so
    Var m = Var(row means) / K + Var(column means) / B - Var(interaction) / (K B), which counts once what both hold.
    """
    k, b = x.shape
    rows, columns = x @ p, x.mean(dim=0)
    mean = rows.mean()
    over_rows = rows.var() / k if k > 1 else mean * math.nan
    if b == 1:
        return float(over_rows.sqrt()), float(over_rows.sqrt()), math.nan
    spread = b / (b - 1) * p.square()
    over_columns = spread @ (columns - mean).square()
    interaction = (x - rows[:, None] - columns + mean).square().sum(dim=0) @ spread / (k * max(k - 1, 1))
    both = torch.maximum(over_rows + over_columns - interaction, over_rows)
    return float(both.sqrt()), float(over_rows.sqrt()), float(over_columns.sqrt())


def _check_ball(ball: Ball | ProductBall) -> None:
    if not isinstance(ball, (Ball, ProductBall)):
        raise TypeError(f"sharpness needs a ball: pass Ball(rho) or optimizer.ball, got {type(ball).__name__}")
    if not ball.rho > 0:
        raise ValueError(f"sharpness needs a ball with rho > 0 (at rho = 0 it is 0 for every loss), got rho={ball.rho}")
