"""Images that are files or torchvision examples: found, checked, decoded and augmented by timm and torchvision."""

from __future__ import annotations

import signal
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset

from benchmarks.command import InputError, one_line
from benchmarks.train import preprocessing
from benchmarks.train.models import SMALL
from benchmarks.train.order import Order, derive, seed_here
from benchmarks.train.streams import Streamed
from sam_optim.core import random as rng
from sam_optim.vision.images import TRAIN_FOLDERS, VALIDATION_FOLDERS, class_folders, read
from sam_optim.vision.images import labels_of as listed_labels


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
    off: bool = False

    @property
    def needs_pil(self) -> bool:
        return bool(self.auto_augment or self.color_jitter or self.erase) and not self.off


class Pictures(Dataset):
    """Decoded examples of `source`, a timm or torchvision data set of images, with our labels.

    rows: which of its examples, None for all. mode: "RGB" or "L". An image that cannot be read is an error: timm would
    put the next one in its place.
    """

    def __init__(self, source: Any, rows: Tensor | None, labels: Tensor, mode: str):
        self.source, self.labels, self.mode = source, labels, mode
        self.rows = torch.arange(len(labels)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Image.Image, int]:
        return read(self.source, int(self.rows[i]), self.mode), int(self.labels[i])


class Transformed(Dataset):
    """The augmentation of example i is a function of (seed, epoch, i) alone: the same for any number of workers, and
    after a resume."""

    def __init__(self, pictures: Dataset, transform: Any, seed: int, random: bool = True):
        self.pictures, self.transform, self.seed, self.epoch = pictures, transform, seed, 0
        self.random = random

    def __len__(self) -> int:
        return len(self.pictures)

    def __getitem__(self, i: int) -> tuple[Tensor, int]:
        return self.__getitems__([i])[0]

    def __getitems__(self, rows: list[int]) -> list[tuple[Tensor, int]]:
        """What DataLoader asks for: a batch."""
        with rng.kept():
            return [self._made(i) for i in rows]

    def _made(self, i: int) -> tuple[Tensor, int]:
        image, label = self.pictures[i]
        if self.random:
            seed_here(derive(self.seed, "augment", self.epoch, i))
        return self.transform(image), label


def folder_splits(directory: Path) -> tuple[Any, Any | None, Any]:
    """timm data sets for train, validation (if there are both val/ and test/) and test of a tree of class folders.

    timm itself silently takes the whole tree where the folder of a split is missing.
    """
    from timm.data import create_dataset

    train = _split_folder(directory, TRAIN_FOLDERS)
    test = _split_folder(directory, ("test",), required=False)
    validation = _split_folder(directory, VALIDATION_FOLDERS, required=test is None)
    if test is None:
        validation, test = None, validation
    classes = class_folders(train)
    class_map = {name: i for i, name in enumerate(classes)}
    found = []
    for folder in (train, validation, test):
        if folder is not None and (different := set(class_folders(folder)) ^ set(classes)):
            raise InputError(f"{folder} and {train} do not have the same classes: {', '.join(sorted(different)[:5])}")
        found.append(folder and create_dataset("", str(folder), search_split=False, class_map=class_map))
    return found[0], found[1], found[2]


def _split_folder(directory: Path, names: Sequence[str], required: bool = True) -> Path | None:
    for name in names:
        if (directory / name).is_dir():
            return directory / name
    if required:
        raise InputError(
            f"{directory} has no folder {' or '.join(names)}; give a tree DIR/train/CLASS/*.jpg, DIR/val/..."
        )
    return None


def timm_splits(name: str, directory: Path) -> tuple[Any, None, Any]:
    """Train and test of a data set that `timm.data.create_dataset` knows, e.g. torch/cifar10 or hfds/OWNER/NAME."""
    from timm.data import create_dataset

    def opened(split: str) -> Any:
        try:
            found = create_dataset(name, str(directory), split=split)
            return Streamed(name, directory, split) if isinstance(found, IterableDataset) else found
        except (RuntimeError, AssertionError, ValueError, TypeError, OSError, ImportError, NameError) as error:
            raise InputError(f"timm cannot open data set {name!r} in {directory}: {one_line(error)}") from None

    train = opened("train")
    try:
        return train, None, opened("validation")
    except InputError:  # some of Hugging Face's have only this one
        return train, None, opened("test")


def labels_of(source: Any) -> Tensor:
    """(n,) int64; decodes every example where the data set does not list its labels."""
    return torch.as_tensor(listed_labels(source), dtype=torch.int64)


def transform(image_size: tuple[int, int, int], augment: Augment | None) -> Any:
    """timm's transform, with the preprocessing of an `ImageSize`. In training of small images its resized crop gives
    way to a shift, as the field does."""
    from timm.data import create_transform
    from timm.data.transforms import str_to_interp_mode
    from torchvision.transforms import Compose, RandomCrop, Resize

    size, small = image_size[1:], image_size[1] <= SMALL
    common = {"input_size": tuple(image_size)} | preprocessing.of_size(image_size)
    if augment is None or augment.off:
        return create_transform(**common)
    try:
        result = create_transform(
            **common,
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
    if small:
        # images of that size come out of Resize as they are
        result.transforms[0] = Compose(
            [Resize(size, str_to_interp_mode(common["interpolation"])), RandomCrop(size, padding=size[0] // 8)]
        )
    return result


def split_transform(transform: Any) -> tuple[Any, Any]:
    """(what is done to each image, how a batch is made of them): numbers and normalisation are left to the batch, which
    takes a third of the time; not where random erasing comes after."""
    from timm.data.transforms import MaybeToTensor
    from torchvision.transforms import Compose, Normalize

    steps = transform.transforms
    if not (isinstance(steps[-2], MaybeToTensor) and isinstance(steps[-1], Normalize)):
        return transform, None
    return Compose(steps[:-2]), Normalising(steps[-1].mean, steps[-1].std)


class Normalising:
    """A batch of (image, label): (n, C, H, W) float32, (x / 255 - mean) / std, and (n,) int64."""

    def __init__(self, mean: Any, std: Any):
        self.mean, self.std = (255 * torch.as_tensor(s, dtype=torch.float32).view(-1, 1, 1) for s in (mean, std))

    def __call__(self, examples: list[tuple[Image.Image, int]]) -> tuple[Tensor, Tensor]:
        pixels = torch.from_numpy(np.stack([np.asarray(image) for image, _ in examples]))
        pixels = pixels.unsqueeze(1) if pixels.ndim == 3 else pixels.permute(0, 3, 1, 2)
        x = pixels.to(torch.float32, memory_format=torch.contiguous_format)
        return x.sub_(self.mean).div_(self.std), torch.tensor([label for _, label in examples])


class PictureBatches:
    """Batches of `Pictures`, or of other examples that are PIL images, decoded and augmented by `workers` processes;
    `set_epoch` as for `pixels.Batches`."""

    def __init__(
        self,
        pictures: Dataset,
        order: Order,
        transform: Any,
        *,
        seed: int = 0,
        workers: int = 0,
        pin_memory: bool = False,
        random: bool = True,
    ):
        one_by_one, together = split_transform(transform)
        self.examples, self.order = Transformed(pictures, one_by_one, seed, random), order
        self.loader = DataLoader(
            self.examples,
            batch_sampler=order,
            collate_fn=together,
            num_workers=workers,
            pin_memory=pin_memory,
            worker_init_fn=_start_worker,
            generator=torch.Generator(),  # its own: iterating must not advance the global one
        )

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        self.examples.epoch = self.order.epoch = epoch
        self.order.first_batch = first_batch

    def __len__(self) -> int:
        return len(self.order)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        return iter(self.loader)


def _start_worker(_: int) -> None:
    """Ctrl-C reaches the whole process group: the main process decides, workers go on until it tells them."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
