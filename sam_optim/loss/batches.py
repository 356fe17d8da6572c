"""Batches that are the same in every pass, or an error: a measure of changing data is a wrong number."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from sam_optim.core import random as rng

REMEDY = "a measure needs the same examples in every pass: shuffle=False, no random augmentation, or a list of batches"


def tree_map(f: Callable[[Any], Any], batch: Any) -> Any:
    """f of every leaf of a batch: of all that is not a tuple, named tuple, list or mapping.

    A mapping that pytree does not know (Hugging Face's BatchEncoding) becomes a dict.
    """

    def of_leaf(x: Any) -> Any:
        if isinstance(x, Mapping):
            return tree_map(f, dict(x))
        if isinstance(x, (list, tuple)):  # of a class of the user's
            return type(x)(tree_map(f, list(x)))
        return f(x)

    return pytree.tree_map(of_leaf, batch)


def leaves(batch: Any) -> list[Any]:
    """All leaves of a batch, in order."""
    collected: list[Any] = []
    tree_map(collected.append, batch)
    return collected


def tensors(batch: Any) -> list[Tensor]:
    """All tensors of a batch, also those in objects that hold some (PyG's Data)."""
    collected: list[Tensor] = []
    for x in leaves(batch):
        if isinstance(x, Tensor):
            collected.append(x)
        elif callable(getattr(x, "to_dict", None)):
            collected += tensors(x.to_dict())
        elif hasattr(x, "__dict__"):
            collected += [value for value in vars(x).values() if isinstance(value, Tensor)]
    return collected


class FixedBatches:
    """Batches with their sizes, compared in every pass with what the first one gave.

    Lists and tuples of batches are taken at their word. Anything else (a DataLoader) is compared by count and by a
    checksum of each batch, and draws from its own generators, seeded differently in each pass: data that depend on
    the global generators (shuffling, augmentation) show up as a difference, and these generators are not moved.

    Attributes:
        sizes: examples in each batch, see `num_examples`.
        fingerprints: (size, checksum) of each batch.

    Raises:
        ValueError: no batches or an empty one, an iterator that can be read only once, passes that differ.
    """

    def __init__(self, batches: Iterable[Any], *, may_be_empty: bool = False):
        if isinstance(batches, Iterator):
            raise ValueError("batches is an iterator, which can be read only once: pass list(batches) or a DataLoader")
        self._batches = batches
        self._in_memory = isinstance(batches, (list, tuple))
        self._num_passes = 0
        self.fingerprints = [(num_examples(batch), checksum(batch)) for batch in self.read()]
        self.sizes = tuple(n for n, _ in self.fingerprints)
        if 0 in self.sizes or not (self.sizes or may_be_empty):
            raise ValueError(f"a loss needs batches with examples in them, got batches of sizes {list(self.sizes)}")

    def __iter__(self) -> Iterator[Any]:
        count = 0
        for count, batch in enumerate(self.read(), 1):
            if not self._in_memory and (count > len(self.sizes) or self.fingerprints[count - 1][1] != checksum(batch)):
                raise ValueError(f"batch {count} is not that of the first pass; {REMEDY}")
            yield batch
        if count != len(self.sizes):
            raise ValueError(f"a pass gave {count} batches, the first one {len(self.sizes)}; {REMEDY}")

    def read(self) -> Iterator[Any]:
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


def num_examples(batch: Any) -> int:
    """The length of "labels" in a mapping, of the last element of a tuple or of `y`, if it is a tensor; else of the
    first tensor in the batch itself, of its first list (an example in each entry), or of the first tensor anywhere.
    Of an object with `num_graphs`, these.

    Raises:
        ValueError: no tensor with a first dimension.
    """
    if isinstance(graphs := getattr(batch, "num_graphs", None), int):
        return graphs
    columns = list(batch.values()) if isinstance(batch, Mapping) else batch if isinstance(batch, (tuple, list)) else []
    ranked = [target_of(batch), *columns, *tensors(batch)]
    counted = next((x for x in ranked if isinstance(x, Tensor)), None)
    lists = [x for x in columns if isinstance(x, list)]
    if lists and not any(isinstance(x, Tensor) for x in columns):
        return len(lists[0])
    if counted is None or not counted.ndim:
        raise ValueError(f"a batch needs tensors whose first dimension counts its examples, got {type(batch).__name__}")
    return len(counted)


def target_of(batch: Any) -> Any:
    """ "labels" of a mapping, the last element of a tuple or list, `y` of an object; None if there is none."""
    if isinstance(batch, Mapping):
        return batch.get("labels")
    if isinstance(batch, (tuple, list)):
        return batch[-1] if batch else None
    return getattr(batch, "y", None)


def checksum(batch: Any) -> int:
    """CRC-32 of the shapes, dtypes and all entries of the tensors: the same batch, the same number."""
    crc = 0
    for x in tensors(batch):
        x = x.detach().to_dense() if x.layout != torch.strided else x.detach()
        crc = zlib.crc32(f"{tuple(x.shape)} {x.dtype}".encode(), crc)
        if x.numel():
            crc = zlib.crc32(x.cpu().resolve_conj().contiguous().flatten().view(torch.uint8).numpy().data, crc)
    return crc


def data_id(fingerprints: Sequence[tuple[int, int]]) -> str:
    """One checksum of all batches, as hexadecimal digits; results carry it to say what they were measured on."""
    return f"{zlib.crc32(repr(list(fingerprints)).encode()):08x}"


def moved(batch: Any, device: torch.device) -> Any:
    """The batch with its tensors on the device."""

    def move(x: Any) -> Any:
        if isinstance(x, Tensor):
            return x.to(device, non_blocking=True)
        return x.to(device) if hasattr(x, "to") else x

    return tree_map(move, batch)


def channels_last(batch: Any) -> Any:
    """The batch with the strides of its images, (n, C, H, W), in the order n, H, W, C; the same numbers."""

    def reorder(x: Any) -> Any:
        is_image = isinstance(x, Tensor) and x.ndim == 4
        return x.contiguous(memory_format=torch.channels_last) if is_image else x

    return tree_map(reorder, batch)


def part(batch: Any, start: int, end: int) -> Any:
    """Examples start to end of a batch; what is not a tensor is the same in all parts."""
    return tree_map(lambda x: x[start:end] if isinstance(x, Tensor) else x, batch)


def divided(batch: Any, n: int, size: int) -> list[tuple[int, Any]]:
    """(examples, piece) of at most `size` of the n examples each, in order: along the first dimension of every tensor.

    One piece where a tensor has another first dimension, or a leaf may hold examples and is not a tensor.
    """
    if size >= n or _rows(batch, n) is None:
        return [(n, batch)]
    return [(min(size, n - start), part(batch, start, min(start + size, n))) for start in range(0, n, size)]


def joined(batches: Iterable[tuple[float, int, Any]], size: int) -> Iterator[tuple[float, int, Any]]:
    """(weight, examples, batch) with consecutive batches of one form joined to at most `size` examples."""
    group: list[Any] = []
    total, count, form = 0.0, 0, None
    for weight, n, batch in batches:
        rows = _rows(batch, n)
        if group and (rows is None or rows != form or count + n > size):
            yield total, count, _join(group)
            group, total, count = [], 0.0, 0
        group.append(batch)
        total, count, form = total + weight, count + n, rows
    if group:
        yield total, count, _join(group)


def _rows(batch: Any, n: int) -> list[Any] | None:
    """What an example of the batch looks like; None where it cannot be cut along the first dimension of its tensors."""
    names = list(batch) if isinstance(batch, Mapping) else []
    rows: list[Any] = [type(batch), names]
    for x in leaves(batch):
        if isinstance(x, Tensor):
            if not x.ndim or len(x) != n:
                return None
            rows.append((x.shape[1:], x.dtype, x.layout))
        elif x is None or isinstance(x, (bool, int, float, str)):
            rows.append(x)
        else:
            return None
    return rows


def _join(batches: Sequence[Any]) -> Any:
    if len(batches) == 1:
        return batches[0]
    columns = iter(list(zip(*map(leaves, batches), strict=True)))

    def cat(_: Any) -> Any:
        column = next(columns)
        return torch.cat(column) if isinstance(column[0], Tensor) else column[0]

    return tree_map(cat, batches[0])
