"""The highest loss in a ball, searched with a fixed number of gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor

from sam_optim.core.geometry import Chart
from sam_optim.core.random import Stream
from sam_optim.loss import Loss

Point = list[Tensor]

HEAT = 0.15  # of the steps of a search; shorter heats tell less of where a climb will end
SHORTEST = 1e-3  # a step of u; shorter ones move nothing that float32 can tell


@dataclass(frozen=True)
class Maximum:
    """The highest point seen: its loss, u = d / (rho T), and the step that led to it (0: the start).

    `value` is that of step `step` where the loss was not finite there.
    """

    value: float
    u: Point
    step: int


def evaluate(loss: Loss, chart: Chart, u: Point) -> tuple[float, Point]:
    """The loss at w + d(u) and its gradient with respect to u, from one forward pass."""
    with loss.displaced(chart.displacement(u)):
        value, g = loss.value_and_gradient()
    return float(value), chart.pull_back(g)


class Climb:
    """One ascent in the unit ball, from the point u with the loss `value` and the gradient v.

    A step goes all the way to the point of the ball that is best for the linearized loss (conditional gradient with a
    full step: the power method where the loss is quadratic, a vertex in the sup norm), with the gradient extrapolated
    from the last two:

        u' = argmax_{||u||_p <= 1} <v + (v - v_before), u>

    Where that is not higher than the best point, the search continues from the best one: without extrapolation, and if
    that fails as well with u' = P(u + step argmax <v, u>), where the step halves with each failure.

    Attributes:
        value: the highest loss so far. proposal: where to look next; None where the climb has ended.
    """

    def __init__(self, chart: Chart, u: Point, value: float, v: Point):
        self.chart, self.u, self.value, self.v = chart, u, value, v
        self._before: Point | None = None  # the gradient one step before, while it is of use
        self._extrapolates = True
        self._step = math.inf
        self.proposal = self._next()

    def went(self, value: float, v: Point) -> None:
        """`value` and gradient at the proposal."""
        assert self.proposal is not None
        if value > self.value:
            self._before = self.v if self._extrapolates else None
            self.u, self.value, self.v = self.proposal, value, v
        elif self._before is not None:
            self._before, self._extrapolates = None, False
        else:
            self._step = min(1.0, self._step / 2)
        self.proposal = self._next()

    def _next(self) -> Point | None:
        if self._step < math.inf:
            if self._step < SHORTEST:
                return None
            direction = self.chart.steepest(self.v)
            ahead = self.chart.project([a + self._step * s for a, s in zip(self.u, direction, strict=True)])
            return None if _same(ahead, self.u) else ahead
        if self._before is not None:
            ahead = self.chart.steepest([2 * a - b for a, b in zip(self.v, self._before, strict=True)])
            if not _same(ahead, self.u):
                return ahead
            self._before = None
        ahead = self.chart.steepest(self.v)
        return None if _same(ahead, self.u) else ahead


def search(
    loss: Loss,
    chart: Chart,
    start: tuple[Point, float, Point],
    num_steps: int,
    points: Iterator[Point],
    tick: Callable[[], None],
    *,
    heats: int = 1,
) -> Maximum:
    """The highest point in `num_steps` steps from `start` = (u, loss, gradient); the last step needs no gradient.

    A climb that has ended leaves its steps to another one, from the next of `points`. With several `heats` that many
    climbs, all but the first from `points`, have HEAT of the steps each, and the highest of them goes on.
    """
    u, value, _ = start
    best, climb = Maximum(value, u, 0), Climb(chart, *start)
    length, behind = int(HEAT * num_steps), []
    heats = heats if length else 1
    for step in range(1, num_steps + 1):
        if not math.isfinite(value):
            return Maximum(value, u, step - 1)
        next_heat = heats > 1 and step > 1 and (step - 1) % length == 0
        if next_heat:
            behind.append(climb)
            if len(behind) == heats:
                climb, heats, next_heat = max(behind, key=lambda c: c.value), 1, False
        is_new = next_heat or climb.proposal is None
        u = next(points) if next_heat or climb.proposal is None else climb.proposal
        if step < num_steps:
            value, v = evaluate(loss, chart, u)
            if is_new:
                climb = Climb(chart, u, value, v)
            else:
                climb.went(value, v)
        else:
            with loss.displaced(chart.displacement(u)):
                value = float(loss.value())
        tick()
        if value > best.value:
            best = Maximum(value, u, step)
    return best if math.isfinite(value) else Maximum(value, u, num_steps)


def random_points(chart: Chart, params: Point, seed: int) -> Iterator[Point]:
    """Random points of the unit ball, in turn with a length of 1 (uniform on the sphere, or vertices of the cube) and
    uniform inside, where a hill may be. Entries that cannot move (T = 0) are 0."""
    stream = Stream(seed)
    num = sum(int((s != 0).expand_as(w).sum()) for w, s in zip(params, chart.scales, strict=True))
    for k in count():
        noise = [stream.normal_like(w) for w in params]
        u = chart.steepest([z * (s != 0) for z, s in zip(noise, chart.scales, strict=True)])
        if k % 2 and chart.norm == math.inf:
            u = [stream.uniform_like(x) * x for x in u]
        elif k % 2:
            length = float(stream.uniform_like(torch.zeros(1))) ** (1 / max(num, 1))
            u = [length * x for x in u]
        yield u


def _same(a: Point, b: Point) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
