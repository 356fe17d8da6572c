"""Data that are arrays: files with x and y, and the published files of CIFAR and MNIST. Nothing in them is run."""

from __future__ import annotations

import gzip
import io
import math
import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sam_optim.core.errors import InputError, one_line
from sam_optim.core.files import LARGEST, open_regular
from sam_optim.vision import cifar
from sam_optim.vision.tensor_files import check_plain, check_sizes, read_file

SUFFIXES = (".npz", ".safetensors", ".pt", ".pth")
DIGITS_TRAIN = 898  # scikit-learn's example "Recognizing hand-written digits": the first half, as published
MNIST = ("MNIST", "FashionMNIST", "KMNIST")


def from_file(path: Path) -> tuple[Tensor, Tensor]:
    """x and y of a file, with one row for each example.

    x: (N, ...); uint8 must be images, (N, C, H, W) or (N, H, W, C), and comes out as (N, C, H, W). y: (N,) int64
    classes, or (N, K) probabilities.
    """
    content = read_npz(path, ("x", "y")) if path.suffix == ".npz" else read_file(path)
    if not isinstance(content, dict) or not all(isinstance(content.get(k), Tensor) for k in ("x", "y")):
        has = ", ".join(map(str, list(content)[:6])) if isinstance(content, dict) else type(content).__name__
        raise InputError(f"{path} must hold two arrays named x and y, it has {has}")
    x, y = content["x"], content["y"]
    for name in ("x", "y"):
        check_plain(f"{name} in {path}", content[name])
    if not x.ndim or not y.ndim or len(x) != len(y) or not len(x):
        raise InputError(f"{path}: x and y need one row for each example, got {tuple(x.shape)} and {tuple(y.shape)}")
    if y.is_floating_point() and y.ndim == 1:
        raise InputError(f"{path}: y must be whole numbers (classes), or (N, K) probabilities, got {y.dtype}")
    if x.dtype == torch.uint8 and x.ndim != 4:
        raise InputError(f"{path}: x of uint8 must be images, (N, C, H, W) or (N, H, W, C); got {tuple(x.shape)}")
    if x.dtype == torch.uint8 and x.shape[1] not in (1, 3) and x.shape[3] in (1, 3):
        x = x.permute(0, 3, 1, 2)
    return x, y if y.is_floating_point() else y.to(torch.int64)


def read_npz(path: Path, names: Sequence[str] | None = None) -> dict[str, Tensor]:
    """The arrays of an .npz file, or those that have these names; object arrays, which are pickles, are refused."""
    try:
        with open_regular(path) as file, zipfile.ZipFile(file) as archive:
            check_sizes(path, archive)
            inside = [name.removesuffix(".npy") for name in archive.namelist()]
            present = inside if names is None else [name for name in names if name in inside]
            return {name: torch.from_numpy(_native(_read_npy(archive.read(f"{name}.npy")))) for name in present}
    except InputError:
        raise
    except Exception as error:  # zlib.error, LZMAError, struct.error ...: whatever a damaged archive can hold
        raise InputError(f"{path} is damaged or holds more than plain arrays: {one_line(error)[:200]}") from None


def _read_npy(content: bytes) -> Any:
    """An array in these bytes, if they are as many as its header claims: NumPy would make room for all first."""
    import numpy as np

    file = io.BytesIO(content)
    version = np.lib.format.read_magic(file)
    header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, fortran, dtype = header(file)
    if math.prod(shape) * dtype.itemsize > len(content):
        raise ValueError(f"an array claims the shape {shape}, with {len(content)} bytes")
    x = np.frombuffer(content, dtype, math.prod(shape), file.tell())
    return x.reshape(shape, order="F" if fortran else "C")


@dataclass(frozen=True)
class Published:
    """CIFAR or MNIST in torchvision's layout."""

    name: str
    directory: Path

    def read(self, train: bool) -> tuple[Tensor, Tensor]:
        """Images uint8 (N, C, H, W) and labels int64 (N,)."""
        if self.name in cifar.LAYOUT:
            return cifar.read(self.name, self.directory)[0 if train else 1]
        part = "train" if train else "t10k"
        pixels = _idx(self.directory, f"{part}-images-idx3", 3).unsqueeze(1)
        return pixels, _idx(self.directory, f"{part}-labels-idx1", 1).to(torch.int64)


def published(directory: Path) -> Published | None:
    """The published data set in a directory, if there is one.

    Raises:
        InputError: there are several.
    """
    places = [
        Published(name, place)
        for name, (folder, *_) in cifar.LAYOUT.items()
        for place in (directory, directory / folder)
        if place.name == folder and place.is_dir()
    ]
    raw = [Published(name.lower(), directory / name / "raw") for name in MNIST]
    raw += [Published(directory.name.lower(), place) for place in (directory / "raw", directory)]
    places += [data_set for data_set in raw if _idx_file(data_set.directory, "train-labels-idx1-ubyte")]
    if len(places) > 1:
        names = " and ".join(data_set.name for data_set in places)
        raise InputError(f"{directory} holds {names}: give --data {places[0].directory}")
    return places[0] if places else None


def digits() -> tuple[Tensor, Tensor]:
    """scikit-learn's 1,797 digits: float32 (N, 1, 8, 8), normalized by the first `DIGITS_TRAIN`, and their labels."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("--data digits needs scikit-learn: pip install 'sam_optim[bench]'") from None
    bundle = load_digits()
    x = torch.tensor(bundle.images, dtype=torch.float32).unsqueeze(1) / 16
    x = (x - x[:DIGITS_TRAIN].mean()) / x[:DIGITS_TRAIN].std()
    return x, torch.tensor(bundle.target, dtype=torch.int64)


def _native(x: Any) -> Any:
    """The array in this machine's byte order, in a dtype that torch has."""
    import numpy as np

    wide = x.dtype.newbyteorder("=") in (np.uint16, np.uint32, np.uint64)
    return np.array(x, np.int64 if wide else x.dtype.newbyteorder("="), order="C")


def _idx_file(folder: Path, name: str) -> Path | None:
    return next((p for p in (folder / name, folder / f"{name}.gz") if p.is_file()), None)


def _idx(folder: Path, name: str, dimensions: int) -> Tensor:
    """A file of MNIST's format: two zeros, the type (8: uint8), the number of dimensions, their sizes, the entries."""
    path = _idx_file(folder, f"{name}-ubyte") or folder / f"{name}-ubyte"
    try:
        with open_regular(path) as raw, gzip.open(raw) if path.suffix == ".gz" else raw as file:
            head = file.read(4 + 4 * dimensions)
            if head[:4] != bytes([0, 0, 8, dimensions]):
                raise ValueError(f"it begins with {head[:4].hex()}")
            sizes = [int.from_bytes(head[4 + 4 * i : 8 + 4 * i], "big") for i in range(dimensions)]
            content, num_bytes = bytearray(), min(math.prod(sizes), LARGEST)
            while len(content) <= num_bytes and (block := file.read(1 << 20)):
                content += block
        return torch.frombuffer(content, dtype=torch.uint8).reshape(sizes)
    except (ValueError, RuntimeError, OSError, EOFError, zlib.error) as error:
        raise InputError(f"{path} is not a file of MNIST ({one_line(error)}); unpack the archive again") from None
