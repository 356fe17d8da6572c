"""Extreme eigenvalues of curvature matrices T M T, from products with vectors."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from sam_optim.core.geometry import Ball, ProductBall
from sam_optim.core.random import Stream
from sam_optim.core.results import Spectrum, provenance
from sam_optim.loss import SAMPLED, Loss
from sam_optim.measures.lanczos import Lanczos, Ritz
from sam_optim.measures.shared import (
    DRAWS,
    Progress,
    Ticks,
    check_vector,
    checked,
    dot,
    doubt_about_products,
    flat,
    flat_product,
    other_seed,
    settings,
    unflat,
    why_not_finite,
)

WHICH = ("largest", "smallest", "magnitude", "both")
STOP = ("residual", "value")
REDRAWN = 4  # sets of other labels of "fisher_mc"
SMALL = 200  # parameters: as many products are soon taken, and leave nothing out


@checked
def hessian_eigenvalues(
    loss: Loss,
    *,
    num: int = 1,
    ball: Ball | ProductBall | None = None,
    matrix: str = "hessian",
    which: str = "largest",
    tol: float = 1e-4,
    seed: int = 0,
    stop: str = "residual",
    max_products: int | None = None,
    start: Sequence[Tensor] | None = None,
    progress: Progress | None = None,
) -> Spectrum:
    """Extreme eigenvalues of the curvature at the weights.

        T M T x = lambda x,   ||x||_2 = 1,   M = d^2 L / dw^2 or another curvature matrix, T = 1 or that of a ball

    Lanczos with full re-orthogonalization. Equal eigenvalues are all found where there are at most 200
    parameters (all products are taken) or few different values (the Krylov space ends, and another one begins); in
    other spectra only one of several equal values may be found.

    Args:
        loss: L at the weights w, P entries in total.
        num: how many eigenvalues, 1 to P.
        ball: its T, for curvature per relative change of the weights; its radius does not matter.
        matrix: "hessian"; "ggn", the generalized Gauss-Newton matrix; "fisher", of softmax(outputs), exact; or
            "empirical_fisher", 1/N sum_i g_i g_i^T; these have no negative eigenvalues. "fisher_mc" is "fisher" with
            16 labels for each example, drawn from softmax(outputs), in place of the expectation.
        which: "largest" and "smallest" are algebraic (the largest of -5 and 2 is 2), "magnitude" is the absolute value;
            "both" is `num` largest and `num` smallest, from one Krylov space.
        tol: largest residual r = ||T M T x - lambda x||_2 relative to |lambda|; the error of lambda is at most r, and
            mostly about r^2. It is never less than 100 ulps of the largest value.
        seed: of the start vector, and of the labels of "fisher_mc".
        stop: "value" makes tol that of min(r, r^2 / gap), a bound of the error of lambda itself (Kato and Temple), with
            the gap to the other Ritz values, and where r is above tol that of the last change of lambda: about half of
            the products, and eigenvectors to the root of tol only.
        max_products: largest number of products; None: 200 + 10 num, at most P.
        start: the first vector of the Krylov space, in the shapes of `loss.params`: an eigenvector at weights nearby
            saves most of the products, but what is orthogonal to it is not seen. None: random.
        progress: called with (products done, limit).

    Returns:
        `eigenvalues` in units of L per squared unit of w (of T, with a ball), descending; `residuals` r, from the
        recurrence, exact to rounding; `errors`, min(r, r^2 / gap), but not below the rounding of the products, taken
        as 100 ulps of the largest value (of "fisher_mc" nor below the distance, in the root mean square, to x^T M x
        with four other sets of labels, so that the draw is in them); `eigenvectors` x; `num_products`; `converged`,
        and `reason` where it is not.

    Raises:
        ValueError: num, which, stop or matrix out of range, tol not between 0 and 1, max_products < 1; a start of other
            shapes.
    """
    num_parameters = sum(w.numel() for w in loss.params)
    if not 1 <= num <= num_parameters:
        raise ValueError(f"num must be from 1 to the number of parameters, {num_parameters}, got {num}")
    if which not in WHICH:
        raise ValueError(f"which must be one of {', '.join(WHICH)}, got {which!r}")
    if stop not in STOP:
        raise ValueError(f"stop must be one of {', '.join(STOP)}, got {stop!r}")
    if max_products is not None and max_products < 1:
        raise ValueError(f"max_products must be >= 1 or None, got {max_products}")
    limit = min(num_parameters, max(num, 200 + 10 * num if max_products is None else max_products))
    if start is not None:
        check_vector("start", start, loss.params)
    stream, like = Stream(seed), flat(loss.params)
    first = [] if start is None else [flat(start).to(like)]
    tick = Ticks(progress, limit)
    with flat_product(loss, ball, matrix, seed=seed, draws=DRAWS) as product:
        lanczos = Lanczos(product, lambda: first.pop() if first else stream.normal_like(like))
        goal = _Goal(num, which, tol, stop, exhaust=num_parameters <= min(limit, SMALL))
        converged = _iterate(lanczos, goal, limit, tick)
        ritz = lanczos.ritz() if lanczos.finite else None
    options = {"ball": ball, "matrix": matrix, "which": which, "num": num, "tol": tol, "stop": stop, "seed": seed}
    options |= {} if start is None else {"start": "given"}
    record = settings("hessian_eigenvalues", loss, **options)
    if ritz is None:
        nan = torch.full((num,), math.nan, dtype=torch.float64)
        reason = why_not_finite(loss, "a product with its curvature")
        return Spectrum(
            nan, residuals=nan, converged=False, num_products=lanczos.size, settings=record, provenance=provenance(),
            reason=reason,
        )  # fmt: skip
    chosen = goal.chosen(ritz.values)
    chosen = chosen[ritz.values[chosen].argsort(descending=True)]
    vectors = [lanczos.vector(ritz.weights[:, i]) for i in chosen.tolist()]
    errors = _errors(ritz)[chosen].clamp(min=100 * lanczos.epsilon * lanczos.scale)
    redrawn = torch.empty(0, len(vectors))
    if matrix in SAMPLED:
        redrawn = torch.tensor([_quotients(loss, ball, matrix, seed, k, vectors) for k in range(REDRAWN)])
        errors = errors.maximum((redrawn - ritz.values[chosen]).square().mean(0).sqrt())
    if wrong := record.get("product_error"):  # of central differences
        errors = errors.maximum(wrong * ritz.values[chosen].abs())
    why = None
    if not converged:
        why = f"{stop}s above tol after {lanczos.size} of at most {limit} products: raise max_products or tol"
    why = doubt_about_products(record) or why
    return Spectrum(
        ritz.values[chosen],
        residuals=ritz.bounds[chosen],
        errors=errors,
        eigenvectors=[unflat(_signed(x), loss.params) for x in vectors],
        converged=why is None,
        num_products=lanczos.size + redrawn.numel(),
        settings=record,
        provenance=provenance(),
        reason=why,
    )


@dataclass(frozen=True)
class _Goal:
    """Which Ritz values are wanted, and how well."""

    num: int
    which: str
    tol: float
    stop: str
    exhaust: bool  # continue to the last dimension, which shows the multiplicity of each eigenvalue

    def chosen(self, values: Tensor) -> Tensor:
        """Their indices."""
        most = min(self.num, len(values))
        return torch.cat([key.topk(most).indices for key in self._keys(values)]).unique()

    def reached(self, lanczos: Lanczos, ritz: Ritz, before: Ritz | None) -> bool:
        """before: the Ritz values of the last time. While a value moves, others near it may not be seen yet, and the
        gap to those that are says little."""
        if lanczos.size < self.num:
            return False
        threshold = (self.tol * ritz.values.abs()).clamp(min=100 * lanczos.epsilon * lanczos.scale)
        small = ritz.bounds <= threshold
        if self.stop == "value" and before is not None:
            change = (ritz.values[:, None] - before.values).abs().min(dim=1).values
            small |= (_errors(ritz) <= threshold) & (change <= threshold)
        return all(self._all_found(key, small, threshold, lanczos, ritz) for key in self._keys(ritz.values))

    def _keys(self, values: Tensor) -> list[Tensor]:
        """What is wanted has the largest keys."""
        keys = {"largest": [values], "smallest": [-values], "magnitude": [values.abs()], "both": [values, -values]}
        return keys[self.which]

    def _all_found(self, key: Tensor, small: Tensor, threshold: Tensor, lanczos: Lanczos, ritz: Ritz) -> bool:
        if not small[key.topk(self.num).indices].all():
            return False
        if self.num == 1 or lanczos.complete:
            return True
        if lanczos.num_spaces == 1:
            # a space that ends has seen each eigenvalue once, and there may be equal ones
            return not (lanczos.ended or self.exhaust)
        best = int(torch.where(ritz.latest, key, -math.inf).argmax())
        settled = key[~ritz.latest] >= key[best] - threshold[best]
        return bool(small[best]) and int(settled.sum()) >= self.num


def _iterate(lanczos: Lanczos, goal: _Goal, limit: int, tick: Ticks) -> bool:
    """Extends the basis until the wanted Ritz values have converged. Returns whether they have."""
    before = None
    while lanczos.finite and lanczos.size < limit:
        lanczos.extend()
        tick()
        due = lanczos.size < 100 or lanczos.size % 10 == 0 or lanczos.size == limit  # eigh of a large T is not free
        if lanczos.finite and due:
            ritz = lanczos.ritz()
            if goal.reached(lanczos, ritz, before):
                return True
            before = ritz
    return False


def _quotients(
    loss: Loss, ball: Ball | ProductBall | None, matrix: str, seed: int, k: int, vectors: Sequence[Tensor]
) -> list[float]:
    """x^T M x with the k-th of other sets of labels."""
    with flat_product(loss, ball, matrix, seed=other_seed(seed, k), draws=DRAWS) as product:
        return [dot(x, product(x)) for x in vectors]


def _errors(ritz: Ritz) -> Tensor:
    """min(r, r^2 / gap): how far each value is from an eigenvalue, if the other Ritz values are near the others."""
    if len(ritz.values) == 1:
        return ritz.bounds
    distance = (ritz.values[:, None] - ritz.values).abs() - ritz.bounds
    gap = distance.fill_diagonal_(math.inf).min(dim=1).values
    return torch.where(gap > ritz.bounds, ritz.bounds.square() / gap, ritz.bounds)


def _signed(x: Tensor) -> Tensor:
    """x or -x: an eigenvector has no sign, so its largest entry is made positive."""
    return x * x[x.abs().argmax()].sign()
