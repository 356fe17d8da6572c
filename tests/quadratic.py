"""A model whose loss is a quadratic: every measure, and every step of an optimizer, has a closed form on it.

    L(w) = 1/2 (w - m)^T A (w - m),   dL/dw = A (w - m),   d^2 L / dw^2 = A

    model = Quadratic(A, m, w)                     # float64, A symmetric, w in one parameter
    model()                                        # L(w), 0-d: what an optimizer's closure needs
    Loss(model, mean, batches)                     # of shifts x: L(w) = mean_i 1/2 (w - m - x_i)^T A (w - m - x_i)

Shifts x, (n, P), move the minimum of each example and leave A: for batches with gradients of their own.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from sam_optim.loss import Loss


class Quadratic(nn.Module):
    """See the module. `sizes` splits w over several parameters, in this order; without m and w these are 0."""

    def __init__(
        self, a: Tensor, m: Tensor | None = None, w: Tensor | None = None, *, sizes: Sequence[int] | None = None
    ):
        super().__init__()
        zero = torch.zeros(len(a), dtype=a.dtype)
        self.register_buffer("a", a)
        self.register_buffer("m", zero if m is None else m)
        parts = (zero if w is None else w).clone().split(list(sizes or [len(a)]))
        self.parts = nn.ParameterList([nn.Parameter(part.clone()) for part in parts])

    @property
    def w(self) -> Tensor:
        """The weights in one vector, (P,)."""
        return torch.cat(list(self.parts))

    def forward(self, x: Tensor | None = None) -> Tensor:
        """0-d without x, else (n,): the loss of each example."""
        d = self.w - self.m if x is None else self.w - self.m - x
        return 0.5 * ((d @ self.a) * d).sum(dim=-1)

    def gradient(self) -> Tensor:
        """A (w - m), (P,)."""
        return self.a @ (self.w.detach() - self.m)


def mean(outputs: Tensor, target: Tensor) -> Tensor:
    return outputs.mean()


def unshifted(model: Quadratic, *, num: int = 4) -> Loss:
    """The loss of the model itself, over one batch without shifts."""
    return Loss(model, mean, [(model.a.new_zeros(num, len(model.a)), torch.zeros(num))])


def shifted(model: Quadratic, sizes: Sequence[int], *, seed: int = 0, spread: float = 1.0) -> Loss:
    """A loss over batches of these sizes, whose shifts are normal with the standard deviation `spread`."""
    generator = torch.Generator().manual_seed(seed)
    draws = [spread * torch.randn(n, len(model.a), generator=generator, dtype=model.a.dtype) for n in sizes]
    return Loss(model, mean, [(x, torch.zeros(len(x))) for x in draws])


def symmetric(eigenvalues: Sequence[float], *, seed: int = 0) -> Tensor:
    """A symmetric float64 matrix with these eigenvalues, in a random basis."""
    generator = torch.Generator().manual_seed(seed)
    n = len(eigenvalues)
    q, _ = torch.linalg.qr(torch.randn(n, n, generator=generator, dtype=torch.float64))
    a = q @ torch.diag(torch.tensor(eigenvalues, dtype=torch.float64)) @ q.T
    return (a + a.T) / 2
