"""Convolutions whose second derivatives are cheap on a CPU, and normalisation by running statistics folded into them.

torch's own double backward computes the gradients of a convolution's weight and input as convolutions with images for
kernels. They are ordinary backward passes: with C(x, w) bilinear, <g, C(x, w)> has mixed second derivatives
C(x', w) + C(x, w'), the backward pass of C(., w') at g and that of C(x', .) at g. For the layers of a ResNet on CIFAR
these cost half of that; where weights outnumber the inputs, as in late layers on small images, torch's are as fast.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from sam_optim.loss.curvature import Saved

_BATCH_NORMS = (F.batch_norm, torch.batch_norm)
# What normalisations ask before they begin. Anything else between a convolution and a normalisation may change, detach
# or hook the output, the weights or the statistics, in place.
_ATTRIBUTES: tuple[Any, ...] = (Tensor.ndim, Tensor.shape)
_QUESTIONS = (Tensor.dim, Tensor.size, torch._assert, *(a.__get__ for a in _ATTRIBUTES))

MANY_WEIGHTS = 2  # times as many as inputs: there other layouts and a folded normalisation cost more than they save


class Geometry(NamedTuple):
    """Of a convolution: one number for each spatial dimension, and the number of groups."""

    stride: tuple[int, ...]
    padding: tuple[int, ...]
    dilation: tuple[int, ...]
    groups: int


class _Made(NamedTuple):
    """The convolution that gave the last output, and the version that this was."""

    output: weakref.ref[Tensor]
    version: int
    x: Tensor
    weight: Tensor
    bias: Tensor | None
    geometry: Geometry


class CheapSecondDerivatives(TorchFunctionMode):
    """While it is active, convolutions of plain tensors on the CPU are computed so, and one that a normalisation by
    running statistics directly follows is computed again with that in its weight and bias: the same to rounding."""

    def __init__(self) -> None:
        super().__init__()
        self._last: _Made | None = None

    def __exit__(self, *exc: Any) -> None:
        self._last = None
        super().__exit__(*exc)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if (dims := _CONVOLUTIONS.get(func)) and (made := _convolution(dims, *args, **kwargs)) is not None:
            y = _Convolution.apply(*made)
            self._last = _Made(weakref.ref(y), y._version, *made)
            return y
        if func in _QUESTIONS:
            return func(*args, **kwargs)
        last, self._last = self._last, None
        if func in _BATCH_NORMS and last is not None:
            norm = _normalisation if func is F.batch_norm else _native_normalisation
            if (folded := norm(last, *args, **kwargs)) is not None:
                return _Convolution.apply(*folded)
        return func(*args, **kwargs)


_CONVOLUTIONS: dict[Callable[..., Any], int] = {torch.conv1d: 1, torch.conv2d: 2, torch.conv3d: 3}
_Arguments = tuple[Tensor, Tensor, Tensor | None, Geometry]


def _convolution(
    dims: int,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    stride: int | Sequence[int] = 1,
    padding: int | Sequence[int] | str = 0,
    dilation: int | Sequence[int] = 1,
    groups: int = 1,
) -> _Arguments | None:
    """The arguments of torch's function as those of ours; None for one that is torch's affair."""
    tensors = [t for t in (input, weight, bias) if t is not None]
    plain = all(type(t) in (Tensor, nn.Parameter) and t.device.type == "cpu" for t in tensors)
    if not plain or input.ndim != dims + 2 or {t.dtype for t in tensors} != {weight.dtype} or weight.is_complex():
        return None
    if _transformed() or not (torch.is_grad_enabled() and any(t.requires_grad for t in tensors)):
        return None
    if groups == 1 and weight.numel() > MANY_WEIGHTS * input.numel():
        return None
    strides, paddings, dilations = (_of_each_dimension(n, dims) for n in (stride, padding, dilation))
    if () in (strides, paddings, dilations):
        return None
    return input, weight, bias, Geometry(strides, paddings, dilations, groups)


def _of_each_dimension(n: Any, dims: int) -> tuple[int, ...]:
    """() for what torch may understand, or has an error for: "same", numbers of numpy, too many."""
    if isinstance(n, int):
        return (n,) * dims
    return tuple(n) * (dims // len(n)) if isinstance(n, (tuple, list)) and len(n) in (1, dims) else ()


def _normalisation(
    made: _Made,
    input: Tensor,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> _Arguments | None:
    """The convolution with s w and s (b - mean) + bias, s = weight / sqrt(var + eps), for a normalisation of what it
    gave; None where it is one of something else, or not by running statistics."""
    if made.output() is not input or input._version != made.version or _transformed():
        return None
    if training or running_mean is None or running_var is None:
        return None
    tensors = [t for t in (running_mean, running_var, weight, bias) if t is not None]
    if any(type(t) not in (Tensor, nn.Parameter) or t.dtype != made.weight.dtype for t in tensors):
        return None
    if any(t.shape != made.weight.shape[:1] for t in tensors):
        return None
    s = (running_var + eps).rsqrt()
    s = s if weight is None else s * weight
    shift = -running_mean * s if made.bias is None else (made.bias - running_mean) * s
    shift = shift if bias is None else shift + bias
    return made.x, made.weight * s.reshape(-1, *[1] * (made.weight.ndim - 1)), shift, made.geometry


def _native_normalisation(
    made: _Made,
    input: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
    cudnn_enabled: bool,
) -> _Arguments | None:
    return _normalisation(made, input, running_mean, running_var, weight, bias, training, momentum, eps)


def _transformed() -> bool:
    """Where a function of autograd that is not torch's own has no rule, or may not stand for one that is."""
    functorch = torch._C._functorch.peek_interpreter_stack() is not None
    forward = forward_ad._current_level >= 0
    return functorch or forward or torch.is_autocast_enabled("cpu") or _recomputed()


def _recomputed() -> bool:
    """In an activation checkpoint, which runs the model again when this mode is over, and compares what both save."""
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    return hooks is not None and not isinstance(getattr(hooks[0], "__self__", None), Saved)


class _Convolution(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry) -> Tensor:
        ctx.save_for_backward(x, w)
        ctx.geometry = geometry
        return _convolve(x, w, b, geometry)

    @staticmethod
    def backward(ctx: Any, g: Tensor) -> tuple[Tensor | None, ...]:
        x, w = ctx.saved_tensors
        return (*_ConvolutionBackward.apply(g, x, w, ctx.needs_input_grad[:3], ctx.geometry), None)


class _ConvolutionBackward(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, g: Tensor, x: Tensor, w: Tensor, needed: tuple[bool, bool, bool], geometry: Geometry
    ) -> tuple[Tensor | None, ...]:
        ctx.save_for_backward(g, x, w)
        ctx.geometry = geometry
        ctx.set_materialize_grads(False)
        return _backward(g, x, w, needed, geometry)

    @staticmethod
    def backward(ctx: Any, x2: Tensor | None, w2: Tensor | None, b2: Tensor | None) -> tuple[Tensor | None, ...]:
        """Of <g, C(x2, w) + C(x, w2) + b2> with respect to g, x and w."""
        g, x, w = ctx.saved_tensors
        needs_g, needs_x, needs_w = ctx.needs_input_grad[:3]
        g_g = g_x = g_w = None
        if needs_g:
            terms = [(a, b) for a, b in ((x2, w), (x, w2)) if a is not None and b is not None]
            for i, (a, b) in enumerate(terms):
                y = _Convolution.apply(a, b, b2 if i == 0 else None, ctx.geometry)
                g_g = y if g_g is None else g_g.add_(y)
            if not terms and b2 is not None:
                g_g = b2.reshape(-1, *[1] * (g.ndim - 2)).expand_as(g)
        # C(x2, .) and C(., w2) at g are what one backward pass takes if x2 and w2 stand for x and w
        needed = (needs_x and w2 is not None, needs_w and x2 is not None, False)
        if any(needed):
            at = (g, x if x2 is None else x2, w if w2 is None else w2)
            g_x, g_w, _ = _ConvolutionBackward.apply(*at, needed, ctx.geometry)
        return g_g, g_x, g_w, None, None


def _convolve(x: Tensor, w: Tensor, b: Tensor | None, geometry: Geometry) -> Tensor:
    none = (0,) * len(geometry.stride)
    return torch.convolution(
        x, w, b, geometry.stride, geometry.padding, geometry.dilation, False, none, geometry.groups
    )


def _backward(
    g: Tensor, x: Tensor, w: Tensor, needed: tuple[bool, bool, bool], geometry: Geometry
) -> tuple[Tensor | None, ...]:
    none = (0,) * len(geometry.stride)
    found = torch.ops.aten.convolution_backward(
        g, x, w, [len(w)], geometry.stride, geometry.padding, geometry.dilation, False, none, geometry.groups,
        list(needed),
    )  # fmt: skip
    return tuple(t if need else None for t, need in zip(found, needed, strict=True))
