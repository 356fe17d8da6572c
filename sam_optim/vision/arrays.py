"""Data that are arrays: files with x and y, and the published files of CIFAR and MNIST. Nothing in them is run."""

from __future__ import annotations

import gzip
import zipfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sam_optim.core.errors import InputError, one_line
from sam_optim.vision import cifar
from sam_optim.vision.checkpoints import read_file

SUFFIXES = (".npz", ".safetensors", ".pt", ".pth")
DIGITS_TRAIN = 898  # scikit-learn's example "Recognizing hand-written digits": the first half, as published
MNIST = ("MNIST", "FashionMNIST", "KMNIST")


def from_file(path: Path) -> tuple[Tensor, Tensor]:
    """x (N, ...) and y (N,) of classes or (N, K) of probabilities."""
    found = _npz(path) if path.suffix == ".npz" else read_file(path)
    if not isinstance(found, dict) or not all(isinstance(found.get(k), Tensor) for k in ("x", "y")):
        has = ", ".join(map(str, list(found)[:6])) if isinstance(found, dict) else type(found).__name__
        raise InputError(f"{path} must hold two arrays named x and y, it has {has}")
    x, y = found["x"], found["y"]
    if not x.ndim or not y.ndim or len(x) != len(y) or not len(x):
        raise InputError(f"{path}: x and y need one row for each example, got {tuple(x.shape)} and {tuple(y.shape)}")
    if not y.is_floating_point():
        y = y.to(torch.int64)
    elif y.ndim == 1:
        raise InputError(f"{path}: y must be whole numbers (classes), or (N, K) probabilities, got {y.dtype}")
    return x, y


def published(directory: Path, *, train: bool) -> tuple[str, Tensor, Tensor] | None:
    """The name, images uint8 (N, C, H, W) and labels of CIFAR or MNIST in torchvision's layout, if they are here.

    Raises:
        InputError: several data sets in one directory, or damaged files.
    """
    found: list[tuple[str, Path]] = []
    for name, (folder, *_) in cifar.LAYOUT.items():
        found += [(name, p) for p in (directory, directory / folder) if p.name == folder and p.is_dir()]
    places = [(name.lower(), directory / name / "raw") for name in MNIST]
    places += [(directory.name.lower(), directory / "raw"), (directory.name.lower(), directory)]
    found += [(name, place) for name, place in places if _idx_file(place, "train-labels-idx1-ubyte")]
    if len(found) > 1:
        raise InputError(f"{directory} holds {' and '.join(name for name, _ in found)}: give --data {found[0][1]}")
    if not found:
        return None
    ((name, place),) = found
    if name in cifar.LAYOUT:
        both = cifar.read(name, place)
        return name, *(both[0] if train else both[1])
    part = "train" if train else "t10k"
    pixels, labels = (_idx(place, f"{part}-{what}", n) for what, n in (("images-idx3", 3), ("labels-idx1", 1)))
    return name, pixels.unsqueeze(1), labels.to(torch.int64)


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits: float32 (N, 1, 8, 8), normalised by the first `DIGITS_TRAIN`, and their labels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("--data digits needs scikit-learn: pip install 'sam_optim[bench]'") from None
    found = load_digits()
    x = torch.tensor(found.images, dtype=torch.float32).unsqueeze(1) / 16
    x = (x - x[:DIGITS_TRAIN].mean()) / x[:DIGITS_TRAIN].std()
    return x, torch.tensor(found.target, dtype=torch.int64)


def _npz(path: Path) -> dict[str, Tensor]:
    import numpy as np

    try:
        with np.load(path, allow_pickle=False) as file:
            return {name: torch.from_numpy(_native(file[name])) for name in ("x", "y") if name in file}
    except (zipfile.BadZipFile, ValueError, OSError, EOFError, TypeError, KeyError, AttributeError) as error:
        raise InputError(f"{path} is damaged or holds more than plain arrays: {one_line(error)[:200]}") from None


def _native(x: Any) -> Any:
    """In this machine's byte order, and in a type that torch has."""
    import numpy as np

    x = np.ascontiguousarray(x)
    if x.dtype in (np.uint16, np.uint32, np.uint64):
        return x.astype(np.int64)
    return x.astype(x.dtype.newbyteorder("="))


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)


def _idx(folder: Path, name: str, dimensions: int) -> Tensor:
    """A file of MNIST's format: two zeros, the type (8: uint8), the number of dimensions, their sizes, the entries."""
    path = _idx_file(folder, f"{name}-ubyte") or folder / f"{name}-ubyte"
    try:
        content = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
        sizes = [int.from_bytes(content[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
        if content[:4] != bytes([0, 0, 8, dimensions]):
            raise ValueError(f"it begins with {content[:4].hex()}")
        entries = torch.frombuffer(bytearray(content), dtype=torch.uint8, offset=4 + 4 * dimensions)
        return entries.reshape(sizes)
    except (ValueError, RuntimeError, OSError, EOFError) as error:
        raise InputError(f"{path} is not a file of MNIST ({one_line(error)}); unpack the archive again") from None
