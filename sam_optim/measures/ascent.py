"""The highest loss in a ball, searched with a fixed number of gradients."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from sam_optim.core.geometry import Chart
from sam_optim.core.random import Stream
from sam_optim.loss import Loss

Point = list[Tensor]

FEWEST_TO_SPLIT = 8  # with fewer steps, all are needed for the climb from the start
FIRST, SECOND = 2 / 5, 3 / 10  # of the steps: for the climb from the start, and for one from a random point
SHORTEST = 1e-3  # a step of u; shorter ones move nothing that float32 can tell


@dataclass(frozen=True)
class Maximum:
    """The highest point found: its loss, u = d / (rho T), and the step that found it (0: the start).

    `value` is nan where the loss at step `step` was not finite.
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

    A step goes all the way to the point of the ball that is best for the linearised loss (conditional gradient with a
    full step: the power method where the loss is quadratic, a vertex in the sup norm), with the gradient extrapolated
    from the last two:

        u' = argmax_{||u||_p <= 1} <v + (v - v_before), u>

    Where that is not higher than the best point, the climb goes on from the best one: without extrapolation, and if
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
        """What was found at the proposal."""
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


class _NotFinite(ArithmeticError):
    """The loss at a point of the ball: the search ends there."""


def search(
    loss: Loss,
    chart: Chart,
    start: tuple[Point, float, Point],
    num_steps: int,
    random_points: Iterator[Point],
    tick: Callable[[], None],
    *,
    split: bool = False,
    warm: Point | None = None,
) -> Maximum:
    """The highest point found from `start` = (u, loss, gradient) in `num_steps` steps, all but the last of which
    compute a gradient.

    With `split`, two fifths of them climb from the start, three tenths from a random point of the ball, and the rest
    goes on from the higher of both: in a large ball the gradient at the centre often leads to a lower maximum. A
    climb that has ended leaves what it did not need to the others. `warm` is one more point to look at, and to go on
    from if it is the highest.
    """
    found = _Search(loss, chart, start, num_steps, tick)
    try:
        found.run(random_points, split=split and num_steps >= FEWEST_TO_SPLIT, warm=warm)
    except _NotFinite:
        return Maximum(math.nan, start[0], found.step)
    return found.best


class _Search:
    """The climbs of one search, and the steps that are left."""

    def __init__(
        self, loss: Loss, chart: Chart, start: tuple[Point, float, Point], num_steps: int, tick: Callable[[], None]
    ):
        self.loss, self.chart, self.num_steps, self.tick = loss, chart, num_steps, tick
        self.step = 0
        self.best = Maximum(start[1], start[0], 0)
        self.climbs = [Climb(chart, *start)]

    @property
    def left(self) -> int:
        """Steps with a gradient: the last one needs none."""
        return self.num_steps - 1 - self.step

    def run(self, random_points: Iterator[Point], *, split: bool, warm: Point | None) -> None:
        if not math.isfinite(self.best.value):
            raise _NotFinite
        if split:
            self.go_on(self.climbs[0], round(FIRST * self.num_steps) - 1)
            if warm is not None:
                self.open(warm)
            self.go_on(self.open(next(random_points)), round(SECOND * self.num_steps) - 1)
        while self.left:
            climb = self.highest()
            if climb is None:
                self.open(next(random_points))
            else:
                self.go_on(climb, 1)
        last = self.highest()
        point = next(random_points) if last is None or last.proposal is None else last.proposal
        with self.loss.displaced(self.chart.displacement(point)):
            self.saw(point, float(self.loss.value()))

    def highest(self) -> Climb | None:
        """The climb that has come highest among those that have not ended."""
        return max((c for c in self.climbs if c.proposal is not None), key=lambda c: c.value, default=None)

    def open(self, u: Point) -> Climb:
        value, v = self.look(u)
        self.climbs.append(Climb(self.chart, u, value, v))
        return self.climbs[-1]

    def go_on(self, climb: Climb, num: int) -> None:
        for _ in range(min(num, self.left)):
            if climb.proposal is None:
                return
            climb.went(*self.look(climb.proposal))

    def look(self, u: Point) -> tuple[float, Point]:
        value, v = evaluate(self.loss, self.chart, u)
        self.saw(u, value)
        return value, v

    def saw(self, u: Point, value: float) -> None:
        self.step += 1
        self.tick()
        if not math.isfinite(value):
            raise _NotFinite
        if value > self.best.value:
            self.best = Maximum(value, u, self.step)


def random_points(chart: Chart, params: Point, seed: int) -> Iterator[Point]:
    """Random points of the unit ball with a length of 1: uniform on the sphere, or vertices of the cube. Entries that
    cannot move (T = 0) are 0."""
    stream = Stream(seed)
    while True:
        noise = [stream.normal_like(w) for w in params]
        yield chart.steepest([z * (s != 0) for z, s in zip(noise, chart.scales, strict=True)])


def _same(a: Point, b: Point) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
