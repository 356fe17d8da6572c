"""CIFAR-10 and CIFAR-100 in torchvision's layout, read into memory without running their pickles."""

from __future__ import annotations

import hashlib
import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sam_optim.core.errors import InputError, one_line

# folder, training files, test file, key of the labels
LAYOUT = {
    "cifar10": ("cifar-10-batches-py", [f"data_batch_{i}" for i in range(1, 6)], "test_batch", "labels"),
    "cifar100": ("cifar-100-python", ["train"], "test", "fine_labels"),
}
STATISTICS = {  # mean and standard deviation of the training pixels, in [0, 1]
    "cifar10": ((0.4914, 0.4822, 0.4465), (0.2470, 0.2435, 0.2616)),
    "cifar100": ((0.5071, 0.4865, 0.4409), (0.2673, 0.2564, 0.2762)),
}


def read(name: str, directory: Path) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """(images, labels) for training and for testing: uint8 (N, 3, 32, 32) and int64 (N,). Nothing is downloaded."""
    folder, train, test, key = LAYOUT[name]
    root = directory if directory.name == folder else directory / folder
    if not root.is_dir():
        raise InputError(
            f"{directory} has no {folder}/: unpack the python version of the archive there "
            f"(https://www.cs.toronto.edu/~kriz/cifar.html), or give --data folder for a tree of images"
        )
    parts = [_read_file(root / file, key) for file in train]
    return (torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts])), _read_file(root / test, key)


def official(name: str, directory: Path) -> bool:
    """Whether the files are those of the published archive (torchvision's md5 sums); other pixels, other accuracies."""
    from torchvision import datasets

    dataset = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    root = directory if directory.name == dataset.base_folder else directory / dataset.base_folder
    return all(_md5(root / file) == md5 for file, md5 in [*dataset.train_list, *dataset.test_list])


def _md5(path: Path) -> str:
    return hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()


class _ArraysOnly(pickle.Unpickler):
    """The archive's files are pickles; one that was tampered with could run anything. Only numpy arrays are let in."""

    ALLOWED = frozenset(
        (module, name)
        for module, name in (
            ("numpy.core.multiarray", "_reconstruct"),
            ("numpy._core.multiarray", "_reconstruct"),
            ("numpy", "ndarray"),
            ("numpy", "dtype"),
            ("_codecs", "encode"),
        )
    )

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) not in self.ALLOWED:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no CIFAR file needs")
        return super().find_class(module.replace("numpy.core", "numpy._core"), name)


def _read_file(path: Path, key: str) -> tuple[Tensor, Tensor]:
    import numpy as np

    try:
        content = _ArraysOnly(io.BytesIO(path.read_bytes()), encoding="latin1").load()
        pixels, labels = np.asarray(content["data"]), content[key]
        if pixels.dtype != np.uint8 or pixels.shape != (len(labels), 3072):
            raise ValueError(f"data is {pixels.dtype} {pixels.shape}, labels are {len(labels)}")
    except FileNotFoundError:
        raise InputError(f"{path} is missing; unpack the archive again") from None
    except (pickle.UnpicklingError, EOFError, KeyError, ValueError, TypeError, AttributeError, IndexError) as error:
        raise InputError(f"{path} is not a CIFAR file ({one_line(error)}); unpack the archive again") from None
    images = torch.from_numpy(pixels.reshape(-1, 3, 32, 32).copy())
    return images, torch.tensor(labels, dtype=torch.int64)
