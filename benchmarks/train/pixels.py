"""Images in memory: batches by one gather, shifted and mirrored; as PIL images for augmentations that need these."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from benchmarks.train.images import Augment
from benchmarks.train.order import Order, derive
from benchmarks.train.ranks import ALONE, World
from sam_optim.core.random import Stream


class Pixels(TensorDataset):
    """Images in memory as uint8 (N, C, H, W); examples come out as float32, normalised."""

    def __init__(self, pixels: Tensor, labels: Tensor, mean: tuple[float, ...], std: tuple[float, ...]):
        super().__init__(pixels, labels)
        self.statistics = {"mean": list(mean), "std": list(std)}
        self.mean, self.std = (255 * torch.tensor(s).view(-1, 1, 1) for s in (mean, std))

    def normalise(self, pixels: Tensor) -> Tensor:
        return (pixels - self.mean) / self.std

    def __getitem__(self, index: Any) -> tuple[Tensor, Tensor]:
        pixels, labels = super().__getitem__(index)
        return self.normalise(pixels), labels


class Drawn(Dataset):
    """`Pixels` as PIL images, for augmentations that need these."""

    def __init__(self, pixels: Pixels):
        self.pixels, self.labels = pixels.tensors

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        pixels = self.pixels[i].movedim(0, -1).numpy()
        return Image.fromarray(pixels.squeeze(-1) if pixels.shape[-1] == 1 else pixels), int(self.labels[i])


class Batches:
    """Batches of tensors that are in memory: one gather each, no workers.

    Order and augmentation are functions of (seed, epoch); call `set_epoch` before each epoch, as with
    DistributedSampler.

    Args:
        shuffle: a new permutation for each epoch, else the order of the data.
        drop_last: leave out an incomplete last batch.
        augment: for `Pixels`: shift and mirror.
    """

    def __init__(
        self,
        dataset: TensorDataset,
        batch_size: int,
        *,
        shuffle: bool = False,
        drop_last: bool = False,
        seed: int = 0,
        augment: Augment | None = None,
        world: World = ALONE,
    ):
        self.dataset, self.seed, self.augment = dataset, seed, augment
        options = {"shuffle": shuffle, "drop_last": drop_last, "seed": seed}
        self.order = Order(len(dataset), batch_size, **options, rank=world.rank, size=world.size)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """The next iteration gives the batches of `epoch` from `first_batch` on."""
        self.order.epoch, self.order.first_batch = epoch, first_batch

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        inputs, labels = self.dataset.tensors
        for i, rows in enumerate(self.order, start=self.order.first_batch):
            rows = torch.tensor(rows)
            batch = inputs[rows]
            if isinstance(self.dataset, Pixels):
                if self.augment and not self.augment.off:
                    stream = Stream(derive(self.seed, "augment", self.order.epoch, i))
                    begin, end = self.order.batch(i)
                    drawn = (end - begin, self.order.share(i))
                    batch = shift_and_mirror(batch, self.augment.hflip, stream, drawn)
                batch = self.dataset.normalise(batch)
            yield batch, labels[rows]


def shift_and_mirror(pixels: Tensor, hflip: float, stream: Stream, drawn: tuple[int, slice] | None = None) -> Tensor:
    """Each image of (n, C, H, W) moved by at most H/8 with black borders, and mirrored with probability `hflip`.

    drawn: how many images the draws are for, and which of them these are; a rank draws for the batch of all ranks.
    """
    n, _, height, _ = pixels.shape
    total, own = drawn or (n, slice(None))
    padding = height // 8
    windows = F.pad(pixels, (padding,) * 4).unfold(2, height, 1).unfold(3, pixels.shape[3], 1)
    down, right = (stream.integers(2 * padding + 1, (total,))[own] for _ in range(2))
    moved = windows[torch.arange(n), :, down, right]
    mirrored = stream.uniform_like(torch.empty(total, 1, 1, 1))[own] < hflip
    return torch.where(mirrored, moved.flip(-1), moved)
