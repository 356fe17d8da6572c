"""Batches that are the same in every pass, or an error: a measure of data that change is a wrong number."""

from __future__ import annotations

import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sam_optim.core import random as rng

REMEDY = "a measure needs the same examples in every pass: shuffle=False, no random augmentation, or a list of batches"
CHECKED_ENTRIES = 4096  # of each tensor, evenly spread: enough to see another example or another augmentation


class FixedBatches:
    """Batches with their sizes, compared in every pass with what the first one gave.

    Lists and tuples of batches are taken at their word. Anything else (a DataLoader) is compared by count and by a
    checksum of each batch, and draws from generators of its own, seeded differently in each pass: data that depend on
    the global generators (shuffling, augmentation) show up as a difference, and these generators are not moved.

    Attributes:
        sizes: examples in each batch: the length of "labels" in a mapping, of the last element in a tuple whose last
            element is a tensor, otherwise of the first tensor found.
        found: (size, checksum) of each batch.

    Raises:
        ValueError: no batches or an empty one, an iterator that can be read only once, passes that differ.
    """

    def __init__(self, batches: Iterable[Any], *, may_be_empty: bool = False):
        if isinstance(batches, Iterator):
            raise ValueError("batches is an iterator, which can be read only once: pass list(batches) or a DataLoader")
        self._batches = batches
        self._in_memory = isinstance(batches, (list, tuple))
        self._num_passes = 0
        self.found = [(num_examples(batch), checksum(batch)) for batch in self._read()]
        self.sizes = tuple(n for n, _ in self.found)
        self._checksums = [crc for _, crc in self.found]
        if 0 in self.sizes or not (self.found or may_be_empty):
            raise ValueError(f"a loss needs batches with examples in them, got batches of sizes {list(self.sizes)}")

    def __iter__(self) -> Iterator[Any]:
        count = 0
        for count, batch in enumerate(self._read(), 1):
            if not self._in_memory and (count > len(self.sizes) or self._checksums[count - 1] != checksum(batch)):
                raise ValueError(f"batch {count} is not that of the first pass; {REMEDY}")
            yield batch
        if count != len(self.sizes):
            raise ValueError(f"a pass gave {count} batches, the first one {len(self.sizes)}; {REMEDY}")

    def _read(self) -> Iterator[Any]:
        if self._in_memory:
            yield from self._batches
            return
        aside = rng.Aside(self._num_passes)
        self._num_passes += 1
        with aside:
            iterator = iter(self._batches)
        while True:
            with aside:  # around each read and not the whole loop: what the caller does in between is not data
                try:
                    batch = next(iterator)
                except StopIteration:
                    return
            yield batch


def combined(found: Sequence[tuple[int, int]]) -> str:
    """One checksum of all batches, as hexadecimal digits; results carry it to say what they were measured on."""
    return f"{zlib.crc32(repr(list(found)).encode()):08x}"


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on the device; tuples, lists and mappings stay what they are."""
    if isinstance(batch, Tensor):
        return batch.to(device, non_blocking=True)
    if isinstance(batch, Mapping):
        return {key: moved(value, device) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(moved(value, device) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(moved(value, device) for value in batch)
    return batch.to(device) if hasattr(batch, "to") else batch


def channels_last(batch: Any) -> Any:
    """The batch with the strides of its images, (n, C, H, W), in the order n, H, W, C; the same numbers."""
    if isinstance(batch, Tensor):
        return batch.contiguous(memory_format=torch.channels_last) if batch.ndim == 4 else batch
    if isinstance(batch, Mapping):
        return {key: channels_last(value) for key, value in batch.items()}
    if isinstance(batch, tuple) and not hasattr(batch, "_fields"):
        return tuple(channels_last(value) for value in batch)
    return [channels_last(value) for value in batch] if isinstance(batch, list) else batch


def num_examples(batch: Any) -> int:
    target: Any = None
    if isinstance(batch, Mapping):
        target = batch.get("labels")
    elif isinstance(batch, (tuple, list)) and batch:
        target = batch[-1]
    first = target if isinstance(target, Tensor) else next(_tensors(batch), None)
    if first is None or not first.ndim:
        raise ValueError(f"a batch needs tensors whose first dimension counts its examples, got {type(batch).__name__}")
    return len(first)


def _tensors(batch: Any) -> Iterator[Tensor]:
    if isinstance(batch, Tensor):
        yield batch
    elif isinstance(batch, Mapping):
        for value in batch.values():
            yield from _tensors(value)
    elif isinstance(batch, (tuple, list)):
        for value in batch:
            yield from _tensors(value)


def checksum(batch: Any) -> int:
    """CRC-32 of shapes, dtypes and up to 4,096 entries of each tensor: the same batch, the same number."""
    found = 0
    for x in _tensors(batch):
        flat = x.detach().flatten()
        sample = flat[:: max(1, len(flat) // CHECKED_ENTRIES)].cpu().contiguous()
        found = zlib.crc32(f"{tuple(x.shape)} {x.dtype}".encode(), found)
        found = zlib.crc32(sample.view(torch.uint8).numpy().data, found) if len(sample) else found
    return found
