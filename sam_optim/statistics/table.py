"""Measures of many checkpoints as a table of numbers: what `correlate` takes, and what a page shows."""

from __future__ import annotations

import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sam_optim.core.text import headline
from sam_optim.statistics.kendall import Correlation, correlate

Entry = Mapping[str, Any]

# describes the checkpoint, not how it was measured
OF_CHECKPOINT = {"model", "model_kwargs", "num_classes", "small_stem", "ema", "target", "source", "num_parameters"}


@dataclass(frozen=True)
class Table:
    """A number for each checkpoint and each way of measuring.

    rows: names of checkpoints. columns: of measures. cells: (row, column) -> entry. settings: row or column -> all that
    its numbers depend on. failures: of each checkpoint that could not be measured, the reason.
    """

    rows: list[str]
    columns: list[str]
    cells: Mapping[tuple[str, str], Entry]
    settings: Mapping[str, Mapping[str, Any]]
    failures: Mapping[str, str]

    def numbers(self) -> list[dict[str, Any]]:
        """One mapping for each checkpoint, with its value under the name of each column, as `correlate` takes it."""
        return [{"checkpoint": row} | {c: headline(self.result(row, c))[0] for c in self.columns} for row in self.rows]

    def result(self, row: str, column: str) -> Mapping[str, Any]:
        """What was measured; {} for a measure that failed or is missing."""
        return self.cells.get((row, column), {}).get("result") or {}

    def correlations(
        self, targets: Mapping[str, Mapping[str, float]], factors: Mapping[str, Mapping[str, Any]] | None = None
    ) -> dict[tuple[str, str], Correlation]:
        """(column, target) -> `correlate` over the checkpoints.

        Args:
            targets: name -> row -> number. factors: name -> row -> what was varied between the checkpoints.
        """
        factors = factors or {}
        runs = [
            run
            | {f"target {name}": values.get(run["checkpoint"]) for name, values in targets.items()}
            | {f"factor {name}": values.get(run["checkpoint"]) for name, values in factors.items()}
            for run in self.numbers()
        ]
        varied = [f"factor {name}" for name in factors]
        return {(c, t): correlate(runs, c, f"target {t}", factors=varied) for c in self.columns for t in targets}


def table(entries: Iterable[Entry]) -> Table:
    """Entries of `sam-optim measure`. A checkpoint measured in two ways has two columns, and a file whose content
    has changed has two rows; their names say how they differ."""
    entries = list(entries)
    measured = [e for e in entries if e.get("identity")]
    rows = _names([(e["checkpoint"], _of_checkpoint(e)) for e in measured])
    columns = _names([(e["column"], _of_column(e)) for e in measured])
    cells: dict[tuple[str, str], Entry] = {}
    settings: dict[str, Mapping[str, Any]] = {}
    for e in measured:
        row, column = (rows[e["checkpoint"], _key(_of_checkpoint(e))], columns[e["column"], _key(_of_column(e))])
        cells[row, column] = e
        settings |= {row: _flat(_of_checkpoint(e)), column: _flat(_of_column(e))}
    failures = {e["checkpoint"]: str(e["error"]) for e in entries if not e.get("identity") and e.get("error")}
    return Table(list(dict.fromkeys(rows.values())), list(dict.fromkeys(columns.values())), cells, settings, failures)


def _of_checkpoint(entry: Entry) -> dict[str, Any]:
    identity = entry["identity"]
    loss = {k: v for k, v in identity.get("loss", {}).items() if k in OF_CHECKPOINT}
    return {"checkpoint": identity.get("checkpoint")} | loss


def _of_column(entry: Entry) -> dict[str, Any]:
    identity = entry["identity"]
    loss = {k: v for k, v in identity.get("loss", {}).items() if k not in OF_CHECKPOINT}
    return {k: v for k, v in identity.items() if k not in ("checkpoint", "loss")} | {"loss": loss}


def _names(named: Sequence[tuple[str, dict[str, Any]]]) -> dict[tuple[str, str], str]:
    """(name, key) -> a unique name, which says how two columns of one name differ."""
    variants: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for name, about in named:
        variants[name].setdefault(_key(about), about)
    names = {}
    for name, of_name in variants.items():
        flat = {key: _flat(about) for key, about in of_name.items()}
        keys = {k for about in flat.values() for k in about}
        differs = sorted(k for k in keys if len({_word(about.get(k)) for about in flat.values()}) > 1)
        for key, about in flat.items():
            # eta does nothing in a ball with adaptive=false
            has = [k for k in differs if about.get(k) is not None or not k.startswith("ball.")] or differs
            said = ", ".join(f"{k.removeprefix('ball.')}={_word(about.get(k))}" for k in has)
            names[name, key] = f"{name} [{said}]" if said else name
    return names


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dots in its keys."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    inner = [
        _flat(v, f"{prefix}.{k}" if prefix and prefix not in ("loss", "options") else str(k)) for k, v in value.items()
    ]
    return {k: v for part in inner for k, v in part.items()}


def _key(about: Mapping[str, Any]) -> str:
    return json.dumps(about, sort_keys=True)


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)
