"""The order of the examples, and every other draw of a run, as functions of (seed, epoch): there is nothing to save."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch.utils.data import Sampler

from benchmarks.train.ranks import ALONE, World
from sam_optim.core.random import Stream


def derive(seed: int, *path: int | str) -> int:
    """A seed for one purpose, e.g. ("order", epoch): 48 bits that depend on every part."""
    digest = hashlib.blake2b(repr((seed, *path)).encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big")


def seed_all(seed: int) -> None:
    """The global generators, which timm's and torchvision's augmentations, mixup and dropout draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


def seed_here(seed: int) -> None:
    """As `seed_all`, but of torch's generators only that of the CPU: images are made there.

    (`torch.manual_seed` also notes for each device, with a formatted stack, that it will be seeded: 0.3 ms.)
    """
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.default_generator.manual_seed(seed)


@dataclass(frozen=True)
class Loading:
    """How batches are made, whatever is in them. workers: processes that decode images. world: of the processes that
    train together."""

    seed: int = 0
    workers: int = 0
    pin_memory: bool = False
    world: World = ALONE


DEFAULT = Loading()


class Order(Sampler[list[int]]):
    """Batches of indices into n examples; shuffled by (seed, epoch) alone, from `first_batch` of the epoch on.

    With several ranks each has `batch_size` of every batch of size * batch_size: together they see the batches of one
    process with that batch size. Where a batch cannot be whole (`drop_last` is False), all batches become nearly
    equal, so that every rank has as many batches as the others and each example is seen once.
    """

    def __init__(
        self, n: int, batch_size: int, *, shuffle: bool = False, drop_last: bool = False, loading: Loading = DEFAULT
    ):
        self.n, self.batch_size, self.shuffle, self.drop_last, self.loading = n, batch_size, shuffle, drop_last, loading
        self.rank, self.size = loading.world.rank, loading.world.size
        self.epoch = self.first_batch = 0

    def __len__(self) -> int:
        together = self.batch_size * self.size
        return self.n // together if self.drop_last else -(-self.n // together)

    def batch(self, i: int) -> tuple[int, int]:
        """Begin and end, in the order, of batch i of all ranks together."""
        if self.drop_last or self.size == 1:
            together = self.batch_size * self.size
            return i * together, min((i + 1) * together, self.n)
        return i * self.n // len(self), (i + 1) * self.n // len(self)

    def share(self, i: int) -> slice:
        """Which part of that batch is this rank's."""
        return self.shares(i)[self.rank]

    def shares(self, i: int) -> list[slice]:
        """Which part of it is each rank's."""
        begin, end = self.batch(i)
        n = end - begin
        return [slice(rank * n // self.size, (rank + 1) * n // self.size) for rank in range(self.size)]

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.arange(self.n)
        if self.shuffle:
            order = Stream(derive(self.loading.seed, "order", self.epoch)).permutation(self.n)
        for i in range(self.first_batch, len(self)):
            begin, end = self.batch(i)
            yield order[begin:end][self.share(i)].tolist()
