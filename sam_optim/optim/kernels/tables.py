"""What multi-tensor kernels read on the device: addresses of tensors, and which program has which part of them.

Tables are made once and kept. What changes from step to step are the addresses of gradients, and those only where the
allocator gives others: then they go up through pinned memory, without waiting for the device.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor

BLOCK = 2048  # entries of one program: 8 for each of 256 threads, 16 to 32 bytes, which leaves most registers free
SPAN = 4  # blocks of a program that only reads
WARPS = 8
ROW = 1024  # partial sums that are read at a time
ALIGNMENT = 16  # bytes of the widest load


def launch(kernel: Any, programs: int, *args: Any, **constants: Any) -> None:
    """One launch. Without fused multiply-add: its place is the compiler's choice, and the bits would depend on it."""
    if programs:
        kernel[(programs,)](*args, num_warps=WARPS, enable_fp_fusion=False, **constants)


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    return [x.data_ptr() for x in tensors]


def address(x: Tensor) -> int:
    return addresses([x])[0]


def on(device: torch.device) -> AbstractContextManager[Any]:
    """Kernels are launched on the current device, whatever the tensors are on."""
    if device.type != "cuda" or device.index in (None, torch.cuda.current_device()):
        return nullcontext()
    return torch.cuda.device(device)


def is_capturing(device: torch.device) -> bool:
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def staged(values: Sequence[Any], dtype: torch.dtype, device: torch.device) -> Tensor:
    """On the host, in pinned memory if that is what the device copies from without waiting."""
    host = torch.tensor(values, dtype=dtype)
    return host.pin_memory() if device.type == "cuda" and torch.cuda.is_available() else host


IN_TENSOR = math.nan  # in a list of numbers: one that a tensor has, equal to itself alone


class Uploaded:
    """Numbers on the device that are sent again when they change."""

    def __init__(self, dtype: torch.dtype, device: torch.device):
        self._dtype, self._device = dtype, device
        self._values: list[Any] | None = None
        self._there: Tensor | None = None
        self._spare: Tensor | None = None
        self._captured: list[Tensor] = []

    def has(self, values: list[Any]) -> bool:
        return self._there is not None and values == self._values

    def of(self, values: list[Any]) -> Tensor:
        """A captured graph gets a table of its own, and copies it from memory that nothing else will write to."""
        if is_capturing(self._device):
            return self._for_graph(values)
        if self._there is None or len(self._there) != len(values):
            self._there = torch.empty(len(values), dtype=self._dtype, device=self._device)
            self._values = None
        if values != self._values:
            # pinned memory is not given to another while a copy from it is under way
            self._there.copy_(staged(values, self._dtype, self._device), non_blocking=True)
            self._values = list(values)
        if self._device.type == "cuda" and (self._spare is None or len(self._spare) != len(values)):
            self._spare = staged(values, self._dtype, self._device)  # for a capture, which must not ask for any
        return self._there

    def _for_graph(self, values: list[Any]) -> Tensor:
        host, self._spare = self._spare, None
        if host is None or len(host) != len(values):
            host = staged(values, self._dtype, self._device)
        else:
            host.copy_(torch.tensor(values, dtype=self._dtype))
        there = torch.empty(len(values), dtype=self._dtype, device=self._device)
        there.copy_(host, non_blocking=True)
        self._captured += [host, there]
        return there


def constant(values: Any, dtype: torch.dtype, device: torch.device, kept: list[Tensor]) -> Tensor:
    """A table on the device that will not change. A captured copy reads again at every replay, from what is `kept`."""
    host = torch.as_tensor(values, dtype=dtype)
    if device.type != "cuda" or not torch.cuda.is_available():
        return host.to(device)
    host = host.pin_memory()
    if is_capturing(device):
        kept.append(host)
    return host.to(device, non_blocking=True)


def chunks(sizes: list[int], length: int) -> tuple[Any, Any]:
    """Of each program, its tensor and the number of its chunk in it: (2, programs); and programs of each tensor."""
    import numpy

    counts = (numpy.asarray(sizes, dtype=numpy.int64) + length - 1) // length
    owner = numpy.repeat(numpy.arange(len(sizes)), counts)
    number = numpy.arange(len(owner)) - numpy.repeat(counts.cumsum() - counts, counts)
    return numpy.stack([owner, number]).astype(numpy.int32), counts


def places(counts: list[int], owners: list[int], num_buckets: int) -> tuple[list[int], list[int]]:
    """Where the partial sums of each tensor begin, those of each bucket side by side in whole rows; rows of each."""
    totals = [0] * num_buckets
    inside = []
    for count, k in zip(counts, owners, strict=True):
        inside.append(totals[k])
        totals[k] += int(count)
    rows = [-(-total // ROW) for total in totals]
    before = list(itertools.accumulate(rows, initial=0))
    return [before[k] * ROW + x for k, x in zip(owners, inside, strict=True)], rows


def is_plain(x: Tensor) -> bool:
    return type(x) is torch.nn.Parameter or type(x) is Tensor


def are_apart(tensors: list[Tensor]) -> bool:
    """Whether no two of these dense tensors share an entry: programs run in any order."""
    spans = sorted((address(x), address(x) + x.numel() * x.element_size()) for x in tensors if x.numel())
    return all(a[1] <= b[0] for a, b in itertools.pairwise(spans))


def same_layout(x: Tensor, y: Tensor) -> bool:
    """Whether the same place in memory holds the same entry; sizes of 1 have no say."""
    return x.shape == y.shape and all(
        a == b for a, b, size in zip(x.stride(), y.stride(), x.shape, strict=True) if size != 1
    )
