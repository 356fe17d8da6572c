"""Hessian-vector products by central differences of gradients, and the check of those by double backward.

Both are meant for float64: in float32 the differences of a network with kinks (ReLU, hard sigmoid) are wrong by more
than their size, because a step that is long enough for the rounding crosses kinks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from sam_optim.core.random import Stream

# Of ||w||, in float64 and without it. For smooth functions 1e-6 would lose less to rounding, but along the top
# eigenvector of a MobileNetV3 it crosses kinks (an error of 23 % of Hv, 2e-8 with this step).
STEP, STEP_FLOAT32 = 1e-8, 2e-3
SHORTER = 1 / 30, 1e-3  # of STEP, where a kink is nearer still
TOLERANCE = 1e-3  # relative, between a product and its differences, and between those of the two sides

Vector = Sequence[Tensor]


class Differences:
    """v -> H v ~ (g(w + h v) - g(w - h v)) / 2h, for `gradient_at`: d -> g(w + d), h ||v|| = 1e-8 ||w||.

    A kink that lies between w - h v and w + h v has a part of 1 / h in this. It shows where the differences to g(w) on
    the two sides disagree; then shorter steps are tried, and the one counts whose sides disagree least.

    error: relative, the largest distance of the products number 1, 2, 4, 8, ... from those with half the step, and of
    sides that disagree at every step, as where w itself lies on a kink.
    """

    def __init__(self, params: Vector, gradient_at: Callable[[Vector], Vector]):
        self._params, self._gradient_at = params, gradient_at
        self._at_w: Vector | None = None
        self.error: float | None = None
        self._count = 0
        self._largest = 0.0  # ||H v|| / ||v|| so far: of a v with H v = 0 only rounding is left

    def __call__(self, v: Vector) -> list[Tensor]:
        if not math.isfinite(_norm(v)):
            return [torch.full_like(x, math.nan) for x in v]
        h, length = step(self._params, v), _norm(v) or 1.0
        product, gap = self._with_gap(v, h)
        is_wide = self._params[0].dtype == torch.float64
        for shorter in [h * share for share in SHORTER] if is_wide else ():
            if gap <= TOLERANCE * max(_norm(product), self._largest * length):
                break
            other, other_gap = self._with_gap(v, shorter)
            if other_gap < gap:
                h, product, gap = shorter, other, other_gap
        self._largest = max(self._largest, _norm(product) / length)
        if is_wide and gap > TOLERANCE * self._largest * length:
            self.error = max(self.error or 0.0, gap / (self._largest * length))
        self._count += 1
        if self._count.bit_count() == 1:  # a power of 2
            half = self.with_step(v, h / 2)
            self.error = max(self.error or 0.0, _distance(product, half) / (_norm(half) or 1.0))
        return product

    def with_step(self, v: Vector, h: float) -> list[Tensor]:
        return _quotient(*self._sides(v, h), h)

    def _with_gap(self, v: Vector, h: float) -> tuple[list[Tensor], float]:
        """The product, and how far the differences to g(w) on the two sides are apart."""
        if self._at_w is None:
            self._at_w = self._gradient_at([torch.zeros_like(x) for x in v])
        ahead, behind = self._sides(v, h)
        bend = [a + b - 2 * g for a, b, g in zip(ahead, behind, self._at_w, strict=True)]
        return _quotient(ahead, behind, h), _norm(bend) / h

    def _sides(self, v: Vector, h: float) -> tuple[Vector, Vector]:
        return self._gradient_at([h * x for x in v]), self._gradient_at([-h * x for x in v])


def _quotient(ahead: Vector, behind: Vector, h: float) -> list[Tensor]:
    return [(a - b) / (2 * h) for a, b in zip(ahead, behind, strict=True)]


def step(params: Vector, v: Vector) -> float:
    """h with h ||v|| = 1e-8 ||w||; 2e-3 ||w|| where there is no float64."""
    relative = STEP if params[0].dtype == torch.float64 else STEP_FLOAT32
    return relative * (_norm([p.detach() for p in params]) or 1.0) / (_norm(v) or 1.0)


def check(product: Callable[[Vector], Vector], differences: Differences, params: Vector) -> str | None:
    """What is wrong with a product: u.(Hv) = v.(Hu) for random u, v, and one H v against differences of gradients."""
    stream = Stream(0)
    u, v = ([stream.normal_like(p.detach()) for p in params] for _ in range(2))
    hu, hv = product(u), product(v)
    size = _norm(hv)
    asymmetry = abs(_dot(u, hv) - _dot(v, hu)) / (max(size * _norm(u), _norm(hu) * _norm(v)) or 1.0)
    if asymmetry > TOLERANCE:
        return f"u.(Hv) and v.(Hu) of random u and v differ by {asymmetry:.1e} of their size"

    def distance_to(reference: Vector) -> float:
        return _distance(hv, reference) / (max(size, _norm(reference)) or 1.0)

    distance = distance_to(differences.with_step(v, step(params, v)))
    if distance > TOLERANCE:
        distance = distance_to(differences(v))  # with their error, and past kinks near w
    if distance > TOLERANCE + 10 * (differences.error or 0.0):
        return f"Hv differs from the difference of two gradients by {distance:.1e} of its size"
    return None


def is_missing(error: RuntimeError) -> bool:
    """Whether an error of torch says that something has no second derivative."""
    text = str(error)
    missing = "is not implemented", "once_differentiable", "double backward", "donated buffer"
    return isinstance(error, NotImplementedError) or any(words in text for words in missing)


def _dot(a: Vector, b: Vector) -> float:
    return math.fsum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))


def _norm(a: Vector) -> float:
    return math.sqrt(_dot(a, a))


def _distance(a: Vector, b: Vector) -> float:
    return _norm([x - y for x, y in zip(a, b, strict=True)])
