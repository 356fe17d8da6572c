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
TOLERANCE = 1e-3  # relative, between a product and its differences

Vector = Sequence[Tensor]


class Differences:
    """v -> H v ~ (g(w + h v) - g(w - h v)) / 2h, for `gradient_at`: d -> g(w + d), h ||v|| = 1e-8 ||w||.

    error: relative, the largest distance of the products number 1, 2, 4, 8, ... from those with half the step: later
    vectors are nearer to the eigenvectors, along which a step crosses more kinks than along a random one.
    """

    def __init__(self, params: Vector, gradient_at: Callable[[Vector], Vector]):
        self._params, self._gradient_at = params, gradient_at
        self.error: float | None = None
        self._count = 0

    def __call__(self, v: Vector) -> list[Tensor]:
        if not math.isfinite(_norm(v)):
            return [torch.full_like(x, math.nan) for x in v]
        h = step(self._params, v)
        product = self.with_step(v, h)
        self._count += 1
        if self._count.bit_count() == 1:  # a power of 2
            half = self.with_step(v, h / 2)
            self.error = max(self.error or 0.0, _distance(product, half) / (_norm(half) or 1.0))
        return product

    def with_step(self, v: Vector, h: float) -> list[Tensor]:
        ahead = self._gradient_at([h * x for x in v])
        behind = self._gradient_at([-h * x for x in v])
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
    reference = differences.with_step(v, step(params, v))
    distance = _distance(hv, reference) / (max(size, _norm(reference)) or 1.0)
    if distance > TOLERANCE:
        differences(v)  # for their error: kinks near w
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
