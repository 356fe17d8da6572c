"""One combination of a study: train, evaluate on training, test and corrupted data, measure. Returns its record.

Training and measuring are `benchmarks.train` and `benchmarks.measure` as they stand, in this process; what they print
goes to log.txt of the run.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import measure
from benchmarks.corruptions import Published
from benchmarks.evaluate import Clean, check_labels, on_corruptions
from benchmarks.study.config import HERE, OURS, Config, Corruptions, Measures, check_held_out, identifier
from benchmarks.train import data, epoch, recipe, trained
from benchmarks.train.__main__ import train
from benchmarks.train.data import Splits
from benchmarks.train.epoch import NonFiniteLoss
from benchmarks.train.options import Options, of_run
from benchmarks.train.trained import TrainedRun
from sam_optim.core.errors import InputError, one_line
from sam_optim.core.files import locked, open_log, read_json
from sam_optim.core.results import plain, provenance
from sam_optim.vision.models import default_size

BATCH = 500  # images at once in evaluation


class Stopped(KeyboardInterrupt):
    """A signal came during training, which has saved everything done so far."""


@dataclass(frozen=True)
class Here:
    """What belongs to this machine and not to the study."""

    runs: Path
    data_dir: str | None = None
    device: str | None = "cpu"
    workers: int | None = 0
    cifar_c: str | None = None

    def options(self, config: Config, levels: Mapping[str, Any], directory: Path) -> Options:
        """The options of a run of `benchmarks.train` on this machine."""
        overrides = {key: value for key in HERE if (value := getattr(self, key)) is not None}
        return replace(config.options(levels, directory), measures="none", **overrides)


def check(config: Config, here: Here) -> None:
    """Opens what the trials of a study read, before one is taken.

    Raises:
        InputError: this machine lacks the data or the device, or the data are not for [corruptions].
    """
    opened = set()
    for levels in config.samples:
        options = here.options(config, levels, Path("none"))
        recipe.device(options)
        key = (options.data, options.train_labels, options.img_size, options.num_classes, options.train_examples)
        key += (options.validation_fraction, default_size(options.model))
        if key in opened:
            continue
        opened.add(key)
        splits = data.load(options)
        check_held_out(config, splits.validation is not None)
        if config.corruptions.names:
            Clean(splits.test, splits.preprocessing)
            if files := published(config, here):
                check_labels(files, splits.test)
                for name in config.corruptions.names:
                    files.images(name, 1)
                if splits.image_size[1:] != (32, 32):
                    raise InputError(f"published = true of [corruptions] is for CIFAR, not for {options.data}")


def published(config: Config, here: Here) -> Published | None:
    """The folder that [corruptions] is about; None where the images are to be made."""
    if not config.corruptions.published:
        return None
    if here.cifar_c is None:
        raise InputError("published = true of [corruptions]: say where CIFAR-10-C is on this machine, --cifar-c DIR")
    return Published(here.cifar_c)


@contextlib.contextmanager
def run_directory(runs: Path, config: Config, levels: Mapping[str, Any]) -> Iterator[Path]:
    """runs/NAME of a combination, or NAME-2, ... where a process that was taken for dead still writes there, or the run
    there was begun with other settings: those of a study may be changed while no trial has finished."""
    name, number = identifier(levels), 1
    while True:
        directory = runs / (name if number == 1 else f"{name}-{number}")
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(locked(directory.resolve()))
                free = begun_with(config, levels, directory)
            except InputError:  # another process writes there, or it was damaged
                free = False
            if free:
                yield directory
                return
        number += 1


def begun_with(config: Config, levels: Mapping[str, Any], directory: Path) -> bool:
    """Whether the run in `directory`, if there is one, has the options of this trial."""
    if not (directory / "config.json").is_file():
        return True
    settings = config.options(levels, directory).recorded()
    recorded = of_run(directory, settings["data"]).recorded()
    return all(settings[key] == recorded[key] for key in settings if key not in OURS)


def execute(config: Config, levels: Mapping[str, Any], directory: Path, here: Here) -> dict[str, Any]:
    """Trains on from the last checkpoint in `directory`, if there is one. A record of plain values.

    `failed` is None, or why training diverged: there are no numbers then.

    Raises:
        Stopped: a signal came.
        InputError: this machine cannot run it, e.g. its data are not where --data-dir says.
    """
    start = time.perf_counter()
    record: dict[str, Any] = {"levels": dict(levels), "failed": None, "targets": {}, "measures": {}, "details": {}}
    record["checkpoint"] = directory.name
    record["failed"], model_run = trained_run(config, levels, directory, here)
    if model_run is not None:
        with logged(directory):
            record |= evaluate(config, model_run, published(config, here))
            for block in config.measures:
                values, record["details"][block.label] = _measured(block, model_run)
                record["measures"] |= values
        about = read_json(directory / "config.json")
        record["run"] = {"data": about["data"], "num_parameters": about["num_parameters"]}
        record["commit"] = about["provenance"].get("commit")
    record["provenance"] = provenance(threads=torch.get_num_threads())
    return plain(record | {"seconds": time.perf_counter() - start})


def trained_run(
    config: Config, levels: Mapping[str, Any], directory: Path, here: Here
) -> tuple[str | None, TrainedRun | None]:
    """Trains, from the last checkpoint in `directory` if there is one: (None, the run), or (why it diverged, None)."""
    options = here.options(config, levels, directory)
    begun = (directory / "config.json").exists()
    directory.mkdir(parents=True, exist_ok=True)
    with logged(directory):
        try:
            if code := train(replace(options, resume=begun, force=not begun)):
                raise Stopped(code - 128)
        except NonFiniteLoss as error:
            return one_line(error), None
        return None, trained.load(options)


@contextlib.contextmanager
def logged(directory: Path) -> Iterator[None]:
    """What is printed goes to log.txt of the run."""
    with open_log(directory / "log.txt") as log, contextlib.redirect_stdout(log):
        yield


def evaluate(config: Config, model_run: TrainedRun, files: Published | None = None) -> dict[str, Any]:
    """Errors in percent, the gap in points, losses in nats: on training data without augmentation and with the labels
    that training saw, on test data, on corrupted test data, and on what --validation-fraction holds out."""
    model, splits = model_run.model.eval(), model_run.splits

    def on(split: Any, limit: int) -> dict[str, float]:
        batches = model_run.batches(split, BATCH, limit)
        return epoch.evaluate(model, batches, nn.CrossEntropyLoss(), device=model_run.device)

    train_set = on(splits.train, config.evaluate.train_examples)
    test = on(splits.test, config.evaluate.test_examples)
    targets = {
        "train_error": 100 * (1 - train_set["accuracy"]),
        "train_loss": train_set["loss"],
        "test_error": 100 * (1 - test["accuracy"]),
        "test_loss": test["loss"],
        "gap": 100 * (train_set["accuracy"] - test["accuracy"]),
        "loss_gap": test["loss"] - train_set["loss"],
    }
    if splits.validation is not None:
        targets["validation_error"] = 100 * (1 - on(splits.validation, 0)["accuracy"])
    corrupted = corrupted_errors(model, splits, config.corruptions, model_run.device, files)
    if corrupted:
        targets["ood_error"] = math.fsum(corrupted.values()) / len(corrupted)
    return {"targets": targets, "corrupted": corrupted}


def corrupted_errors(
    model: nn.Module, splits: Splits, settings: Corruptions, device: torch.device, files: Published | None = None
) -> dict[str, float]:
    """Test error in percent for each "corruption, severity", on the same images for every model of the study."""
    if not settings.names:
        return {}
    evaluated = on_corruptions(
        model,
        splits.test,
        splits.preprocessing,
        names=settings.names,
        severities=settings.severities,
        examples=settings.examples,
        seed=settings.seed,
        published=files,
        device=device,
    )
    return {
        f"{name}, {severity}": 100 * (1 - cell["accuracy"])
        for name, cells in evaluated["corrupted"].items()
        for severity, cell in cells.items()
    }


def _measured(block: Measures, model_run: TrainedRun) -> tuple[dict[str, float | None], dict[str, Any]]:
    """The values by column name, and everything else that the measures say of themselves."""
    measure.measure(model_run, block)
    report = read_json(model_run.options.out / "measures.json")
    values = {c: number_of(report["measures"][n]) for c, n in zip(block.columns, block.names, strict=True)}
    return values, report


def number_of(result: Mapping[str, Any]) -> float | None:
    """The one number of a measure: its value, or the largest eigenvalue; None where it has none or did not converge."""
    if result.get("converged") is False:
        return None
    if result.get("eigenvalues"):
        return result["eigenvalues"][0]
    return result.get("value")
