"""Conjugate gradients for positive definite matrices that are known by their products with vectors."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

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


def solve(product: Callable[[Tensor], Tensor], b: Tensor, *, tol: float, limit: int) -> Solution:
    """x with ||A x - b|| <= tol ||b||, if `limit` products suffice."""
    x, r = torch.zeros_like(b), b.clone()
    p, rr, size, count = r, dot(r, r), math.sqrt(dot(b, b)), 0
    while math.sqrt(rr) > tol / 2 * size and count < limit and math.isfinite(rr):
        ap = product(p)
        step = rr / dot(p, ap)
        x, r = x + step * p, r - step * ap
        rr, before = dot(r, r), rr
        p = r + rr / before * p
        count += 1
    if not size or not math.isfinite(rr):
        return Solution(x, 0.0 if not size else math.nan, count, not size)
    r = product(x) - b
    residual = math.sqrt(dot(r, r)) / size
    return Solution(x, residual, count + 1, residual <= tol)


def damped_share(
    product: Callable[[Tensor], Tensor], z: Tensor, damping: float, *, tol: float, limit: int
) -> tuple[float, bool]:
    """z^T M (M + damping)^-1 z for `product` = M + damping, and whether its last digits within tol had settled.

    The products of step length and squared residual of conjugate gradients add up to z^T (M + damping)^-1 z from
    below, the Gauss quadrature of the spectral measure of z: fewer steps than the solution itself needs.
    """
    r, p = z.clone(), z
    rr = dot(z, z)
    share, changes = rr, [math.inf]
    for _ in range(limit):
        ap = product(p)
        step = rr / dot(p, ap)
        change = damping * step * rr
        share -= change
        changes.append(change)
        r = r - step * ap
        rr, before = dot(r, r), rr
        if not math.isfinite(share):
            return math.nan, False
        if rr == 0 or (len(changes) > FEWEST_STEPS and sum(changes[-FEWEST_STEPS:]) <= tol * abs(share)):
            return share, True
        p = r + rr / before * p
    return share, False


def dot(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b).sum())
