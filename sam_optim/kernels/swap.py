"""The CPU's fast way: one out-of-place add into persistent storage, which the parameter borrows for pass 2.

As `reference`, with a third of the bytes: nothing is copied to save w or to bring it back, and w ends in its own storage. Large tensors are walked in chunks that stay in the cache; small ones are gathered and moved as one.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sam_optim.kernels import Bucket

CHUNK = 65536  # entries: w, g and a temporary of this length stay in a second-level cache; also the rows of the norm
SMALL = 4096  # entries: below, calling an operation costs more than its work

_use_count = getattr(torch._C, "_storage_Use_Count", None)  # private: without it nothing is known to be safe
_probe = torch.empty(1)
_UNSHARED = _use_count(_probe.untyped_storage()._cdata) if _use_count else 0


def fits(w: Tensor) -> bool:
    """Whether this kind of parameter may borrow storage: plain, dense, on the CPU, in the precision of the sums."""
    return (
        _use_count is not None
        and type(w) in (torch.nn.Parameter, Tensor)
        and w.dtype in (torch.float32, torch.float64)
        and w.device.type == "cpu"
        and w.layout == torch.strided
        and w.numel() > 0
        and (w.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(w))
    )


def is_unshared(w: Tensor) -> bool:
    """Whether nobody else looks into the storage of w.

    A view of a flat buffer, a second parameter on the same storage, a numpy array or a state_dict that is being kept
    would go on seeing the clean weights; those are moved in place.
    """
    assert _use_count is not None  # else nothing `fits`
    return _use_count(w.untyped_storage()._cdata) <= _UNSHARED


class Workspace:
    """Persistent storage for parameters of one dtype that fit: `out[i]` is what parameter i borrows.

    The small ones have their places side by side, so that one operation moves them all.
    """

    def __init__(self, params: list[Tensor]):
        dtype = params[0].dtype
        self.is_small = [w.numel() <= SMALL for w in params]
        self.num_small = sum(self.is_small)
        sizes = [w.numel() if small else 0 for w, small in zip(params, self.is_small, strict=True)]
        self.flat_w, self.flat_g, self.flat_t, self.flat_out = (torch.zeros(sum(sizes), dtype=dtype) for _ in range(4))
        self.w: list[Tensor] = []
        self.g: list[Tensor] = []
        self.out: list[Tensor] = []
        start = 0
        for w, size in zip(params, sizes, strict=True):
            place = (w.shape, w.stride(), start) if size else ((0,), (1,), 0)
            self.w.append(torch.as_strided(self.flat_w, *place))
            self.g.append(torch.as_strided(self.flat_g, *place))
            self.out.append(torch.as_strided(self.flat_out, *place) if size else torch.empty_like(w.detach()))
            start += size
        self.norms = torch.zeros(1 + sum(-(-w.numel() // CHUNK) for w in params), dtype=dtype)
        self.norm = self.norms.unbind()
        self.total = torch.zeros((), dtype=torch.float64)
        self.temporary = torch.empty(CHUNK, dtype=dtype)


def dual_power(b: Bucket) -> float:
    """Norms of rows first, then theirs in float64: one long float32 sum is off by 1e-3 at 25 M entries."""
    ws, order, at, norm = b.workspace, 2 if b.p == 2 else 1, 0, torch.linalg.vector_norm
    small = _gather(b)
    if small:
        x = ws.flat_g if b.eta is None else _scaled(b.eta, ws.flat_w, ws.flat_g, ws.flat_t)
        norm(x, order, out=ws.norm[0])
        at = 1
    for i in range(small, len(b.w)):
        g = b.g[i]
        if b.t is not None:
            norm(_partial_norms(g, b.t[i], order), order, out=ws.norm[at])
        elif b.eta is not None:
            for clean, part in zip(_flat(b.w[i].data).split(CHUNK), _flat(g).split(CHUNK), strict=True):
                norm(_scaled(b.eta, clean, part, ws.temporary), order, out=ws.norm[at])
                at += 1
            continue
        elif g.numel() <= CHUNK:
            norm(g, order, out=ws.norm[at])
        else:
            flat, rows = _flat(g), g.numel() // CHUNK
            norm(flat[: rows * CHUNK].view(rows, CHUNK), order, 1, out=ws.norms[at : at + rows])
            norm(flat[rows * CHUNK :], order, out=ws.norm[at + rows])
            at += rows
        at += 1
    return norm(ws.norms[:at], order, dtype=torch.float64, out=ws.total).item() ** order


def ascend_(b: Bucket, factor: float) -> None:
    ws, plain = b.workspace, b.p == 2 and b.eta is None and b.t is None
    small = _count_small(b)
    if small:  # gathered by `dual_power`
        if b.eta is None:
            torch._foreach_copy_([ws.w[i] for i in b.index[:small]], [w.data for w in b.w[:small]])
        _move(b, None, ws.flat_w, ws.flat_g, ws.flat_out, ws.flat_t, factor)
    for k, (i, w, g) in enumerate(zip(b.index, b.w, b.g, strict=True)):
        clean, out = w.data, ws.out[i]
        if k < small:
            pass
        elif plain:
            torch.add(clean, g, alpha=factor, out=out)
        elif b.t is not None:
            _move(b, b.t[k], clean, g, out, None, factor)
        else:
            parts = (_flat(x).split(CHUNK) for x in (clean, g, out))
            for part, gradient, target in zip(*parts, strict=True):
                _move(b, None, part, gradient, target, ws.temporary, factor)
        b.saved.append(clean)  # before the weights move: what is recorded can be brought back
        w.data = out
    torch.autograd.graph.increment_version(b.w)  # a backward through the graph of pass 1 must fail, as in place


def restore_(b: Bucket) -> None:
    for w, clean in zip(b.w, b.saved, strict=False):
        w.data = clean
    torch.autograd.graph.increment_version(b.w)


def small_first(
    body: ModuleType, ws: Workspace, members: list[int], places: list[int]
) -> tuple[ModuleType, Workspace, list[int], list[int]]:
    """The order in which the other functions want the parameters of a bucket."""
    order = sorted(range(len(places)), key=lambda k: not ws.is_small[places[k]])
    return body, ws, [members[k] for k in order], [places[k] for k in order]


def _gather(b: Bucket) -> int:
    """Brings the gradients of the small parameters side by side; returns how many there are."""
    ws = b.workspace
    small = _count_small(b)
    if small:
        if small < ws.num_small:
            ws.flat_g.zero_()  # some have no gradient in this step
        torch._foreach_copy_([ws.g[i] for i in b.index[:small]], b.g[:small])
        if b.eta is not None:
            torch._foreach_copy_([ws.w[i] for i in b.index[:small]], [w.data for w in b.w[:small]])
    return small


def _count_small(b: Bucket) -> int:
    return 0 if b.t is not None else sum([b.workspace.is_small[i] for i in b.index])


def _move(b: Bucket, t: Tensor | None, w: Tensor, g: Tensor, out: Tensor, spare: Tensor | None, factor: float) -> None:
    """out <- w + factor T^2 g  or  w + factor T sign(g).  T is |w| + eta, with `spare` for temporaries, or t, or 1."""
    if b.p == math.inf:
        torch.sgn(g, out=out)
        g = out
    if b.eta is None and t is None:
        torch.add(w, g, alpha=factor, out=out)
    elif b.p == math.inf:
        torch.addcmul(w, _elementwise(b.eta, w, spare) if t is None else t, g, value=factor, out=out)
    elif b.eta == 0:
        torch.addcmul(w, w, torch.mul(w, g, out=_part(spare, w)), value=factor, out=out)
    elif t is None:
        t = _elementwise(b.eta, w, spare)
        torch.addcmul(w, t.mul_(t), g, value=factor, out=out)
    else:
        torch.addcmul(w, t * t, g, value=factor, out=out)


def _scaled(eta: float, w: Tensor, g: Tensor, spare: Tensor) -> Tensor:
    """T g up to signs, which no norm sees."""
    if eta == 0:
        return torch.mul(w, g, out=_part(spare, w))
    return _elementwise(eta, w, spare).mul_(g)


def _partial_norms(g: Tensor, t: Tensor, order: int) -> Tensor:
    """T g, with the entries that share a T already reduced to their norm: ||T g|| is the norm of these."""
    shared = [d for d in range(g.ndim) if t.ndim == 0 or t.shape[d] == 1]
    if not shared:
        return t * g
    dtype = torch.float64 if t.ndim == 0 else g.dtype
    return (t * torch.linalg.vector_norm(g, order, dim=shared, keepdim=t.ndim > 0, dtype=dtype)).to(g.dtype)


def _elementwise(eta: Any, w: Tensor, spare: Tensor | None) -> Tensor:
    """|w| + eta for a flat w, in a temporary that is at least as long."""
    return torch.abs(w, out=_part(spare, w)).add_(eta)


def _part(spare: Tensor | None, w: Tensor) -> Tensor:
    assert spare is not None
    return spare if spare.shape == w.shape else spare[: w.numel()]


def _flat(x: Tensor) -> Tensor:
    """All entries in the order of memory; x is dense."""
    return x.view(-1) if x.is_contiguous() else torch.as_strided(x, (x.numel(),), (1,), x.storage_offset())
