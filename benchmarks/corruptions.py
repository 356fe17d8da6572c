"""Corrupted images: the noise, blur, weather and digital damage of CIFAR-10-C.

The kinds and names are those of Hendrycks and Dietterich (arXiv:1903.12261). The levels are those with which their
script made CIFAR-10-C (github.com/hendrycks/robustness, make_cifar_c.py), in units of 1/32 of the height for lengths,
but for: elastic_transform, glass_blur and saturate, whose levels there are not in order of damage; frost and spatter,
which need photographs and edge detection there, and are drawn here. Accuracies on these images are therefore not those
on the published files, which `Published` reads.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy import ndimage

from benchmarks.train.order import derive
from sam_optim.core.errors import InputError, one_line, unknown
from sam_optim.core.files import open_regular

Floats = NDArray[np.float32]  # (n, h, w, 3) in [0, 1]
Draws = list[np.random.Generator]  # one for each image
SEVERITIES = (1, 2, 3, 4, 5)
CHUNK = 500  # images at a time: floats take four times the memory of their bytes


def corrupted(
    images: NDArray[np.uint8], name: str, severity: int, *, seed: int = 0, first: int = 0
) -> NDArray[np.uint8]:
    """Copies of the images, damaged.

    What is drawn for image i is a function of (seed, name, first + i), the same for every severity: a level differs
    from the one below it by its strength alone, and images may be given in parts.

    Args:
        images: (n, h, w, 3) uint8.
        name: one of `NAMES`.
        severity: 1 to 5.
        first: the number of images[0], where they are a part of a data set.

    Raises:
        InputError: an unknown name, a severity that does not exist.
        TypeError: the images are not (n, h, w, 3) uint8.
    """
    check([name], [severity])
    images = np.asarray(images)
    if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3:
        raise TypeError(f"images must be uint8 of shape (n, h, w, 3), got {images.dtype} {images.shape}")
    damage, levels = KINDS[name]
    result = np.empty_like(images)
    for start in range(0, len(images), CHUNK):
        part = images[start : start + CHUNK]
        draws = [np.random.default_rng(derive(seed, name, first + start + i)) for i in range(len(part))]
        damaged = damage(part.astype(np.float32) / 255, levels[severity - 1], draws)
        result[start : start + CHUNK] = np.rint(np.clip(damaged, 0, 1) * 255)
    return result


def check(names: list[str], severities: list[int]) -> None:
    for name in names:
        if name not in KINDS:
            raise unknown("corruption", name, KINDS, limit=20)
    for severity in severities:
        if severity not in SEVERITIES:
            raise InputError(f"a severity is 1, 2, 3, 4 or 5, got {severity}")


class Published:
    """A folder of CIFAR-10-C or CIFAR-100-C as published: NAME.npy and labels.npy, 10,000 images for each severity."""

    def __init__(self, directory: str | Path):
        self.directory = Path(directory)
        self.names = sorted(p.stem for p in self.directory.glob("*.npy") if p.stem != "labels")
        if not self.names:
            raise InputError(f"{directory} is no folder of CIFAR-10-C: it has no NAME.npy; give the unpacked archive")

    def images(self, name: str, severity: int) -> tuple[NDArray[np.uint8], NDArray[np.int64]]:
        """((n, 32, 32, 3) uint8, (n,) int64), a fifth of the file."""
        if name not in self.names:
            raise unknown("corruption", name, self.names, limit=20)
        check([], [severity])
        images, labels = self._read(name), self._read("labels")
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[3] != 3 or len(images) % len(SEVERITIES):
            raise InputError(
                f"{self.directory / name}.npy holds {images.dtype} {images.shape}, not (5n, h, w, 3) uint8"
            )
        if labels.shape != images.shape[:1] or labels.dtype.kind not in "iu":
            shape = f"has shape {labels.shape} of {labels.dtype}"
            raise InputError(f"{self.directory}/labels.npy {shape}, and there are {len(images)} images")
        n = len(images) // len(SEVERITIES)
        rows = slice((severity - 1) * n, severity * n)
        return np.array(images[rows]), labels[rows].astype(np.int64)

    def check_labels(self, labels: NDArray[np.int64], *, in_order: bool) -> None:
        """Compares labels.npy with those of the clean test images, (n,); in_order: these are as in CIFAR's own files.

        Raises:
            InputError: the folder is of another data set, or its labels are not those of its images.
        """
        published, num = self._read("labels"), len(labels)
        if published.dtype.kind not in "iu":
            wrong = f"holds {published.dtype}, not integers"
        elif published.size and published.max() > labels.max():
            wrong = f"has labels up to {published.max()}, and the test images up to {labels.max()}"
        elif (
            in_order
            and published.shape == (5 * num,)
            and (differing := (published.reshape(5, num) != labels).any(0)).any()
        ):
            wrong = f"differs from the labels of {differing.sum()} of {num} test images"
        else:
            return
        raise InputError(f"{self.directory}/labels.npy {wrong}: give the unpacked archive of the run's own data set")

    def _read(self, name: str) -> Any:
        path = self.directory / f"{name}.npy"
        try:
            open_regular(path).close()
            return np.load(path, mmap_mode="r", allow_pickle=False)
        except Exception as error:  # EOFError, SyntaxError ...: whatever NumPy makes of a damaged header
            raise InputError(f"{path} cannot be read ({one_line(error)}); unpack the archive again") from None


# noise


def gaussian_noise(x: Floats, sigma: float, draws: Draws) -> Floats:
    return x + sigma * _each(draws, lambda draw: draw.standard_normal(x.shape[1:], np.float32))


def shot_noise(x: Floats, photons: float, draws: Draws) -> Floats:
    return np.stack([draw.poisson(image * photons) for draw, image in zip(draws, x, strict=True)]) / photons


def impulse_noise(x: Floats, amount: float, draws: Draws) -> Floats:
    """Salt and pepper, for each channel."""
    u = _each(draws, lambda draw: draw.random(x.shape[1:], np.float32))
    return np.where(u < amount / 2, 0, np.where(u < amount, 1, x))


def speckle_noise(x: Floats, sigma: float, draws: Draws) -> Floats:
    return x + x * sigma * _each(draws, lambda draw: draw.standard_normal(x.shape[1:], np.float32))


# blur


def gaussian_blur(x: Floats, sigma: float, draws: Draws) -> Floats:
    return ndimage.gaussian_filter(x, sigma * _unit(x), axes=(1, 2), mode="nearest")


def defocus_blur(x: Floats, level: tuple[float, float], draws: Draws) -> Floats:
    """A disk of `radius`, with its edge smoothed by `alias`."""
    radius, alias = (length * _unit(x) for length in level)
    reach = math.ceil(radius + 2 * alias)
    i = np.arange(-reach, reach + 1)
    disk = (i[:, None] ** 2 + i**2 <= radius**2).astype(np.float32)
    kernel = ndimage.gaussian_filter(disk, alias, mode="constant")
    return ndimage.convolve(x, (kernel / kernel.sum())[None, :, :, None], mode="mirror")


def glass_blur(x: Floats, level: tuple[float, int], draws: Draws) -> Floats:
    """A fraction of the pixels takes the place of one at most a unit above or left of it, `rounds` times."""
    fraction, rounds = level
    delta = max(1, round(_unit(x)))
    n, height, width, _ = x.shape
    image, row, column = np.ogrid[:n, :height, :width]
    x = gaussian_blur(x, 0.4, draws)
    for _ in range(rounds):
        moves = _each(draws, lambda draw: draw.random((height, width))) < fraction
        shifts = _each(draws, lambda draw: draw.integers(-delta, 1, (height, width, 2))) * moves[..., None]
        x = x[image, np.maximum(row + shifts[..., 0], 0), np.maximum(column + shifts[..., 1], 0)]
    return gaussian_blur(x, 0.4, draws)


def motion_blur(x: Floats, level: tuple[float, float], draws: Draws) -> Floats:
    angles = _each(draws, lambda draw: draw.uniform(-45, 45))
    return _streaked(x, *level, angles)


def zoom_blur(x: Floats, largest: float, draws: Draws) -> Floats:
    factors = np.arange(1, largest, 0.01)
    return (x + sum(_zoomed(x, factor) for factor in factors)) / (len(factors) + 1)


# weather


def snow(x: Floats, level: tuple[float, ...], draws: Draws) -> Floats:
    mean, sigma, zoom, threshold, radius, length, share = level
    noise = _each(draws, lambda draw: mean + sigma * draw.standard_normal((*x.shape[1:3], 1), np.float32))
    flakes = _zoomed(noise, zoom)
    flakes = np.clip(np.where(flakes < threshold, 0, flakes), 0, 1)
    flakes = _streaked(flakes, radius, length, _each(draws, lambda draw: draw.uniform(-135, -45)))
    bright = np.maximum(x, 1.5 * _grey(x) + 0.5)
    return share * x + (1 - share) * bright + flakes + np.rot90(flakes, 2, axes=(1, 2))


def frost(x: Floats, cover: float, draws: Draws) -> Floats:
    """Needles of ice before the image, which hide a part of it."""
    ice = cover * _each(draws, lambda draw: _needles(draw, x.shape[1:3]))[..., None]
    return (1 - ice) * x + ice * np.array([0.85, 0.93, 1.0], np.float32)


def fog(x: Floats, level: tuple[float, float], draws: Draws) -> Floats:
    density, decay = level
    clouds = _each(draws, lambda draw: _clouds(draw, x.shape[1:3], decay))[..., None]
    largest = x.max(axis=(1, 2, 3), keepdims=True)
    return (x + density * clouds) * largest / (largest + density)


def spatter(x: Floats, level: tuple[float, str], draws: Draws) -> Floats:
    """Drops that cover a fraction of the image: water, pale and light at the upper edge, or mud."""
    fraction, liquid = level
    fields = _each(draws, lambda draw: draw.standard_normal(x.shape[1:3], np.float32))
    fields = ndimage.gaussian_filter(fields, 1.2 * _unit(x), axes=(1, 2), mode="wrap")
    edge = np.quantile(fields, 1 - fraction, axis=(1, 2), keepdims=True)
    cover = 1 / (1 + np.exp(-8 * (fields - edge) / fields.std(axis=(1, 2), keepdims=True)))[..., None]
    if liquid == "mud":
        return (1 - cover) * x + cover * np.array([63, 42, 20], np.float32) / 255
    light = np.clip(cover - np.roll(cover, max(1, round(_unit(x))), axis=1), 0, 1)
    return (1 - 0.55 * cover) * x + 0.55 * cover * np.array([175, 238, 238], np.float32) / 255 + 0.3 * light


def brightness(x: Floats, added: float, draws: Draws) -> Floats:
    """The V of HSV; hue and saturation stay."""
    value = x.max(axis=3, keepdims=True)
    raised = np.minimum(value + added, 1)
    return np.where(value > 0, x * raised / np.maximum(value, 1e-6), raised)


# digital


def contrast(x: Floats, factor: float, draws: Draws) -> Floats:
    mean = x.mean(axis=(1, 2), keepdims=True)
    return (x - mean) * factor + mean


def saturate(x: Floats, level: tuple[float, float], draws: Draws) -> Floats:
    """The S of HSV, times a factor, plus a part of it; grey stays grey."""
    factor, added = level
    value, chroma = x.max(axis=3, keepdims=True), np.ptp(x, axis=3, keepdims=True)
    saturation = chroma / np.maximum(value, 1e-6)
    raised = np.clip(saturation * factor + added, 0, 1)
    return np.where(chroma > 0, value - (value - x) * raised / np.maximum(saturation, 1e-6), x)


def elastic_transform(x: Floats, level: tuple[float, float, float], draws: Draws) -> Floats:
    """Three points move at random by up to `affine` and the image with them; then each pixel by a smooth field."""
    strength, sigma, affine = (length * _unit(x) for length in level)
    height, width = x.shape[1:3]
    rows, columns = np.mgrid[:height, :width].astype(np.float32)
    centre, third = np.array([height // 2, width // 2]), min(height, width) // 3
    corners = centre + third * np.array([[1, 1], [1, -1], [-1, -1]])
    result = np.empty_like(x)
    for image, out, draw in zip(x, result, draws, strict=True):
        moved = corners + affine * draw.uniform(-1, 1, (3, 2))
        linear = np.linalg.solve(np.c_[moved, np.ones(3)], corners)  # from where each pixel comes
        come_from = np.stack([rows, columns, np.ones_like(rows)], axis=-1) @ linear
        field = ndimage.gaussian_filter(draw.uniform(-1, 1, (height, width, 2)), sigma, axes=(0, 1), truncate=3)
        where = np.moveaxis(come_from + strength * field, -1, 0)
        for channel in range(3):
            out[..., channel] = ndimage.map_coordinates(image[..., channel], where, order=1, mode="reflect")
    return result


def pixelate(x: Floats, factor: float, draws: Draws) -> Floats:
    height, width = x.shape[1:3]
    small = int(width * factor), int(height * factor)
    box = Image.Resampling.BOX
    return _through_pillow(x, lambda image: image.resize(small, box).resize((width, height), box))


def jpeg_compression(x: Floats, quality: int, draws: Draws) -> Floats:
    def compress(image: Image.Image) -> Image.Image:
        file = io.BytesIO()
        image.save(file, "JPEG", quality=quality)
        return Image.open(file).convert("RGB")

    return _through_pillow(x, compress)


Damage = Callable[[Floats, Any, Draws], Floats]
KINDS: dict[str, tuple[Damage, tuple[Any, ...]]] = {
    "gaussian_noise": (gaussian_noise, (0.04, 0.06, 0.08, 0.09, 0.10)),
    "shot_noise": (shot_noise, (500, 250, 100, 75, 50)),
    "impulse_noise": (impulse_noise, (0.01, 0.02, 0.03, 0.05, 0.07)),
    "defocus_blur": (defocus_blur, ((0.3, 0.4), (0.4, 0.5), (0.5, 0.6), (1, 0.2), (1.5, 0.1))),
    "glass_blur": (glass_blur, ((0.25, 1), (0.5, 1), (1, 1), (1, 2), (1, 3))),
    "motion_blur": (motion_blur, ((6, 1), (6, 1.5), (6, 2), (8, 2), (9, 2.5))),
    "zoom_blur": (zoom_blur, (1.06, 1.11, 1.16, 1.21, 1.26)),
    "snow": (
        snow,
        (
            (0.1, 0.2, 1, 0.6, 8, 3, 0.95),
            (0.1, 0.2, 1, 0.5, 10, 4, 0.9),
            (0.15, 0.3, 1.75, 0.55, 10, 4, 0.9),
            (0.25, 0.3, 2.25, 0.6, 12, 6, 0.85),
            (0.3, 0.3, 1.25, 0.65, 14, 12, 0.8),
        ),
    ),
    "frost": (frost, (0.35, 0.5, 0.65, 0.8, 0.95)),
    "fog": (fog, ((0.2, 3), (0.5, 3), (0.75, 2.5), (1, 2), (1.5, 1.75))),
    "brightness": (brightness, (0.05, 0.1, 0.15, 0.2, 0.3)),
    "contrast": (contrast, (0.75, 0.5, 0.4, 0.3, 0.15)),
    "elastic_transform": (
        elastic_transform,
        ((1.6, 3, 0.5), (2.4, 2.5, 1.0), (3.2, 2, 1.5), (3.2, 1.5, 2.0), (3.2, 1.2, 2.5)),
    ),
    "pixelate": (pixelate, (0.95, 0.9, 0.85, 0.75, 0.65)),
    "jpeg_compression": (jpeg_compression, (80, 65, 58, 50, 40)),
    "speckle_noise": (speckle_noise, (0.06, 0.1, 0.12, 0.16, 0.2)),
    "gaussian_blur": (gaussian_blur, (0.4, 0.6, 0.7, 0.8, 1)),
    "spatter": (spatter, ((0.04, "water"), (0.08, "water"), (0.14, "water"), (0.14, "mud"), (0.22, "mud"))),
    "saturate": (saturate, ((1.3, 0.0), (1.6, 0.05), (2.0, 0.1), (2.5, 0.15), (3.0, 0.25))),
}
NAMES = tuple(KINDS)
STANDARD = NAMES[:15]  # over these the paper takes its mean; the other four are for choosing hyperparameters


# pieces


def _unit(x: Floats) -> float:
    """Pixels in 1/32 of the height."""
    return x.shape[1] / 32


def _each(draws: Draws, draw_one: Callable[[np.random.Generator], Any]) -> NDArray[Any]:
    return np.stack([draw_one(draw) for draw in draws])


def _grey(x: Floats) -> Floats:
    return (x @ np.array([0.299, 0.587, 0.114], np.float32))[..., None]


def _streaked(x: Floats, radius: float, sigma: float, degrees: NDArray[np.float64]) -> Floats:
    """Half a Gaussian along a line, as ImageMagick's motion blur; edges are repeated."""
    unit = _unit(x)
    steps = np.arange(2 * math.ceil(radius * unit) + 1)
    weights = np.exp(-0.5 * (steps / (sigma * unit)) ** 2)
    weights /= weights.sum()
    n, height, width, _ = x.shape
    image, row, column = np.ogrid[:n, :height, :width]
    angle = np.deg2rad(degrees)[:, None, None]
    result = np.zeros_like(x)
    for step, weight in zip(steps, weights.astype(np.float32), strict=True):
        rows = np.clip(row + np.rint(step * np.sin(angle)).astype(int), 0, height - 1)
        columns = np.clip(column + np.rint(step * np.cos(angle)).astype(int), 0, width - 1)
        result += weight * x[image, rows, columns]
    return result


def _zoomed(x: Floats, factor: float) -> Floats:
    """Magnified around the centre, linear between pixels."""
    rows, columns = (_magnifying(size, factor) for size in x.shape[1:3])
    return np.einsum("ai,bj,nijc->nabc", rows, columns, x, optimize=True)


def _magnifying(size: int, factor: float) -> Floats:
    """(size, size), rows sum to 1."""
    where = (size - 1) / 2 + (np.arange(size) - (size - 1) / 2) / factor
    return np.maximum(0, 1 - np.abs(where[:, None] - np.arange(size))).astype(np.float32)


def _clouds(draw: np.random.Generator, shape: tuple[int, int], decay: float) -> Floats:
    """Noise of all wave lengths, each octave weaker than the one below by `decay`; in [0, 1]."""
    size = 1 << (max(shape) - 1).bit_length()
    field = np.zeros((size, size), np.float32)
    grid, weight = 2, 1.0
    while grid <= size:
        coarse = draw.uniform(-1, 1, (grid, grid)).astype(np.float32)
        field += weight * ndimage.zoom(coarse, size / grid, order=1, mode="grid-wrap", grid_mode=True)
        grid, weight = 2 * grid, weight / decay
    field = field[: shape[0], : shape[1]]
    return (field - field.min()) / max(float(np.ptp(field)), 1e-6)


def _needles(draw: np.random.Generator, shape: tuple[int, int]) -> Floats:
    """Frost on a window in [0, 1]: the brighter of two layers of streaks, thicker here and thinner there."""
    unit = shape[0] / 32
    layers = []
    for _ in range(2):
        field = draw.standard_normal((2 * shape[0], 2 * shape[1])).astype(np.float32)
        field = ndimage.gaussian_filter(field, (0.7 * unit, 3.5 * unit), mode="wrap")
        field = ndimage.rotate(field, draw.uniform(0, 180), reshape=False, order=1, mode="grid-wrap")
        top, left = shape[0] // 2, shape[1] // 2
        field = field[top : top + shape[0], left : left + shape[1]]
        layers.append(np.exp(-2 * np.abs(field / field.std())))
    thickness = 0.35 + 0.65 * _clouds(draw, shape, 2.0)
    return np.clip(np.maximum(*layers) * thickness + 0.25 * thickness, 0, 1)


def _through_pillow(x: Floats, change: Callable[[Image.Image], Image.Image]) -> Floats:
    pixels = np.rint(x * 255).astype(np.uint8)
    return np.stack([np.asarray(change(Image.fromarray(image))) for image in pixels]).astype(np.float32) / 255
