"""One map of many correlations: a row for each measure, a column for each target, colour from -1 to +1."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from sam_optim.report.axes import figure_svg, words
from sam_optim.report.markup import Markup, join, tag
from sam_optim.report.tables import signed

# Blue to red over near-white: readable with the common colour deficiencies, and the number stands in every cell.
COLD, ZERO, WARM = (33, 102, 172), (247, 247, 247), (178, 24, 43)
CELL, HEIGHT, CHARACTER = 98.0, 30.0, 6.2
TITLE = 7.0  # a character of the title
LEAST = 400.0  # width below which a map is scrolled, not shrunk


@dataclass(frozen=True)
class Square:
    """value: in [-1, 1], or nan. firm: whether the evidence survives; the others are drawn pale."""

    value: float
    firm: bool = True
    about: str = ""


def matrix(title: str, rows: Sequence[str], columns: Sequence[str], squares: Sequence[Sequence[Square]]) -> Markup:
    """`squares[i][j]` is that of rows[i] and columns[j]."""
    left = max(len(name) for name in rows) * CHARACTER + 14
    top = 46.0
    width = max(left + CELL * len(columns), len(title) * TITLE)
    height = top + HEIGHT * len(rows) + 6
    parts = [
        words(left + CELL * (j + 0.5), top - 8, name, class_="tick", text_anchor="middle")
        for j, name in enumerate(columns)
    ]
    for i, (name, line) in enumerate(zip(rows, squares, strict=True)):
        y = top + HEIGHT * i
        parts.append(words(left - 10, y + HEIGHT / 2 + 4, name, class_="note", text_anchor="end"))
        parts += [_square(left + CELL * j, y, square) for j, square in enumerate(line)]
    said = "; ".join(
        f"{name}: {', '.join(f'{c} {signed(s.value)}' for c, s in zip(columns, line, strict=True))}"
        for name, line in zip(rows, squares, strict=True)
    )
    drawn = figure_svg(width, height, title, said, words(0, 14, title, class_="panel-title"), *parts)
    style = f"max-width: {width:.0f}px; --least: {min(width, LEAST):.0f}px"
    return tag("div", drawn, class_="matrix", style=style, tabindex=0, role="region", aria_label=title)


def colour(value: float) -> str:
    """#rrggbb for a value in [-1, 1]."""
    end = WARM if value > 0 else COLD
    share = min(abs(value), 1.0)
    return "#" + "".join(f"{round(z + share * (e - z)):02x}" for z, e in zip(ZERO, end, strict=True))


def _square(x: float, y: float, square: Square) -> Markup:
    known = math.isfinite(square.value)
    fill = colour(square.value) if known else "none"
    ink = "#ffffff" if known and abs(square.value) > 0.55 else "#1d2026"
    box = tag("rect", x=x + 1, y=y + 1, width=CELL - 2, height=HEIGHT - 2, rx=3.0, fill=fill, class_="cell")
    if known and square.firm:
        frame = tag("rect", x=x + 2, y=y + 2, width=CELL - 4, height=HEIGHT - 4, rx=3.0, class_="firm", stroke=ink)
    else:
        frame = None
    style = f"fill: {ink}; font-weight: {650 if square.firm else 400}" if known else None
    number = words(
        x + CELL / 2, y + HEIGHT / 2 + 4, signed(square.value), class_="note", text_anchor="middle", style=style
    )
    return tag("g", tag("title", square.about) if square.about else None, join(box, frame, number))
