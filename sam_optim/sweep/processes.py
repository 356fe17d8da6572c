"""One command on several processes under torchrun: which one prints and writes, and what it sends to the others."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from sam_optim.core.errors import InputError, one_line

T = TypeVar("T")


@dataclass(frozen=True)
class Processes:
    """rank: of this one. count: how many there are. device: where this one measures."""

    rank: int
    count: int
    device: torch.device

    @property
    def is_first(self) -> bool:
        """The one that prints and writes."""
        return self.rank == 0

    def share(self, batches: Sequence[Any]) -> Sequence[Any]:
        """The batches of this process: every `count`-th, as `Loss` deals them."""
        return batches if self.count == 1 else batches[self.rank :: self.count]

    def of_first(self, make: Callable[[], T]) -> T:
        """What `make` returns or raises on the first process, on every process."""
        if self.count == 1:
            return make()
        outcome: list[Any] = [None, None]  # the value, the error
        if self.is_first:
            try:
                outcome = [make(), None]
            except ValueError as error:
                outcome = [None, one_line(error)]
        dist.broadcast_object_list(outcome, src=0)
        if outcome[1] is not None:
            raise InputError(outcome[1])
        return outcome[0]


def is_first_process() -> bool:
    """Whether this process, alone or one of torchrun's, is the one that prints."""
    return int(os.environ.get("RANK", "0")) == 0


@contextmanager
def started(device: str) -> Iterator[Processes]:
    """This process alone, or one of torchrun's, with gloo on the CPU and nccl on CUDA."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    rank = int(os.environ.get("RANK", "0"))
    local = os.environ.get("LOCAL_RANK", "0")
    usable = _usable(f"cuda:{local}" if device == "cuda" and count > 1 else device)
    if count == 1:
        yield Processes(0, 1, usable)
        return
    if usable.type == "cuda":
        torch.cuda.set_device(usable)
    starts = not dist.is_initialized()
    if starts:
        dist.init_process_group("nccl" if usable.type == "cuda" else "gloo")
    try:
        yield Processes(rank, count, usable)
    finally:
        if starts:
            dist.destroy_process_group()


def _usable(name: str) -> torch.device:
    try:
        device = torch.device(name)
        torch.empty(1, device=device).item()
    except (RuntimeError, AssertionError, NotImplementedError, ValueError) as error:
        raise InputError(f"--device {name} cannot be used here ({one_line(error)}); try --device cpu") from None
    return device
