"""`make results`: which published results can be run again, at what cost, and which are done.

    python -m benchmarks.catalogue [--runs DIR]

Each command goes on where it was when it is started again.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.command import Parser, duration
from benchmarks.frontier import __main__ as frontier
from benchmarks.frontier import plan as plans
from benchmarks.study import config, storage
from sam_optim.core.errors import InputError, run
from sam_optim.core.files import read_json
from sam_optim.core.text import text_table

ROOT = Path(__file__).resolve().parents[1]
HOURS = {
    "cifar10": 3.5,
    "methods_tuning": 1.5,
    "methods": 1.5,
    "fitted": 24.0,
}  # of one CPU thread, measured or guessed
OTHERS = [
    ("benchmarks.pretrained", "several hours", "benchmarks/results/pretrained_cifar10"),
    ("benchmarks.examples.diagonal_network --json FILE", "3 min", "benchmarks/results/diagonal_network.json"),
    ("benchmarks.speed.whole_step --json FILE", "20 min", "benchmarks/results/whole_step_cpu.json"),
    ("benchmarks.speed.host --json FILE", "5 min", "benchmarks/results/host_cpu.json"),
    ("benchmarks.demo", "3 min", "docs/demo.png"),
]


def main(argv: Sequence[str] | None = None) -> int:
    p = Parser(prog="python -m benchmarks.catalogue", description=(__doc__ or "").splitlines()[0])
    p.add_argument("--runs", type=Path, default=Path("runs"), metavar="DIR", help="where runs are; default: runs")
    print(text_table(["python -m", "whole cost, one thread", "done here", "committed"], list(rows(p.parse_args(argv)))))
    return 0


def rows(args: argparse.Namespace) -> Iterator[list[str]]:
    for path in sorted((ROOT / "benchmarks" / "studies").glob("*.toml")):
        command = str(path.relative_to(ROOT))
        if path.stem.startswith("frontier_"):
            yield _comparison(path, f"benchmarks.frontier run {command}", args.runs)
        else:
            yield _study(path, f"benchmarks.study run {command}", args.runs)
    for command, cost, committed in OTHERS:
        yield [command, cost, "", committed if (ROOT / committed).exists() else "no"]


def _comparison(path: Path, command: str, runs: Path) -> list[str]:
    plan = plans.load(path)
    _, _, said = frontier.status(plan, runs / plan.name).partition(": ")
    results = ROOT / "benchmarks" / "results" / "frontier" / f"{plan.name.removeprefix('frontier-')}.json"
    done = f"{len(read_json(results)['runs'])} of {plan.total} runs" if results.is_file() else "no"
    return [command, duration(plan.total * plan.seconds), said, done]


def _study(path: Path, command: str, runs: Path) -> list[str]:
    study = config.load(path)
    out = runs / f"study-{study.name}"
    done = f"0 of {study.total}"
    try:
        if (out / "study.db").is_file() and storage.has_study(url := storage.url_of(None, out), study.name):
            from benchmarks.study.queue import Queue

            done = str(Queue(study, url).tally())
    except InputError as error:
        done = str(error)
    results = {"cifar10": "study_cifar10", "methods": "methods", "methods_tuning": "methods"}.get(path.stem, "")
    return [command, f"{HOURS[path.stem]:g} h", done, f"benchmarks/results/{results}" if results else "no"]


if __name__ == "__main__":
    sys.exit(run(main))
