"""Pictures of results with matplotlib (the extra `plot`): landscapes, spectra, slices with a band over directions.

Figures are made without pyplot: no window, no global state, any thread. Colours are those of the page's style sheet and
of viridis, as in the page: readers with any colour vision can tell them apart.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sam_optim.core.results import Landscape, Spectrum

COLOURS = ("#1767b3", "#c2410c", "#0f8a6c", "#a23b87", "#b7791f", "#5b6270")
DASHES = ("-", "--", "-.", ":", (0, (5, 1, 1, 1, 1, 1)), (0, (1, 1)))  # colour is never the only difference
MAP = "viridis"
DECADES = 1.0  # losses that span more are shown on a logarithmic scale
STYLE: Any = {
    "font.size": 10,
    "font.family": "sans-serif",
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.edgecolor": "#555b66",
    "axes.labelcolor": "#1d2026",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "axes.titlelocation": "left",
    "axes.grid": True,
    "grid.color": "#ebe8e1",
    "xtick.color": "#555b66",
    "ytick.color": "#555b66",
    "legend.frameon": False,
    "lines.linewidth": 2,
    "figure.facecolor": "white",
}
Figure = Any  # matplotlib's, which may be missing


def contour_picture(
    landscape: Landscape,
    *,
    title: str = "",
    trace: Tensor | None = None,
    log: bool | None = None,
    loss_label: str = "loss",
) -> Figure:
    """A plane of losses from above: filled contours, and a cross at the weights.

    Args:
        landscape: of `slice_2d`; the first direction is drawn upwards, the second to the right.
        trace: (n, 2), positions in the plane, such as `trajectory.coordinates`: drawn as a line from first to last.
        log: colours by the logarithm of the loss; None where the losses span more than a decade.
        loss_label: what the losses are, with their unit.

    Returns:
        A matplotlib Figure: `figure.savefig("landscape.png", dpi=200)`.

    Raises:
        ImportError: without matplotlib. ValueError: a landscape that is no plane, or has no finite loss.
    """
    rows, columns = _plane(landscape)
    with styled() as figure:
        axes = figure.add_subplot()
        axes.grid(False)
        drawn, norm, ticks, _ = _levels(landscape.losses, log)
        filled = axes.contourf(columns, rows, drawn, levels=norm.boundaries, norm=norm, cmap=MAP, extend=norm.extend)
        axes.contour(columns, rows, drawn, levels=norm.boundaries, colors="white", linewidths=0.5, alpha=0.5)
        axes.set(xlabel=_axis_label(landscape, 1), ylabel=_axis_label(landscape, 0), title=title)
        if trace is not None:
            points = trace.detach().cpu().double()
            axes.plot(points[:, 1], points[:, 0], color="white", linewidth=3)
            axes.plot(points[:, 1], points[:, 0], color=COLOURS[1], linewidth=1.5, marker="o", markersize=3.5)
        if rows[0] <= 0 <= rows[-1] and columns[0] <= 0 <= columns[-1]:
            axes.plot(0, 0, marker="X", color="white", markeredgecolor="black", markersize=10, clip_on=False, zorder=5)
        _colour_bar(figure, filled, axes, ticks, loss_label)
    return figure


def surface_picture(
    landscape: Landscape,
    *,
    title: str = "",
    log: bool | None = None,
    loss_label: str = "loss",
    elevation: float = 32.0,
    azimuth: float = -58.0,
) -> Figure:
    """A plane of losses as a surface in perspective.

    Args:
        elevation, azimuth: of the eye, in degrees.
        landscape, title, log, loss_label: as in `contour_picture`.
    """
    rows, columns = _plane(landscape)
    with styled(6.0, 4.8) as figure:
        from matplotlib.ticker import MaxNLocator

        axes = figure.add_subplot(projection="3d")
        losses, norm, _, logarithmic = _levels(landscape.losses, log)
        heights = torch.from_numpy(losses).clamp(max=norm.boundaries[-1])
        heights = heights.log10() if logarithmic else heights
        x, y = torch.meshgrid(columns, rows, indexing="xy")
        low, high = float(heights.min()), float(heights.max())
        axes.plot_surface(
            x.numpy(), y.numpy(), heights.numpy(), cmap=MAP, rcount=80, ccount=80, linewidth=0.15, edgecolor="#00000040"
        )
        floor = low - 0.3 * (high - low or 1.0)
        axes.contourf(x.numpy(), y.numpy(), heights.numpy(), zdir="z", offset=floor, levels=14, cmap=MAP, alpha=0.85)
        axes.set_xlabel("second direction", labelpad=6)
        axes.set_ylabel("first direction", labelpad=6)
        axes.set_title(title, y=1.0)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5))
        axes.set_zlim(floor, high)
        axes.set_zlabel(loss_label + (" (logarithmic)" if logarithmic else ""), labelpad=8)
        if logarithmic:
            ticks = [t for t in _log_ticks(10**low, 10**high) if low <= math.log10(t) <= high]
            axes.set_zticks([math.log10(t) for t in ticks], [f"{t:g}" for t in ticks])
        axes.view_init(elev=elevation, azim=azimuth)
        axes.set_box_aspect((1, 1, 0.72), zoom=0.9)
        for pane in (axes.xaxis, axes.yaxis, axes.zaxis):
            pane.set_pane_color((1, 1, 1, 0))
    return figure


def slices_picture(
    slices: Landscape | Mapping[str, Landscape],
    *,
    title: str = "",
    log: bool | None = None,
    loss_label: str = "loss",
    x_label: str | None = None,
) -> Figure:
    """Lines of losses: one for each name. A slice over several directions is their mean with the band from the lowest
    to the highest; an interpolation has its chord and its barrier.

    Args:
        slices: of `slice_1d` or `interpolate`, alone or by name.
        log: a logarithmic axis of losses; None where they span more than a decade.
        title, loss_label: as in `contour_picture`. x_label: None says what the direction is.
    """
    named = {"": slices} if isinstance(slices, Landscape) else dict(slices)
    if not named or any(len(s.coordinates) != 1 for s in named.values()):
        raise ValueError("slices_picture draws landscapes with one axis (slice_1d, interpolate): for a plane there are "
                         "contour_picture and surface_picture")  # fmt: skip
    with styled() as figure:
        axes = figure.add_subplot()
        finite: list[float] = []
        for k, (name, s) in enumerate(named.items()):
            axis, colour = s.coordinates[0], COLOURS[k % len(COLOURS)]
            every = torch.as_tensor(s.directions.get("losses", s.losses[None]), dtype=torch.float64)
            finite += every[every.isfinite()].tolist()
            count = f"mean of {len(every)} directions" if len(every) > 1 else ""
            label = ", ".join(part for part in (name, count) if part)
            axes.plot(axis, s.losses, color=colour, linestyle=DASHES[k % len(DASHES)], label=label or None)
            if len(every) > 1:
                axes.fill_between(axis, every.amin(0), every.amax(0), color=colour, alpha=0.18, linewidth=0,
                                  label="lowest to highest" if k == len(named) - 1 else None)  # fmt: skip
            if s.directions.get("kind") == "interpolation":
                _chord(axes, s, colour)
        first = next(iter(named.values()))
        axes.set(xlabel=x_label or _axis_label(first, 0), ylabel=loss_label, title=title)
        if _logarithmic(finite, log):
            axes.set_yscale("log")
            _plain_log_axis(axes.yaxis, min(finite), max(finite))
        if axes.get_legend_handles_labels()[1]:
            axes.legend(loc="best")
    return figure


def spectrum_picture(spectrum: Spectrum, *, title: str = "", unit: str = "") -> Figure:
    """The spectral density on a logarithmic scale with a rule at each known eigenvalue, or the eigenvalues alone.

    Args:
        spectrum: of `spectral_density`, or of `hessian_eigenvalues`: these are drawn by rank, with their residuals.
        unit: of the eigenvalues, for the label.
    """
    values = spectrum.eigenvalues[spectrum.eigenvalues.isfinite()]
    label = f"eigenvalue, {unit}" if unit else "eigenvalue"
    with styled() as figure:
        axes = figure.add_subplot()
        if spectrum.grid is not None and spectrum.density is not None:
            _density(axes, spectrum, values)
            axes.set(xlabel=label, ylabel="density of eigenvalues (logarithmic)", title=title)
        elif len(values):
            _ranked(axes, spectrum, values)
            axes.set(xlabel="rank, from the largest", ylabel=label, title=title)
        else:
            raise ValueError(f"the spectrum has no eigenvalues to draw: {spectrum.reason or 'it is empty'}")
    return figure


def save_picture(result: Landscape | Spectrum, path: str | Path, *, kind: str | None = None, **options: Any) -> Path:
    """The picture of a result in a file; the ending of its name says which format (png, pdf, svg).

    Args:
        kind: "contour" or "surface" for a plane (None: contour), "slices" for a line, "spectrum".
        options: of the function of that name.
    """
    usual = "spectrum" if isinstance(result, Spectrum) else ("contour" if len(result.coordinates) == 2 else "slices")
    if (kind or usual) not in PICTURES:
        raise ValueError(f"kind must be one of {', '.join(PICTURES)}, got {kind!r}")
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    PICTURES[kind or usual](result, **options).savefig(path, dpi=160)
    return path


PICTURES: dict[str, Callable[..., Figure]] = {
    "contour": contour_picture,
    "surface": surface_picture,
    "slices": slices_picture,
    "spectrum": spectrum_picture,
}


class styled(AbstractContextManager[Any]):
    """A figure in the style of the package, with matplotlib's own settings as they were afterwards."""

    def __init__(self, width: float = 5.6, height: float = 4.0):
        try:
            import matplotlib
            from matplotlib.backends.backend_agg import FigureCanvasAgg
            from matplotlib.figure import Figure as Made
        except ImportError as error:
            raise ImportError("pictures need matplotlib: pip install 'sam_optim[plot]'") from error
        self._settings = matplotlib.rc_context(STYLE)
        self._make = lambda: FigureCanvasAgg(Made(figsize=(width, height), layout="constrained")).figure

    def __enter__(self) -> Figure:
        self._settings.__enter__()
        figure = self._make()
        figure.get_layout_engine().set(w_pad=0.08, h_pad=0.08)  # type: ignore[call-arg, union-attr]
        return figure

    def __exit__(self, *exc: Any) -> None:
        self._settings.__exit__(*exc)


def _plane(landscape: Landscape) -> tuple[Tensor, Tensor]:
    if len(landscape.coordinates) != 2 or min(landscape.losses.shape) < 2:
        raise ValueError(
            f"a plane has two axes of two points or more, got losses of shape {tuple(landscape.losses.shape)}"
        )
    if not bool(landscape.losses.isfinite().any()):
        raise ValueError("no loss of this landscape is finite: look nearer, with smaller coordinates")
    return landscape.coordinates


def _levels(losses: Tensor, log: bool | None) -> tuple[Any, Any, list[float], bool]:
    """Losses to draw (what is not finite is above all), a norm with `boundaries`, ticks, whether it is logarithmic."""
    import numpy as np
    from matplotlib.colors import BoundaryNorm

    finite = losses[losses.isfinite()].tolist()
    low, high = min(finite), max(finite)
    logarithmic = _logarithmic(finite, log)
    if high - low < 1e-12 * max(abs(high), 1e-12):
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)  # flat: one band
    if logarithmic:
        boundaries = np.geomspace(low, high * (1 + 1e-9), 24)
        ticks = [t for t in _log_ticks(low, high) if low <= t <= high]
    else:
        boundaries = np.linspace(low, high + 1e-9 * (high - low), 24)
        ticks = _round_ticks(low, high)
    norm = BoundaryNorm(boundaries, 256, extend="neither" if bool(losses.isfinite().all()) else "max")
    drawn = torch.nan_to_num(losses.double(), nan=2 * abs(high) + 1, posinf=2 * abs(high) + 1).numpy()
    return drawn, norm, ticks, logarithmic


def _logarithmic(finite: Sequence[float], log: bool | None) -> bool:
    positive = bool(finite) and min(finite) > 0
    return positive and (math.log10(max(finite) / min(finite)) > DECADES if log is None else log)


def _log_ticks(low: float, high: float) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    for multiples in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 4, 5, 6, 7, 8, 9)):
        found = [m * 10.0**k for k in decades for m in multiples if low <= m * 10.0**k <= high]
        if len(found) >= 4:
            break
    return found[:: math.ceil(len(found) / 8)] if found else [low]


def _round_ticks(low: float, high: float) -> list[float]:
    from matplotlib.ticker import MaxNLocator

    return [float(t) for t in MaxNLocator(6).tick_values(low, high) if low <= t <= high]


def _plain_log_axis(axis: Any, low: float, high: float) -> None:
    """0.05, 0.1, 0.2 instead of powers of ten, where they span few decades."""
    if math.log10(high / low) < 3:
        ticks = _log_ticks(low / 1.2, high * 1.2)
        axis.set_ticks(ticks, [f"{t:g}" for t in ticks])
        axis.set_ticks([], minor=True)


def _colour_bar(figure: Figure, drawn: Any, axes: Any, ticks: Sequence[float], label: str) -> None:
    bar = figure.colorbar(drawn, ax=axes, ticks=ticks, pad=0.03, aspect=26)
    bar.ax.set_yticklabels([f"{t:g}" for t in ticks])
    bar.set_label(label)
    bar.ax.minorticks_off()
    bar.outline.set_visible(False)


def _axis_label(landscape: Landscape, axis: int) -> str:
    about = landscape.directions
    if about.get("kind") == "interpolation":
        return "from these weights (0) to the others (1)"
    which = ("first ", "second ")[axis] if len(landscape.coordinates) == 2 else ""
    if about.get("kind") == "random":
        return f"{which}random direction (1: each filter by its norm)"
    norm = about.get("norms", [math.nan, math.nan])[axis]
    return f"distance along {which or 'the '}direction" + (
        ", units of w" if abs(norm - 1) < 1e-6 else f" of length {norm:.3g}"
    )


def _chord(axes: Any, landscape: Landscape, colour: str) -> None:
    axis, losses = landscape.coordinates[0], landscape.losses
    ends = [float(losses[0]), float(losses[-1])]
    axes.plot([float(axis[0]), float(axis[-1])], ends, color=colour, linestyle=":", linewidth=1.2)
    barrier = landscape.directions.get("barrier", 0.0)
    if not (math.isfinite(barrier) and barrier > 0) or len(axis) < 3:
        return
    fraction = (axis - axis[0]) / (axis[-1] - axis[0])
    top = int((losses - torch.lerp(losses[0], losses[-1], fraction)).argmax())
    at, low, high = float(axis[top]), float(torch.lerp(losses[0], losses[-1], fraction[top])), float(losses[top])
    axes.annotate("", (at, high), (at, low), arrowprops={"arrowstyle": "<->", "color": colour, "linewidth": 1.2})
    axes.annotate(f" barrier {barrier:.3g}", (at, (low + high) / 2), color=colour, va="center")


def _density(axes: Any, spectrum: Spectrum, values: Tensor) -> None:
    grid, density = spectrum.grid.double(), spectrum.density.double()  # type: ignore[union-attr]
    floor = float(density.max()) * 1e-6
    axes.set_yscale("log")
    axes.fill_between(grid, floor, density.clamp(min=floor), color=COLOURS[0], alpha=0.25, linewidth=0)
    axes.plot(grid, density.clamp(min=floor), color=COLOURS[0], linewidth=1.6)
    error = spectrum.stderr
    if error is not None and error.shape == density.shape:
        low, high = (density - error).clamp(min=floor), (density + error).clamp(min=floor)
        axes.fill_between(grid, low, high, color=COLOURS[1], alpha=0.35, linewidth=0, label="± one standard error")
    axes.set_ylim(floor, float(density.max()) * 3)
    if len(values):
        axes.plot(values, torch.full_like(values, floor), linestyle="none", marker="|", markersize=16,
                  markeredgewidth=1.5, color=COLOURS[1], clip_on=False, label="eigenvalues")  # fmt: skip
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="upper right")


def _ranked(axes: Any, spectrum: Spectrum, values: Tensor) -> None:
    ranks = list(range(1, len(values) + 1))
    residuals = spectrum.residuals if spectrum.residuals is not None else torch.zeros_like(values)
    residuals = torch.nan_to_num(residuals[: len(values)])
    axes.errorbar(ranks, values, yerr=residuals, fmt="o", color=COLOURS[0], ecolor=COLOURS[1], capsize=3, markersize=6,
                  linewidth=1.2, label="± residual")  # fmt: skip
    if _logarithmic(values.tolist(), None):
        axes.set_yscale("log")
        _plain_log_axis(axes.yaxis, float(values.min()), float(values.max()))
    elif float(values.min()) < 0 < float(values.max()):
        axes.axhline(0, color="#555b66", linewidth=0.8)
    axes.set_xticks(ranks if len(ranks) <= 12 else ranks[:: len(ranks) // 8])
    axes.legend(loc="best")
