"""CIFAR-10 and CIFAR-100 in torchvision's layout, as `sam-optim measure` reads them, and labels by others."""

from __future__ import annotations

import zipfile
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks.command import InputError, one_line, unknown
from sam_optim.vision.cifar import LAYOUT, STATISTICS, official, read

__all__ = ["LAYOUT", "STATISTICS", "official", "other_labels", "read"]


def other_labels(source: str, labels: Tensor, num_classes: int, directory: Path | None = None) -> Tensor:
    """(N,): the array of FILE.npz:ARRAY, labels of the same images by others; FILE may be relative to `directory`.
    Where the file also has an array `clean_label`, as that of CIFAR-10N has, it must be `labels`: else its images are
    in another order."""
    path, _, name = source.rpartition(":")
    if not path:
        raise InputError(f"--train-labels is FILE.npz:ARRAY, got {source!r}")
    if directory is not None and not Path(path).exists() and (directory / path).exists():
        path = str(directory / path)
    try:
        with np.load(path, allow_pickle=False) as file:
            if name not in file.files:
                raise unknown(f"array of {path}", name, file.files)
            found = file[name]
            clean = file["clean_label"] if "clean_label" in file.files else None
    except (OSError, ValueError, zipfile.BadZipFile, TypeError, AttributeError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"--train-labels {path} is not an .npz file of labels ({one_line(error)})") from None
    if found.shape != (len(labels),) or found.dtype.kind not in "iu":
        raise InputError(f"{source} must hold {len(labels)} integers, got {found.dtype} of shape {found.shape}")
    if found.min() < 0 or found.max() >= num_classes:
        raise InputError(f"{source} must hold labels from 0 to {num_classes - 1}, got {found.min()} to {found.max()}")
    if clean is not None and not np.array_equal(clean, labels.numpy()):
        raise InputError(f"the clean_label of {path} are not the labels of these images: they are in another order")
    return torch.from_numpy(found.astype(np.int64))
