"""A table of runs: which of them can be used, their numbers, and the groups that they fall into."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

Run = Mapping[str, Any]
Keys = str | Sequence[str]

MIN_RUNS = 4  # with three, even a perfect order has p = 1/3: there is nothing to report


def keys(names: Keys | None) -> list[str]:
    return [] if names is None else [names] if isinstance(names, str) else list(names)


def check(table: Sequence[Run], names: Sequence[str], level: float, num_resamples: int) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is the coverage of the interval, between 0 and 1, got {level}")
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be >= 1, got {num_resamples}")
    for name in names:
        if table and not any(name in run for run in table):
            raise ValueError(f"no run has {name!r}; the first has {sorted(map(str, table[0]))}")


def number(run: Run, name: str) -> float:
    """nan for what is missing."""
    value = run.get(name)
    return math.nan if value is None else float(value)


def usable(table: Sequence[Run], numbers: Sequence[str], labels: Sequence[str] = ()) -> list[Run]:
    """The runs with a finite value for each of the numbers, and any value for each of the labels."""
    return [
        run
        for run in table
        if all(math.isfinite(number(run, name)) for name in numbers)
        and all(run.get(name) is not None for name in labels)
    ]


def column(runs: Sequence[Run], name: str) -> Tensor:
    return torch.tensor([number(run, name) for run in runs], dtype=torch.float64)


def groups(runs: Sequence[Run], names: Sequence[str]) -> Tensor:
    """(n,) int64: equal for runs that agree in all of these values."""
    labels = [tuple(repr(run.get(name)) for name in names) for run in runs]
    order = {label: i for i, label in enumerate(sorted(set(labels)))}
    return torch.tensor([order[label] for label in labels], dtype=torch.int64)


def why_no_tau(x: Tensor, y: Tensor, measure: str, target: str, clusters: Tensor | None) -> str | None:
    if len(x) < MIN_RUNS:
        return f"{len(x)} runs with finite numbers; tau needs at least {MIN_RUNS}"
    if clusters is not None and len(clusters.unique()) < MIN_RUNS:
        return f"{len(clusters.unique())} clusters of runs; tau needs at least {MIN_RUNS}"
    for values, name in ((x, measure), (y, target)):
        if bool((values == values[0]).all()):
            return f"{name} is the same in all {len(values)} runs"
    return None
