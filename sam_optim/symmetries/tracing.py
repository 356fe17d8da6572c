"""Which channels of a model may be rescaled or permuted, found by running it once and following its operations.

Every torch function that the forward pass calls is seen with its real arguments (a TorchFunctionMode), so that any
Python in the model is allowed. What moves data around (reshape, indexing, cat, ...) is run a second time on the channel
numbers themselves. An operation that is not known fixes all channels that go into it: the model loses a symmetry then,
and never its function.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from sam_optim.symmetries.channels import FIXED, Channels, Touch, compressed

# f(alpha x) = alpha f(x), channel by channel
KEEPING = {"relu", "leaky_relu", "dropout", "dropout1d", "dropout2d", "dropout3d", "abs", "neg", "pad"}
KEEPING |= {f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)}
KEEPING |= {"to", "float", "double", "type_as", "clone", "detach", "contiguous"}
# elementwise, and no more than that
CURVED = {"gelu", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "hardtanh", "relu6", "elu", "selu", "celu"}
CURVED |= {"softplus", "mish", "exp", "pow", "__pow__", "square", "sqrt", "rsqrt", "logsigmoid"}
# the same data in other places
MOVING = {"reshape", "view", "flatten", "unflatten", "permute", "transpose", "squeeze", "unsqueeze", "expand", "unbind"}
MOVING |= {"__getitem__", "chunk", "split", "select", "narrow", "roll", "flip", "movedim", "swapaxes", "repeat"}
MOVING |= {"cat", "concat", "stack", "expand_as", "reshape_as", "view_as", "pixel_shuffle", "pixel_unshuffle"}
MOVING |= {"channel_shuffle", "__get__"}
READING = {"item", "__bool__", "__float__", "__int__", "__index__", "tolist", "numpy", "__setitem__"}
ALIASES = {"__add__": "add", "__radd__": "add", "__iadd__": "add", "__sub__": "add", "__isub__": "add", "sub": "add"}
ALIASES |= {"__mul__": "mul", "__rmul__": "mul", "__imul__": "mul", "multiply": "mul", "__matmul__": "matmul"}
ALIASES |= {"__truediv__": "div", "__itruediv__": "div", "true_divide": "div", "bmm": "matmul"}


@dataclass
class Found:
    """What one pass saw: the channels, where they show, and the normalisation layers that see a class as their input.

    norms: module name -> the class whose scale the layer divides out; its eps has to follow.
    """

    channels: Channels = field(default_factory=Channels)
    touches: list[Touch] = field(default_factory=list)
    norms: dict[str, Tensor] = field(default_factory=dict)


class Follower(TorchFunctionMode):
    """The rules that scales and permutations share: `_name` is that of the torch function `name`, whose parameters it
    has after the result."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.found = Found()
        self.model = model
        self.stack: list[str] = []  # of the modules whose forward is running
        self._names = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
        self._parameters = {id(p) for p in model.parameters()}
        self._ids: dict[int, Tensor] = {}
        self._alive: list[Any] = []  # a tensor that is gone leaves its id() to another
        self._uses: Counter[str] = Counter()

    def follow(self, inputs: tuple[Any, ...] | Mapping[str, Any]) -> Found:
        """One forward pass of the model, which is in eval mode; its outputs are fixed."""
        with torch.no_grad(), self._modules(), self:
            outputs = self.model(**inputs) if isinstance(inputs, Mapping) else self.model(*inputs)
        self.unknown(tensors_in(outputs), [])
        for touch in self.found.touches:
            if self._uses[touch.name] > 1:  # tied weights, a module that runs twice: one change cannot serve both
                self.channels.fix(touch.ids)
        return self.found

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        tensors, results = tensors_in((args, kwargs)), tensors_in(result)
        name = _name_of(func)
        if not results and name not in READING:
            return result  # a shape, a dtype
        if name == "to" and any(result is x for x in tensors):
            return result
        self._uses.update({self._names[id(x)] for x in tensors if id(x) in self._names})
        self._alive.append((tensors, results))
        rule = getattr(self, f"_{name}", None)
        first: Any = args[0] if args else kwargs.get("input")
        if rule is not None:
            rule(result, *args, **kwargs)
        elif name in KEEPING and not (name == "pad" and kwargs.get("value")):
            self.keep(result, first)
        elif name in CURVED and len(tensors) == 1:
            self.curve(result, first)
        elif name in MOVING:
            self._move(func, result, args, kwargs)
        else:
            self.unknown(tensors, results)
        return result

    @contextmanager
    def _modules(self) -> Iterator[None]:
        """Meanwhile the names of the modules whose forward is running are on the stack."""

        def leave(*_: Any) -> None:  # what a hook returns takes the place of the output
            self.stack.pop()

        handles = []
        for name, m in self.model.named_modules():
            handles.append(m.register_forward_pre_hook(lambda _m, _x, name=name: self.stack.append(name)))
            handles.append(m.register_forward_hook(leave, always_call=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @property
    def channels(self) -> Channels:
        return self.found.channels

    def ids(self, x: Tensor) -> Tensor:
        """The channels of x, with as many axes as x has; those of a constant are fixed."""
        if id(x) not in self._ids:
            self.set(x, self.of_parameter(x) if id(x) in self._parameters else torch.tensor(FIXED))
        return self._ids[id(x)]

    def set(self, x: Tensor, ids: Tensor) -> None:
        self._ids[id(x)] = compressed(ids.view([1] * (x.ndim - ids.ndim) + list(ids.shape)))

    def touch(self, x: Tensor | None, ids: Tensor, power: int) -> None:
        """x shows these channels; they are fixed if x is no parameter or buffer of the model (a computed weight)."""
        if x is not None and id(x) in self._names:
            self.found.touches.append(
                Touch(self._names[id(x)], ids.view([1] * (x.ndim - ids.ndim) + [*ids.shape]), power)
            )
        elif x is not None:
            self.channels.fix(ids)

    def unknown(self, tensors: list[Tensor], results: list[Tensor]) -> None:
        for x in tensors:
            if x.is_floating_point():
                self.channels.fix(self.ids(x))
        for x in results:
            self.set(x, torch.tensor(FIXED))

    def keep(self, result: Any, x: Tensor) -> None:
        """Channel by channel, whatever happens along the axes on which the channel does not change."""
        ids = self.ids(x)
        for y in tensors_in(result):
            fits = y.ndim == x.ndim and all(i in (1, n) for i, n in zip(ids.shape, y.shape, strict=True))
            self.set(y, ids if fits else self.mixed(ids))

    def spread(self, result: Tensor, ids: Tensor, axis: int) -> None:
        """One channel for each place of one axis of the result, ids: (n,)."""
        shape = [1] * result.ndim
        shape[axis] = len(ids)
        self.set(result, ids.view(shape))

    def weighted(self, result: Tensor, axis: int, weight: Tensor, bias: Tensor | None, inputs: Tensor) -> None:
        """W x + b, with new channels along `axis` of the result; `inputs`, channels, broadcast to W."""
        new = self.channels.new([len(weight)])
        self.touch(weight, inputs, -1)
        self.touch(weight, new.view([-1] + [1] * (weight.ndim - 1)), 1)
        self.touch(bias, new, 1)
        self.spread(result, new, axis)

    def of_parameter(self, x: Tensor) -> Tensor:
        """The channels of a parameter that is used as data."""
        return torch.tensor(FIXED)

    def curve(self, result: Tensor, x: Tensor) -> None:
        """An elementwise function."""
        raise NotImplementedError

    def mixed(self, ids: Tensor) -> Tensor:
        """The channels of what each entry of which may come from all of these."""
        raise NotImplementedError

    def shifted(self, ids: Tensor) -> None:
        """A constant was added."""
        raise NotImplementedError

    def _move(self, func: Callable[..., Any], result: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """The same move, of the numbers of the channels instead of the data."""

        def numbers(x: Any) -> Any:
            if not isinstance(x, Tensor) or not x.is_floating_point():
                return x
            return self.ids(x).expand(x.shape).to(x.device, torch.float64)

        moved = func(*tree_map(numbers, args), **tree_map(numbers, kwargs))
        for y, ids in zip(tensors_in(result), tensors_in(moved), strict=True):
            self.set(y, ids.cpu().long() if y.is_floating_point() else torch.tensor(FIXED))

    def _mean(self, result: Tensor, input: Tensor, dim: Any = None, keepdim: bool = False, **_: Any) -> None:
        ids = self.ids(input)
        axes = range(input.ndim) if dim is None else [d % input.ndim for d in ([dim] if isinstance(dim, int) else dim)]
        if any(ids.shape[d] > 1 for d in axes):
            self.set(result, self.mixed(ids))
        else:
            self.set(result, ids if keepdim else ids.squeeze(tuple(axes)))

    _sum = _amax = _mean

    def _add(self, result: Tensor, input: Any, other: Any, **_: Any) -> None:
        """Both sides change alike."""
        sides = [self.ids(x) for x in (input, other) if isinstance(x, Tensor)]
        if len(sides) == 2:
            self.channels.tie(*sides)
        else:
            self.shifted(sides[0])
        self.set(result, torch.broadcast_tensors(*sides)[0])

    def _div(self, result: Tensor, input: Any, other: Any, **_: Any) -> None:
        if isinstance(other, Tensor):
            self.unknown([x for x in (input, other) if isinstance(x, Tensor)], [result])
        else:
            self.set(result, self.ids(input))

    def _linear(self, result: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        ids = self.channels.along(self.ids(input), input.ndim, -1)
        self.weighted(result, -1, weight, bias, ids[None, :])

    def _addmm(self, result: Tensor, input: Tensor, mat1: Tensor, mat2: Tensor, **scaled: Any) -> None:
        """input + mat1 mat2: a linear layer whose weight, mat2, is (in, out)."""
        if scaled or id(mat2) not in self._parameters or input.ndim != 1:
            self.unknown([input, mat1, mat2], [result])
            return
        new = self.channels.new([mat2.shape[1]])
        self.touch(mat2, self.channels.along(self.ids(mat1), 2, -1)[:, None], -1)
        self.touch(mat2, new, 1)
        self.touch(input, new, 1)
        self.spread(result, new, -1)

    def _conv2d(
        self, result: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **more: Any
    ) -> None:
        groups = rest[3] if len(rest) > 3 else more.get("groups", 1)
        axis = 1 - weight.ndim  # without a batch axis it is the first
        ids = self.channels.along(self.ids(input), input.ndim, axis).expand(input.shape[axis])
        ids = ids.view(groups, -1).repeat_interleave(len(weight) // groups, dim=0) if groups > 1 else ids[None, :]
        self.weighted(result, axis, weight, bias, ids.reshape(*ids.shape, *[1] * (weight.ndim - 2)))

    _conv1d = _conv3d = _conv2d


def tensors_in(tree: Any) -> list[Tensor]:
    """Also of the outputs of Hugging Face models, mappings that pytree may not know."""
    return [x for x in tree_leaves(dict(tree) if isinstance(tree, Mapping) else tree) if isinstance(x, Tensor)]


def _name_of(func: Callable[..., Any]) -> str:
    """`add` for add_, __iadd__ and the like: in place or not, the channels are the same."""
    name = getattr(func, "__name__", "")
    if not name.startswith("__"):
        name = name.rstrip("_")
    return ALIASES.get(name, name)
