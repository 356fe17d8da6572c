"""The loss on lines and planes through the weights, and on the segment to other weights."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sam_optim import rng
from sam_optim.batchnorm import NORM_LAYERS, Buffers
from sam_optim.geometry import p_norm
from sam_optim.loss import Loss
from sam_optim.results import Landscape, provenance

NUM_POINTS = 21  # odd, so that the weights themselves are on the grid

Direction = Sequence[Tensor]


def slice_1d(
    loss: Loss,
    direction: Direction | None = None,
    *,
    coordinates: Sequence[float] | Tensor | None = None,
    seed: int = 0,
    biases: bool = False,
) -> Landscape:
    """The loss on a line through the weights:  L(w + a d).

    Args:
        loss: L, at the model's weights w.
        direction: d, one tensor for each of `loss.params` in units of w, taken as it is (an eigenvector, a step of
            training); None for `random_direction(loss, seed=seed, biases=biases)`.
        coordinates: the values of a, (n,), in units of d; None for 21 of them from -1 to 1.
        seed: which random direction. Runs compared with one seed are compared along one draw.
        biases: move biases and normalisation parameters, too (random directions only).

    Returns:
        `coordinates` ((n,),), `losses` (n,) in units of L; not finite where L overflows.

    Raises:
        ValueError: a direction that does not fit the parameters, coordinates that are no line of finite numbers.

    Source: Li et al. (2018), arXiv:1712.09913.
    """
    d, about = _direction(loss, direction, seed, biases)
    axis = _axis(coordinates)
    losses = torch.stack([_value_at(loss, _combine([float(a)], [d])) for a in axis])
    return _landscape(loss, (axis,), losses, about | {"norms": [_length(d)]})


def slice_2d(
    loss: Loss,
    directions: tuple[Direction, Direction] | None = None,
    *,
    coordinates: tuple[Sequence[float] | Tensor, Sequence[float] | Tensor] | None = None,
    seed: int = 0,
    biases: bool = False,
) -> Landscape:
    """The loss on a plane through the weights:  L(w + a d_1 + b d_2).

    Args:
        loss: L, at the model's weights w.
        directions: d_1, d_2, each as in `slice_1d`; None for the random directions of `seed` and `seed + 1`. They are
            not made orthogonal; `directions["cosine"]` says how far from it they are.
        coordinates: the values of a and of b; None for 21 each from -1 to 1.
        seed, biases: as in `slice_1d`.

    Returns:
        `coordinates` ((n,), (m,)), `losses` (n, m): `losses[i, j]` is at a_i, b_j.

    Raises:
        ValueError: as `slice_1d`.

    Source: Li et al. (2018), arXiv:1712.09913.
    """
    first, second = directions if directions is not None else (None, None)
    (d, about), (e, _) = _direction(loss, first, seed, biases), _direction(loss, second, seed + 1, biases)
    rows, columns = (_axis(c) for c in (coordinates or (None, None)))
    losses = torch.stack(
        [torch.stack([_value_at(loss, _combine([float(a), float(b)], [d, e])) for b in columns]) for a in rows]
    )
    return _landscape(
        loss, (rows, columns), losses, about | {"norms": [_length(d), _length(e)], "cosine": _cosine(d, e)}
    )


def interpolate(
    loss: Loss,
    other: nn.Module | Mapping[str, Tensor] | Direction,
    *,
    coordinates: Sequence[float] | Tensor | None = None,
) -> Landscape:
    """The loss on the segment from the weights to other weights:  L((1 - a) w + a w').

    Args:
        loss: L, at the model's weights w.
        other: w': a model of the same architecture, its `state_dict()`, or one tensor for each of `loss.params`. With a
            model or a state dict the floating-point buffers (BatchNorm's running statistics) are interpolated as well,
            so that a = 1 is the other model itself; with a list of tensors they stay those of the model.
        coordinates: the values of a, (n,); None for 21 of them from 0 to 1.

    Returns:
        `coordinates` ((n,),), `losses` (n,). `directions["barrier"]` is the largest height above the chord between the
        losses at the first and at the last coordinate, on this grid, in units of L.

    Raises:
        ValueError: weights that do not fit the parameters, coordinates that are no line of finite numbers.
    """
    weights, buffers = _weights_and_buffers(loss, other)
    d = [v.to(w) - w.detach() for v, w in zip(weights, loss.params, strict=True)]
    axis = _axis(torch.linspace(0, 1, NUM_POINTS, dtype=torch.float64) if coordinates is None else coordinates)
    kept = Buffers()
    kept.save(loss.model)
    start = [b.clone() for b, _ in buffers]
    losses = []
    try:
        for a in axis.tolist():
            for (b, end), begin in zip(buffers, start, strict=True):
                b.copy_(torch.lerp(begin, end.to(b), a))
            losses.append(_value_at(loss, _combine([a], [d])))
    finally:
        kept.restore()
    found = torch.stack(losses)
    about = {
        "kind": "interpolation",
        "norms": [_length(d)],
        "num_buffers": len(buffers),
        "barrier": _barrier(axis, found),
    }
    return _landscape(loss, (axis,), found, about)


def random_direction(loss: Loss, *, seed: int = 0, biases: bool = False) -> list[Tensor]:
    """A Gaussian direction with the norm of the weights in every filter (`filter_normalized`): one tensor for each of
    `loss.params`, the same for one seed and architecture on every device."""
    stream = rng.Stream(seed)
    return filter_normalized(loss, [stream.normal_like(w) for w in loss.params], biases=biases)


@torch.no_grad()
def filter_normalized(loss: Loss, direction: Direction, *, biases: bool = False) -> list[Tensor]:
    """d_f ||w_f|| / ||d_f|| for each filter f, a slice of a weight's first dimension: the scale of the weights is taken
    out of the picture, and with it the rescaling between layers that leaves a ReLU network the same function.

    Biases and normalisation parameters do not move; with `biases` they move along themselves, d = w, as in the peer
    code: a random direction scaled to one number has nothing but a sign.

    Source: Li et al. (2018), arXiv:1712.09913, section 4.
    """
    _check_fits(loss, direction)
    normalisation = {id(p) for m in loss.model.modules() if isinstance(m, NORM_LAYERS) for p in m.parameters(False)}
    found = []
    for w, d in zip(loss.params, direction, strict=True):
        if w.ndim <= 1 or id(w) in normalisation:
            found.append(w.detach().clone() if biases else torch.zeros_like(w))
        else:
            norms = _filter_norms(d)
            found.append(d * (_filter_norms(w) / torch.where(norms > 0, norms, 1)))
    return found


def _filter_norms(w: Tensor) -> Tensor:
    return torch.linalg.vector_norm(w.detach(), dim=tuple(range(1, w.ndim)), keepdim=True)


def _direction(loss: Loss, given: Direction | None, seed: int, biases: bool) -> tuple[Direction, dict[str, Any]]:
    if given is None:
        about = {"kind": "random", "normalize": "filter", "biases": biases, "seed": seed}
        return random_direction(loss, seed=seed, biases=biases), about
    _check_fits(loss, given)
    return [d.detach().to(w) for d, w in zip(given, loss.params, strict=True)], {"kind": "given"}


def _check_fits(loss: Loss, direction: Direction) -> None:
    shapes, expected = [tuple(d.shape) for d in direction], [tuple(w.shape) for w in loss.params]
    if shapes != expected:
        wrong = next(
            (i for i, (s, e) in enumerate(zip(shapes, expected, strict=False)) if s != e),
            min(len(shapes), len(expected)),
        )
        raise ValueError(
            "a direction has one tensor for each parameter, of its shape (see `loss.params`); "
            f"got {len(shapes)} for {len(expected)} parameters, the first that differs is number {wrong}"
        )


def _axis(coordinates: Sequence[float] | Tensor | None) -> Tensor:
    if coordinates is None:
        half = torch.arange(1, NUM_POINTS // 2 + 1, dtype=torch.float64) / (NUM_POINTS // 2)
        return torch.cat([-half.flip(0), torch.zeros(1, dtype=torch.float64), half])
    axis = torch.as_tensor(coordinates, dtype=torch.float64, device="cpu")
    if axis.ndim != 1 or not len(axis) or not bool(axis.isfinite().all()):
        raise ValueError(f"coordinates are a list of finite numbers, got {coordinates!r}")
    return axis


def _combine(factors: Sequence[float], directions: Sequence[Direction]) -> list[Tensor]:
    """sum_k a_k d_k for each parameter."""
    parts = zip(*directions, strict=True)
    return [sum((a * d for a, d in zip(factors, ds, strict=True)), torch.zeros_like(ds[0])) for ds in parts]


def _value_at(loss: Loss, displacement: list[Tensor]) -> Tensor:
    with loss.displaced(displacement):
        return loss.value().detach().to("cpu", torch.float64)


def _weights_and_buffers(
    loss: Loss, other: nn.Module | Mapping[str, Tensor] | Direction
) -> tuple[Direction, list[tuple[Tensor, Tensor]]]:
    """w' in the order of `loss.params`, and each floating-point buffer of the model with its value in the other."""
    if isinstance(other, nn.Module):
        other = other.state_dict()
    if not isinstance(other, Mapping):
        weights = list(other)
        _check_fits(loss, weights)
        return [w.detach() for w in weights], []
    names = {id(p): name for name, p in loss.model.named_parameters()}
    own = dict(loss.model.named_buffers())
    wanted = [names[id(p)] for p in loss.params]
    floating = [name for name, b in own.items() if b.is_floating_point() and name in loss.model.state_dict()]
    if missing := [name for name in [*wanted, *floating] if name not in other]:
        raise ValueError(f"the other weights lack {missing[:3]}; they need the names of the model's own state_dict()")
    weights = [other[name].detach() for name in wanted]
    _check_fits(loss, weights)
    return weights, [(own[name], other[name].detach()) for name in floating]


def _barrier(axis: Tensor, losses: Tensor) -> float:
    if len(axis) < 2 or axis[0] == axis[-1]:
        return 0.0
    fraction = (axis - axis[0]) / (axis[-1] - axis[0])
    return float((losses - torch.lerp(losses[0], losses[-1], fraction)).max())


def _length(direction: Direction) -> float:
    return float(p_norm(direction, 2))


def _cosine(d: Direction, e: Direction) -> float | None:
    lengths = _length(d) * _length(e)
    product = sum(float((x.double() * y.double()).sum()) for x, y in zip(d, e, strict=True))
    return product / lengths if lengths else None


def _landscape(loss: Loss, axes: tuple[Tensor, ...], losses: Tensor, about: dict[str, Any]) -> Landscape:
    return Landscape(axes, losses, directions=about, settings=loss.settings(), provenance=provenance())
