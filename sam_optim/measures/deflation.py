"""Deflation: a part of the matrix is computed exactly, and random probes estimate only the rest.

    A = mu + L + B,   L = Q Q^T A' + A' Q Q^T - Q Q^T A' Q Q^T,   B = (1 - Q Q^T) A' (1 - Q Q^T),   A' = A - mu

Q is the basis of a Krylov space, which holds the eigenvectors that stand out after few products. In it A' is a
tridiagonal matrix T' and A' Q = Q T' + beta q e^T, so L costs no product beyond those that made Q.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from sam_optim.measures.lanczos import Lanczos
from sam_optim.measures.shared import Product

FEWEST = 20  # products below which a basis is not worth a look
PILOT = 4  # vectors before the first decision on how far the basis goes
BASIS_BYTES = 2**31  # of Q


class Deflation:
    """Q, T', beta and mu from `lanczos`; without it L = 0 and mu = 0.

    size: vectors in Q. mean: mu. trace, squares: of L, its trace and its squared Frobenius norm. rounding: a bound of
    the rounding error of `trace`.
    """

    def __init__(self, lanczos: Lanczos | None = None):
        self._lanczos = lanczos
        self.size = 0 if lanczos is None else lanczos.size
        self.mean = self.trace = self.squares = self.rounding = 0.0
        if lanczos is None:
            return
        self.mean = _bulk(lanczos)[0]
        t = lanczos.tridiagonal()
        self._t = t - self.mean * torch.eye(self.size, dtype=torch.float64)
        self._beta = lanczos.beta
        self.trace = float(self._t.trace())
        self.squares = _captured(lanczos, self.mean, self.size)
        self.rounding = 4 * lanczos.epsilon * float(t.diagonal().abs().sum())

    def quadratic(self, z: Tensor, az: Tensor) -> float:
        """z^T L z, from A z."""
        if not self._lanczos:
            return 0.0
        x = self._lanczos.coordinates(z)
        y = self._lanczos.coordinates(az) - self.mean * x
        return float(2 * (x @ y) - x @ self._t @ x)

    def rest(self, z: Tensor, az: Tensor) -> Tensor:
        """B z = A' z - Q Q^T A' z - beta x_k q, x = Q^T z, from A z."""
        if not self._lanczos:
            return az
        x = self._lanczos.coordinates(z)
        y = self._lanczos.coordinates(az) - self.mean * x
        return az - self.mean * z - self._lanczos.combined(y) - self._lanczos.next * (self._beta * float(x[-1]))

    def diagonal(self, like: Tensor) -> Tensor:
        """diag(mu + L), (P,): L_ii = sum_jk Q_ij T'_jk Q_ik + 2 beta Q_ik q_i."""
        diagonal = torch.full_like(like, self.mean)
        if self._lanczos:
            diagonal += self._lanczos.diagonal_of(self._t)
            diagonal += 2 * self._beta * self._lanczos.last * self._lanczos.next
        return diagonal


def deflated(
    product: Product,
    draw: Callable[[], Tensor],
    budget: int,
    tol: float | None,
    tick: Callable[[], None],
) -> tuple[Deflation, int]:
    """A basis that leaves the least standard error for `budget` products in all, or with `tol` reaches a standard error
    of tol times the trace with the fewest; with the number of products, which is larger if the last is not finite.

    Only the products of the basis decide on its size, so the probes that come later are independent of it. It takes
    half of the budget at most, and grows as long as the last vectors have removed more from the variance of the rest
    than as many probes more would.
    """
    start = draw()
    most = min(budget // 2, BASIS_BYTES // (start.numel() * start.element_size()))
    if budget < FEWEST or most < PILOT:
        return Deflation(), 0
    lanczos = Lanczos(product, lambda: start)
    while lanczos.size < most:
        lanczos.extend()
        tick()
        if not lanczos.finite:
            return Deflation(), lanczos.size
        if lanczos.beta == 0:
            break
        if lanczos.size < PILOT or (lanczos.size > 16 and lanczos.size % 4):  # quadrature of a large T is not free
            continue
        mean, trace, squares = _bulk(lanczos)
        captured = _captured(lanczos, mean, lanczos.size)
        gain = (captured - _captured(lanczos, mean, lanczos.size - PILOT)) / PILOT
        left = max(squares - captured, 0.0)
        if tol is not None and 2 * gain <= (tol * trace) ** 2:
            break
        if gain * (budget - lanczos.size) <= left:
            break
    return Deflation(lanczos), lanczos.size


def _captured(lanczos: Lanczos, mean: float, size: int) -> float:
    """||L||_F^2 with the first `size` vectors alone."""
    if size == 0:
        return 0.0
    t = lanczos.tridiagonal()[:size, :size] - mean * torch.eye(size, dtype=torch.float64)
    return float(t.square().sum()) + 2 * lanczos.betas[size - 1] ** 2


def _bulk(lanczos: Lanczos) -> tuple[float, float, float]:
    """(mu, tr A, ||A - mu||_F^2) by quadrature: Ritz values that have converged count once, the others by the weight
    that the start vector has on them, of P in all; mu is the mean of the latter."""
    ritz = lanczos.ritz()
    start = ritz.weights[0].square()
    # relative to the distance from the middle, which is in the bulk: of a flat spectrum far from 0 nothing stands out
    middle = ritz.values[torch.searchsorted(start.cumsum(0), start.sum() / 2)]
    isolated = ritz.bounds <= 0.1 * (ritz.values - middle).abs()
    weights = torch.where(isolated, 0.0, lanczos.dimension * start)
    mean = float((weights * ritz.values).sum() / weights.sum()) if float(weights.sum()) > 0 else 0.0
    weights = weights + isolated
    rest = (ritz.values - mean).square()
    return mean, float((weights * ritz.values).sum()), float((weights * rest).sum())
