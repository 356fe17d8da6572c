"""Whole lists at once with torch._foreach_*, in place; also for DTensor and other tensor subclasses. No host sync.

As `reference`, in few launches. Temporaries are of the size of the gradients for T != 1 or p = inf, else one list.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sam_optim.kernels import reference

if TYPE_CHECKING:
    from sam_optim.kernels import Bucket, Scalar


def dual_power(b: Bucket) -> Scalar:
    pairs = [(i, g) for i, g in enumerate(b.g) if g.numel()]
    if not pairs:
        return 0.0
    x = _wide([g for _, g in pairs])
    t = _scales(b, [i for i, _ in pairs])
    if t is not None:
        x = list(torch._foreach_mul(x, t))
    norms = torch._foreach_norm(x, 2 if b.p == 2 else 1)
    stacked = torch.stack([_plain(n) for n in norms]).double()
    return stacked.square().sum() if b.p == 2 else stacked.sum()


def ascend_(b: Bucket, factor: Scalar) -> None:
    for w, kept in zip(
        b.w, (b.workspace[i] for i in b.index), strict=True
    ):  # _foreach_copy_ has no sharding strategy for DTensor
        kept.copy_(w)
        b.saved.append(kept)
    g = _wide(b.g)
    direction = [x.sgn() for x in g] if b.p != 2 else g
    t = _scales(b, range(len(b.w)))
    if t is not None:
        direction = list(torch._foreach_mul(direction, t))
        if b.p == 2:
            torch._foreach_mul_(direction, t)
    if isinstance(factor, Tensor):
        # a factor of 0 must give 0 also for a gradient that is not finite, without asking the device
        moves = [torch.where(factor == 0, 0.0, x * factor.to(x.dtype)) for x in direction]
    else:
        moves = list(torch._foreach_mul(direction, factor))
    if all(w.dtype == e.dtype for w, e in zip(b.w, moves, strict=True)):
        torch._foreach_add_(b.w, moves)
    else:
        for w, e in zip(b.w, moves, strict=True):
            w.copy_(w.to(e.dtype) + e)


def restore_(b: Bucket) -> None:
    reference.restore_(b)


def _scales(b: Bucket, indices: range | list[int]) -> list[Tensor] | None:
    if b.eta is not None:
        t = torch._foreach_abs(_wide([b.w[i].detach() for i in indices]))
        torch._foreach_add_(t, b.eta)
        return list(t)
    return None if b.t is None else _wide([b.t[i] for i in indices])


def _wide(tensors: list[Tensor]) -> list[Tensor]:
    return [x if x.dtype == torch.float64 else x.float() for x in tensors]


def _plain(x: Tensor) -> Tensor:
    """The value of a DTensor's reduction on every rank; a plain tensor as it is."""
    return x.full_tensor() if hasattr(x, "full_tensor") else x
