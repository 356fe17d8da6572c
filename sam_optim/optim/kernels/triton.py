"""Whole models in three launches: partial norms, their sum, the move. For CUDA devices with Triton.

As `reference`, with 20 bytes for each float32 entry (24 where T = |w| + eta): g twice, w, and both of its copies out.
No host sync, no allocation and no upload in the steady state, the same bits for the same gradients, and the whole of it
can be captured in a CUDA graph. Any dense layout that weights and gradients share will do, on any address.
"""

from __future__ import annotations

import operator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2
from triton.runtime import JITFunction

from sam_optim.optim.kernels import tables, triton_ascent
from sam_optim.optim.kernels.tables import ALIGNMENT, BLOCK, ROW, SPAN, Uploaded

if TYPE_CHECKING:
    from sam_optim.optim.kernels import Bucket, Scalar

TYPES = {
    torch.float32: tl.float32,
    torch.float64: tl.float64,
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
}
IS_INTERPRETED = not isinstance(triton_ascent.perturb, JITFunction)  # TRITON_INTERPRET=1: on the CPU, for tests


def runs_on(device: torch.device) -> bool:
    return device.type == "cuda" or (IS_INTERPRETED and device.type == "cpu")


def fits(w: Tensor, g: Tensor) -> bool:
    """Whether these kernels can move w by g: plain, dense, of one layout, of types that they know."""
    return (
        tables.is_plain(w)
        and tables.is_plain(g)
        and runs_on(w.device)
        and w.device == g.device
        and w.dtype in TYPES
        and g.dtype in TYPES
        and w.layout == g.layout == torch.strided
        and tables.same_layout(w, g)
        and (w.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(w))
    )


def is_possible(buckets: list[Bucket]) -> bool:
    """Whether no two of the weights overlap: programs run in any order, and one would save what another has moved."""
    return _ascent(buckets).is_possible


def dual_power(b: Bucket) -> Scalar:
    ascent = _ascent([b])
    ascent.measure([b])
    return ascent.powers[0]


def ascend_(b: Bucket, factor: Scalar) -> None:
    ascent = _ascent([b])
    ascent.factors[0].fill_(factor)
    ascent.move([b])


def ascend_together_(buckets: list[Bucket]) -> tuple[Tensor, Tensor, Tensor, list[Tensor], Tensor]:
    """All at once: norm, length, whether it moved, factors, how often it has not, in storage that is used again."""
    ascent = _ascent(buckets)
    ascent.measure(buckets)
    ascent.move(buckets)
    return ascent.norm, ascent.length, ascent.moved, ascent.factors, ascent.stays


def restore_(b: Bucket) -> None:
    if b.saved:
        torch._foreach_copy_(b.w, b.saved)


def _ascent(buckets: list[Bucket]) -> _Ascent:
    """Made anew when what moves has changed."""
    first = buckets[0]
    key = "triton", len(buckets), first.device, first.dtype
    known = first.scratch.get(key)
    if known is not None and known.is_for(buckets):
        return known
    first.scratch[key] = made = _Ascent(buckets)
    if known is not None:
        made.held = [*known.held, *[known] * known.is_captured]
        made.count_on(known)
    return made


@dataclass(slots=True)
class _Part:
    """What one launch has: tensors of the same types, alignment, T and p."""

    constants: dict[str, Any]
    members: list[int]
    start: int = 0
    fixed: Any = None
    layout: Any = None
    numbers: Any = None
    bucket: Any = None
    norm_chunks: Any = None
    chunks: Any = None
    realized: Any = None
    measured_by: int = 0


class _Ascent:
    """The tables of a list of buckets that does not change, but for the addresses of its gradients."""

    def __init__(self, buckets: list[Bucket]):
        self._choices = [b.choice for b in buckets]
        self._kinds = [_kind(b) for b in buckets]
        self._device = device = buckets[0].device
        self.is_captured = False
        self.held: list[Any] = []  # what a captured graph reads, and nobody else any more
        self._w = [w for b in buckets for w in b.w]
        self._saved = [b.workspace[i] for b in buckets for i in b.index]
        self._owner = [k for k, b in enumerate(buckets) for _ in b.w]
        self.is_possible = tables.are_apart(self._w)
        self._grads = Uploaded(torch.int64, device)
        self._rhos = Uploaded(torch.float64, device)
        self._order: list[int | None] = []
        self._found: list[int] = []
        self._table: list[int] = []
        self._aligned: list[bool] | None = None
        self._measured: Tensor | None = None  # addresses that `move` will find as they are
        self._parts: list[_Part] = []
        self._t: dict[int, Tensor] = {}
        scales: list[Tensor | None] = [t for b in buckets for t in (b.t or [None] * len(b.w))]  # type: ignore[list-item]
        grads = [g for b in buckets for g in b.g]
        for i, (t, w, g) in enumerate(zip(scales, self._w, grads, strict=True)):
            if t is not None:
                wide = _wide_type(w.dtype, g.dtype)
                self._t[i] = torch.empty_like(t, dtype=wide, memory_format=torch.contiguous_format)
        n = len(buckets)
        self._kind_of_bucket = self._constant([int(b.p != 2) for b in buckets], torch.int32)
        self._out = torch.zeros(2 + 2 * n, dtype=torch.float64, device=device)
        self.norm, self.length = self._out[0], self._out[1]
        self._factors = self._out[2 : 2 + n]
        self.factors, self.powers = list(self._factors.unbind()), list(self._out[2 + n :].unbind())
        self._moved = torch.zeros(1, dtype=torch.int8, device=device)
        self.moved = self._moved.view(torch.bool)[0]
        self._stays = torch.zeros(1, dtype=torch.int64, device=device)
        self.stays = self._stays[0]

    def count_on(self, before: _Ascent) -> None:
        self._stays, self.stays = before._stays, before.stays

    def is_for(self, buckets: list[Bucket]) -> bool:
        """The choice of a body is made anew when weights are elsewhere, or gradients of another kind."""
        return all(map(operator.is_, self._choices, [b.choice for b in buckets])) and self._kinds == [
            _kind(b) for b in buckets
        ]

    def measure(self, buckets: list[Bucket]) -> None:
        """Norms, and from them the factors."""
        self.is_captured |= tables.is_capturing(self._device)
        self._measured = grads = self._addresses(buckets)
        if self._t:
            torch._foreach_copy_(list(self._t.values()), [t for b in buckets for t in b.t or ()])
        with tables.on(self._device):
            for part in self._parts:
                tables.launch(
                    triton_ascent.norm_partials,
                    part.norm_chunks.shape[1],
                    grads[part.start :],
                    part.fixed,
                    part.layout,
                    part.numbers,
                    part.norm_chunks,
                    self._partials,
                    len(part.members),
                    SPAN=SPAN,
                    BLOCK=BLOCK,
                    **part.constants,
                )
            tables.launch(
                triton_ascent.finalise,
                1,
                self._partials,
                self._bucket_of_row,
                self._kind_of_bucket,
                self._radii(buckets),
                self._out,
                self._moved,
                self._stays,
                len(buckets),
                NUM=max(2, next_power_of_2(len(buckets))),
                ROWS=len(self._bucket_of_row),
                ROW=ROW,
            )

    def move(self, buckets: list[Bucket]) -> None:
        """After `measure` with the same gradients: a graph would take a second table, and memory for it."""
        grads, self._measured = self._measured, None
        grads = self._addresses(buckets) if grads is None else grads
        first = 0
        for b in buckets:
            b.saved = self._saved[first : first + len(b.w)]
            first += len(b.w)
            b.realized = None
        with tables.on(self._device):
            for part in self._parts:
                tables.launch(
                    triton_ascent.perturb,
                    part.chunks.shape[1],
                    grads[part.start :],
                    part.fixed,
                    part.layout,
                    part.numbers,
                    part.bucket,
                    self._factors,
                    part.chunks,
                    part.realized,
                    len(part.members),
                    MEASURE=part.realized is not self._out,
                    BLOCK=BLOCK,
                    **part.constants,
                )
        for part in self._parts:
            if part.realized is not self._out:
                b = buckets[part.measured_by]
                b.realized = part.realized if b.realized is None else torch.cat([b.realized, part.realized], 1)
        torch.autograd.graph.increment_version(self._w)  # a backward through the graph of pass 1 must fail, as in place

    def _radii(self, buckets: list[Bucket]) -> Tensor:
        if len(buckets) == 1 and isinstance(rho := buckets[0].rho, Tensor) and rho.device == self._device:
            return rho
        there = self._rhos.of([tables.IN_TENSOR if isinstance(b.rho, Tensor) else float(b.rho) for b in buckets])
        for k, b in enumerate(buckets):
            if isinstance(b.rho, Tensor):
                there[k].copy_(b.rho, non_blocking=True)
        return there

    def _addresses(self, buckets: list[Bucket]) -> Tensor:
        """Of the gradients, in the order of the parts, which are made here: alignment is theirs, too."""
        found = tables.addresses(buckets[0].g if len(buckets) == 1 else [g for b in buckets for g in b.g])
        if found != self._found:
            self._found = found
            aligned = [x % ALIGNMENT == 0 for x in found]
            if aligned != self._aligned:
                self._aligned = aligned
                self._make_parts(buckets, aligned)
            self._table = [0 if i is None else found[i] for i in self._order]
        return self._grads.of(self._table)

    def _make_parts(self, buckets: list[Bucket], aligned: list[bool]) -> None:
        grads = [g for b in buckets for g in b.g]
        by_kind: dict[Any, list[int]] = {}
        for i, (w, g, kept, k) in enumerate(zip(self._w, grads, self._saved, self._owner, strict=True)):
            b = buckets[k]
            is_aligned = aligned[i] and all(tables.address(x) % ALIGNMENT == 0 for x in (w, kept))
            by_kind.setdefault((w.dtype, g.dtype, b.t is not None, b.p, is_aligned), []).append(i)
        self._order = []
        if self.is_captured:
            self.held += [*self._parts, self._partials, self._bucket_of_row]
        self._parts = []
        for (w_type, g_type, in_slices, p, is_aligned), members in by_kind.items():
            adaptive = any(buckets[self._owner[i]].eta is not None for i in members)
            mode = triton_ascent.SLICES if in_slices else triton_ascent.ELEMENTS if adaptive else triton_ascent.ONES
            constants = {"G": TYPES[g_type], "W": TYPES[w_type], "WIDE": TYPES[_wide_type(w_type, g_type)]}
            constants |= {"MODE": mode.value, "SQUARES": p == 2, "ALIGNED": is_aligned}
            part = _Part(constants, members, start=len(self._order))
            self._fill(part, buckets, is_low=w_type in (torch.bfloat16, torch.float16))
            self._parts.append(part)
            self._order += members + [None] * (len(members) % 2)  # tables begin at 16 bytes, or compile once more
        self._place_partials(len(buckets))

    def _fill(self, part: _Part, buckets: list[Bucket], *, is_low: bool) -> None:
        members, of = part.members, [buckets[self._owner[i]] for i in part.members]
        sizes = [self._w[i].numel() for i in members]
        slices = [(0, 1, 1)] * len(members)
        if part.constants["MODE"] == triton_ascent.SLICES.value:
            slices = [_slices(self._w[i], self._t[i]) for i in members]
        addresses = [[tables.address(x[i]) for i in members] for x in (self._w, self._saved)]
        part.fixed = self._constant([*addresses, [s[0] for s in slices]], torch.int64)
        part.layout = self._constant([sizes, [s[1] for s in slices], [s[2] for s in slices]], torch.int64)
        a_and_eta = [(0.0, 1.0) if b.eta is None else (1.0, b.eta) for b in of]
        part.numbers = self._constant([[x[k] for x in a_and_eta] for k in (0, 1)], torch.float64)
        part.bucket = self._constant([self._owner[i] for i in members], torch.int32)
        part.chunks = self._constant(tables.chunks(sizes, BLOCK)[0], torch.int32)
        part.measured_by = self._owner[members[0]]
        part.realized = self._out
        if is_low:
            part.realized = torch.zeros(part.chunks.shape, dtype=torch.float64, device=self._device)

    def _place_partials(self, num_buckets: int) -> None:
        import numpy

        made = [tables.chunks([self._w[i].numel() for i in part.members], SPAN * BLOCK) for part in self._parts]
        counts = [count for _, counts in made for count in counts]
        starts, rows = tables.places(
            counts, [self._owner[i] for part in self._parts for i in part.members], num_buckets
        )
        first = numpy.asarray(starts, dtype=numpy.int64)
        for part, (chunks, counts) in zip(self._parts, made, strict=True):
            own, first = first[: len(part.members)], first[len(part.members) :]
            place = numpy.repeat(own, counts) + chunks[1]
            part.norm_chunks = self._constant(numpy.concatenate([chunks, place[None]]), torch.int32)
        self._partials = torch.zeros(max(1, sum(rows)) * ROW, dtype=torch.float64, device=self._device)
        bucket_of_row = [k for k, count in enumerate(rows) for _ in range(count)]
        self._bucket_of_row = self._constant(bucket_of_row or [0], torch.int32)

    def _constant(self, values: Any, dtype: torch.dtype) -> Tensor:
        return tables.constant(values, dtype, self._device, self.held)


def _slices(w: Tensor, t: Tensor) -> tuple[int, int, int]:
    """Address of T, and the stride in w and the number of what has one T: all of w, or its first dimension."""
    if t.numel() <= 1:
        return tables.address(t), max(1, w.numel()), 1
    return tables.address(t), max(1, w.stride(0)), w.shape[0]


def _kind(b: Bucket) -> tuple[Any, ...]:
    return b.p, b.eta, b.t is None, len(b.w)


def _wide_type(*types: torch.dtype) -> torch.dtype:
    return torch.float64 if torch.float64 in types else torch.float32
