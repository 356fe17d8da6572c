"""Figures of runs: dots by seed, curves with bands, scatters, intervals. Each returns SVG for one panel."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sam_optim.report.axes import Panel, Scale, figure_svg, line, marker, path, scale_over, short, words
from sam_optim.report.markup import Markup, join, tag

WIDTH = 340.0  # of one panel, in pixels: fits a telephone, and three fit a page
LEFT, RIGHT, TOP = 46.0, 14.0, 42.0


@dataclass(frozen=True)
class Group:
    """Numbers under one name; `style` chooses the colour and the marker, the same in every figure of a page."""

    name: str
    values: Sequence[float]
    style: int = 0


@dataclass(frozen=True)
class Curves:
    """Runs of one name over the same x, drawn as their mean and the band from the lowest to the highest."""

    name: str
    x: Sequence[float]
    runs: Sequence[Sequence[float]]
    style: int = 0


@dataclass(frozen=True)
class Interval:
    name: str
    value: float
    low: float
    high: float
    style: int = 0


def legend(names: Sequence[tuple[str, int]], *, palette: str = "s") -> Markup:
    """Names with their markers, as an HTML list. palette: as for `scatter`."""
    items = []
    for name, style in names:
        icon = tag(
            "svg",
            marker(8, 8, style, class_=f"dot {palette}{style}"),
            viewBox="0 0 16 16",
            class_="key",
            aria_hidden="true",
        )
        items.append(tag("li", icon, name))
    return tag("ul", *items, class_="legend")


def strip(title: str, groups: Sequence[Group], *, x_label: str, log: bool = False) -> Markup:
    """One row for each group: a dot for each run, a bar at their mean with one standard deviation to both sides."""
    values = [v for group in groups for v in (*group.values, *_ends(group.values))]
    step = 34.0
    bottom = 26.0 + step * len(groups)
    panel = Panel(title, scale_over(values, 4, WIDTH - 8, log=log), Scale(0, 1, bottom, TOP), WIDTH, bottom + 42)
    panel.x_label, panel.y_ticks = x_label, []
    for i, group in enumerate(groups):
        at = 26.0 + step * i + 24
        known = [v for v in group.values if math.isfinite(v)]
        panel.add(words(4, at - 10, group.name, class_="row-name"))
        if known:
            mean, spread = mean_and_std(known)
            ends = (panel.x.clipped(mean - spread), panel.x.clipped(mean + spread))
            panel.add(line(*_flat(*ends, at), class_=f"whisker s{group.style}"))
            panel.add(*(marker(panel.x(v), at, group.style, class_=f"dot s{group.style}") for v in known))
            panel.add(line(panel.x(mean), at - 8, panel.x(mean), at + 8, class_="mean"))
    return panel.render(_described(groups, x_label), grid="x")


def curves(
    title: str, lines: Sequence[Curves], *, x_label: str, y_label: str, log: bool = False, limit: float | None = None
) -> Markup:
    """The mean of the runs of each name, and the band between their lowest and highest. `limit` cuts the y axis."""
    height = 250.0
    values = [v for c in lines for run in c.runs for v in run if math.isfinite(v)]
    y = scale_over([v if limit is None else min(v, limit) for v in values], height - 44, TOP, log=log)
    ends = [v for c in lines for v in c.x]
    x = Scale(min(ends), max(ends), LEFT, WIDTH - RIGHT)
    panel = Panel(title, x, y, WIDTH, height, x_label, y_label)
    for c in lines:
        columns = [[v for v in column if math.isfinite(v)] for column in zip(*c.runs, strict=True)]
        low, high = (list(zip(c.x, map(f, columns), strict=True)) for f in (_lowest, _highest))
        outline = [(x(a), y.clipped(b)) for a, b in [*low, *reversed(high)] if math.isfinite(b)]
        panel.add(path(outline, class_=f"band s{c.style}"))
    for c in lines:
        columns = [[v for v in column if math.isfinite(v)] for column in zip(*c.runs, strict=True)]
        points = [
            (x(a), y.clipped(_mean(column)) if column else math.nan) for a, column in zip(c.x, columns, strict=True)
        ]
        panel.add(path(points, class_=f"curve s{c.style}"))
    last = "; ".join(f"{c.name} ends at {short(round(_mean([run[-1] for run in c.runs]), 4))}" for c in lines)
    return panel.render(f"{y_label} against {x_label}. Means: {last}.")


def scatter(
    title: str,
    points: Sequence[tuple[Group, Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
    note: str = "",
    log: bool = True,
    palette: str = "s",
) -> Markup:
    """One marker for each run at (x, y): each group's values are x, the numbers beside it y.

    palette: "s" for groups that are only different, "r" for groups in an order, from cold to warm.
    """
    height = 270.0
    x = scale_over([v for g, _ in points for v in g.values], LEFT, WIDTH - RIGHT, log=log, pad=0.08)
    y = scale_over([v for _, values in points for v in values], height - 44, TOP, pad=0.08)
    panel = Panel(title, x, y, WIDTH, height, x_label, y_label)
    for group, heights in points:
        for a, b in zip(group.values, heights, strict=True):
            if math.isfinite(a) and math.isfinite(b) and (a > 0 or not log):
                panel.add(marker(x(a), y(b), group.style, class_=f"dot {palette}{group.style}"))
    panel.add(words(WIDTH - RIGHT, 30, note, class_="note", text_anchor="end"))
    return panel.render(f"{y_label} against {x_label} over {sum(len(h) for _, h in points)} runs. {note}")


def intervals(
    title: str, rows: Sequence[Interval], *, x_label: str, span: tuple[float, float] | None = None, log: bool = False
) -> Markup:
    """One row for each interval: a marker at its value and a line from low to high; a rule at 0 where it is in view.

    A row without a name stands close below the one before it: another interval of the same thing.
    """
    numbers = [v for row in rows for v in (row.value, row.low, row.high)]
    heights, bottom = [], 18.0
    for row in rows:
        bottom += 30.0 if row.name else 13.0
        heights.append(bottom)
    bottom += 8.0
    x = scale_over(numbers, 4, WIDTH - 8, log=log) if span is None else Scale(*span, 8, WIDTH - 12)
    panel = Panel(title, x, Scale(0, 1, bottom, TOP - 8), WIDTH, bottom + 42, x_label, y_ticks=[])
    if x.low <= 0 <= x.high and not log:
        panel.add(line(x(0), TOP - 8, x(0), bottom, class_="zero"))
    for row, at in zip(rows, heights, strict=True):
        panel.add(words(4, at - 9, row.name, class_="row-name"))
        if math.isfinite(row.low) and math.isfinite(row.high):
            panel.add(line(*_flat(x.clipped(row.low), x.clipped(row.high), at), class_=f"whisker s{row.style}"))
        if math.isfinite(row.value):
            panel.add(marker(x.clipped(row.value), at, row.style, class_=f"dot s{row.style}"))
    said = "; ".join(f"{r.name or 'and'}: {_said(r.value)} ({_said(r.low)} to {_said(r.high)})" for r in rows)
    return panel.render(f"{x_label}. {said}.", grid="x")


def panels(*found: Markup, wide: bool = False) -> Markup:
    """Panels side by side where there is room, below each other where there is not."""
    return tag(
        "div", *(tag("div", panel, class_="panel") for panel in found), class_="panels wide" if wide else "panels"
    )


def figure(content: Markup, caption: Markup | str) -> Markup:
    return tag("figure", content, tag("figcaption", caption))


def bar_scale(title: str, stops: Sequence[str], ticks: Sequence[tuple[float, str]]) -> Markup:
    """A colour scale: `stops` are its colours from low to high, `ticks` positions in [0, 1] with their labels."""
    left, right = 14.0, WIDTH - 14.0
    wide = (right - left) / len(stops)
    cells = [
        tag("rect", x=left + i * wide, y=22.0, width=wide + 0.5, height=12.0, fill=colour)
        for i, colour in enumerate(stops)
    ]
    marks = [words(left + at * (right - left), 48, label, class_="tick", text_anchor="middle") for at, label in ticks]
    said = ", ".join(label for _, label in ticks)
    return figure_svg(WIDTH, 54, title, f"From {said}.", words(left, 14, title, class_="label"), join(*cells), *marks)


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the sample standard deviation (n - 1; 0 for one value)."""
    mean = _mean(values)
    if len(values) < 2:
        return mean, 0.0
    return mean, math.sqrt(math.fsum((v - mean) ** 2 for v in values) / (len(values) - 1))


def _ends(values: Sequence[float]) -> tuple[float, ...]:
    """One standard deviation below and above the mean, where there is one."""
    known = [v for v in values if math.isfinite(v)]
    if len(known) < 2:
        return ()
    mean, spread = mean_and_std(known)
    return mean - spread, mean + spread


def _said(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "–"


def _mean(values: Sequence[float]) -> float:
    return math.fsum(values) / len(values) if values else math.nan


def _lowest(values: Sequence[float]) -> float:
    return min(values, default=math.nan)


def _highest(values: Sequence[float]) -> float:
    return max(values, default=math.nan)


def _flat(x1: float, x2: float, y: float) -> tuple[float, float, float, float]:
    return x1, y, x2, y


def _described(groups: Sequence[Group], label: str) -> str:
    parts = []
    for group in groups:
        known = [v for v in group.values if math.isfinite(v)]
        if known:
            mean, spread = mean_and_std(known)
            parts.append(f"{group.name}: {mean:.4g} with standard deviation {spread:.2g} over {len(known)} runs")
    return f"{label}. " + "; ".join(parts) + "."
