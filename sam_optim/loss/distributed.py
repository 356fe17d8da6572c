"""Sharded batches: each rank holds some of the batches of one loss, and all ranks get the results of all of them."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sam_optim.loss.batches import checksum, moved

T = TypeVar("T")


class Sharding:
    """Which batches are on which rank. With one process, or `distributed=False`, every method is the identity.

    Batches are dealt out in turn: batch i of every rank comes before batch i + 1 of any, so that shards
    `batches[rank::world_size]` are put back in their first order.

    Raises:
        ValueError: distributed=True without an initialized process group.
    """

    def __init__(self, distributed: bool | None):
        running = dist.is_available() and dist.is_initialized()
        if distributed and not running:
            raise ValueError("distributed=True needs torch.distributed.init_process_group(), also under torchrun")
        self.num_ranks = dist.get_world_size() if running and distributed is not False else 1
        self.is_single = self.num_ranks == 1
        self.rank = dist.get_rank() if running else 0

    def check(self, fingerprints: Sequence[tuple[int, int]], params: Iterable[Tensor]) -> None:
        """Raises ValueError where two ranks hold the same batches, or different weights."""
        if self.is_single:
            return
        shards, weights = zip(*self.all_gather((list(fingerprints), checksum(list(params)))), strict=True)
        for rank in range(self.num_ranks):
            if weights[rank] != weights[0]:
                raise ValueError(f"rank {rank} holds other weights than rank 0: load the same checkpoint on all ranks")
            if shards[rank] and shards[rank] in shards[:rank]:
                raise ValueError(
                    f"ranks {shards.index(shards[rank])} and {rank} hold the same batches, which would count twice: "
                    "give each its share, batches[rank::world_size], or pass distributed=False to measure on each alone"
                )

    def all_gather(self, value: T) -> list[T]:
        """The value of each rank."""
        if self.is_single:
            return [value]
        values: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(values, value)
        return values

    def any(self, value: bool) -> bool:
        """Whether it is true on some rank."""
        return True in self.all_gather(value)

    def interleave(self, local: Sequence[T]) -> list[T]:
        """One entry for each batch of this rank -> one for each batch of all ranks, in their order."""
        shards = self.all_gather(list(local))
        return [shard[i] for i in range(max(map(len, shards))) for shard in shards if i < len(shard)]

    def together(self, compute: Callable[[], T]) -> T:
        """`compute()`. If it raises on one rank, all ranks raise, and none waits for another."""
        if self.is_single:
            return compute()
        value, error = None, None
        try:
            value = compute()
        except Exception as raised:
            error = raised
        messages = self.all_gather(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, message in enumerate(messages):
            if message is not None:
                raise RuntimeError(f"rank {rank} failed: {message}")
        return value  # type: ignore[return-value]

    def interleave_together(self, compute: Callable[[], Sequence[Any]], device: torch.device) -> list[Any]:
        """What `compute` returns for the batches of this rank -> for those of all ranks, tensors on the device."""
        local = self.together(compute)
        if self.is_single:
            return list(local)
        return [moved(x, device) for x in self.interleave(moved(local, torch.device("cpu")))]

    def all_reduce(self, compute: Callable[[], list[Tensor]]) -> list[Tensor]:
        """The sums over ranks of the tensors that `compute` returns; the same bits on all."""
        local = self.together(compute)
        if self.is_single:
            return local
        total = torch.cat([x.flatten() for x in local])
        dist.all_reduce(total)
        return [x.view_as(t) for x, t in zip(total.split([t.numel() for t in local]), local, strict=True)]
