"""Numbers with their spread, in tables for a page and for a terminal."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence

from sam_optim.report.charts import mean_and_std
from sam_optim.report.markup import Child, Markup, tag


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits without an exponent where it can be read without one; a dash for what is not there."""
    if value is None or not math.isfinite(value):
        return "–"
    if value == 0:
        return "0"
    size = _size(value)
    if size >= 6 or size < -4:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(digits - 1 - size, 0)}f}"


def with_error(value: float | None, error: float | None) -> str:
    """value ± error, to two digits of the error; the value alone where there is none."""
    if value is None or not math.isfinite(value) or error is None or not math.isfinite(error) or error <= 0:
        return number(value, 4)
    if not -4 <= _size(value) < 6 and value:
        return f"{value:.3e} ± {error:.1e}"
    decimals = 1 - _size(error)
    if decimals + _size(value or error) > 6:  # far more digits than anybody reads
        return f"{number(value, 6)} ± {error:.1e}"
    return f"{value:.{max(decimals, 0)}f} ± {number(error, 2)}"


def spread(values: Sequence[float | None], *, decimals: int | None = None) -> str:
    """mean ± standard deviation, to the same decimals; two digits of the deviation, at most four of the mean."""
    known = [v for v in values if v is not None and math.isfinite(v)]
    if not known:
        return "–"
    mean, std = mean_and_std(known)
    if len(known) < 2:
        return number(mean)
    if decimals is None:
        decimals = max(0, min(6, 1 - _size(std or mean), 3 - _size(mean)))
    return f"{mean:.{decimals}f} ± {std:.{decimals}f}"


def signed(value: float | None, decimals: int = 2) -> str:
    """With its sign, a real minus, and a dash for what is not there."""
    if value is None or not math.isfinite(value):
        return "–"
    return f"{value:+.{decimals}f}".replace("-", "−")


def html_table(
    head: Sequence[Child], rows: Sequence[Sequence[Child]], caption: Child, *, best: Collection[int] = ()
) -> Markup:
    """The first column names the rows; `best` are the numbers of rows to set off. It scrolls by itself where narrow."""
    top = tag("thead", tag("tr", *(tag("th", cell, scope="col") for cell in head)))
    body = tag(
        "tbody",
        *(
            tag(
                "tr",
                tag("th", row[0], scope="row"),
                *(tag("td", cell) for cell in row[1:]),
                class_="best" if i in best else None,
            )
            for i, row in enumerate(rows)
        ),
    )
    scroll = tag("div", tag("table", top, body), class_="scroll", tabindex=0, role="region", aria_label=str(caption))
    return tag("figure", tag("figcaption", caption), scroll, class_="table")


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned for a terminal: names to the left, numbers to the right."""
    cells = [list(map(str, head)), *(list(map(str, row)) for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(head))]
    lines = [
        "  ".join(
            cell.ljust(w) if i == 0 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))
        )
        for row in cells
    ]
    return "\n".join([lines[0], "  ".join("-" * w for w in widths), *lines[1:]])


def _size(value: float) -> int:
    """The power of ten of the leading digit; 0 for 0."""
    return math.floor(math.log10(abs(value))) if value else 0
