"""Examples to trace a model on, and the comparison of its outputs before and after."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from sam_optim.core.module_state import measured
from sam_optim.core.random import Aside, Stream
from sam_optim.symmetries.tracing import tensors_in

Inputs = Tensor | tuple[Any, ...] | Mapping[str, Any] | None  # None: examples that fit the model
TOLERANCES = {torch.float64: 1e-10, torch.float32: 1e-3}
SIZES = (32, 64, 224)  # of images, tried in this order where the model does not say


def inputs_for(model: nn.Module, inputs: Inputs) -> tuple[Any, ...] | Mapping[str, Any]:
    """The arguments of the forward pass: those given, or normal examples of the size that the model takes."""
    if inputs is not None:
        return inputs if isinstance(inputs, (tuple, Mapping)) else (inputs,)
    parameter = next(iter(model.parameters()), None)
    if parameter is None:
        raise ValueError(f"{type(model).__name__} has no parameters to transform")
    tried = []
    for shape in _shapes(model):
        x = Stream(0).normal_like(torch.empty(2, *shape, dtype=parameter.dtype, device=parameter.device))
        try:
            outputs_of(model, (x,))
        except (RuntimeError, AssertionError, ValueError, TypeError) as error:
            tried.append(f"{tuple(x.shape)}: {type(error).__name__}")
        else:
            return (x,)
    raise ValueError(f"cannot guess the inputs of {type(model).__name__} (tried {tried or 'nothing'}): pass inputs=")


def _shapes(model: nn.Module) -> Iterator[tuple[int, ...]]:
    """The shapes to try for one example."""
    size = (getattr(model, "default_cfg", None) or {}).get("input_size")
    first = next((m for m in model.modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))), None)
    if isinstance(first, nn.Linear):
        yield (first.in_features,)
    elif first is not None:
        if size is not None:
            yield (first.in_channels, *size[1:])
        for n in (*SIZES, *range(1, 32)):
            yield (first.in_channels, *[n] * len(first.kernel_size))


@torch.no_grad()
def outputs_of(model: nn.Module, arguments: tuple[Any, ...] | Mapping[str, Any]) -> list[Tensor]:
    """All floating-point tensors that the model returns, in eval mode; model and generators stay as they are."""
    devices = {p.device for p in model.parameters() if p.is_cuda}
    with measured(model), Aside(0, devices):
        outputs = model(**arguments) if isinstance(arguments, Mapping) else model(*arguments)
        tensors = [x.clone() for x in tensors_in(outputs) if x.is_floating_point()]
    if not tensors:
        raise ValueError(f"{type(model).__name__} returns no tensors that could be compared")
    return tensors


def difference(before: list[Tensor], after: list[Tensor]) -> float:
    """The largest difference of two lists of outputs, relative to the largest output; nan where one is not finite."""
    apart = max(float((a.double() - b.double()).abs().max()) for a, b in zip(before, after, strict=True))
    size = max(float(b.double().abs().max()) for b in before)
    return apart / size if size else apart


def check_outputs(before: list[Tensor], after: list[Tensor], tolerance: float | None) -> None:
    allowed = TOLERANCES.get(before[0].dtype, 0.05) if tolerance is None else tolerance
    if not (change := difference(before, after)) <= allowed:
        raise RuntimeError(
            f"the outputs changed by {change:.2g} relative to the largest, more than {allowed:.2g}: the model does "
            "something with these channels that was not recognized (or, at this precision, rounding: raise tolerance=)"
        )
