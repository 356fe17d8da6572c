"""The examples of a data set: one function opens a split of anything, another makes batches for evaluation of it."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from sam_optim.core.errors import InputError, one_line
from sam_optim.core.random import Stream
from sam_optim.vision import arrays, cifar, images
from sam_optim.vision.models import SMALL
from sam_optim.vision.preprocessing import Preprocessing

IN_MEMORY = 4 << 30  # bytes of decoded examples that are held in memory; more are decoded again in every pass
FOLDERS = ("", "folder", "imagefolder", "image_folder", "imagenet", "torch/folder", "torch/image_folder")

Batch = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Split:
    """One split of a data set, not yet transformed.

    name: "cifar10", "folder", "arrays", a name of timm's ... split: its name, None where there is one only.
    labels: (N,) int64, or (N, K) probabilities.
    x: what is in memory: uint8 pixels (N, C, H, W), or floating-point numbers (N, ...). None for files.
    source: an `ImageFolder`, or timm's or torchvision's data set; None in memory.
    classes: names in the order of the labels, where there are names. num_classes: None where nobody says.
    fixed_size: x is taken in the size that it has, never resized.
    """

    name: str
    split: str | None
    labels: Tensor
    x: Tensor | None = None
    source: Any = None
    classes: tuple[str, ...] | None = None
    num_classes: int | None = None
    fixed_size: bool = False

    def __len__(self) -> int:
        return len(self.labels)

    def picture(self, row: int, mode: str | None = None) -> Any:
        """A PIL image. mode: as for `images.read`."""
        if self.x is None:
            return images.read(self.source, row, mode)
        from PIL import Image

        image = Image.fromarray(self.x[row].permute(1, 2, 0).squeeze(-1).numpy())
        return image.convert(mode or image.mode)


@dataclass(frozen=True)
class Examples:
    """Batches for evaluation.

    batches: a sequence that gives the same (x, y) in every pass. about: where they come from, and how they were
    transformed. checksum: SHA-256 of all batches, the first 16 digits. shape: of one x. num_classes: of the data set,
    None where only labels are known. largest: label. notes: for the reader.
    """

    batches: Sequence[Batch]
    about: Mapping[str, Any]
    checksum: str
    shape: tuple[int, ...]
    num_classes: int | None
    largest: int
    notes: list[str] = field(default_factory=list)


def open_split(
    name: str | Path,
    directory: str | Path | None = None,
    split: str | None = None,
    *,
    class_to_idx: Mapping[str, int] | None = None,
) -> Split:
    """One split of a data set. Nothing is downloaded.

    Args:
        name: "digits"; a file with arrays x and y (.npz, .safetensors, .pt); a directory of class folders
            (DIR/train/CLASS/*, or DIR/CLASS/*), or with CIFAR or MNIST in torchvision's layout; "cifar10", "cifar100"
            or "folder" in `directory`; a name of timm's (torch/cifar10, hfds/OWNER/NAME) in `directory`.
        split: "train", "val", "test" or the name of a folder; None: train where there is such a split.
        class_to_idx: the numbers of class folders, as in `images.open_folder`.

    Raises:
        InputError: no such data, or a split that is not there.
    """
    path = Path(name)
    in_directory = str(name) in (*FOLDERS, *cifar.LAYOUT) and (directory is not None or not path.is_dir())
    if class_to_idx is not None and not in_directory and not path.is_dir():
        raise InputError("--class-to-idx numbers class folders: leave it out for other data")
    if directory is None and path.is_file():
        if split:
            raise InputError(f"{path} has no splits: leave --split out")
        x, y = arrays.from_file(path)
        return Split("arrays", None, y, x, fixed_size=True)
    if in_directory:
        if directory is None or not Path(directory).is_dir():
            raise InputError(f"--data {name} needs --data-dir DIR, an existing directory; got {directory}")
        return _in_directory(str(name), Path(directory), split, class_to_idx)
    if path.is_dir():
        if directory is not None:
            raise InputError(f"--data {path} is a directory itself: leave --data-dir out")
        return _in_directory("folder", path, split, class_to_idx)
    if name == "digits":
        if directory is not None:
            raise InputError("digits come with scikit-learn: leave --data-dir out")
        train = is_train("digits", split)
        rows = slice(None, arrays.DIGITS_TRAIN) if train else slice(arrays.DIGITS_TRAIN, None)
        x, y = (values[rows] for values in arrays.digits())
        return Split("digits", "train" if train else "test", y, x, num_classes=10, fixed_size=True)
    if "/" in str(name) and directory is not None:
        return _from_timm(str(name), Path(directory), split or "train")
    if path.suffix in arrays.SUFFIXES or "/" not in str(name):
        raise InputError(f"--data {name} does not exist; give a directory, a file with x and y, or a name of timm's")
    raise InputError(f"--data {name} is no file or directory; as a name of timm's (torch/cifar10) it needs --data-dir")


def open_timm(name: str, directory: str | Path, split: str, **options: Any) -> Any:
    """A data set that `timm.data.create_dataset` knows, also a streamed one."""
    from timm.data import create_dataset

    if wrong := next((word for word in ("pipe:", "://") if word in f"{name} {split}"), None):  # webdataset's
        raise InputError(f"{wrong!r} in a data set or split would run a program or make a request: give files")
    faults = (RuntimeError, AssertionError, ValueError, TypeError, OSError, ImportError, NameError, KeyError)
    try:
        return create_dataset(name, str(directory), split=split, **options)
    except faults as error:
        reason = one_line(error)[:200]
        raise InputError(f"timm cannot open data set {name!r} in {directory}, split {split!r}: {reason}") from None


def is_train(name: str, split: str | None) -> bool:
    """Which of the two splits of a data set that has only train and test is meant."""
    if split in (None, *images.TRAIN_FOLDERS):
        return True
    if split not in (*images.VALIDATION_FOLDERS, "test"):
        raise InputError(f"{name} has the splits train and test, got --split {split}")
    return False


def evaluation_batches(
    split: Split,
    preprocessing: Preprocessing,
    *,
    num: int = 0,
    mixed: bool = False,
    batch_size: int = 128,
    dtype: torch.dtype = torch.float32,
) -> Examples:
    """Batches of the first `num` examples, without augmentation.

    Images go through timm's transform for evaluation. Of a split of fixed size, pixels (uint8) are divided by 255 and
    normalized, and floating-point numbers are taken as they are.

    Args:
        num: how many examples; 0 for all.
        mixed: draws them from the whole split, always the same ones; else they are in the order of the files.
        dtype: of x.
    """
    total = len(split)
    count = min(num or total, total)
    order = Stream(0).permutation(total).tolist() if mixed else list(range(total))
    rows = [order[i : min(i + batch_size, count)] for i in range(0, count, batch_size)]
    batches: Sequence[Batch] = _Batches(split, preprocessing, rows, dtype)
    x = batches[0][0]
    if count * x[0].numel() * x.element_size() <= IN_MEMORY:
        batches = list(batches)
    labels = split.labels[order[:count]]
    about = {"source": split.name, "split": split.split} | _transformation(split, preprocessing)
    return Examples(
        batches,
        about | {"examples": count, "order": "mixed" if mixed else "file"},
        _checksum(batches),
        tuple(x.shape[1:]),
        split.num_classes,
        int(labels.max()) if labels.ndim == 1 else labels.shape[1] - 1,
        _notes(split, preprocessing, labels),
    )


class _Batches(Sequence[Batch]):
    """Batches of rows of a split, loaded on access."""

    def __init__(self, split: Split, preprocessing: Preprocessing, rows: Sequence[Sequence[int]], dtype: torch.dtype):
        self._split, self._preprocessing, self._rows, self._dtype = split, preprocessing, rows, dtype
        self._transform = None if split.fixed_size else preprocessing.transform()

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return _Batches(self._split, self._preprocessing, self._rows[i], self._dtype)
        rows = list(self._rows[i])
        x, y = self._inputs(rows), self._split.labels[rows]
        return tuple(v.to(self._dtype) if v.is_floating_point() else v for v in (x, y))

    def __iter__(self) -> Iterator[Batch]:
        return (self[i] for i in range(len(self)))

    def _inputs(self, rows: list[int]) -> Tensor:
        if self._transform is not None:
            mode = self._preprocessing.mode
            return torch.stack([self._transform(self._split.picture(row, mode)) for row in rows])
        assert self._split.x is not None
        x = self._split.x[rows]
        if x.dtype != torch.uint8:
            return x
        mean, std = (torch.tensor(v).view(-1, 1, 1) for v in (self._preprocessing.mean, self._preprocessing.std))
        return (x.float() / 255 - mean) / std


def _in_directory(name: str, directory: Path, split: str | None, class_to_idx: Mapping[str, int] | None) -> Split:
    """Class folders, CIFAR or MNIST."""
    if name in cifar.LAYOUT:
        train = is_train(name, split)
        x, y = cifar.read(name, directory)[0 if train else 1]
        return Split(name, "train" if train else "test", y, x, num_classes=int(name.removeprefix("cifar")))
    if (published := arrays.published(directory)) is not None:
        train = is_train(published.name, split)
        x, y = published.read(train)
        return Split(published.name, "train" if train else "test", y, x)
    folder = images.folder_of_split(directory, split)
    source = images.open_folder(folder, class_to_idx)
    labels, classes = images.labels_of(source), source.classes
    where = folder.name if folder != directory else None
    return Split("folder", where, labels, source=source, classes=classes, num_classes=len(classes))


def _from_timm(name: str, directory: Path, split: str) -> Split:
    source = open_timm(name, directory, split)
    if isinstance(source, IterableDataset):
        raise InputError(f"{name} is streamed and has no fixed order; use a data set with rows (hfds/, torch/)")
    return Split(name, split, images.labels_of(source), source=source)


def _transformation(split: Split, preprocessing: Preprocessing) -> dict[str, Any]:
    if not split.fixed_size:
        return preprocessing.arguments()
    if split.x is None or split.x.dtype != torch.uint8:
        return {}
    return {"mean": preprocessing.mean, "std": preprocessing.std}


def _checksum(batches: Sequence[Batch]) -> str:
    content = hashlib.sha256()
    for batch in batches:
        for x in batch:
            content.update(f"{tuple(x.shape)} {x.dtype}".encode())
            content.update(x.contiguous().view(torch.uint8).numpy().data)
    return content.hexdigest()[:16]


def _notes(split: Split, preprocessing: Preprocessing, labels: Tensor) -> list[str]:
    notes = []
    if split.classes:
        shown = ", ".join(f"{i} {name}" for i, name in enumerate(split.classes[:3]) if name)
        numbered = f"{len(split.classes)} classes, numbered {shown}{', ...' if len(split.classes) > 3 else ''}"
        left_out = split.source.num_left_out
        rest = f"; {left_out} files are no images and were left out" if left_out else ""
        notes.append(f"{numbered}; {len(labels)} of {len(split)} images{rest}")
    if not split.fixed_size and len(split):
        size, target = max(split.picture(0).size), max(preprocessing.image_size[1:])
        if size <= SMALL < target:
            notes.append(
                f"images of {size} pixels are enlarged to {target}; --image-size {size} takes them as they are"
            )
    if labels.ndim == 1 and len(labels) < len(split):
        some, all_ = len(labels.unique()), len(split.labels.unique())
        if some <= all_ / 2:  # the first rows of a folder are all of its first class
            few = f"the first {len(labels)} of {len(split)} examples have {some} of {all_} labels"
            notes.append(f"{few}; --order mixed draws from all of them")
    return notes
