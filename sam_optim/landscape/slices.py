"""The loss on lines and planes through the weights, and on the segment to other weights."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sam_optim.core.geometry import p_norm
from sam_optim.core.module_state import Buffers
from sam_optim.core.results import Landscape, provenance
from sam_optim.landscape.directions import Direction, Weights, check_fits, random_direction, weights_and_buffers
from sam_optim.landscape.grid import Point, Progress, combined, losses_at
from sam_optim.loss import Loss

NUM_POINTS = 21  # odd, so that the weights themselves are on the grid


def slice_1d(
    loss: Loss,
    direction: Direction | None = None,
    *,
    coordinates: Sequence[float] | Tensor | None = None,
    num_directions: int = 1,
    seed: int = 0,
    biases: bool = False,
    progress: Progress | None = None,
    resume: str | Path | None = None,
) -> Landscape:
    """The loss on a line through the weights:  L(w + a d).

    Args:
        loss: L, at the model's weights w.
        direction: d, one tensor for each of `loss.params` in units of w, taken as it is (`eigenvector_direction`,
            `gradient_direction`, a step of training); None for `random_direction(loss, seed=seed, biases=biases)`.
        coordinates: the values of a, (n,), in units of d; None for 21 of them from -1 to 1.
        num_directions: how many random directions, those of seed, seed + 1, ...; one line may be lucky, a band is not.
        seed: which random direction. Runs compared with one seed are compared along one draw.
        biases: move biases and normalization parameters, too (random directions only).
        progress: called with (points done, total).
        resume: a file that saves finished losses, every 128 points, and from which an interrupted call continues.

    Returns:
        `coordinates` ((n,),), `losses` (n,) in units of L; not finite where L overflows. With several directions
        `losses` is their mean, and `directions["losses"]` has each, (num_directions, n).

    Raises:
        ValueError: a direction that does not fit the parameters, coordinates that are no line of finite numbers,
            several directions where one is given, a file of another landscape.

    Source: Li et al. (2018), arXiv:1712.09913.
    """
    if num_directions < 1 or (direction is not None and num_directions != 1):
        raise ValueError(f"num_directions must be >= 1, and 1 where a direction is given, got {num_directions}")
    lines = [_direction(loss, direction, seed + k, biases) for k in range(num_directions)]
    axis = _axis(coordinates)
    points = torch.kron(torch.eye(num_directions, dtype=torch.float64), axis[:, None]).tolist()  # line after line
    losses = losses_at(loss, lines, points, progress=progress, resume=resume).view(num_directions, -1)
    about = _about(direction, seed, biases, lines)
    about |= {"num_directions": num_directions, "losses": losses} if num_directions > 1 else {}
    return _landscape(loss, (axis,), losses.mean(dim=0), about)


def slice_2d(
    loss: Loss,
    directions: tuple[Direction, Direction] | Sequence[Direction] | None = None,
    *,
    coordinates: tuple[Sequence[float] | Tensor, Sequence[float] | Tensor] | None = None,
    seed: int = 0,
    biases: bool = False,
    progress: Progress | None = None,
    resume: str | Path | None = None,
) -> Landscape:
    """The loss on a plane through the weights:  L(w + a d_1 + b d_2).

    Args:
        loss: L, at the model's weights w.
        directions: d_1, d_2, each as in `slice_1d` (or those of `trajectory_directions`); None for the random
            directions of `seed` and `seed + 1`. They are not made orthogonal: `directions["cosine"]` says how near.
        coordinates: the values of a and of b; None for 21 each from -1 to 1.
        seed, biases, progress, resume: as in `slice_1d`.

    Returns:
        `coordinates` ((n,), (m,)), `losses` (n, m): `losses[i, j]` is at a_i, b_j.

    Raises:
        ValueError: as `slice_1d`.

    Source: Li et al. (2018), arXiv:1712.09913.
    """
    first, second = directions if directions is not None else (None, None)
    d, e = _direction(loss, first, seed, biases), _direction(loss, second, seed + 1, biases)
    rows, columns = (_axis(c) for c in (coordinates or (None, None)))
    points = torch.cartesian_prod(rows, columns).tolist()
    losses = losses_at(loss, [d, e], points, progress=progress, resume=resume)
    about = _about(first, seed, biases, [d, e])
    lengths = about["norms"][0] * about["norms"][1]
    product = sum(float((x.double() * y.double()).sum()) for x, y in zip(d, e, strict=True))
    about["cosine"] = product / lengths if lengths else None
    return _landscape(loss, (rows, columns), losses.view(len(rows), len(columns)), about)


def interpolate(
    loss: Loss,
    other: Weights,
    *,
    coordinates: Sequence[float] | Tensor | None = None,
    progress: Progress | None = None,
    resume: str | Path | None = None,
) -> Landscape:
    """The loss on the segment from the weights to other weights:  L((1 - a) w + a w').

    Args:
        loss: L, at the model's weights w.
        other: w': a model of the same architecture, its `state_dict()`, or one tensor for each of `loss.params`. With a
            model or a state dict the floating-point buffers (BatchNorm's running statistics) are interpolated as well,
            so that a = 1 is the other model itself; with a list of tensors they stay those of the model.
        coordinates: the values of a, (n,); None for 21 of them from 0 to 1.
        progress, resume: as in `slice_1d`.

    Returns:
        `coordinates` ((n,),), `losses` (n,). `directions["barrier"]` is the largest height above the chord between the
        losses at the first and at the last coordinate, on this grid, in units of L.

    Raises:
        ValueError: weights that do not fit the parameters, coordinates that are no line of finite numbers.
    """
    weights, buffers = weights_and_buffers(loss, other)
    d = [v.to(w) - w.detach() for v, w in zip(weights, loss.params, strict=True)]
    starts = [b.clone() for b, _ in buffers]
    axis = _axis(torch.linspace(0, 1, NUM_POINTS, dtype=torch.float64) if coordinates is None else coordinates)

    @contextmanager
    def at(point: Point) -> Iterator[None]:
        snapshot = Buffers()
        snapshot.save(loss.model)
        try:
            for (b, end), start in zip(buffers, starts, strict=True):
                b.copy_(torch.lerp(start, end.to(b), point[0]))
            with loss.displaced(combined(point, [d])):
                yield
        finally:
            snapshot.restore()

    moving = [d, [b for _, b in buffers]]
    losses = losses_at(loss, moving, axis[:, None].tolist(), at=at, progress=progress, resume=resume)
    about = {"kind": "interpolation", "norms": [float(p_norm(d, 2))], "num_buffers": len(buffers)}
    return _landscape(loss, (axis,), losses, about | {"barrier": _barrier(axis, losses)})


def _direction(loss: Loss, direction: Direction | None, seed: int, biases: bool) -> list[Tensor]:
    if direction is None:
        return random_direction(loss, seed=seed, biases=biases)
    check_fits(loss, direction)
    return [d.detach().to(w) for d, w in zip(direction, loss.params, strict=True)]


def _about(direction: Direction | None, seed: int, biases: bool, lines: Sequence[Direction]) -> dict[str, Any]:
    random = {"kind": "random", "normalize": "filter", "biases": biases, "seed": seed}
    return (random if direction is None else {"kind": "given"}) | {"norms": [float(p_norm(d, 2)) for d in lines]}


def _axis(coordinates: Sequence[float] | Tensor | None) -> Tensor:
    if coordinates is None:
        return (torch.arange(NUM_POINTS, dtype=torch.float64) - NUM_POINTS // 2) / (NUM_POINTS // 2)  # 0 is exact
    axis = torch.as_tensor(coordinates, dtype=torch.float64, device="cpu")
    if axis.ndim != 1 or not len(axis) or not bool(axis.isfinite().all()):
        raise ValueError(f"coordinates are a list of finite numbers, got {coordinates!r}")
    return axis


def _barrier(axis: Tensor, losses: Tensor) -> float:
    if len(axis) < 2 or axis[0] == axis[-1]:
        return 0.0
    fraction = (axis - axis[0]) / (axis[-1] - axis[0])
    return float((losses - torch.lerp(losses[0], losses[-1], fraction)).max())


def _landscape(loss: Loss, axes: tuple[Tensor, ...], losses: Tensor, about: dict[str, Any]) -> Landscape:
    return Landscape(axes, losses, directions=about, settings=loss.settings(), provenance=provenance())
