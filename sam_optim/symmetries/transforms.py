"""Changes of the weights that leave the function of a model as it is: rescaling of channels, and permutations."""

from __future__ import annotations

import copy
import math
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from sam_optim.core.module_state import measured
from sam_optim.core.random import Stream
from sam_optim.symmetries.channels import FIXED, Trace
from sam_optim.symmetries.inputs import Inputs, check_outputs, inputs_for, outputs_of
from sam_optim.symmetries.rules import Permutations, Scales
from sam_optim.symmetries.tracing import Tracer

Axis = tuple[str, int]  # of a parameter or buffer: its name, and which


class NoSymmetry(ValueError):
    """The model has no channels that this transform applies to."""


def rescale(
    model: nn.Module,
    alpha: float = 2.0,
    *,
    seed: int | None = None,
    inputs: Inputs = None,
    tolerance: float | None = None,
) -> nn.Module:
    """A copy of the model with channels rescaled between layers; the function is the same.

        W_b relu(W_a x + c_a) = (W_b / alpha) relu(alpha W_a x + alpha c_a),   alpha > 0

    Every channel between two layers that allows it is multiplied by alpha where it is made (weights and bias of a
    linear layer or convolution, affine parameters of a normalization) and divided by alpha where it is used. It may
    pass through ReLU, pooling, dropout, sums (channels that a skip connection ties get one factor), attention (values)
    and anything that only moves data. Inputs, outputs, what goes into another nonlinearity, and what a normalization
    layer sees (`rescale_normalized`) stay.

    Args:
        model: any module whose forward pass runs on `inputs`. It is not changed.
        alpha: the factor, of every channel. A layer between two others takes alpha and 1 / alpha: its weights stay.
        seed: None, or each class of tied channels has its own factor, alpha ** u with u uniform on (-1, 1).
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
            recognized).

    Source: Dinh et al. (2017), arXiv:1703.04933.
    """
    change_ = partial(_scale_, alpha=alpha, seed=seed, normalized=False)
    return _transformed(model, inputs, tolerance, Scales, change_)


def rescale_normalized(
    model: nn.Module,
    alpha: float = 2.0,
    *,
    seed: int | None = None,
    inputs: Inputs = None,
    tolerance: float | None = None,
) -> nn.Module:
    """A copy of the model with what goes into normalization layers rescaled; the function is the same.

        N(alpha x; alpha mu, alpha^2 s^2, alpha^2 eps) = N(x; mu, s^2, eps),   N = (x - mu) / sqrt(s^2 + eps)

    Weights in front of BatchNorm, LayerNorm, GroupNorm, InstanceNorm or RMSNorm are multiplied by alpha, with their
    biases and, in a transformer, all that is added to the residual stream; running means take alpha, running variances
    alpha^2. So does the layer's `eps`, an attribute of the copy: with it the function is the same to rounding, with
    running statistics and with those of a batch. With the old eps (the copy's `state_dict()` loaded into
    another model) the normalized values differ by about eps (1 - alpha^-2) / (2 s^2), relative.

    Args, Returns, Raises: as in `rescale`. One factor for everything that one layer normalizes.
    """
    change_ = partial(_scale_, alpha=alpha, seed=seed, normalized=True)
    return _transformed(model, inputs, tolerance, Scales, change_)


def permute(model: nn.Module, seed: int = 0, *, inputs: Inputs = None, tolerance: float | None = None) -> nn.Module:
    """A copy of the model with hidden units in another order; the function is the same.

        W_b f(W_a x + c_a) = (W_b P^T) f(P W_a x + P c_a),   P a permutation, f elementwise

    Channels of convolutions with all that belongs to them (normalization parameters and statistics, depthwise filters,
    the inputs of every layer that reads them), hidden units of MLPs, heads of attention. Channels that a skip
    connection ties move together.

    Args:
        seed: of the permutations, uniform over those of each set of exchangeable units.
        model, inputs, tolerance: as in `rescale`.

    Raises:
        ValueError: the model has no units that can change places (`NoSymmetry`). RuntimeError: as `rescale`.
    """
    return _transformed(model, inputs, tolerance, Permutations, partial(_permute_, seed=seed))


def _transformed(model: nn.Module, inputs: Inputs, tolerance: float | None, tracer: type[Tracer],
                 change_: Callable[[nn.Module, Trace], None]) -> nn.Module:  # fmt: skip
    """A copy of the model, changed as its trace allows; raises if the outputs differ."""
    arguments = inputs_for(model, inputs)
    copied = copy.deepcopy(model)
    copied.zero_grad(set_to_none=True)  # gradients belong to the old weights
    with measured(copied):  # in eval mode: dropout and drop path away, running statistics in use
        before = outputs_of(copied, arguments)
        trace = tracer(copied).run(arguments)
    with torch.no_grad():
        change_(copied, trace)
    check_outputs(before, outputs_of(copied, arguments), tolerance)
    return copied


def _scale_(model: nn.Module, trace: Trace, *, alpha: float, seed: int | None, normalized: bool) -> None:
    """Each class of tied channels takes a factor; every tensor the factors of the channels that occur in it."""
    if isinstance(alpha, bool) or not isinstance(alpha, (int, float)) or not (math.isfinite(alpha) and alpha > 0):
        raise ValueError(f"alpha multiplies channels ahead of a ReLU and must be a number > 0, got {alpha!r}")
    classes = _free_classes(trace, normalized=normalized)
    if not len(classes):
        kind = "normalization layers whose input is made by weights" if normalized else "layers joined by ReLU alone"
        raise NoSymmetry(f"nothing to rescale: found no {kind} in {type(model).__name__}")
    factors = torch.ones(len(trace.channels), dtype=torch.float64)
    draws = 1.0 if seed is None else 2 * Stream(seed).uniform_like(torch.empty(len(classes), dtype=torch.float64)) - 1
    factors[classes] = torch.as_tensor(alpha**draws, dtype=torch.float64)
    state = _state(model)
    by_tensor: dict[str, Tensor] = {}
    for o in trace.occurrences:
        by_tensor[o.name] = by_tensor.get(o.name, torch.ones(())) * factors[trace.channels.roots(o.ids)] ** o.power
    for name, factor in by_tensor.items():
        if bool((factor != 1).any()):
            state[name].copy_(state[name].double() * factor.to(state[name].device))
    for name, ids in trace.norms.items():
        layer = model.get_submodule(name)
        layer.eps = layer.eps * float(factors[trace.channels.roots(ids)]) ** 2  # type: ignore[operator, assignment]


def _free_classes(trace: Trace, *, normalized: bool) -> Tensor:
    """Classes that one weight produces and another consumes, or, if `normalized`, a normalization layer divides out."""
    channels, none = trace.channels, torch.tensor([FIXED])

    def classes(power: int) -> Tensor:
        return torch.cat([none, *(channels.roots(o.ids).flatten() for o in trace.occurrences if o.power == power)])

    divided_out = torch.cat([none, *(channels.roots(ids).flatten() for ids in trace.norms.values())])
    outputs, inputs = classes(1), classes(-1)
    is_divided = torch.isin(outputs, divided_out)
    free = outputs[is_divided if normalized else torch.isin(outputs, inputs) & ~is_divided]
    return torch.unique(free[free != FIXED])


def _permute_(model: nn.Module, trace: Trace, *, seed: int) -> None:
    """Permutes the units that occur at equally many places of the same axes."""
    state = _state(model)
    places: dict[int, dict[Axis, list[int]]] = defaultdict(lambda: defaultdict(list))
    for occurrence in trace.occurrences:
        axis = next((axis for axis, n in enumerate(occurrence.ids.shape) if n > 1), None)
        if axis is None:
            continue  # one unit alone, or fixed
        assert occurrence.ids.numel() == state[occurrence.name].shape[axis]
        for place, unit in enumerate(trace.channels.roots(occurrence.ids).flatten().tolist()):
            places[unit][occurrence.name, axis].append(place)
    places.pop(FIXED, None)
    alike: dict[Any, list[int]] = defaultdict(list)
    for unit, axes in places.items():
        alike[tuple(sorted((axis, len(at)) for axis, at in axes.items()))].append(unit)
    sets = {kind: units for kind, units in alike.items() if len(units) > 1}
    if not sets:
        raise NoSymmetry(f"nothing to permute: found no exchangeable hidden units in {type(model).__name__}")
    stream = Stream(seed)
    sources: dict[Axis, Tensor] = {}
    for kind, units in sets.items():
        order = stream.permutation(len(units))
        for (name, axis), _ in kind:
            at = torch.tensor([places[unit][name, axis] for unit in units])
            sources.setdefault((name, axis), torch.arange(state[name].shape[axis]))[at] = at[order]
    for (name, axis), source in sources.items():
        state[name].copy_(state[name].index_select(axis, source.to(state[name].device)))


def _state(model: nn.Module) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}
