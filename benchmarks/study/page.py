"""The page of a study: what was found in words, all correlations, the models behind them, and how it was done."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from benchmarks.study.analysis import Row, Table, capitalised, directions, labelled, listed, name, table_size
from sam_optim.core.text import MISSING, number, signed
from sam_optim.report.figures import Group, Interval, heat_map, intervals, legend, scatter
from sam_optim.report.page import (
    Child,
    Markup,
    bullets,
    definitions,
    drawing,
    element,
    figure,
    html_page,
    html_table,
    panels,
    paragraph,
    section,
)

LEVELS = 6  # colours of a factor; with more values than that, neighbours share one
SHORT = {"gap": "gap", "ood_error": "corrupted error"}
OVERALL, FIXED = ("tau", "low", "high"), ("within", "within_low", "within_high")


def page(table: Table, results: Row) -> Markup:
    return html_page(
        f"{table.title}: does flatness go with generalization?",
        _header(table, results),
        _map(table, results),
        _given(table, results),
        _comparisons(table, results),
        _scatters(table, results),
        _models(table),
        _reading(table, results),
        section("Settings and versions", definitions(_pairs(table.about), kind="pairs"), identifier="settings"),
        data=dict(results) | {"models": [dict(row) for row in table.rows]},
        sortable=True,
    )


def _header(table: Table, results: Row) -> Markup:
    rows = [row for row in results["comparisons"] if row["tau"] is not None]
    signs = [directions(row, results["level"]) for row in rows]
    tests = f"corrected for {results['num_tests']} tests"
    differing = f", which differ in {listed([name(f) for f in table.factors])}" if table.factors else ""
    facts = [
        (f"models{differing}", str(results["num_models"])),
        (
            f"comparisons of a measure with a target in which tau is not 0, {tests}",
            f"{sum(overall != 0 for overall, _ in signs)} of {len(rows)}",
        ),
    ]
    if table.given:
        fixed = [sign for _, sign in signs if sign is not None]
        counted = f"{sum(sign != 0 for sign in fixed)} of {len(fixed)}"
        facts.append((f"of them with the {name(table.given)} held fixed", counted))
    return element(
        "header",
        paragraph(f"Study {table.title}", kind="overline"),
        element("h1", results["headline"]),
        None
        if table.about.get("complete", True)
        else paragraph(f"The study is not complete: {table.about['tally']}.", kind="lead"),
        paragraph("If flatter models generalized better, measures of sharpness would rise with the errors."),
        bullets(results["conclusions"]),
        definitions(facts, kind="facts"),
    )


def _map(table: Table, results: Row) -> Markup:
    def drawn(title: str, keys: Sequence[str], index: int) -> Any:
        rows = [[_row(results, measure, target) for target in table.targets] for measure in table.measures]
        values = [[_numbers(row, keys)[0] for row in line] for line in rows]
        firm = [[bool(directions(row, results["level"])[index]) for row in line] for line in rows]
        columns = [SHORT.get(target, name(target)) for target in table.targets]
        return heat_map(title, table.measures, columns, values, firm=firm)

    maps = [drawn("All models", OVERALL, 0)]
    if table.given:
        maps.append(drawn(f"Models with the same {name(table.given)}", FIXED, 1))
    caption = (
        "Red: a larger measure goes with a larger target (for measures of sharpness: flatter goes with better). Blue: "
        "with a smaller one. Framed and bold: the interval excludes 0 and so does the test, corrected for the number "
        "of tests on this page."
    )
    return section("All correlations", figure(panels(*maps), caption), identifier="map")


def _given(table: Table, results: Row) -> Markup | None:
    if not table.given:
        return None
    given, first, goal = name(table.given), name(table.held[0]), table.targets[0]
    plots = []
    for target in table.targets:
        rows = []
        for measure in table.measures:
            row = _row(results, measure, target)
            rows += [Interval(measure, *_numbers(row, OVERALL), 3), Interval("", *_numbers(row, FIXED), 0)]
        plots.append(intervals(capitalised(name(target)), rows, x_label="tau", span=(-1.0, 1.0)))
    of_goal = [_row(results, measure, goal) for measure in table.measures]
    follows = {row["measure"]: row["tau"] for row in results["follows"]}
    lines = []
    for row in of_goal:
        taus, p = (row["groups"][key] for key in ("taus", "heterogeneity_p"))
        each = ", ".join(f"{signed(t['tau'])} ({value})" for value, t in taus.items())
        lines.append([row["measure"], signed(follows[row["measure"]]), signed(row["tau"]), each, _p(p)])
    caption = (
        f"Does a measure say more than the {first}, and is tau the same at each? p: that they are, by Cochran's Q, not "
        "corrected."
    )
    return section(
        f"Is it the measure, or the {given} behind it?",
        paragraph(
            f"A {given} that moves both numbers gives a correlation even if flatness itself does nothing. So tau is "
            f"also taken over pairs of models with the same {given}."
        ),
        drawing(legend([("all models", 3), (f"same {given}", 0)])),
        figure(
            panels(*plots), f"Intervals of {100 * results['level']:g} % by bootstrap, not corrected for their number."
        ),
        html_table(["measure", f"tau with {first}", f"with {name(goal)}", f"at each {first}", "p"], lines, caption),
        identifier="given",
    )


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
    return section("Every comparison", html_table(head, rows, caption, sortable=True), identifier="comparisons")


def _scatters(table: Table, results: Row) -> Markup:
    names, style_of = _levels(table)
    parts: list[Child] = []
    if table.given:
        parts += [paragraph(f"Colour and shape: {name(table.held[0])}."), drawing(legend(names, ordered=True))]
    for target in table.targets:
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
            plots.append(
                scatter(
                    measure,
                    groups,
                    x_label=f"{measure} (logarithmic)" if log else measure,
                    y_label=labelled(target),
                    note=f"tau {signed(row['tau'])}, n = {row['n']}",
                    log=log,
                    ordered=True,
                )
            )
        parts += [element("h3", capitalised(name(target))), panels(*plots)]
    return section("Every model", *parts, identifier="scatter")


def _models(table: Table) -> Markup:
    columns = [*table.factors, *table.targets, *table.measures]
    rows: list[list[Child]] = [
        [i, *(_cell(row.get(column), column in table.factors) for column in columns)]
        for i, row in enumerate(table.rows, start=1)
    ]
    failed = [f"{', '.join(f'{k} {v}' for k, v in f['levels'].items())}: {f['reason']}" for f in table.failed]
    return section(
        "The models",
        html_table(["", *map(labelled, columns)], rows, f"{len(rows)} models.", sortable=True),
        paragraph(f"{len(failed)} models have no numbers:") if failed else None,
        bullets(failed) if failed else None,
        identifier="models",
    )


def _cell(value: Any, is_factor: bool) -> str:
    if isinstance(value, str):
        return value
    if is_factor:
        return MISSING if value is None else f"{value:g}"
    return number(value, 4)


def _reading(table: Table, results: Row) -> Markup:
    sample = "settings; models that differ in their seed alone are drawn together" if table.cluster else "models"
    items = [
        "Tau counts pairs of models: +1 where every model with the larger measure has the larger target, 0 where the "
        "order of one says nothing about the other. It does not depend on scales, and no cause follows from it.",
        f"The intervals treat the {table_size(results['comparisons'])} models as a sample of {sample}. What holds here "
        "need not hold for other data and networks.",
        "No evidence is not evidence of none: look at the width of the interval.",
    ]
    if "train_loss" in table.targets:
        items.insert(
            1,
            "Sharpness depends on how far training went: a network whose training loss is near 0 is flat on its own "
            "training data whatever it does elsewhere. That is why the training loss is among the targets.",
        )
    if table.given:
        items.append(
            "The partial tau is a formula on three taus and may differ from 0 without any relation at a fixed "
            f"{name(table.given)}; the conclusions use the tau among models with the same {name(table.given)}."
        )
    for measure, count in (table.about.get("unconverged") or {}).items():
        items.append(f"{measure} did not converge, or has no value, for {count} models: they are left out there.")
    return section("How to read this", bullets(items), identifier="reading")


def _pairs(about: Mapping[str, Any]) -> list[tuple[Child, Child]]:
    return [(key, v if isinstance(v, str) else json.dumps(v, sort_keys=True)) for key, v in about.items()]


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
