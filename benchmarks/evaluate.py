"""Evaluate a trained run on damaged images: the model of its config.json and newest checkpoint.

python -m benchmarks.evaluate RUN_DIR --corruptions all --severities 1,3,5
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.data import Dataset
from tqdm import tqdm

from benchmarks import command, corruptions
from benchmarks.command import InputError
from benchmarks.corruptions import NAMES, SEVERITIES, STANDARD, Published
from benchmarks.train import checkpoint, images, options, recipe
from benchmarks.train import epoch as engine
from benchmarks.train.data import labels as labels_of
from benchmarks.train.data import some, spaced, taken
from benchmarks.train.images import Pictures
from benchmarks.train.pixels import Pixels
from sam_optim.core import random as rng
from sam_optim.core.results import provenance

BATCH = 500


class Clean:
    """A split as uint8 images of the size that the model sees, before normalisation.

    examples: so many, evenly spaced in the split; 0 for all.
    """

    def __init__(self, split: Dataset, image_size: tuple[int, int, int], examples: int = 0):
        if image_size[0] != 3 or not isinstance(split, (Pixels, Pictures)):
            raise InputError("corruptions are for colour images: CIFAR, folders, timm's data sets; this one is not")
        self.split = some(split, examples)
        self.num = len(self.split)
        self.size = image_size[1:]
        # timm's: resize, crop, to tensor, normalise
        *self._resizing, _, self._normalise = images.transform(image_size, None).transforms

    def parts(self) -> Iterator[tuple[int, NDArray[np.uint8], Tensor]]:
        """(number of the first image, images (n, H, W, 3), labels (n,)), some hundred at a time."""
        for first in range(0, self.num, BATCH):
            stop = min(first + BATCH, self.num)
            if isinstance(self.split, Pixels):
                pixels, labels = (t[first:stop] for t in self.split.tensors)
                yield first, pixels.permute(0, 2, 3, 1).numpy(), labels
            else:
                shown = [self._resized(self.split[i][0]) for i in range(first, stop)]
                yield first, np.stack(shown), self.split.labels[first:stop]

    def _resized(self, image: Any) -> NDArray[np.uint8]:
        for step in self._resizing:
            image = step(image)
        return np.asarray(image)

    def inputs(self, shown: NDArray[np.uint8]) -> Tensor:
        """(n, 3, H, W), normalised as in training."""
        pixels = torch.from_numpy(np.ascontiguousarray(shown)).permute(0, 3, 1, 2)
        return self.split.normalise(pixels) if isinstance(self.split, Pixels) else self._normalise(pixels / 255)


def on_corruptions(
    model: nn.Module,
    split: Dataset,
    image_size: tuple[int, int, int],
    *,
    names: Sequence[str] = STANDARD,
    severities: Sequence[int] = SEVERITIES,
    seed: int = 0,
    examples: int = 0,
    published: Published | None = None,
    device: torch.device | str = "cpu",
    batch_size: int = 256,
    progress: Callable[[str], None] | None = None,
) -> dict[str, Any]:
    """Loss and accuracy on a split as it is, and on every corruption of it at every severity.

    Args:
        split: of `data.Splits`, colour images; image_size: (3, H, W) of the splits.
        names, severities: see `corruptions.NAMES`; with `published` its files are read in place of making images:
            `split` is then the test set that these are of, and only the clean accuracy is of it.
        examples: so many, evenly spaced in the split, and in each of the published files; 0 for all.
        progress: called with each cell's name.

    Returns:
        {"clean": {"loss", "accuracy"}, "corrupted": {name: {str(severity): {"loss", "accuracy"}}}, "mean": ...}, "mean"
        being that of all cells, each counted once. Losses in nats, accuracies in [0, 1].
    """
    if published is None:
        corruptions.check(list(names), list(severities))
    elif image_size[1:] != (32, 32):
        raise InputError(f"the published files have 32 x 32 pixels and the model takes {image_size[1:]}")
    clean = Clean(split, image_size, examples)
    if published is not None:
        check_labels(published, split)

    def measured(name: str | None, severity: int) -> dict[str, float]:
        if progress:
            progress(f"{name} {severity}" if name else "clean")
        return engine.evaluate(model, cells(name, severity), nn.CrossEntropyLoss(), device=device)

    def cells(name: str | None, severity: int) -> Iterator[tuple[Tensor, Tensor]]:
        if name and published:
            shown, labels = published.images(name, severity)
            rows = spaced(len(labels), examples)
            parts: Iterable[Any] = [(0, shown[rows], torch.from_numpy(labels)[rows])]
        else:
            parts = clean.parts()
        for first, shown, labels in parts:
            if name and not published:
                shown = corruptions.corrupted(shown, name, severity, seed=seed, first=first)
            for start in range(0, len(shown), batch_size):
                rows = slice(start, start + batch_size)
                yield clean.inputs(shown[rows]), labels[rows]

    found = {"clean": measured(None, 0)}
    found["corrupted"] = {name: {str(s): measured(name, s) for s in severities} for name in names}
    every = [cell for levels in found["corrupted"].values() for cell in levels.values()]
    found["mean"] = {key: sum(cell[key] for cell in every) / len(every) for key in ("loss", "accuracy")}
    return found


def check_labels(published: Published, split: Dataset) -> None:
    """Raises InputError where the published files are not of this test set. Only CIFAR in memory has their order."""
    published.check_labels(labels_of(split).numpy(), in_order=isinstance(split, Pixels))


def main(argv: Sequence[str] | None = None) -> int:
    p = options.Parser(prog="python -m benchmarks.evaluate", description="Evaluate a run on damaged images.")
    options.add_run(p)
    p.add_argument(
        "--corruptions", default="standard", help=f"all, standard (the paper's 15), or of {', '.join(NAMES)}"
    )
    p.add_argument("--severities", default="1,2,3,4,5")
    p.add_argument("--cifar-c", metavar="DIR", help="a published CIFAR-10-C or CIFAR-100-C, to read in place of making")
    p.add_argument("--split", choices=("test", "validation"), default="test")
    p.add_argument("--examples", type=int, default=0, help="so many, evenly spaced; 0 (default) for all")
    p.add_argument("--seed", type=int, default=0, help="of what is drawn for the images")
    p.add_argument("--ema", action="store_true", help="the averaged weights of --model-ema")
    args = p.parse_args(argv)
    published = Published(args.cifar_c) if args.cifar_c else None
    if published and args.split != "test":
        raise InputError("--cifar-c are damaged test images: leave --split validation out")
    names, severities = _chosen(args.corruptions, published), _severities(args.severities)
    if args.examples < 0 or args.seed < 0:
        raise InputError(f"--examples and --seed must be >= 0, got {args.examples} and {args.seed}")
    kept = options.of_run(args)
    model, split, image_size, updates = loaded(kept, args.split, ema=args.ema)
    with tqdm(total=1 + len(names) * len(severities), unit="cell", leave=False, disable=None) as bar:

        def progress(cell: str) -> None:
            bar.set_description(cell)
            bar.update(1)

        found = on_corruptions(
            model, split, image_size, names=names, severities=severities, seed=args.seed, examples=args.examples,
            published=published, device=recipe.device(kept), progress=progress,
        )  # fmt: skip
    source = f"files of {args.cifar_c}" if published else "made by benchmarks.corruptions"
    num = len(some(split, args.examples))
    chosen = taken(split, args.examples)
    print(title(args.split, num, chosen, source))
    print(table(found))
    report = found | {
        "split": args.split,
        "examples": args.examples,
        "num_examples": num,
        "which_examples": chosen,
        "seed": args.seed,
        "source": source,
        "weights": "ema" if args.ema else "model",
        "updates": updates,
        "provenance": provenance(),
    }
    command.write_json(args.run / "corrupted.json", report)
    return 0


def loaded(
    args: argparse.Namespace, split: str = "test", *, ema: bool = False
) -> tuple[nn.Module, Dataset, tuple[int, int, int], int]:
    """(model with the newest checkpoint's weights, the split, image size, updates) of a run's options."""
    state = checkpoint.newest(args.out / "checkpoints")
    weights = state["ema"] if ema else state["model"]
    if weights is None:
        raise InputError(f"{args.out} was trained without --model-ema: leave --ema out")
    with rng.kept():
        splits = recipe.splits(args)
        model = recipe.model(args, splits)
    if getattr(splits, split) is None:
        raise InputError("the run has no validation split: choose --split test")
    model.load_state_dict(weights)
    return model.to(recipe.device(args)), getattr(splits, split), splits.image_size, state["step"]


def title(split: str, num: int, chosen: str, source: str) -> str:
    """What the numbers of `table` are."""
    images = f"{num} {split} images" + ("" if chosen == "all" else f", {chosen}")
    kind = "made here" if source.startswith("made") else f"published ones, {source}"
    return f"Accuracy in per cent on {images}; the damaged images are {kind}"


def table(found: dict[str, Any]) -> str:
    """Accuracies in per cent: a row for each corruption, a column for each severity."""
    severities = list(next(iter(found["corrupted"].values())))
    lines = [f"{'clean':20s}{100 * found['clean']['accuracy']:7.2f}", f"{'severity':20s}" + _row(severities, "7s")]
    for name, cells in found["corrupted"].items():
        values = [100 * cell["accuracy"] for cell in cells.values()]
        lines.append(f"{name:20s}" + _row([*values, sum(values) / len(values)], "7.2f"))
    lines[1] += "   mean"
    return "\n".join([*lines, f"{'mean':20s}{100 * found['mean']['accuracy']:7.2f}"])


def _row(values: Iterable[Any], form: str) -> str:
    return "".join(format(v, ">" + form) for v in values)


def _chosen(text: str, published: Published | None) -> list[str]:
    known = published.names if published else list(NAMES)
    if text in ("all", "standard"):
        return known if text == "all" else [name for name in STANDARD if name in known]
    names = [name.strip() for name in text.split(",") if name.strip()]
    if not names:
        raise InputError(f"--corruptions names none; choose from {', '.join(known)}")
    if published:
        for name in names:
            if name not in known:
                raise command.unknown("corruption", name, known, limit=20)
    else:
        corruptions.check(names, [])
    return list(dict.fromkeys(names))


def _severities(text: str) -> list[int]:
    try:
        values = [int(value) for value in text.split(",") if value.strip()]
    except ValueError:
        raise InputError(f"--severities are numbers from 1 to 5, separated by commas, got {text!r}") from None
    if not values:
        raise InputError("--severities names none; give e.g. 1,3,5")
    corruptions.check([], values)
    return list(dict.fromkeys(values))


if __name__ == "__main__":
    sys.exit(command.run(main))
