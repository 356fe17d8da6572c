"""Many checkpoints on one page: their measures with error bars, and whether these go with a target."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from typing import Any

from sam_optim.core.text import MISSING, cell, headline, shortened, signed
from sam_optim.report import page
from sam_optim.report.figures import Group, Interval, intervals, scatter, strip
from sam_optim.report.overview import sections
from sam_optim.report.page import Child, Markup, html_table, panels, paragraph, section
from sam_optim.statistics.kendall import Correlation
from sam_optim.statistics.table import Entry, Table

Column = tuple[str, str]  # (measure, target)

FEW = 30  # up to so many checkpoints each has its own row in a figure


def study_page(
    measured: Table,
    *,
    targets: Mapping[str, Mapping[str, float]] | None = None,
    correlations: Mapping[Column, Correlation] | None = None,
    results: Mapping[str, Mapping[str, Any]] | None = None,
    title: str = "Sharpness of checkpoints",
) -> Markup:
    """A page of a table of measures.

    Args:
        measured: of `table`.
        targets: name -> row -> number: what the measures are compared with.
        correlations: (column, name of a target) -> what `correlate` returned for them.
        results: results of other kinds by name, as their `to_dict()` gives them.

    Returns:
        HTML for `write_page`; entries, targets and correlations travel in it as JSON.
    """
    targets, correlations, results = targets or {}, correlations or {}, results or {}
    taus = {f"{column} / {name}": correlation.to_dict() for (column, name), correlation in correlations.items()}
    counted = f"{_many(len(measured.rows), 'checkpoint')}, {_many(len(measured.columns), 'measure')}."
    parts: list[Child] = [page.element("header", page.element("h1", title), paragraph(counted, kind="lead"))]
    if measured.rows:
        parts += [_values(measured), _figures(measured)]
    if measured.failures:
        reasons = [r if r.startswith(name) else f"{name}: {r}" for name, r in measured.failures.items()]
        parts.append(section("Checkpoints that failed", page.bullets(reasons)))
    if measured.rows and correlations:
        parts.append(_scatters(measured, correlations, targets))
    if results or taus:
        parts += sections(taus | dict(results))
    if measured.rows:
        parts.append(_settings(measured))
    data = {"entries": list(measured.cells.values()), "correlations": list(taus.values())}
    return page.html_page(title, *parts, data=data | {"targets": targets, "results": results})


def _values(measured: Table) -> Markup:
    rows: list[list[Child]] = [
        [row, *(_cell(measured.cells.get((row, c))) for c in measured.columns)] for row in measured.rows
    ]
    caption = "± is the standard error over batches or draws; of an eigenvalue it is a bound of the error."
    reasons = [
        f"{row}, {column}: {reason}"
        for (row, column), e in measured.cells.items()
        if (reason := e.get("error") or e["result"].get("reason"))
    ]
    values = html_table(["checkpoint", *measured.columns], rows, caption)
    return section("Measures", values, page.bullets(reasons) if reasons else None)


def _figures(measured: Table) -> Markup:
    drawn = []
    for column in measured.columns:
        numbers = [(row, *headline(measured.result(row, column))) for row in measured.rows]
        finite = [(row, value, error or 0.0) for row, value, error in numbers if value is not None]
        if not finite:
            continue
        lowest = min(value - error for _, value, error in finite)
        log = lowest > 0 and max(value for _, value, _ in finite) > 20 * lowest
        x_label = column + (" (logarithmic)" if log else "")
        if len(finite) <= FEW:
            lines = [Interval(shortened(row), value, value - error, value + error) for row, value, error in finite]
            drawn.append(intervals(column, lines, x_label=x_label, log=log))
        else:
            group = Group(_many(len(finite), "checkpoint"), [v for _, v, _ in finite])
            drawn.append(strip(column, [group], x_label=x_label, log=log))
    caption = "Each mark is one checkpoint, the line one error to both sides."
    return section("The same in pictures", page.figure(panels(*drawn), caption))


def _scatters(
    measured: Table, correlations: Mapping[Column, Correlation], targets: Mapping[str, Mapping[str, float]]
) -> Markup:
    drawn = []
    for (column, name), c in correlations.items():
        pairs = [(run[column], targets.get(name, {}).get(run["checkpoint"])) for run in measured.numbers()]
        finite = [(x, y) for x, y in pairs if x is not None and y is not None]
        if math.isfinite(c.tau):
            group = Group("checkpoints", [x for x, _ in finite])
            note = f"τ = {signed(c.tau)} ({signed(c.low)} to {signed(c.high)}), n = {c.n}"
            drawn.append(scatter(column, [(group, [y for _, y in finite])], x_label=column, y_label=name, note=note))
    caption = "Each mark is one checkpoint, with Kendall's tau and its interval."
    return section("Measures and targets", page.figure(panels(*drawn), caption))


def _settings(measured: Table) -> Markup:
    def words(settings: Mapping[str, Any]) -> str:
        used = {key: value for key, value in settings.items() if value not in (None, {})}
        return ", ".join(f"{k}={v if isinstance(v, str) else json.dumps(v)}" for k, v in used.items())

    items = [(name, words(measured.settings[name])) for name in (*measured.columns, *measured.rows)]
    items += [("data", text) for text in sorted({json.dumps(e.get("data", {})) for e in measured.cells.values()})]
    results = [e["result"] for e in measured.cells.values() if "result" in e]
    items += [("versions", text) for text in sorted({words(r.get("provenance", {})) for r in results})]
    intro = "The settings of each measure, the SHA-256 and the model of each checkpoint, the data, the versions."
    return section("What the numbers depend on", paragraph(intro), page.definitions(items, kind="pairs"))


def _cell(entry: Entry | None) -> str:
    if entry is None:
        return MISSING
    return cell(entry["result"]) if "result" in entry else "failed"


def _many(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")
