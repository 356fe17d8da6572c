"""A comparison of methods in a plain file: what is fixed, the methods and what is tuned of each, the seeds."""

from __future__ import annotations

import hashlib
import itertools
import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks.command import read_settings
from benchmarks.study.config import NAME
from sam_optim.core.errors import InputError, unknown

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Method:
    """options: of the program. candidates: the settings that tuning chooses from; one where nothing is tuned."""

    options: Settings
    candidates: list[dict[str, Any]]


@dataclass(frozen=True)
class Run:
    """One training. tuning: its held-out accuracy helps to choose a candidate; else its test accuracy is reported."""

    method: str
    condition: str
    candidate: Settings
    seed: int
    tuning: bool
    options: Settings

    @property
    def name(self) -> str:
        """Readable, and another one for other options."""
        digest = hashlib.blake2b(json.dumps(self.options, sort_keys=True).encode(), digest_size=6).hexdigest()
        words = "".join(c if c.isalnum() else "-" for c in f"{self.condition}-{self.method}")
        return f"{words}-{self.seed}-{digest}"


@dataclass(frozen=True)
class Plan:
    """The file. program: "train" (benchmarks.train) or "finetune_text". baseline: costs are over its. control: what
    differences are to. seconds: a guess for one run."""

    name: str
    task: str
    program: str
    baseline: str
    control: str
    seeds: list[int]
    tuning_seeds: list[int]
    seconds: float
    methods: dict[str, Method]
    conditions: dict[str, Settings]
    fixed: Settings
    evaluate: Settings = field(default_factory=dict)

    def run(self, method: str, condition: str, candidate: Settings, seed: int, *, tuning: bool) -> Run:
        options = dict(self.fixed) | self.conditions[condition] | self.methods[method].options | candidate
        return Run(method, condition, candidate, seed, tuning, options | {"seed": seed})

    def tuning_runs(self, method: str, condition: str) -> list[Run]:
        """None where there is nothing to choose."""
        candidates = self.methods[method].candidates
        chosen = itertools.product(candidates, self.tuning_seeds) if len(candidates) > 1 else ()
        return [self.run(method, condition, candidate, seed, tuning=True) for candidate, seed in chosen]

    def final_runs(self, method: str, condition: str, candidate: Settings) -> list[Run]:
        return [self.run(method, condition, candidate, seed, tuning=False) for seed in self.seeds]

    @property
    def total(self) -> int:
        each = [len(self.tuning_runs(m, c)) + len(self.seeds) for m in self.methods for c in self.conditions]
        return sum(each)


def _is_text(x: Any) -> bool:
    return isinstance(x, str) and bool(x)


def _are_seeds(x: Any) -> bool:
    return isinstance(x, list) and bool(x) and all(type(seed) is int and seed >= 0 for seed in x)


def _is_table(x: Any) -> bool:
    return isinstance(x, dict)


def _are_tables(x: Any) -> bool:
    return _is_table(x) and bool(x) and all(map(_is_table, x.values()))


def _are_methods(x: Any) -> bool:
    tuned = [table.get("tune", {}) for table in x.values()] if _are_tables(x) else [None]
    return all(_is_table(t) and all(isinstance(v, list) and v for v in t.values()) for t in tuned)


KINDS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "name": (lambda x: _is_text(x) and NAME.fullmatch(x) is not None, "letters, digits, '.', '_' and '-', at most 80"),
    **dict.fromkeys(("task", "baseline", "control"), (_is_text, "a text")),
    "program": (lambda x: x in ("train", "finetune_text"), "'train' or 'finetune_text'"),
    **dict.fromkeys(("seeds", "tuning_seeds"), (_are_seeds, "a list of integers")),
    "seconds": (lambda x: type(x) in (int, float) and 0 < x < 1e9, "a number of seconds"),
    "fixed": (_is_table, "a table of options"),
    "evaluate": (lambda x: _is_table(x) and all(type(n) is int and n > 0 for n in x.values()), "a table of counts"),
    "conditions": (_are_tables, "a table with a table of options for each condition"),
    "methods": (_are_methods, "a table with a table of options for each method, and `tune` one of lists"),
}


def load(path: Path | str) -> Plan:
    """The plan of a TOML file.

    Raises:
        InputError: it cannot be read, or lacks a table.
    """
    content = {"name": Path(path).stem, "evaluate": {}} | read_settings(Path(path), yaml=False)
    for key, (is_right, words) in KINDS.items():
        if key not in content or not is_right(content[key]):
            given = repr(content[key]) if key in content else "nothing"
            raise InputError(f"{path} is not a plan of a comparison: {key} must be {words}, got {given}")
    methods = {name: _method(dict(table)) for name, table in content.pop("methods").items()}
    if more := content.keys() - KINDS.keys():
        raise unknown("entry of a plan", min(more), KINDS)
    plan = Plan(**content, methods=methods)
    for name in (plan.baseline, plan.control):
        if name not in methods:
            raise unknown("method", name, methods)
    if set(plan.seeds) & set(plan.tuning_seeds):
        raise InputError(f"{path}: seeds that tune and seeds that report must differ")
    return plan


def _method(table: dict[str, Any]) -> Method:
    """tune: option -> values; candidates are all their combinations."""
    tuned = table.pop("tune", {})
    values = itertools.product(*tuned.values())
    return Method(table, [dict(zip(tuned, chosen, strict=True)) for chosen in values])
