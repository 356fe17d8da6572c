"""Products with the curvature of many batches, each in pieces whose graphs fit into memory."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from sam_optim.core import random as rng
from sam_optim.loss.batches import checksum
from sam_optim.loss.products import Product

if TYPE_CHECKING:
    from sam_optim.loss import Loss

PROBE = 8  # examples whose graph is weighed
# Bytes that one graph, and all graphs that are kept, may save for the backward pass. On a CPU small graphs are also
# faster: they stay in the cache, and the allocator gives their memory back. Fixed numbers and not what is free: what
# ran before must not change the pieces, and with them the rounding.
GRAPH_BYTES, KEPT_BYTES = 2**27, 7 * 2**27
DEVICE_SHARE = 8  # one graph on a device may take this part of its memory, and all that are kept as much

Criterion = Callable[[Any, Any], Tensor]


def budgets(device: torch.device) -> tuple[int, int]:
    """(bytes of one graph, bytes of all graphs that are kept)."""
    if device.type != "cuda":
        return GRAPH_BYTES, KEPT_BYTES
    share = torch.cuda.get_device_properties(device).total_memory // DEVICE_SHARE
    return share, share


class Saved:
    """What graphs save for their backward passes, in bytes; parameters do not count, for they are there anyway."""

    def __init__(self, params: Sequence[Tensor]):
        self.bytes = 0
        self._seen = {p.untyped_storage().data_ptr() for p in params}

    @contextmanager
    def counting(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._count, _unchanged):
            yield

    def _count(self, x: Tensor) -> tuple[Tensor, int]:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.bytes += storage.nbytes()
        return x.detach(), x._version  # an output that is saved as it is keeps its own graph alive for ever


def _unchanged(saved: tuple[Tensor, int]) -> Tensor:
    """autograd does not look for changes in place where there are hooks."""
    x, version = saved
    if x._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"{list(x.shape)} is at version {x._version}, saved at version {version}"
        )
    return x


def divided(batch: Any, n: int, size: int) -> list[tuple[int, Any]]:
    """(examples, piece) of at most `size` of the n examples each, in order: along the first dimension of every tensor
    in tuples, lists and mappings. One piece where some tensor has another first dimension."""
    if size >= n or not _divisible(batch, n):
        return [(n, batch)]
    return [(min(size, n - start), part(batch, start, min(start + size, n))) for start in range(0, n, size)]


def part(batch: Any, start: int, end: int) -> Any:
    """Examples start to end of a batch; what is not a tensor is the same in all parts."""
    if isinstance(batch, Tensor):
        return batch[start:end]
    if isinstance(batch, Mapping):
        return {key: part(value, start, end) for key, value in batch.items()}
    if isinstance(batch, tuple) and hasattr(batch, "_fields"):
        return type(batch)(*(part(value, start, end) for value in batch))
    if isinstance(batch, (tuple, list)):
        return type(batch)(part(value, start, end) for value in batch)
    return batch


def _divisible(batch: Any, n: int) -> bool:
    if isinstance(batch, Tensor):
        return batch.ndim > 0 and len(batch) == n
    if isinstance(batch, Mapping):
        return all(_divisible(value, n) for value in batch.values())
    if isinstance(batch, (tuple, list)):
        return all(_divisible(value, n) for value in batch)
    return batch is None or isinstance(batch, (bool, int, float, str))


def same_outputs(a: Any, b: Any) -> bool:
    """Of the same examples in a small and in a large piece: other values mean that examples act on each other."""
    if not (isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape):
        return False
    return bool(torch.isclose(a, b, rtol=0, atol=1e-3 * float(b.abs().max()), equal_nan=True).all())


def is_mean_over_examples(criterion: Criterion, pieces: Sequence[tuple[int, Tensor, Any]]) -> bool:
    """Whether the criterion of the whole batch is the mean of those of its pieces, (examples, outputs, target): not so
    with weights of classes, labels that are ignored, or losses of pairs. Compared are gradients with respect to the
    outputs, so that an example with another weight shows wherever it is."""
    if not all(isinstance(x, Tensor) and x.ndim and len(x) == n for n, *both in pieces for x in both):
        return False
    total = sum(n for n, _, _ in pieces)
    outputs = torch.cat([outputs for _, outputs, _ in pieces])
    whole = _gradient(criterion, outputs, torch.cat([target for _, _, target in pieces]))
    parts = torch.cat([n / total * _gradient(criterion, outputs, t) for n, outputs, t in pieces])
    return bool(torch.isclose(whole, parts, rtol=1e-4, atol=1e-5 * float(whole.abs().max()), equal_nan=True).all())


def _gradient(criterion: Criterion, outputs: Tensor, target: Any) -> Tensor:
    with torch.enable_grad():
        o = outputs.detach().requires_grad_()
        return torch.autograd.grad(criterion(o, target), o, materialize_grads=True)[0]


class Curvature:
    """v -> M v = sum_b n_b / N M_b v. Graphs of the first pieces are kept as far as the budget goes; those of
    others are made anew for each product, one at a time."""

    def __init__(self, loss: Loss, matrix: str, seed: int):
        self._loss, self._matrix, self._seed = loss, matrix, seed
        self._graph_bytes, self._kept_bytes = budgets(loss.device)
        self._sizes: list[int] = []  # of a piece, for each batch
        self._uniforms: list[Tensor] = []  # for each batch, where labels are drawn
        self._kept: list[tuple[float, Product]] = []
        self._all_kept = False
        loss._shares.together(self._keep_first)

    def __call__(self, v: Sequence[Tensor]) -> list[Tensor]:
        return self._loss._shares.summed(lambda: self._own(v))

    def _own(self, v: Sequence[Tensor]) -> list[Tensor]:
        """The sum over the batches of this rank."""
        total = Sum(self._loss.params)
        for weight, product in self._kept:
            total.add(product(v), weight)
        if not self._all_kept:
            for i, (weight, piece, uniforms) in enumerate(self._pieces()):
                if i >= len(self._kept):
                    total.add(self._product(piece, uniforms, keep=False)(v), weight)
        return total.tensors

    def _keep_first(self) -> None:
        """A loss of one piece keeps its graph whatever that takes: it could not be streamed with less."""
        saved, heaviest = Saved(self._loss.params), 0.0
        for weight, piece, uniforms in self._pieces():
            if self._kept and saved.bytes + heaviest * weight > self._kept_bytes:
                return
            before = saved.bytes
            with saved.counting():
                product = self._product(piece, uniforms, keep=True)
            if saved.bytes > self._kept_bytes and weight < 1:
                return
            self._kept.append((weight, product))
            heaviest = max(heaviest, (saved.bytes - before) / weight)
        self._all_kept = True

    def _product(self, piece: Any, uniforms: Tensor, *, keep: bool) -> Product:
        return self._loss._piece_product(self._matrix, piece, uniforms, keep=keep)

    def _pieces(self) -> Iterator[tuple[float, Any, Tensor]]:
        """(examples / N, piece, uniform draws for its examples), in order."""
        loss = self._loss
        for i, (n, (_, batch)) in enumerate(zip(loss._batches.sizes, loss._weighted_batches(), strict=True)):
            if len(self._sizes) == i:
                self._sizes.append(self._piece_size(batch, n))
                self._uniforms.append(self._draws(batch, n))
            start = 0
            for size, piece in divided(batch, n, self._sizes[i]):
                yield size / loss.num_examples, piece, self._uniforms[i][start : start + size]
                start += size

    def _draws(self, batch: Any, n: int) -> Tensor:
        if self._matrix != "fisher_mc":
            return torch.empty(n)
        # hashed together: torch's generator reads the lower 32 bits of a seed alone
        stream = rng.Stream(zlib.crc32(f"{self._seed} {checksum(batch)}".encode()))
        return stream.uniform_like(torch.empty(n, dtype=torch.float64))

    def _piece_size(self, batch: Any, n: int) -> int:
        """How many examples of this batch go through one graph; n where the loss is not the mean over pieces."""
        size = self._loss.chunk_size
        if self._loss.batch_statistics or n <= (size or PROBE) or len(divided(batch, n, 1)) == 1:
            return n
        if size is None:
            saved = Saved(self._loss.params)
            with saved.counting():
                self._product(part(batch, 0, PROBE), torch.zeros(PROBE), keep=True)
            size = max(PROBE, int(self._graph_bytes * PROBE // max(saved.bytes, 1)))
        return size if size >= n or self._is_mean(batch, n, size) else n

    @torch.no_grad()
    def _is_mean(self, batch: Any, n: int, size: int) -> bool:
        loss, criterion = self._loss, self._loss.criterion
        if criterion is None:
            return False  # `outputs.loss` may be a mean over tokens, of which examples have different numbers
        pieces = [(k, *loss._outputs(piece)) for k, piece in divided(batch, n, size)]
        probe = min(size, PROBE) // 2 or 1
        few, _ = loss._outputs(part(batch, 0, probe))
        first = pieces[0][1]
        if not isinstance(first, Tensor) or not same_outputs(few, first[:probe]):
            return False
        linear = self._matrix in ("fisher", "fisher_mc", "empirical_fisher")  # a sum over examples by definition
        return linear or is_mean_over_examples(loss._criterion_value, pieces)


class Sum:
    """A weighted sum of vectors, in float32 or better."""

    def __init__(self, params: Sequence[Tensor]):
        self.tensors = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in params]

    def add(self, vector: Sequence[Tensor], weight: float) -> None:
        for total, x in zip(self.tensors, vector, strict=True):
            total.add_(x.detach(), alpha=weight)
