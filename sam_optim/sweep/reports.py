"""Files of results, and what the checkpoints are compared with -> one page."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from sam_optim.core.errors import InputError, one_line, unknown
from sam_optim.core.files import read_bytes, read_json, reserved
from sam_optim.report.page import Markup, write_page
from sam_optim.report.study import study_page
from sam_optim.statistics.table import Table, table
from sam_optim.sweep import store
from sam_optim.sweep.quality import QUALITY

Lines = list[dict[str, str]]
MOST_COLUMNS = 200  # of measures, and of targets: a page of more takes longer than anybody waits
TYPES = ("Estimate", "Spectrum", "Landscape", "Correlation")


def write_report(
    results: Sequence[Path],
    out: Path,
    *,
    targets: Path | None = None,
    target: str | None = None,
    factors: Sequence[str] = (),
    title: str = "Sharpness of checkpoints",
) -> Path:
    """One self-contained page of results.

    Args:
        results: .json of `measure_checkpoints` or of any result, .csv of `measure_checkpoints`.
        targets: .csv with a column "checkpoint" and one or more columns of numbers.
        target: the column that sharpness is compared with; None: every one.
        factors: columns of what was varied between runs.

    Raises:
        InputError: a file of something else, or a column that is not there.
    """
    if out.suffix not in (".html", ".htm"):
        raise InputError(f"--out is a page and must end in .html, got {out}; a browser prints it to .pdf")
    with reserved(out):
        return write_page(out, _page(results, targets, target, factors, title))


def _page(
    results: Sequence[Path], targets: Path | None, target: str | None, factors: Sequence[str], title: str
) -> Markup:
    entries, singles, lines = _read(results)
    measured = table(entries)
    if len(measured.columns) > MOST_COLUMNS:
        num = f"{len(measured.columns):,} columns of measures, more than {MOST_COLUMNS}"
        raise InputError(f"the results have {num}; give fewer files, or files of fewer measures")
    lines += _read_csv(targets) if targets else []
    varied = {name: {row: line[name] for row, line in _matched(measured, lines, name)} for name in factors}
    compared = _targets(measured, lines, target, factors)
    for name in factors:
        if not varied[name]:
            raise InputError(f"--factors {name} is no column of --targets for any checkpoint")
    correlations = measured.correlations(compared, varied)
    try:
        return study_page(measured, targets=compared, correlations=correlations, results=singles, title=title)
    except InputError:
        raise
    except (TypeError, ValueError, KeyError, AttributeError, IndexError, RuntimeError, RecursionError) as error:
        raise InputError(f"the results cannot be shown ({one_line(error)}); a file was changed or damaged") from None


def _read(results: Sequence[Path]) -> tuple[list[dict[str, Any]], dict[str, Mapping[str, Any]], Lines]:
    """Entries of measures, single results by name, and the other columns of .csv files."""
    entries: list[dict[str, Any]] = []
    singles: dict[str, Mapping[str, Any]] = {}
    lines: Lines = []
    for path in results:
        if path.suffix == ".csv":
            measured, rest = _measured_csv(path)
            entries += measured
            lines += rest
            continue
        content = read_json(path)
        if isinstance(content, dict) and content.get("format") == store.FORMAT:
            entries += store.read(path)
        elif isinstance(content, dict) and content.get("type") in TYPES:
            store.check_result(path, content)
            singles[path.stem if path.stem not in singles else str(path)] = content
        else:
            raise InputError(
                f"{path} holds no results of this package; give files of `sam-optim measure` or `sam-optim landscape`"
            )
    return entries, singles, lines


def _targets(measured: Table, lines: Lines, wanted: str | None, factors: Sequence[str]) -> dict[str, dict[str, float]]:
    """Columns of numbers by checkpoint: the requested one, or all."""
    names = list(dict.fromkeys(name for line in lines for name in line if name and name != "checkpoint"))
    if wanted is not None:
        if wanted not in names:
            raise unknown("target", wanted, names) if names else InputError(f"--target {wanted}: give --targets FILE")
        names = [wanted]
    elif len(names) > MOST_COLUMNS:
        raise InputError(f"--targets has {len(names):,} columns, more than {MOST_COLUMNS}; choose one with --target")
    columns = {}
    for name in names:
        pairs = [(row, _number(line[name])) for row, line in _matched(measured, lines, name)]
        values = {row: value for row, value in pairs if value is not None}
        if values and (wanted or name not in factors):
            columns[name] = values
        elif wanted:
            raise InputError(f"--target {wanted} has no number for any of the checkpoints; compare their names")
    if names and not columns and measured.rows:
        examples = [line.get("checkpoint", "") for line in lines[:2]]
        raise InputError(f"no checkpoint of the results is among the targets ({examples} against {measured.rows[:2]})")
    return columns


def _matched(measured: Table, lines: Lines, name: str) -> list[tuple[str, dict[str, str]]]:
    """(row, line of a .csv) by checkpoint: the path as it was given, else the end of the path, if only one has it."""
    matches = []
    paths = {row: _path_of(measured, row) for row in measured.rows}
    for line in lines:
        given = line.get("checkpoint", "")
        if not line.get(name):
            continue
        rows = [row for row in measured.rows if given in (row, paths[row])]
        ends = [row for row in measured.rows if given in (Path(paths[row]).name, Path(paths[row]).stem)]
        rows = rows or (ends if len({paths[row] for row in ends}) == 1 else [])
        matches += [(row, line) for row in rows]
    return matches


def _path_of(measured: Table, row: str) -> str:
    return next((str(e["checkpoint"]) for (r, _), e in measured.cells.items() if r == row), row)


def _measured_csv(path: Path) -> tuple[list[dict[str, Any]], Lines]:
    """The entries of a .csv of measures, from pairs of columns X and "X error"; and its other columns."""
    lines = _read_csv(path)
    columns = list(lines[0])
    measures = [name for name in columns if f"{name} error" in columns]
    if not measures:
        raise InputError(f"{path} has no measures (columns X and 'X error'); numbers to compare with go to --targets")
    entries = []
    for line in lines:
        for name in measures:
            result = {"type": "Estimate", "value": _number(line[name]), "stderr": _number(line[f"{name} error"])}
            identity = {"checkpoint": None, "file": path.name}
            entry = {"checkpoint": line["checkpoint"], "column": name, "key": name}
            entries.append(entry | {"identity": identity, "result": result})
    rest = set(columns) - set(measures) - set(QUALITY) - {f"{name} error" for name in measures}
    return entries, [{k: v for k, v in line.items() if k in rest} for line in lines]


def _read_csv(path: Path) -> Lines:
    try:
        reader = csv.DictReader(io.StringIO(read_bytes(path).decode("utf-8-sig"), newline=""))
        lines = [{k: _unquoted(v or "") for k, v in line.items() if k is not None} for line in reader]
    except (UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"{path} is not a .csv in UTF-8: {error}") from None
    if not lines or "checkpoint" not in lines[0]:
        raise InputError(f"{path} needs a header with a column named checkpoint, and a line for each")
    return lines


def _unquoted(text: str) -> str:
    """Removes the apostrophe that keeps spreadsheets from running text that begins like a formula."""
    return text[1:] if text[:1] == "'" and text[1:].lstrip()[:1] in tuple("=+-@") else text


def _number(text: str) -> float | None:
    try:
        value = float(text)
    except ValueError:
        return None
    return value if math.isfinite(value) else None
