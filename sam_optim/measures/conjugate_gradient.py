"""Conjugate gradients for positive definite matrices that are given by their products with vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor

FEWEST_STEPS = 5  # of which the last must all have changed little before a quadratic form is taken as settled


@dataclass
class Solution:
    """x with A x = b; residual: ||A x - b|| / ||b||, computed again in the end; num_products: of A."""

    x: Tensor
    residual: float
    num_products: int
    converged: bool


def conjugate_gradient(product: Callable[[Tensor], Tensor], b: Tensor, *, tol: float, limit: int) -> Solution:
    """x with ||A x - b|| <= tol ||b||, if `limit` products suffice."""
    x, size, count, squared = torch.zeros_like(b), math.sqrt(_dot(b, b)), 0, _dot(b, b)
    if not size:
        return Solution(x, 0.0, 0, True)
    for length, direction, _, squared in islice(_steps(product, b), limit):
        x, count = x + length * direction, count + 1
        if not math.sqrt(squared) > tol / 2 * size:
            break
    if not math.isfinite(squared):
        return Solution(x, math.nan, count, False)
    residual = product(x) - b
    relative = math.sqrt(_dot(residual, residual)) / size
    return Solution(x, relative, count + 1, relative <= tol)


def damped_share(
    product: Callable[[Tensor], Tensor], z: Tensor, damping: float, *, tol: float, limit: int
) -> tuple[float, bool]:
    """z^T M (M + damping)^-1 z for `product` = M + damping, and whether its last digits within tol had settled.

    The products of step length and squared residual of conjugate gradients add up to z^T (M + damping)^-1 z from
    below, the Gauss quadrature of the spectral measure of z: fewer steps than the solution itself needs.
    """
    share, changes = _dot(z, z), [math.inf]
    for length, _, before, after in islice(_steps(product, z), limit):
        changes.append(damping * length * before)
        share -= changes[-1]
        if not math.isfinite(share):
            return math.nan, False
        if after == 0 or (len(changes) > FEWEST_STEPS and sum(changes[-FEWEST_STEPS:]) <= tol * abs(share)):
            return share, True
    return share, False


def _steps(product: Callable[[Tensor], Tensor], b: Tensor) -> Iterator[tuple[float, Tensor, float, float]]:
    """(step length, direction, ||r||^2 before the step, ||r||^2 after it), r the residual."""
    residual, direction, after = b, b, _dot(b, b)
    while True:
        image, before = product(direction), after
        length = before / _dot(direction, image)
        residual = residual - length * image
        after = _dot(residual, residual)
        yield length, direction, before, after
        direction = residual + after / before * direction


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b).sum())
