"""Data sets: scikit-learn's digits in memory, CIFAR in torchvision's layout, image folders, whatever timm knows."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from benchmarks.command import InputError, unknown
from benchmarks.train import cifar, images
from benchmarks.train.images import Augment, PictureBatches, Pictures
from benchmarks.train.models import SMALL
from benchmarks.train.order import Order, derive
from benchmarks.train.pixels import Batches, Drawn, Pixels
from benchmarks.train.preprocessing import DEFAULT, ImageSize, Preprocessing, of_size, per_channel
from benchmarks.train.ranks import ALONE, World
from benchmarks.train.streams import StreamBatches, Streamed
from sam_optim.core.random import Stream
from sam_optim.vision import arrays
from sam_optim.vision.arrays import DIGITS_TRAIN


class Splits(NamedTuple):
    """train has the labels that training sees; validation (held out of train) and test are never made noisy.

    image_size: (C, H, W). clean_train_labels: (N,) int64, the labels before noise; empty where they are not known
    without reading every example.
    """

    train: Dataset
    validation: Dataset | None
    test: Dataset
    num_classes: int
    image_size: tuple[int, int, int]
    clean_train_labels: Tensor


def digits(
    *, label_noise: float = 0.0, seed: int = 0, validation_fraction: float = 0.0, num_train: int | None = None
) -> Splits:
    """scikit-learn's 1,797 handwritten digits, 8x8: the first 898 for training, the last 899 for testing.

    That is the split of scikit-learn's example "Recognizing hand-written digits" (unshuffled halves). Images are
    float32 (N, 1, 8, 8), scaled to [0, 1], then normalised with the mean and standard deviation of the 898.

    Args:
        label_noise: fraction of the training labels that is replaced by a label drawn uniformly from all ten.
        seed: draws the noise, and which examples go to validation and to a smaller training set.
        validation_fraction: fraction of the 898 held out, with clean labels.
        num_train: this many training examples, drawn from the others; None for all.
    """
    images, labels = arrays.digits()
    kept, held = hold_out(DIGITS_TRAIN, validation_fraction, seed, num_train)
    clean = labels[kept]
    return Splits(
        train=TensorDataset(images[kept], noisy(clean, 10, label_noise, seed)),
        validation=TensorDataset(images[held], labels[held]) if len(held) else None,
        test=TensorDataset(images[DIGITS_TRAIN:], labels[DIGITS_TRAIN:]),
        num_classes=10,
        image_size=(1, 8, 8),
        clean_train_labels=clean,
    )


def hold_out(n: int, fraction: float, seed: int, num_train: int | None = None) -> tuple[Tensor, Tensor]:
    """Sorted indices of the examples to train on, and of round(fraction * n) drawn for validation."""
    if not 0 <= fraction < 1:
        raise InputError(f"--validation-fraction is a part of the training set and must be in [0, 1), got {fraction}")
    order = Stream(derive(seed, "validation")).permutation(n)
    num_held = round(fraction * n)
    num_train = n - num_held if num_train is None else num_train
    if not 0 < num_train <= n - num_held:
        raise InputError(f"there are {n - num_held} examples to train on, --train-examples cannot be {num_train}")
    return order[num_held : num_held + num_train].sort().values, order[:num_held].sort().values


def noisy(labels: Tensor, num_classes: int, fraction: float, seed: int) -> Tensor:
    """A copy with exactly round(fraction * n) labels drawn anew, uniformly: 1 in num_classes of them stays right."""
    if not 0 <= fraction <= 1:
        raise InputError(f"--label-noise is a fraction of the training labels and must be in [0, 1], got {fraction}")
    stream = Stream(derive(seed, "label noise"))
    chosen = stream.permutation(len(labels))[: round(fraction * len(labels))]
    result = labels.clone()
    result[chosen] = stream.integers(num_classes, (len(chosen),))
    return result


def load(
    name: str,
    directory: str | Path | None = None,
    *,
    label_noise: float = 0.0,
    train_labels: str | None = None,
    seed: int = 0,
    validation_fraction: float = 0.0,
    num_train: int | None = None,
    image_size: int | None = None,
    default_size: tuple[int, int] = (224, 224),
    num_classes: int | None = None,
    preprocessing: Preprocessing = DEFAULT,
) -> Splits:
    """A data set by name. Nothing is downloaded.

    Args:
        name: "digits"; "cifar10", "cifar100" (torchvision's layout under `directory`); "folder" (or "", "imagefolder",
            "imagenet"): directory/train/CLASS/*, directory/val or test/CLASS/*; else a name of timm's create_dataset.
        train_labels: FILE.npz:ARRAY, other labels for the training images of CIFAR, in the order of its files (those of
            CIFAR-10N, say); a FILE that is not here is looked for under `directory`. Validation keeps its own.
        image_size: H = W; None keeps images of at most 64 pixels as they are and takes `default_size` for others.
        num_classes: of a streamed data set ("wds/"), whose labels nobody has counted.
        preprocessing: of images that are decoded; of it images in memory take mean and std, where these are given.
    """
    common = {"label_noise": label_noise, "seed": seed, "validation_fraction": validation_fraction}
    common["num_train"] = num_train
    if train_labels is not None and (name not in cifar.LAYOUT or label_noise):
        raise InputError("--train-labels replaces those of cifar10 or cifar100, and --label-noise must be left out")
    if name == "digits":
        if directory is not None or image_size not in (None, 8):
            raise InputError("digits come with scikit-learn, 8x8: leave --data-dir and --img-size out")
        return digits(**common)
    if directory is None:
        raise InputError(f"--data {name} needs --data-dir DIR; only digits are embedded")
    directory = Path(directory)
    if not directory.is_dir():
        raise InputError(f"--data-dir {directory} is not a directory")
    if name in cifar.LAYOUT and image_size in (None, 32):
        return _in_memory(name, directory, preprocessing, train_labels=train_labels, **common)
    if name in cifar.LAYOUT:
        raise InputError(f"--data {name} has images of 32 pixels: leave --img-size out, or use --data torch/{name}")
    if name in ("", "folder", "imagefolder", "imagenet"):
        return _pictures(images.folder_splits(directory), "RGB", image_size, default_size, preprocessing, **common)
    if "/" not in name:
        known = ["digits", *cifar.LAYOUT, "folder", "torch/NAME", "hfds/NAME", "hfids/NAME", "wds/NAME", "tfds/NAME"]
        raise unknown("data set", name, known)
    found = images.timm_splits(name, directory)
    if isinstance(found[0], Streamed):
        size = (image_size, image_size) if image_size else default_size
        return _streamed(found, ImageSize((3, *size), preprocessing), num_classes, **common)
    return _pictures(found, None, image_size, default_size, preprocessing, **common)


def _in_memory(
    name: str,
    directory: Path,
    preprocessing: Preprocessing,
    *,
    train_labels: str | None,
    label_noise: float,
    seed: int,
    validation_fraction: float,
    num_train: int | None,
) -> Splits:
    (train, labels), (test, test_labels) = cifar.read(name, directory)
    num_classes = int(name.removeprefix("cifar"))
    given = labels if train_labels is None else cifar.other_labels(train_labels, labels, num_classes, directory)
    kept, held = hold_out(len(train), validation_fraction, seed, num_train)
    mean, std = cifar.STATISTICS[name]
    statistics = (
        per_channel("--mean", preprocessing.mean or mean, 3),
        per_channel("--std", preprocessing.std or std, 3),
    )
    return Splits(
        train=Pixels(train[kept], noisy(given[kept], num_classes, label_noise, seed), *statistics),
        validation=Pixels(train[held], labels[held], *statistics) if len(held) else None,
        test=Pixels(test, test_labels, *statistics),
        num_classes=num_classes,
        image_size=(3, 32, 32),
        clean_train_labels=labels[kept],
    )


def _pictures(
    found: tuple[Any, Any, Any],
    mode: str | None,
    image_size: int | None,
    default_size: tuple[int, int],
    preprocessing: Preprocessing,
    *,
    label_noise: float,
    seed: int,
    validation_fraction: float,
    num_train: int | None,
) -> Splits:
    train, validation, test = found
    labels, test_labels = images.labels_of(train), images.labels_of(test)
    first = images.read(train, 0, mode)
    mode = mode or ("L" if first.mode in ("1", "L", "I", "I;16", "F") else "RGB")
    height_width = (first.height, first.width) if max(first.size) <= SMALL else default_size
    size = (len(mode) if mode == "RGB" else 1, *((image_size, image_size) if image_size else height_width))
    num_classes = int(labels.max()) + 1
    kept, held = hold_out(len(labels), validation_fraction, seed, num_train)
    if len(held) and validation is not None:
        raise InputError("there is a validation folder already: leave --validation-fraction out")
    if len(held):
        held_out = Pictures(train, held, labels[held], mode)
    else:
        held_out = validation and Pictures(validation, None, images.labels_of(validation), mode)
    return Splits(
        train=Pictures(train, kept, noisy(labels[kept], num_classes, label_noise, seed), mode),
        validation=held_out,
        test=Pictures(test, None, test_labels, mode),
        num_classes=num_classes,
        image_size=ImageSize(size, preprocessing),
        clean_train_labels=labels[kept],
    )


def _streamed(
    found: tuple[Any, Any, Any],
    size: ImageSize,
    num_classes: int | None,
    *,
    label_noise: float,
    seed: int,
    validation_fraction: float,
    num_train: int | None,
) -> Splits:
    if num_classes is None:
        raise InputError("a streamed data set does not tell how many classes it has: give --num-classes")
    if label_noise or validation_fraction or num_train is not None:
        raise InputError(
            "--label-noise, --validation-fraction, --train-examples pick examples; a stream has no numbers"
        )
    return Splits(found[0], found[1], found[2], num_classes, size, torch.empty(0, dtype=torch.int64))


def labels(dataset: Dataset) -> Tensor:
    """(n,) int64, the labels that training sees; empty for a stream."""
    if isinstance(dataset, Streamed):
        return torch.empty(0, dtype=torch.int64)
    return dataset.tensors[1] if isinstance(dataset, TensorDataset) else dataset.labels


def some(dataset: Dataset, num: int) -> Dataset:
    """`num` examples of a split, evenly spaced, for files are often sorted by class; the split itself for 0, where it
    has no more, and for a stream, whose examples have no numbers: of that the first are to be taken."""
    total = len(dataset)
    if isinstance(dataset, Streamed) or not 0 < num < total:
        return dataset
    rows = spaced(total, num)
    if isinstance(dataset, TensorDataset):
        found = copy.copy(dataset)
        found.tensors = tuple(t[rows] for t in dataset.tensors)
        return found
    return Pictures(dataset.source, dataset.rows[rows], dataset.labels[rows], dataset.mode)


def spaced(total: int, num: int) -> Tensor:
    """(min(num, total),) sorted int64: rows of `total`, evenly spaced; all of them for num = 0."""
    num = min(num or total, total)
    return (torch.arange(num) * total + num - 1) // max(num, 1)


def taken(dataset: Dataset, num: int) -> str:
    """Which examples `some` takes, in words."""
    if not 0 < num < len(dataset):
        return "all"
    return "the first of the stream" if isinstance(dataset, Streamed) else "evenly spaced"


def source(name: str, directory: str | Path | None) -> str:
    """Where the pixels come from, in words: CIFAR files that are not the published ones give other accuracies."""
    if name == "digits":
        return "scikit-learn load_digits, first 898 / last 899"
    if name in cifar.LAYOUT and not cifar.official(name, Path(directory)):
        return f"{name}, not the files of the published archive"
    return name


def shown_as(splits: Splits) -> dict[str, Any]:
    """What is done to every image, as plain values; empty for the digits, which are normalised when they are read."""
    if isinstance(splits.train, Pixels):
        return splits.train.statistics
    return {} if isinstance(splits.train, TensorDataset) else of_size(splits.image_size)


def batches(
    dataset: Dataset,
    batch_size: int,
    image_size: tuple[int, int, int],
    *,
    train: bool = False,
    augment: Augment | None = None,
    seed: int = 0,
    workers: int = 0,
    pin_memory: bool = False,
    world: World = ALONE,
) -> Batches | PictureBatches | StreamBatches:
    """Batches of a split: shuffled, augmented and without an incomplete last batch for training, else all in order.

    With several ranks these are of `batch_size` on each.
    """
    if len(dataset) == 0:
        raise InputError("a split of the data has no examples; lower --validation-fraction")
    augment = augment if train else None
    if isinstance(dataset, Streamed):
        options = {"train": train, "seed": seed, "workers": workers, "pin_memory": pin_memory, "world": world}
        return StreamBatches(
            dataset, batch_size, images.split_transform(images.transform(image_size, augment)), **options
        )
    if len(dataset) < world.size:
        raise InputError(f"a split has {len(dataset)} examples for {world.size} processes; start fewer")
    whole = len(dataset) < batch_size * world.size  # fewer examples than one batch: that one is not left out
    options = {"shuffle": train, "drop_last": train and not whole, "seed": seed}
    if isinstance(dataset, Pixels) and augment and augment.needs_pil:
        image_size = ImageSize(image_size, Preprocessing(**dataset.statistics))
        dataset = Drawn(dataset)
    if isinstance(dataset, TensorDataset):
        return Batches(dataset, batch_size, augment=augment, world=world, **options)
    order = Order(len(dataset), batch_size, rank=world.rank, size=world.size, **options)
    made = images.transform(image_size, augment)
    random = augment is not None and not augment.off
    return PictureBatches(dataset, order, made, seed=seed, workers=workers, pin_memory=pin_memory, random=random)
