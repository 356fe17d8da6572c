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
from torch._utils import _unflatten_dense_tensors

from sam_optim.optim.kernels.bucket import LOW_PRECISION, Bucket, Norms, Scalar, wide_dtype

SMALL = 2**14  # entries of a weight that is worked on with others
PIECE = 2**17  # entries of a piece; a longer float32 sum is off by up to 1e-3
SAFE = 1e-12, 1e18  # a norm between these has lost nothing to float32 squares that vanish or overflow


@dataclass(slots=True)
class Batch:
    """Weights `start` to `end` of a bucket: several small ones, or one that is large.

    pieces: flat parts of the clean copy, and of where w + e is computed: in a large weight itself; for small ones in a
    tensor of its own, from whose `views` they are copied.
    """

    start: int
    end: int
    pieces: list[tuple[Tensor, Tensor]]
    views: Sequence[Tensor] = ()

    def flat(self, tensors: Sequence[Tensor], weights: Sequence[Tensor]) -> Sequence[Tensor]:
        """Tensors in the shapes of the weights, cut into pieces."""
        return (flattened(tensors) if self.views else _flat(tensors[0], weights[0])).split(PIECE)


def batches_of(weights: Sequence[Tensor]) -> tuple[list[Batch], list[Tensor]]:
    """The weights in batches, and tensors for a copy of each."""
    batches: list[Batch] = []
    copies: list[Tensor] = []
    start = size = 0
    for i, w in enumerate([*weights, None]):
        n = 0 if w is None else w.numel()
        is_large = w is not None and n > SMALL and torch.ops.aten.is_non_overlapping_and_dense(w)
        if start < i and (w is None or is_large or size + n > PIECE):
            like = weights[start]
            clean, moved = (torch.empty(size, dtype=like.dtype, device=like.device) for _ in range(2))
            pieces = list(zip(clean.split(PIECE), moved.split(PIECE), strict=True))
            batches.append(Batch(start, i, pieces, _parts(moved, weights[start:i])))
            copies += _parts(clean, weights[start:i])
            start, size = i, 0
        if is_large and w is not None:
            copies.append(torch.empty_like(w, requires_grad=False))
            pieces = list(zip(*(_flat(x, w).split(PIECE) for x in (copies[-1], w)), strict=True))
            batches.append(Batch(i, i + 1, pieces))
            start = i + 1
        else:
            size += n
    return batches, copies


def _parts(flat: Tensor, weights: Sequence[Tensor]) -> list[Tensor]:
    """Of one tensor, in the shapes of the weights; torch 2.8 gives those without entries the shape (0,)."""
    return [x.view(w.shape) for x, w in zip(_unflatten_dense_tensors(flat, weights), weights, strict=True)]


def measure(b: Bucket) -> Norms:
    """The norms of the bucket. Where `_may_hold_step`, the weights are T^2 g or T sign(g) until `ascend_`.

    `b.unit` becomes max |g| where powers of g could vanish or overflow; then everything is computed for g / unit.
    """
    b.unit = 1.0
    if not b.grads:
        return Norms(0.0, 0.0, 0.0)
    if b.grads[0].is_sparse:
        b.grads = [g.coalesce() for g in b.grads]
    norms = Norms(*[norm_of(b.grads).item()] * 3) if b.is_plain and not b.grads[0].is_sparse else _norms(b)
    if math.isnan(norms.dual) or SAFE[0] < norms.dual < SAFE[1]:
        return norms
    entries = [g.values() if g.is_sparse else g for g in b.grads]
    b.unit = max([float(torch.linalg.vector_norm(g, math.inf)) for g in entries if g.numel()], default=0.0) or 1.0
    dual, grad, step = _norms(b)
    return Norms(dual * b.unit, grad * b.unit, step * b.unit if b.p == 2 else step)


def ascend_(b: Bucket, factor: Scalar) -> tuple[Scalar, Scalar] | None:
    """w <- w + e. Returns <e', e> and <e, e> over bf16 and fp16 weights, e' what their rounding left of e."""
    if not b.weights:
        return None
    is_wide = b.dtype == b.grads[0].dtype and b.dtype not in LOW_PRECISION
    if is_wide and b.is_plain and b.unit == 1.0 and not b.grads[0].is_sparse:
        torch._foreach_add_(b.weights, b.grads, alpha=factor)  # type: ignore[arg-type]
        return None
    batches: list[Batch] = [] if b.grads[0].is_sparse else b.storage.batches  # type: ignore[union-attr]
    retained = []
    if b.holds_step:
        for batch in batches:
            for clean, w in batch.pieces:
                torch.add(clean, w, alpha=factor, out=w)  # type: ignore[arg-type]
    else:
        for clean, g, t, w, index in _pieces(b):
            e = g.clone() if b.p == 2 else g.sign()
            for _ in range(0 if t is None else 2 if b.p == 2 else 1):
                e.mul_(t)  # type: ignore[arg-type]
            e.mul_(factor)
            moved = round_to(clean.to(e.dtype) + e, b.dtype, b.noise)
            w[index] = moved
            if b.dtype in LOW_PRECISION:
                left = moved.to(e.dtype) - clean.to(e.dtype)
                retained.append(((left * e).sum(dtype=torch.float64), e.square().sum(dtype=torch.float64)))
    for batch in batches:
        if batch.views:
            torch._foreach_copy_(b.weights[batch.start : batch.end], list(batch.views))
    return tuple(torch.stack(x).sum() for x in zip(*retained, strict=True)) if retained else None  # type: ignore[return-value]


def _norms(b: Bucket) -> Norms:
    q, norms = 2 if b.p == 2 else 1, []
    b.holds_step = _may_hold_step(b)
    for _, g, t, w, _ in _pieces(b):
        out = w if b.holds_step else None
        direction = g if t is None else torch.mul(g, t, out=out)
        dual = torch.linalg.vector_norm(direction, q)
        if b.p != 2:
            direction = torch.sign(g, out=out)
        step = direction if t is None else direction.mul_(t)
        norms.append((dual, torch.linalg.vector_norm(g), torch.linalg.vector_norm(step)))
    return Norms(*[total(x, order).item() for x, order in zip(zip(*norms, strict=True), (q, 2, 2), strict=True)])


def _may_hold_step(b: Bucket) -> bool:
    """Whether a weight can hold what it moves by, so that this is computed once: a wide one that shares no memory."""
    if b.is_plain or not b.storage.are_apart or b.grads[0].is_sparse:  # type: ignore[union-attr]
        return False
    addresses = {x.data_ptr() for x in b.weights}
    return b.dtype == wide_dtype(b.dtype, b.grads[0].dtype) and addresses.isdisjoint([g.data_ptr() for g in b.grads])


def _pieces(b: Bucket) -> Iterator[tuple[Tensor, Tensor, Tensor | None, Tensor, Any]]:
    """Clean weights, g / unit and T in the precision of the arithmetic, and where w + e goes: a tensor and an index."""
    storage, scales = b.storage, b.t or ()
    if b.grads and b.grads[0].is_sparse:  # only the rows that they name move, and the others are not made dense
        for i, (g, copy, w) in enumerate(zip(b.grads, storage.copies, b.weights, strict=True)):  # type: ignore[union-attr]
            rows = tuple(g.indices())
            t = scales[i].expand_as(copy)[rows] if scales else None
            yield copy[rows], _scaled(g.values(), b), _scale(copy[rows], t, b), w, rows
        return
    for batch in storage.batches:  # type: ignore[union-attr]
        here = slice(batch.start, batch.end)
        weights = b.weights[here]
        grads, ts = batch.flat(b.grads[here], weights), [None] * len(batch.pieces)
        if scales:
            ts = batch.flat([t.expand_as(w) for t, w in zip(scales[here], weights, strict=True)], weights)
        for (clean, w), g, t in zip(batch.pieces, grads, ts, strict=True):
            yield clean, _scaled(g, b), _scale(clean, t, b), w, ...


def _scaled(g: Tensor, b: Bucket) -> Tensor:
    g = g.to(wide_dtype(g.dtype, b.dtype))
    return g if b.unit == 1.0 else g / b.unit


def _scale(clean: Tensor, t: Tensor | None, b: Bucket) -> Tensor | None:
    """T; None is 1."""
    if b.eta is None:
        return t
    clean = clean.to(wide_dtype(clean.dtype))
    if b.eta == 0 and b.p == 2:  # its sign falls out of T^2 g
        return clean
    return clean.abs().add_(b.eta)


def _flat(x: Tensor, w: Tensor) -> Tensor:
    """The entries of x in the order in which those of w lie in memory, which has no gaps."""
    if x.stride() != w.stride():
        x = torch.empty_like(w, dtype=x.dtype, requires_grad=False).copy_(x)
    return x.detach().as_strided((x.numel(),), (1,))


def round_to(x: Tensor, dtype: torch.dtype, noise: Any) -> Tensor:
    """x in `dtype`: the nearest value; with `noise` one of its two neighbors, so that the mean is x."""
    near = x.to(dtype)
    if noise is None or dtype not in LOW_PRECISION:
        return near
    rest = x - near.to(x.dtype)
    far = torch.nextafter(near, torch.where(rest > 0, math.inf, -math.inf).to(dtype))
    gap = far.to(x.dtype) - near.to(x.dtype)
    take = noise.uniform_like(x) < torch.where(gap != 0, rest / gap, 0.0)
    return torch.where(take & (rest != 0) & far.isfinite(), far, near)


def total(norms: Sequence[Tensor], order: float) -> Tensor:
    """The norm of all from the norms of parts, 0-d."""
    if len(norms) == 1:
        return norms[0]
    return torch.linalg.vector_norm(torch.stack(list(norms)), order, dtype=torch.float64)


def norm_of(tensors: Sequence[Tensor]) -> Tensor:
    """||.||_2 over all entries of dense tensors; in float32 it may overflow. The fastest pass over memory."""
    if sum(map(Tensor.numel, tensors)) <= PIECE:
        flat = flattened(tensors)
        return torch.linalg.vector_norm(flat.float() if flat.dtype in LOW_PRECISION else flat)
    small = [x for x in tensors if x.numel() <= SMALL]
    parts = list(flattened(small).split(PIECE)) if small else []
    for x in tensors:
        if x.numel() > SMALL:
            is_dense = torch.ops.aten.is_non_overlapping_and_dense(x)
            parts += (_flat(x, x) if is_dense else x.reshape(-1)).split(PIECE)
    return total(torch._foreach_norm(parts, dtype=wide_dtype(tensors[0].dtype)), 2)
