"""Image files: class folders, and one decoded image; a file that cannot be read is named."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from sam_optim.core.errors import InputError, one_line
from sam_optim.core.files import read_json

TRAIN_FOLDERS = ("train", "training")
VALIDATION_FOLDERS = ("val", "valid", "validation", "eval", "evaluation")
SUFFIXES = (".jpg", ".jpeg", ".png", ".ppm", ".pgm", ".bmp", ".tif", ".tiff", ".webp", ".gif")
FORMATS = ("JPEG", "PNG", "PPM", "BMP", "TIFF", "WEBP", "GIF")  # PIL's others start programs (EPS) or are rare


@dataclass(frozen=True)
class ImageFolder:
    """A tree folder/CLASS/*, as torchvision's ImageFolder reads it.

    files, targets: one for each image. classes: their names; the class of target i is classes[i], "" where no folder
    has that number. num_left_out: files that are no images, by their suffix.
    """

    files: tuple[Path, ...]
    targets: tuple[int, ...]
    classes: tuple[str, ...]
    num_left_out: int

    def __len__(self) -> int:
        return len(self.files)


def open_folder(folder: Path, class_to_idx: Mapping[str, int] | None = None) -> ImageFolder:
    """The images of a tree folder/CLASS/*, sorted by class and path.

    Args:
        class_to_idx: the number of each class; None: in the order of their sorted names (1, 10, 2; A before a).

    Raises:
        InputError: no class folders, one without images, or one without a number.
    """
    names = sorted(p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith("."))
    if not names:
        raise InputError(f"{folder} has no class folders; put the images of each class in {folder}/CLASS/")
    numbers = {name: i for i, name in enumerate(names)} if class_to_idx is None else class_to_idx
    if nameless := [name for name in names if name not in numbers]:
        raise InputError(f"class folder {folder / nameless[0]} has no number in --class-to-idx; add it there")
    files: list[Path] = []
    targets: list[int] = []
    num_left_out = 0
    for name in names:
        inside = sorted(_files(folder / name))
        images = [path for path in inside if path.suffix.lower() in SUFFIXES]
        if not images:
            raise InputError(f"class folder {folder / name} has no images; add some or remove it")
        if len(names) == 1 and all(path.parent != folder / name for path in images):
            raise InputError(f"{folder} has the single folder {name}, and the classes are in it: give {folder / name}")
        files += images
        targets += [numbers[name]] * len(images)
        num_left_out += len(inside) - len(images)
    classes = {number: name for name, number in numbers.items()}
    listed = tuple(classes.get(i, "") for i in range(max(classes) + 1))
    return ImageFolder(tuple(files), tuple(targets), listed, num_left_out)


def read_class_to_idx(path: Path) -> dict[str, int]:
    """name -> number, of a JSON file {"cat": 0, "dog": 1}."""
    content = read_json(path)
    if not isinstance(content, dict) or not content:
        raise InputError(f'{path} must hold one JSON object, {{"cat": 0, "dog": 1}}')
    wrong = [v for v in content.values() if not isinstance(v, int) or isinstance(v, bool) or not 0 <= v < 1_000_000]
    if wrong or len(set(content.values())) < len(content):
        raise InputError(f"{path}: the numbers of classes must be 0, 1, 2 ..., each once, got {list(content.values())}")
    return content


def read(source: Any, row: int, mode: str | None = None) -> Any:
    """One decoded image of an `ImageFolder`, or of a timm or torchvision data set.

    Args:
        mode: PIL's name for the colours, "RGB" or "L"; None keeps those of the file.

    Raises:
        InputError: names the file, where timm would silently take the next one.
    """
    from PIL import Image

    reader: Any = getattr(source, "reader", None)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            if isinstance(source, ImageFolder):
                with Image.open(source.files[row], formats=FORMATS) as image:
                    return _converted(image, mode)
            if reader is None:
                return _converted(source[row][0], mode)
            with reader[row][0] as file, Image.open(file, formats=FORMATS) as image:  # timm leaves the file open
                return _converted(image, mode)
    except Exception as error:  # whatever a decoder raises: OSError, SyntaxError, struct.error, IndexError ...
        if isinstance(source, ImageFolder):
            name = str(source.files[row])
        else:
            name = reader.filename(row, absolute=True) if hasattr(reader, "filename") else f"example {row}"
        raise InputError(f"cannot read image {name}: {one_line(error)}; replace or remove it") from None


def _converted(image: Any, mode: str | None) -> Any:
    """PIL's conversion clips values above 255: numbers of 16 bits are scaled first, longer ones are refused."""
    from PIL import Image

    if getattr(image, "n_frames", 1) > 1 and image.format != "MPO":
        raise ValueError(f"it has {image.n_frames} frames, and a label belongs to one image; keep one of them")
    if image.mode.startswith("I"):
        import numpy as np

        values = np.asarray(image)
        if image.mode == "I" and not (image.format in ("PNG", "PPM") and values.min() >= 0 and values.max() < 1 << 16):
            raise ValueError("it has pixels of 32 bits; save it with 8 or 16 bits")
        image = Image.fromarray((values.astype(np.float64) / 257).round().astype(np.uint8))
    elif image.mode == "F":
        raise ValueError("it has floating-point pixels; save it with 8 or 16 bits")
    return image.convert(mode or image.mode)


def _files(folder: Path) -> Iterator[Path]:
    """All regular files below a folder, through links, each folder once."""
    visited = set()
    for where, inside, names in os.walk(folder, followlinks=True):
        if (real := os.path.realpath(where)) in visited:
            inside.clear()
            continue
        visited.add(real)
        yield from (path for name in names if not name.startswith(".") and (path := Path(where, name)).is_file())


def folder_of_split(directory: Path, split: str | None) -> Path:
    """DIR/train, DIR/val ... of a tree of images. Without a split: train if it is there, else DIR itself.

    timm would take the whole tree where the folder of a split is missing, with "train" and "val" for classes.
    """
    inside = sorted(p.name for p in directory.iterdir() if p.is_dir() and not p.name.startswith("."))
    splits = [name for name in inside if name in (*TRAIN_FOLDERS, *VALIDATION_FOLDERS, "test")]
    names: Sequence[str] = TRAIN_FOLDERS if split is None else (split,)
    for synonyms in (TRAIN_FOLDERS, VALIDATION_FOLDERS):
        if split is not None and split in synonyms:
            names = (split, *(name for name in synonyms if name != split))
    for name in names:
        if name in inside:
            return directory / name
    if split is None and not splits:
        return directory
    raise InputError(
        f"{directory} has no folder {' or '.join(names)}, only {', '.join(inside[:8]) or 'no folders'}; "
        "choose one with --split"
    )


def labels_of(source: Any) -> torch.Tensor:
    """(N,) int64, of all examples; decodes every one where the data set does not list its labels."""
    labels = getattr(source, "targets", None)
    reader: Any = getattr(source, "reader", None)
    if labels is None and hasattr(reader, "samples"):
        labels = [label for _, label in reader.samples]
    if labels is None and hasattr(reader, "iter_targets"):
        labels = list(reader.iter_targets())
    if labels is None:
        labels = [source[i][1] for i in range(len(source))]
    return torch.tensor([int(label) for label in labels], dtype=torch.int64)
