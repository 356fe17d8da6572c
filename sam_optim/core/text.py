"""Plain text: numbers with their errors, tables for a terminal, CSV, and names that cannot harm either."""

from __future__ import annotations

import csv
import io
import math
import re
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

MISSING = "–"

# Control characters (terminal escapes among them), lone surrogates, and what reorders the text around it.
_BREAKS = "\t\n\r\u2028\u2029"
_HARMFUL = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
_HARMFUL_OR_BREAK = re.compile(f"{_HARMFUL.pattern}|[{_BREAKS}]")
_FORMULA = re.compile("\\s*[=+\\-@\t\r\n]")


def printable(text: str, *, one_line: bool = True) -> str:
    """`text` with a replacement character for each control character, bidirectional control and lone surrogate.

    one_line: also for tabs and line breaks, which would tear a table apart.
    """
    return (_HARMFUL_OR_BREAK if one_line else _HARMFUL).sub("�", text)


def shortened(text: str, limit: int = 44) -> str:
    """The end of a long name, because paths differ at the end."""
    return text if len(text) <= limit else "…" + text[1 - limit :]


def number(value: float | None, digits: int = 3) -> str:
    """Significant digits, without an exponent where it can be read without one; a dash for a missing value."""
    if value is None or not math.isfinite(value):
        return MISSING
    if value == 0:
        return "0"
    magnitude = _magnitude(value)
    if magnitude >= 6 or magnitude < -4:
        return f"{value:.{digits - 1}e}"
    return f"{value:.{max(digits - 1 - magnitude, 0)}f}"


def with_error(value: float | None, error: float | None) -> str:
    """value ± error, to two digits of the error; the value alone where there is none."""
    if value is None or not math.isfinite(value) or error is None or not math.isfinite(error) or error <= 0:
        return number(value, 4)
    if not -4 <= _magnitude(value) < 6 and value:
        return f"{value:.3e} ± {error:.1e}"
    decimals = 1 - _magnitude(error)
    if decimals + _magnitude(value or error) > 6:  # far more digits than anybody reads
        return f"{number(value, 6)} ± {error:.1e}"
    return f"{value:.{max(decimals, 0)}f} ± {number(error, 2)}"


def spread(values: Sequence[float | None], *, decimals: int | None = None) -> str:
    """mean ± standard deviation, to the same decimals; two digits of the deviation, at most four of the mean."""
    finite = [v for v in values if v is not None and math.isfinite(v)]
    if not finite:
        return MISSING
    mean, std = mean_and_std(finite)
    if len(finite) < 2:
        return number(mean)
    if decimals is None:
        decimals = max(0, min(6, 1 - _magnitude(std or mean), 3 - _magnitude(mean)))
    return f"{mean:.{decimals}f} ± {std:.{decimals}f}"


def signed(value: float | None, decimals: int = 2) -> str:
    """The value with its sign, a real minus, and a dash for a missing value."""
    if value is None or not math.isfinite(value):
        return MISSING
    return f"{value:+.{decimals}f}".replace("-", "−")


def mean_and_std(values: Sequence[float]) -> tuple[float, float]:
    """The mean and the sample standard deviation (n - 1; 0 for one value, nan for none)."""
    mean = math.fsum(values) / len(values) if values else math.nan
    return mean, statistics.stdev(values) if len(values) > 1 else 0.0


def text_table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns aligned for a terminal: names to the left, numbers to the right. Cells are made `printable`."""
    cells = [[printable(str(cell)) for cell in row] for row in (head, *rows)]
    widths = [max(map(len, column)) for column in zip(*cells, strict=True)]
    aligned = [[cell.rjust(width) for cell, width in zip(row, widths, strict=True)] for row in cells]
    lines = ["  ".join([row[0].ljust(widths[0]), *padded[1:]]) for row, padded in zip(cells, aligned, strict=True)]
    return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])


def csv_text(head: Sequence[str], rows: Sequence[Sequence[Any]]) -> str:
    """A CSV file; None is an empty cell. No text in it can run as a formula in a spreadsheet (`csv_cell`)."""
    out = io.StringIO()
    writer = csv.writer(out, lineterminator="\n")
    writer.writerows([csv_cell(cell) for cell in row] for row in (head, *rows))
    return out.getvalue()


def csv_cell(value: Any) -> Any:
    """Text made `printable`, with an apostrophe where it begins with = + - @ (after blanks, too) and is no number."""
    if not isinstance(value, str):
        return value
    try:
        float(value)
    except ValueError:
        return "'" * bool(_FORMULA.match(value)) + printable(value)
    return value


def headline(result: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """The number of a result (its `to_dict()`) and its error: a standard error, or for an eigenvalue the bound of its
    error, else its residual. A spectral density has neither."""
    if "density" in result:
        return None, None
    if "eigenvalues" in result:
        values = result["eigenvalues"]
        errors = result.get("errors") or result.get("residuals") or [None]
        return (values[0], errors[0]) if values else (None, None)
    return result.get("value"), result.get("stderr")


def cell(result: Mapping[str, Any]) -> str:
    """A result (its `to_dict()`) in a few characters."""
    if result.get("density"):
        return f"density at {len(result['density'])} points"
    if not is_finite(result):
        return "no number"
    if len(result.get("eigenvalues") or []) > 1:
        text = ", ".join(number(value, 4) for value in result["eigenvalues"])
    else:
        text = with_error(*headline(result))
    return text if result.get("converged", True) else f"{text} (not converged)"


def is_finite(result: Mapping[str, Any]) -> bool:
    values = result.get("density") or result.get("eigenvalues") or [result.get("value")]
    return all(value is not None and math.isfinite(value) for value in values)


def _magnitude(value: float) -> int:
    """The power of ten of the leading digit; 0 for 0."""
    return math.floor(math.log10(abs(value))) if value else 0
