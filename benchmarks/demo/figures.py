"""The demo's figures and tables, from its runs. Colours and markers are those of `STYLE` throughout."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch

from benchmarks.demo.findings import NAN, Results, mean, run_table, values, values_by_epoch
from benchmarks.demo.plan import DATA, MEASURES, METHODS, STYLE
from sam_optim.core.results import Landscape
from sam_optim.core.text import mean_and_std, number, signed, spread
from sam_optim.report.canvas import PANEL
from sam_optim.report.figures import Curves, Group, Interval, curves, intervals, legend, scatter, strip
from sam_optim.report.page import Markup, drawing, figure, html_table, panels
from sam_optim.report.pictures import contour_picture, sharpness_picture

Correlations = Sequence[Mapping[str, Any]]
GREY = 5  # the style of what is there to be compared with
WIDE = (PANEL[0] * 1.15, PANEL[1])  # of a plane, beside which stands its scale


def key() -> Markup:
    return drawing(legend([(method.name, STYLE[name]) for name, method in METHODS.items()]))


def accuracy_table(final: Results) -> Markup:
    head = ["method", "last epoch, %", "best epoch, %", "best epoch, number"]
    head += ["wrong labels learned, %", "wrong labels seen through, %"]
    rows = [
        [
            method.name,
            spread(values(final, name, "last", "test_accuracy", scale=100), decimals=1),
            spread(values(final, name, "best", "test_accuracy", scale=100), decimals=1),
            number(mean(values(final, name, "best", "epoch")), 2),
            spread(values(final, name, "memorized", scale=100), decimals=1),
            spread(values(final, name, "corrected", scale=100), decimals=1),
        ]
        for name, method in METHODS.items()
    ]
    caption = (
        "Test accuracy, mean ± standard deviation over seeds. The best epoch is the one with the highest validation "
        "accuracy of that run: early stopping would keep it. The last two columns are about the training images "
        "whose label was replaced by a wrong one: how often the network predicts it, and how often the true label."
    )
    return html_table(head, rows, caption)


def accuracy_dots(final: Results) -> Markup:
    kinds = {
        "Last epoch": (("last", "test_accuracy"), "test accuracy, %"),
        "Best epoch by validation": (("best", "test_accuracy"), "test accuracy, %"),
        "Wrong labels learned": (("memorized",), "% of the wrong training labels"),
    }
    strips = [strip(title, _groups(final, *at, scale=100), x_label=label) for title, (at, label) in kinds.items()]
    caption = "One marker for each seed; the bar is their mean, the line one standard deviation to both sides."
    return figure(panels(*strips), caption)


def training_curves(final: Results) -> Markup:
    kinds = {
        "train_loss": ("Training loss", "loss on the noisy labels", 1),
        "train_accuracy": ("Training accuracy", "% of the noisy labels", 100),
        "test_accuracy": ("Test accuracy", "% of the test digits", 100),
    }
    pictures = []
    for curve, (title, label, scale) in kinds.items():
        lines = []
        for name, method in METHODS.items():
            runs = [[scale * v for v in run] for run in values_by_epoch(final, name, curve)]
            if runs:
                lines.append(Curves(method.name, list(range(1, len(runs[0]) + 1)), runs, STYLE[name]))
        pictures.append(curves(title, lines, x_label="epoch", y_label=label))
    caption = (
        "Mean over seeds; the band goes from the lowest to the highest. The two SGD curves are the same runs, one of "
        "them stopped half-way. SAM and ASAM take two passes in each epoch."
    )
    return figure(panels(*pictures), caption)


def sharpness_curves(final: Results) -> Markup | None:
    watched = [(run["job"]["method"], rows) for run in final.values() if (rows := run.get("sharpness"))]
    pictures = [
        sharpness_picture(rows, title=METHODS[name].name, size=PANEL)
        for name, rows in watched
        if any(row.get("lambda_max") for row in rows)
    ]
    caption = (
        "The largest Hessian eigenvalue and the critical sharpness of 128 noisy training images while the first seed "
        "trains, with the edges of stability: above its edge, training on all images at once would diverge. SAM's edge "
        "is drawn where T = 1. Recorded by SharpnessMonitor."
    )
    return figure(panels(*pictures), caption) if pictures else None


def sharpness_table(final: Results, data: str) -> Markup:
    head = ["method", *(text[0].upper() + text[1:] for text in MEASURES.values())]
    rows = [
        [method.name, *(spread(values(final, name, "measures", data, measure, "value")) for measure in MEASURES)]
        for name, method in METHODS.items()
    ]
    return html_table(head, rows, f"On {data}: mean ± standard deviation over seeds, weights of the last epoch.")


def sharpness_dots(final: Results, data: str) -> Markup:
    strips = []
    for measure, title in MEASURES.items():
        groups = _groups(final, "measures", data, measure, "value")
        is_positive = all(v > 0 for group in groups for v in _reach(group.values))
        log = is_positive and _is_wide(v for group in groups for v in group.values)
        label = _unit(measure) + (" (logarithmic)" if log else "")
        strips.append(strip(title[0].upper() + title[1:], groups, x_label=label, log=log))
    return figure(panels(*strips), f"On {data}: one marker for each seed, their mean, one standard deviation.")


def correlation_scatters(final: Results, taus: Correlations, measure: str) -> Markup:
    rows = run_table(final)
    plots = []
    for data in DATA:
        tau = next(c for c in taus if c["data"] == data and c["measure"] == measure)
        points = []
        for name, method in METHODS.items():
            runs = [row for row in rows if row["method"] == name]
            group = Group(method.name, [_float(run[f"{data} / {measure}"]) for run in runs], STYLE[name])
            points.append((group, [_float(run["test_error"]) for run in runs]))
        labels = {"x_label": f"{MEASURES[measure]} (logarithmic)", "y_label": "test error, %"}
        plots.append(scatter(f"On {data}", points, **labels, note=tau_text(tau)))
    return figure(panels(*plots), "One marker for each run, at the weights of its last epoch.")


def correlation_intervals(taus: Correlations) -> Markup:
    plots = []
    for data in DATA:
        rows = []
        for c in (c for c in taus if c["data"] == data):
            numbers = [_float(c[key]) for key in ("tau", "low", "high")]
            rows.append(Interval(MEASURES[c["measure"]], *numbers, style=GREY if c["measure"] == "loss" else 3))
        plots.append(intervals(f"On {data}", rows, x_label="tau with the test error", span=(-1.0, 1.0)))
    caption = (
        "Kendall's tau with its 95 % bootstrap interval over all runs. To the right of 0 flatter went with better; to "
        "the left, flatter went with worse. In grey the loss: sharpness is of interest only where it says more."
    )
    return figure(panels(*plots), caption)


def slices(final: Results) -> Markup:
    pictures = []
    for data in DATA:
        lines = []
        for name, method in METHODS.items():
            runs = [run for run in final.values() if run["job"]["method"] == name]
            along = [run["slices"][data] for run in runs if data in run.get("slices", {})]
            if along:
                losses = [[_float(v) for v in slice_["losses"]] for slice_ in along]
                lines.append(Curves(method.name, along[0]["coordinates"][0], losses, STYLE[name]))
        if lines:
            log = _is_wide(v for line in lines for run in line.runs for v in run)
            y_label = "loss (logarithmic)" if log else "loss"
            x_label = "random direction, in filter norms"
            pictures.append(curves(f"On {data}", lines, x_label=x_label, y_label=y_label, log=log))
    caption = (
        "One filter-normalized random direction for each seed, the same draw for every method; mean and range over "
        "seeds. At ±1 every filter has moved by its own norm."
    )
    return figure(panels(*pictures), caption)


def planes(final: Results, data: str) -> Markup | None:
    landscapes = {
        run["job"]["method"]: _landscape(run["planes"][data])
        for run in final.values()
        if run.get("planes") and run["planes"].get(data)
    }
    if not landscapes:
        return None
    heights = torch.cat([plane.losses[plane.losses.isfinite()] for plane in landscapes.values()])
    limits = (float(heights.min()), float(heights.quantile(0.98)))
    pictures = [
        contour_picture(plane, title=METHODS[name].name, log=True, limits=limits, size=WIDE)
        for name, plane in landscapes.items()
    ]
    caption = (
        f"Loss on {data} over the plane of two filter-normalized random directions, first seed; the cross is where "
        "training ended. All planes share one scale, with bands at equal ratios of the loss. The directions are one "
        "draw, scaled to the filters of each network."
    )
    return figure(panels(*pictures), caption)


def tau_text(correlation: Mapping[str, Any]) -> str:
    if correlation["tau"] is None:
        return str(correlation["reason"])
    return f"τ = {signed(correlation['tau'])} ({signed(correlation['low'])} to {signed(correlation['high'])})"


def _groups(final: Results, *at: str, scale: float = 1.0) -> list[Group]:
    return [Group(m.name, values(final, name, *at, scale=scale), STYLE[name]) for name, m in METHODS.items()]


def _reach(numbers: Sequence[float]) -> tuple[float, float]:
    """What a strip draws of a group: from one standard deviation below the mean to one above."""
    center, std = mean_and_std([v for v in numbers if math.isfinite(v)])
    return center - std, center + std


def _is_wide(numbers: Iterable[float]) -> bool:
    """Whether a logarithmic axis shows more: the largest is several times the smallest, and all are positive."""
    finite = [v for v in numbers if math.isfinite(v)]
    return bool(finite) and min(finite) > 0 and max(finite) > 3 * min(finite)


def _landscape(plane: Mapping[str, Any]) -> Landscape:
    losses = [[_float(v) for v in row] for row in plane["losses"]]
    coordinates = tuple(torch.tensor(axis, dtype=torch.float64) for axis in plane["coordinates"])
    return Landscape(coordinates, torch.tensor(losses, dtype=torch.float64), plane["directions"])


def _unit(measure: str) -> str:
    if measure in ("loss", "sam_ball", "asam_ball"):
        return "nats"
    return "gradient norm" if measure == "regret" else "curvature, loss/w²"


def _float(value: float | None) -> float:
    return NAN if value is None else value
