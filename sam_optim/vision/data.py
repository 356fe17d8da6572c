"""The examples of a loss: found by --data, transformed as for evaluation, the first so many, in batches."""

from __future__ import annotations

import argparse
import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from sam_optim.core.errors import InputError, one_line
from sam_optim.core.random import Stream
from sam_optim.vision import arrays, images

SMALL = 64  # up to this many pixels an image is not cropped
IN_MEMORY = 4 << 30  # bytes of decoded examples that are kept; more are decoded again in every pass
FOLDERS = ("folder", "imagefolder", "image_folder", "imagenet", "torch/folder", "torch/image_folder")
TRAIN = (None, *images.TRAIN_FOLDERS)
OWN = ("train_examples", "validation_fraction", "label_noise", "train_labels")  # of a run: what it trains on

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Data:
    """batches: a sequence that gives the same ones in every pass. about: where they come from, and how they were
    transformed. checksum: SHA-256 of all batches, its first 16 digits. shape: of one x. num_classes: of the data set,
    None where only labels are known. largest: label. notes: for the reader."""

    batches: Sequence[Batch]
    about: Mapping[str, Any]
    checksum: str
    shape: tuple[int, ...]
    num_classes: int | None
    largest: int
    notes: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Source:
    """example: row -> x. labels: (N,), or (N, K) probabilities. notes: for the reader."""

    example: Callable[[int], Tensor]
    labels: Tensor
    about: dict[str, Any]
    num_classes: int | None = None
    notes: tuple[str, ...] = ()


class Rows(Sequence[Batch]):
    """Batches of rows of a source, made when they are asked for."""

    def __init__(self, source: Source, rows: Sequence[Sequence[int]], dtype: torch.dtype):
        self._source, self._rows, self._dtype = source, rows, dtype

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return Rows(self._source, self._rows[i], self._dtype)
        x = torch.stack([self._source.example(row) for row in self._rows[i]])
        y = self._source.labels[list(self._rows[i])]
        return tuple(v.to(self._dtype) if v.is_floating_point() else v for v in (x, y))

    def __iter__(self) -> Iterator[Batch]:
        return (self[i] for i in range(len(self)))


def load(args: argparse.Namespace, config: Mapping[str, Any], dtype: torch.dtype) -> Data:
    """The examples that the options name.

    Args:
        config: input_size (C, H, W), mean, std, crop_pct, interpolation, crop_mode: timm's data config of the model.
        dtype: of x.

    Raises:
        InputError: no such data, or a split that is not there.
    """
    source = _source(args, config)
    total = len(source.labels)
    count = min(args.examples or total, total)
    order = Stream(0).permutation(total).tolist() if args.order == "mixed" else list(range(total))
    rows = [order[i : min(i + args.batch_size, count)] for i in range(0, count, args.batch_size)]
    batches: Sequence[Batch] = Rows(source, rows, dtype)
    shape = tuple(batches[0][0].shape[1:])
    if count * batches[0][0][0].numel() * batches[0][0].element_size() <= IN_MEMORY:
        batches = list(batches)
    chosen = source.labels[order[:count]]
    return Data(
        batches,
        source.about | {"examples": count, "order": args.order},
        _checksum(batches),
        shape,
        source.num_classes,
        int(chosen.max()) if chosen.ndim == 1 else chosen.shape[1] - 1,
        [*source.notes, *_notes(chosen, source.labels)],
    )


def _source(args: argparse.Namespace, config: Mapping[str, Any]) -> Source:
    name, path = args.data, Path(args.data)
    if args.data_dir is None and path.is_file():
        return _array_file(path, args, config)
    train = args.split in TRAIN
    if path.is_dir() or name in FOLDERS:
        directory = Path(args.data_dir) if args.data_dir and not path.is_dir() else path
        if not directory.is_dir():
            raise InputError(f"--data {name} needs --data-dir DIR, an existing directory; got {args.data_dir}")
        if found := arrays.published(directory, train=train):
            label, x, y = found
            if not train and args.split not in (*images.VALIDATION_FOLDERS, "test"):
                raise InputError(f"{label} has the splits train and test, got --split {args.split}")
            about = {"source": label, "split": "train" if train else "test"}
            return _pictures(lambda row: _image(x[row]), y, about, args, config, None)
        folder = images.folder_of_split(directory, args.split)
        source, classes = images.folder(folder)
        about_folder: dict[str, Any] = {"source": "folder", "split": folder.name if folder != directory else None}
        labels = torch.tensor(images.labels_of(source))
        return _pictures(_reader(source, config), labels, about_folder, args, config, len(classes))
    if name == "digits":
        return _digits(args)
    if "/" in name and args.data_dir:
        return _known_to_timm(name, args, config)
    if path.suffix in arrays.SUFFIXES or "/" not in name:
        raise InputError(f"--data {name} does not exist; give a directory, a file with x and y, or a name of timm's")
    raise InputError(f"--data {name} is no file or directory; as a name of timm's (torch/cifar10) it needs --data-dir")


def of_run(run: Mapping[str, Any] | None) -> dict[str, Any] | None:
    """How a run of benchmarks.train sees pixels, as (a part of) timm's data config; None where it does not say."""
    run = run or {}
    if not (run.get("image_size") and run.get("preprocessing")):
        return None
    return {"input_size": tuple(run["image_size"]), **run["preprocessing"]}


def not_of_runs(args: argparse.Namespace, runs: Sequence[Mapping[str, Any]]) -> list[str]:
    """A note where runs of benchmarks.train saw fewer training examples than --data has, or other labels."""
    if args.split not in TRAIN or Path(args.data).is_file():  # a file's examples are those that somebody chose
        return []
    if not (changed := [f"--{key.replace('_', '-')}" for key in OWN if any(run.get(key) for run in runs)]):
        return []
    return [
        f"the examples are those of --data, and not the runs' own, which were trained with {', '.join(changed)}; "
        "python -m benchmarks.measure RUN_DIR takes those"
    ]


def _digits(args: argparse.Namespace) -> Source:
    """As benchmarks.train takes them, but for its label noise and what it holds out."""
    if args.data_dir or args.image_size or args.crop_pct or args.mean or args.std:
        raise InputError(
            "digits are 8 x 8 and normalised: leave --data-dir, --image-size, --crop-pct, --mean, --std out"
        )
    train = args.split in TRAIN
    if not train and args.split not in (*images.VALIDATION_FOLDERS, "test"):
        raise InputError(f"digits has the splits train and test, got --split {args.split}")
    rows = slice(None, arrays.DIGITS_TRAIN) if train else slice(arrays.DIGITS_TRAIN, None)
    x, y = (found[rows] for found in arrays.digits())
    return Source(lambda row: x[row], y, {"source": "digits", "split": "train" if train else "test"}, 10)


def _array_file(path: Path, args: argparse.Namespace, config: Mapping[str, Any]) -> Source:
    if args.image_size or args.crop_pct:
        raise InputError("arrays are taken in the size they have: leave --image-size and --crop-pct out")
    if args.split:
        raise InputError(f"{path} has no splits: leave --split out")
    x, y = arrays.from_file(path)
    about: dict[str, Any] = {"source": "arrays"}
    if x.dtype != torch.uint8:
        if args.mean or args.std:
            raise InputError(f"--mean and --std are for pixels (uint8); x in {path} is {x.dtype} and taken as it is")
        return Source(lambda row: x[row], y, about)
    if x.ndim != 4:
        raise InputError(f"{path}: x of uint8 must be images, (N, C, H, W) or (N, H, W, C); got {tuple(x.shape)}")
    if x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        x = x.permute(0, 3, 1, 2)
    mean, std = _statistics(args, config, x.shape[1])
    about |= {"mean": mean, "std": std}
    shift, scale = (torch.tensor(v).view(-1, 1, 1) for v in (mean, std))
    return Source(lambda row: (x[row].float() / 255 - shift) / scale, y, about)


def _known_to_timm(name: str, args: argparse.Namespace, config: Mapping[str, Any]) -> Source:
    from timm.data import create_dataset

    split = args.split or "train"
    try:
        source = create_dataset(name, args.data_dir, split=split)
    except (RuntimeError, AssertionError, ValueError, TypeError, OSError, ImportError, NameError) as error:
        raise InputError(f"timm cannot open {name!r}, split {split!r}: {one_line(error)[:200]}") from None
    if isinstance(source, IterableDataset):
        raise InputError(f"{name} is streamed and has no fixed order; use a data set with rows (hfds/, torch/)")
    labels = torch.tensor(images.labels_of(source))
    return _pictures(_reader(source, config), labels, {"source": name, "split": split}, args, config, None)


def _pictures(
    read: Callable[[int], Any],
    labels: Tensor,
    about: dict[str, Any],
    args: argparse.Namespace,
    config: Mapping[str, Any],
    num_classes: int | None,
) -> Source:
    """PIL images through timm's transform for evaluation."""
    from timm.data import create_transform

    channels, *size = config["input_size"]
    mean, std = _statistics(args, config, channels)
    size = [args.image_size] * 2 if args.image_size else size
    crop = args.crop_pct or (1.0 if max(size) <= SMALL else config["crop_pct"])
    chosen = {"input_size": (channels, *size), "mean": mean, "std": std, "crop_pct": crop}
    chosen |= {"interpolation": config["interpolation"], "crop_mode": config.get("crop_mode")}
    transform: Any = create_transform(**chosen, is_training=False)
    mode = _mode(config)
    notes: tuple[str, ...] = ()
    if not args.image_size and len(labels) and (own := max(read(0).size)) <= SMALL < max(size):
        wide = f"images of {own} pixels are enlarged to the {max(size)} that the model was made for"
        notes = (f"{wide}; --image-size {own} keeps their size",)
    return Source(lambda row: transform(read(row).convert(mode)), labels, about | chosen, num_classes, notes)


def _reader(source: Any, config: Mapping[str, Any]) -> Callable[[int], Any]:
    return lambda row: images.read(source, row, _mode(config))


def _mode(config: Mapping[str, Any]) -> str:
    channels = config["input_size"][0]
    if channels not in (1, 3):
        raise InputError(f"images have 1 or 3 channels, the model takes {channels}: give --data a file with x and y")
    return "RGB" if channels == 3 else "L"


def _image(x: Tensor) -> Any:
    from PIL import Image

    return Image.fromarray(x.permute(1, 2, 0).squeeze(-1).numpy())


def _statistics(args: argparse.Namespace, config: Mapping[str, Any], channels: int) -> tuple[tuple[float, ...], ...]:
    """mean and std of the pixels in [0, 1], one for each channel; one channel takes the mean of three."""
    found = []
    for option, given, default in (("--mean", args.mean, config["mean"]), ("--std", args.std, config["std"])):
        values = tuple(given or default)
        if len(values) == 1:
            values *= channels
        elif channels == 1 and not given:
            values = (sum(values) / len(values),)
        if len(values) != channels:
            raise InputError(f"{option} needs 1 or {channels} numbers, got {len(values)}")
        found.append(values)
    return tuple(found)


def _checksum(batches: Sequence[Batch]) -> str:
    found = hashlib.sha256()
    for batch in batches:
        for x in batch:
            found.update(f"{tuple(x.shape)} {x.dtype}".encode())
            found.update(x.contiguous().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def _notes(chosen: Tensor, labels: Tensor) -> list[str]:
    """The first rows of a folder are all of its first class, which is hardly what was meant."""
    if labels.ndim != 1 or len(chosen) == len(labels):
        return []
    some, all_ = len(chosen.unique()), len(labels.unique())
    if some > all_ / 2:
        return []
    first = f"the first {len(chosen)} of {len(labels)} examples have {some} of {all_} labels"
    return [f"{first}; --order mixed draws from all of them"]
