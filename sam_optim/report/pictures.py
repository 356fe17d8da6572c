"""Pictures of one result: a plane of losses as contours or as a surface, lines of losses, a spectrum."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sam_optim.core.results import Landscape, Spectrum
from sam_optim.report import canvas
from sam_optim.report.canvas import SIZE, Axes, Figure, label, styled
from sam_optim.report.figures import Curves, curves

NUM_BANDS = 24  # edges between the bands of colour in a plane of losses
EXTEND: Any = {(False, False): "neither", (False, True): "max", (True, False): "min", (True, True): "both"}


def contour_picture(
    landscape: Landscape,
    *,
    title: str = "",
    trace: Tensor | None = None,
    log: bool | None = None,
    loss_label: str = "loss",
    limits: tuple[float, float] | None = None,
    size: tuple[float, float] = SIZE,
) -> Figure:
    """A plane of losses from above: bands of colour, labelled contours, and a cross at the weights.

    Args:
        landscape: of `slice_2d`; the first direction is drawn upwards, the second to the right.
        trace: (n, 2), positions in the plane, such as `trajectory.coordinates`: drawn as a line from first to last.
        log: colours by the logarithm of the loss; None where the losses span more than a decade.
        loss_label: what the losses are, with their unit.
        limits: the lowest and the highest loss that have a colour of their own, so that several pictures can be
            compared; None for those of this landscape.
        size: width and height, in inches.

    Returns:
        A matplotlib Figure: `figure.savefig("landscape.png", dpi=200)`.

    Raises:
        ImportError: without matplotlib. ValueError: a landscape that is no plane, or has no finite loss.
    """
    rows, columns = _plane(landscape)
    with styled(size) as figure:
        from matplotlib.colors import BoundaryNorm
        from matplotlib.patheffects import withStroke

        axes = figure.add_subplot()
        axes.grid(False)
        losses, edges, ticks, _ = _levels(landscape.losses, log, limits)
        above, below = bool((losses > edges[-1]).any()), bool((losses < edges[0]).any())
        norm = BoundaryNorm(edges, 256, extend=EXTEND[below, above])
        bands = axes.contourf(
            columns, rows, losses, levels=edges, norm=norm, cmap=canvas.SEQUENTIAL, extend=norm.extend
        )
        bands.set_edgecolor("face")  # no seams between the bands
        lines = axes.contour(columns, rows, losses, levels=ticks, colors="white", linewidths=0.8)
        axes.locator_params(nbins=5)
        axes.set(xlabel=_axis_label(landscape, 1), ylabel=_axis_label(landscape, 0), title=label(title, width=48))
        if trace is not None:
            points = trace.detach().cpu().double()
            axes.plot(points[:, 1], points[:, 0], color="white", linewidth=3)
            axes.plot(points[:, 1], points[:, 0], color=canvas.COLOURS[1], linewidth=1.5, marker="o", markersize=3.5)
        if rows[0] <= 0 <= rows[-1] and columns[0] <= 0 <= columns[-1]:
            axes.plot(0, 0, marker="X", color="white", markeredgecolor="black", markersize=9, clip_on=False, zorder=5)
        for text in axes.clabel(lines, fmt=lambda level: f"{level:g}", fontsize=8, colors="white"):
            text.set_path_effects([withStroke(linewidth=2, foreground=canvas.INK)])
        bar = figure.colorbar(bands, ax=axes, ticks=ticks, format="%g", label=label(loss_label), pad=0.03, aspect=26)
        bar.ax.minorticks_off()
        bar.outline.set_visible(False)
    return figure


def surface_picture(
    landscape: Landscape,
    *,
    title: str = "",
    log: bool | None = None,
    loss_label: str = "loss",
    elevation: float = 32.0,
    azimuth: float = -58.0,
    size: tuple[float, float] = (6.0, 4.8),
) -> Figure:
    """A plane of losses as a surface in perspective, over its contours.

    Args:
        elevation, azimuth: of the eye, in degrees.
        landscape, title, log, loss_label, size: as in `contour_picture`.
    """
    rows, columns = _plane(landscape)
    with styled(size) as figure:
        from matplotlib.ticker import MaxNLocator

        axes = figure.add_subplot(projection="3d")
        losses, edges, _, logarithmic = _levels(landscape.losses, log, None)
        heights = losses.clamp(max=edges[-1])
        heights = heights.log10() if logarithmic else heights
        x, y = (grid.numpy() for grid in torch.meshgrid(columns, rows, indexing="xy"))
        low, high = float(heights.min()), float(heights.max())
        floor = low - 0.3 * (high - low or 1.0)
        axes.plot_surface(x, y, heights.numpy(), cmap=canvas.SEQUENTIAL, rcount=80, ccount=80, linewidth=0.15,
                          edgecolor="#00000040")  # fmt: skip
        axes.contourf(x, y, heights.numpy(), zdir="z", offset=floor, levels=14, cmap=canvas.SEQUENTIAL, alpha=0.85)
        axes.set_xlabel("second direction", labelpad=6)
        axes.set_ylabel("first direction", labelpad=6)
        axes.set_zlabel(label(loss_label) + (" (logarithmic)" if logarithmic else ""), labelpad=8)
        axes.set_title(label(title, width=48), y=1.0)
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(5))
        axes.set_zlim(floor, high)
        if logarithmic:
            ticks = canvas.log_ticks(10**low, 10**high)
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
    size: tuple[float, float] = SIZE,
) -> Figure:
    """Lines of losses: one for each name. A slice over several directions is their mean with the band from the lowest
    to the highest; an interpolation has its chord and its barrier.

    Args:
        slices: of `slice_1d` or `interpolate`, alone or by name.
        log: a logarithmic axis of losses; None where they span more than a decade.
        title, loss_label, size: as in `contour_picture`. x_label: None says what the direction is.
    """
    named = {"": slices} if isinstance(slices, Landscape) else dict(slices)
    if not named or any(len(s.coordinates) != 1 for s in named.values()):
        raise ValueError("slices_picture draws landscapes with one axis (slice_1d, interpolate): for a plane there are "
                         "contour_picture and surface_picture")  # fmt: skip
    lines = []
    for k, (name, s) in enumerate(named.items()):
        runs = torch.as_tensor(s.directions.get("losses", s.losses[None]))
        count = f"mean of {len(runs)} directions" if len(runs) > 1 else ""
        text = ", ".join(part for part in (name, count) if part)
        lines.append(Curves(text, s.coordinates[0].tolist(), runs.tolist(), k))
    x_label = x_label or _axis_label(next(iter(named.values())), 0)
    figure = curves(title, lines, x_label=x_label, y_label=loss_label, log=log, size=size)
    for k, s in enumerate(named.values()):
        if s.directions.get("kind") == "interpolation":
            _chord(figure.axes[0], s, canvas.COLOURS[k % len(canvas.COLOURS)])
    return figure


def spectrum_picture(
    spectrum: Spectrum, *, title: str = "", unit: str = "", size: tuple[float, float] = SIZE
) -> Figure:
    """The spectral density on a logarithmic scale with a mark at each eigenvalue, or the eigenvalues alone.

    Args:
        spectrum: of `spectral_density`, or of `hessian_eigenvalues`: these are drawn by rank, with their residuals.
        unit: of the eigenvalues, for the label.
        title, size: as in `contour_picture`.
    """
    values = spectrum.eigenvalues[spectrum.eigenvalues.isfinite()]
    name = label(f"eigenvalue, {unit}" if unit else "eigenvalue")
    with styled(size) as figure:
        axes = figure.add_subplot()
        if spectrum.grid is not None and spectrum.density is not None:
            _density(axes, spectrum, values)
            axes.set(xlabel=name, ylabel="density of eigenvalues")
        elif len(values):
            _ranked(axes, spectrum, values)
            axes.set(xlabel="rank, from the largest", ylabel=name)
        else:
            raise ValueError(f"the spectrum has no eigenvalues to draw: {spectrum.reason or 'it is empty'}")
        axes.set_title(label(title, width=48))
    return figure


def sharpness_picture(
    history: Sequence[Mapping[str, Any]],
    *,
    title: str = "",
    measures: Sequence[str] = ("lambda_max", "critical_sharpness"),
    size: tuple[float, float] = SIZE,
) -> Figure:
    """Sharpness during training: measures over steps, and the edges of stability as thin dashed lines.

    Args:
        history: rows of a `SharpnessMonitor`, or of its .jsonl.
        measures: their names in the rows.
        title, size: as in `contour_picture`.

    Raises:
        ValueError: no row has a number of one of these measures.
    """
    steps = [row["step"] for row in history]
    columns = {name: [_or_nan(row.get(name)) for row in history] for name in (*measures, *EDGES)}
    lines = [Curves(name, steps, [columns[name]], k) for k, name in enumerate(measures)]
    if not any(math.isfinite(x) for name in measures for x in columns[name]):
        raise ValueError(f"no row of the history has a number for {' or '.join(measures)}")
    edges = {name: columns[name] for name in EDGES if any(map(math.isfinite, columns[name]))}
    if edges.get("sgd_edge") == edges.get("edge"):  # without momentum
        edges.pop("sgd_edge", None)
    lines += [Curves(EDGES[name], steps, [column], len(measures) + k) for k, (name, column) in enumerate(edges.items())]
    figure = curves(title, lines, x_label="step", y_label="curvature, loss/w²", log=None, size=size, below=True)
    for marks in (figure.axes[0].get_lines(), figure.legends[0].get_lines()):
        for k, line in enumerate(marks):
            line.set(linestyle="-" if k < len(measures) else "--", linewidth=1.8 if k < len(measures) else 1.2)
    return figure


def save_picture(result: Landscape | Spectrum, path: str | Path, *, kind: str | None = None, **options: Any) -> Path:
    """The picture of a result in a file, whole or not at all; the ending of its name says which format (png, pdf, svg).

    Args:
        kind: "contour" or "surface" for a plane (None: contour), "slices" for a line, "spectrum".
        options: of the function of that name.
    """
    usual = "spectrum" if isinstance(result, Spectrum) else ("contour" if len(result.coordinates) == 2 else "slices")
    if (kind or usual) not in PICTURES:
        raise ValueError(f"kind must be one of {', '.join(PICTURES)}, got {kind!r}")
    canvas.save(PICTURES[kind or usual](result, **options), path := Path(path))
    return path


EDGES = {"edge": "edge, 2 / lr", "sgd_edge": "edge of SGD with momentum", "sam_edge": "edge of SAM"}

PICTURES: dict[str, Callable[..., Figure]] = {
    "contour": contour_picture,
    "surface": surface_picture,
    "slices": slices_picture,
    "spectrum": spectrum_picture,
}


def _or_nan(x: Any) -> float:
    return float(x) if isinstance(x, (int, float)) else math.nan


def _plane(landscape: Landscape) -> tuple[Tensor, Tensor]:
    if len(landscape.coordinates) != 2 or min(landscape.losses.shape) < 2:
        raise ValueError(
            f"a plane has two axes of two points or more, got losses of shape {tuple(landscape.losses.shape)}"
        )
    if not bool(landscape.losses.isfinite().any()):
        raise ValueError("no loss of this landscape is finite: look nearer, with smaller coordinates")
    return landscape.coordinates


def _levels(
    losses: Tensor, log: bool | None, limits: tuple[float, float] | None
) -> tuple[Tensor, Any, list[float], bool]:
    """Losses to draw (not finite: above all others), the edges of bands, round losses, and whether logarithmic."""
    import numpy as np

    low, high = limits or (float(x) for x in losses[losses.isfinite()].aminmax())
    logarithmic = canvas.is_logarithmic([low, high], log)
    if high - low < 1e-12 * max(abs(high), 1e-12):
        low, high = low - 0.5 * (abs(low) or 1), high + 0.5 * (abs(high) or 1)  # flat: one band
    top = high * (1 + 1e-9) if logarithmic else high + 1e-9 * (high - low)  # the highest loss is in the last band
    edges = (np.geomspace if logarithmic else np.linspace)(low, top, NUM_BANDS)
    ticks = canvas.log_ticks(low, high) if logarithmic else canvas.linear_ticks(low, high)
    drawn = torch.nan_to_num(losses.double(), nan=math.inf).clamp(max=2 * abs(high) + 1)
    return drawn, edges, ticks, logarithmic


def _axis_label(landscape: Landscape, axis: int) -> str:
    about = landscape.directions
    if about.get("kind") == "interpolation":
        return "from these weights (0) to the others (1)"
    which = ("first ", "second ")[axis] if len(landscape.coordinates) == 2 else ""
    if about.get("kind") == "random":
        return f"{which or 'random '}direction, in filter norms"
    norm = about["norms"][axis] if about.get("norms") else None
    unit = "" if norm is None else (", units of w" if abs(norm - 1) < 1e-6 else f" of length {norm:.3g}")
    return f"distance along {which or 'the '}direction{unit}"


def _chord(axes: Axes, landscape: Landscape, colour: str) -> None:
    """The straight line between the ends, and the barrier, the largest height above it."""
    axis, losses = landscape.coordinates[0], landscape.losses
    axes.plot(axis[[0, -1]], losses[[0, -1]], color=colour, linestyle=":", linewidth=1.2)
    barrier = landscape.directions.get("barrier") or 0.0
    if not (math.isfinite(barrier) and barrier > 0) or len(axis) < 3:
        return
    chord = torch.lerp(losses[0], losses[-1], (axis - axis[0]) / (axis[-1] - axis[0]))
    top = int((losses - chord).argmax())
    at, low, high = float(axis[top]), float(chord[top]), float(losses[top])
    axes.annotate("", (at, high), (at, low), arrowprops={"arrowstyle": "<->", "color": canvas.SOFT, "linewidth": 1.2})
    axes.annotate(f" barrier {barrier:.3g}", (at, (low + high) / 2), color=canvas.INK, va="center")


def _density(axes: Axes, spectrum: Spectrum, values: Tensor) -> None:
    grid, density = spectrum.grid.double(), spectrum.density.double()  # type: ignore[union-attr]
    floor = float(density.max()) * 1e-6
    axes.set_yscale("log")
    axes.fill_between(grid, floor, density.clamp(min=floor), color=canvas.COLOURS[0], alpha=0.25, linewidth=0)
    axes.plot(grid, density.clamp(min=floor), color=canvas.COLOURS[0], linewidth=1.6)
    error = spectrum.stderr
    if error is not None and error.shape == density.shape:
        low, high = (density - error).clamp(min=floor), (density + error).clamp(min=floor)
        axes.fill_between(
            grid, low, high, color=canvas.COLOURS[1], alpha=0.35, linewidth=0, label="± one standard error"
        )
    axes.set_ylim(floor, float(density.max()) * 3)
    if len(values):
        axes.plot(values, torch.full_like(values, floor), linestyle="none", marker="|", markersize=16,
                  markeredgewidth=1.5, color=canvas.COLOURS[1], clip_on=False, label="eigenvalues")  # fmt: skip
    if axes.get_legend_handles_labels()[1]:
        axes.legend(loc="upper right")


def _ranked(axes: Axes, spectrum: Spectrum, values: Tensor) -> None:
    ranks = list(range(1, len(values) + 1))
    residuals = spectrum.residuals if spectrum.residuals is not None else torch.zeros_like(values)
    residuals = torch.nan_to_num(residuals[: len(values)])
    axes.errorbar(ranks, values, yerr=residuals, fmt="o", color=canvas.COLOURS[0], ecolor=canvas.COLOURS[1],
                  capsize=3, markersize=6, linewidth=1.2, label="± residual")  # fmt: skip
    numbers: Sequence[float] = values.tolist()
    canvas.set_scale(axes.yaxis, numbers, None)
    if min(numbers) < 0 < max(numbers):
        axes.axhline(0, color=canvas.SOFT, linewidth=0.8)
    axes.set_xticks(ranks if len(ranks) <= 12 else ranks[:: len(ranks) // 8])
    axes.legend(loc="best")
