"""The spectral density of curvature matrices T M T, by stochastic Lanczos quadrature."""

from __future__ import annotations

import math
from contextlib import ExitStack

import torch
from torch import Tensor

from sam_optim.core.geometry import Ball, ProductBall
from sam_optim.core.random import Stream
from sam_optim.core.results import Spectrum, provenance
from sam_optim.loss import SAMPLED, Loss
from sam_optim.measures.lanczos import Lanczos
from sam_optim.measures.shared import (
    DRAWS,
    Progress,
    Ticks,
    checked,
    doubt_about_products,
    flat,
    flat_product,
    other_seed,
    settings,
    why_not_finite,
)

KERNEL = 0.01  # default width of the kernel, relative to the range of the spectrum
MARGIN = 5  # kernel widths of the grid beyond the spectrum: all but 1e-6 of the mass is on it


@checked
def spectral_density(
    loss: Loss,
    *,
    ball: Ball | ProductBall | None = None,
    matrix: str = "hessian",
    num_probes: int = 10,
    num_lanczos: int = 80,
    seed: int = 0,
    width: float | None = None,
    num_points: int = 1000,
    progress: Progress | None = None,
) -> Spectrum:
    """How many eigenvalues of the curvature are where, as a density that integrates to 1.

        p(t) = 1/P sum_j N(t; lambda_j, width^2)  ~  1/n sum_i sum_k y_ik^2 N(t; theta_ik, width^2)

    theta_ik and y_ik: Ritz values of probe i and the first entries of the Ritz vectors, from `num_lanczos` steps of
    Lanczos with full re-orthogonalization from a random direction. One eigenvalue in P weighs 1 / P: outliers show at
    their place, but with a weight that is uncertain.

    Args:
        loss, ball, matrix: M, T as in `hessian_eigenvalues`; P parameters.
        num_probes: start vectors; `stderr` falls as num_probes ** -0.5, and is nan for one (`reason` says so).
        num_lanczos: products for each; at most P. Moments up to 2 num_lanczos - 1 of each probe are exact.
        seed: of the start vectors, and of the labels of "fisher_mc": each probe has its own, so that `stderr` holds
            their draw. What 16 labels for each example add to the second and higher moments is not in it.
        width: standard deviation of the Gaussian kernel, in units of the eigenvalues; None is 0.01 of the range.
        num_points: of the grid, which goes 5 widths beyond the outermost Ritz values.
        progress: called with (products done, at most num_probes * num_lanczos).

    Returns:
        `grid`, `density` and its `stderr` over probes, (num_points,); `eigenvalues`: the largest and the smallest Ritz
        value over all probes, with `residuals`; `num_products`; `details`: `moments` 1 to 4 of the eigenvalues, sum_j
        lambda_j^m / P (the first is trace / P, the second squared Frobenius norm / P), `moment_stderr`, `width`, and
        the `nodes` and `weights` of each probe, for kernels of one's own. Not converged where the residual of an
        extreme value is above the width: then the ends of the density are in the wrong place.

    Raises:
        ValueError: num_probes or num_lanczos < 1, num_points < 2, width <= 0, or an unknown matrix.

    Source: stochastic Lanczos quadrature as in arXiv:1901.10159, with full re-orthogonalization.
    """
    if num_probes < 1 or num_lanczos < 1 or num_points < 2:
        got = f"{num_probes}, {num_lanczos} and {num_points}"
        raise ValueError(f"num_probes and num_lanczos must be >= 1 and num_points >= 2, got {got}")
    if width is not None and not (width > 0 and math.isfinite(width)):
        raise ValueError(f"width is a standard deviation in units of the eigenvalues and must be > 0, got {width}")
    stream, like = Stream(seed), flat(loss.params)
    steps = min(num_lanczos, len(like))
    tick = Ticks(progress, num_probes * steps)
    nodes: list[Tensor] = []
    weights: list[Tensor] = []
    bounds: list[Tensor] = []
    num_products, finite = 0, True
    with ExitStack() as stack:
        while len(nodes) < num_probes and finite:
            if matrix in SAMPLED or not nodes:
                stack.close()
                labels = other_seed(seed, len(nodes))
                product = stack.enter_context(flat_product(loss, ball, matrix, seed=labels, draws=DRAWS))
            lanczos = Lanczos(product, lambda: stream.normal_like(like))
            while lanczos.finite and lanczos.size < steps and (lanczos.size == 0 or not lanczos.ended):
                lanczos.extend()
                tick()
            num_products += lanczos.size
            if finite := lanczos.finite:
                ritz = lanczos.ritz()
                nodes.append(ritz.values)
                weights.append(ritz.weights[0].square())
                bounds.append(ritz.bounds)
    options = {"ball": ball, "matrix": matrix, "num_probes": num_probes, "num_lanczos": num_lanczos, "seed": seed}
    record = settings("spectral_density", loss, **options, width=width, num_points=num_points)
    if not finite:
        nan = torch.full((2,), math.nan, dtype=torch.float64)
        points = torch.full((num_points,), math.nan, dtype=torch.float64)
        return Spectrum(
            nan, grid=points, density=points, stderr=points, converged=False, num_products=num_products,
            settings=record, provenance=provenance(), reason=why_not_finite(loss, "a product with its curvature"),
        )  # fmt: skip
    values, residuals = torch.cat(nodes), torch.cat(bounds)
    ends = torch.stack([values.argmax(), values.argmin()])
    high, low = values[ends].tolist()
    is_one = high - low <= 100 * lanczos.epsilon * lanczos.scale  # eigenvalues that differ by rounding alone
    width = width or KERNEL * (abs(high) if is_one else high - low) or KERNEL
    grid = torch.linspace(low - MARGIN * width, high + MARGIN * width, num_points, dtype=torch.float64)
    probes = list(zip(nodes, weights, strict=True))
    density, stderr = _over_probes([_smooth(grid, x, p, width) for x, p in probes])
    moments, moment_stderr = _over_probes([torch.stack([(p * x**m).sum() for m in range(1, 5)]) for x, p in probes])
    few = "one probe has no standard error: raise num_probes" if num_probes == 1 else None
    why = doubt_about_products(record)
    if not (residuals[ends] <= width).all():
        why = why or "the ends of the spectrum are not known to the width: raise num_lanczos"
    return Spectrum(
        values[ends],
        residuals=residuals[ends],
        grid=grid,
        density=density,
        stderr=stderr,
        converged=why is None,
        num_products=num_products,
        settings=record,
        provenance=provenance(),
        reason=why or few,
        details={
            "width": width,
            "moments": moments.tolist(),
            "moment_stderr": moment_stderr.tolist(),
            "nodes": [x.tolist() for x in nodes],
            "weights": [p.tolist() for p in weights],
        },
    )


def _smooth(grid: Tensor, nodes: Tensor, weights: Tensor, width: float) -> Tensor:
    """sum_k weights_k N(t; nodes_k, width^2) on the grid."""
    x = (grid[:, None] - nodes) / width
    return (torch.exp(-0.5 * x.square()) @ weights) / (width * math.sqrt(2 * math.pi))


def _over_probes(values: list[Tensor]) -> tuple[Tensor, Tensor]:
    """Mean and its standard error over probes; nan for the error of one."""
    x = torch.stack(values)
    if len(x) == 1:
        return x[0], torch.full_like(x[0], math.nan)
    return x.mean(dim=0), x.std(dim=0) / math.sqrt(len(x))
