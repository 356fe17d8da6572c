"""Batches of a split: gathered from memory, or decoded and augmented by timm and torchvision in processes."""

from __future__ import annotations

import signal
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from benchmarks.train.data import Examples
from benchmarks.train.order import DEFAULT, Loading, Order, derive, seed_here
from benchmarks.train.streams import StreamBatches, Streamed
from sam_optim.core import random as rng
from sam_optim.core.errors import InputError, one_line
from sam_optim.core.random import Stream
from sam_optim.vision.models import SMALL
from sam_optim.vision.preprocessing import Preprocessing


@dataclass(frozen=True)
class Augment:
    """How training images vary. Up to 64 pixels the crop is a shift of at most 1/8, above it timm's resized crop.

    hflip: probability of a mirror image. auto_augment: timm's string, e.g. "rand-m9-mstd0.5". color_jitter: strength.
    erase: probability of random erasing. scale: smallest area of a resized crop.
    """

    hflip: float = 0.5
    auto_augment: str | None = None
    color_jitter: float = 0.0
    erase: float = 0.0
    scale: float = 0.08

    @property
    def needs_pil(self) -> bool:
        return bool(self.auto_augment or self.color_jitter or self.erase)


def batches(
    examples: Examples | Streamed,
    batch_size: int,
    preprocessing: Preprocessing,
    *,
    train: bool = False,
    augment: Augment | None = None,
    loading: Loading = DEFAULT,
) -> MemoryBatches | PictureBatches | StreamBatches:
    """Batches of a split: shuffled, augmented and without an incomplete last batch for training, else all in order.

    With several ranks these are of `batch_size` on each. Order and augmentation are functions of (seed, epoch): call
    `set_epoch` before each epoch, as with DistributedSampler.
    """
    if len(examples) == 0:
        raise InputError("a split of the data has no examples; lower --validation-fraction")
    augment = augment if train else None
    if isinstance(examples, Streamed):
        transforms = split_transform(transform(preprocessing, augment))
        return StreamBatches(examples, batch_size, transforms, train=train, loading=loading)
    size = loading.world.size
    if len(examples) < size:
        raise InputError(f"a split has {len(examples)} examples for {size} processes; start fewer")
    whole = len(examples) < batch_size * size  # fewer examples than one batch: that one is not left out
    order = Order(len(examples), batch_size, shuffle=train, drop_last=train and not whole, loading=loading)
    if examples.x is not None and not (augment and augment.needs_pil):
        return MemoryBatches(examples, order, preprocessing, augment)
    return PictureBatches(examples, order, transform(preprocessing, augment), loading, random=augment is not None)


class MemoryBatches:
    """One gather each, no workers; pixels are shifted, mirrored and normalized as a batch."""

    def __init__(self, examples: Examples, order: Order, preprocessing: Preprocessing, augment: Augment | None = None):
        self.examples, self.order, self.augment = examples, order, augment
        self.mean, self.std = (255 * torch.tensor(s).view(-1, 1, 1) for s in (preprocessing.mean, preprocessing.std))

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """The next iteration gives the batches of `epoch` from `first_batch` on."""
        self.order.epoch, self.order.first_batch = epoch, first_batch

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        assert self.examples.x is not None
        for i, rows in enumerate(self.order, start=self.order.first_batch):
            x = self.examples.x[rows]
            if not self.examples.normalized:
                x = self._augmented(x, i) if self.augment else x
                x = (x - self.mean) / self.std
            yield x, self.examples.labels[rows]

    def _augmented(self, pixels: Tensor, i: int) -> Tensor:
        stream = Stream(derive(self.order.loading.seed, "augment", self.order.epoch, i))
        begin, end = self.order.batch(i)
        drawn = (end - begin, self.order.share(i))
        return shift_and_mirror(pixels, self.augment.hflip, stream, drawn)  # type: ignore[union-attr]


def shift_and_mirror(pixels: Tensor, hflip: float, stream: Stream, drawn: tuple[int, slice] | None = None) -> Tensor:
    """Each image of (n, C, H, W) moved by at most H/8 with black borders, and mirrored with probability `hflip`.

    drawn: how many images the draws are for, and which of them these are; a rank draws for the batch of all ranks.
    """
    n, _, height, _ = pixels.shape
    total, share = drawn or (n, slice(None))
    padding = height // 8
    windows = F.pad(pixels, (padding,) * 4).unfold(2, height, 1).unfold(3, pixels.shape[3], 1)
    down, right = (stream.integers(2 * padding + 1, (total,))[share] for _ in range(2))
    moved = windows[torch.arange(n), :, down, right]
    mirrored = stream.uniform_like(torch.empty(total, 1, 1, 1))[share] < hflip
    return torch.where(mirrored, moved.flip(-1), moved)


class PictureBatches:
    """Batches of examples that are PIL images, decoded and augmented by `workers` processes.

    random: whether the transform draws anything.
    """

    def __init__(self, examples: Dataset, order: Order, transform: Any, loading: Loading, *, random: bool = True):
        one_by_one, together = split_transform(transform)
        self.pictures, self.order = Transformed(examples, one_by_one, loading.seed, random), order
        self.loader = DataLoader(
            self.pictures,
            batch_sampler=order,
            collate_fn=together,
            num_workers=loading.workers,
            pin_memory=loading.pin_memory,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # its own: iterating must not advance the global one
        )

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        self.pictures.epoch = self.order.epoch = epoch
        self.order.first_batch = first_batch

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.loader)


def _start_worker(_: int) -> None:
    """Ctrl-C reaches the whole process group: the main process decides; workers continue until it stops them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


class Transformed(Dataset):
    """The augmentation of example i is a function of (seed, epoch, i) alone: the same for any number of workers, and
    after a resume."""

    def __init__(self, examples: Dataset, transform: Any, seed: int, random: bool = True):
        self.examples, self.transform, self.seed, self.epoch = examples, transform, seed, 0
        self.random = random

    def __len__(self) -> int:
        return len(self.examples)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.__getitems__([i])[0]

    def __getitems__(self, rows: list[int]) -> list[tuple[Tensor, int]]:
        """What DataLoader asks for: a batch."""
        with rng.preserved():
            return [self._transformed(i) for i in rows]

    def _transformed(self, i: int) -> tuple[Tensor, int]:
        image, label = self.examples[i]
        if self.random:
            seed_here(derive(self.seed, "augment", self.epoch, i))
        return self.transform(image), label


def transform(preprocessing: Preprocessing, augment: Augment | None) -> Any:
    """timm's transform, for evaluation without `augment`. In training of small images its resized crop gives way to a
    shift, as the field does."""
    from timm.data import create_transform
    from timm.data.transforms import str_to_interp_mode
    from torchvision.transforms import Compose, RandomCrop, Resize

    if augment is None:
        return preprocessing.transform()
    try:
        result = create_transform(
            **preprocessing.arguments(),
            is_training=True,
            hflip=augment.hflip,
            auto_augment=augment.auto_augment,
            color_jitter=augment.color_jitter,
            re_prob=augment.erase,
            re_mode="pixel",
            scale=(augment.scale, 1.0),
        )
    except (AssertionError, ValueError, KeyError) as error:
        raise InputError(
            f"--aa {augment.auto_augment!r} is not one of timm's: {one_line(error)}; try rand-m9-mstd0.5"
        ) from None
    size = preprocessing.image_size[1:]
    if size[0] <= SMALL:  # images of that size come out of Resize as they are
        resize = Resize(size, str_to_interp_mode(preprocessing.interpolation))
        result.transforms[0] = Compose([resize, RandomCrop(size, padding=size[0] // 8)])
    return result


def split_transform(transform: Any) -> tuple[Any, Any]:
    """(what is done to each image, how a batch is made of them): numbers and normalization are left to the batch, which
    takes a third of the time; not where random erasing comes after."""
    from timm.data.transforms import MaybeToTensor
    from torchvision.transforms import Compose, Normalize

    steps = transform.transforms
    if not (isinstance(steps[-2], MaybeToTensor) and isinstance(steps[-1], Normalize)):
        return transform, None
    return Compose(steps[:-2]), Normalizing(steps[-1].mean, steps[-1].std)


class Normalizing:
    """A batch of (image, label): (n, C, H, W) float32, (x / 255 - mean) / std, and (n,) int64."""

    def __init__(self, mean: Any, std: Any):
        self.mean, self.std = (255 * torch.as_tensor(s, dtype=torch.float32).view(-1, 1, 1) for s in (mean, std))

    def __call__(self, examples: list[tuple[Image.Image, int]]) -> tuple[Tensor, Tensor]:
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image, _ in examples]))
        pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        x = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        return x.sub_(self.mean).div_(self.std), torch.tensor([label for _, label in examples])
