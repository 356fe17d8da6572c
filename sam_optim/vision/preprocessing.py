"""How an image becomes what a model sees: size, crop, interpolation, mean and standard deviation."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sam_optim.core.errors import InputError, unknown
from sam_optim.vision.models import SMALL, data_config

INTERPOLATIONS = ("nearest", "bilinear", "bicubic", "box", "hamming", "lanczos")
CROP_MODES = ("center", "squash", "border")
LARGEST = 1 << 14  # pixels
NORMALIZED = ("mean", "std")
IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class Preprocessing:
    """x = (pixels / 255 - mean) / std, of the middle of an image that was resized to H / crop_pct, W / crop_pct.

    Every field holds its real value once the object is made.

    Args:
        image_size: (C, H, W).
        mean, std: of pixels in [0, 1], one number for each channel or one for all; for grey images the numbers of three
            colours become their mean. None: ImageNet's, 0.5 and 0.25 for grey images.
        crop_pct: None: 0.875, or 1 for images of up to 64 pixels.
        interpolation, crop_mode: timm's words.
    """

    image_size: tuple[int, int, int]
    mean: Sequence[float] | None = None
    std: Sequence[float] | None = None
    crop_pct: float | None = None
    interpolation: str = "bilinear"
    crop_mode: str = "center"

    def __post_init__(self) -> None:
        channels, height, width = self.image_size
        if not all(isinstance(n, int) and 0 < n <= LARGEST for n in self.image_size):
            raise InputError(f"an image size is (channels, height, width), up to {LARGEST}, got {self.image_size}")
        if self.interpolation not in INTERPOLATIONS:
            raise unknown("interpolation", str(self.interpolation), INTERPOLATIONS)
        if self.crop_mode not in CROP_MODES:
            raise unknown("crop mode", str(self.crop_mode), CROP_MODES)
        mean, std = ((0.5,), (0.25,)) if channels == 1 else (IMAGENET_MEAN, IMAGENET_STD)
        values = {
            "image_size": (channels, height, width),
            "mean": per_channel("--mean", self.mean or mean, channels),
            "std": per_channel("--std", self.std or std, channels),
            "crop_pct": self.crop_pct or (1.0 if max(height, width) <= SMALL else 0.875),
        }
        for name, value in values.items():
            object.__setattr__(self, name, value)

    @classmethod
    def of_model(cls, name: str, *, channels: int | None = None, image_size: int | None = None) -> Preprocessing:
        """What timm says that the pretrained weights of a model were trained with. image_size: another H = W."""
        config = data_config(name)
        own_channels, *own_size = config["input_size"]
        size = (channels or own_channels, *([image_size] * 2 if image_size else own_size))
        crop_pct = config["crop_pct"] if max(size[1:]) > SMALL else None
        return cls(size, config["mean"], config["std"], crop_pct, config["interpolation"], config["crop_mode"])

    @classmethod
    def of_run(cls, about: Mapping[str, Any]) -> Preprocessing | None:
        """How a run of benchmarks.train sees images, from "image_size" and "preprocessing"; None if it does not say."""
        if not (about.get("image_size") and about.get("preprocessing")):
            return None
        return cls(tuple(about["image_size"]), **about["preprocessing"])

    def replaced(self, *, image_size: int | None = None, **changes: Any) -> Preprocessing:
        """A copy with other values; None keeps a value. image_size: H = W, in pixels."""
        changes = {name: value for name, value in changes.items() if value is not None}
        if image_size is not None:
            changes["image_size"] = (self.image_size[0], image_size, image_size)
            if min(image_size, max(self.image_size[1:])) <= SMALL:
                changes.setdefault("crop_pct", None)
        return dataclasses.replace(self, **changes)

    def to_dict(self) -> dict[str, Any]:
        """All but the image size, as plain values: "preprocessing" in the config of a run."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        del values["image_size"]
        return values | {"mean": list(values["mean"]), "std": list(values["std"])}

    def arguments(self) -> dict[str, Any]:
        """Arguments of timm's `create_transform`."""
        values = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        return {"input_size": values.pop("image_size")} | values

    def transform(self) -> Any:
        """timm's transform for evaluation: a PIL image -> (C, H, W) float32."""
        from timm.data import create_transform

        return create_transform(**self.arguments(), is_training=False)

    @property
    def mode(self) -> str:
        """PIL's name for the colours of such images."""
        if self.image_size[0] not in (1, 3):
            raise InputError(
                f"images have 1 or 3 channels, the model takes {self.image_size[0]}: give --data a file with x and y"
            )
        return "RGB" if self.image_size[0] == 3 else "L"


def described(about: Mapping[str, Any]) -> str:
    """What is done to an example, in words, from `Preprocessing.arguments` or a part of them."""
    normalized = ", ".join(
        f"{name} {' '.join(f'{v:.4g}' for v in about[name])}" for name in about if name in NORMALIZED
    )
    if "input_size" not in about:
        return (
            f"pixels are divided by 255, not resized or cropped, {normalized}" if normalized else "x is taken as it is"
        )
    _, *size = about["input_size"]
    high, wide = (math.floor(n / about["crop_pct"]) for n in size)
    to = {"center": "to cover", "border": "to fit into", "squash": "whatever their proportions to"}[about["crop_mode"]]
    resized = f"{to} {high} x {wide} pixels ({about['interpolation']})"
    why = f"; up to {SMALL} pixels nothing more is cut off" if about["crop_pct"] == 1 and max(size) <= SMALL else ""
    cropped = f"{size[0]} x {size[1]} in the middle (crop_pct {about['crop_pct']:.4g}{why})"
    return f"images are resized {resized} and cropped to {cropped}, {normalized}"


def per_channel(option: str, values: Sequence[float], channels: int) -> tuple[float, ...]:
    """One number for each channel, from one for all, or from those of three colours for a grey image."""
    if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values):
        raise InputError(f"{option} needs finite numbers, got {values}")
    if len(values) == 1:
        return tuple(values) * channels
    if channels == 1:
        return (sum(values) / len(values),)
    if len(values) != channels:
        raise InputError(f"{option} needs 1 or {channels} numbers for {channels} channels, got {len(values)}")
    return tuple(values)
