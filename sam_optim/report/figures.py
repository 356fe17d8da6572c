"""Figures of many runs: values by group, curves with bands, scatters, intervals, a map of correlations."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from sam_optim.core.text import mean_and_std, signed
from sam_optim.report import canvas
from sam_optim.report.canvas import Axes, Figure, label, set_scale, styled


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
    """A value and its interval, and the numbers behind them. Without a name it is another interval of the row before
    it, drawn close below."""

    name: str
    value: float
    low: float
    high: float
    style: int = 0
    points: Sequence[float] = ()


def strip(title: str, groups: Sequence[Group], *, x_label: str, log: bool = False) -> Figure:
    """One row for each group: a marker for each run, and their mean with one standard deviation to both sides."""
    rows = []
    for group in groups:
        points = [v for v in group.values if math.isfinite(v)]
        mean, std = mean_and_std(points)
        rows.append(Interval(group.name, mean, mean - std, mean + std, group.style, points))
    return intervals(title, rows, x_label=x_label, log=log)


def curves(
    title: str,
    lines: Sequence[Curves],
    *,
    x_label: str,
    y_label: str,
    log: bool | None = False,
    size: tuple[float, float] = canvas.PANEL,
    below: bool = False,
) -> Figure:
    """The mean of the runs of each name, and the band between their lowest and highest; nan is a missing value.

    log: a logarithmic y axis; None where the values span more than a decade. below: the legend is below the axes, as
    it always is with more than four entries.
    """
    with styled(size) as figure:
        axes = figure.add_subplot()
        finite: list[float] = []
        for line in lines:
            columns = [[v for v in column if not math.isnan(v)] for column in zip(*line.runs, strict=True)]
            mean, low, high = ([f(c) if c else math.nan for c in columns] for f in (fmean, min, max))
            axes.plot(line.x, mean, color=_colour(line.style), linestyle=canvas.DASHES[line.style % len(canvas.DASHES)],
                      label=label(line.name, limit=40) or None)  # fmt: skip
            if len(line.runs) > 1:
                axes.fill_between(line.x, low, high, color=_colour(line.style), alpha=0.18, linewidth=0,
                                  label="lowest to highest" if line is lines[-1] else None)  # fmt: skip
            finite += [v for v in (*low, *high) if math.isfinite(v)]
        _finish(figure, axes, title, x_label=x_label, y_label=y_label)
        set_scale(axes.yaxis, finite, log)
        count = len(axes.get_legend_handles_labels()[1])
        if count > 4 or below:
            figure.set_figheight(size[1] + 0.18 * math.ceil(count / 2))
            figure.legend(loc="outside lower center", ncols=2, fontsize=8)
        elif count:
            axes.legend(loc="best", fontsize=8)
    return figure


def scatter(
    title: str,
    points: Sequence[tuple[Group, Sequence[float]]],
    *,
    x_label: str,
    y_label: str,
    note: str = "",
    log: bool = True,
    ordered: bool = False,
) -> Figure:
    """One marker for each run at (x, y): each group's values are x, the numbers beside it y.

    note: a line below the title, such as tau and its interval. log: of x, where every x is positive.
    ordered: the groups' styles are an order (learning rates, say): colours from dark to light.
    """
    pairs = [
        [(x, y) for x, y in zip(group.values, heights, strict=True) if math.isfinite(x) and math.isfinite(y)]
        for group, heights in points
    ]
    xs = [x for group in pairs for x, _ in group]
    with styled(canvas.PANEL) as figure:
        axes = figure.add_subplot()
        for (group, _), finite in zip(points, pairs, strict=True):
            x, y = zip(*finite, strict=True) if finite else ((), ())
            _markers(axes, x, y, group.style, ordered=ordered)
        _finish(figure, axes, title, note=note, x_label=x_label, y_label=y_label)
        set_scale(axes.xaxis, xs, log, most_ticks=5)
    return figure


def intervals(
    title: str, rows: Sequence[Interval], *, x_label: str, span: tuple[float, float] | None = None, log: bool = False
) -> Figure:
    """One row for each interval: a marker at its value and a line from low to high; a rule at 0 where it is in view."""
    heights = [0.0]
    for row in rows[1:]:
        heights.append(heights[-1] + (1.0 if row.name else 0.4))
    names = [label(row.name, width=20, limit=40) for row in rows]
    row_height = 0.1 + 0.14 * max((1 + name.count("\n") for name in names), default=1)
    with styled((canvas.PANEL[0], 1.6 + max(row_height, 0.3) * heights[-1])) as figure:
        axes = figure.add_subplot()
        for row, at in zip(rows, heights, strict=False):
            axes.plot([row.low, row.high], [at, at], color=_colour(row.style), linewidth=1.8)
            points = row.points or [row.value]
            _markers(axes, points, [at] * len(points), row.style)
            if row.points:
                axes.plot(row.value, at, "|", color=canvas.INK, markersize=14, markeredgewidth=1.6, zorder=4)
        named = [(name, at) for name, at in zip(names, heights, strict=False) if name]
        axes.set_yticks([at for _, at in named], [name for name, _ in named])
        axes.tick_params(axis="y", length=0, labelsize=8.5)
        axes.grid(axis="y", visible=False)
        axes.set_ylim(heights[-1] + 0.6, -0.6)
        _finish(figure, axes, title)
        axes.set_xlabel(label(x_label, width=24, limit=48))  # the names leave little room
        numbers = [v for row in rows for v in (row.value, row.low, row.high, *row.points) if math.isfinite(v)]
        if span is not None:
            axes.set_xlim(*span)
        else:
            drawable = [v for v in numbers if v > 0] if log else numbers  # a spread may reach below 0
            set_scale(axes.xaxis, drawable, log, most_ticks=5)
        if axes.get_xlim()[0] < 0 < axes.get_xlim()[1]:
            axes.axvline(0, color=canvas.SOFT, linewidth=1, linestyle="--", zorder=1)
    return figure


def heat_map(
    title: str,
    rows: Sequence[str],
    columns: Sequence[str],
    values: Sequence[Sequence[float]],
    *,
    firm: Sequence[Sequence[bool]] | None = None,
) -> Figure:
    """Correlations from blue (-1) to red (+1): `values[i][j]` is that of rows[i] and columns[j].

    firm: which of them the evidence supports; they are bold and framed.
    """
    with styled((2.8 + 0.95 * len(columns), 1.3 + 0.36 * max(len(rows), 3))) as figure:
        from matplotlib import colormaps
        from matplotlib.patches import Rectangle

        axes = figure.add_subplot()
        axes.grid(False)
        colours = colormaps[canvas.DIVERGING].resampled(41)  # of more, matplotlib draws the bar as a bitmap
        mesh = axes.pcolormesh(values, cmap=colours, vmin=-1, vmax=1, edgecolors="white", linewidth=2)
        for i, line in enumerate(values):
            for j, value in enumerate(line):
                ink = "white" if abs(value) > 0.6 else canvas.INK
                is_firm = firm is not None and firm[i][j] and math.isfinite(value)
                axes.text(j + 0.5, i + 0.5, signed(value), ha="center", va="center", color=ink, fontsize=9,
                          weight="bold" if is_firm else "normal")  # fmt: skip
                if is_firm:
                    axes.add_patch(Rectangle((j + 0.06, i + 0.09), 0.88, 0.82, fill=False, edgecolor=ink))
        axes.set_xticks([j + 0.5 for j in range(len(columns))], [label(c, width=13, limit=39) for c in columns])
        axes.set_yticks([i + 0.5 for i in range(len(rows))], [label(r, limit=30) for r in rows])
        axes.tick_params(length=0, labelsize=9, labeltop=True, labelbottom=False)
        axes.spines[:].set_visible(False)
        axes.invert_yaxis()
        bar = figure.colorbar(mesh, ax=axes, pad=0.03, aspect=18, ticks=[-1, -0.5, 0, 0.5, 1])
        bar.set_label("Kendall's tau")
        bar.outline.set_visible(False)
        _title(figure, title, width=20 + 12 * len(columns))
    return figure


def legend(names: Sequence[tuple[str, int]], *, ordered: bool = False) -> Figure:
    """Names with their markers, once for several panels. ordered: as in `scatter`."""
    with styled((7.2, 0.34 * math.ceil(len(names) / 4))) as figure:
        from matplotlib.lines import Line2D

        handles = [
            Line2D([], [], linestyle="none", marker=_marker(style), markersize=6,
                   color=_colour(style, ordered=ordered), label=label(name, limit=24))
            for name, style in names
        ]  # fmt: skip
        figure.legend(handles=handles, loc="center left", ncols=4, fontsize=9)
    return figure


def _colour(style: int, *, ordered: bool = False) -> Any:
    if not ordered:
        return canvas.COLOURS[style % len(canvas.COLOURS)]
    from matplotlib import colormaps

    return colormaps[canvas.SEQUENTIAL](0.9 * (style % len(canvas.COLOURS)) / (len(canvas.COLOURS) - 1))


def _markers(axes: Axes, x: Sequence[float], y: Sequence[float], style: int, *, ordered: bool = False) -> None:
    axes.plot(x, y, linestyle="none", marker=_marker(style), color=_colour(style, ordered=ordered), markersize=6,
              alpha=0.8, markeredgecolor="white", markeredgewidth=0.5, zorder=3)  # fmt: skip


def _marker(style: int) -> str:
    return canvas.MARKERS[style % len(canvas.MARKERS)]


def _finish(figure: Figure, axes: Axes, title: str, *, note: str = "", x_label: str = "", y_label: str = "") -> None:
    axes.set_xlabel(label(x_label, width=46, limit=92))
    axes.set_ylabel(label(y_label, width=24, limit=48))
    axes.set_title(label(note, width=48, limit=96), fontsize=9, fontweight="normal")
    _title(figure, title, width=40)


def _title(figure: Figure, title: str, *, width: int) -> None:
    figure.suptitle(label(title, width=width, limit=2 * width), x=0.02, ha="left", fontsize=10.5, fontweight="bold")
