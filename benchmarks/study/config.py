"""A study in a plain file: what varies, what is fixed, what is measured. TOML or YAML, checked before anything runs."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, TypeVar

from benchmarks import measure
from benchmarks.command import read_settings
from benchmarks.measure import GEOMETRIES, SPLITS, Measuring
from benchmarks.train.options import Options, parse, words
from sam_optim.core.errors import InputError, unknown
from sam_optim.vision.cifar import LAYOUT

TARGETS = ("test_error", "gap", "ood_error", "train_loss")
OBJECTIVES = (*TARGETS, "validation_error")
MOST = 10_000  # models of a study
HERE = ("data_dir", "device", "workers")  # what may differ between the machines of one study
OURS = (*HERE, "out", "resume", "force", "measures", "checkpoint_steps")
NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,79}")
DISTRIBUTION = {"low", "high", "step", "log"}
# of Optuna; not CmaEsSampler, which unpickles data from the storage, and so runs code that was written there
SAMPLERS = ("TPESampler", "RandomSampler", "GPSampler", "QMCSampler", "NSGAIISampler", "BruteForceSampler")

Table = TypeVar("Table")


@dataclass(frozen=True)
class Range:
    """Values from low to high for a sampler; whole numbers where both ends are."""

    low: float
    high: float
    step: float | None = None
    log: bool = False


@dataclass(frozen=True, kw_only=True)
class Measures(Measuring):
    """A block of measures. label: before the names of its columns. Without another word the geometry is T = 1."""

    label: str = ""
    adaptive: str | None = "no"

    @property
    def columns(self) -> list[str]:
        """The names of its measures in the table of the study: "worst", or "LABEL worst"."""
        return [f"{self.label} {name}" if self.label else name for name in self.names]

    def check(self) -> None:
        measure.chosen(",".join(map(str, self.names)))
        if self.split not in SPLITS:
            raise unknown("split of [[measures]]", str(self.split), SPLITS)
        if self.adaptive not in (*GEOMETRIES, None, True, False):  # None: the optimizer's; YAML reads no as False
            raise unknown("adaptive of [[measures]]", str(self.adaptive), GEOMETRIES)
        if self.norm not in (None, "2", "inf"):
            raise unknown("norm of [[measures]]", str(self.norm), ("2", "inf"))
        if not isinstance(self.normalize_logits, bool):
            raise InputError(f"normalize_logits of [[measures]] is true or false, got {self.normalize_logits!r}")
        if self.rho is not None and not (_is_number(self.rho) and math.isfinite(self.rho) and self.rho > 0):
            raise InputError(f"rho of [[measures]] is a radius in weight space and must be > 0, got {self.rho!r}")
        _check_count("examples of [[measures]]", self.examples, "0 for all")
        _check_count("batch_size of [[measures]]", self.batch_size, "at least 1", least=1)


@dataclass(frozen=True)
class Evaluate:
    """How many examples the errors are of; 0 for all."""

    train_examples: int = 0
    test_examples: int = 0

    def check(self) -> None:
        for key, number in asdict(self).items():
            _check_count(f"{key} of [evaluate]", number, "0 for all")


@dataclass(frozen=True)
class Corruptions:
    """The damaged images of `benchmarks.evaluate` that each model sees, if there are names."""

    names: list[str] = field(default_factory=list)
    severities: list[int] = field(default_factory=lambda: [3])
    examples: int = 1000
    seed: int = 0
    published: bool = False

    def check(self) -> None:
        _check_count("examples of [corruptions]", self.examples, "0 for all")
        if not self.names:
            return
        from benchmarks.corruptions import NAMES

        for name in self.names:
            if name not in NAMES:
                raise unknown("corruption", str(name), NAMES)
        if not self.severities or not all(_is_whole(s) and 1 <= s <= 5 for s in self.severities):
            raise InputError(f"severities are whole numbers from 1 to 5, got {self.severities}")


@dataclass(frozen=True)
class Sampler:
    """One of optuna.samplers, in place of a grid."""

    name: str = "TPESampler"
    trials: int | None = None
    seed: int = 0
    objective: str = "test_error"
    options: Mapping[str, Any] = field(default_factory=dict)

    def check(self) -> None:
        if not _is_whole(self.trials) or self.trials < 1:
            raise InputError(f"[sampler] needs trials, a whole number >= 1, got {self.trials!r}")
        if self.name not in SAMPLERS:
            raise unknown("sampler that runs nothing of what a storage holds", self.name, SAMPLERS)
        if self.objective not in OBJECTIVES:
            raise unknown("objective", str(self.objective), OBJECTIVES)


@dataclass(frozen=True)
class Config:
    """name: of the study in its storage. factors: for each, level name -> options of `benchmarks.train` (a plain list
    of values names the option itself), or a `Range` for a sampler. The rest as in the file."""

    name: str
    factors: Mapping[str, Any]
    fixed: Mapping[str, Any]
    measures: tuple[Measures, ...]
    evaluate: Evaluate
    corruptions: Corruptions
    sampler: Sampler | None

    @property
    def columns(self) -> list[str]:
        return [column for block in self.measures for column in block.columns]

    @property
    def combinations(self) -> list[dict[str, Any]]:
        """factor -> level, for every combination of a grid; the last factor varies fastest."""
        levels = [list(levels) for levels in self.factors.values()]
        return [dict(zip(self.factors, chosen, strict=True)) for chosen in itertools.product(*levels)]

    @property
    def ranges(self) -> list[str]:
        return [factor for factor, levels in self.factors.items() if isinstance(levels, Range)]

    @property
    def total(self) -> int:
        """How many models the study trains: a sampler's trials, but no combination twice."""
        most = math.inf if self.ranges else math.prod(len(levels) for levels in self.factors.values())
        return int(min(self.sampler.trials or 0, most) if self.sampler else most)

    @property
    def samples(self) -> list[dict[str, Any]]:
        """The combinations that are tried out when the settings are read: all of a grid, one of a sampler's."""
        if not self.sampler:
            return self.combinations
        return [{k: v.low if isinstance(v, Range) else next(iter(v)) for k, v in self.factors.items()}]

    def options(self, levels: Mapping[str, Any], out: Path = Path("none")) -> Options:
        """The options of the run with these levels of the factors."""
        return parse([*self.argv(levels), f"--out={out}"])

    def argv(self, levels: Mapping[str, Any]) -> list[str]:
        """The same as a command line of `benchmarks.train`."""
        chosen = dict(self.fixed)
        for factor, level in levels.items():
            options = self.factors[factor]
            chosen |= {factor: level} if isinstance(options, (list, Range)) else options[level]
        return [word for key, value in chosen.items() for word in words(key, value)]

    def to_dict(self) -> dict[str, Any]:
        """What is recorded with the study: two files that say the same give the same."""
        values = asdict(self)
        values["grid"] = values.pop("factors") | {name: asdict(self.factors[name]) for name in self.ranges}
        # newer options are recorded only where they are set, so that older studies continue
        values["corruptions"] = {k: v for k, v in values["corruptions"].items() if k != "published" or v}
        newer = ("norm", "normalize_logits")
        values["measures"] = [{k: v for k, v in m.items() if k not in newer or v} for m in values["measures"]]
        return json.loads(json.dumps(values, allow_nan=False))


KINDS = {list: "a list", dict: "a table", str: "text", int: "a whole number", bool: "true or false"}
TABLES: dict[str, type] = {
    "measures": Measures,
    "evaluate": Evaluate,
    "corruptions": Corruptions,
    "sampler": Sampler,
}


def identifier(levels: Mapping[str, Any]) -> str:
    """A file name for one combination, e.g. lr0.1-sam_rho0.05-seed0-1f0c9a2b: readable, and unique by its digest."""
    digest = hashlib.blake2b(json.dumps(levels, sort_keys=True).encode(), digest_size=4).hexdigest()
    parts = "-".join(
        f"{factor}{level:g}" if _is_number(level) else f"{factor}-{level}" for factor, level in levels.items()
    )
    return re.sub(r"[^A-Za-z0-9_.-]+", "_", parts)[:120] + f"-{digest}"


def load(path: Path | str) -> Config:
    """The study of a .toml, .yaml or .yml file.

    Raises:
        InputError: the file cannot be read, or has an option, measure, factor or value that does not exist.
    """
    path = Path(path)
    content = read_settings(path, yaml=path.suffix in (".yaml", ".yml"))
    try:
        return checked(content, default_name=path.stem)
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def checked(content: Mapping[str, Any], *, default_name: str = "study") -> Config:
    """A `Config` from plain tables, with what is not given at its default."""
    tables = ("name", "grid", "fixed", *TABLES)
    if wrong := [key for key in content if key not in tables]:
        raise unknown("table", wrong[0], tables)
    name = str(content.get("name", default_name))
    if not NAME.fullmatch(name):
        raise InputError(f"name {name!r}: letters, digits, '.', '_' and '-' only, at most 80")
    grid = content.get("grid") or {}
    if not isinstance(grid, Mapping) or not grid:
        raise InputError("[grid] is empty: give at least one factor, e.g. lr = [0.05, 0.1]")
    blocks, fixed = content.get("measures", [{}]), content.get("fixed") or {}
    if not isinstance(fixed, Mapping):
        raise InputError(f"[fixed] must be a table, got {fixed!r}")
    config = Config(
        name=name,
        factors={factor: _levels(factor, levels) for factor, levels in grid.items()},
        fixed={key: _option(key, value) for key, value in fixed.items()},
        measures=tuple(_table("measures", t) for t in (blocks if isinstance(blocks, list) else [blocks])),
        evaluate=_table("evaluate", content.get("evaluate") or {}),
        corruptions=_table("corruptions", content.get("corruptions") or {}),
        sampler=_table("sampler", content["sampler"]) if content.get("sampler") else None,
    )
    _check(config)
    return config


def _levels(factor: str, levels: Any) -> Any:
    if isinstance(levels, Mapping) and levels and set(levels) <= DISTRIBUTION and {"low", "high"} <= set(levels):
        _option(factor, None)
        numbers, log = [levels["low"], levels["high"], levels.get("step", 1)], levels.get("log", False)
        if not all(_is_number(n) and math.isfinite(n) for n in numbers) or not isinstance(log, bool):
            raise InputError(f"{factor} is a range of numbers {{low, high, step, log}}, got {levels}")
        if not numbers[0] < numbers[1] or numbers[2] <= 0:
            raise InputError(f"{factor} needs low < high and a step > 0, got {levels}")
        return Range(**levels)
    if isinstance(levels, Mapping) and levels and all(isinstance(v, Mapping) for v in levels.values()):
        if not NAME.fullmatch(factor):
            raise InputError(f"factor {factor!r}: letters, digits, '.', '_' and '-' only")
        return {level: {k: _option(k, v) for k, v in table.items()} for level, table in levels.items()}
    if isinstance(levels, (list, tuple)) and levels:
        values = [_option(factor, level) for level in levels]
        if len({json.dumps(v) for v in values}) < len(values):
            raise InputError(f"{factor} has a level twice: {values}; nothing runs twice")
        return values
    raise InputError(f"{factor} must be a list of values, a table of named levels or {{low, high}}, got {levels!r}")


def _option(key: str, value: Any) -> Any:
    names = [f.name for f in fields(Options) if f.name not in OURS]
    if key in OURS:
        raise InputError(f"{key!r} is given on the command line or made by the study: leave it out of the file")
    if key not in names:
        raise unknown("option of benchmarks.train", key, names)
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{key} must be finite, got {value}")
    if not isinstance(value, (str, int, float, bool, list, dict, type(None))):
        raise InputError(f"{key} must be a plain value, got {value!r}")
    return value


def _table(name: str, given: Any) -> Any:
    if not isinstance(given, Mapping):
        raise InputError(f"[{name}] must be a table, got {given!r}")
    keys = [f.name for f in fields(TABLES[name])]
    if wrong := [key for key in given if key not in keys]:
        raise unknown(f"setting of [{name}]", wrong[0], keys)
    table = TABLES[name](**given)
    for key, usual in vars(TABLES[name]()).items():  # None, and adaptive, may be several things
        if usual is not None and key != "adaptive" and type(getattr(table, key)) is not type(usual):
            raise InputError(f"{key} of [{name}] must be {KINDS[type(usual)]}, got {getattr(table, key)!r}")
    table.check()
    return table


def _check(config: Config) -> None:
    if len(set(config.columns)) < len(config.columns):
        raise InputError("two [[measures]] blocks have a measure of the same name: give each a label")
    if config.sampler and config.sampler.objective == "ood_error" and not config.corruptions.names:
        raise InputError('objective = "ood_error" of [sampler] needs [corruptions] with names, e.g. ["fog"]')
    if config.ranges and not config.sampler:
        raise InputError(f"{config.ranges[0]} is a range: a grid needs a list of values, or give a [sampler]")
    if config.total > MOST:
        raise InputError(f"the study has {config.total:,} models, more than {MOST:,}: shorten its lists, or its trials")
    for levels in config.samples:
        try:
            options = config.options(levels)
            if config.corruptions.names and options.data == "digits":
                raise InputError("[corruptions] are for color images, and digits are gray: leave that table out")
            if options.data in ("digits", *LAYOUT):  # others may have a folder for it, which `trial.check` looks for
                check_held_out(config, options.validation_fraction > 0)
        except InputError as error:
            raise InputError(f"{', '.join(f'{k} = {v}' for k, v in levels.items())}: {error}") from None


def check_held_out(config: Config, held_out: bool) -> None:
    """Raises InputError where the settings ask for held-out examples and there are none."""
    asking = [f'split = "{block.split}" of [[measures]]' for block in config.measures]
    asking += [f'objective = "{config.sampler.objective}" of [sampler]'] if config.sampler else []
    for setting in asking:
        if "validation" in setting and not held_out:
            raise InputError(f"{setting} needs held-out examples: give validation_fraction, e.g. 0.1, in [fixed]")


def _check_count(name: str, value: Any, meaning: str, *, least: int = 0) -> None:
    if not _is_whole(value) or value < least:
        raise InputError(f"{name} is a number, {meaning}, got {value!r}")


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)
