"""Data sets that are read in order, shard after shard, as timm reads WebDataset: shuffled and resumed all the same."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from benchmarks.command import InputError, one_line
from benchmarks.train.order import derive, seed_here
from benchmarks.train.ranks import ALONE, World
from sam_optim.core import random as rng

FAULTS = (RuntimeError, AssertionError, ValueError, TypeError, OSError, ImportError, NameError, KeyError)


class Streamed(Dataset):
    """A split of a streamed data set of timm's, not opened yet: each epoch opens it anew, so that the order of its
    examples is a function of (seed, epoch) and of the number of workers and ranks."""

    def __init__(self, name: str, directory: Path, split: str):
        self.name, self.directory, self.split = name, directory, split
        self.num = len(self.open())

    def __len__(self) -> int:
        return self.num

    def open(
        self, *, train: bool = False, batch_size: int = 1, seed: int = 0, workers: int = 0, world: World = ALONE
    ) -> Any:
        """timm's data set; without `train` the whole split, whatever the number of ranks."""
        from timm.data import create_dataset

        try:
            found = create_dataset(
                self.name, str(self.directory), self.split, is_training=train, batch_size=batch_size, seed=seed
            )
        except FAULTS as error:
            raise InputError(f"timm cannot open {self.name} in {self.directory}: {one_line(error)}") from None
        reader = getattr(found, "reader", None)
        if hasattr(reader, "dist_num_replicas"):
            reader.dist_rank, reader.dist_num_replicas = (world.rank, world.size) if train else (0, 1)
        found.set_loader_cfg(num_workers=workers)
        return found


class StreamBatches:
    """Batches of a stream, decoded and augmented by `workers` processes.

    Every rank evaluates the whole split: shards cannot be dealt out so that each example is seen once. A resumed epoch
    reads again what it has seen, without handing it out. With `train` the order depends on `workers`.

    Args:
        transform: of `images.split_transform`.
    """

    def __init__(
        self,
        stream: Streamed,
        batch_size: int,
        transform: tuple[Any, Any],
        *,
        train: bool = False,
        seed: int = 0,
        workers: int = 0,
        pin_memory: bool = False,
        world: World = ALONE,
    ):
        self.stream, self.batch_size, self.train = stream, batch_size, train
        self.transform, self.collate = transform
        self.seed, self.workers, self.pin_memory, self.world = seed, workers, pin_memory, world
        self.epoch = self.first_batch = 0
        self.num = self._count()

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        self.epoch, self.first_batch = epoch, first_batch

    def __len__(self) -> int:
        return self.num

    def _open(self) -> Any:
        seed = derive(self.seed, "order", self.epoch) % 2**31
        return self.stream.open(
            train=self.train, batch_size=self.batch_size, seed=seed, workers=self.workers, world=self.world
        )

    def _count(self) -> int:
        n = len(self._open())
        return n // self.batch_size if self.train else -(-n // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        opened = self._open()
        if hasattr(opened, "set_epoch"):
            opened.set_epoch(self.epoch)
        purpose = ("augment", self.epoch, self.world.rank if self.train else 0)
        loader = DataLoader(
            _Transformed(opened, self.transform, self.seed, purpose),
            self.batch_size,
            collate_fn=self.collate,
            num_workers=self.workers,
            drop_last=self.train,
            pin_memory=self.pin_memory,
            generator=torch.Generator().manual_seed(derive(self.seed, "workers", self.epoch)),
        )
        for i, batch in enumerate(loader):
            if i >= self.first_batch:
                yield batch
            if i + 1 >= self.num and self.train:
                return


class _Transformed(IterableDataset):
    """The augmentation of a worker's k-th example is a function of (seed, epoch, rank, worker, k)."""

    def __init__(self, source: Any, transform: Any, seed: int, purpose: tuple[Any, ...]):
        self.source, self.transform, self.seed, self.purpose = source, transform, seed, purpose

    def __iter__(self) -> Iterator[tuple[Tensor, int]]:
        info = get_worker_info()
        worker = info.id if info else 0
        for k, (image, label) in enumerate(self.source):
            with rng.kept():
                seed_here(derive(self.seed, *self.purpose, worker, k))
                shown = self.transform(image)
            yield shown, int(label)
