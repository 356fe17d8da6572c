"""The plane in which training moved most: principal components of the checkpoints of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sam_optim.core.results import _Result, plain, provenance
from sam_optim.landscape.directions import Direction, Weights, normalized_by, weights_and_buffers
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

    def to_dict(self) -> dict[str, Any]:
        names = ("coordinates", "explained", "distances", "settings", "provenance")
        return {"type": "Trajectory"} | {name: plain(getattr(self, name)) for name in names}


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
    points = [[x.to(w) for x, w in zip(weights_and_buffers(loss, c)[0], loss.params, strict=True)] for c in checkpoints]
    weights = [w.detach() for w in loss.params]
    n = len(points)
    gram = _inner([*points, weights], [*points, weights], origin=weights)[:n, :n]  # around w: w_t are all near it
    centring = torch.eye(n, dtype=torch.float64) - 1 / n
    values, vectors = torch.linalg.eigh(centring @ gram @ centring)
    values, vectors = values.flip(0).clamp(min=0)[:num], vectors.flip(1)[:, :num]
    total = float((centring @ gram).trace())
    if not float(values[-1]) > 1e-12 * total > 0:
        raise ValueError(
            f"the {n} checkpoints span fewer than {num} directions: ask for fewer, or for more checkpoints"
        )
    directions = []
    for value, v in zip(values, vectors.T, strict=True):
        v = v - v.mean()
        v = v * (1 if float(v[-1] - v[0]) >= 0 else -1)  # a component has no sign: training ends at its larger end
        factors = (v / value.sqrt()).tolist()
        unit = [sum(f * (p[i] - w) for f, p in zip(factors, points, strict=True)) for i, w in enumerate(weights)]
        directions.append(normalized_by(loss, unit, normalize, biases))  # type: ignore[arg-type]
    zero = [torch.zeros_like(w) for w in weights]
    shifted = [[a - b for a, b in zip(p, weights, strict=True)] for p in points]
    between = _inner(directions, directions, origin=zero)
    along = _inner(shifted, directions, origin=zero)
    coordinates = torch.linalg.solve(between, along.T).T
    apart = gram.diagonal() - (coordinates @ between * coordinates).sum(dim=1)
    return Trajectory(
        directions,
        coordinates,
        values / total,
        apart.clamp(min=0).sqrt(),
        settings={"num_checkpoints": n, "normalize": normalize, "biases": biases} | loss.settings(),
        provenance=provenance(),
    )


def _inner(a: Sequence[Direction], b: Sequence[Direction], *, origin: Direction) -> Tensor:
    """<a_i - o, b_j - o>, (len(a), len(b)) float64 on the CPU, over pieces of the vectors."""
    found = torch.zeros(len(a), len(b), dtype=torch.float64)
    for k, o in enumerate(origin):
        flat = o.flatten()
        for start in range(0, len(flat), CHUNK):
            piece = slice(start, start + CHUNK)
            left, right = (torch.stack([x[k].flatten()[piece].double() - flat[piece] for x in xs]) for xs in (a, b))
            found += (left @ right.T).cpu()
    return found
