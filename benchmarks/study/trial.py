"""One combination of a study: train, evaluate on training, test and corrupted data, measure. Returns its record.

Training and measuring are `benchmarks.train` and `benchmarks.measure` as they stand, in this process; what they print
goes to log.txt of the run.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import checkpoint, command, data, engine, measure, options, recipe, train
from benchmarks.command import InputError
from benchmarks.engine import NonFiniteLoss
from benchmarks.study.config import Config, Settings, columns
from benchmarks.study.storage import held
from sam_optim import rng
from sam_optim.results import plain, provenance

BATCH = 500  # images at once in evaluation


class Stopped(KeyboardInterrupt):
    """A signal came during training, which has saved everything done so far."""


class Here(NamedTuple):
    """What belongs to this machine and not to the study."""

    runs: Path
    data_dir: str | None = None
    device: str = "cpu"
    workers: int = 0

    @property
    def argv(self) -> list[str]:
        found = ["--device", self.device, "--workers", str(self.workers)]
        return found + (["--data-dir", str(self.data_dir)] if self.data_dir else [])


@contextlib.contextmanager
def run_directory(runs: Path, name: str) -> Iterator[Path]:
    """runs/NAME, or NAME-2, ... where a process that was taken for dead still writes there."""
    number = 1
    while True:
        directory = runs / (name if number == 1 else f"{name}-{number}")
        with held(directory.with_name(f".{directory.name}.lock")) as got:
            if got:
                yield directory
                return
        number += 1


def execute(config: Config, levels: Mapping[str, Any], directory: Path, here: Here) -> dict[str, Any]:
    """Trains on from the last checkpoint in `directory`, if there is one. A record of plain values.

    `failed` is None, or why training diverged: there are no numbers then.

    Raises:
        Stopped: a signal came.
        InputError: this machine cannot run it, e.g. its data are not where --data-dir says.
    """
    start = time.perf_counter()
    argv = [*config.argv(levels), *here.argv, "--measures=none", f"--out={directory}"]
    directory.mkdir(parents=True, exist_ok=True)
    record: dict[str, Any] = {"levels": dict(levels), "failed": None, "targets": {}, "measures": {}, "details": {}}
    with open(directory / "log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        try:
            _train(argv)
        except NonFiniteLoss as error:
            record["failed"] = command.one_line(error)
        if record["failed"] is None:
            kept = command.read_json(directory / "config.json")
            args = options.restored(kept["options"], out=directory)
            record |= evaluate(config, args)
            for block in config.measures:
                found = _measured(block, directory, args)
                record["measures"] |= found["measures"]
                record["details"][block["label"]] = found["details"]
            record["run"] = {"data": kept["data"], "num_parameters": kept["num_parameters"]}
            record["commit"] = kept["provenance"].get("commit")
    record["provenance"] = provenance(threads=torch.get_num_threads())
    return plain(record | {"seconds": time.perf_counter() - start})


def _train(argv: list[str]) -> None:
    out = next(a for a in argv if a.startswith("--out=")).removeprefix("--out=")
    code = train.main([*argv, "--resume"] if (Path(out) / "config.json").exists() else [*argv, "--force"])
    if code:
        raise Stopped(code - 128)


def evaluate(config: Config, args: Any) -> dict[str, Any]:
    """Errors in percent, the gap in points, losses in nats: on training data without augmentation and with the labels
    that training saw, on test data, on corrupted test data, and on what --validation-fraction holds out."""
    state = checkpoint.newest(args.out / "checkpoints")
    device = recipe.device(args)
    with rng.kept():
        splits = recipe.splits(args)
        model = recipe.model(args, splits).to(device)
    model.load_state_dict(state["model"])
    model.eval()

    def on(split: Any, limit: int) -> dict[str, float]:
        chosen = data.some(split, limit)
        batches = data.batches(chosen, BATCH, splits.image_size, workers=args.workers)
        batches = _spread(batches, limit, len(chosen))  # of a stream: `chosen` is all of it
        return engine.evaluate(model, batches, nn.CrossEntropyLoss(), device=device)

    train_found, test = (
        on(splits.train, config.evaluate["train_examples"]),
        on(splits.test, config.evaluate["test_examples"]),
    )
    targets = {
        "train_error": 100 * (1 - train_found["accuracy"]),
        "train_loss": train_found["loss"],
        "test_error": 100 * (1 - test["accuracy"]),
        "test_loss": test["loss"],
        "gap": 100 * (train_found["accuracy"] - test["accuracy"]),
        "loss_gap": test["loss"] - train_found["loss"],
    }
    if splits.validation is not None:
        targets["validation_error"] = 100 * (1 - on(splits.validation, 0)["accuracy"])
    ood = corrupted_errors(model, splits, config.corruptions, device)
    if ood:
        targets["ood_error"] = math.fsum(ood.values()) / len(ood)
    return {"targets": targets, "corrupted": ood}


def corrupted_errors(model: nn.Module, splits: Any, settings: Settings, device: torch.device) -> dict[str, float]:
    """Test error in percent for each "corruption, severity", on the same images for every model of the study."""
    if not settings["names"]:
        return {}
    from benchmarks.corruptions import corrupted

    images, labels, normalise = pixels_of(splits, settings["examples"])
    found = {}
    for name in settings["names"]:
        for severity in settings["severities"]:
            damaged = corrupted(images.movedim(1, -1).numpy(), name, severity, seed=settings["seed"])
            bad = torch.from_numpy(damaged).movedim(-1, 1)
            batches = [(normalise(bad[i : i + BATCH]), labels[i : i + BATCH]) for i in range(0, len(labels), BATCH)]
            result = engine.evaluate(model, batches, nn.CrossEntropyLoss(), device=device)
            found[f"{name}, {severity}"] = 100 * (1 - result["accuracy"])
    return found


def pixels_of(splits: Any, num: int) -> tuple[Tensor, Tensor, Any]:
    """About `num` test images as uint8 (n, 3, H, W), evenly spaced (they may be sorted by class), and their labels."""
    split = splits.test
    if not isinstance(split, data.Pixels):
        raise InputError("[corruptions] are for images in memory: --data cifar10 or cifar100 in torchvision's layout")
    images, labels = split.tensors
    step = max(1, len(labels) // num) if num else 1
    rows = torch.arange(0, len(labels), step)[: num or None]
    return images[rows], labels[rows], split.normalise


def _measured(block: Settings, directory: Path, args: Any) -> dict[str, Any]:
    """The values by column name, and everything else that the measures say of themselves."""
    choices = {k: block[k] for k in ("split", "examples", "batch_size", "rho", "adaptive")}
    measure.run(directory, block["names"], args, **choices)
    report = command.read_json(directory / "measures.json")
    values = {c: number_of(report["measures"][n]) for c, n in zip(columns(block), block["names"], strict=True)}
    return {"measures": values, "details": report}


def number_of(result: Mapping[str, Any]) -> float | None:
    """The one number of a measure: its value, or the largest eigenvalue; None where it has none or did not converge."""
    if result.get("converged") is False:
        return None
    if result.get("eigenvalues"):
        return result["eigenvalues"][0]
    return result.get("value")


def _spread(batches: Any, limit: int, total: int) -> Iterator[tuple[Tensor, Tensor]]:
    """`limit` of the `total` examples, the rows of `data.spaced`; all of them for 0."""
    if not 0 < limit < total:
        yield from batches
        return
    start = 0
    for x, y in batches:
        i = torch.arange(start, start + len(y))
        kept = (i * limit).div(total, rounding_mode="floor") != ((i - 1) * limit).div(total, rounding_mode="floor")
        if kept.any():
            yield x[kept], y[kept]
        start += len(y)
