"""What is done to every image before a model sees it: size, crop, interpolation, mean and standard deviation."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.command import InputError
from benchmarks.train.models import SMALL, data_config

NAMES = ("mean", "std", "crop_pct", "interpolation", "crop_mode")
INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")


@dataclass(frozen=True)
class Preprocessing:
    """Evaluation resizes to size / crop_pct and takes the middle; training has its own crops. None is the default:
    ImageNet's mean and standard deviation (grey: 0.5, 0.25), crop_pct 0.875, bilinear, center.

    mean, std: of pixels in [0, 1]; one number for each channel, or one for all.
    """

    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    crop_pct: float | None = None
    interpolation: str | None = None
    crop_mode: str | None = None

    def arguments(self, image_size: tuple[int, int, int]) -> dict[str, Any]:
        """Those of timm's `create_transform` for images of that size: up to 64 pixels nothing is cut off."""
        from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD

        colour = image_size[0] == 3
        mean, std = (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD) if colour else ((0.5,), (0.25,))
        return {
            "mean": per_channel("--mean", self.mean or mean, image_size[0]),
            "std": per_channel("--std", self.std or std, image_size[0]),
            "crop_pct": 1.0 if image_size[1] <= SMALL else self.crop_pct or 0.875,
            "interpolation": self.interpolation or "bilinear",
            "crop_mode": self.crop_mode or "center",
        }


DEFAULT = Preprocessing()


class ImageSize(tuple[int, int, int]):
    """(C, H, W), and how an image becomes that: whoever has the size of a run's images makes them as the run did."""

    preprocessing: Preprocessing

    def __new__(cls, size: tuple[int, int, int], preprocessing: Preprocessing) -> ImageSize:
        made = super().__new__(cls, size)
        made.preprocessing = preprocessing
        return made


def of_size(image_size: tuple[int, int, int]) -> dict[str, Any]:
    """`Preprocessing.arguments` of an `ImageSize`; of a plain tuple the default's."""
    return getattr(image_size, "preprocessing", DEFAULT).arguments(image_size)


def of_weights(model: str) -> dict[str, Any]:
    """By name in `NAMES`: what timm says that the pretrained weights of `model` were trained with."""
    found = data_config(model)
    return {name: list(value) if isinstance(value := found[name], tuple) else value for name in NAMES}


def per_channel(option: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    """One for all channels becomes that of each; those of colours become their mean for a grey image."""
    if len(values) == 1:
        return tuple(values) * channels
    if channels == 1:
        return (sum(values) / len(values),)
    if len(values) != channels:
        raise InputError(f"{option} takes one number or {channels}, for images of {channels} channels, got {values}")
    return tuple(values)
