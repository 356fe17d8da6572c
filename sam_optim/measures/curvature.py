"""Eigenvalues and traces of curvature matrices T M T, from products with vectors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor

from sam_optim.geometry import Ball, ProductBall
from sam_optim.loss import Loss
from sam_optim.measures.lanczos import Lanczos, Ritz
from sam_optim.measures.record import Progress, Ticks, estimate, flat, settings, unflat
from sam_optim.results import Estimate, Spectrum, provenance
from sam_optim.rng import Stream

WHICH = ("largest", "smallest", "magnitude")
FEWEST_PROBES = 10  # a standard error of fewer is too uncertain to stop on


def hessian_eigenvalues(
    loss: Loss,
    *,
    num: int = 1,
    ball: Ball | ProductBall | None = None,
    matrix: str = "hessian",
    which: str = "largest",
    tol: float = 1e-4,
    seed: int = 0,
    max_products: int | None = None,
    progress: Progress | None = None,
) -> Spectrum:
    """Extreme eigenvalues of the curvature at the weights.

        T M T x = lambda x,   ||x||_2 = 1,   M = d^2 L / dw^2 or another curvature matrix, T = 1 or that of a ball

    Lanczos with full re-orthogonalisation. Eigenvalues are found as often as they occur where their number is small
    (the Krylov space ends); of equal ones in a rich spectrum only one may be found.

    Args:
        loss: L at the weights w, P entries in total.
        num: how many eigenvalues, 1 to P.
        ball: its T, for curvature per relative change of the weights; its radius does not matter.
        matrix: "hessian"; "ggn", the generalized Gauss-Newton matrix; "fisher", of softmax(outputs), exact; or
            "empirical_fisher", 1/N sum_i g_i g_i^T. The last three have no negative eigenvalues.
        which: "largest" and "smallest" are algebraic (the largest of -5 and 2 is 2), "magnitude" is the absolute value.
        tol: of the residual ||T M T x - lambda x||_2 relative to |lambda|; the error of lambda is at most that, and
            mostly about its square. Where it asks for more than rounding allows, 100 ulps of the largest value count.
        seed: of the start vector.
        max_products: where to stop; None is 200 + 10 num, at most P.
        progress: called with (products done, limit).

    Returns:
        `eigenvalues` in units of L per squared unit of w (of T, with a ball), descending; `residuals`, computed again
        from the vectors in the end; `eigenvectors` x; `converged`, and `reason` where it is not.

    Raises:
        ValueError: num, which or matrix out of range, tol <= 0.
    """
    num_parameters = sum(w.numel() for w in loss.params)
    if not 1 <= num <= num_parameters:
        raise ValueError(f"num must be from 1 to the number of parameters, {num_parameters}, got {num}")
    if which not in WHICH:
        raise ValueError(f"which must be one of {', '.join(WHICH)}, got {which!r}")
    if not tol > 0:
        raise ValueError(f"tol must be > 0, got {tol}")
    limit = min(num_parameters, max(num, 200 + 10 * num if max_products is None else max_products))
    stream, like = Stream(seed), flat(loss.params)
    tick = Ticks(progress, limit)
    with _flat_product(loss, ball, matrix) as product:
        lanczos = Lanczos(product, lambda: stream.normal_like(like))
        chosen = _iterate(lanczos, num, which, tol, limit, tick)
        pairs = [_pair(product, lanczos.vector(y)) for y in chosen] if lanczos.finite else []
    pairs.sort(key=lambda pair: -pair[0])
    values = torch.tensor([value for value, _, _ in pairs] or [math.nan] * num, dtype=torch.float64)
    residuals = torch.tensor([residual for _, residual, _ in pairs] or [math.nan] * num, dtype=torch.float64)
    converged = bool((residuals <= _threshold(values, lanczos, tol)).all())
    own = {"ball": ball, "matrix": matrix, "which": which, "num": num, "tol": tol, "seed": seed}
    return Spectrum(
        values,
        residuals=residuals,
        eigenvectors=[unflat(_signed(x), loss.params) for _, _, x in pairs] or None,
        converged=converged,
        num_products=lanczos.size + len(pairs),
        settings=settings("hessian_eigenvalues", loss, **own),
        provenance=provenance(),
        reason=None if converged else _why(lanczos, limit),
    )


def hessian_trace(
    loss: Loss,
    *,
    ball: Ball | ProductBall | None = None,
    matrix: str = "hessian",
    num_probes: int = 100,
    tol: float | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Estimate:
    """The trace of the curvature at the weights, by Hutchinson's estimator.

        tr A = E[z^T A z],   A = T M T,   z_i = +1 or -1;     Var[z^T A z] = 2 (||A||_F^2 - sum_i A_ii^2)

    Args:
        loss, ball, matrix: M, T as in `hessian_eigenvalues`.
        num_probes: independent draws of z, one product each; `stderr` falls as num_probes ** -0.5.
        tol: stop earlier, as soon as `stderr` is at most tol times the value; then num_probes is the limit.
        seed: of the draws.
        progress: called with (probes done, num_probes).

    Returns:
        `value` in units of L per squared unit of w (of T, with a ball); `stderr` over probes, on these data; `details`:
        `probes`, the value of each.

    Raises:
        ValueError: num_probes < 2, or tol <= 0.
    """
    if num_probes < 2:
        raise ValueError(f"num_probes must be >= 2 (one probe has no standard error), got {num_probes}")
    if tol is not None and not tol > 0:
        raise ValueError(f"tol must be > 0 or None, got {tol}")
    stream, like = Stream(seed), flat(loss.params)
    tick = Ticks(progress, num_probes)
    probes: list[float] = []
    done = False
    with _flat_product(loss, ball, matrix) as product:
        while len(probes) < num_probes and not done:
            z = stream.rademacher_like(like)
            probes.append(float((z.double() * product(z)).sum()))
            tick()
            done = _settled(probes, tol)
    mean, stderr = _mean_and_stderr(probes)
    unsettled = tol is not None and not done
    own = {"ball": ball, "matrix": matrix, "num_probes": num_probes, "tol": tol, "seed": seed}
    return estimate(
        mean,
        stderr,
        num_samples=len(probes),
        converged=not unsettled,
        reason=f"the standard error is above tol after {num_probes} probes" if unsettled else None,
        details={"probes": probes},
        settings=settings("hessian_trace", loss, **own),
    )


@contextmanager
def _flat_product(loss: Loss, ball: Ball | ProductBall | None, matrix: str) -> Iterator[Callable[[Tensor], Tensor]]:
    """v -> T M T v for vectors of P entries."""
    scales = None if ball is None else ball.scales(loss.params)

    def scaled(v: Sequence[Tensor]) -> Sequence[Tensor]:
        return v if scales is None else [t * x for t, x in zip(scales, v, strict=True)]

    with loss.curvature(matrix) as product:
        yield lambda v: flat(scaled(product(scaled(unflat(v, loss.params)))))


def _iterate(lanczos: Lanczos, num: int, which: str, tol: float, limit: int, tick: Ticks) -> list[Tensor]:
    """Extends the basis until the wanted Ritz values have converged; their weights in the basis."""
    while lanczos.finite and lanczos.size < limit:
        lanczos.extend()
        tick()
        due = lanczos.size < 100 or lanczos.size % 10 == 0  # eigh of a large T is not free
        if lanczos.finite and lanczos.size >= num and due and _done(lanczos, lanczos.ritz(), num, which, tol):
            break
    if not lanczos.finite:
        return []
    ritz = lanczos.ritz()
    return [ritz.weights[:, i] for i in _key(ritz.values, which).topk(min(num, lanczos.size)).indices]


def _done(lanczos: Lanczos, ritz: Ritz, num: int, which: str, tol: float) -> bool:
    key = _key(ritz.values, which)
    threshold = _threshold(ritz.values, lanczos, tol)
    small = ritz.bounds <= threshold / 2  # half: the residuals are computed again in the end, with their own rounding
    if not small[key.topk(num).indices].all():
        return False
    if num == 1 or lanczos.complete:
        return True
    if lanczos.num_spaces == 1:
        return not lanczos.ended  # a space that ends has seen each eigenvalue once, and there may be equal ones
    best = int(torch.where(ritz.latest, key, -math.inf).argmax())
    found = key[~ritz.latest] >= key[best] - threshold[best]
    return bool(small[best]) and int(found.sum()) >= num


def _key(values: Tensor, which: str) -> Tensor:
    """What is wanted has the largest key."""
    return {"largest": values, "smallest": -values, "magnitude": values.abs()}[which]


def _threshold(values: Tensor, lanczos: Lanczos, tol: float) -> Tensor:
    return (tol * values.abs()).clamp(min=100 * lanczos.epsilon * lanczos.scale)


def _pair(product: Callable[[Tensor], Tensor], x: Tensor) -> tuple[float, float, Tensor]:
    """Rayleigh quotient, residual and x."""
    y = product(x)
    value = float((x.double() * y).sum())
    return value, float(torch.linalg.vector_norm(y - value * x)), x


def _why(lanczos: Lanczos, limit: int) -> str:
    if not lanczos.finite:
        return "a curvature product is not finite"
    return f"residuals above tol after {lanczos.size} of at most {limit} products: raise max_products or tol"


def _settled(probes: list[float], tol: float | None) -> bool:
    if not math.isfinite(probes[-1]):
        return True
    if tol is None or len(probes) < FEWEST_PROBES:
        return False
    mean, stderr = _mean_and_stderr(probes)
    return stderr <= tol * abs(mean)


def _mean_and_stderr(x: list[float]) -> tuple[float, float]:
    mean = math.fsum(x) / len(x)
    if len(x) < 2:
        return mean, math.nan
    return mean, math.sqrt(math.fsum((a - mean) ** 2 for a in x) / (len(x) - 1) / len(x))


def _signed(x: Tensor) -> Tensor:
    """x or -x: an eigenvector has no sign, so its largest entry is made positive."""
    return x * x[x.abs().argmax()].sign()
