"""Turns a study, or a table from elsewhere, into report.html, results.json and models.csv."""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from benchmarks.study import storage as stores
from benchmarks.study.analysis import Table, analyse
from benchmarks.study.config import TARGETS, Config, identifier
from benchmarks.study.page import maps, page
from sam_optim.core.errors import InputError, one_line, show, unknown
from sam_optim.core.files import PATIENCE, locked, read_bytes, read_json_object, write_atomic, write_json
from sam_optim.core.text import csv_text
from sam_optim.report import write_page
from sam_optim.report.canvas import Figure, rendered

EXTRA_TARGETS = ("test_loss", "loss_gap", "train_error", "validation_error")


def from_study(
    config: Config,
    url: str,
    measures: Sequence[str] | None = None,
    targets: Sequence[str] | None = None,
    *,
    given: str | None = None,
) -> Table:
    """The finished models of a study; those that diverged are listed, and have no numbers."""
    from benchmarks.study.queue import Queue

    if not config.columns:
        raise InputError(
            f"study {config.name!r} measures nothing, so there is nothing to report; use `compare CONFIG --by FACTOR`, "
            "or add [[measures]] to a study of another name"
        )
    queue = Queue(config, url)
    all_records = queue.records()
    records = [record for record in all_records if not record["failed"]]
    if not records:
        raise InputError(f"study {config.name!r} in {stores.shown(url)} has no finished model yet")
    all_targets = [t for t in TARGETS if any(t in record["targets"] for record in records)]
    rows = [flat(record, list(config.factors)) for record in records]
    varied = _varied(rows, list(config.factors))
    missing = {m: sum(record["measures"].get(m) is None for record in records) for m in config.columns}
    tally, first = queue.tally(), records[0]
    return Table(
        title=config.name,
        rows=rows,
        measures=_chosen("measure", measures, config.columns),
        targets=_chosen("target", targets, all_targets, also=EXTRA_TARGETS),
        factors=varied,
        given=_given(given, varied),
        about={
            "config": config.to_dict(),
            "tally": str(tally),
            "complete": tally.left == 0,
            "data": first.get("run", {}).get("data", {}),
            "num_parameters": first.get("run", {}).get("num_parameters"),
            "provenance": first.get("provenance", {}),
            "commits": sorted({str(r.get("commit")) for r in records}),
            "seconds": math.fsum(r.get("seconds") or 0.0 for r in all_records),
            "unconverged": {m: count for m, count in missing.items() if count},
        },
        failed=[{"levels": r["levels"], "reason": r["failed"]} for r in all_records if r["failed"]],
    )


def flat(record: Mapping[str, Any], factors: Sequence[str]) -> dict[str, Any]:
    """One row: factor levels, targets and measures beside each other, and the folder of the run, by which
    `sam-optim report --targets models.csv` finds the model."""
    levels = {f: v if isinstance(v, (int, float, str)) else json.dumps(v) for f, v in record["levels"].items()}
    numbers = {f: levels[f] for f in factors} | dict(record["targets"]) | dict(record["measures"])
    return numbers | {"checkpoint": record.get("checkpoint") or identifier(record["levels"])}


def from_csv(
    path: Path,
    measures: Sequence[str] | None,
    targets: Sequence[str] | None,
    factors: Sequence[str] = (),
    *,
    given: str | None = None,
) -> Table:
    """A table with a heading and one row for each model. An empty cell, or one that is no number, is a missing value.

    Raises:
        InputError: the file cannot be read, has no such column, or no measures and targets are named.
    """
    if not (measures and targets):
        raise InputError("name the columns of the table: --measures a,b --targets c [--factors lr,seed]")
    try:
        text = read_bytes(path).decode("utf-8-sig")
        first = text.split("\n", 1)[0]
        separator = "," if "," in first else next((c for c in "\t;" if c in first), ",")
        reader = csv.DictReader(io.StringIO(text), delimiter=separator)
        head, lines = [h for h in reader.fieldnames or [] if h is not None], list(reader)
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f"--csv {path} cannot be read: {one_line(error)}") from None
    if len(set(head)) < len(head):
        raise InputError(f"{path} has a column twice: {', '.join(sorted({h for h in head if head.count(h) > 1}))}")
    for column in (*measures, *targets, *factors, *(given.split(",") if given else [])):
        if column not in head:
            raise unknown("column", column, head)
    numeric = (*measures, *targets)
    rows = [
        {c: number(row.get(c)) if c in numeric else level(row.get(c)) for c in dict.fromkeys((*factors, *numeric))}
        for row in lines
    ]
    if not rows:
        raise InputError(f"{path} has a header and no rows")
    for column in numeric:
        words = [value for line in lines if isinstance(value := level(line.get(column)), str)]
        if words and all(row[column] is None for row in rows):
            raise InputError(f"column {column!r} of {path} has no number, only text like {words[0]!r}: choose another")
    varied = _varied(rows, factors)
    return Table(path.stem, rows, list(measures), list(targets), varied, _given(given, varied), {"source": path.name})


def from_results(
    path: Path, measures: Sequence[str] | None, targets: Sequence[str] | None, *, given: str | None = None
) -> Table:
    """The table of an earlier report, from its results.json."""
    earlier = read_json_object(path)
    if missing := {"models", "about", "comparisons"} - earlier.keys():
        raise InputError(f"{path} is not a results.json of a study's report: it has no {min(missing)!r}")
    models, about, compared = (earlier[key] for key in ("models", "about", "comparisons"))
    columns = [list(dict.fromkeys(row[key] for row in compared)) for key in ("measure", "target")]
    factors = list(about.get("config", {}).get("grid", compared[0].get("by_factor", {})))
    varied = _varied(models, factors)
    chosen = _chosen("measure", measures, columns[0]), _chosen("target", targets, columns[1], also=EXTRA_TARGETS)
    return Table(path.parent.name, models, *chosen, varied, _given(given, varied), about, earlier.get("failed", []))


def where(table: Table, text: str) -> Table:
    """The models that "COLUMN<NUMBER" is true of."""
    column, _, limit = text.partition("<")
    if column not in table.rows[0] or number(limit) is None:
        raise InputError(f"--where is COLUMN<NUMBER, e.g. train_error<21, got {text!r}")
    rows = [row for row in table.rows if (value := row[column]) is not None and float(value) < float(limit)]
    return replace(table, rows=rows, about=dict(table.about) | {"where": text})


def write(table: Table, out: Path, *, num_resamples: int = 2000, seed: int = 0) -> int:
    """report.html, correlations.png, results.json (all that the page says) and models.csv (what it says it from)."""
    results = analyse(table, num_resamples=num_resamples, seed=seed)
    rows = [dict(row) for row in table.rows]
    head = list(dict.fromkeys(key for row in rows for key in row))
    content, picture = page(table, results), _side_by_side(maps(table, results))
    with locked(out / "results.json", patience=PATIENCE):  # the four are of one call
        write_json(out / "results.json", results | {"about": table.about, "failed": list(table.failed), "models": rows})
        write_atomic(out / "models.csv", csv_text(head, [[row.get(key) for key in head] for row in rows]).encode())
        write_atomic(out / "correlations.png", picture)
        path = write_page(out / "report.html", content)
    show(results["headline"])
    for line in results["conclusions"]:
        show(f"  {line}")
    print(f"{len(rows)} models. Open {path.resolve().as_uri()}")
    return 0


def _side_by_side(figures: Sequence[Figure]) -> bytes:
    """A PNG."""
    from PIL import Image

    images = [Image.open(io.BytesIO(rendered(figure, "png", dpi=150))) for figure in figures]
    whole = Image.new("RGB", (sum(i.width for i in images), max(i.height for i in images)), "white")
    for k, image in enumerate(images):
        whole.paste(image, (sum(i.width for i in images[:k]), 0))
    whole.save(buffer := io.BytesIO(), format="png", optimize=True)
    return buffer.getvalue()


def number(text: str | None) -> float | None:
    """None for what is no finite number."""
    try:
        value = float(text or "")
    except ValueError:
        return None
    return value if math.isfinite(value) else None


def level(text: str | None) -> float | str | None:
    """A number where it is one, so that 0.1 and 1e-1 are one level, else the text; None for an empty cell."""
    if text is None or not text.strip():
        return None
    try:
        return float(text)
    except ValueError:
        return text.strip()


def _varied(rows: Sequence[Mapping[str, Any]], factors: Sequence[str]) -> list[str]:
    return [f for f in factors if len({repr(row[f]) for row in rows}) > 1]


def _given(given: str | None, varied: Sequence[str]) -> str | None:
    for factor in given.split(",") if given is not None else ():
        if factor not in varied:
            raise InputError(f"--given {factor}: not a factor that varies; those are {', '.join(varied) or 'none'}")
    if given is not None:
        return given
    return "lr" if "lr" in varied else (varied[0] if varied else None)


def _chosen(kind: str, names: Sequence[str] | None, columns: Sequence[str], also: Sequence[str] = ()) -> list[str]:
    for name in names or []:
        if name not in (*columns, *also):
            raise unknown(kind, name, (*columns, *also))
    return list(names or columns)
