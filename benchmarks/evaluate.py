"""Evaluate a trained run on damaged images: the model of its config.json and newest checkpoint.

python -m benchmarks.evaluate RUN_DIR --corruptions all --severities 1,3,5
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import corruptions
from benchmarks.command import option, settings_of
from benchmarks.corruptions import NAMES, SEVERITIES, STANDARD, Published
from benchmarks.train import epoch, trained
from benchmarks.train.data import Examples, labels_of, some, spaced, taken
from benchmarks.train.options import OfRun
from benchmarks.train.streams import Streamed
from benchmarks.train.trained import TrainedRun
from sam_optim.core.arguments import number
from sam_optim.core.errors import InputError, run, show, unknown
from sam_optim.core.files import write_json
from sam_optim.core.results import plain, provenance
from sam_optim.vision.preprocessing import Preprocessing

BATCH = 500  # images that are damaged together
PASS = 256  # images in one forward pass


def severities_of(text: str) -> list[int]:
    try:
        values = [int(value) for value in text.split(",") if value.strip()]
    except ValueError:
        raise InputError(f"must be numbers from 1 to 5, separated by commas, got {text!r}") from None
    if not values:
        raise InputError("names none; give e.g. 1,3,5")
    corruptions.check([], values)
    return list(dict.fromkeys(values))


@dataclass(frozen=True, kw_only=True)
class Command(OfRun):
    corruptions: str = option("standard", f"all, standard (the paper's 15, default), or some of {', '.join(NAMES)}")
    severities: list[int] = option(list(SEVERITIES), "of 1 to 5, separated by commas", type=severities_of)
    cifar_c: str | None = option(
        None, "read the published CIFAR-10-C or CIFAR-100-C from here, instead of generating images", metavar="DIR"
    )
    split: str = option("test", choices=("test", "validation"))
    examples: int = option(0, "number of examples, evenly spaced; 0 (default): all", type=number(int, 0))
    seed: int = option(0, "of the random draws of the corruptions (default: 0)", type=number(int, 0))


class Clean:
    """A split as uint8 images of the size that the model sees, before normalization."""

    def __init__(self, examples: Examples | Streamed, preprocessing: Preprocessing):
        if preprocessing.image_size[0] != 3 or not isinstance(examples, Examples) or examples.normalized:
            raise InputError("corruptions are for color images: CIFAR, folders, timm's data sets; this one is not")
        self.examples = examples
        # timm's: resize, crop, to tensor, normalize
        *self._resizing, _, self._normalize = preprocessing.transform().transforms

    def parts(self) -> Iterator[tuple[int, NDArray[np.uint8], Tensor]]:
        """(number of the first image, images (n, H, W, 3), labels (n,)), some hundred at a time."""
        for first in range(0, len(self.examples), BATCH):
            stop = min(first + BATCH, len(self.examples))
            if self.examples.x is not None:
                shown = self.examples.x[first:stop].permute(0, 2, 3, 1).numpy()
            else:
                shown = np.stack([self._resized(self.examples[i][0]) for i in range(first, stop)])
            yield first, shown, self.examples.labels[first:stop]

    def _resized(self, image: Any) -> NDArray[np.uint8]:
        for step in self._resizing:
            image = step(image)
        return np.asarray(image)

    def inputs(self, shown: NDArray[np.uint8]) -> Tensor:
        """(n, 3, H, W), normalized as in training."""
        return self._normalize(torch.from_numpy(np.ascontiguousarray(shown)).permute(0, 3, 1, 2) / 255)


def on_corruptions(
    model: nn.Module,
    split: Examples | Streamed,
    preprocessing: Preprocessing,
    *,
    names: Sequence[str] = STANDARD,
    severities: Sequence[int] = SEVERITIES,
    seed: int = 0,
    examples: int = 0,
    published: Published | None = None,
    device: torch.device | str = "cpu",
    progress: Callable[[str], None] = lambda cell: None,
) -> dict[str, Any]:
    """Loss and accuracy on a split as it is, and on every corruption of it at every severity.

    Args:
        split: colour images.
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
    elif preprocessing.image_size[1:] != (32, 32):
        raise InputError(f"the published files have 32 x 32 pixels and the model takes {preprocessing.image_size[1:]}")
    clean = Clean(some(split, examples), preprocessing)
    if published is not None:
        check_labels(published, split)

    def measured(name: str | None, severity: int) -> dict[str, float]:
        progress(f"{name} {severity}" if name else "clean")
        return epoch.evaluate(model, cells(name, severity), nn.CrossEntropyLoss(), device=device)

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
            for start in range(0, len(shown), PASS):
                rows = slice(start, start + PASS)
                yield clean.inputs(shown[rows]), labels[rows]

    result: dict[str, Any] = {"clean": measured(None, 0)}
    result["corrupted"] = {name: {str(s): measured(name, s) for s in severities} for name in names}
    every = [cell for levels in result["corrupted"].values() for cell in levels.values()]
    result["mean"] = {key: sum(cell[key] for cell in every) / len(every) for key in ("loss", "accuracy")}
    return result


def check_labels(published: Published, split: Examples | Streamed) -> None:
    """Raises InputError where the published files are not of this test set. Only CIFAR in memory has their order."""
    in_memory = isinstance(split, Examples) and split.x is not None
    published.check_labels(labels_of(split).numpy(), in_order=in_memory)


def main(argv: Sequence[str] | None = None) -> int:
    command = settings_of(Command, "python -m benchmarks.evaluate", __doc__, argv)
    published = Published(command.cifar_c) if command.cifar_c else None
    if published and command.split != "test":
        raise InputError("--cifar-c are damaged test images: leave --split validation out")
    names = _chosen(command.corruptions, published)
    with command.locked():
        model_run = trained.load(command.options(), ema=command.ema)
        evaluated = evaluate(model_run, command, names, published)
        show(title(evaluated))
        show(table(evaluated))
        write_json(command.run / "corrupted.json", plain(evaluated))
    return 0


def evaluate(
    model_run: TrainedRun, command: Command, names: Sequence[str], published: Published | None
) -> dict[str, Any]:
    """What `on_corruptions` returns, and what it is of."""
    split = model_run.split(command.split)
    with tqdm(total=1 + len(names) * len(command.severities), unit="cell", leave=False, disable=None) as bar:

        def progress(cell: str) -> None:
            bar.set_description(cell)
            bar.update(1)

        cells = on_corruptions(
            model_run.model,
            split,
            model_run.splits.preprocessing,
            names=names,
            severities=command.severities,
            seed=command.seed,
            examples=command.examples,
            published=published,
            device=model_run.device,
            progress=progress,
        )
    return cells | {
        "split": command.split,
        "examples": command.examples,
        "num_examples": len(some(split, command.examples)),
        "which_examples": taken(split, command.examples),
        "seed": command.seed,
        "source": f"files of {command.cifar_c}" if published else "made by benchmarks.corruptions",
        "weights": model_run.weights,
        "updates": model_run.updates,
        "provenance": provenance(),
    }


def title(evaluated: dict[str, Any]) -> str:
    """What the numbers of `table` are."""
    chosen, source = evaluated["which_examples"], evaluated["source"]
    images = f"{evaluated['num_examples']} {evaluated['split']} images" + ("" if chosen == "all" else f", {chosen}")
    kind = "made here" if source.startswith("made") else f"published ones, {source}"
    return f"Accuracy in per cent on {images}; the damaged images are {kind}"


def table(evaluated: dict[str, Any]) -> str:
    """Accuracies in per cent: a row for each corruption, a column for each severity."""
    severities = list(next(iter(evaluated["corrupted"].values())))
    lines = [
        f"{'clean':20s}{100 * evaluated['clean']['accuracy']:7.2f}",
        f"{'severity':20s}" + "".join(f"{s:>7s}" for s in severities) + "   mean",
    ]
    for name, cells in evaluated["corrupted"].items():
        values = [100 * cell["accuracy"] for cell in cells.values()]
        lines.append(f"{name:20s}" + "".join(f"{v:7.2f}" for v in [*values, sum(values) / len(values)]))
    return "\n".join([*lines, f"{'mean':20s}{100 * evaluated['mean']['accuracy']:7.2f}"])


def _chosen(text: str, published: Published | None) -> list[str]:
    names = published.names if published else list(NAMES)
    if text in ("all", "standard"):
        return names if text == "all" else [name for name in STANDARD if name in names]
    chosen = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if not chosen:
        raise InputError(f"--corruptions names none; choose from {', '.join(names)}")
    for name in chosen:
        if name not in names:
            raise unknown("corruption", name, names, limit=20)
    return chosen


if __name__ == "__main__":
    sys.exit(run(main))
