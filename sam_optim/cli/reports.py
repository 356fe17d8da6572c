"""`sam-optim report`: results in files -> one page."""

from __future__ import annotations

import argparse
import csv
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sam_optim.core.errors import InputError, unknown
from sam_optim.core.files import read_json
from sam_optim.report.page import write_page
from sam_optim.report.study import study_page
from sam_optim.statistics.table import Table, table
from sam_optim.sweep import store

Rows = list[dict[str, str]]


def report(args: argparse.Namespace) -> int:
    if args.out.suffix not in (".html", ".htm"):
        raise InputError(f"--out is a page and must end in .html, got {args.out}; a browser prints it to .pdf")
    entries: list[dict[str, Any]] = []
    others: dict[str, Mapping[str, Any]] = {}
    extra: Rows = []
    for path in args.results:
        if path.suffix == ".csv":
            found, columns = _measured_csv(path)
            entries += found
            extra += columns
            continue
        content = read_json(path)
        if isinstance(content, dict) and content.get("format") == store.FORMAT:
            entries += store.read(path)
        elif isinstance(content, dict) and content.get("type") in ("Estimate", "Spectrum", "Landscape", "Correlation"):
            others[path.stem if path.stem not in others else str(path)] = content
        else:
            raise InputError(f"{path} holds no results of this package; give files of `sam-optim measure` or landscape")
    made = table(entries)
    extra += _read_csv(args.targets) if args.targets else []
    factors = [name.strip() for name in args.factors.split(",") if name.strip()]
    targets = _targets(made, extra, args.target, factors)
    varied = {name: {row: line[name] for row, line in _matched(made, extra, name)} for name in factors}
    for name in factors:
        if not varied[name]:
            raise InputError(f"--factors {name} is no column of --targets for any checkpoint")
    correlations = made.correlations(targets, varied)
    page = study_page(made, targets=targets, correlations=correlations, results=others, title=args.title)
    print(write_page(args.out, page))
    return 0


def _targets(made: Table, extra: Rows, wanted: str | None, factors: Sequence[str]) -> dict[str, dict[str, float]]:
    """Columns of numbers by checkpoint: the one that is asked for, or all."""
    names = list(dict.fromkeys(name for line in extra for name in line if name and name != "checkpoint"))
    if wanted is not None:
        if wanted not in names:
            raise unknown("target", wanted, names) if names else InputError(f"--target {wanted}: give --targets FILE")
        names = [wanted]
    found = {}
    for name in names:
        pairs = [(row, _number(line[name])) for row, line in _matched(made, extra, name)]
        values = {row: value for row, value in pairs if value is not None}
        if values and (wanted or name not in factors):
            found[name] = values
        elif wanted:
            raise InputError(f"--target {wanted} has no number for any of the checkpoints; compare their names")
    if names and not found and made.rows:
        seen = [line.get("checkpoint", "") for line in extra[:2]]
        raise InputError(f"no checkpoint of the results is among the targets ({seen} against {made.rows[:2]})")
    return found


def _matched(made: Table, extra: Rows, name: str) -> list[tuple[str, dict[str, str]]]:
    """(row, line of a .csv) by name: the path as it was given, else the end of the path, where only one row has it."""
    found = []
    names = {row: _path_of(made, row) for row in made.rows}
    for line in extra:
        given = line.get("checkpoint", "")
        if not line.get(name):
            continue
        rows = [row for row in made.rows if given in (row, names[row])]
        ends = [row for row in made.rows if Path(names[row]).name == given or Path(names[row]).stem == given]
        rows = rows or (ends if len({names[row] for row in ends}) == 1 else [])
        found += [(row, line) for row in rows]
    return found


def _path_of(made: Table, row: str) -> str:
    return next((str(e["checkpoint"]) for (r, _), e in made.cells.items() if r == row), row)


def _measured_csv(path: Path) -> tuple[list[dict[str, Any]], Rows]:
    """Entries of a file of `measure --csv`: pairs of columns X and "X error". Other columns are targets and factors."""
    lines = _read_csv(path)
    columns = list(lines[0]) if lines else []
    measures = [name for name in columns if f"{name} error" in columns]
    entries = []
    for line in lines:
        for name in measures:
            result = {"type": "Estimate", "value": _number(line[name]), "stderr": _number(line[f"{name} error"])}
            identity = {"checkpoint": None, "file": path.name}
            entries.append(
                {"checkpoint": line["checkpoint"], "column": name, "key": name, "identity": identity, "result": result}
            )
    if not measures:
        raise InputError(f"{path} has no measures (columns X and 'X error'); numbers to compare with go to --targets")
    left = set(columns) - set(measures) - {f"{name} error" for name in measures}
    return entries, [{k: v for k, v in line.items() if k in left} for line in lines]


def _read_csv(path: Path) -> Rows:
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            found = [{k: v or "" for k, v in line.items() if k is not None} for line in csv.DictReader(file)]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a .csv in UTF-8: {error}") from None
    if not found or "checkpoint" not in found[0]:
        raise InputError(f"{path} needs a header with a column named checkpoint, and a line for each")
    return found


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
