"""The order of the examples, and every other draw of a run, as functions of (seed, epoch): there is nothing to save."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator

import numpy as np
import torch
from torch.utils.data import Sampler

from sam_optim.rng import Stream


def derive(seed: int, *path: int | str) -> int:
    """A seed for one purpose, e.g. ("order", epoch): 48 bits that depend on every part."""
    digest = hashlib.blake2b(repr((seed, *path)).encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big")


def seed_all(seed: int) -> None:
    """The global generators, which timm's and torchvision's augmentations, mixup and dropout draw from."""
    random.seed(seed)
    np.random.seed(seed % 2**32)
    torch.manual_seed(seed)


class Order(Sampler[list[int]]):
    """Batches of indices into n examples; shuffled by (seed, epoch) alone, from `first_batch` of the epoch on."""

    def __init__(self, n: int, batch_size: int, *, shuffle: bool = False, drop_last: bool = False, seed: int = 0):
        self.n, self.batch_size, self.shuffle, self.drop_last, self.seed = n, batch_size, shuffle, drop_last, seed
        self.epoch = self.first_batch = 0

    def __len__(self) -> int:
        return self.n // self.batch_size if self.drop_last else -(-self.n // self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.arange(self.n)
        if self.shuffle:
            order = Stream(derive(self.seed, "order", self.epoch)).permutation(self.n)
        for i in range(self.first_batch, len(self)):
            yield order[i * self.batch_size : (i + 1) * self.batch_size].tolist()
