"""The plane in which training moved most: principal components of the checkpoints of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sam_optim.core.results import _Result, provenance
from sam_optim.landscape.directions import Direction, Weights, normalized, weights_and_buffers
from sam_optim.loss import Loss

CHUNK = 1 << 20  # entries of which inner products are taken in float64 at once


@dataclass(frozen=True, eq=False)
class Trajectory(_Result):
    """Where the checkpoints of a run lie in the plane of `directions` through the weights.

    directions: num lists of tensors in the shapes of the parameters (left out of `to_dict`), for `slice_2d`.
    coordinates: (num checkpoints, num), the point of the plane that is nearest to each, in units of the directions.
    explained: (num,), the share of the variance of the checkpoints along each principal component, descending.
    distances: (num checkpoints,), how far each is from the plane, in units of w: what a picture of it cannot show.
    """

    directions: list[list[Tensor]] = field(repr=False)
    coordinates: Tensor
    explained: Tensor
    distances: Tensor
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)


def trajectory_directions(
    loss: Loss, checkpoints: Sequence[Weights], *, num: int = 2, normalize: str | None = None, biases: bool = False
) -> Trajectory:
    """Principal components of a run's checkpoints w_1 ... w_n.

        C = 1/n sum_t (w_t - m)(w_t - m)^T,   C d_k = s_k d_k,   explained_k = s_k / tr C,   m the mean

    Directions are orthonormal and pass through the weights of the loss, which should be those of the end of training.
    In many dimensions even a random walk has two components that explain most of its variance; look at `distances`.

    Args:
        loss: L, at the weights w through which the plane goes.
        checkpoints: models, state dicts or lists of tensors in the shapes of `loss.params`, in order; 2 or more.
        num: of directions.
        normalize: None, unit vectors; "filter", with the norm of the weights in every filter; then they are no longer
            orthogonal, and `coordinates` are by least squares.
        biases: as in `filter_normalized`; only for "filter".

    Raises:
        ValueError: fewer than two checkpoints, num out of range, checkpoints that do not fit or do not differ enough.

    Source: Li et al. (2018), arXiv:1712.09913.
    """
    if not 1 <= num < max(len(checkpoints), 2) or len(checkpoints) < 2:
        raise ValueError(f"num must be from 1 to one less than the checkpoints, got {num} for {len(checkpoints)}")
    weights = [w.detach() for w in loss.params]
    points = [_differences(weights_and_buffers(loss, c)[0], weights) for c in checkpoints]
    n = len(points)
    gram = _inner(points, points)
    centring = torch.eye(n, dtype=torch.float64) - 1 / n
    values, vectors = torch.linalg.eigh(centring @ gram @ centring)
    values, vectors = values.flip(0).clamp(min=0)[:num], vectors.flip(1)[:, :num]
    total = float((centring @ gram).trace())
    if not float(values[-1]) > 1e-12 * total > 0:
        raise ValueError(
            f"the {n} checkpoints span fewer than {num} directions: ask for fewer, or for more checkpoints"
        )
    vectors = vectors - vectors.mean(0)
    vectors = vectors * torch.where(vectors[-1] >= vectors[0], 1, -1)  # a component has no sign: training ends high
    directions = [
        normalized(loss, _combination((v / value.sqrt()).tolist(), points), normalize, biases)
        for value, v in zip(values, vectors.T, strict=True)
    ]
    between, along = _inner(directions, directions), _inner(points, directions)
    coordinates = torch.linalg.solve(between, along.T).T
    squares = gram.diagonal() - (coordinates @ between * coordinates).sum(dim=1)
    return Trajectory(
        directions,
        coordinates,
        values / total,
        squares.clamp(min=0).sqrt(),
        settings={"num_checkpoints": n, "normalize": normalize, "biases": biases} | loss.settings(),
        provenance=provenance(),
    )


def _differences(a: Direction, b: Direction) -> list[Tensor]:
    """a - b, in float32 where the weights have fewer bits: checkpoints of one run are close to each other."""
    wide = [torch.promote_types(y.dtype, torch.float32) for y in b]
    return [x.to(y.device, dtype) - y.to(dtype) for x, y, dtype in zip(a, b, wide, strict=True)]


def _combination(factors: Sequence[float], points: Sequence[Direction]) -> list[Tensor]:
    return [sum(f * p for f, p in zip(factors, parts, strict=True)) for parts in zip(*points, strict=True)]


def _inner(a: Sequence[Direction], b: Sequence[Direction]) -> Tensor:
    """<a_i, b_j>, (len(a), len(b)) float64 on the CPU, over pieces of the vectors."""
    total = torch.zeros(len(a), len(b), dtype=torch.float64)
    for of_a, of_b in zip(zip(*a, strict=True), zip(*b, strict=True), strict=True):
        for start in range(0, of_a[0].numel(), CHUNK):
            left, right = (
                torch.stack([x.flatten()[start : start + CHUNK].double() for x in xs]) for xs in (of_a, of_b)
            )
            total += (left @ right.T).cpu()
    return total
