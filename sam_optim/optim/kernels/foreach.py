"""As `loop`, for devices: whole lists of tensors in a few launches, with torch._foreach_*, and without a host sync."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sam_optim.optim.kernels.bucket import LOW_PRECISION, Bucket, Norms, Scalar, wide_dtype
from sam_optim.optim.kernels.loop import round_to, total


def measure(b: Bucket) -> Norms:
    """Norms, of g / max |g|: neither its powers nor T g vanish or overflow."""
    if not any([w.numel() for w in b.weights]):  # the largest entry of nothing does not exist
        return Norms(0.0, 0.0, 0.0)
    q = 2 if b.p == 2 else 1
    g, t = _wide(b.grads, b.dtype), _scales(b)
    largest = torch.stack(torch._foreach_norm([x for x in g if x.numel()], math.inf)).amax().double()
    b.unit = torch.where(largest == 0, 1.0, largest)
    scaled = torch._foreach_div(g, b.unit)
    direction = scaled if t is None else torch._foreach_mul(scaled, t)
    dual = total(torch._foreach_norm(direction, q, dtype=None if t is None else torch.float64), q) * b.unit
    if b.is_plain:
        return Norms(dual, dual, dual)
    grad = total(torch._foreach_norm(scaled), 2) * b.unit
    step = direction if b.p == 2 else torch._foreach_sign(g)
    length = total(torch._foreach_norm(step if t is None else torch._foreach_mul(step, t)), 2)
    return Norms(dual, grad, length * b.unit if b.p == 2 else length)


def ascend_(b: Bucket, factor: Scalar) -> tuple[Scalar, Scalar] | None:
    """w <- w + e. Returns <e', e> and <e, e> over bf16 and fp16 weights, e' what their rounding left of e."""
    if not b.weights:
        return None
    g, t = _wide(b.grads, b.dtype), _scales(b)
    e = torch._foreach_div(g, b.unit) if b.p == 2 else torch._foreach_sign(g)
    for _ in range(2 if b.p == 2 else 1):
        if t is not None:
            torch._foreach_mul_(e, t)
    torch._foreach_mul_(e, factor)
    if e[0].dtype == b.dtype:
        torch._foreach_add_(b.weights, e)
        return None
    moved = list(torch._foreach_add(_wide(b.weights, e[0].dtype), e))
    if b.noise is not None:
        moved = [round_to(x, b.dtype, b.noise) for x in moved]
    torch._foreach_copy_(b.weights, moved)
    return _retained(b, list(e)) if b.dtype in LOW_PRECISION else None


def _retained(b: Bucket, e: list[Tensor]) -> tuple[Tensor, Tensor]:
    """<e', e> and <e, e> from norms alone: 2 <e', e> = ||e'||^2 + ||e||^2 - ||e' - e||^2."""
    clean = _wide(b.storage.copies, torch.float32)  # type: ignore[union-attr]
    left = list(torch._foreach_sub(_wide(b.weights, torch.float32), clean))
    square, left_square = (total(torch._foreach_norm(x), 2).square() for x in (e, left))
    rest = total(torch._foreach_norm(torch._foreach_sub(left, e)), 2).square()
    return (left_square + square - rest) / 2, square


def _scales(b: Bucket) -> list[Tensor] | None:
    """T at the clean weights, in the precision of the arithmetic; None is 1."""
    if b.eta is None:
        return b.t
    scales = list(torch._foreach_abs(_wide(b.storage.copies, b.grads[0].dtype)))  # type: ignore[union-attr]
    torch._foreach_add_(scales, b.eta)
    return scales


def _wide(tensors: list[Tensor], dtype: torch.dtype) -> list[Tensor]:
    """The tensors in float32, or in float64 if they or `dtype` are; copies only where that changes the dtype."""
    dtype = wide_dtype(tensors[0].dtype, dtype)
    if tensors[0].dtype == dtype:
        return tensors
    wide = [torch.empty_like(x, dtype=dtype) for x in tensors]
    torch._foreach_copy_(wide, tensors)
    return wide
