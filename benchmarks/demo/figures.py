"""The demo's figures and tables, from its runs. Colours and markers are those of `STYLE` throughout."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.demo.findings import NAN, Results, mean, values, values_by_epoch
from benchmarks.demo.plan import DATA, MEASURES, METHODS, STYLE
from sam_optim.report.axes import marker
from sam_optim.report.charts import (
    Curves,
    Group,
    Interval,
    bar_scale,
    curves,
    figure,
    intervals,
    legend,
    panels,
    scatter,
    strip,
)
from sam_optim.report.heatmap import Levels, contour_map
from sam_optim.report.markup import Markup, join, tag
from sam_optim.report.tables import html_table, number, signed, spread

Correlations = Sequence[Mapping[str, Any]]


def key() -> Markup:
    return legend([(method.name, STYLE[name]) for name, method in METHODS.items()])


def method_name(name: str) -> Markup:
    icon = marker(8, 8, STYLE[name], class_=f"dot s{STYLE[name]}")
    return join(tag("svg", icon, viewBox="0 0 16 16", class_="key", aria_hidden="true"), METHODS[name].name)


def accuracy_table(final: Results) -> Markup:
    head = [
        "method",
        "last epoch, %",
        "best epoch, %",
        "best epoch, number",
        "wrong labels learned, %",
        "wrong labels seen through, %",
    ]
    rows = [
        [
            method_name(m),
            spread(values(final, m, "last", "test_accuracy", scale=100), decimals=1),
            spread(values(final, m, "best", "test_accuracy", scale=100), decimals=1),
            number(mean(values(final, m, "best", "epoch")), 2),
            spread(values(final, m, "memorised", scale=100), decimals=1),
            spread(values(final, m, "corrected", scale=100), decimals=1),
        ]
        for m in METHODS
    ]
    caption = (
        "Test accuracy, mean ± standard deviation over seeds. The best epoch is the one with the highest validation "
        "accuracy of that run, what early stopping would keep. The last two columns are about the training images "
        "whose label was replaced by a wrong one: how often the network says that label, and how often the true one."
    )
    return html_table(head, rows, caption)


def accuracy_dots(final: Results) -> Markup:
    kinds = {
        "Last epoch": (("last", "test_accuracy"), "test accuracy, %"),
        "Best epoch by validation": (("best", "test_accuracy"), "test accuracy, %"),
        "Wrong labels learned": (("memorised",), "% of the wrong training labels"),
    }
    drawn = [strip(title, _groups(final, *at, scale=100), x_label=label) for title, (at, label) in kinds.items()]
    return figure(
        panels(*drawn),
        "One marker for each seed; the bar is their mean, the line one standard deviation to both sides.",
    )


def training_curves(final: Results) -> Markup:
    kinds = {
        "train_loss": ("Training loss", "loss on the noisy labels", 1),
        "train_accuracy": ("Training accuracy", "% of the noisy labels", 100),
        "test_accuracy": ("Test accuracy", "% of the test digits", 100),
    }
    drawn = []
    for curve, (title, label, scale) in kinds.items():
        lines = []
        for name, method in METHODS.items():
            runs = [[scale * v for v in run] for run in values_by_epoch(final, name, curve)]
            if runs:
                lines.append(Curves(method.name, list(range(1, len(runs[0]) + 1)), runs, STYLE[name]))
        drawn.append(curves(title, lines, x_label="epoch", y_label=label))
    caption = (
        "Mean over seeds; the band goes from the lowest to the highest. The two SGD curves are the same runs, one of "
        "them stopped half-way. SAM and ASAM take two passes in each epoch."
    )
    return join(key(), figure(panels(*drawn), caption))


def sharpness_table(final: Results, data: str) -> Markup:
    head = ["method", *(text[0].upper() + text[1:] for text in MEASURES.values())]
    rows = [
        [method_name(m), *(spread(values(final, m, "measures", data, measure, "value")) for measure in MEASURES)]
        for m in METHODS
    ]
    return html_table(head, rows, f"On {data}: mean ± standard deviation over seeds, weights of the last epoch.")


def sharpness_dots(final: Results, data: str) -> Markup:
    drawn = []
    for measure, title in MEASURES.items():
        groups = _groups(final, "measures", data, measure, "value")
        positive = all(v > 0 for group in groups for v in group.values if math.isfinite(v))
        scale = "logarithmic" if positive else "linear"
        drawn.append(strip(title[0].upper() + title[1:], groups, x_label=f"{_unit(measure)} ({scale})", log=positive))
    return figure(panels(*drawn), f"On {data}: one marker for each seed, their mean, one standard deviation.")


def correlation_scatters(rows: Sequence[Mapping[str, Any]], found: Correlations, measure: str) -> Markup:
    drawn = []
    for data in DATA:
        column = f"{data} / {measure}"
        tau = next(c for c in found if c["data"] == data and c["measure"] == measure)
        points = [
            (
                Group(METHODS[name].name, [_float(r[column]) for r in rows if r["method"] == name], STYLE[name]),
                [_float(r["test_error"]) for r in rows if r["method"] == name],
            )
            for name in METHODS
        ]
        title = f"On {data}"
        drawn.append(
            scatter(
                title, points, x_label=f"{MEASURES[measure]} (logarithmic)", y_label="test error, %", note=tau_text(tau)
            )
        )
    return figure(panels(*drawn), "One marker for each run, at the weights of its last epoch.")


def correlation_intervals(found: Correlations) -> Markup:
    drawn = []
    for data in DATA:
        rows = [
            Interval(
                MEASURES[c["measure"]],
                _float(c["tau"]),
                _float(c["low"]),
                _float(c["high"]),
                5 if c["measure"] == "loss" else 3,
            )
            for c in found
            if c["data"] == data
        ]
        drawn.append(intervals(f"On {data}", rows, x_label="tau with the test error", span=(-1.0, 1.0)))
    return figure(
        panels(*drawn),
        "Kendall's tau with its 95 % bootstrap interval over all runs. To the right of 0 flatter went with better; to "
        "the left, flatter went with worse. In grey the loss: a sharpness that tells no more is no news.",
    )


def correlation_table(found: Correlations) -> Markup:
    head = ["measure", "data", "tau", "95 % interval", "p", "within a seed", "within a method", "runs"]
    rows = [
        [
            MEASURES[c["measure"]],
            c["data"],
            number(c["tau"], 2),
            f"{signed(c['low'])} to {signed(c['high'])}",
            number(c["p"], 2),
            signed(c["by_factor"].get("method")),
            signed(c["by_factor"].get("seed")),
            c["n"],
        ]
        for c in found
    ]
    caption = "tau over all runs, among the methods of one seed, and among the seeds of one method (chance alone)."
    return html_table(head, rows, caption)


def slices(final: Results) -> Markup:
    drawn = []
    for data in DATA:
        lines = []
        for name, method in METHODS.items():
            runs = [run for run in final.values() if run["job"]["method"] == name]
            found = [run["slices"][data] for run in runs if data in run.get("slices", {})]
            if found:
                axis = found[0]["coordinates"][0]
                lines.append(Curves(method.name, axis, [[_float(v) for v in f["losses"]] for f in found], STYLE[name]))
        if lines:
            drawn.append(
                curves(f"On {data}", lines, x_label="random direction", y_label="loss (logarithmic)", log=True)
            )
    caption = (
        "One filter-normalised random direction for each seed, the same draw for every method; mean and range over "
        "seeds. At ±1 every filter has moved by its own norm."
    )
    return join(key(), figure(panels(*drawn), caption))


def planes(final: Results, data: str) -> Markup | None:
    found = {
        run["job"]["method"]: run["planes"][data]
        for run in final.values()
        if run.get("planes") and run["planes"].get(data)
    }
    if not found:
        return None
    heights = [v for plane in found.values() for row in plane["losses"] for v in row if v is not None]
    ceiling = sorted(heights)[int(0.98 * (len(heights) - 1))]
    levels = Levels.geometric(min(heights), ceiling)
    maps = [
        contour_map(
            METHODS[name].name,
            *plane["coordinates"],
            [[_float(v) for v in row] for row in plane["losses"]],
            levels,
            note=f"On {data}, one scale for all methods.",
        )
        for name, plane in found.items()
    ]
    ticks = [
        (i / (len(levels.values) + 1) + 1 / (len(levels.values) + 1), number(v, 2)) for i, v in enumerate(levels.values)
    ]
    scale = bar_scale("Loss, the same scale for all", levels.colours(), ticks[::5])
    caption = (
        f"Loss on {data} over the plane of two filter-normalised random directions, first seed; the cross is where "
        "training ended. Contours are at equal ratios of the loss. The directions are one draw, scaled to the filters "
        "of each network."
    )
    return figure(panels(*maps, scale), caption)


def tau_text(correlation: Mapping[str, Any]) -> str:
    if correlation["tau"] is None:
        return str(correlation["reason"])
    return f"τ = {signed(correlation['tau'])} ({signed(correlation['low'])} to {signed(correlation['high'])})"


def _groups(final: Results, *at: str, scale: float = 1.0) -> list[Group]:
    return [Group(m.name, values(final, name, *at, scale=scale), STYLE[name]) for name, m in METHODS.items()]


def _unit(measure: str) -> str:
    if measure in ("loss", "sam_ball", "asam_ball"):
        return "nats"
    return "gradient norm" if measure == "regret" else "per unit of weight²"


def _float(value: float | None) -> float:
    return NAN if value is None else value
