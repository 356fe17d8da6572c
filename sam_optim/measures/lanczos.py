"""Lanczos with full re-orthogonalization: extreme eigenvalues of a symmetric matrix that is known by its products."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch
from torch import Tensor

from sam_optim.measures.shared import dot, norm

ROWS = 8  # basis vectors in one block of memory: two matrix products orthogonalize against all of them


@dataclass
class Ritz:
    """values: (k,), of the matrix in the basis. weights: (k, k), a column for each Ritz vector, in the basis.
    bounds: (k,), ||A x - theta x||_2. latest: (k,), True where a value belongs to the last Krylov space."""

    values: Tensor
    weights: Tensor
    bounds: Tensor
    latest: Tensor


@dataclass
class _Space:
    """A tridiagonal matrix: that of A in one Krylov space."""

    diagonal: list[float] = field(default_factory=list)
    below: list[float] = field(default_factory=list)  # the last one leads out of the space

    def matrix(self) -> Tensor:
        """(k, k), float64."""
        below = torch.diag(torch.tensor(self.below[:-1], dtype=torch.float64), -1) if len(self.below) > 1 else 0.0
        t = torch.diag(torch.tensor(self.diagonal, dtype=torch.float64)) + below
        return t + (t.T - torch.diag(t.diagonal()))


class Lanczos:
    """A Q = Q T + beta q' e^T,  Q^T Q = 1: each `extend` costs one product and adds one vector to the basis Q.

    One Krylov space holds one vector of each eigenspace at most. When it is complete (beta = 0), another one is started
    at random, orthogonal to all before: so eigenvalues are found as often as they occur.
    """

    def __init__(self, product: Callable[[Tensor], Tensor], draw: Callable[[], Tensor]):
        self._product = product
        self._draw = draw
        self._blocks: list[Tensor] = []
        self._spaces: list[_Space] = []
        self.size = 0
        self.next = draw()
        self.dimension = len(self.next)
        self.next = self.next / norm(self.next)
        self.epsilon = torch.finfo(self.next.dtype).eps
        self.scale = 0.0  # the largest entry of T so far, a size for ||A||
        self.finite = True

    @property
    def num_spaces(self) -> int:
        return len(self._spaces)

    @property
    def ended(self) -> bool:
        """The last Krylov space is complete: A maps it to itself."""
        return not self._spaces or self._spaces[-1].below[-1] == 0

    @property
    def complete(self) -> bool:
        return self.size == self.dimension

    @property
    def betas(self) -> list[float]:
        """The off-diagonal entries of the last Krylov space; the last one couples it to the next vector."""
        return self._spaces[-1].below

    @property
    def beta(self) -> float:
        return self.betas[-1]

    @property
    def last(self) -> Tensor:
        """The newest vector of the basis, (P,)."""
        return self._blocks[-1][(self.size - 1) % ROWS]

    def tridiagonal(self) -> Tensor:
        """T of the last Krylov space, (k, k) float64."""
        return self._spaces[-1].matrix()

    def extend(self) -> None:
        if self.ended:
            self._spaces.append(_Space())
        q = self.next
        w = self._product(q)
        alpha = dot(q, w)
        self._append(q)
        w = self._orthogonal(w)
        beta = norm(w)
        self.finite = self.finite and alpha - alpha == 0 and beta - beta == 0
        self.scale = max(self.scale, abs(alpha), beta)
        broken = beta <= max(100, self.dimension**0.5) * self.epsilon * self.scale
        self._spaces[-1].diagonal.append(alpha)
        self._spaces[-1].below.append(0.0 if broken else beta)
        if broken and not self.complete:
            w = self._orthogonal(self._draw())
            beta = norm(w)
        self.next = w / beta if beta else w

    def ritz(self) -> Ritz:
        """Exact in all spaces but the last one."""
        weights = torch.zeros(self.size, self.size, dtype=torch.float64)
        values, bounds = torch.zeros(2, self.size, dtype=torch.float64)
        start = 0
        for space in self._spaces:
            end = start + len(space.diagonal)
            values[start:end], weights[start:end, start:end] = torch.linalg.eigh(space.matrix())
            bounds[start:end] = space.below[-1] * weights[end - 1, start:end].abs()
            first, start = start, end
        return Ritz(values, weights, bounds, torch.arange(self.size) >= first)

    def vector(self, weights: Tensor) -> Tensor:
        """Q y of unit length, y: (k,)."""
        x = self.combined(weights)
        return x / norm(x)

    def combined(self, weights: Tensor) -> Tensor:
        """Q y, y: (k,)."""
        y = torch.zeros(len(self._blocks) * ROWS, dtype=self.next.dtype, device=self.next.device)
        y[: self.size] = weights.to(y)
        x = torch.zeros_like(self.next)
        for block, part in zip(self._blocks, y.split(ROWS), strict=True):
            x += part @ block
        return x

    def coordinates(self, v: Tensor) -> Tensor:
        """Q^T v, (k,) float64 on the CPU."""
        return torch.cat([block @ v for block in self._blocks])[: self.size].cpu().double()

    def diagonal_of(self, t: Tensor) -> Tensor:
        """diag(Q t Q^T), (P,), for a tridiagonal t."""
        diagonal = torch.zeros_like(self.next)
        q = [row for block in self._blocks for row in block][: self.size]
        for i, row in enumerate(q):
            diagonal += float(t[i, i]) * row.square()
            if i:
                diagonal += 2 * float(t[i, i - 1]) * row * q[i - 1]
        return diagonal

    def _append(self, q: Tensor) -> None:
        if self.size == len(self._blocks) * ROWS:
            self._blocks.append(q.new_zeros(ROWS, self.dimension))
        self._blocks[-1][self.size % ROWS] = q
        self.size += 1

    def _orthogonal(self, w: Tensor) -> Tensor:
        for _ in range(2):  # twice is enough (Kahan and Parlett)
            for block in self._blocks:
                w = w - (block @ w) @ block
        return w
