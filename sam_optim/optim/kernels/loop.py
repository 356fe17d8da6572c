"""The specification, and the body for the CPU: the formulas as they stand, over pieces that fit into the cache.

Small weights are worked on together, as one flat tensor for each batch; large ones in parts. One operation after the
other over all weights would fetch them from memory each time, and would need temporaries of their size. Arithmetic is
in float32, or in float64 where weights or gradients are. `foreach` and `triton` are tested against this.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch._utils import _flatten_dense_tensors as flattened
from torch._utils import _unflatten_dense_tensors as unflattened

from sam_optim.optim.kernels.bucket import LOW_PRECISION, Bucket, Norms, Scalar, wide_dtype

SMALL = 2**14  # entries of a weight that is worked on with others
PIECE = 2**16  # entries of a batch, or of a part of a large weight; a longer float32 sum is off by up to 1e-3
SAFE = 1e-12, 1e18  # a norm between these has lost nothing to float32 squares that vanish or overflow


@dataclass(slots=True)
class Batch:
    """Weights `start` to `end` of a bucket: several small ones, or one that is large.

    clean: where they are saved. moved: where small ones are computed, before they are copied to where they belong;
    `views` are its parts in their shapes. step: their T^2 g / unit or T sign(g), from `measure`.
    """

    start: int
    end: int
    clean: Tensor
    moved: Tensor | None = None
    views: Sequence[Tensor] = ()
    step: Tensor | None = None


def batches_of(weights: Sequence[Tensor]) -> tuple[list[Batch], list[Tensor]]:
    """The weights in batches, and a copy of each."""
    batches: list[Batch] = []
    copies: list[Tensor] = []
    start = size = 0
    for i, w in enumerate([*weights, None]):
        n = 0 if w is None else w.numel()
        if start < i and (w is None or n > SMALL or size + n > PIECE):
            together = weights[start:i]
            clean, moved = (
                torch.empty(size, dtype=weights[start].dtype, device=weights[start].device) for _ in range(2)
            )
            batches.append(Batch(start, i, clean, moved, unflattened(moved, together)))
            copies += unflattened(clean, together)
            start, size = i, 0
        if w is not None and n > SMALL:
            copies.append(torch.empty_like(w, requires_grad=False))
            batches.append(Batch(i, i + 1, copies[-1]))
            start = i + 1
        else:
            size += n
    return batches, copies


def measure(b: Bucket) -> Norms:
    """The norms of the bucket; on a device 0-d tensors, which are not read.

    `b.unit` becomes max |g| where powers of g could vanish or overflow; then everything is computed for g / unit.
    """
    b.unit = 1.0
    if b.device.type == "cpu":
        norms = _plain_norms(b) if b.is_plain else Norms(*[x.item() for x in _norms(b)])
        if math.isnan(norms.dual) or SAFE[0] < norms.dual < SAFE[1]:
            return norms
    largest = [torch.linalg.vector_norm(g, math.inf).double() for g in b.grads if g.numel()]
    if not largest:
        return Norms(0.0, 0.0, 0.0)
    unit = torch.stack(largest).max()
    b.unit = torch.where(unit == 0, 1.0, unit)
    dual, grad, step = _norms(b)
    scaled = dual * b.unit, grad * b.unit, step * b.unit if b.p == 2 else step
    return Norms(*(x.item() for x in scaled)) if b.device.type == "cpu" else Norms(*scaled)


def ascend_(b: Bucket, factor: Scalar) -> tuple[Scalar, Scalar] | None:
    """w <- w + e. Returns <e', e> and <e, e> over bf16 and fp16 weights, e' what their rounding left of e."""
    if b.is_plain and isinstance(b.unit, float) and b.dtype == b.grads[0].dtype and b.dtype not in LOW_PRECISION:
        torch._foreach_add_(b.weights, b.grads, alpha=factor)  # type: ignore[arg-type]
        return None
    retained = []
    for batch in b.storage.batches:  # type: ignore[union-attr]
        if batch.step is None:
            for clean, g, t, w, scatter in _pieces(b, batch):
                retained.append(_move_(b, clean, step(scaled(g, b), t, b.p), w, scatter, factor))
        else:
            e, batch.step = batch.step, None
            scatter = b.weights[batch.start : batch.end], batch.views
            retained.append(_move_(b, batch.clean, e, batch.moved, scatter, factor))
    return retained_of(retained)


def _plain_norms(b: Bucket) -> Norms:
    """Where T = 1 and p = 2, in one go."""
    norm = norm_of(b.grads).item() if b.grads else 0.0
    return Norms(norm, norm, norm)


def _norms(b: Bucket) -> tuple[Tensor, Tensor, Tensor]:
    q = 2 if b.p == 2 else 1
    duals, grads, steps = [], [], []
    for batch in b.storage.batches:  # type: ignore[union-attr]
        for _, g, t, _, _ in _pieces(b, batch):
            g = scaled(g, b)
            scaled_g = g if t is None else g * t
            duals.append(torch.linalg.vector_norm(scaled_g, q))
            if b.is_plain:
                continue
            e = step(g, t, b.p) if b.p != 2 or t is None else scaled_g.mul_(t)
            grads.append(torch.linalg.vector_norm(g))
            steps.append(torch.linalg.vector_norm(e))
            batch.step = None if batch.moved is None else e
    if not duals:
        return (torch.zeros((), dtype=torch.float64, device=b.device),) * 3
    dual = total(duals, q)
    return (dual,) * 3 if b.is_plain else (dual, total(grads, 2), total(steps, 2))


def _move_(b: Bucket, clean: Tensor, e: Tensor, target: Tensor, scatter: Any, factor: Scalar) -> Any:
    """target <- clean + factor e, and from there to where `scatter` says."""
    e = e.mul_(factor)
    if target.dtype not in LOW_PRECISION:
        torch.add(clean, e, out=target)
    else:
        target.copy_(round_to(clean.float() + e, target.dtype, b.noise))
    if scatter is not None:
        torch._foreach_copy_(*scatter)
    return None if target.dtype not in LOW_PRECISION else dots(target, clean, e)


def _pieces(b: Bucket, batch: Batch) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor, Any]]:
    """Clean weights, gradients, T, where w + e goes, and what must be copied from there to where."""
    start, end = batch.start, batch.end
    if batch.moved is not None:
        weights, grads = b.weights[start:end], b.grads[start:end]
        t = None if b.t is None else flattened([t.expand_as(w) for t, w in zip(b.t[start:end], weights, strict=True)])
        yield batch.clean, flattened(grads), scale(b, batch.clean, t), batch.moved, (weights, batch.views)
        return
    clean, g, w = batch.clean, b.grads[start], b.weights[start]
    alike = clean.stride() == g.stride() == w.stride() and torch.ops.aten.is_non_overlapping_and_dense(w)
    if b.t is not None or not alike:
        yield clean, g, scale(b, clean, None if b.t is None else b.t[start]), w, None
        return
    flat = [x.detach().as_strided((x.numel(),), (1,)).split(PIECE) for x in (clean, g, w)]
    for clean, g, w in zip(*flat, strict=True):
        yield clean, g, scale(b, clean, None), w, None


def scaled(g: Tensor, b: Bucket) -> Tensor:
    """g / unit, in the precision of the arithmetic."""
    g = g.to(wide_dtype(g.dtype, b.dtype))
    return g if isinstance(b.unit, float) else g / b.unit


def scale(b: Bucket, clean: Tensor, t: Tensor | None) -> Tensor | None:
    """T in the precision of the arithmetic; None is 1."""
    if b.eta is not None:
        t = clean.to(wide_dtype(clean.dtype)).abs()
        return t.add_(b.eta) if b.eta else t
    return t


def step(g: Tensor, t: Tensor | None, p: float) -> Tensor:
    """T^2 g, or T sign(g): a new tensor."""
    if p != 2:
        return g.sign() if t is None else g.sign().mul_(t)
    return g.clone() if t is None else (g * t).mul_(t)


def round_to(x: Tensor, dtype: torch.dtype, noise: Any) -> Tensor:
    """x in `dtype`: the nearest value; with `noise` one of its two neighbours, so that the mean is x."""
    near = x.to(dtype)
    if noise is None or dtype not in LOW_PRECISION:
        return near
    rest = x - near.to(x.dtype)
    far = torch.nextafter(near, torch.where(rest > 0, math.inf, -math.inf).to(dtype))
    gap = far.to(x.dtype) - near.to(x.dtype)
    take = noise.uniform_like(x) < torch.where(gap != 0, rest / gap, 0.0)
    return torch.where(take & (rest != 0) & far.isfinite(), far, near)


def dots(moved: Tensor, clean: Tensor, e: Tensor) -> tuple[Tensor, Tensor]:
    """<e', e> and <e, e> of one low-precision weight, e' = moved - clean."""
    left = moved.to(e.dtype) - clean.to(e.dtype)
    return (left * e).sum(dtype=torch.float64), e.square().sum(dtype=torch.float64)


def retained_of(pairs: Sequence[tuple[Tensor, Tensor] | None]) -> tuple[Scalar, Scalar] | None:
    """The sums of what `dots` gave."""
    present = [x for x in pairs if x is not None]
    if not present:
        return None
    sums = [torch.stack(x).sum() for x in zip(*present, strict=True)]
    return (sums[0].item(), sums[1].item()) if sums[0].device.type == "cpu" else (sums[0], sums[1])


def total(norms: Sequence[Tensor], order: float) -> Tensor:
    """The norm of all from the norms of parts, 0-d."""
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack(list(norms)), order, dtype=torch.float64)


def norm_of(tensors: Sequence[Tensor]) -> Tensor:
    """||.||_2 over all entries of dense tensors; in float32 it may overflow. The fastest pass over memory."""
    if sum(map(Tensor.numel, tensors)) <= PIECE:
        flat = flattened(tensors)
        return torch.linalg.vector_norm(flat, dtype=wide_dtype(flat.dtype))
    small, norms = [x for x in tensors if x.numel() <= SMALL], []
    for x in tensors:
        if x.numel() > SMALL:
            x = x.detach()
            flat = x.as_strided((x.numel(),), (1,)) if torch.ops.aten.is_non_overlapping_and_dense(x) else x.reshape(-1)
            norms += [torch.linalg.vector_norm(part, dtype=wide_dtype(x.dtype)) for part in flat.split(PIECE)]
    if small:
        norms.append(torch.linalg.vector_norm(flattened(small), dtype=wide_dtype(small[0].dtype)))
    return total(norms, 2)
