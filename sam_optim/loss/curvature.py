"""Products with the curvature of many batches, each in pieces whose graphs fit into memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from sam_optim.loss.batches import divided, part
from sam_optim.loss.distributed import Sharding
from sam_optim.loss.products import Product

PROBE = 8  # examples whose graph is weighed
# Bytes that one graph, and all graphs that are kept, may save for the backward pass. On a CPU small graphs are also
# faster: they stay in the cache, and the allocator gives their memory back. Fixed numbers and not what is free: what
# ran before must not change the pieces, and with them the rounding.
GRAPH_BYTES, KEPT_BYTES = 2**27, 5 * 2**27
COPIES = 4  # of outputs: themselves, J v, M J v, and what is in between
DEVICE_SHARE = 8  # one graph on a device may take this part of its memory, and all that are kept as much


class Curvature:
    """v -> M v = sum_b p_b M_b v. Graphs of the first pieces are kept as far as the budget goes; the others are built
    again for each product, one at a time.

    Args:
        params: what vectors are the shapes of.
        batches: () -> (p_b, examples, batch) of each batch of this rank, the same in every call.
        product: (piece, keep) -> its v -> M v; `keep` keeps the graph for further products.
        shares: (batch, examples, size) -> s_k with M_b = sum_k s_k M_k over pieces of `size` examples; None where M_b
            is no such sum.
        sharding: where the sum goes on over ranks.
        chunk_size: examples in a piece; None: as many as GRAPH_BYTES allow.
        output_bytes: of an example, which no graph counts; COPIES of a piece's are held during a product.
    """

    def __init__(
        self,
        params: Sequence[Tensor],
        batches: Callable[[], Iterable[tuple[float, int, Any]]],
        product: Callable[[Any, bool], Product],
        shares: Callable[[Any, int, int], Sequence[float] | None],
        sharding: Sharding,
        *,
        chunk_size: int | None = None,
        output_bytes: int = 0,
    ):
        self._params, self._batches, self._product, self._shares = params, batches, product, shares
        self._sharding, self._chunk_size = sharding, chunk_size
        self._graph_bytes, self._kept_bytes = budgets(params[0].device)
        self._output_bytes = output_bytes
        self._divisions: list[tuple[int, Sequence[float]]] = []  # of each batch: size of a piece, and their shares
        self._kept: list[tuple[float, Product]] = []
        self._all_kept = False
        sharding.together(self._keep_first)

    def __call__(self, v: Sequence[Tensor]) -> list[Tensor]:
        return self._sharding.all_reduce(lambda: self._local(v))

    def pieces(self) -> Iterator[tuple[float, int, Any]]:
        """(weight, examples, piece), in order."""
        for i, (weight, n, batch) in enumerate(self._batches()):
            if len(self._divisions) == i:
                self._divisions.append(self._division(batch, n))
            size, shares = self._divisions[i]
            for share, (k, piece) in zip(shares, divided(batch, n, size), strict=True):
                if share:
                    yield weight * share, k, piece

    def _local(self, v: Sequence[Tensor]) -> list[Tensor]:
        """The sum over the batches of this rank."""
        total = Sum(self._params)
        for weight, product in self._kept:
            total.add(product(v), weight)
        if not self._all_kept:
            for i, (weight, _, piece) in enumerate(self.pieces()):
                if i >= len(self._kept):
                    total.add(self._product(piece, False)(v), weight)
        return total.tensors

    def _keep_first(self) -> None:
        """A loss of one piece keeps its graph whatever that takes: streaming it would need no less."""
        saved, heaviest = SavedBytes(self._params), 0.0
        for weight, k, piece in self.pieces():
            if self._kept and saved.count + heaviest * weight > self._kept_bytes:
                return
            before = saved.count
            with saved.counting():
                product = self._product(piece, True)
            saved.count += k * self._output_bytes
            if saved.count > self._kept_bytes and weight < 1:
                return
            self._kept.append((weight, product))
            heaviest = max(heaviest, (saved.count - before) / weight)
        self._all_kept = True

    def _division(self, batch: Any, n: int) -> tuple[int, Sequence[float]]:
        """How many examples of this batch go through one graph, and the shares of the pieces."""
        size, most = self._chunk_size, max(self._graph_bytes // max(COPIES * self._output_bytes, 1), 1)
        if n <= min(size or PROBE, most) or len(divided(batch, n, 1)) == 1:
            return n, [1.0]
        if size is None and most <= PROBE:
            size = most
        elif size is None:
            saved = SavedBytes(self._params)
            with saved.counting():
                self._product(part(batch, 0, PROBE), True)
            size = min(most, max(PROBE, int(self._graph_bytes * PROBE // max(saved.count, 1))))
        shares = self._shares(batch, n, size) if size < n else None
        return (n, [1.0]) if shares is None else (size, shares)


def budgets(device: torch.device) -> tuple[int, int]:
    """(bytes of one graph, bytes of all graphs that are kept)."""
    if device.type != "cuda":
        return GRAPH_BYTES, KEPT_BYTES
    share = torch.cuda.get_device_properties(device).total_memory // DEVICE_SHARE
    return share, share


class SavedBytes:
    """Counts what graphs save for their backward passes; parameters do not count, they are there anyway."""

    def __init__(self, params: Sequence[Tensor]):
        self.count = 0
        self._seen = {p.untyped_storage().data_ptr() for p in params}

    @contextmanager
    def counting(self) -> Iterator[None]:
        with torch.autograd.graph.saved_tensors_hooks(self._pack, _unpack):
            yield

    def _pack(self, x: Tensor) -> tuple[Tensor, int]:
        storage = x.untyped_storage()
        if storage.data_ptr() not in self._seen:
            self._seen.add(storage.data_ptr())
            self.count += storage.nbytes()
        return x.detach(), x._version  # an output that is saved with its graph would never be freed


def _unpack(packed: tuple[Tensor, int]) -> Tensor:
    """Checks for changes in place, which autograd does not do for tensors with hooks."""
    x, version = packed
    if x._version != version:
        raise RuntimeError(
            "one of the variables needed for gradient computation has been modified by an inplace operation: "
            f"{list(x.shape)} is at version {x._version}, saved at version {version}"
        )
    return x


class Sum:
    """A weighted sum of vectors, in float32 or better."""

    def __init__(self, params: Sequence[Tensor]):
        self.tensors = [torch.zeros_like(w, dtype=torch.promote_types(w.dtype, torch.float32)) for w in params]

    def add(self, vector: Sequence[Tensor], weight: float) -> None:
        for total, x in zip(self.tensors, vector, strict=True):
            total.add_(x.detach(), alpha=weight)
