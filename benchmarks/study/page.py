"""The page of a study: what was found in words, all correlations, the models behind them, and how it was done."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.study.analysis import Table, directions, labelled, name, table_size
from sam_optim.core.text import number, signed
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

Found = Mapping[str, Any]


def page(table: Table, found: Found) -> Markup:
    return html_page(
        f"{table.title}: does flatness go with generalization?",
        _header(table, found),
        _map(table, found),
        _given(table, found),
        _comparisons(table, found),
        _scatters(table, found),
        _models(table),
        _reading(table, found),
        _settings(table),
        data=dict(found) | {"models": [dict(row) for row in table.rows]},
        sortable=True,
    )


def _header(table: Table, found: Found) -> Markup:
    rows = [row for row in found["comparisons"] if row["tau"] is not None]
    counts = [directions(row, found["level"]) for row in rows]
    items: list[tuple[Child, Child]] = [
        ("models, which differ in " + _words(table.factors), str(found["num_models"])),
        (
            f"comparisons of a measure with a target in which tau is not 0, corrected for {found['num_tests']} tests",
            f"{sum(d[0] != 0 for d in counts)} of {len(rows)}",
        ),
    ]
    if table.given:
        fixed = [d[1] for d in counts if d[1] is not None]
        items.append(
            (f"of them with the {name(table.given)} held fixed", f"{sum(d != 0 for d in fixed)} of {len(fixed)}")
        )
    unfinished = None if table.about.get("complete", True) else f"The study is not complete: {table.about['tally']}."
    if not table.factors:
        items[0] = ("models", str(found["num_models"]))
    return element(
        "header",
        paragraph(f"Study {table.title}", kind="overline"),
        element("h1", found["headline"]),
        paragraph(unfinished, kind="lead") if unfinished else None,
        paragraph("If flatter models generalized better, measures of sharpness would rise with the errors."),
        bullets(found["conclusions"]),
        definitions(items, kind="facts"),
    )


def _map(table: Table, found: Found) -> Markup:
    level = found["level"]

    def tau_map(title: str, value: str, index: int) -> Any:
        rows = [[_row(found, m, t) for t in table.targets] for m in table.measures]
        numbers = [[_float((row if value == "tau" else row.get("fixed") or {}).get(value)) for row in r] for r in rows]
        firm = [[bool(directions(row, level)[index]) for row in r] for r in rows]
        return heat_map(title, table.measures, [_short(t) for t in table.targets], numbers, firm=firm)

    maps = [tau_map("Kendall's tau over all models", "tau", 0)]
    if table.given:
        maps.append(tau_map(f"Kendall's tau among models with the same {name(table.given)}", "within", 1))
    caption = (
        "Red: a larger measure goes with a larger target (for measures of sharpness: flatter goes with better). Blue: "
        "with a smaller one. Framed and bold: the interval excludes 0 and so does the test, corrected for the number "
        "of tests on this page."
    )
    return section("All correlations", figure(panels(*maps, wide=True), caption), identifier="map")


def _given(table: Table, found: Found) -> Markup | None:
    if not table.given:
        return None
    drawn = []
    for target in table.targets:
        rows = []
        for measure in table.measures:
            row = _row(found, measure, target)
            rows.append(Interval(measure, *(_float(row.get(k)) for k in ("tau", "low", "high")), 0))
            keys = ("within", "within_low", "within_high")
            rows.append(Interval("", *(_float(row["fixed"].get(k)) for k in keys), 1))
        drawn.append(intervals(_cap(name(target)), rows, x_label="tau", span=(-1.0, 1.0)))
    goal, given = table.targets[0], name(table.given)
    closer = [
        [row["measure"], signed(_float(row["fixed"].get("measure_given"))), signed(_float(row["tau"]))]
        for m in table.measures
        if (row := _row(found, m, goal))
    ]
    follows = html_table(
        ["measure", f"tau with {given}", f"tau with {name(goal)}"],
        closer,
        f"Does a measure say more than the {given}? {_cap(name(goal))} itself has tau "
        f"{signed(_float(_row(found, table.measures[0], goal)['fixed'].get('target_given')))} with the {given}.",
    )
    return section(
        f"Is it the measure, or the {given} behind it?",
        paragraph(
            f"A {given} that moves both numbers gives a correlation even if flatness itself does nothing. So tau is "
            f"also taken over pairs of models with the same {given}."
        ),
        drawing(legend([("all models", 0), (f"same {given}", 1)])),
        figure(
            panels(*drawn), f"Intervals of {100 * found['level']:g} % by bootstrap, not corrected for their number."
        ),
        follows if table.targets else None,
        identifier="given",
    )


def _comparisons(table: Table, found: Found) -> Markup:
    given = name(table.given) if table.given else None
    head: list[Child] = ["measure", "target", "in words", "n", "tau, interval", "p, corrected", "p"]
    head += [f"tau at fixed {given}, interval", "p at fixed, corrected", "p at fixed"] if given else []
    head += ["granulated tau", *(["partial tau, interval"] if given else [])]
    rows = []
    for row in found["comparisons"]:
        fixed = row.get("fixed") or {}
        cells: list[Child] = [row["measure"], name(row["target"]), row["verdict"], row["n"]]
        cells += [_tau(row, "tau", "low", "high"), _p(row.get("p_adjusted")), _p(row.get("p"))]
        if given:
            cells.append(_tau(fixed, "within", "within_low", "within_high"))
            cells += [_p(fixed.get("within_p_adjusted")), _p(fixed.get("within_p"))]
        cells.append(signed(_float(row.get("granulated"))))
        if given:
            cells.append(_tau(fixed, "partial", "partial_low", "partial_high"))
        rows.append(cells)
    caption = (
        f"Kendall's tau-b; intervals of {100 * found['level']:g} % from {found['num_resamples']:,} bootstrap samples; "
        f"p-values corrected by Holm's method over all {found['num_tests']} tests, which keeps the chance of even one "
        "false finding on this page below 5 %. Granulated: the mean, over the factors, of "
        f"tau among models that differ in one factor only.{_partial_words(table)}"
    )
    return section("Every comparison", html_table(head, rows, caption, sortable=True), identifier="comparisons")


def _scatters(table: Table, found: Found) -> Markup:
    names, style = _levels(table)
    drawn = []
    for target in table.targets:
        plots = []
        for measure in table.measures:
            groups = []
            for label, i in names:
                rows = [row for row in table.rows if style(row) == i]
                xs, ys = ([_float(row.get(c)) for row in rows] for c in (measure, target))
                groups.append((Group(label, xs, i), ys))
            known = [v for g, _ in groups for v in g.values if math.isfinite(v)]
            row = _row(found, measure, target)
            note = f"tau {signed(_float(row['tau']))}, n = {row['n']}"
            log = bool(known) and min(known) > 0 and max(known) > 10 * min(known)
            axis = f"{measure} (logarithmic)" if log else measure
            plots.append(
                scatter(measure, groups, x_label=axis, y_label=labelled(target), note=note, log=log, ordered=True)
            )
        drawn += [element("h3", _cap(name(target))), panels(*plots)]
    key: list[Child] = []
    if table.given:
        key = [paragraph(f"Colour and shape: {name(table.given)}."), drawing(legend(names, ordered=True))]
    return section("Every model", *key, *drawn, identifier="scatter")


def _models(table: Table) -> Markup:
    shown = [*table.factors, *table.targets, *table.measures]
    rows: list[list[Child]] = []
    for i, row in enumerate(table.rows):
        cells: list[Child] = [i + 1]
        for column in shown:
            value = row.get(column)
            if column in table.factors or isinstance(value, str):
                cells.append("–" if value is None else f"{value:g}" if isinstance(value, (int, float)) else value)
            else:
                cells.append(number(_float(value), 4))
        rows.append(cells)
    failed = [paragraph(f"{len(table.failed)} models have no numbers:"), bullets([_failed(f) for f in table.failed])]
    return section(
        "The models",
        html_table(["", *(labelled(c) for c in shown)], rows, f"{len(rows)} models.", sortable=True),
        *(failed if table.failed else []),
        identifier="models",
    )


def _failed(row: Mapping[str, Any]) -> str:
    return f"{', '.join(f'{k} {v}' for k, v in row['levels'].items())}: {row['reason']}"


def _reading(table: Table, found: Found) -> Markup:
    items = [
        "Tau counts pairs of models: +1 where every model with the larger measure has the larger target, 0 where the "
        "order of one says nothing about the other. It does not depend on scales, and no cause follows from it.",
        f"The intervals treat the {table_size(found['comparisons'])} models as a sample of models of this kind. Models "
        "that share settings are more alike than that; what holds here need not hold for other data and networks.",
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


def _settings(table: Table) -> Markup:
    rows: list[tuple[Child, Child]] = [
        (key, value if isinstance(value, str) else json.dumps(value, sort_keys=True))
        for key, value in table.about.items()
    ]
    return section("Settings and versions", definitions(rows, kind="pairs"), identifier="settings")


def _levels(table: Table) -> tuple[list[tuple[str, int]], Any]:
    """Names and numbers of the colours, and for a row the number of its colour."""
    if not table.given:
        return [("models", 0)], lambda row: 0
    values = {row.get(table.given) for row in table.rows if row.get(table.given) is not None}
    ordered = sorted(values, key=lambda v: (isinstance(v, str), v))
    size = math.ceil(len(ordered) / LEVELS)
    bins = [ordered[i : i + size] for i in range(0, len(ordered), size)]
    texts = [[f"{v:g}" if isinstance(v, (int, float)) else v for v in values] for values in bins]
    names = [t[0] if len(t) == 1 else f"{t[0]} to {t[-1]}" for t in texts]
    spread = (LEVELS - 1) / max(len(names) - 1, 1)  # few levels: colours that are far apart
    place = {v: round(i * spread) for i, values in enumerate(bins) for v in values}
    found = [(label, round(i * spread)) for i, label in enumerate(names)]
    return found, lambda row: place.get(row.get(table.given), -1)


def _row(found: Found, measure: str, target: str) -> Found:
    return next(row for row in found["comparisons"] if row["measure"] == measure and row["target"] == target)


def _tau(row: Found, *keys: str) -> Child:
    value, low, high = (_float(row.get(key)) for key in keys)
    ends = "" if math.isnan(low) else f" ({signed(low)} to {signed(high)})"
    return f"{signed(value)}{ends}"


def _p(value: float | None) -> str:
    return "–" if value is None else "< 0.001" if value < 0.001 else f"{value:.3f}"


def _partial_words(table: Table) -> str:
    return f" Partial: Kendall's partial tau given the {name(table.given)}." if table.given else ""


def _float(value: Any) -> float:
    return math.nan if value is None else float(value)


def _short(target: str) -> str:
    return {"generalization gap": "gap", "error on corrupted images": "corrupted error"}.get(name(target), name(target))


def _words(names: Sequence[str]) -> str:
    words = [name(n) for n in names]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}" if words else ""


def _cap(text: str) -> str:
    return text[:1].upper() + text[1:]
