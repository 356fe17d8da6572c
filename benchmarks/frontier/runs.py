"""Runs of a plan, one after the other; what is done is a file, and is not done again."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.command import read_jsonl
from benchmarks.frontier.plan import Plan, Run
from benchmarks.machine import facts
from benchmarks.study import config, trial
from sam_optim.core.errors import InputError
from sam_optim.core.files import read_json, write_json

Record = dict[str, Any]


def execute(plan: Plan, out: Path, here: trial.Here) -> Iterator[tuple[Run, Record, bool]]:
    """(run, its record, whether it was trained now) for every run of the plan whose method this version has.

    A method is tuned, and its reported runs follow at once with the candidate of the best mean held-out accuracy.
    """
    program: Callable[[Plan, Run, Path, trial.Here], Record] = {"train": image_run, "finetune_text": text_run}[
        plan.program
    ]
    for method in plan.methods:
        if not available(plan, method):
            continue
        for condition in plan.conditions:
            done: list[tuple[Run, Record]] = []
            for run in _both(plan, method, condition, done):
                path = out / "records" / f"{run.name}.json"
                new = not path.is_file()
                if new:
                    record = program(plan, run, out / "runs" / run.name, here)
                    about = {"method": method, "condition": condition, "candidate": dict(run.candidate)}
                    about |= {"seed": run.seed, "tuning": run.tuning}
                    write_json(path, about | record | {"provenance": facts("timm", "transformers")})
                record = read_json(path)
                done.append((run, record))
                yield run, record, new


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
    """By benchmarks.train, from the newest checkpoint of the run if there is one."""
    evaluated = plan.evaluate | ({"test_examples": 1} if run.tuning else {})
    options = dict(run.options) | {"eval_every": 0}
    if weights := options.get("initial_checkpoint"):
        options["initial_checkpoint"] = str(Path(here.data_dir or "") / weights)
    grid = {"run": {run.name: options}}
    study = config.checked({"name": plan.name, "grid": grid, "measures": [], "evaluate": evaluated})
    start = time.process_time()
    record = trial.execute(study, {"run": run.name}, directory, here)
    passes = sum(line["train_passes"] for line in read_jsonl(directory / "metrics.jsonl"))
    result = {"failed": record["failed"], "passes": passes, "cpu_seconds": time.process_time() - start}
    if record["failed"]:
        return result | {"validation_accuracy": 0.0, "test_accuracy": None}
    targets = record["targets"]
    if run.tuning:
        shutil.rmtree(directory / "checkpoints")
        return result | {"validation_accuracy": 100 - targets["validation_error"]}
    return result | {
        "test_accuracy": 100 - targets["test_error"],
        "test_loss": targets["test_loss"],
        "train_accuracy": 100 - targets["train_error"],
        "train_loss": targets["train_loss"],
    }


def text_run(plan: Plan, run: Run, directory: Path, here: trial.Here) -> Record:
    """By benchmarks.finetune_text; files and the model are relative to --data-dir."""
    from benchmarks import finetune_text

    directory.mkdir(parents=True, exist_ok=True)
    settings = finetune_text.Settings(**_located(run.options, here), out=directory, device="cpu")
    start = time.process_time()
    with open(directory / "log.txt", "a", encoding="utf-8") as log, contextlib.redirect_stdout(log):
        result = finetune_text.finetune(replace(settings, test=[] if run.tuning else settings.test))
    cost = {"failed": None, "passes": result["passes"], "cpu_seconds": time.process_time() - start}
    if run.tuning:
        return cost | {"validation_accuracy": 100 * result["accuracy"]}
    tested = {f"{name}_accuracy": 100 * value for name, value in result["test"].items()}
    return cost | tested | {"train_loss": result["train_loss"]}


def _located(options: Mapping[str, Any], here: trial.Here) -> dict[str, Any]:
    if here.data_dir is None:
        raise InputError("give --data-dir, where the model and the texts are")
    root, located = Path(here.data_dir), dict(options)
    for key in ("train", "validation"):
        located[key] = root / options[key]
    located["test"] = [root / path for path in options["test"]]
    located["model"] = str(root / options["model"])
    return located
