"""The CPU's fast way: one out-of-place add into a persistent buffer, whose storage the parameter borrows for pass 2.

As `reference`, with a third of the bytes: nothing is copied to save w, nothing is copied to bring it back, and w ends in
its own storage. Temporaries stay in the cache: large tensors are walked in chunks, in the order of their memory.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sam_optim.kernels import Bucket

CHUNK = 65536  # entries: w, g and a temporary of this length stay in a second-level cache; also the rows of the norm

try:
    _use_count = torch._C._storage_Use_Count
    _UNSHARED = _use_count(torch.empty(1).untyped_storage()._cdata)
except AttributeError:  # a private function: without it nothing is known to be safe
    _use_count, _UNSHARED = None, 0

_local = threading.local()


def is_safe(w: Tensor, g: Tensor) -> bool:
    """Whether nobody could notice: a plain dense tensor on the CPU whose storage nobody else looks into.

    A view of a flat buffer, a second parameter on the same storage, a numpy array or a state_dict that is being kept
    would go on seeing the clean weights; those are moved in place.
    """
    return (
        _use_count is not None
        and type(w) in (torch.nn.Parameter, Tensor)
        and (w.dtype == torch.float32 or w.dtype == torch.float64)
        and w.dtype == g.dtype
        and w.device.type == "cpu"
        and w.stride() == g.stride()
        and (w.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(w))
        and _use_count(w.untyped_storage()._cdata) <= _UNSHARED
    )


def dual_power(b: Bucket) -> float:
    """Row norms first, then their norm in float64: one long float32 sum is off by 1e-3 at 25 M entries."""
    order = 2 if b.p == 2 else 1
    norms, at = _row_norms(sum(-(-g.numel() // CHUNK) for g in b.g), b.w[0].dtype), 0
    for i, (w, g) in enumerate(zip(b.w, b.g, strict=True)):
        n = g.numel()
        if b.t is not None and n:
            torch.linalg.vector_norm(_partial_norms(g, b.t[i], order), order, out=norms[at])
            at += 1
        elif 0 < n <= CHUNK:
            torch.linalg.vector_norm(g if b.eta is None else _elementwise(b.eta, w.data).mul_(g), order, out=norms[at])
            at += 1
        elif n:
            for clean, part in _chunks(w.data, g):
                x = part if b.eta is None else _elementwise(b.eta, clean).mul_(part)
                torch.linalg.vector_norm(x, order, out=norms[at])
                at += 1
    if not at:
        return 0.0
    total = torch.linalg.vector_norm(_local.rows[b.w[0].dtype][0][:at], order, dtype=torch.float64).item()
    return total**order


def ascend_(b: Bucket, factor: float) -> None:
    for i, (w, g, buffer) in enumerate(zip(b.w, b.g, b.buffer, strict=True)):
        clean = w.data
        if b.p == 2 and b.eta is None and b.t is None:
            torch.add(clean, g, alpha=factor, out=buffer)
        elif b.eta is None or g.numel() <= CHUNK:
            _move(b, i, clean, g, buffer, factor)
        else:
            for (part, gradient), (_, out) in zip(_chunks(clean, g), _chunks(clean, buffer), strict=True):
                _move(b, i, part, gradient, out, factor)
        b.saved.append(clean)  # before the weights move: what is recorded can be brought back
        w.data = buffer
    torch.autograd.graph.increment_version(b.w)  # a backward through the graph of pass 1 must fail, as in place


def restore_(b: Bucket) -> None:
    for w, clean in zip(b.w, b.saved, strict=False):
        w.data = clean
    torch.autograd.graph.increment_version(b.w)


def _move(b: Bucket, i: int, w: Tensor, g: Tensor, out: Tensor, factor: float) -> None:
    """out <- w + factor T^2 g  or  w + factor T sign(g)."""
    if b.p == math.inf:
        torch.sgn(g, out=out)
        if b.eta is not None:
            torch.addcmul(w, _elementwise(b.eta, w), out, value=factor, out=out)
        elif b.t is not None:
            torch.addcmul(w, b.t[i], out, value=factor, out=out)
        else:
            torch.add(w, out, alpha=factor, out=out)
    elif b.eta is not None:
        t = _elementwise(b.eta, w)
        torch.addcmul(w, t.mul_(t), g, value=factor, out=out)
    else:
        assert b.t is not None
        torch.addcmul(w, b.t[i] * b.t[i], g, value=factor, out=out)


def _partial_norms(g: Tensor, t: Tensor, order: int) -> Tensor:
    """T g, with the entries that share a T already reduced to their norm: ||T g|| is the norm of these."""
    shared = [d for d in range(g.ndim) if t.ndim == 0 or t.shape[d] == 1]
    if not shared:
        return t * g
    dtype = torch.float64 if t.ndim == 0 else g.dtype
    return t * torch.linalg.vector_norm(g, order, dim=shared, keepdim=t.ndim > 0, dtype=dtype)


def _elementwise(eta: float, w: Tensor) -> Tensor:
    """|w| + eta in this thread's temporary, in the layout of w."""
    if not hasattr(_local, "temporary"):
        _local.temporary = {}
    flat = _local.temporary.get(w.dtype)
    if flat is None:
        flat = _local.temporary[w.dtype] = torch.empty(CHUNK, dtype=w.dtype)
    t = torch.as_strided(flat, w.shape, w.stride())
    torch.abs(w, out=t)
    return t.add_(eta) if eta else t


def _chunks(w: Tensor, g: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Both tensors, of one dense layout, as flat chunks in the order of memory."""
    n = w.numel()
    flat_w, flat_g = (torch.as_strided(x, (n,), (1,), x.storage_offset()) for x in (w, g))
    yield from zip(flat_w.split(CHUNK), flat_g.split(CHUNK), strict=True)


def _row_norms(n: int, dtype: torch.dtype) -> tuple[Tensor, ...]:
    """0-d views into this thread's persistent vector of at least n norms."""
    if not hasattr(_local, "rows"):
        _local.rows = {}
    if dtype not in _local.rows or len(_local.rows[dtype][1]) < n:
        vector = torch.empty(n, dtype=dtype)
        _local.rows[dtype] = (vector, vector.unbind())
    return _local.rows[dtype][1]
