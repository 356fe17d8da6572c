"""Changes of the weights that leave the function of a model as it is: rescaling of channels, and permutations."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from sam_optim.core.module_state import measured
from sam_optim.core.random import Stream
from sam_optim.symmetries.channels import FIXED, Touch
from sam_optim.symmetries.inputs import Inputs, check_outputs, inputs_for, outputs_of
from sam_optim.symmetries.rules import Permutations, Scales
from sam_optim.symmetries.tracing import Found


class NoSymmetry(ValueError):
    """The model has nothing that this change could change."""


def rescale(
    model: nn.Module,
    alpha: float = 2.0,
    *,
    seed: int | None = None,
    inputs: Inputs | None = None,
    tolerance: float | None = None,
) -> nn.Module:
    """A copy of the model with channels rescaled between layers; the function is the same.

        W_b relu(W_a x + c_a) = (W_b / alpha) relu(alpha W_a x + alpha c_a),   alpha > 0

    Every channel between two layers that allows it is multiplied by alpha where it is made (weights and bias of a
    linear layer or convolution, affine parameters of a normalisation) and divided by alpha where it is used. It may
    pass through ReLU, pooling, dropout, sums (channels that a skip connection ties get one factor), attention (values)
    and anything that only moves data. Inputs, outputs, what goes into another nonlinearity, and what a normalisation
    layer sees (`rescale_normalized`) stay.

    Args:
        model: any module whose forward pass runs on `inputs`. It is not changed.
        alpha: the factor, of every channel. A layer between two others takes alpha and 1 / alpha: its weights stay.
        seed: None, or each class of tied channels has a factor of its own, alpha ** u with u uniform on (-1, 1).
        inputs: a tensor, a tuple of positional or a mapping of keyword arguments, on which the model is traced and its
            outputs compared; None for two normal examples, of the size that timm's `default_cfg` or the first
            convolution or linear layer names.
        tolerance: of the largest difference of the outputs, relative to the largest output. None is 1e-10 in float64,
            1e-3 in float32, 0.05 in 16 bits.

    Returns:
        A deep copy with other weights, in the modes of the original, without gradients.

    Raises:
        ValueError: alpha is not a positive number, or the model has no channel that can be rescaled (`NoSymmetry`).
        RuntimeError: the outputs differ by more than the tolerance (an operation that depends on the scale and was not
            recognised).

    Source: Dinh et al. (2017), arXiv:1703.04933.
    """
    return _scaled(model, alpha, seed, inputs, tolerance, normalized=False)


def rescale_normalized(
    model: nn.Module,
    alpha: float = 2.0,
    *,
    seed: int | None = None,
    inputs: Inputs | None = None,
    tolerance: float | None = None,
) -> nn.Module:
    """A copy of the model with what goes into normalisation layers rescaled; the function is the same.

        N(alpha x; alpha mu, alpha^2 s^2, alpha^2 eps) = N(x; mu, s^2, eps),   N = (x - mu) / sqrt(s^2 + eps)

    Weights in front of BatchNorm, LayerNorm, GroupNorm, InstanceNorm or RMSNorm are multiplied by alpha, with their
    biases and, in a transformer, all that is added to the residual stream; running means take alpha, running variances
    alpha^2. So does the layer's `eps`, an attribute of the copy: with it the function is the same to rounding, with
    running statistics and with those of a batch. With the old eps (the copy's `state_dict()` loaded into
    another model) the normalised values differ by about eps (1 - alpha^-2) / (2 s^2), relative.

    Args, Returns, Raises: as in `rescale`. One factor for everything that one layer normalises.
    """
    return _scaled(model, alpha, seed, inputs, tolerance, normalized=True)


def permute(
    model: nn.Module, seed: int = 0, *, inputs: Inputs | None = None, tolerance: float | None = None
) -> nn.Module:
    """A copy of the model with hidden units in another order; the function is the same.

        W_b f(W_a x + c_a) = (W_b P^T) f(P W_a x + P c_a),   P a permutation, f elementwise

    Channels of convolutions with all that belongs to them (normalisation parameters and statistics, depthwise filters,
    the inputs of every layer that reads them), hidden units of MLPs, heads of attention. Channels that a skip
    connection ties move together.

    Args:
        seed: of the permutations, uniform over those of each set of exchangeable units.
        model, inputs, tolerance: as in `rescale`.

    Raises:
        ValueError: the model has no units that can change places (`NoSymmetry`). RuntimeError: as `rescale`.
    """
    return _transformed(model, inputs, tolerance, Permutations, lambda copied, found: _permute_(copied, found, seed))


def _scaled(
    model: nn.Module,
    alpha: float,
    seed: int | None,
    inputs: Inputs | None,
    tolerance: float | None,
    *,
    normalized: bool,
) -> nn.Module:
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha multiplies channels ahead of a ReLU and must be a number > 0, got {alpha!r}")
    return _transformed(
        model, inputs, tolerance, Scales, lambda copied, found: _scale_(copied, found, alpha, seed, normalized)
    )


def _transformed(model: nn.Module, inputs: Any, tolerance: float | None, rules: Any, change_: Any) -> nn.Module:
    arguments = inputs_for(model, inputs)
    copied = copy.deepcopy(model)
    copied.zero_grad(set_to_none=True)  # they belong to the old weights
    with measured(copied):  # in eval mode: dropout and drop path away, running statistics in use
        before = outputs_of(copied, arguments)
        found = rules(copied).follow(arguments)
    with torch.no_grad():
        change_(copied, found)
    check_outputs(before, outputs_of(copied, arguments), tolerance)
    return copied


def _scale_(model: nn.Module, found: Found, alpha: float, seed: int | None, normalized: bool) -> None:
    classes = _free_classes(found, normalized=normalized)
    if not len(classes):
        kind = "normalisation layers whose input is made by weights" if normalized else "layers joined by ReLU alone"
        raise NoSymmetry(f"nothing to rescale: found no {kind} in {type(model).__name__}")
    factors = torch.ones(found.channels.count, dtype=torch.float64)
    draws = 1.0 if seed is None else 2 * Stream(seed).uniform_like(torch.empty(len(classes), dtype=torch.float64)) - 1
    factors[classes] = torch.as_tensor(alpha**draws, dtype=torch.float64)
    by_tensor: dict[str, list[Touch]] = defaultdict(list)
    for touch in found.touches:
        by_tensor[touch.name].append(touch)
    for name, tensor in _state(model).items():
        factor = torch.ones((), dtype=torch.float64)
        for touch in by_tensor.get(name, []):
            factor = factor * factors[found.channels.roots(touch.ids)] ** touch.power
        if bool((factor != 1).any()):
            tensor.copy_(tensor.double() * factor.to(tensor.device))
    for name, ids in found.norms.items():
        layer = model.get_submodule(name)
        layer.eps = layer.eps * float(factors[found.channels.roots(ids)]) ** 2  # type: ignore[operator, assignment]


def _free_classes(found: Found, *, normalized: bool) -> Tensor:
    """Those that are made by one weight and used up by another (or by a normalisation layer, if `normalized`)."""
    channels = found.channels
    made, used = (
        torch.cat(
            [torch.zeros(1, dtype=torch.int64), *(channels.roots(t.ids).flatten() for t in found.touches if sign(t))]
        )
        for sign in (lambda t: t.power == 1, lambda t: t.power == -1)
    )
    divided = torch.stack([torch.tensor(FIXED), *(channels.roots(ids) for ids in found.norms.values())])
    free = made[torch.isin(made, divided) if normalized else torch.isin(made, used) & ~torch.isin(made, divided)]
    return torch.unique(free[free != FIXED])


def _permute_(model: nn.Module, found: Found, seed: int) -> None:
    state = _state(model)
    places: dict[int, dict[tuple[str, int], list[int]]] = defaultdict(lambda: defaultdict(list))
    for touch in found.touches:
        shape = state[touch.name].shape
        axis = next((k for k, n in enumerate(touch.ids.shape) if n > 1), None)
        if axis is None:
            continue  # one unit alone, or fixed
        for place, unit in enumerate(found.channels.roots(touch.ids).expand_as(touch.ids).flatten().tolist()):
            places[unit][touch.name, axis].append(place)
        assert touch.ids.numel() == shape[axis]
    places.pop(FIXED, None)
    alike: dict[Any, list[int]] = defaultdict(list)
    for unit, shown in places.items():
        alike[tuple(sorted((key, len(at)) for key, at in shown.items()))].append(unit)
    sets = [(kind, units) for kind, units in alike.items() if len(units) > 1]
    if not sets:
        raise NoSymmetry(f"nothing to permute: found no exchangeable hidden units in {type(model).__name__}")
    stream = Stream(seed)
    index: dict[tuple[str, int], Tensor] = {}
    for kind, units in sets:
        order = stream.permutation(len(units))
        for (name, axis), _ in kind:
            at = torch.tensor([places[unit][name, axis] for unit in units])
            index.setdefault((name, axis), torch.arange(state[name].shape[axis]))[at] = at[order]
    for (name, axis), source in index.items():
        state[name].copy_(state[name].index_select(axis, source.to(state[name].device)))


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
