"""Image files: class folders, and one decoded image; a file that cannot be read is named."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sam_optim.core.errors import InputError, one_line

TRAIN_FOLDERS = ("train", "training")
VALIDATION_FOLDERS = ("val", "valid", "validation", "eval", "evaluation")


def read(source: Any, row: int, mode: str | None = None) -> Any:
    """One decoded image of a timm or torchvision data set.

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
            if reader is None:
                image = source[row][0]
                return image.convert(mode or image.mode)
            with reader[row][0] as file, Image.open(file) as image:  # timm leaves the file open
                return image.convert(mode or image.mode)
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        name = reader.filename(row, absolute=True) if hasattr(reader, "filename") else f"example {row}"
        raise InputError(f"cannot read image {name}: {one_line(error)}; replace or remove it") from None


def class_folders(folder: Path) -> list[str]:
    """The class folders, in timm's order; each must hold an image."""
    from timm.utils.misc import natural_key

    names = sorted((p.name for p in folder.iterdir() if p.is_dir() and not p.name.startswith(".")), key=natural_key)
    if not names:
        raise InputError(f"{folder} has no class folders; put the images of each class in {folder}/CLASS/")
    for name in names:
        if not _has_image(folder / name):
            raise InputError(f"class folder {folder / name} has no images; add some or remove it")
    return names


def open_folder(folder: Path) -> tuple[Any, list[str]]:
    """timm's data set of a tree folder/CLASS/*, and its classes in the order of their labels."""
    from timm.data import create_dataset

    classes = class_folders(folder)
    numbers: Any = {name: i for i, name in enumerate(classes)}
    return create_dataset("", str(folder), search_split=False, class_map=numbers), classes


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


def labels_of(source: Any) -> list[int]:
    """Of all examples; decodes every one where the data set does not list its labels."""
    labels = getattr(source, "targets", None)
    reader: Any = getattr(source, "reader", None)
    if labels is None and hasattr(reader, "samples"):
        labels = [label for _, label in reader.samples]
    if labels is None and hasattr(reader, "iter_targets"):
        labels = list(reader.iter_targets())
    if labels is None:
        labels = [source[i][1] for i in range(len(source))]
    return [int(label) for label in labels]


def _has_image(folder: Path) -> bool:
    from timm.data.readers.img_extensions import get_img_extensions

    extensions = get_img_extensions(as_set=True)
    files = (name for _, _, names in os.walk(folder, followlinks=True) for name in names)
    return any(os.path.splitext(name)[1].lower() in extensions for name in files)
