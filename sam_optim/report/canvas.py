"""One style for every figure, and a figure as SVG for a page. Needs matplotlib, the extra `plot`.

Figures are created without pyplot: no window, no global state, any thread.
"""

from __future__ import annotations

import io
import math
import re
import textwrap
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from sam_optim.core.files import write_atomic
from sam_optim.core.text import printable, shortened

# Okabe and Ito (2008), "Color Universal Design", and a grey. Dashes and markers: colour is never the only difference.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#555B66")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))
MARKERS = ("o", "s", "D", "^", "v", "X")
SEQUENTIAL, DIVERGING = "viridis", "RdBu_r"
INK, SOFT = "#1d2026", "#454b55"

SIZE = (5.6, 4.0)  # inches: a figure that stands alone
PANEL = (3.6, 2.9)  # inches: one of several on a page
DECADES = 1.0  # losses that span more are drawn on a logarithmic axis

Figure = Any  # matplotlib's, which may be missing
Axes = Any


@contextmanager
def styled(size: tuple[float, float] = SIZE) -> Iterator[Figure]:
    """A new figure; what is drawn inside `with` has the style of the package. matplotlib's settings come back.

    Args:
        size: width and height, in inches.

    Raises:
        ImportError: without matplotlib.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure as MatplotlibFigure
    except ImportError as error:
        raise ImportError("figures need matplotlib: pip install 'sam_optim[plot]'") from error
    with matplotlib.rc_context(fname=Path(__file__).with_name("figures.mplstyle")):
        figure = MatplotlibFigure(figsize=size, layout="constrained")
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # type: ignore[call-arg, union-attr]
        yield figure


def save(figure: Figure, path: Path, dpi: int = 200) -> None:
    """The figure in a file, whole or not at all; the ending of its name says which format (png, pdf, svg)."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format=path.suffix[1:] or "png", dpi=dpi)
    write_atomic(path, buffer.getvalue(), "path")


def rendered(figure: Figure, kind: str, **options: Any) -> bytes:
    """The bytes of a file of the kind png, pdf or svg, of a figure whose names stand on a page as well."""
    buffer = io.BytesIO()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph .* missing from")  # the browser has more fonts
        figure.savefig(buffer, format=kind, **options)
    return buffer.getvalue()


def label(text: str, *, width: int | None = None, limit: int = 60) -> str:
    """Text for a figure: printable, shortened to `limit` characters, in lines of `width`, no dollar read as TeX."""
    text = shortened(printable(text), limit)
    return ("\n".join(textwrap.wrap(text, width, break_on_hyphens=False)) if width else text).replace("$", r"\$")


def is_logarithmic(values: Sequence[float], log: bool | None) -> bool:
    """Whether an axis of these finite values is logarithmic: as asked; None where they span more than a decade."""
    positive = bool(values) and min(values) > 0
    return positive and (math.log10(max(values) / min(values)) > DECADES if log is None else log)


def log_ticks(low: float, high: float, *, most: int = 8) -> list[float]:
    """At most `most` round numbers between low and high, at about equal ratios; powers of ten if there are enough."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        ticks = [m * 10.0**k for k in decades for m in multiples if low <= m * 10.0**k <= high]
        if len(ticks) > most / 2:
            return ticks[:: math.ceil(len(ticks) / most)]
    return linear_ticks(low, high)


def linear_ticks(low: float, high: float) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    return [float(t) for t in MaxNLocator(6).tick_values(low, high) if low <= t <= high]


def set_scale(axis: Any, values: Sequence[float], log: bool | None, *, most_ticks: int = 8) -> None:
    """A logarithmic axis around these values where `is_logarithmic` says so; with 0.05, 0.1, 0.2 instead of powers of
    ten where it spans few decades."""
    if not is_logarithmic(values, log):
        return
    low, high = min(values), max(values)
    room = max((high / low) ** 0.06, 1.1)
    low, high = low / room, high * room
    axis.axes.set(**{f"{axis.axis_name}scale": "log", f"{axis.axis_name}lim": (low, high)})
    if math.log10(high / low) < 3:
        ticks = log_ticks(low, high, most=most_ticks)
        axis.set_ticks(ticks, [f"{t:g}" for t in ticks])
        axis.set_ticks([], minor=True)


def svg(figure: Figure) -> str:
    """The figure as an <svg> element that needs no address, script or style outside it; the same bytes every time."""
    import matplotlib

    with matplotlib.rc_context({"svg.fonttype": "none", "svg.hashsalt": "sam_optim"}):
        text = rendered(figure, "svg", metadata={"Date": None}).decode()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>|<!--.*?-->", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*"', "<g", text)  # every figure has an axes_1
    view, rest = re.match(r'<svg [^>]*?(viewBox="[^"]*")[^>]*>(.*)', text, flags=re.DOTALL).groups()  # type: ignore[union-attr]
    return f'<svg {view} style="max-width: {1.2 * figure.get_size_inches()[0]:.2f}in">{rest}'
