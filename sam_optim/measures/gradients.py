"""What the gradients of single batches say about each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sam_optim.loss import Loss
from sam_optim.measures.record import Progress, Ticks, estimate, flat, settings, unflat
from sam_optim.products import Product
from sam_optim.results import Estimate

METRICS = ("euclidean", "fisher")
CHUNK = 1 << 20  # entries of which inner products are taken in float64 at once


def gradient_regret(
    loss: Loss,
    *,
    metric: str = "euclidean",
    damping: float = 1e-3,
    tol: float = 1e-4,
    max_products: int = 1000,
    seed: int = 0,
    progress: Progress | None = None,
) -> Estimate:
    """What the best small step for one batch forgoes on another.

        R / eps = E ||g_2|| (1 - cos(g_1, g_2)),   g_1, g_2: gradients of two different batches

    To first order in eps: step to the minimum of l_1 in a ball of radius eps around w, and compare l_2 there with its
    own minimum in the ball. With `metric="fisher"` the ball is that of the KL divergence, d^T (G + damping I) d <=
    eps^2: norms and inner products are those of (G + damping I)^-1, G the Gauss-Newton matrix of the whole loss, which
    for cross-entropy is the Fisher matrix. Where g_1 = 0 the step is 0, which is the formula with a cosine of 0.

    Args:
        loss: L, with two batches or more; the regret depends on their size m. Pairs count by their numbers of examples.
        metric: "euclidean" or "fisher". Without damping the latter does not change under reparametrization; G has
            directions without curvature, though, so the value depends on the damping.
        damping: in units of G; only for "fisher".
        tol: of the residual of each solve by conjugate gradients, relative to the gradient; only for "fisher".
        max_products: of G with a vector, for each batch.
        seed: unused, for all pairs are used; results record it as those of the other measures do.
        progress: called with (gradients and solves done, total).

    Returns:
        `value` in units of L per unit of w ("fisher": of the square root of L). `stderr` is a jackknife over batches,
        because pairs share them; nan for two. `details`: `mean_norm` E||g||, `mean_cosine` over pairs, `gradient_norm`
        of the whole loss, `norms` of each batch; "fisher": `residuals` and `num_products` of each solve.

    Raises:
        ValueError: fewer than two batches, an unknown metric, damping or tol <= 0.

    Source: F. Huszar, "The Generalization Mystery: Sharp vs Flat Minima" (2018).
    """
    if metric not in METRICS:
        raise ValueError(f"metric must be 'euclidean' or 'fisher', got {metric!r}")
    if loss.num_batches < 2:
        raise ValueError("the regret compares batches, and this loss has one: split it into several")
    if not damping > 0 or not tol > 0:
        raise ValueError(f"damping and tol must be > 0, got {damping} and {tol}")
    tick = Ticks(progress, loss.num_batches * (1 if metric == "euclidean" else 2))
    gradients = []
    for single in loss.single_batches():
        gradients.append(flat(single.gradient()))
        tick()
    own: dict[str, Any] = {"metric": metric, "seed": seed}
    if metric == "euclidean":
        return _regret(_gram(gradients, gradients), loss, own)
    solutions = []
    with loss.curvature("ggn") as product:
        for g in gradients:
            damped = _damped(product, damping, loss.params)
            solutions.append(_solve(damped, g, tol, max_products))
            tick()
    own |= {"damping": damping, "tol": tol, "max_products": max_products}
    return _regret(_gram(gradients, [s.x for s in solutions]), loss, own, solutions)


@dataclass
class _Solution:
    """x with A x = b; residual: ||A x - b|| / ||b||, computed again in the end."""

    x: Tensor
    residual: float
    num_products: int
    converged: bool


def _damped(product: Product, damping: float, params: list[Tensor]) -> Callable[[Tensor], Tensor]:
    return lambda v: flat(product(unflat(v, params))) + damping * v


def _solve(product: Callable[[Tensor], Tensor], b: Tensor, tol: float, limit: int) -> _Solution:
    """Conjugate gradients for a positive definite matrix."""
    x, r = torch.zeros_like(b), b.clone()
    p, rr, size, count = r, _dot(r, r), math.sqrt(_dot(b, b)), 0
    while math.sqrt(rr) > tol / 2 * size and count < limit and math.isfinite(rr):
        ap = product(p)
        step = rr / _dot(p, ap)
        x, r = x + step * p, r - step * ap
        rr, before = _dot(r, r), rr
        p = r + rr / before * p
        count += 1
    if not size or not math.isfinite(rr):
        return _Solution(x, 0.0 if not size else math.nan, count, not size)
    r = product(x) - b
    residual = math.sqrt(_dot(r, r)) / size
    return _Solution(x, residual, count + 1, residual <= tol)


def _regret(gram: Tensor, loss: Loss, own: dict[str, Any], solutions: Sequence[_Solution] = ()) -> Estimate:
    """From the inner products of the gradients, (B, B) float64."""
    norms = gram.diagonal().clamp(min=0).sqrt()
    lengths = norms[:, None] * norms
    cosines = torch.where(lengths > 0, gram / lengths, torch.where(lengths == 0, 0.0, math.nan))
    p = torch.tensor(loss.batch_sizes, dtype=torch.float64) / loss.num_examples
    pairs = (p[:, None] * p).fill_diagonal_(0)
    value, stderr = _jackknife(norms * (1 - cosines), pairs)
    solved = all(s.converged for s in solutions)
    details = {
        "mean_norm": float(p @ norms),
        "mean_cosine": float((pairs * cosines).sum() / pairs.sum()),
        "gradient_norm": math.sqrt(max(float(p @ gram @ p), 0.0)),
        "norms": norms.tolist(),
    }
    if solutions:
        details |= {"residuals": [s.residual for s in solutions], "num_products": [s.num_products for s in solutions]}
    return estimate(
        value,
        stderr,
        num_samples=len(p),
        converged=solved,
        reason=None if solved or not math.isfinite(value) else "conjugate gradients stopped with residuals above tol",
        details=details,
        settings=settings("gradient_regret", loss, **own),
    )


def _jackknife(x: Tensor, weights: Tensor) -> tuple[float, float]:
    """The weighted mean of x_ij over pairs of batches, and its standard error from leaving out one batch at a time."""
    total, mass = (weights * x), weights
    value = float(total.sum() / mass.sum())
    b = len(x)
    if b < 3:
        return value, math.nan
    left = total.sum() - total.sum(0) - total.sum(1)
    without = left / (mass.sum() - mass.sum(0) - mass.sum(1))
    return value, float(((b - 1) * without.var(unbiased=False)).sqrt())


def _gram(a: list[Tensor], b: list[Tensor]) -> Tensor:
    """<a_i, b_j>, symmetric up to rounding and made so; float64 on the CPU, accumulated in float64."""
    gram = torch.zeros(len(a), len(b), dtype=torch.float64)
    for start in range(0, len(a[0]), CHUNK):
        left, right = (torch.stack([x[start : start + CHUNK] for x in xs]).double() for xs in (a, b))
        gram += (left @ right.T).cpu()
    return (gram + gram.T) / 2


def _dot(a: Tensor, b: Tensor) -> float:
    return float((a.double() * b).sum())
