"""The batches of one loss shared out over processes: what each of them computes, all of them get."""

from __future__ import annotations

import zlib
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from sam_optim.loss.batches import moved

T = TypeVar("T")


class Shares:
    """Who has which batches. With one process, or `distributed=False`, all that follows is the identity.

    The order of the batches is that of dealing them out in turn: batch i of every rank before batch i + 1 of any, so
    that shares `batches[rank::world_size]` are put back in the order that they had.

    Raises:
        ValueError: distributed=True without an initialised process group.
    """

    def __init__(self, distributed: bool | None):
        running = dist.is_available() and dist.is_initialized()
        if distributed and not running:
            raise ValueError("distributed=True needs torch.distributed.init_process_group(), also under torchrun")
        self.num_ranks = dist.get_world_size() if running and distributed is not False else 1
        self.is_one = self.num_ranks == 1

    def check(self, batches: Sequence[tuple[int, int]], params: Iterable[Tensor]) -> None:
        """Raises ValueError where two ranks hold the same batches, or other weights than the first."""
        if self.is_one:
            return
        found = self.gathered((list(batches), _checksum(params)))
        for rank, (own, weights) in enumerate(found):
            if weights != found[0][1]:
                raise ValueError(f"rank {rank} holds other weights than rank 0: load the same checkpoint on all ranks")
            if own and own in [theirs for theirs, _ in found[:rank]]:
                first = [theirs for theirs, _ in found].index(own)
                raise ValueError(
                    f"ranks {first} and {rank} hold the same batches, which would count twice: give each its share, "
                    "batches[rank::world_size], or pass distributed=False to measure on each rank alone"
                )

    def gathered(self, value: T) -> list[T]:
        """The value of each rank."""
        if self.is_one:
            return [value]
        found: list[Any] = [None] * self.num_ranks
        dist.all_gather_object(found, value)
        return found

    def dealt(self, own: Sequence[T]) -> list[T]:
        """One entry for each batch of this rank -> one for each batch of all ranks, in their order."""
        if self.is_one:
            return list(own)
        lists = self.gathered(list(own))
        return [x[i] for i in range(max(map(len, lists))) for x in lists if i < len(x)]

    def together(self, compute: Callable[[], T]) -> T:
        """`compute()`, which may raise on one rank alone: then all raise, and none waits for another."""
        if self.is_one:
            return compute()
        value, error = None, None
        try:
            value = compute()
        except Exception as found:
            error = found
        said = self.gathered(None if error is None else f"{type(error).__name__}: {error}")
        if error is not None:
            raise error
        for rank, text in enumerate(said):
            if text is not None:
                raise RuntimeError(f"rank {rank} failed: {text}")
        return value  # type: ignore[return-value]

    def dealt_together(self, compute: Callable[[], Sequence[Any]], device: torch.device) -> list[Any]:
        """What `compute` returns for the batches of this rank -> for those of all ranks, tensors on the device."""
        own = self.together(compute)
        return list(own) if self.is_one else [moved(x, device) for x in self.dealt(moved(own, torch.device("cpu")))]

    def summed(self, compute: Callable[[], list[Tensor]]) -> list[Tensor]:
        """The sums over ranks of the tensors that `compute` returns; the same bits on all."""
        tensors = self.together(compute)
        if self.is_one:
            return tensors
        everything = torch.cat([x.flatten() for x in tensors])
        dist.all_reduce(everything)
        return [x.view_as(t) for x, t in zip(everything.split([t.numel() for t in tensors]), tensors, strict=True)]


def _checksum(params: Iterable[Tensor]) -> int:
    checksum = 0
    for w in params:
        entries = w.detach().flatten()[:: max(1, w.numel() // 1024)].cpu().contiguous()
        checksum = zlib.crc32(entries.view(torch.uint8).numpy().data, checksum) if len(entries) else checksum
    return checksum
