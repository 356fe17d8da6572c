"""The CPU's fast way: one out-of-place add into persistent storage, which the parameter borrows for pass 2.

As `reference`, with a third of the bytes: nothing is copied to save w or to bring it back, and w ends in its own
storage. Large tensors are walked in chunks that stay in the cache; small ones are gathered and moved as one.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from sam_optim.optim.kernels import loop as reference

if TYPE_CHECKING:
    from sam_optim.optim.kernels import Bucket

ROW = 65536  # entries of one float32 norm: a longer sum loses digits, 1e-3 of them at 25 M
CHUNK = 8 * ROW  # entries of what needs several operations: short enough for a cache, long against the cost of a call
SMALL = 4096  # entries: below, calling an operation costs more than its work

_use_count = getattr(torch._C, "_storage_Use_Count", None)  # private: without it every storage counts as shared


def fits(w: Tensor) -> bool:
    """Whether this kind of parameter may borrow storage: plain, dense, on the CPU, in the precision of the sums."""
    return (
        type(w) in (torch.nn.Parameter, Tensor)
        and w.dtype in (torch.float32, torch.float64)
        and w.device.type == "cpu"
        and w.layout == torch.strided
        and w.numel() > 0
        and (w.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(w))
    )


class Workspace:
    """Persistent storage for parameters of one dtype that fit: `out[i]` is what parameter i borrows.

    The small ones have their places side by side, so that one operation moves them all.
    """

    def __init__(self, params: list[Tensor]):
        dtype = params[0].dtype
        self.is_small = [w.numel() <= SMALL for w in params]
        self.num_small = sum(self.is_small)
        sizes = [w.numel() if small else 0 for w, small in zip(params, self.is_small, strict=True)]
        self.flat_w, self.flat_g, self.flat_out = (torch.zeros(sum(sizes), dtype=dtype) for _ in range(3))
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
        rows = 2 + sum(sizes) // ROW + sum(1 + w.numel() // ROW for w in params)
        self.norms = torch.zeros(rows, dtype=dtype)
        self.norm = self.norms.unbind()
        self.total = torch.zeros((), dtype=torch.float64)
        longest = max(w.numel() for w in params)
        self.temporary = torch.empty(max(min(CHUNK, longest), sum(sizes)), dtype=dtype)
        self.flat_spare = self.temporary[: sum(sizes)]
        self.out_flat = [_flat(x) for x in self.out]
        self.spare = [
            torch.as_strided(self.temporary, w.shape, w.stride()) if w.numel() <= CHUNK else None for w in params
        ]
        self._copies: dict[int, Tensor] = {}

    def copy_of(self, i: int, w: Tensor) -> Tensor:
        """The bits of a parameter that has to be moved in place."""
        if i not in self._copies:
            self._copies[i] = torch.empty_like(self.out[i])
        return self._copies[i].copy_(w)


class Selection:
    """The part of a workspace that the parameters with a gradient use, small ones first: `out[k]` is for the k-th."""

    def __init__(self, workspace: Workspace, places: list[int], params: list[Tensor]):
        self.workspace = workspace
        self.small = sum(workspace.is_small[i] for i in places)
        self.small_w = [workspace.w[i] for i in places[: self.small]]
        self.small_g = [workspace.g[i] for i in places[: self.small]]
        self.out = [workspace.out[i] for i in places]
        self.out_flat = [workspace.out_flat[i] for i in places]
        self.spare = [workspace.spare[i] for i in places]
        self._storages = [w.untyped_storage() for w in params]  # one reference to each; the parameter has another
        self._addresses = [storage._cdata for storage in self._storages]

    def shared(self) -> list[bool]:
        """Of each parameter, whether somebody else looks into its storage, who would miss that it has borrowed another.

        A view of a flat buffer, a second parameter on the same storage, a numpy array, a state_dict that is being kept.
        """
        if _use_count is None:
            return [True] * len(self._addresses)
        return [_use_count(address) > 2 for address in self._addresses]


def dual_power(b: Bucket) -> float:
    """Also leaves T g, up to signs that cancel in `ascend_`, in the storage to be borrowed, where T = |w| + eta."""
    of: Selection = b.workspace
    ws, order, at, norm = of.workspace, 2 if b.p == 2 else 1, 0, torch.linalg.vector_norm
    small = of.small if b.t is None else 0
    if small:
        if small < ws.num_small:
            ws.flat_g.zero_()  # some have no gradient in this step
        torch._foreach_copy_(of.small_g, b.g[:small])
        if b.eta is not None:
            torch._foreach_copy_(of.small_w, [w.data for w in b.w[:small]])
        x = ws.flat_g if b.eta is None else _scaled(b.eta, ws.flat_w, ws.flat_g, ws.flat_out)
        at = _row_norms(x, order, ws, at)
    for k in range(small, len(b.w)):
        g = b.g[k]
        if b.t is not None:
            norm(_partial_norms(g, b.t[k], order), order, out=ws.norm[at])
            at += 1
        elif b.eta is None:
            if g.numel() <= ROW:
                norm(g, order, out=ws.norm[at])
                at += 1
            else:
                at = _row_norms(_flat(g), order, ws, at)
        elif of.spare[k] is not None:
            _scaled(b.eta, b.w[k].data, g, of.out[k])
            at = _row_norms(of.out_flat[k], order, ws, at)
        else:
            for w, gradient, out in _chunks(b.w[k].data, g, of.out[k]):
                at = _row_norms(_scaled(b.eta, w, gradient, out), order, ws, at)
    power = float(norm(ws.norms[:at], order, dtype=torch.float64, out=ws.total).numpy()) ** order
    # squares below 1e-45 or above 1e38 have left float32; or the gradient is 0 or not finite, and stays so
    return power if 0 < power < math.inf else float(reference.dual_power(b))


def ascend_(b: Bucket, factor: float) -> None:
    of: Selection = b.workspace
    clean = [w.data for w in b.w]
    _compute(b, clean, factor)
    if not any(b.shared):
        b.saved = clean  # before the first move: what is recorded can be brought back
        for w, out in zip(b.w, of.out, strict=True):
            w.data = out
    else:
        copies = zip(b.index, clean, b.shared, strict=True)  # all before the first move: two may share storage
        b.saved = [of.workspace.copy_of(i, w) if shared else w for i, w, shared in copies]
        _move_shared(b, of.out)
    torch.autograd.graph.increment_version(b.w)  # a backward through the graph of pass 1 must fail, as in place


def _move_shared(b: Bucket, perturbed: list[Tensor]) -> None:
    moved: set[int] = set()
    for w, bits, out, shared in zip(b.w, b.saved, perturbed, b.shared, strict=True):
        if not shared:
            w.data = out
        elif (storage := w.untyped_storage().data_ptr()) in moved:
            w.add_(out - bits)  # two parameters on one storage: both moves count
        else:
            w.copy_(out)
            moved.add(storage)


def restore_(b: Bucket) -> None:
    for w, clean, shared in zip(b.w, b.saved, b.shared, strict=False):
        if shared:
            w.copy_(clean)
        else:
            w.data = clean
    torch.autograd.graph.increment_version(b.w)


def _compute(b: Bucket, weights: list[Tensor], factor: float) -> None:
    """The perturbed weights, in the storage to be borrowed."""
    of: Selection = b.workspace
    ws, small = of.workspace, of.small if b.t is None else 0
    if small:  # gathered by `dual_power`
        if b.eta is None:
            torch._foreach_copy_(of.small_w, weights[:small])
        _move(b, None, ws.flat_w, ws.flat_g, ws.flat_out, ws.flat_spare, factor)
    if b.p == 2 and b.eta is None and b.t is None:
        for w, g, out in zip(weights[small:], b.g[small:], of.out[small:], strict=True):
            torch.add(w, g, alpha=factor, out=out)
        return
    for k in range(small, len(b.w)):
        if b.eta is None or of.spare[k] is not None:
            _move(b, None if b.t is None else b.t[k], weights[k], b.g[k], of.out[k], of.spare[k], factor)
        else:
            for part, gradient, out in _chunks(weights[k], b.g[k], of.out[k]):
                _move(b, None, part, gradient, out, ws.temporary[: len(part)], factor)


def _move(b: Bucket, t: Tensor | None, w: Tensor, g: Tensor, out: Tensor, spare: Tensor | None, factor: float) -> None:
    """out <- w + factor T^2 g  or  w + factor T sign(g);  T is |w| + eta, and then T g in `out` already, or t, or 1."""
    if b.eta is not None:
        direction = out if b.p == 2 else torch.sgn(out, out=out)
        t = w if b.eta == 0 else torch.abs(w, out=spare).add_(b.eta)
        torch.addcmul(w, t, direction, value=factor, out=out)
    elif b.p == 2:
        torch.add(w, g, alpha=factor, out=out) if t is None else torch.addcmul(w, t * t, g, value=factor, out=out)
    else:
        torch.sgn(g, out=out)
        torch.add(w, out, alpha=factor, out=out) if t is None else torch.addcmul(w, t, out, value=factor, out=out)


def _scaled(eta: float, w: Tensor, g: Tensor, out: Tensor) -> Tensor:
    """T g in `out`; without eta w g, whose sign meets that of w again in `_move`."""
    return torch.mul(w, g, out=out) if eta == 0 else torch.abs(w, out=out).add_(eta).mul_(g)


def _row_norms(x: Tensor, order: int, ws: Workspace, at: int) -> int:
    """Norms of the rows of a flat x, or of one that is shorter, into ws.norms[at:]; returns the end of them."""
    norm, n = torch.linalg.vector_norm, x.numel()
    if n <= ROW:
        norm(x, order, out=ws.norm[at])
        return at + 1
    rows = n // ROW
    norm(x[: rows * ROW].view(rows, ROW), order, 1, out=ws.norms[at : at + rows])
    if rows * ROW < n:
        norm(x[rows * ROW :], order, out=ws.norm[at + rows])
        rows += 1
    return at + rows


def _partial_norms(g: Tensor, t: Tensor, order: int) -> Tensor:
    """T g, with the entries that share a T already reduced to their norm: ||T g|| is the norm of these."""
    shared = [d for d in range(g.ndim) if t.ndim == 0 or t.shape[d] == 1]
    if not shared:
        return t * g
    dtype = torch.float64 if t.ndim == 0 else g.dtype
    return (t * torch.linalg.vector_norm(g, order, dim=shared, keepdim=t.ndim > 0, dtype=dtype)).to(g.dtype)


def _chunks(*tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Tensors of one dense layout, chunk by chunk in the order of memory."""
    return zip(*(_flat(x).split(CHUNK) for x in tensors), strict=True)


def _flat(x: Tensor) -> Tensor:
    """All entries in the order of memory; x is dense."""
    return x.view(-1) if x.is_contiguous() else torch.as_strided(x, (x.numel(),), (1,), x.storage_offset())
