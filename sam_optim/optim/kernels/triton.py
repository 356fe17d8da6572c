"""The ascent of whole models in three launches: sums of parts, their norms, the move. For CUDA devices, with Triton.

As `loop`, with 20 bytes of traffic for each float32 entry, or 24 where T = |w| + eta: g is read twice, w once (twice),
and its copy and w + e are written. Each program works on one chunk of one tensor, whose address it reads from a table:
the number of launches does not grow with the number of tensors. Whole blocks at addresses that are multiples of 16 are
read and written 16 bytes at a time, everything else entry by entry under a mask.

Arithmetic is in float32; in float64 where weights or gradients are, or where float32 would overflow or lose digits.
There are no atomics, and every sum has a fixed order: the same gradients give the same bits. In the steady state the
host waits for nothing, allocates nothing and uploads nothing, and a CUDA graph can capture all of it.
"""

from __future__ import annotations

import operator
import sys
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import numpy
import torch
import triton
import triton.language as tl
from torch import Tensor
from triton import next_power_of_2
from triton.runtime import JITFunction

from sam_optim.optim.kernels.bucket import (
    LOW_PRECISION,
    Ascent,
    Backups,
    Bucket,
    Moved,
    Norms,
    Storage,
    addresses,
    are_apart,
    wide_dtype,
)

BLOCK = tl.constexpr(2048)  # entries that a program has in registers: 8 for each of 256 threads
SPAN = tl.constexpr(4)  # blocks of a chunk
CHUNK = tl.constexpr(4 * 2048)
WARPS = 8
TYPES = {torch.float32: tl.float32, torch.float64: tl.float64, torch.bfloat16: tl.bfloat16, torch.float16: tl.float16}

# The table of tensors has a record of int64 for each: three addresses, number of entries, number of the first chunk,
# bucket; for a T that is one number for each slice its address, and the stride in w and the number of slices.
RECORD = tl.constexpr(9)
G_, W_, COPY_, LENGTH, FIRST, BUCKET, T_, STRIDE, SLICES = (tl.constexpr(k) for k in range(9))
# That of buckets: its first chunk and the one after its last; bits of float64: whether p is inf, rho, a and eta of T.
BOUNDS = tl.constexpr(6)
BEGIN, END, IS_INF, RHO, A, ETA = (tl.constexpr(k) for k in range(6))

ONES = tl.constexpr(0)  # T = 1
ELEMENTS = tl.constexpr(1)  # T = a |w| + eta; a = 0, eta = 1 for buckets with T = 1 in a model with adaptive ones
BY_SLICE = tl.constexpr(2)  # T is one number for each row of w, or for all of it


@triton.jit
def load(address, at, n, TYPE, FULL):
    pointer = address.to(tl.pointer_type(TYPE))
    if FULL:  # multiple_of promises alignment to the compiler, which would read entry by entry without
        return tl.load(tl.multiple_of(pointer, 16) + at)
    else:
        return tl.load(pointer + at, mask=at < n, other=0.0)


@triton.jit
def store(address, at, n, value, TYPE, FULL):
    pointer = address.to(tl.pointer_type(TYPE))
    if FULL:
        tl.store(tl.multiple_of(pointer, 16) + at, value)
    else:
        tl.store(pointer + at, value, mask=at < n)


@triton.jit
def scale(tensor, buckets, w, start, W, WIDE, MODE, SIZE):
    """T at one block; w: the weights there."""
    if MODE == ELEMENTS:
        bucket = buckets + tl.load(tensor + BUCKET) * BOUNDS
        a = tl.load(bucket + A).to(tl.float64, bitcast=True).to(WIDE)
        return tl.abs(w) * a + tl.load(bucket + ETA).to(tl.float64, bitcast=True).to(WIDE)
    else:
        stride, slices = tl.load(tensor + STRIDE), tl.load(tensor + SLICES)
        inside = (start % stride).to(tl.int32) + tl.arange(0, SIZE)  # divided in 32 bits: 64 take many registers
        row = ((start // stride) % slices).to(tl.int32) + inside // stride.to(tl.int32)
        t = tl.load(tensor + T_).to(tl.pointer_type(tl.float64 if tl.float64 == W else tl.float32))
        return tl.load(t + row % slices.to(tl.int32)).to(WIDE)


@triton.jit
def chunk_sums(tensor, buckets, start, n, G, W, WIDE, MODE, P2, FULL, COUNT, SIZE):
    """Over a chunk: |T g|^q, g^2, and (T^2 g)^2 or (T sign g)^2. Where T = 1 and p = 2 the three are one."""
    dual = tl.zeros([SIZE], dtype=WIDE)
    grad, step = dual, dual
    for k in tl.range(0, COUNT, loop_unroll_factor=COUNT if FULL else 1):  # unrolled, all loads are under way at once
        at = start + k * SIZE + tl.arange(0, SIZE)
        g = load(tl.load(tensor + G_), at, n, G, FULL).to(WIDE)
        if MODE == ONES and P2:
            dual += g * g
        else:
            t = tl.full([SIZE], 1.0, WIDE)
            if MODE == ELEMENTS:
                t = load(tl.load(tensor + W_), at, n, W, FULL).to(WIDE)
            if MODE != ONES:
                t = scale(tensor, buckets, t, start + k * SIZE, W, WIDE, MODE, SIZE)
            x = t * g
            y = t * x if P2 else tl.where(g == 0, 0.0, t)
            dual += x * x if P2 else tl.abs(x)
            grad += g * g
            step += y * y
    total = tl.sum(dual, axis=0).to(tl.float64)
    if MODE == ONES and P2:
        return total, total, total
    else:
        return total, tl.sum(grad, axis=0).to(tl.float64), tl.sum(step, axis=0).to(tl.float64)


@triton.jit(do_not_specialize=["first"])
def norm_partials(
    tensors, buckets, owners, partials, first, G: tl.constexpr, W: tl.constexpr, WIDE: tl.constexpr,
    MODE: tl.constexpr, P2: tl.constexpr, SUMS: tl.constexpr,
):  # fmt: skip
    """partials[chunk] <- the sums of `chunk_sums`: all three, or the first one alone.

    tensors, buckets: tables of records. owners: the tensor of each chunk. first: the chunk of the first program.
    """
    chunk = first + tl.program_id(0)
    tensor = tensors + tl.load(owners + chunk) * RECORD
    start = (chunk - tl.load(tensor + FIRST)) * CHUNK
    n = tl.load(tensor + LENGTH)
    addresses = tl.load(tensor + G_)
    if MODE == ELEMENTS:
        addresses |= tl.load(tensor + W_)
    if (start + CHUNK <= n) & (addresses % 16 == 0):
        dual, grad, step = chunk_sums(tensor, buckets, start, n, G, W, WIDE, MODE, P2, True, SPAN, BLOCK)
    else:
        dual, grad, step = chunk_sums(tensor, buckets, start, n, G, W, WIDE, MODE, P2, False, SPAN * 2, BLOCK // 2)
    if tl.float64 != WIDE:
        smallest, largest = tl.minimum(dual, tl.minimum(grad, step)), tl.maximum(dual, tl.maximum(grad, step))
        if not ((smallest > 1e-30) & (largest < 1e30)):  # squares have left float32; or 0, inf and NaN, which stay so
            dual, grad, step = chunk_sums(
                tensor, buckets, start, n, G, W, tl.float64, MODE, P2, False, SPAN * 2, BLOCK // 2
            )
    tl.store(partials + chunk * SUMS, dual)
    if SUMS == 3:
        tl.store(partials + chunk * SUMS + 1, grad)
        tl.store(partials + chunk * SUMS + 2, step)


@triton.jit
def finalize(buckets, partials, out, NUM: tl.constexpr, LANES: tl.constexpr, SUMS: tl.constexpr):
    """One program: out <- [||T g||_q, ||g||_2, ||T^2 g||_2 or ||T sign g||_2, factor] of each bucket, (NUM, 4).

    The factor is rho / ||T g||_2 with the norm over all buckets of p = 2 whose rho is not 0, and rho where p = inf; 0
    for a gradient of 0, and NaN for one with an inf or NaN. LANES: the power of 2 from NUM up.
    """
    lane = tl.arange(0, LANES)
    dual = tl.zeros([LANES], dtype=tl.float64)
    grad, step = dual, dual
    for k in range(NUM):
        chunk, end = tl.load(buckets + k * BOUNDS + BEGIN), tl.load(buckets + k * BOUNDS + END)
        x = tl.zeros([BLOCK], dtype=tl.float64)
        y, z = x, x
        while chunk < end:
            at = chunk + tl.arange(0, BLOCK)
            x += tl.load(partials + at * SUMS, mask=at < end, other=0.0)
            if SUMS == 3:
                y += tl.load(partials + at * SUMS + 1, mask=at < end, other=0.0)
                z += tl.load(partials + at * SUMS + 2, mask=at < end, other=0.0)
            chunk += BLOCK
        dual = tl.where(lane == k, tl.sum(x, axis=0), dual)
        if SUMS == 3:
            grad = tl.where(lane == k, tl.sum(y, axis=0), grad)
            step = tl.where(lane == k, tl.sum(z, axis=0), step)
    if SUMS == 1:
        grad, step = dual, dual
    here = lane < NUM
    is_inf = tl.load(buckets + lane * BOUNDS + IS_INF, mask=here, other=0) != 0
    rho = tl.load(buckets + lane * BOUNDS + RHO, mask=here, other=0).to(tl.float64, bitcast=True)
    length = tl.sqrt(tl.sum(tl.where(is_inf | (rho == 0), 0.0, dual), axis=0))
    norm = tl.where(is_inf, dual, length)
    factor = tl.where(is_inf, rho, rho / tl.where(norm == 0, 1.0, norm)) + 0.0 * norm
    out += 4 * lane
    tl.store(out, tl.where(is_inf, dual, tl.sqrt(dual)), mask=here)
    tl.store(out + 1, tl.sqrt(grad), mask=here)
    tl.store(out + 2, tl.sqrt(step), mask=here)
    tl.store(out + 3, tl.where(norm == 0, 0.0, factor), mask=here)


@triton.jit
def move_block(tensor, buckets, factor, start, n, G, W, WIDE, MODE, P2, FULL, SIZE):
    """copy <- w;  w <- w + factor T^2 g  or  w + factor T sign(g).

    Returns <e', e> and <e, e> of bf16 and fp16 weights, e' what their rounding left of e.
    """
    at = start + tl.arange(0, SIZE)
    saved = load(tl.load(tensor + W_), at, n, W, FULL)
    w = saved.to(WIDE)
    e = load(tl.load(tensor + G_), at, n, G, FULL).to(WIDE)
    if not P2:
        e = tl.where(e > 0, 1.0, tl.where(e < 0, -1.0, 0.0)).to(WIDE)
    e = e * factor.to(WIDE)
    if MODE != ONES:
        t = scale(tensor, buckets, w, start, W, WIDE, MODE, SIZE)
        e = e * t * t if P2 else e * t
    moved = w + e
    if tl.float64 != W:  # to the low precisions by way of float32
        moved = moved.to(tl.float32)
    moved = moved.to(W)
    store(tl.load(tensor + COPY_), at, n, saved, W, FULL)
    store(tl.load(tensor + W_), at, n, moved, W, FULL)
    dot, square = factor, factor
    if tl.bfloat16 == W or tl.float16 == W:
        dot = tl.sum((moved.to(WIDE) - w) * e, axis=0).to(tl.float64)
        square = tl.sum(e * e, axis=0).to(tl.float64)
    return dot, square


@triton.jit(do_not_specialize=["first", "part", "number"])
def perturb(
    tensors, buckets, owners, out, retained, flags, first, part, number, G: tl.constexpr, W: tl.constexpr,
    WIDE: tl.constexpr, MODE: tl.constexpr, P2: tl.constexpr,
):  # fmt: skip
    """As `move_block`, from the last chunk to the first: the end of g is still in the cache from `norm_partials`.

    retained: for bf16 and fp16 what `move_block` returns, (programs, 2). flags[part] <- number says that this has run.
    """
    program = tl.num_programs(0) - 1 - tl.program_id(0)
    chunk = first + program
    tensor = tensors + tl.load(owners + chunk) * RECORD
    start = (chunk - tl.load(tensor + FIRST)) * CHUNK
    n = tl.load(tensor + LENGTH)
    aligned = (tl.load(tensor + G_) | tl.load(tensor + W_) | tl.load(tensor + COPY_)) % 16 == 0
    factor = tl.load(out + 4 * tl.load(tensor + BUCKET) + 3)
    size = tl.abs(factor)
    is_far = False
    if tl.float64 != WIDE:  # float32 would lose digits
        is_far = (size > 1e30) | ((size < 1e-30) & (size > 0))
    dot = tl.full([], 0.0, tl.float64)
    square = dot
    for k in range(SPAN):
        at = start + k * BLOCK
        if (at + BLOCK <= n) & aligned & (not is_far):
            x, y = move_block(tensor, buckets, factor, at, n, G, W, WIDE, MODE, P2, True, BLOCK)
            dot, square = dot + x, square + y
        else:
            for _ in range(2):  # masks take registers
                if tl.float64 != WIDE and is_far:
                    x, y = move_block(tensor, buckets, factor, at, n, G, W, tl.float64, MODE, P2, False, BLOCK // 2)
                else:
                    x, y = move_block(tensor, buckets, factor, at, n, G, W, WIDE, MODE, P2, False, BLOCK // 2)
                dot, square, at = dot + x, square + y, at + BLOCK // 2
    if tl.bfloat16 == W or tl.float16 == W:
        tl.store(retained + 2 * program, dot)
        tl.store(retained + 2 * program + 1, square)
    if program == 0:
        tl.store(flags + part, number)


IS_INTERPRETED = not isinstance(perturb, JITFunction)  # TRITON_INTERPRET=1: on the CPU, for tests
_SELF = sys.modules[__name__]
PLAIN = {Tensor, torch.nn.Parameter}
_DTYPE = operator.attrgetter("dtype")


def fits(buckets: Sequence[Bucket]) -> bool:
    """Whether these kernels can move all of the buckets together.

    They must be on one CUDA device and whole on this rank, in dense tensors of which no two overlap, w and g laid out
    alike. T is 1, |w| + eta, or one number for each row or weight. There is no stochastic rounding.
    """
    device = buckets[0].device
    if device.type != "cuda" and not (IS_INTERPRETED and device.type == "cpu"):
        return False
    weights = [w for b in buckets for w in b.weights]
    # programs run in any order: of two weights that overlap one would copy what the other has moved
    return all(b.device == device and _fits(b) for b in buckets) and are_apart(weights, addresses(weights))


def ascend_(buckets: Sequence[Bucket], backups: Backups) -> Ascent:
    """As `kernels.ascend_`. The next ascent overwrites what this one returns."""
    for b in buckets:
        b.body = _SELF  # so that the copies are laid out as the weights
    with torch.inference_mode(False):  # else a step in inference mode would leave tensors that no other may use
        storages = backups.storages_for(buckets, same_strides=True)
        key = [_key(b) for b in buckets]
        launcher = backups.launcher
        if launcher is None or launcher.key != key:
            captured = [] if launcher is None else launcher.captured
            backups.launcher = launcher = _Launcher(buckets, storages, key, captured)
        with torch.no_grad():
            return launcher.ascend_(buckets, backups)


@dataclass(frozen=True, slots=True)
class _Part:
    """What one launch works on: buckets of the same types, T and p. retained: of its programs, for bf16 and fp16."""

    constants: dict[str, Any]
    first: int
    programs: int
    weights: list[Tensor]
    copies: list[Tensor]
    retained: Tensor | None


class _Launcher:
    """The tables for buckets that stay the same, but for their radii and the addresses of g and T.

    captured: what CUDA graphs read: nothing else may write to it, and it must not be freed.
    """

    def __init__(self, buckets: Sequence[Bucket], storages: Sequence[Storage], key: list[Any], captured: list[Any]):
        self.key, self.captured = key, captured
        self._device = buckets[0].device
        self._number = 0  # of the ascent
        self._sent: Any = None  # the radii and addresses that are in the table
        self._table: Any = None
        self._spare: Tensor | None = None
        self._parts: list[_Part] = []
        self._order: list[int] = []  # of the buckets in the table of tensors: those of a part side by side
        bounds: list[list[float]] = [[]] * len(buckets)
        tensors: list[list[int]] = []
        chunk = 0
        is_adaptive = any(b.eta is not None for b in buckets)
        kinds = [_constants(b, is_adaptive) for b in buckets]
        for kind in [kind for k, kind in enumerate(kinds) if kind not in kinds[:k]]:
            part = _Part(kind, chunk, 0, [], [], None)
            for k in [k for k, x in enumerate(kinds) if x == kind]:
                b, begin = buckets[k], chunk
                for i, (w, copy) in enumerate(zip(b.weights, storages[k].copies, strict=True)):
                    slices = (1, 1) if b.t is None or b.t[i].numel() == 1 else (w.stride(0), len(w))
                    tensors.append([0, *addresses([w, copy]), w.numel(), chunk, k, 0, *slices])
                    chunk += -(-w.numel() // CHUNK.value)
                part.weights.extend(b.weights)
                part.copies.extend(storages[k].copies)
                bounds[k] = [begin, chunk, b.p != 2, 0.0, *((0.0, 1.0) if b.eta is None else (1.0, b.eta))]
                self._order.append(k)
            programs = chunk - part.first
            retained = self._zeros(programs, 2) if part.weights[0].dtype in LOW_PRECISION else None
            self._parts.append(replace(part, programs=programs, retained=retained))
        self._moved: Moved = [(part.weights, part.copies) for part in self._parts]
        self._weights = [w for part in self._parts for w in part.weights]
        self._num_buckets = len(buckets)
        table = numpy.array(bounds)
        table[:, : RHO.value].view(numpy.int64)[:] = table[:, : RHO.value].astype(numpy.int64)
        self._host = numpy.concatenate([table.view(numpy.int64).ravel(), numpy.array(tensors).ravel()])
        owners = [i for i, tensor in enumerate(tensors) for _ in range(-(-tensor[LENGTH.value] // CHUNK.value))]
        self._owners = self._pinned(numpy.array(owners, dtype=numpy.int32)).to(self._device, non_blocking=True)
        self._sums = 1 if all(b.is_plain for b in buckets) else 3
        self._partials = self._zeros(chunk, self._sums)
        self._out = self._zeros(len(buckets), 4)
        self._flags = torch.zeros(len(self._parts), dtype=torch.int32, device=self._device)
        rows: Any = [row.unbind() for row in self._out.unbind()]
        self._norms, self._factors = [Norms(*row[:3]) for row in rows], [row[3] for row in rows]  # views of _out

    def ascend_(self, buckets: Sequence[Bucket], backups: Backups) -> Ascent:
        tables = self._tables(buckets)
        self._number += 1
        torch.autograd.graph.increment_version(self._weights)  # a backward through the graph of pass 1 must fail
        with on(self._device):
            for part in self._parts:
                args: tuple[Any, ...] = *tables, self._owners, self._partials, part.first
                launch(norm_partials, part.programs, *args, **part.constants, SUMS=self._sums)
            lanes = max(2, next_power_of_2(self._num_buckets))
            sizes = {"NUM": self._num_buckets, "LANES": lanes, "SUMS": self._sums}
            launch(finalize, 1, tables[1], self._partials, self._out, **sizes)
            backups.expect(self._moved, self._complete)
            for k, part in enumerate(self._parts):
                retained = self._out if part.retained is None else part.retained
                args = *tables, self._owners, self._out, retained, self._flags, part.first, k, self._number
                launch(perturb, part.programs, *args, **part.constants)
        backups.note(self._moved)
        sums: Any = [part.retained.sum(0).unbind() for part in self._parts if part.retained is not None]
        return Ascent([b.p for b in buckets], self._norms, self._factors, [1.0] * len(buckets), sums)

    def _complete(self) -> bool:
        """Makes the copies whole wherever an interrupt has come: those of a part that was not launched are written now.

        False in a capture, where nothing has moved.
        """
        if is_capturing(self._device):
            return False
        with torch.no_grad():
            for part, number in zip(self._parts, self._flags.tolist(), strict=True):
                if number != self._number:
                    torch._foreach_copy_(part.copies, part.weights)
        return True

    def _tables(self, buckets: Sequence[Bucket]) -> tuple[Tensor, Tensor]:
        """The tables of tensors and of buckets on the device, with the addresses and radii of now.

        A graph that is captured has a table of its own, and pinned memory that it is copied from at every replay.
        """
        rhos = [0.0 if isinstance(b.rho, Tensor) else float(b.rho) for b in buckets]
        grads = addresses([g for k in self._order for g in buckets[k].grads])
        scales = [x for k in self._order for x in addresses(buckets[k].t or ()) or [0] * len(buckets[k].grads)]
        is_captured, table = is_capturing(self._device), self._table
        if self._spare is None and not is_captured:  # for a capture, which must not ask for pinned memory
            self._spare = self._pinned(self._host)
        if is_captured or self._sent != (rhos, grads, scales):
            bounds, tensors = numpy.split(self._host, [BOUNDS.value * self._num_buckets])
            bounds.view(numpy.float64)[RHO.value :: BOUNDS.value] = rhos
            tensors[G_.value :: RECORD.value], tensors[T_.value :: RECORD.value] = grads, scales
            host = self._take_spare() if is_captured else self._pinned(self._host)
            table = torch.empty_like(host, device=self._device).copy_(host, non_blocking=True)
            if is_captured:
                self.captured += [host, table, self]
            else:
                self._sent = None  # whatever an interrupt leaves, the table is not taken for another one
                self._table = table
                self._sent = rhos, grads, scales
        for k, b in enumerate(buckets):
            if isinstance(b.rho, Tensor):
                table[BOUNDS.value * k + RHO.value].view(torch.float64).copy_(b.rho, non_blocking=True)
        return table[BOUNDS.value * self._num_buckets :], table

    def _take_spare(self) -> Tensor:
        host, self._spare = self._spare, None
        if host is None:
            raise RuntimeError(_TOO_EARLY)
        return host.copy_(torch.as_tensor(self._host))

    def _pinned(self, values: Any) -> Tensor:
        """Pinned host memory, from which a CUDA device copies without waiting."""
        if is_capturing(self._device):
            raise RuntimeError(_TOO_EARLY)
        host = torch.as_tensor(values).clone()
        return host.pin_memory() if self._device.type == "cuda" and torch.cuda.is_available() else host

    def _zeros(self, *shape: int) -> Tensor:
        return torch.zeros(shape, dtype=torch.float64, device=self._device)


_TOO_EARLY = (
    "a CUDA graph can hold a fused ascent only after one of the same tensors outside of it: run the step once before "
    "each capture"
)


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """Launches without fused multiply-add: the compiler would choose where to fuse, and the bits would depend on it."""
    if programs:
        kernel[(programs,)](*args, num_warps=WARPS, enable_fp_fusion=False, **constants)


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Triton launches on the current device, wherever the tensors are."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)


def is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def _fits(b: Bucket) -> bool:
    if not b.weights or b.groups or b.noise is not None or not PLAIN.issuperset(map(type, b.weights + b.grads)):
        return False
    g = b.grads[0]  # all have one layout and device
    if set(map(_DTYPE, b.grads)) != {g.dtype} or not TYPES.keys() >= {b.dtype, g.dtype}:
        return False
    if g.layout != torch.strided or g.device != b.device:
        return False
    if not all(map(Tensor.is_contiguous, b.weights + b.grads)) and not all(map(_are_alike, b.weights, b.grads)):
        return False
    return b.t is None or all(map(_is_by_slice, b.t, b.weights))


def _are_alike(w: Tensor, g: Tensor) -> bool:
    """Whether the same place in memory holds the same entry, without gaps; sizes of 1 do not matter."""
    alike = all(a == b or n == 1 for a, b, n in zip(w.stride(), g.stride(), w.shape, strict=True))
    return alike and bool(torch.ops.aten.is_non_overlapping_and_dense(w))


def _is_by_slice(t: Tensor, w: Tensor) -> bool:
    is_whole = t.numel() == 1
    is_right = is_whole or (t.numel() == len(t) == len(w) and t.is_contiguous() and w.stride(0) < 2**31)
    return is_right and t.dtype == wide_dtype(w.dtype)


def _key(b: Bucket) -> tuple[Any, ...]:
    """What the tables depend on; the storage stands for the weights and their layout."""
    scales = None if b.t is None else [t.numel() for t in b.t]
    return b.storage, b.p, b.eta, b.grads[0].dtype, scales, addresses(b.weights)


def _constants(b: Bucket, is_adaptive: bool) -> dict[str, Any]:
    wide = wide_dtype(b.dtype, b.grads[0].dtype)
    mode = BY_SLICE if b.t is not None else ELEMENTS if is_adaptive else ONES
    types = {"G": TYPES[b.grads[0].dtype], "W": TYPES[b.dtype], "WIDE": TYPES[wide]}
    return types | {"MODE": mode.value, "P2": b.p == 2}
