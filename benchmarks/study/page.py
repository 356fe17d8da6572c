"""The page of a study: what came out in words, all correlations, the models behind them, and how it was done.

Its words are in page.html.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from benchmarks.study.analysis import Row, Table, capitalized, directions, labelled, listed, name, table_size
from sam_optim.core.text import MISSING, number, signed
from sam_optim.report.canvas import Figure
from sam_optim.report.figures import Group, Interval, heat_map, intervals, legend, scatter
from sam_optim.report.page import Child, Markup, drawing, html_page, html_table, panels, render

LEVELS = 6  # colours of a factor; with more values than that, neighbors share one
SHORT = {"gap": "gap", "ood_error": "corrupted error"}
OVERALL, FIXED = ("tau", "low", "high"), ("within", "within_low", "within_high")


def page(table: Table, results: Row) -> Markup:
    signs = [directions(row, results["level"]) for row in results["comparisons"] if row["tau"] is not None]
    fixed = [sign for _, sign in signs if sign is not None]
    colours, style_of = _levels(table)
    body = render(
        Path(__file__).with_name("page.html").read_text(encoding="utf-8"),
        table=table,
        results=results,
        dumps=json.dumps,
        factors=listed([name(f) for f in table.factors]) if table.factors else "",
        given=name(table.given) if table.given else "",
        clear=f"{sum(overall != 0 for overall, _ in signs)} of {len(signs)}",
        clear_fixed=f"{sum(sign != 0 for sign in fixed)} of {len(fixed)}",
        percent=f"{100 * results['level']:g}",
        size=table_size(results["comparisons"]),
        maps=panels(*maps(table, results)),
        comparisons=_comparisons(table, results),
        scatters={capitalized(name(t)): _scatters(table, results, t, colours, style_of) for t in table.targets},
        models=_models(table),
        failed=[f"{', '.join(f'{k} {v}' for k, v in f['levels'].items())}: {f['reason']}" for f in table.failed],
        **(_given(table, results) | {"colours": drawing(legend(colours, ordered=True))} if table.given else {}),
    )
    data = dict(results) | {"models": [dict(row) for row in table.rows]}
    return html_page(f"{table.title}: does flatness go with generalization?", body, data=data, sortable=True)


def maps(table: Table, results: Row) -> list[Figure]:
    """Kendall's tau of all measures and targets: over all models, and with the given factors fixed."""
    columns = [SHORT.get(target, name(target)) for target in table.targets]
    figures = []
    for title, keys, index in (("All models", OVERALL, 0), (f"Models with the same {name(table.given)}", FIXED, 1)):
        if index and not table.given:
            continue
        rows = [[_row(results, measure, target) for target in table.targets] for measure in table.measures]
        values = [[_numbers(row, keys)[0] for row in line] for line in rows]
        firm = [[bool(directions(row, results["level"])[index]) for row in line] for line in rows]
        figures.append(heat_map(title, table.measures, columns, values, firm=firm))
    return figures


def _given(table: Table, results: Row) -> dict[str, Child]:
    """What the page says about the factor that is held fixed."""
    given, first, goal = name(table.given), name(table.held[0]), table.targets[0]
    plots = []
    for target in table.targets:
        lines = []
        for measure in table.measures:
            row = _row(results, measure, target)
            lines += [Interval(measure, *_numbers(row, OVERALL), 3), Interval("", *_numbers(row, FIXED), 0)]
        plots.append(intervals(capitalized(name(target)), lines, x_label="tau", span=(-1.0, 1.0)))
    follows = {row["measure"]: row["tau"] for row in results["follows"]}
    rows = []
    for measure in table.measures:
        row = _row(results, measure, goal)
        taus, p = (row["groups"][key] for key in ("taus", "heterogeneity_p"))
        each = ", ".join(f"{signed(t['tau'])} ({value})" for value, t in taus.items())
        rows.append([measure, signed(follows[measure]), signed(row["tau"]), each, _p(p)])
    head = ["measure", f"tau with {first}", f"with {name(goal)}", f"at each {first}", "p"]
    caption = (
        f"Does a measure say more than the {first}, and is tau the same at each? p: of the hypothesis that it is, by "
        "Cochran's Q, not corrected."
    )
    return {
        "coloured": first,
        "key": drawing(legend([("all models", 3), (f"same {given}", 0)])),
        "intervals": panels(*plots),
        "groups": html_table(head, rows, caption),
    }


def _comparisons(table: Table, results: Row) -> Markup:
    given = name(table.given) if table.given else None
    head = ["measure", "target", "in words", "n", "tau, interval", "p", "uncorrected", "granulated tau"]
    if given:
        head += [f"tau at fixed {given}, interval", "p at fixed", "uncorrected", "partial tau, interval"]
    rows = []
    for row in results["comparisons"]:
        cells: list[Child] = [row["measure"], name(row["target"]), row["verdict"], row["n"]]
        cells += [_tau(row, OVERALL), _p(row.get("p_adjusted")), _p(row.get("p")), signed(row.get("granulated"))]
        if given:
            fixed, partial = row["fixed"], ("partial", "partial_low", "partial_high")
            cells += [_tau(row, FIXED), _p(fixed.get("within_p_adjusted")), _p(fixed.get("within_p"))]
            cells.append(_tau(row, partial))
        rows.append(cells)
    caption = (
        f"Kendall's tau-b; intervals of {100 * results['level']:g} % from {results['num_resamples']:,} bootstrap "
        f"samples; p-values corrected by Holm's method over all {results['num_tests']} tests, which keeps the chance "
        "of even one false finding on this page below 5 %. Granulated: the mean, over the factors, of tau among models "
        "that differ in one factor only."
    )
    if given:
        caption += f" Partial: Kendall's partial tau given the {given}."
    return html_table(head, rows, caption, sortable=True)


def _scatters(
    table: Table, results: Row, target: str, names: Sequence[tuple[str, int]], style_of: Callable[[Row], int]
) -> Markup:
    plots = []
    for measure in table.measures:
        groups = []
        for label, style in names:
            rows = [row for row in table.rows if style_of(row) == style]
            xs, ys = ([_float(row.get(column)) for row in rows] for column in (measure, target))
            groups.append((Group(label, xs, style), ys))
        xs = [x for group, _ in groups for x in group.values if math.isfinite(x)]
        log = bool(xs) and min(xs) > 0 and max(xs) > 10 * min(xs)
        row = _row(results, measure, target)
        axes: dict[str, Any] = {"x_label": f"{measure} (logarithmic)" if log else measure, "y_label": labelled(target)}
        note = f"tau {signed(row['tau'])}, n = {row['n']}"
        plots.append(scatter(measure, groups, **axes, note=note, log=log, ordered=True))
    return panels(*plots)


def _models(table: Table) -> Markup:
    columns = [*table.factors, *table.targets, *table.measures]
    rows: list[list[Child]] = [
        [i, *(_cell(row.get(column), column in table.factors) for column in columns)]
        for i, row in enumerate(table.rows, start=1)
    ]
    return html_table(["", *map(labelled, columns)], rows, f"{len(rows)} models.", sortable=True)


def _cell(value: Any, is_factor: bool) -> str:
    if isinstance(value, str):
        return value
    if is_factor:
        return MISSING if value is None else f"{value:g}"
    return number(value, 4)


def _levels(table: Table) -> tuple[list[tuple[str, int]], Callable[[Row], int]]:
    """Names and numbers of the colours, and for a row the number of its colour."""
    if not table.given:
        return [("models", 0)], lambda row: 0
    factor = table.held[0]
    values = {row.get(factor) for row in table.rows if row.get(factor) is not None}
    ordered = sorted(values, key=lambda v: (isinstance(v, str), v))
    size = math.ceil(len(ordered) / LEVELS)
    bins = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    step = (LEVELS - 1) / max(len(bins) - 1, 1)  # few levels: colours that are far apart
    names = []
    for i, values_ in enumerate(bins):
        ends = [f"{v:g}" if isinstance(v, (int, float)) else v for v in dict.fromkeys((values_[0], values_[-1]))]
        names.append((" to ".join(ends), round(i * step)))
    styles = {v: style for (_, style), values_ in zip(names, bins, strict=True) for v in values_}
    return names, lambda row: styles.get(row.get(factor), -1)


def _row(results: Row, measure: str, target: str) -> Row:
    return next(row for row in results["comparisons"] if row["measure"] == measure and row["target"] == target)


def _numbers(row: Row, keys: Sequence[str]) -> list[float]:
    """A value and its interval; those with the factor held fixed stand in a mapping of their own."""
    numbers = row if keys is OVERALL else row.get("fixed") or {}
    return [_float(numbers.get(key)) for key in keys]


def _tau(row: Row, keys: Sequence[str]) -> str:
    value, low, high = _numbers(row, keys)
    return signed(value) + ("" if math.isnan(low) else f" ({signed(low)} to {signed(high)})")


def _p(value: float | None) -> str:
    return MISSING if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)
