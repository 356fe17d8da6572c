"""The matrix T M T as a function of vectors, and inner products of vectors that are as long as a model."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sam_optim.core.geometry import Ball, ProductBall
from sam_optim.loss import Loss
from sam_optim.measures.record import flat, unflat

Product = Callable[[Tensor], Tensor]
CHUNK = 1 << 20  # entries that are in float64 at once


@contextmanager
def flat_product(loss: Loss, ball: Ball | ProductBall | None, matrix: str, *, seed: int = 0) -> Iterator[Product]:
    """v -> T M T v for vectors of P entries."""
    scales = None if ball is None else ball.scales(loss.params)

    def scaled(v: Sequence[Tensor]) -> Sequence[Tensor]:
        return v if scales is None else [t * x for t, x in zip(scales, v, strict=True)]

    with loss.curvature(matrix, seed=seed) as product:
        yield lambda v: flat(scaled(product(scaled(unflat(v, loss.params)))))


def dot(a: Tensor, b: Tensor) -> float:
    """<a, b>, accumulated in float64: a long float32 sum is off by up to 1e-3."""
    if a.dtype == torch.float64:
        return float(torch.dot(a, b))
    parts = zip(a.split(CHUNK), b.split(CHUNK), strict=True)
    return math.fsum(float(torch.dot(x.double(), y.double())) for x, y in parts)


def norm(a: Tensor) -> float:
    """||a||_2, accumulated in float64."""
    return float(torch.linalg.vector_norm(a, dtype=torch.float64))


def mean_and_stderr(x: Sequence[float]) -> tuple[float, float]:
    """Of independent draws; nan for the error of one."""
    mean = math.fsum(x) / len(x)
    if len(x) < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((a - mean) ** 2 for a in x) / (len(x) - 1) / len(x))
