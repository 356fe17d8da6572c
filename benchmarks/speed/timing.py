"""How benchmarks compare: interleaved runs of one process, and paired ratios of thread CPU time."""

from __future__ import annotations

import gc
import random
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sam_optim.core.arguments import Parser, number
from sam_optim.core.files import write_json

try:
    from tqdm import tqdm
except ImportError:  # not installed with torch alone

    def tqdm(rounds: Any, **_: Any) -> Any:
        return rounds


WARM_UP = 3  # rounds that do not count

Run = Callable[[], Any]


@contextmanager
def _rounds(rounds: int, label: str) -> Iterator[Any]:
    """Numbers of rounds, the first `WARM_UP` below 0, without garbage collection in between."""
    gc.disable()
    try:
        yield tqdm(range(-WARM_UP, rounds), desc=label, leave=False, disable=None)
    finally:
        gc.enable()


def interleaved(runs: dict[str, tuple[Run, Run]], rounds: int, label: str) -> dict[str, list[float]]:
    """Thread CPU seconds of every run, (what comes before the clock, what is timed), in every round."""
    draw = random.Random(0)
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    with _rounds(rounds, label) as numbers:
        for i in numbers:
            draw.shuffle(names)
            for name in names:
                prepare, run = runs[name]
                prepare()
                start = time.thread_time()
                run()
                if i >= 0:
                    times[name].append(time.thread_time() - start)
            gc.collect()
    return times


def paired(reference: Run, runs: dict[str, Run], rounds: int, label: str) -> dict[str, tuple[list[float], list[float]]]:
    """Thread CPU seconds of every run and of a run of the reference beside it, in every round.

    As `interleaved`, for runs so long that the machine is another one at the end of a round: the two of a pair follow
    each other, in random order.
    """
    draw = random.Random(0)
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runs}
    names = list(runs)
    with _rounds(rounds, label) as numbers:
        for i in numbers:
            draw.shuffle(names)
            for name in names:
                pair = [(runs[name], times[name][0]), (reference, times[name][1])]
                draw.shuffle(pair)
                for run, seconds in pair:
                    start = time.thread_time()
                    run()
                    if i >= 0:
                        seconds.append(time.thread_time() - start)
            gc.collect()
    return times


def ratio(a: list[float], b: list[float]) -> dict[str, float]:
    """Median and quartiles of the paired ratios a / b."""
    low, mid, high = statistics.quantiles([x / y for x, y in zip(a, b, strict=True)], n=4)
    return {"median": mid, "q1": low, "q3": high, "n": len(a)}


def parser(prog: str, description: str, *, rounds: int, json: Path | None = None) -> Parser:
    p = Parser(prog=f"python -m benchmarks.speed.{prog}", description=description.splitlines()[0])
    p.add_argument("--rounds", type=number(int, 2), default=rounds, help="at least 2, for quartiles")
    p.add_argument("--json", type=Path, default=json, metavar="FILE", help="where the results are written")
    return p


def write(path: Path | None, results: dict[str, Any]) -> None:
    """The results as JSON, if there is a path; its folder is made."""
    if path is not None:
        write_json(path, results, "--json")
