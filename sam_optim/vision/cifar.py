"""CIFAR-10 and CIFAR-100 in torchvision's layout, read into memory without running their pickles."""

from __future__ import annotations

import hashlib
import io
import pickle
import pickletools
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sam_optim.core.errors import InputError, one_line
from sam_optim.core.files import read_bytes

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
    files = [*dataset.train_list, *dataset.test_list]
    return all(hashlib.md5(read_bytes(root / f), usedforsecurity=False).hexdigest() == md5 for f, md5 in files)


class _Inert:
    """Stands for a name of NumPy in a pickle. It only notes what it is called with: nothing of NumPy is made."""

    def __init__(self, name: str, arguments: tuple[Any, ...] = ()):
        self.name, self.arguments, self.state = name, arguments, None

    def __call__(self, *arguments: Any) -> _Inert:
        return _Inert(self.name, arguments)

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _Unpickler(pickle.Unpickler):
    """Reads dictionaries, lists, text, numbers, and arrays as `_Inert`; the archive's files hold nothing else."""

    NAMES = ("_reconstruct", "ndarray", "dtype")

    def __init__(self, content: bytes):
        super().__init__(io.BytesIO(content), encoding="latin1")
        self._left = len(content)

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("_codecs", "encode"):
            return self._encoded
        if module not in ("numpy", "numpy.core.multiarray", "numpy._core.multiarray") or name not in self.NAMES:
            raise pickle.UnpicklingError(f"it refers to {module}.{name}, which no CIFAR file needs")
        return _Inert(name)

    def _encoded(self, text: str, encoding: str) -> bytes:
        """How Python 3 writes bytes for Python 2. All of them together are not longer than the file."""
        self._left -= len(text)
        if encoding != "latin1" or self._left < 0:
            raise pickle.UnpicklingError("it has more text than a CIFAR file")
        return text.encode(encoding)


def _checked(content: bytes) -> bytes:
    """Refuses what the archive's files do not have, before anything is made of it."""
    for opcode, argument, _ in pickletools.genops(content):
        if opcode.name in ("INST", "OBJ", "NEWOBJ", "NEWOBJ_EX", "EXT1", "EXT2", "EXT4", "PERSID", "BINPERSID", "DUP"):
            raise pickle.UnpicklingError(f"it has the instruction {opcode.name}, which no CIFAR file needs")
        if "PUT" in opcode.name and isinstance(argument, int) and argument > len(content):
            raise pickle.UnpicklingError("it refers to more objects than it has")  # the table of them would fill memory
    return content


def _pixels(array: Any) -> Tensor:
    """uint8 (N, 3072) of a pickled array of NumPy: (version, shape, dtype, Fortran order, bytes)."""
    if not isinstance(array, _Inert) or array.name != "_reconstruct" or not isinstance(array.state, tuple):
        raise ValueError(f"data is {type(array).__name__}, not an array")
    _, shape, dtype, fortran, content = array.state
    content = content.encode("latin1") if isinstance(content, str) else content
    if not isinstance(dtype, _Inert) or dtype.arguments[:1] not in (("u1",), ("B",)) or fortran is not False:
        raise ValueError("data is not a C-contiguous array of uint8")
    return torch.frombuffer(bytearray(content), dtype=torch.uint8).reshape(tuple(shape))


def _read_file(path: Path, key: str) -> tuple[Tensor, Tensor]:
    if not path.exists():
        raise InputError(f"{path} is missing; unpack the archive again")
    content = read_bytes(path)
    try:
        batch = _Unpickler(_checked(content)).load()
        if not isinstance(batch[key], list) or not all(isinstance(label, int) for label in batch[key]):
            raise ValueError(f"{key} is not a list of whole numbers")
        pixels, labels = _pixels(batch["data"]), torch.tensor(batch[key], dtype=torch.int64)
        if pixels.shape != (len(labels), 3072):
            raise ValueError(f"data is {tuple(pixels.shape)}, labels are {tuple(labels.shape)}")
    except Exception as error:  # whatever a damaged pickle makes of Python's own functions
        raise InputError(f"{path} is not a CIFAR file ({one_line(error)}); unpack the archive again") from None
    return pixels.reshape(-1, 3, 32, 32), labels
