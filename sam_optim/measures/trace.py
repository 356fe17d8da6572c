"""Trace, diagonal and Frobenius norm of curvature matrices T M T, from products with random vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from sam_optim.core.geometry import Ball, ProductBall
from sam_optim.core.random import Stream
from sam_optim.core.results import Diagonal, Estimate, provenance
from sam_optim.loss import Loss
from sam_optim.measures.deflation import Deflation, deflated, num_to_look_at, stand_out
from sam_optim.measures.operator import Product, dot, flat_product, mean_and_stderr, norm
from sam_optim.measures.record import Progress, Ticks, estimate, flat, settings, unflat

METHODS = ("deflated", "hutchinson", "hutch++")
FEWEST_PROBES = 10  # a standard error of fewer is too uncertain to stop on

Tick = Callable[[], None]


def hessian_trace(
    loss: Loss,
    *,
    ball: Ball | ProductBall | None = None,
    matrix: str = "hessian",
    num_probes: int = 100,
    tol: float | None = None,
    seed: int = 0,
    method: str = "deflated",
    progress: Progress | None = None,
) -> Estimate:
    """The trace of the curvature at the weights.

        tr A = E[z^T A z],   A = T M T,   z_i = +1 or -1;     Var[z^T A z] = 2 (||A||_F^2 - sum_i A_ii^2)

    "deflated" takes the variance of what stands out away: with a Krylov basis Q and A = mu + L + B, B = (1 - Q Q^T)
    (A - mu) (1 - Q Q^T), it is the mean over probes of z^T A z - c (z^T L z - tr L), where tr L is exact and
    c, about 1, is fitted to the other probes, which keeps the mean free of bias. Ten probes say whether anything stands
    out; if not, they are the first ten of Hutchinson's estimator, at no further cost. The basis grows as long as it
    pays, to half of the other products at most. (What stands out on the diagonal of A alone counts, too, though it
    adds nothing to the variance: there up to a third more products are needed than without the basis.)

    Args:
        loss, ball, matrix: M, T as in `hessian_eigenvalues`.
        num_probes: products with vectors in all, those for the basis included. With as many as there are parameters
            the diagonal is read off, and the value is exact.
        tol: stop earlier, as soon as `stderr` is at most tol times the value; then num_probes is the limit, and the
            value has the small bias of every rule that stops on what it sees.
        seed: of the draws.
        method: "deflated"; "hutchinson", with the variance above; "hutch++", a third of the products for a random
            sketch, a third for its trace, a third for probes of the rest. (XTrace is not here: its error estimate is
            too small, by a factor of 1.6 on a small network.)
        progress: called with (products done, num_probes).

    Returns:
        `value` in units of L per squared unit of w (of T, with a ball). `stderr` over probes, on these data, with what
        rounding adds, which alone is left where the value is exact. `num_samples`: the number of probes. `details`:
        `probes`, an unbiased value from each, and their `weights`; `num_products`; `num_deflated`, the vectors of the
        basis or sketch.

    Raises:
        ValueError: num_probes < 2, tol <= 0, an unknown method or matrix.

    Source: Hutchinson (1990); Hutch++, arXiv:2010.09649. The adaptive choice of the deflated part follows the idea of
    arXiv:2109.10659, with a Krylov basis in place of a random sketch.
    """
    _check(num_probes, tol)
    if method not in METHODS:
        raise ValueError(f"method must be one of {', '.join(METHODS)}, got {method!r}")
    stream, like = Stream(seed), flat(loss.params)
    tick = Ticks(progress, min(num_probes, len(like)))
    own = {"ball": ball, "matrix": matrix, "num_probes": num_probes, "tol": tol, "seed": seed, "method": method}
    with flat_product(loss, ball, matrix, seed=seed) as product:
        if num_probes >= len(like):
            diagonal = _exact_diagonal(product, like, tick)
            return estimate(
                math.fsum(diagonal),
                torch.finfo(like.dtype).eps * math.fsum(abs(x) for x in diagonal),
                num_samples=len(like),
                details={"probes": [], "weights": [], "num_products": len(like), "num_deflated": 0},
                settings=settings("hessian_trace", loss, **own),
            )
        if method == "hutch++":
            probes, size, rounding = _hutch_plus_plus(product, stream, like, num_probes, tol, tick)
            weights = [1 / len(probes)] * len(probes)
        else:
            probes, weights, size, rounding = _deflated(
                product, stream, like, num_probes, tol, tick, deflate=method == "deflated"
            )
    value, stderr = _weighted(probes, weights)
    settled = tol is None or not math.isfinite(value) or _settled(value, stderr, len(probes), tol)
    num_products = len(probes) + (2 * size if method == "hutch++" else size)
    return estimate(
        value,
        math.hypot(stderr, rounding),
        num_samples=len(probes),
        converged=settled,
        reason=None if settled else f"the standard error is above tol after {len(probes)} probes",
        details={"probes": probes, "weights": weights, "num_products": num_products, "num_deflated": size},
        settings=settings("hessian_trace", loss, **own),
    )


def hessian_frobenius_norm(
    loss: Loss,
    *,
    ball: Ball | ProductBall | None = None,
    matrix: str = "hessian",
    num_probes: int = 100,
    seed: int = 0,
    progress: Progress | None = None,
) -> Estimate:
    """The Frobenius norm of the curvature at the weights: the root of the sum of its squared eigenvalues.

        ||A||_F^2 = ||L||_F^2 + E ||B z||^2 + 2 mu tr(A) - mu^2 P,   A - mu = L + B as in `hessian_trace`

    L and B are orthogonal, so what stands out enters exactly and the probes have only the rest to estimate.

    Args:
        loss, ball, matrix, num_probes, seed, progress: as in `hessian_trace`. Exact with num_probes >= P.

    Returns:
        `value` in units of L per squared unit of w (of T, with a ball). The square is free of bias; `stderr` of the
        root is that of the square over twice the root. `details`: `square`, `square_stderr`, `num_products`,
        `num_deflated`.

    Raises:
        ValueError: num_probes < 2, or an unknown matrix.
    """
    _check(num_probes, None)
    stream, like = Stream(seed), flat(loss.params)
    tick = Ticks(progress, min(num_probes, len(like)))
    rounding, size = 0.0, 0
    with flat_product(loss, ball, matrix, seed=seed) as product:
        if num_probes >= len(like):
            num = len(like)
            squares = [math.fsum(norm(product(_unit(like, i))) ** 2 for i in _ticking(num, tick))] * 2
        else:
            part, _ = deflated(product, lambda: stream.normal_like(like), num_probes, None, tick)
            size, num = part.size, num_probes - part.size
            squares = []
            for _ in _ticking(num, tick):
                z = stream.rademacher_like(like)
                az = product(z)
                b = part.rest(z, az)
                trace = dot(z, az) - part.quadratic(z, az) + part.trace
                squares.append(part.squares + norm(b) ** 2 + part.mean * (2 * trace - part.mean * len(like)))
            rounding = 4 * torch.finfo(like.dtype).eps * part.squares
        if num >= len(like):
            rounding = torch.finfo(like.dtype).eps * squares[0]
    square, error = mean_and_stderr(squares)
    error = math.hypot(error, rounding)
    value = math.sqrt(max(square, 0.0)) if math.isfinite(square) else math.nan
    own = {"ball": ball, "matrix": matrix, "num_probes": num_probes, "seed": seed}
    return estimate(
        value,
        error / (2 * value) if value else error**0.5,
        num_samples=num,
        details={"square": square, "square_stderr": error, "num_products": size + num, "num_deflated": size},
        settings=settings("hessian_frobenius_norm", loss, **own),
    )


def hessian_diagonal(
    loss: Loss,
    *,
    ball: Ball | ProductBall | None = None,
    matrix: str = "hessian",
    num_probes: int = 100,
    seed: int = 0,
    progress: Progress | None = None,
) -> Diagonal:
    """The diagonal of the curvature at the weights.

        A_ii = mu + L_ii + E[z_i (B z)_i],   A = mu + L + B as in `hessian_trace`;  Var[z_i (B z)_i] = sum_j!=i B_ij^2

    Args:
        loss, ball, matrix, num_probes, seed, progress: as in `hessian_trace`. Exact with num_probes >= P.

    Returns:
        `values` and `stderr`, tensors in the shapes of the parameters, in units of L per squared unit of w (of T, with
        a ball). Each entry is free of bias and has an error of its own; all come from the same probes.

    Raises:
        ValueError: num_probes < 2, or an unknown matrix.

    Source: Bekas, Kokiopoulou and Saad (2007), with the deflation of `hessian_trace`.
    """
    _check(num_probes, None)
    stream, like = Stream(seed), flat(loss.params)
    tick = Ticks(progress, min(num_probes, len(like)))
    size, num = 0, min(num_probes, len(like))
    with flat_product(loss, ball, matrix, seed=seed) as product:
        if num_probes >= len(like):
            mean = torch.tensor(_exact_diagonal(product, like, tick), dtype=like.dtype, device=like.device)
            squares = torch.zeros_like(mean)
        else:
            part, _ = deflated(product, lambda: stream.normal_like(like), num_probes, None, tick)
            size, num = part.size, num_probes - part.size
            mean, squares = torch.zeros_like(like), torch.zeros_like(like)
            for i in _ticking(num, tick):  # Welford's mean and sum of squared differences, entry by entry
                z = stream.rademacher_like(like)
                x = z * part.rest(z, product(z))
                step = x - mean
                mean += step / (i + 1)
                squares += step * (x - mean)
            mean += part.diagonal(like)
    finite = bool(torch.isfinite(mean).all())
    stderr = torch.where(torch.isfinite(mean), (squares / (num * max(num - 1, 1))).sqrt(), math.nan)
    own = {"ball": ball, "matrix": matrix, "num_probes": num_probes, "seed": seed}
    return Diagonal(
        unflat(mean, loss.params),
        unflat(stderr, loss.params),
        num_samples=num,
        converged=finite,
        settings=settings("hessian_diagonal", loss, **own),
        provenance=provenance(),
        details={"num_products": size + num, "num_deflated": size},
        reason=None if finite else "the loss or one of its derivatives is not finite",
    )


def _check(num_probes: int, tol: float | None) -> None:
    if num_probes < 2:
        raise ValueError(f"num_probes must be >= 2 (one probe has no standard error), got {num_probes}")
    if tol is not None and not tol > 0:
        raise ValueError(f"tol must be > 0 or None, got {tol}")


class _Probes:
    """Values a_i - c_i k_i from probes, each of mean tr(A): a = z^T A z; k = z^T L z - tr L, of mean 0; c_i minimises
    the variance of the other probes, and so is independent of k_i.

    The first `num_first` probes decide whether there is an L: `used` says of each of them whether the others wanted it,
    and with it come its correction and its weight, 1 / (number of probes) or 1 / (number of products). So no decision
    about a probe depends on that probe, and the value has no bias. The rest share what remains of the weight.
    """

    def __init__(self, num_first: int = 0):
        self.whole: list[float] = []
        self.known: list[float] = []
        self.used: list[bool] = []
        self.num_first = num_first
        self.size = 0  # of the basis

    def add(self, whole: float, known: float = 0.0, *, used: bool = True) -> None:
        self.whole.append(whole)
        self.known.append(known)
        self.used.append(used)

    def values(self) -> list[float]:
        n = len(self.whole)
        a, k = torch.tensor([self.whole, self.known], dtype=torch.float64)
        used = torch.tensor(self.used, dtype=torch.float64)
        if not k.any() or n < FEWEST_PROBES:
            return (a - used * k).tolist()
        da, dk = a - a.mean(), k - k.mean()
        # leaving i out of n takes n / (n - 1) da_i dk_i from the sum of products
        products, squares = (x.sum() - n / (n - 1) * x for x in (da * dk, dk * dk))
        c = torch.where(squares > 0, products / squares, 1.0).clamp(0, 1)
        return (a - used * c * k).tolist()

    def weights(self) -> list[float]:
        n, first = len(self.whole), self.num_first
        if n <= first:
            return [1 / n] * n
        found = [1 / (n if used else n + self.size) for used in self.used[:first]]
        return found + [(1 - math.fsum(found)) / (n - first)] * (n - first)


def _deflated(
    product: Product, stream: Stream, like: Tensor, budget: int, tol: float | None, tick: Tick, *, deflate: bool
) -> tuple[list[float], list[float], int, float]:
    """(an unbiased value from each probe, their weights, size of the basis, rounding error of the exact part)."""
    probes = _Probes(num_to_look_at(like, budget) if deflate else 0)
    spent = 0

    def counted(v: Tensor) -> Tensor:
        nonlocal spent
        spent += 1
        return product(v)

    def failed() -> tuple[list[float], list[float], int, float]:
        return [math.nan] * spent, [1 / spent] * spent, 0, 0.0

    first = []
    for _ in range(probes.num_first):
        z = stream.rademacher_like(like)
        az = counted(z)
        tick()
        if not math.isfinite(dot(z, az)):
            return failed()
        first.append((z.to(torch.int8), az))
    wanted = stand_out(first, budget) if first else []
    part = Deflation()
    if any(wanted) and not _stop([dot(z.to(az), az) for z, az in first], tol):
        draw = partial(stream.normal_like, like)
        part, finite = deflated(counted, draw, budget, tol, tick, num_before=len(first))
        if not finite:
            return failed()
    probes.size = part.size
    for (signs, az), used in zip(first, wanted, strict=True):
        z = signs.to(az)
        probes.add(dot(z, az), part.quadratic(z, az) - part.trace, used=used)
    del first
    while len(probes.whole) < budget - part.size:
        if probes.whole and _stop(probes.values(), tol, probes.weights()):
            break
        z = stream.rademacher_like(like)
        az = counted(z)
        tick()
        probes.add(dot(z, az), part.quadratic(z, az) - part.trace)
    return probes.values(), probes.weights(), part.size, part.rounding


def _hutch_plus_plus(
    product: Product, stream: Stream, like: Tensor, budget: int, tol: float | None, tick: Tick
) -> tuple[list[float], int, float]:
    """As `_deflated`, with the range of A S for a random S in place of a Krylov space."""
    size = budget // 3
    sketch = []
    for _ in range(size):
        sketch.append(product(stream.rademacher_like(like)))
        tick()
    if not sketch or not all(bool(torch.isfinite(x).all()) for x in sketch):
        return [math.nan, math.nan], 0, 0.0
    q, _ = torch.linalg.qr(torch.stack(sketch, dim=1))
    inside = []
    for column in q.T:
        inside.append(dot(column, product(column)))
        tick()
    exact = math.fsum(inside)
    probes: list[float] = []
    while len(probes) < budget - 2 * size:
        z = stream.rademacher_like(like)
        z = z - q @ (q.T @ z)
        probes.append(exact + dot(z, product(z)))
        tick()
        if _stop(probes, tol):
            break
    return probes, size, 4 * torch.finfo(like.dtype).eps * math.fsum(abs(x) for x in inside)


def _weighted(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """sum_i v_i x_i and its standard error, the root of sum_i v_i^2 (x_i - mean)^2 / (1 - sum_i v_i^2)."""
    mean = math.fsum(v * x for v, x in zip(weights, values, strict=True))
    if len(values) < 2:
        return mean, math.nan
    squares = math.fsum((v * (x - mean)) ** 2 for v, x in zip(weights, values, strict=True))
    return mean, math.sqrt(squares / (1 - math.fsum(v * v for v in weights)))


def _stop(probes: Sequence[float], tol: float | None, weights: Sequence[float] | None = None) -> bool:
    if not math.isfinite(probes[-1]):
        return True
    if tol is None:
        return False
    return _settled(*_weighted(probes, weights or [1 / len(probes)] * len(probes)), len(probes), tol)


def _settled(mean: float, stderr: float, num: int, tol: float | None) -> bool:
    return tol is not None and num >= FEWEST_PROBES and stderr <= tol * abs(mean)


def _exact_diagonal(product: Product, like: Tensor, tick: Tick) -> list[float]:
    return [float(product(_unit(like, i))[i]) for i in _ticking(len(like), tick)]


def _unit(like: Tensor, i: int) -> Tensor:
    e = torch.zeros_like(like)
    e[i] = 1
    return e


def _ticking(n: int, tick: Tick) -> Any:
    for i in range(n):
        yield i
        tick()
