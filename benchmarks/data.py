"""Data sets: scikit-learn's digits in memory, CIFAR in torchvision's layout, image folders, whatever timm knows."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset, TensorDataset

from benchmarks.command import InputError
from sam_optim.rng import Stream

DIGITS_TRAIN = (
    898  # scikit-learn's own example "Recognizing hand-written digits": the first half, in the published order
)


class Splits(NamedTuple):
    """train has the labels that training sees; validation (held out of train) and test are never made noisy.

    image_size: (C, H, W). clean_train_labels: (N,) int64, the labels before noise; empty where they are not known
    without reading every example.
    """

    train: Dataset
    validation: Dataset | None
    test: Dataset
    num_classes: int
    image_size: tuple[int, int, int]
    clean_train_labels: Tensor


def derive(seed: int, *path: int | str) -> int:
    """A seed for one purpose, e.g. ("order", epoch): 48 bits that depend on every part, with no state to save."""
    digest = hashlib.blake2b(repr((seed, *path)).encode(), digest_size=6).digest()
    return int.from_bytes(digest, "big")


def digits(*, label_noise: float = 0.0, seed: int = 0, validation_fraction: float = 0.0) -> Splits:
    """scikit-learn's 1,797 handwritten digits, 8x8: the first 898 for training, the last 899 for testing.

    That is the split of scikit-learn's example "Recognizing hand-written digits" (unshuffled halves). Images are
    float32 (N, 1, 8, 8), scaled to [0, 1], then normalised with the mean and standard deviation of the 898.

    Args:
        label_noise: fraction of the training labels that is replaced by a label drawn uniformly from all ten.
        seed: draws the noise, and which examples go to validation.
        validation_fraction: fraction of the 898 held out, with clean labels.
    """
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise InputError("--data digits needs scikit-learn: pip install 'sam_optim[bench]'") from None
    bunch = load_digits()
    images = torch.tensor(bunch.images, dtype=torch.float32).unsqueeze(1) / 16
    labels = torch.tensor(bunch.target, dtype=torch.int64)
    images = (images - images[:DIGITS_TRAIN].mean()) / images[:DIGITS_TRAIN].std()
    kept, held = hold_out(DIGITS_TRAIN, validation_fraction, seed)
    clean = labels[kept]
    return Splits(
        train=TensorDataset(images[kept], noisy(clean, 10, label_noise, seed)),
        validation=TensorDataset(images[held], labels[held]) if len(held) else None,
        test=TensorDataset(images[DIGITS_TRAIN:], labels[DIGITS_TRAIN:]),
        num_classes=10,
        image_size=(1, 8, 8),
        clean_train_labels=clean,
    )


def hold_out(n: int, fraction: float, seed: int) -> tuple[Tensor, Tensor]:
    """Sorted indices of the examples to train on, and of round(fraction * n) drawn for validation."""
    if not 0 <= fraction < 1:
        raise InputError(f"--validation-fraction is a part of the training set and must be in [0, 1), got {fraction}")
    order = Stream(derive(seed, "validation")).permutation(n)
    num_held = round(fraction * n)
    return order[num_held:].sort().values, order[:num_held].sort().values


def noisy(labels: Tensor, num_classes: int, fraction: float, seed: int) -> Tensor:
    """A copy with exactly round(fraction * n) labels drawn anew, uniformly: 1 in num_classes of them stays right."""
    if not 0 <= fraction <= 1:
        raise InputError(f"--label-noise is a fraction of the training labels and must be in [0, 1], got {fraction}")
    stream = Stream(derive(seed, "label noise"))
    chosen = stream.permutation(len(labels))[: round(fraction * len(labels))]
    result = labels.clone()
    result[chosen] = stream.integers(num_classes, (len(chosen),))
    return result


class Batches:
    """Batches of tensors that are in memory: one gather each, no workers.

    The order is a function of (seed, epoch) alone; call `set_epoch` before each epoch, as with DistributedSampler.

    Args:
        shuffle: a new permutation for each epoch, else the order of the data.
        drop_last: leave out an incomplete last batch.
    """

    def __init__(
        self, dataset: TensorDataset, batch_size: int, *, shuffle: bool = False, drop_last: bool = False, seed: int = 0
    ):
        self.dataset = dataset
        self.batch_size = batch_size
        self.shuffle = shuffle
        self.drop_last = drop_last
        self.seed = seed
        self.set_epoch(0)

    def set_epoch(self, epoch: int, first_batch: int = 0) -> None:
        """The next iteration gives the batches of `epoch` from `first_batch` on."""
        self.epoch, self.first_batch = epoch, first_batch

    def __len__(self) -> int:
        n = len(self.dataset)
        return n // self.batch_size if self.drop_last else -(-n // self.batch_size)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        n = len(self.dataset)
        order = Stream(derive(self.seed, "order", self.epoch)).permutation(n) if self.shuffle else torch.arange(n)
        for i in range(self.first_batch, len(self)):
            rows = order[i * self.batch_size : (i + 1) * self.batch_size]
            images, labels = self.dataset.tensors
            yield images[rows], labels[rows]
