"""The loss on a line or a plane through a checkpoint, or on the way to another one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from sam_optim.core.errors import InputError, say
from sam_optim.core.files import reserved, write_json
from sam_optim.core.geometry import p_norm
from sam_optim.core.results import Landscape
from sam_optim.landscape import interpolate, slice_1d, slice_2d
from sam_optim.loss import Loss
from sam_optim.measures import hessian_eigenvalues
from sam_optim.report import results_page, save_picture, write_page
from sam_optim.sweep.problems import Problem
from sam_optim.sweep.processes import is_first_process, started
from sam_optim.vision.checkpoints import Checkpoint, find


@dataclass(frozen=True)
class Grid:
    """The points at which the loss is computed.

    directions: "random", with the norm of the weights in every filter, which is then the unit; "eigen", the leading
    eigenvectors of the Hessian; "gradient", for a plane with the leading eigenvector without its part along the
    gradient. The last two have unit length: coordinates are distances between weights.
    two: a plane. range: from -range to range. points: in each direction. seed: of random directions.
    """

    directions: str = "random"
    two: bool = False
    range: float = 1.0
    points: int = 21
    seed: int = 0


def draw_landscape(
    checkpoints: Sequence[str | Path],
    problem: Problem,
    out: Path,
    *,
    grid: Grid = Grid(),
    other: str | Path | None = None,
    device: str = "cpu",
) -> Landscape:
    """Computes the losses and writes them: a page (.html), the numbers (.json), or a picture (.png, .svg).

    Args:
        checkpoints: one file or directory; none where the function of the problem brings its own weights.
        other: the loss on the straight way to these weights, instead of along `grid.directions`.
    """
    with reserved(out if is_first_process() else None), started(device) as here:
        starts, ends = find(checkpoints), find([other] if other else [])
        for matches in (starts, ends):
            if len(matches) > 1:
                raise InputError(
                    f"one CHECKPOINT has one landscape, got {len(matches)}; name the second one with --other"
                )
        losses = problem.open(here, [*starts, *ends])
        start, end = (matches[0] if matches else None for matches in (starts, ends))
        loss = losses.loss(start)
        notes, name = [*losses.notes, _of(start, losses.choice)], start.name if start else problem.name
        if end is None:
            name += f", {grid.directions}"
            result = _slice(loss, grid)
        else:
            name += f" to {end.name}"
            state = losses.state(end, loss.model)
            notes.append(_of(end, losses.choice))
            result = interpolate(loss, state, coordinates=torch.linspace(0, 1, grid.points))
        if here.is_first:
            for note in filter(None, notes):
                say(f"note: {note}")
            _write(out, name, result)
    return result


def _of(checkpoint: Checkpoint | None, choice: str | None) -> str | None:
    """The note about which weights of a checkpoint were taken."""
    return f"{checkpoint.name}: {choice}" if checkpoint and choice else None


def _slice(loss: Loss, grid: Grid) -> Landscape:
    axis = torch.linspace(-grid.range, grid.range, grid.points, dtype=torch.float64)
    directions = _directions(loss, grid)
    if grid.two:
        pair = None if directions is None else (directions[0], directions[1])
        return slice_2d(loss, pair, coordinates=(axis, axis), seed=grid.seed)
    return slice_1d(loss, None if directions is None else directions[0], coordinates=axis, seed=grid.seed)


def _directions(loss: Loss, grid: Grid) -> list[list[Tensor]] | None:
    """As `Grid` says; None for random ones."""
    if grid.directions == "random":
        return None
    num = 2 if grid.two and grid.directions == "eigen" else 1
    if grid.directions == "eigen" or grid.two:
        spectrum = hessian_eigenvalues(loss, num=num, which="magnitude", tol=1e-2, seed=grid.seed)
        if not spectrum.eigenvectors or len(spectrum.eigenvectors) < num:
            raise InputError(f"no eigenvector was found: {spectrum.reason}; use --directions random")
        vectors = spectrum.eigenvectors
    if grid.directions == "eigen":
        return vectors
    gradient = _unit(loss.gradient())
    if not grid.two:
        return [gradient]
    overlap = sum(float((a.double() * b.double()).sum()) for a, b in zip(vectors[0], gradient, strict=True))
    return [gradient, _unit([a - overlap * b for a, b in zip(vectors[0], gradient, strict=True)])]


def _unit(v: list[Tensor]) -> list[Tensor]:
    length = float(p_norm(v, 2))
    if not length > 0:
        raise InputError(f"the gradient has the norm {length}, so it gives no direction; use --directions random")
    return [x / length for x in v]


def _write(path: Path, name: str, result: Landscape) -> None:
    if path.suffix == ".json":
        write_json(path, result.to_dict())
    elif path.suffix == ".html":
        write_page(path, results_page({name: result}, title="Loss around the weights"))
    else:
        save_picture(result, path, title=name)
