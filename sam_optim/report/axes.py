"""One panel of a figure: scales, ticks, and marks in SVG that take their colours from the page's style sheet."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field

from sam_optim.report.markup import Child, Markup, join, tag, text


@dataclass(frozen=True)
class Scale:
    """Numbers from low to high onto pixels from start to end, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, value = (self._warp(v) for v in (self.low, self.high, value))
        return self.start + (value - low) / (high - low) * (self.end - self.start)

    def clipped(self, value: float) -> float:
        return self(min(max(value, self.low), self.high))

    def ticks(self, count: int = 5) -> list[float]:
        return log_ticks(self.low, self.high, count) if self.log else linear_ticks(self.low, self.high, count)

    def _warp(self, value: float) -> float:
        return math.log10(max(value, 1e-300)) if self.log else value


def scale_over(
    values: Sequence[float], start: float, end: float, *, log: bool = False, zero: bool = False, pad: float = 0.06
) -> Scale:
    """The scale that shows all finite values with some room around them (only positive ones if logarithmic)."""
    known = [v for v in values if math.isfinite(v) and (v > 0 or not log)] or [1.0]
    low, high = min(known), max(known)
    if log:
        room = max(math.log10(high / low) * pad, 0.08)
        return Scale(low / 10**room, high * 10**room, start, end, log=True)
    room = (high - low) * pad or abs(high) * pad or 1.0
    return Scale(0.0 if zero and low >= 0 else low - room, high + room, start, end)


def linear_ticks(low: float, high: float, count: int) -> list[float]:
    """About `count` round numbers (1, 2 or 5 times a power of ten) between low and high."""
    raw = (high - low) / max(count, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(m * power for m in (1, 2, 5, 10) if m * power >= raw * 0.75)
    first = math.ceil(low / step - 1e-9)
    last = math.floor(high / step + 1e-9)
    return [round(i * step, 12) + 0.0 for i in range(first, last + 1)]


def log_ticks(low: float, high: float, count: int) -> list[float]:
    """Powers of ten, with others between them where there are few; between 1.04 and 1.9, say, as on a linear scale."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1,), (1, 3), (1, 2, 5), (1, 2, 3, 4, 5, 6, 7, 8, 9)):
        found = [m * 10.0**k for k in decades for m in multiples if low <= m * 10.0**k <= high]
        if len(found) >= 3:
            break
    if len(found) < 2:
        return linear_ticks(low, high, count)
    every = math.ceil(len(found) / max(count + 1, 1))
    return found[::every]


def short(value: float) -> str:
    """A tick label: 0.05, 20, 15k, 1.2e-5."""
    if value and (abs(value) >= 1e6 or abs(value) < 1e-3):
        return f"{value:.1e}".replace(".0e", "e").replace("e-0", "e-").replace("e+0", "e")
    if abs(value) >= 10_000:
        return f"{value / 1000:g}k"
    return f"{value:.6g}"


@dataclass
class Panel:
    """An SVG of `width` x `height` pixels with axes; marks are added, then it is rendered with a description.

    Small panels in a grid that wraps stay readable on a telephone where one wide picture does not.
    """

    title: str
    x: Scale
    y: Scale
    width: float
    height: float
    x_label: str = ""
    y_label: str = ""
    x_ticks: Sequence[tuple[float, str]] | None = None
    y_ticks: Sequence[tuple[float, str]] | None = None
    marks: list[Markup] = field(default_factory=list)

    def add(self, *marks: Markup) -> None:
        self.marks.extend(marks)

    def render(self, description: str, *, grid: str = "xy") -> Markup:
        """The finished panel; `description` is what a reader who cannot see it is told."""
        return figure_svg(
            self.width, self.height, self.title, description, self._axes(grid), *self.marks, self._labels()
        )

    def _axes(self, grid: str) -> Markup:
        parts = []
        for value, label in self._ticks(self.x, self.x_ticks, 5):
            at = self.x(value)
            if "x" in grid:
                parts.append(line(at, self.y.start, at, self.y.end, class_="grid"))
            parts.append(words(at, self.y.start + 16, label, class_="tick", text_anchor="middle"))
        for value, label in self._ticks(self.y, self.y_ticks, 5):
            at = self.y(value)
            if "y" in grid:
                parts.append(line(self.x.start, at, self.x.end, at, class_="grid"))
            parts.append(words(self.x.start - 7, at + 3.6, label, class_="tick", text_anchor="end"))
        parts.append(line(self.x.start, self.y.start, self.x.end, self.y.start, class_="axis"))
        return join(*parts)

    def _labels(self) -> Markup:
        middle = (self.x.start + self.x.end) / 2
        return join(
            words(self.x.start, 14, self.title, class_="panel-title"),
            words(self.x.start, 30, self.y_label, class_="label") if self.y_label else None,
            words(middle, self.y.start + 34, self.x_label, class_="label", text_anchor="middle")
            if self.x_label
            else None,
        )

    @staticmethod
    def _ticks(scale: Scale, given: Sequence[tuple[float, str]] | None, count: int) -> Sequence[tuple[float, str]]:
        return [(v, short(v)) for v in scale.ticks(count)] if given is None else given


def figure_svg(width: float, height: float, title: str, description: str, *children: Child) -> Markup:
    return tag(
        "svg",
        tag("title", title),
        tag("desc", description),
        *children,
        viewBox=f"0 0 {width:g} {height:g}",
        role="img",
        aria_label=f"{title}. {description}",
        xmlns=None,
    )


def line(x1: float, y1: float, x2: float, y2: float, **attributes: object) -> Markup:
    return tag("line", x1=float(x1), y1=float(y1), x2=float(x2), y2=float(y2), **attributes)


def words(x: float, y: float, content: str, **attributes: object) -> Markup:
    return tag("text", text(content), x=float(x), y=float(y), **attributes)


def path(points: Sequence[tuple[float, float]], **attributes: object) -> Markup:
    """A line through the points; it breaks where one is not finite."""
    steps, pen = [], "M"
    for x, y in points:
        if math.isfinite(x) and math.isfinite(y):
            steps.append(f"{pen}{x:.1f} {y:.1f}")
            pen = "L"
        else:
            pen = "M"
    return tag("path", d="".join(steps), **attributes)


SHAPES = ("circle", "square", "diamond", "up", "down", "cross")
_ARM = ((-1.2, -0.4), (-0.4, -0.4), (-0.4, -1.2))  # of the cross, turned by a quarter three times
CORNERS: dict[str, list[tuple[float, float]]] = {
    "square": [(-1, -1), (1, -1), (1, 1), (-1, 1)],
    "diamond": [(0, -1.35), (1.35, 0), (0, 1.35), (-1.35, 0)],
    "up": [(0, -1.3), (1.2, 0.9), (-1.2, 0.9)],
    "down": [(0, 1.3), (1.2, -0.9), (-1.2, -0.9)],
    "cross": [(s * a - t * b, t * a + s * b) for s, t in ((1, 0), (0, 1), (-1, 0), (0, -1)) for a, b in _ARM],
}


def marker(x: float, y: float, shape: int, **attributes: object) -> Markup:
    """One of six shapes of like area, so that colour is never the only difference."""
    r = 4.3
    kind = SHAPES[shape % len(SHAPES)]
    if kind == "circle":
        return tag("circle", cx=float(x), cy=float(y), r=r, **attributes)
    size = r * 0.9
    return tag(
        "polygon", points=" ".join(f"{x + size * a:.1f},{y + size * b:.1f}" for a, b in CORNERS[kind]), **attributes
    )
