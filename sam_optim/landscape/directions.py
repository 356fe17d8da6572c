"""Directions to look along: random ones, eigenvectors, the gradient; scaled to the filters of the weights if asked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from sam_optim.core.geometry import p_norm
from sam_optim.core.module_state import NORM_LAYERS
from sam_optim.core.random import Stream
from sam_optim.core.results import Spectrum
from sam_optim.loss import Loss

Direction = Sequence[Tensor]
Weights = nn.Module | Mapping[str, Tensor] | Direction


def random_direction(loss: Loss, *, seed: int = 0, biases: bool = False) -> list[Tensor]:
    """A Gaussian direction with the norm of the weights in every filter (`filter_normalized`): one tensor for each of
    `loss.params`, the same for one seed and architecture on every device."""
    stream = Stream(seed)
    return filter_normalized(loss, [stream.normal_like(w) for w in loss.params], biases=biases)


def gradient_direction(loss: Loss, *, normalize: str | None = None, biases: bool = False) -> list[Tensor]:
    """The direction in which the loss rises fastest:  d = g / ||g||_2,  g = dL/dw.

    Args:
        normalize: None, a unit vector: coordinates are distances in units of w. "filter": g with the norm of the
            weights in every filter, as `random_direction`.
        biases: as in `filter_normalized`; only for "filter".

    Raises:
        ValueError: the gradient is 0 or not finite: there is no direction at a stationary point.
    """
    return _unit(loss, loss.gradient(), "the gradient", normalize, biases)


def eigenvector_direction(
    loss: Loss, spectrum: Spectrum, index: int = 0, *, normalize: str | None = None, biases: bool = False
) -> list[Tensor]:
    """An eigenvector of the curvature, of unit length; along it L(w + a d) = L + a <g, d> + a^2 lambda / 2 + ...

    Args:
        spectrum: of `hessian_eigenvalues` for this loss, with its eigenvectors (a result read back from JSON has none).
        index: which, in the order of `spectrum.eigenvalues`: 0 is the largest.
        normalize, biases: as in `gradient_direction`.

    Raises:
        ValueError: no such eigenvector, or one that does not fit the parameters.
    """
    vectors = spectrum.eigenvectors or []
    if not -len(vectors) <= index < len(vectors):
        raise ValueError(
            f"the spectrum has {len(vectors)} eigenvectors, none with index {index}: "
            f"measure it with hessian_eigenvalues(loss, num={abs(index) + 1})"
        )
    check_fits(loss, vectors[index])
    return _unit(loss, vectors[index], f"eigenvector {index}", normalize, biases)


@torch.no_grad()
def filter_normalized(loss: Loss, direction: Direction, *, biases: bool = False) -> list[Tensor]:
    """d_f ||w_f|| / ||d_f|| for each filter f, a slice of a weight's first dimension: the scale of the weights is taken
    out of the picture, and with it the rescaling between layers that leaves a ReLU network the same function.

    Biases and normalization parameters do not move; with `biases` they move along themselves, d = w, as in the authors'
    code: a random direction scaled to one number has nothing but a sign.

    Source: Li et al. (2018), arXiv:1712.09913, section 4.
    """
    check_fits(loss, direction)
    normalization = {id(p) for m in loss.model.modules() if isinstance(m, NORM_LAYERS) for p in m.parameters(False)}

    def scaled(w: Tensor, d: Tensor) -> Tensor:
        if w.ndim <= 1 or id(w) in normalization:
            return w.detach().clone() if biases else torch.zeros_like(w)
        of_w, of_d = (torch.linalg.vector_norm(x, dim=tuple(range(1, w.ndim)), keepdim=True) for x in (w, d))
        return d * (of_w / torch.where(of_d > 0, of_d, 1))

    return [scaled(w, d) for w, d in zip(loss.params, direction, strict=True)]


def normalized(loss: Loss, direction: Direction, normalize: str | None, biases: bool) -> list[Tensor]:
    """As it is (None), or "filter": `filter_normalized`."""
    if normalize not in (None, "filter"):
        raise ValueError(f"normalize must be None or 'filter', got {normalize!r}")
    return list(direction) if normalize is None else filter_normalized(loss, direction, biases=biases)


def check_fits(loss: Loss, direction: Direction) -> None:
    shapes, expected = [tuple(d.shape) for d in direction], [tuple(w.shape) for w in loss.params]
    if shapes != expected:
        pairs = enumerate(zip(shapes, expected, strict=False))
        first = next((i for i, (s, e) in pairs if s != e), min(len(shapes), len(expected)))
        raise ValueError(
            "a direction has one tensor for each parameter, of its shape (see `loss.params`); "
            f"got {len(shapes)} for {len(expected)} parameters, the first that differs is number {first}"
        )


def weights_and_buffers(loss: Loss, weights: Weights) -> tuple[Direction, list[tuple[Tensor, Tensor]]]:
    """w' in the order of `loss.params`, and pairs of a floating-point buffer of the model and its value there."""
    if isinstance(weights, nn.Module):
        weights = weights.state_dict()
    if not isinstance(weights, Mapping):
        check_fits(loss, weights)
        return [w.detach() for w in weights], []
    names = {id(p): name for name, p in loss.model.named_parameters()}
    parameters = [names[id(p)] for p in loss.params]
    saved = loss.model.state_dict()
    buffers = {name: b for name, b in loss.model.named_buffers() if b.is_floating_point() and name in saved}
    if missing := [name for name in (*parameters, *buffers) if name not in weights]:
        raise ValueError(f"the other weights lack {missing[:3]}; they need the names of the model's own state_dict()")
    chosen = [weights[name].detach() for name in parameters]
    check_fits(loss, chosen)
    return chosen, [(b, weights[name].detach()) for name, b in buffers.items()]


def _unit(loss: Loss, direction: Direction, name: str, normalize: str | None, biases: bool) -> list[Tensor]:
    length = float(p_norm(direction, 2))
    if not 0 < length < float("inf"):
        raise ValueError(f"{name} has length {length} and gives no direction")
    unit = [(d / length).to(w) for d, w in zip(direction, loss.params, strict=True)]
    return normalized(loss, unit, normalize, biases)
