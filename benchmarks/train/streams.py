"""Data sets that are read in order, shard after shard, as timm reads WebDataset: shuffled and resumed all the same."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info

from benchmarks.train.order import DEFAULT, Loading, derive, seed_here
from sam_optim.core import random as rng
from sam_optim.vision.data import open_timm


class Streamed(Dataset):
    """A split of a streamed data set of timm's, not opened yet: each epoch opens it again, so that the order of its
    examples is a function of (seed, epoch) and of the number of workers and ranks."""

    def __init__(self, name: str, directory: Path, split: str):
        self.name, self.directory, self.split = name, directory, split
        self.num = len(self.open())

    def __len__(self) -> int:
        return self.num

    def open(self, *, train: bool = False, batch_size: int = 1, loading: Loading = DEFAULT) -> Any:
        """timm's data set; without `train` the whole split, whatever the number of ranks."""
        options = {"is_training": train, "batch_size": batch_size, "seed": loading.seed}
        opened = open_timm(self.name, self.directory, self.split, **options)
        reader = getattr(opened, "reader", None)
        if hasattr(reader, "dist_num_replicas"):
            reader.dist_rank, reader.dist_num_replicas = (loading.world.rank, loading.world.size) if train else (0, 1)
        opened.set_loader_cfg(num_workers=loading.workers)
        return opened


class StreamBatches:
    """Batches of a stream, decoded and augmented by `workers` processes.

    Every rank evaluates the whole split: shards cannot be dealt out so that each example is seen once. A resumed epoch
    reads again what it has seen, without handing it out. With `train` the order depends on `workers`.

    Args:
        transform: what is done to each image, and what makes a batch of them, as from `batches.split_transform`.
    """

    def __init__(self, stream: Streamed, batch_size: int, transform: tuple[Any, Any], *, train: bool, loading: Loading):
        self.stream, self.batch_size, self.train, self.loading = stream, batch_size, train, loading
        self.transform, self.collate = transform
        self.epoch = self.first_batch = 0
        n = len(self._open())
        self.num = n // batch_size if train else -(-n // batch_size)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        self.epoch, self.first_batch = epoch, first_batch

    def __len__(self) -> int:
        return self.num

    def _open(self) -> Any:
        seed = derive(self.loading.seed, "order", self.epoch) % 2**31
        return self.stream.open(train=self.train, batch_size=self.batch_size, loading=replace(self.loading, seed=seed))

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        opened, loading = self._open(), self.loading
        if hasattr(opened, "set_epoch"):
            opened.set_epoch(self.epoch)
        purpose = ("augment", self.epoch, loading.world.rank if self.train else 0)
        loader = DataLoader(
            _Transformed(opened, self.transform, loading.seed, purpose),
            self.batch_size,
            collate_fn=self.collate,
            num_workers=loading.workers,
            drop_last=self.train,
            pin_memory=loading.pin_memory,
            generator=torch.Generator().manual_seed(derive(loading.seed, "workers", self.epoch)),
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
            with rng.preserved():
                seed_here(derive(self.seed, *self.purpose, worker, k))
                shown = self.transform(image)
            yield shown, int(label)
