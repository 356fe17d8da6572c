"""A study in a plain file: what varies, what is fixed, what is measured. TOML or YAML, checked before anything runs."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks import measure
from benchmarks.command import InputError, one_line, unknown
from benchmarks.train import options
from sam_optim.vision.cifar import LAYOUT

TARGETS = ("test_error", "gap", "ood_error", "train_loss")
OBJECTIVES = (*TARGETS, "validation_error")
SPLITS = ("train", "validation", "test")
GEOMETRIES = ("no", "elementwise", "filter", "layer")
HERE = ("data_dir", "device", "workers")  # what may differ between the machines of one study
OURS = (*HERE, "out", "resume", "force", "config", "measures", "checkpoint_steps")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,79}")
TABLES = {
    "measures": {
        "names": ["worst", "average", "eigenvalue", "trace"],
        "label": "",
        "split": "train",
        "examples": 512,
        "batch_size": 128,
        "rho": None,
        "adaptive": "no",
    },
    "evaluate": {"train_examples": 0, "test_examples": 0},
    "corruptions": {"names": [], "severities": [3], "examples": 1000, "seed": 0, "published": False},
    "sampler": {"name": "TPESampler", "trials": None, "seed": 0, "objective": "test_error", "options": {}},
}
DISTRIBUTION = {"low", "high", "step", "log"}

Settings = Mapping[str, Any]


@dataclass(frozen=True)
class Config:
    """name: of the study in its storage. factors: for each, level name -> options of `benchmarks.train` (a plain list
    of values names the option itself), or a range {low, high, step, log} for a sampler. The rest as in the file."""

    name: str
    factors: Mapping[str, Any]
    fixed: Settings
    measures: tuple[Settings, ...]
    evaluate: Settings
    corruptions: Settings
    sampler: Settings | None

    @property
    def combinations(self) -> list[dict[str, Any]]:
        """factor -> level, for every combination of a grid; the last factor varies fastest."""
        levels = [list(levels) for levels in self.factors.values()]
        return [dict(zip(self.factors, chosen, strict=True)) for chosen in itertools.product(*levels)]

    @property
    def total(self) -> int:
        """How many models the study trains: a sampler's trials, but no combination twice."""
        endless = any(isinstance(levels, Range) for levels in self.factors.values())
        most = math.inf if endless else len(self.combinations)
        return int(min(self.sampler["trials"], most)) if self.sampler else int(most)

    @property
    def samples(self) -> list[dict[str, Any]]:
        """The combinations that are tried out when the settings are read: all of a grid, one of a sampler's."""
        return self.combinations if not self.sampler else [_some(self)]

    def argv(self, levels: Mapping[str, Any]) -> list[str]:
        """The command line of `benchmarks.train` for one level of each factor."""
        chosen = dict(self.fixed)
        for factor, level in levels.items():
            found = self.factors[factor]
            chosen |= {factor: level} if isinstance(found, (list, Range)) else found[level]
        return _argv(chosen)

    def to_dict(self) -> dict[str, Any]:
        """What is recorded with the study: two files that say the same give the same."""
        factors = {k: v.to_dict() if isinstance(v, Range) else v for k, v in self.factors.items()}
        found = {"name": self.name, "grid": factors, "fixed": self.fixed, "measures": list(self.measures)}
        # what older studies could not say is recorded only where it is said, so that they go on
        corruptions = {k: v for k, v in self.corruptions.items() if k != "published" or v}
        found |= {"evaluate": self.evaluate, "corruptions": corruptions, "sampler": self.sampler}
        return json.loads(json.dumps(found, allow_nan=False))


@dataclass(frozen=True)
class Range:
    """Values from low to high for a sampler; whole numbers where both ends are."""

    low: float
    high: float
    step: float | None = None
    log: bool = False

    def to_dict(self) -> dict[str, Any]:
        return {"low": self.low, "high": self.high, "step": self.step, "log": self.log}


def identifier(levels: Mapping[str, Any]) -> str:
    """A file name for one combination, e.g. lr0.1-sam_rho0.05-seed0-1f0c9a2b: readable, and unique by its digest."""
    digest = hashlib.blake2b(json.dumps(levels, sort_keys=True).encode(), digest_size=4).hexdigest()
    words = "-".join(
        f"{factor}{level:g}" if _is_number(level) else f"{factor}-{level}" for factor, level in levels.items()
    )
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", words)[:120] + f"-{digest}"


def load(path: Path | str) -> Config:
    """The study of a .toml, .yaml or .yml file.

    Raises:
        InputError: the file cannot be read, or has an option, measure, factor or value that does not exist.
    """
    path = Path(path)
    if not path.is_file():
        raise InputError(f"{path} is not a file; a study's settings are a TOML or YAML file")
    try:
        if path.suffix in (".yaml", ".yml"):
            import yaml

            content = yaml.safe_load(path.read_text(encoding="utf-8"))
        else:
            content = tomllib.loads(path.read_text(encoding="utf-8"))
    except Exception as error:
        raise InputError(f"{path} cannot be read: {one_line(error)}") from None
    if not isinstance(content, dict):
        raise InputError(f"{path} must hold tables of settings, got {type(content).__name__}")
    try:
        return checked(content, default_name=path.stem)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def checked(content: Mapping[str, Any], *, default_name: str = "study") -> Config:
    """A `Config` from plain tables, with what is not given at its default."""
    known = ("name", "grid", "fixed", *TABLES)
    if wrong := [key for key in content if key not in known]:
        raise unknown("table", wrong[0], known)
    name = str(content.get("name", default_name))
    if not NAME.fullmatch(name):
        raise InputError(f"name {name!r}: letters, digits, '.', '_' and '-' only, at most 80")
    grid = content.get("grid") or {}
    if not isinstance(grid, Mapping) or not grid:
        raise InputError("[grid] is empty: give at least one factor, e.g. lr = [0.05, 0.1]")
    given = content.get("measures", [{}])
    found = Config(
        name=name,
        factors={factor: _levels(factor, levels) for factor, levels in grid.items()},
        fixed={key: _option(key, value) for key, value in (content.get("fixed") or {}).items()},
        measures=tuple(_table("measures", t) for t in ([given] if isinstance(given, Mapping) else given)),
        evaluate=_table("evaluate", content.get("evaluate") or {}),
        corruptions=_table("corruptions", content.get("corruptions") or {}),
        sampler=_table("sampler", content["sampler"]) if content.get("sampler") else None,
    )
    _check(found)
    return found


def _levels(factor: str, levels: Any) -> Any:
    if isinstance(levels, Mapping) and levels and set(levels) <= DISTRIBUTION and {"low", "high"} <= set(levels):
        _option(factor, None)
        return Range(**levels)
    if isinstance(levels, Mapping) and levels and all(isinstance(v, Mapping) for v in levels.values()):
        if not NAME.fullmatch(factor):
            raise InputError(f"factor {factor!r}: letters, digits, '.', '_' and '-' only")
        return {str(level): {k: _option(k, v) for k, v in table.items()} for level, table in levels.items()}
    if isinstance(levels, (list, tuple)) and levels:
        found = [_option(factor, level) for level in levels]
        if len({json.dumps(v) for v in found}) < len(found):
            raise InputError(f"{factor} has a level twice: {found}; nothing runs twice")
        return found
    raise InputError(f"{factor} must be a list of values, a table of named levels or {{low, high}}, got {levels!r}")


def _option(key: str, value: Any) -> Any:
    known = [name for name in vars(options.parser().parse_args([])) if name not in OURS]
    if key in OURS:
        raise InputError(f"{key!r} is given on the command line or made by the study: leave it out of the file")
    if key not in known:
        raise unknown("option of benchmarks.train", key, known)
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{key} must be finite, got {value}")
    if not isinstance(value, (str, int, float, bool, list, dict, type(None))):
        raise InputError(f"{key} must be a plain value, got {value!r}")
    return value


def _table(name: str, given: Any) -> dict[str, Any]:
    if not isinstance(given, Mapping):
        raise InputError(f"[{name}] must be a table, got {given!r}")
    if wrong := [key for key in given if key not in TABLES[name]]:
        raise unknown(f"setting of [{name}]", wrong[0], TABLES[name])
    return dict(TABLES[name]) | dict(given)


def _check(config: Config) -> None:
    for block in config.measures:
        if not isinstance(block["names"], list):
            raise InputError(f"names of [[measures]] must be a list, got {block['names']!r}")
        measure.chosen(",".join(block["names"]))
        _check_measures(block)
    for key, num in config.evaluate.items():
        _check_number(f"{key} of [evaluate]", num, "0 for all")
    labels = [columns(block) for block in config.measures]
    if len({c for found in labels for c in found}) < sum(map(len, labels)):
        raise InputError("two [[measures]] blocks have a measure of the same name: give each a label")
    _check_corruptions(config.corruptions)
    ranges = [factor for factor, levels in config.factors.items() if isinstance(levels, Range)]
    if config.sampler:
        if not isinstance(config.sampler["trials"], int) or config.sampler["trials"] < 1:
            raise InputError(f"[sampler] needs trials, a whole number >= 1, got {config.sampler['trials']!r}")
        if config.sampler["objective"] not in OBJECTIVES:
            raise unknown("objective", str(config.sampler["objective"]), OBJECTIVES)
        if config.sampler["objective"] == "ood_error" and not config.corruptions["names"]:
            raise InputError('objective = "ood_error" of [sampler] needs [corruptions] with names, e.g. ["fog"]')
    elif ranges:
        raise InputError(f"{ranges[0]} is a range: a grid needs a list of values, or give a [sampler]")
    for levels in config.samples:
        try:
            args = options.parse(config.argv(levels))
            if config.corruptions["names"] and args.data == "digits":
                raise InputError("[corruptions] are for colour images, and digits are grey: leave that table out")
            if args.data in ("digits", *LAYOUT):  # others may have a folder for it, which `trial.check` looks for
                check_held_out(config, args.validation_fraction > 0)
        except InputError as error:
            raise InputError(f"{', '.join(f'{k} = {v}' for k, v in levels.items())}: {error}") from None


def check_held_out(config: Config, held_out: bool) -> None:
    """Raises InputError where the settings ask for held-out examples and there are none."""
    asking = [f'split = "{block["split"]}" of [[measures]]' for block in config.measures]
    asking += [f'objective = "{config.sampler["objective"]}" of [sampler]'] if config.sampler else []
    for said in asking:
        if "validation" in said and not held_out:
            raise InputError(f"{said} needs held-out examples: give validation_fraction, e.g. 0.1, in [fixed]")


def _check_measures(block: Settings) -> None:
    if block["split"] not in SPLITS:
        raise unknown("split of [[measures]]", str(block["split"]), SPLITS)
    if block["adaptive"] not in (*GEOMETRIES, None, True, False):  # None: the optimizer's; YAML reads no as False
        raise unknown("adaptive of [[measures]]", str(block["adaptive"]), GEOMETRIES)
    rho = block["rho"]
    if rho is not None and not (_is_number(rho) and math.isfinite(rho) and rho > 0):
        raise InputError(f"rho of [[measures]] is a radius in weight space and must be > 0, got {rho!r}")
    _check_number("examples of [[measures]]", block["examples"], "0 for all")
    _check_number("batch_size of [[measures]]", block["batch_size"], "at least 1", least=1)


def _check_number(name: str, value: Any, words: str, *, least: int = 0) -> None:
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise InputError(f"{name} is a number, {words}, got {value!r}")


def _check_corruptions(found: Settings) -> None:
    if not isinstance(found["published"], bool):
        raise InputError(f"published of [corruptions] is true or false, got {found['published']!r}")
    _check_number("examples of [corruptions]", found["examples"], "0 for all")
    if not found["names"]:
        return
    from benchmarks.corruptions import NAMES

    for name in found["names"]:
        if name not in NAMES:
            raise unknown("corruption", str(name), NAMES)
    if not found["severities"] or not set(found["severities"]) <= set(range(1, 6)):
        raise InputError(f"severities are whole numbers from 1 to 5, got {found['severities']}")


def _some(config: Config) -> dict[str, Any]:
    return {k: v.low if isinstance(v, Range) else next(iter(v)) for k, v in config.factors.items()}


def columns(block: Settings) -> list[str]:
    """The names of a block's measures in the table of the study: "worst", or "LABEL worst"."""
    return [f"{block['label']} {name}" if block["label"] else name for name in block["names"]]


def _argv(chosen: Settings) -> list[str]:
    found: list[str] = []
    for key, value in chosen.items():
        option = "--" + key.replace("_", "-")
        if value is None or value is False:
            continue
        if value is True:
            found.append(option)
        elif isinstance(value, Mapping):
            found += [option, *(f"{k}={v}" for k, v in value.items())]
        elif isinstance(value, list):
            found += [option, *map(str, value)]
        else:
            found += [f"{option}={value}"]
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
