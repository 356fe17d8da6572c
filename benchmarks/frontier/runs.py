"""Runs of a plan, one after the other; what is done is a file, and is not done again."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from types import NoneType
from typing import Any

from torch import nn

from benchmarks.command import read_jsonl
from benchmarks.frontier.plan import Plan, Run, Settings
from benchmarks.machine import facts
from benchmarks.study import config, trial
from benchmarks.train.data import Examples, Splits
from benchmarks.train.epoch import evaluate
from sam_optim.core.errors import InputError, unknown
from sam_optim.core.files import locked, open_log, read_json_object, write_json
from sam_optim.core.random import Stream
from sam_optim.core.results import plain

Record = dict[str, Any]


def execute(plan: Plan, out: Path, here: trial.Here) -> Iterator[tuple[Run, Record, bool]]:
    """(run, its record, whether it was trained now) for every run of the plan whose method this version has.

    A method is tuned, and its reported runs follow at once with the candidate of the best mean held-out accuracy.
    """
    program: Callable[[Plan, Run, Path, trial.Here], Record] = {"train": image_run, "finetune_text": text_run}[
        plan.program
    ]
    for method in filter(partial(available, plan), plan.methods):
        for condition in plan.conditions:
            done: list[tuple[Run, Record]] = []
            for run in _both(plan, method, condition, done):
                path = out / "records" / f"{run.name}.json"
                new = not path.is_file()
                if new:
                    directory = out / "runs" / run.name
                    with locked(directory.resolve()):
                        record = program(plan, run, directory, here)
                    about = {"method": method, "condition": condition, "candidate": dict(run.candidate)}
                    about |= {"seed": run.seed, "tuning": run.tuning}
                    write_json(path, plain(about | record | {"provenance": facts("timm", "transformers")}))
                record = read_record(path)
                done.append((run, record))
                yield run, record, new


def read_record(path: Path) -> Record:
    """A record that `execute` wrote.

    Raises:
        InputError: it was changed or damaged.
    """
    types: dict[str, Any] = {"method": str, "condition": str, "candidate": dict, "seed": int, "tuning": bool}
    types |= {"passes": (int, float), "cpu_seconds": (int, float), "provenance": dict}
    record = read_json_object(path)
    accuracy = {"validation_accuracy" if record.get("tuning") else "test_accuracy": (int, float, NoneType)}
    for name, kind in (types | accuracy).items():
        if name not in record or not isinstance(record[name], kind):
            raise InputError(f"{path} has no {name!r} of a run: it was changed or damaged; delete it, and run it again")
    return record


def expected(plan: Plan, condition: str, out: Path) -> list[Run]:
    """The runs of one condition that are known by now: reported ones where tuning is done."""
    runs = []
    for method in plan.methods:
        tuning = plan.tuning_runs(method, condition)
        paths = [out / "records" / f"{run.name}.json" for run in tuning]
        runs += tuning
        if all(path.is_file() for path in paths):
            runs += plan.final_runs(method, condition, chosen(plan, method, [read_record(path) for path in paths]))
    return runs


def _both(plan: Plan, method: str, condition: str, done: list[tuple[Run, Record]]) -> Iterator[Run]:
    """The tuning runs, and when all of them are in `done` the reported ones."""
    yield from plan.tuning_runs(method, condition)
    yield from plan.final_runs(method, condition, chosen(plan, method, [record for _, record in done]))


def chosen(plan: Plan, method: str, records: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """The candidate with the best mean held-out accuracy, the first of equals; a diverged run has accuracy 0."""

    def held_out(candidate: Mapping[str, Any]) -> float:
        return -sum(r["validation_accuracy"] for r in records if r["tuning"] and r["candidate"] == candidate)

    return min(plan.methods[method].candidates, key=held_out)


def available(plan: Plan, method: str) -> bool:
    """Whether this version has the variant and the schedule of a method."""
    import sam_optim
    from benchmarks.train.options import SAM_VARIANTS

    options = plan.methods[method].options
    variant, schedule = options.get("sam_variant"), options.get("sam_schedule")
    names = ([SAM_VARIANTS[variant]] if variant else []) + ([schedule.partition(":")[0]] if schedule else [])
    return all(hasattr(sam_optim, name) for name in names)


def image_run(plan: Plan, run: Run, directory: Path, here: trial.Here) -> Record:
    """Trains with benchmarks.train, from the newest checkpoint of the run if there is one."""
    options = dict(run.options)
    if weights := options.get("initial_checkpoint"):
        options["initial_checkpoint"] = str(Path(here.data_dir or "") / weights)
    study = config.checked({"name": plan.name, "grid": {"run": {run.name: options | {"eval_every": 0}}}})
    start = time.process_time()
    failed, model_run = trial.trained_run(study, {"run": run.name}, directory, here)
    passes = sum(line["train_passes"] for line in read_jsonl(directory / "metrics.jsonl"))
    record: Record = {"failed": failed, "passes": passes, "validation_accuracy": 0.0, "test_accuracy": None}
    if model_run is not None:
        held_out, test = split_test(model_run.splits, plan.evaluate)
        split = {"validation": held_out} if run.tuning else {"test": test}
        for name, examples in split.items():
            batches = model_run.batches(examples, trial.BATCH)
            result = evaluate(model_run.model, batches, nn.CrossEntropyLoss(), device=model_run.device)
            record |= {f"{name}_accuracy": 100 * result["accuracy"], f"{name}_loss": result["loss"]}
        if run.tuning:
            shutil.rmtree(directory / "checkpoints")
    return record | {"cpu_seconds": time.process_time() - start}


def split_test(splits: Splits, settings: Settings) -> tuple[Any, Examples]:
    """What tunes and what is reported. With `held_out` so many of the test images tune, and `test` others report: of a
    pretrained model whose training set all of the training images were. The same ones in every run."""
    if "held_out" not in settings:
        return splits.validation, splits.test
    order = Stream(0).permutation(len(splits.test))
    parts = order[: settings["held_out"]], order[settings["held_out"] :][: settings["test"]]
    held_out, test = (
        Examples(splits.test.split, splits.test.mode, splits.test.rows[rows], splits.test.labels[rows])
        for rows in (part.sort().values for part in parts)
    )
    return held_out, test


def text_run(plan: Plan, run: Run, directory: Path, here: trial.Here) -> Record:
    """Trains with benchmarks.finetune_text; files and the model are relative to --data-dir."""
    from benchmarks import finetune_text

    if more := run.options.keys() - {f.name for f in fields(finetune_text.Settings)}:
        raise unknown("option of benchmarks.finetune_text", min(more), [f.name for f in fields(finetune_text.Settings)])
    directory.mkdir(parents=True, exist_ok=True)
    settings = finetune_text.Settings(**located(run.options, here), out=directory, device="cpu")
    start = time.process_time()
    with open_log(directory / "log.txt") as log, contextlib.redirect_stdout(log):
        result = finetune_text.finetune(replace(settings, test=[] if run.tuning else settings.test))
    cost = {"failed": None, "passes": result["passes"], "cpu_seconds": time.process_time() - start}
    if run.tuning:
        return cost | {"validation_accuracy": 100 * result["accuracy"]}
    tested = {f"{name}_accuracy": 100 * accuracy for name, accuracy in result["test"].items()}
    return cost | tested | {"train_loss": result["train_loss"]}


def located(options: Mapping[str, Any], here: trial.Here) -> dict[str, Any]:
    if here.data_dir is None:
        raise InputError("give --data-dir, where the model and the texts are")
    root, located = Path(here.data_dir), dict(options)
    for key in ("train", "validation"):
        located[key] = root / options[key]
    located["test"] = [root / path for path in options["test"]]
    located["model"] = str(root / options["model"])
    return located
