"""What is asked of gradients and moves, moving nothing: what rounding has left of e, and whether all is finite."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sam_optim.optim.kernels import dtensor as shards
from sam_optim.optim.kernels import loop as reference
from sam_optim.optim.kernels import widened

if TYPE_CHECKING:
    from sam_optim.optim.kernels import Bucket, Scalar

LOW_PRECISION = (torch.bfloat16, torch.float16)


def realized(buckets: list[Bucket], factors: list[Scalar]) -> Scalar | None:
    """<e', e> / ||e||^2 over bf16 and fp16 weights, e the perturbation asked for, e' what their rounding left of it.

    None where there are none: float32 keeps it to better than 1e-3, in copies, too. Needs the ascent gradients.
    """
    low = [(b, f) for b, f in zip(buckets, factors, strict=True) if b.dtype in LOW_PRECISION and b.body is not widened]
    if not low:
        return None
    dots: list[Scalar] = []
    squares: list[Scalar] = []
    for b, factor in low:
        if b.realized is not None:
            dot, square = b.realized.sum(dim=1).unbind()
            dots.append(dot)
            squares.append(square)
            continue
        moves = [reference.step(b, i, clean, factor) for i, clean in enumerate(b.saved)]
        realised = [w.detach().float() - clean.float() for w, clean in zip(b.w, b.saved, strict=False)]
        dots.append(shards.total([(x * e).sum(dtype=torch.float64) for x, e in zip(realised, moves, strict=True)]))
        squares.append(shards.total([e.square().sum(dtype=torch.float64) for e in moves]))
    of = [b for b, _ in low]
    square = torch.as_tensor(shards.total(shards.over_ranks(of, squares)))
    return torch.where(square > 0, torch.as_tensor(shards.total(shards.over_ranks(of, dots))) / square, 1.0)


def finite(grads: list[Tensor]) -> bool | Tensor:
    """Whether all entries are finite: known on the CPU, a 0-d tensor on a device, which is not read."""
    kinds: dict[Any, list[Tensor]] = {}
    for g in grads:
        if type(g) is not Tensor or g.is_sparse or g.is_complex():
            g = shards.local(g)
            g = g.coalesce().values() if g.is_sparse else g
            g = torch.view_as_real(g) if g.is_complex() else g
        kinds.setdefault((g.device, g.dtype), []).append(g)
    answers = [_finite(device, found) for (device, _), found in kinds.items()]
    on_device = [x for x in answers if isinstance(x, Tensor)]
    if not on_device:
        return all(answers)
    return torch.stack([torch.as_tensor(x).to(on_device[0].device, non_blocking=True) for x in answers]).all()


def _finite(device: torch.device, grads: list[Tensor]) -> bool | Tensor:
    wide = torch.float64 if grads[0].dtype == torch.float64 else torch.float32
    # the fastest pass over memory on either; on a device its sum overflows only beyond all gradients that make sense
    full = [g for g in grads if g.numel()]
    if not full:
        return True
    total = torch.stack(torch._foreach_norm(full, 2 if device.type == "cpu" else 1, dtype=wide)).sum()
    if device.type != "cpu":
        return total.isfinite()
    return math.isfinite(shards.number(total)) or all(bool(g.isfinite().all()) for g in grads)
