"""The three splits of a run: which examples are in them, and the labels that training sees."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import Dataset, IterableDataset

from benchmarks.train.options import PIXELS, Options
from benchmarks.train.order import derive
from benchmarks.train.streams import Streamed
from sam_optim.core.errors import InputError, unknown
from sam_optim.core.random import Stream
from sam_optim.vision import cifar
from sam_optim.vision.arrays import read_npz
from sam_optim.vision.data import Split, open_split, open_timm
from sam_optim.vision.images import TRAIN_FOLDERS, VALIDATION_FOLDERS
from sam_optim.vision.models import SMALL, default_size
from sam_optim.vision.preprocessing import Preprocessing

FOLDERS = ("", "folder", "imagefolder", "imagenet")


class Examples(Dataset):
    """Some rows of a split, with our labels. Example i is (a PIL image, a label).

    x: (n, ...) of what is in memory, None for files. labels: (n,) int64. mode: "RGB" or "L".
    """

    def __init__(self, split: Split, mode: str, rows: Tensor | None = None, labels: Tensor | None = None):
        self.split, self.mode = split, mode
        self.rows = torch.arange(len(split)) if rows is None else rows
        self.labels = split.labels[self.rows] if labels is None else labels
        self.x = None if split.x is None else split.x[self.rows]

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, i: int) -> tuple[Any, int]:
        return self.split.picture(int(self.rows[i]), self.mode), int(self.labels[i])

    @property
    def normalized(self) -> bool:
        """Whether x are numbers that a model takes as they are, not pixels."""
        return self.x is not None and self.x.is_floating_point()


@dataclass(frozen=True)
class Splits:
    """train has the labels that training sees; validation (held out of train) and test are never made noisy.

    preprocessing: how an image becomes what the model sees. clean_train_labels: (N,) int64, the labels before noise;
    empty where they are not known without reading every example.
    """

    train: Examples | Streamed
    validation: Examples | Streamed | None
    test: Examples | Streamed
    num_classes: int
    preprocessing: Preprocessing
    clean_train_labels: Tensor

    @property
    def image_size(self) -> tuple[int, int, int]:
        """(C, H, W)."""
        return self.preprocessing.image_size

    def shown_as(self) -> dict[str, Any]:
        """What is done to every image, for config.json; empty where nothing is."""
        return {} if isinstance(self.train, Examples) and self.train.normalized else self.preprocessing.to_dict()


def load(options: Options) -> Splits:
    """The data set of a run. Nothing is downloaded.

    The digits are split as in scikit-learn's example "Recognizing hand-written digits": the first 898 for training, the
    last 899 for testing. --validation-fraction and --train-examples are drawn by --seed, as --label-noise is.

    Raises:
        InputError: no such data, or options that do not fit them.
    """
    name, directory = options.data, options.data_dir
    if options.train_labels is not None and options.label_noise:
        raise InputError("--train-labels has labels that are wrong already: leave --label-noise out")
    if name == "digits":
        if directory is not None or options.img_size not in (None, 8):
            raise InputError("digits come with scikit-learn, 8x8: leave --data-dir and --img-size out")
        return _split_up(options, open_split(name, None, "train"), None, open_split(name, None, "test"))
    if directory is None:
        raise InputError(f"--data {name} needs --data-dir DIR; only digits are embedded")
    if not Path(directory).is_dir():
        raise InputError(f"--data-dir {directory} is not a directory")
    if name in cifar.LAYOUT:
        if options.img_size not in (None, 32):
            raise InputError(f"--data {name} has images of 32 pixels: leave --img-size out, or use --data torch/{name}")
        return _split_up(options, open_split(name, directory, "train"), None, open_split(name, directory, "test"))
    if name in FOLDERS:
        return _split_up(options, *_folders(Path(directory)))
    if "/" not in name:
        names = ["digits", *cifar.LAYOUT, "folder", "torch/NAME", "hfds/NAME", "hfids/NAME", "wds/NAME", "tfds/NAME"]
        raise unknown("data set", name, names)
    if isinstance(open_timm(name, directory, "train"), IterableDataset):
        return _streamed(options, Path(directory))
    try:
        test = open_split(name, directory, "validation")
    except InputError:  # some of Hugging Face's have only a test split
        test = open_split(name, directory, "test")
    return _split_up(options, open_split(name, directory, "train"), None, test)


def _folders(directory: Path) -> tuple[Split, Split | None, Split]:
    """Train, validation (where there are both val/ and test/) and test of a tree of class folders."""
    names = {path.name for path in directory.iterdir() if path.is_dir()}
    if not names & set(TRAIN_FOLDERS):
        raise InputError(f"{directory} has no folder train; give a tree DIR/train/CLASS/*.jpg, DIR/val/...")
    if not names & {*VALIDATION_FOLDERS, "test"}:
        raise InputError(f"{directory} has no folder val or test; give a tree DIR/train/CLASS/*.jpg, DIR/val/...")
    train = open_split("folder", directory, "train")
    held_out = [
        open_split("folder", directory, split)
        for split, exists in (("val", names & set(VALIDATION_FOLDERS)), ("test", "test" in names))
        if exists
    ]
    for split in held_out:
        if different := set(split.classes or ()) ^ set(train.classes or ()):
            named = ", ".join(sorted(different)[:5])
            raise InputError(f"{directory / str(split.split)} and {train.split} do not have the same classes: {named}")
    return train, held_out[0] if len(held_out) == 2 else None, held_out[-1]


def _split_up(options: Options, train: Split, validation: Split | None, test: Split) -> Splits:
    preprocessing = _preprocessing(options, train)
    num_classes = train.num_classes or int(train.labels.max()) + 1
    labels = train.labels
    if options.train_labels is not None:
        labels = other_labels(options.train_labels, train.labels, num_classes, Path(options.data_dir or "."))
    rows, held_out = hold_out(len(train), options.validation_fraction, options.seed, options.train_examples)
    if len(held_out) and validation is not None:
        raise InputError("there is a validation folder already: leave --validation-fraction out")
    mode = preprocessing.mode
    if len(held_out):
        held = Examples(train, mode, held_out)
    else:
        held = None if validation is None else Examples(validation, mode)
    return Splits(
        train=Examples(train, mode, rows, noisy(labels[rows], num_classes, options.label_noise, options.seed)),
        validation=held,
        test=Examples(test, mode),
        num_classes=num_classes,
        preprocessing=preprocessing,
        clean_train_labels=train.labels[rows],
    )


def _preprocessing(options: Options, train: Split) -> Preprocessing:
    """Images of up to 64 pixels stay as they are; others get --img-size, or the size that the model was made for."""
    if train.x is not None:
        size = tuple(train.x.shape[1:])
    else:
        first = train.picture(0)
        grey = train.name not in FOLDERS and first.mode in ("1", "L", "I", "I;16", "F")
        height_width = (first.height, first.width) if max(first.size) <= SMALL else default_size(options.model)
        size = (1 if grey else 3, *([options.img_size] * 2 if options.img_size else height_width))
    pixels = {name: getattr(options, name) for name in PIXELS}
    if train.name in cifar.LAYOUT:
        mean, std = cifar.STATISTICS[train.name]
        pixels |= {"mean": options.mean or mean, "std": options.std or std}
    return _of_size(size, pixels)


def _of_size(size: tuple[int, ...], pixels: dict[str, Any]) -> Preprocessing:
    if max(size[1:]) <= SMALL:
        pixels["crop_pct"] = None  # nothing is cut off small images
    return Preprocessing(size, **{name: value for name, value in pixels.items() if value is not None})  # type: ignore[arg-type]


def _streamed(options: Options, directory: Path) -> Splits:
    if options.num_classes is None:
        raise InputError("a streamed data set does not tell how many classes it has: give --num-classes")
    if options.label_noise or options.train_labels or options.validation_fraction or options.train_examples is not None:
        raise InputError(
            "--label-noise, --train-labels, --validation-fraction and --train-examples are for numbered examples; a "
            "stream has no numbers"
        )
    try:
        test = Streamed(options.data, directory, "validation")
    except InputError:
        test = Streamed(options.data, directory, "test")
    size = (options.img_size, options.img_size) if options.img_size else default_size(options.model)
    preprocessing = _of_size((3, *size), {name: getattr(options, name) for name in PIXELS})
    train = Streamed(options.data, directory, "train")
    return Splits(train, None, test, options.num_classes, preprocessing, labels_of(train))


def hold_out(n: int, fraction: float, seed: int, num_train: int | None = None) -> tuple[Tensor, Tensor]:
    """Sorted indices of the examples to train on, and of round(fraction * n) drawn for validation."""
    if not 0 <= fraction < 1:
        raise InputError(f"--validation-fraction is a part of the training set and must be in [0, 1), got {fraction}")
    order = Stream(derive(seed, "validation")).permutation(n)
    num_held = round(fraction * n)
    num_train = n - num_held if num_train is None else num_train
    if not 0 < num_train <= n - num_held:
        raise InputError(f"there are {n - num_held} examples to train on, so --train-examples cannot be {num_train}")
    return order[num_held : num_held + num_train].sort().values, order[:num_held].sort().values


def noisy(labels: Tensor, num_classes: int, fraction: float, seed: int) -> Tensor:
    """A copy with exactly round(fraction * n) labels redrawn uniformly: 1 in num_classes of them stays right."""
    if not 0 <= fraction <= 1:
        raise InputError(f"--label-noise is a share of the training labels and must be in [0, 1], got {fraction}")
    stream = Stream(derive(seed, "label noise"))
    chosen = stream.permutation(len(labels))[: round(fraction * len(labels))]
    result = labels.clone()
    result[chosen] = stream.integers(num_classes, (len(chosen),))
    return result


def other_labels(source: str, labels: Tensor, num_classes: int, directory: Path) -> Tensor:
    """(N,): the array of FILE.npz:ARRAY, labels of the same images by others; FILE may be relative to `directory`.
    Where the file also has an array `clean_label`, as that of CIFAR-10N has, it must be `labels`: else its images are
    in another order."""
    path, _, name = source.rpartition(":")
    if not path:
        raise InputError(f"--train-labels is FILE.npz:ARRAY, got {source!r}")
    if not Path(path).exists() and (directory / path).exists():
        path = str(directory / path)
    try:
        arrays = read_npz(Path(path))
    except InputError as error:
        raise InputError(f"--train-labels {path} is not an .npz file of labels ({error})") from None
    if name not in arrays:
        raise unknown(f"array of {path}", name, arrays)
    other_labels, clean = arrays[name], arrays.get("clean_label")
    if other_labels.shape != labels.shape or other_labels.is_floating_point() or other_labels.dtype == torch.bool:
        shape = tuple(other_labels.shape)
        raise InputError(f"{source} must hold {len(labels)} integers, got {other_labels.dtype} of shape {shape}")
    low, high = int(other_labels.min()), int(other_labels.max())
    if low < 0 or high >= num_classes:
        raise InputError(f"{source} must hold labels from 0 to {num_classes - 1}, got {low} to {high}")
    if clean is not None and not torch.equal(clean.to(torch.int64), labels):
        raise InputError(f"the clean_label of {path} are not the labels of these images: they are in another order")
    return other_labels.to(torch.int64)


def labels_of(examples: Examples | Streamed) -> Tensor:
    """(n,) int64, the labels that training sees; empty for a stream."""
    return examples.labels if isinstance(examples, Examples) else torch.empty(0, dtype=torch.int64)


def some(examples: Examples | Streamed, num: int) -> Examples | Streamed:
    """`num` examples of a split, evenly spaced, for files are often sorted by class; the split itself for 0, where it
    has no more, and for a stream, whose examples have no numbers: of that the first are to be taken."""
    if isinstance(examples, Streamed) or not 0 < num < len(examples):
        return examples
    rows = spaced(len(examples), num)
    return Examples(examples.split, examples.mode, examples.rows[rows], examples.labels[rows])


def spaced(total: int, num: int) -> Tensor:
    """(min(num, total),) sorted int64: rows of `total`, evenly spaced; all of them for num = 0."""
    num = min(num or total, total)
    return (torch.arange(num) * total + num - 1) // max(num, 1)


def taken(examples: Examples | Streamed, num: int) -> str:
    """Which examples `some` takes, in words."""
    if not 0 < num < len(examples):
        return "all"
    return "the first of the stream" if isinstance(examples, Streamed) else "evenly spaced"


def source(options: Options) -> str:
    """The source of the pixels, in words: CIFAR files that are not the published ones give other accuracies."""
    name = options.data
    if name == "digits":
        return "scikit-learn load_digits, first 898 / last 899"
    if name in cifar.LAYOUT and not cifar.official(name, Path(str(options.data_dir))):
        return f"{name}, not the files of the published archive"
    return name
