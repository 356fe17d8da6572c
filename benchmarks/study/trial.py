"""One combination of a study: train, evaluate on training, test and corrupted data, measure. Returns its record.

Training and measuring are `benchmarks.train` and `benchmarks.measure` as they stand, in this process; what they print
goes to log.txt of the run.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from benchmarks import command, measure
from benchmarks.command import InputError
from benchmarks.corruptions import Published
from benchmarks.evaluate import Clean, check_labels, on_corruptions
from benchmarks.study.config import HERE, OURS, Config, Settings, check_held_out, columns
from benchmarks.study.storage import held
from benchmarks.train import __main__ as train
from benchmarks.train import checkpoint, data, models, options, recipe
from benchmarks.train import epoch as engine
from benchmarks.train.epoch import NonFiniteLoss
from sam_optim.core import random as rng
from sam_optim.core.results import plain, provenance

BATCH = 500  # images at once in evaluation


class Stopped(KeyboardInterrupt):
    """A signal came during training, which has saved everything done so far."""


class Here(NamedTuple):
    """What belongs to this machine and not to the study."""

    runs: Path
    data_dir: str | None = None
    device: str = "cpu"
    workers: int = 0
    cifar_c: str | None = None

    @property
    def options(self) -> dict[str, Any]:
        """Those of `benchmarks.train` that are this machine's, if it gives them."""
        return {key: getattr(self, key) for key in HERE if getattr(self, key) is not None}

    @property
    def argv(self) -> list[str]:
        return [f"--{key.replace('_', '-')}={value}" for key, value in self.options.items()]


def check(config: Config, here: Here) -> None:
    """Opens what the trials of a study read, before one is taken.

    Raises:
        InputError: this machine lacks the data or the device, or the data are not for [corruptions].
    """
    opened = set()
    for levels in config.samples:
        args = options.parse([*config.argv(levels), *here.argv, "--out=none"])
        recipe.device(args)
        key = (args.data, args.train_labels, args.img_size, args.num_classes, args.train_examples)
        key += (args.validation_fraction, models.default_size(args.model))
        if key in opened:
            continue
        opened.add(key)
        splits = recipe.splits(args)
        check_held_out(config, splits.validation is not None)
        if config.corruptions["names"]:
            Clean(splits.test, splits.image_size)
            if found := published(config, here):
                check_labels(found, splits.test)
                for name in config.corruptions["names"]:
                    found.images(name, 1)
                if splits.image_size[1:] != (32, 32):
                    raise InputError(f"published = true of [corruptions] is for CIFAR, not for {args.data}")


def published(config: Config, here: Here) -> Published | None:
    """The folder that [corruptions] is about; None where the images are to be made."""
    if not config.corruptions["published"]:
        return None
    if here.cifar_c is None:
        raise InputError("published = true of [corruptions]: say where CIFAR-10-C is on this machine, --cifar-c DIR")
    return Published(here.cifar_c)


@contextlib.contextmanager
def run_directory(runs: Path, name: str, fits: Callable[[Path], bool] = lambda directory: True) -> Iterator[Path]:
    """runs/NAME, or NAME-2, ... where a process that was taken for dead still writes there, or it does not fit."""
    number = 1
    while True:
        directory = runs / (name if number == 1 else f"{name}-{number}")
        with held(directory.with_name(f".{directory.name}.lock")) as got:
            if got and fits(directory):
                yield directory
                return
        number += 1


def begun_with(config: Config, levels: Mapping[str, Any], directory: Path) -> bool:
    """Whether the run in `directory`, if there is one, has the options of this trial: the settings of a study may be
    changed while no trial has finished, and what is there is then of another model."""
    if not (directory / "config.json").is_file():
        return True
    wanted = options.parse([*config.argv(levels), f"--out={directory}"])
    kept = options.restored(command.read_json(directory / "config.json").get("options", {}), out=directory)
    found = [options.plain(args) for args in (wanted, kept)]
    return all(found[0][key] == found[1][key] for key in found[0] if key not in OURS)


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
    record["checkpoint"] = directory.name
    with open(directory / "log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        try:
            _train(argv)
        except NonFiniteLoss as error:
            record["failed"] = command.one_line(error)
        if record["failed"] is None:
            kept = command.read_json(directory / "config.json")
            # config.json says where the data of the first worker are, and this may be another
            args = options.restored(kept["options"], out=directory, **here.options)
            record |= evaluate(config, args, published(config, here))
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


def evaluate(config: Config, args: Any, files: Published | None = None) -> dict[str, Any]:
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
    ood = corrupted_errors(model, splits, config.corruptions, device, files)
    if ood:
        targets["ood_error"] = math.fsum(ood.values()) / len(ood)
    return {"targets": targets, "corrupted": ood}


def corrupted_errors(
    model: nn.Module, splits: Any, settings: Settings, device: torch.device, files: Published | None = None
) -> dict[str, float]:
    """Test error in percent for each "corruption, severity", on the same images for every model of the study."""
    if not settings["names"]:
        return {}
    chosen = {key: settings[key] for key in ("names", "severities", "examples", "seed")}
    found = on_corruptions(model, splits.test, splits.image_size, **chosen, published=files, device=device)
    return {
        f"{name}, {severity}": 100 * (1 - cell["accuracy"])
        for name, cells in found["corrupted"].items()
        for severity, cell in cells.items()
    }


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
