"""How benchmarks compare: interleaved runs of one process, paired ratios of thread CPU time, and what they ran on."""

from __future__ import annotations

import gc
import importlib.metadata
import os
import platform
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import InputError

try:
    from tqdm import tqdm
except ImportError:  # what comes with torch alone: on a machine that is there for its device

    def tqdm(rounds: Any, **_: Any) -> Any:  # type: ignore[no-redef]
        return rounds


WARM_UP = 3  # rounds that do not count

Run = Callable[[], Any]


def interleaved(runs: dict[str, tuple[Run, Run]], rounds: int, label: str) -> dict[str, list[float]]:
    """Thread CPU seconds of every run, (what comes before the clock, what is timed), in every round."""
    shuffle = random.Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    gc.disable()
    try:
        for i in tqdm(range(rounds + WARM_UP), desc=label, leave=False, disable=None):
            shuffle(names)
            for name in names:
                prepare, run = runs[name]
                prepare()
                start = time.thread_time()
                run()
                if i >= WARM_UP:
                    times[name].append(time.thread_time() - start)
            gc.collect()
    finally:
        gc.enable()
    return times


def paired(reference: Run, runs: dict[str, Run], rounds: int, label: str) -> dict[str, tuple[list[float], list[float]]]:
    """Thread CPU seconds of every run and of a run of the reference beside it, in every round.

    As `interleaved`, for runs so long that the machine is another one at the end of a round: the two of a pair follow
    each other, in random order.
    """
    draw = random.Random(0)
    times: dict[str, tuple[list[float], list[float]]] = {name: ([], []) for name in runs}
    names = list(runs)
    gc.disable()
    try:
        for i in tqdm(range(rounds + WARM_UP), desc=label, leave=False, disable=None):
            draw.shuffle(names)
            for name in names:
                pair = [(runs[name], times[name][0]), (reference, times[name][1])]
                draw.shuffle(pair)
                for run, seconds in pair:
                    start = time.thread_time()
                    run()
                    if i >= WARM_UP:
                        seconds.append(time.thread_time() - start)
            gc.collect()
    finally:
        gc.enable()
    return times


def ratio(a: list[float], b: list[float]) -> dict[str, float]:
    """Median and quartiles of the paired ratios a / b."""
    low, mid, high = statistics.quantiles([x / y for x, y in zip(a, b, strict=True)], n=4)
    return {"median": mid, "q1": low, "q3": high, "n": len(a)}


def check_rounds(rounds: int) -> None:
    if rounds < 2:
        raise InputError(f"--rounds must be >= 2, for quartiles, got {rounds}")


def facts(rounds: int, *packages: str) -> dict[str, Any]:
    """Hardware, settings, and the versions of this package, torch and `packages`."""
    found = {name: importlib.metadata.version(name) for name in packages}
    return {
        "sam_optim": importlib.metadata.version("sam_optim"),
        "torch": torch.__version__,
        **found,
        "machine": platform.machine(),
        "processor": _processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "rounds": rounds,
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()
