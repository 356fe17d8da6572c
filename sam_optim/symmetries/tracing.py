"""Which channels of a model may be rescaled or permuted, from one forward pass and the operations in it.

Every torch function that the forward pass calls is seen with its real arguments (a TorchFunctionMode), so that any
Python in the model is allowed. What moves data around (reshape, indexing, cat, ...) is run a second time on the channel
numbers themselves. An unknown operation fixes all channels that go into it: that may cost a symmetry, but never changes
the function.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves, tree_map

from sam_optim.symmetries.channels import FIXED, Channels, Occurrence, Trace, compressed

# positively homogeneous, channel by channel: f(alpha x) = alpha f(x)
HOMOGENEOUS = {"relu", "leaky_relu", "dropout", "dropout1d", "dropout2d", "dropout3d", "abs", "neg", "pad"}
HOMOGENEOUS |= {f"{kind}_pool{n}d" for kind in ("max", "avg", "adaptive_avg", "adaptive_max") for n in (1, 2, 3)}
HOMOGENEOUS |= {"to", "float", "double", "type_as", "clone", "detach", "contiguous"}
# elementwise, and no more than that
ELEMENTWISE = {"gelu", "silu", "sigmoid", "tanh", "hardswish", "hardsigmoid", "hardtanh", "relu6", "elu", "selu"}
ELEMENTWISE |= {"celu", "softplus", "mish", "exp", "pow", "__pow__", "square", "sqrt", "rsqrt", "logsigmoid"}
# the same data in other places
MOVING = {"reshape", "view", "flatten", "unflatten", "permute", "transpose", "squeeze", "unsqueeze", "expand", "unbind"}
MOVING |= {"__getitem__", "chunk", "split", "select", "narrow", "roll", "flip", "movedim", "swapaxes", "repeat"}
MOVING |= {"cat", "concat", "stack", "expand_as", "reshape_as", "view_as", "pixel_shuffle", "pixel_unshuffle"}
MOVING |= {"channel_shuffle", "__get__"}
READING = {"item", "__bool__", "__float__", "__int__", "__index__", "tolist", "numpy", "__setitem__"}
ALIASES = {"__add__": "add", "__radd__": "add", "__iadd__": "add", "__sub__": "add", "__isub__": "add", "sub": "add"}
ALIASES |= {"__mul__": "mul", "__rmul__": "mul", "__imul__": "mul", "multiply": "mul", "__matmul__": "matmul"}
ALIASES |= {"__truediv__": "div", "__itruediv__": "div", "true_divide": "div", "bmm": "matmul"}


class Tracer(TorchFunctionMode):
    """The rules that scales and permutations share. Method `_name` is the rule of the torch function `name`: it has
    that function's parameters, after its result."""

    def __init__(self, model: nn.Module):
        super().__init__()
        self.trace = Trace()
        self.model = model
        self.stack: list[str] = []  # of the modules whose forward is running
        self._names = {id(t): name for name, t in [*model.named_parameters(), *model.named_buffers()]}
        self._parameters = {id(p) for p in model.parameters()}
        self._ids: dict[int, Tensor] = {}
        self._alive: list[Any] = []  # the id() of a freed tensor is used again
        self._uses: Counter[str] = Counter()

    def run(self, inputs: tuple[Any, ...] | Mapping[str, Any]) -> Trace:
        """One forward pass of the model, which is in eval mode; its outputs are fixed."""
        with torch.no_grad(), self._modules(), self:
            outputs = self.model(**inputs) if isinstance(inputs, Mapping) else self.model(*inputs)
        self.unknown(tensors_in(outputs), [])
        for occurrence in self.trace.occurrences:
            if self._uses[occurrence.name] > 1:  # tied weights, a module that runs twice: one change cannot serve both
                self.channels.fix(occurrence.ids)
        return self.trace

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
        elif name in HOMOGENEOUS and not (name == "pad" and kwargs.get("value")):
            self.same(result, first)
        elif name in ELEMENTWISE and len(tensors) == 1:
            self.elementwise(result, first)
        elif name in MOVING:
            self._move(func, result, args, kwargs)
        else:
            self.unknown(tensors, results)
        return result

    @contextmanager
    def _modules(self) -> Iterator[None]:
        """Inside, `stack` holds the names of the modules whose forward is running."""

        def leave(*_: Any) -> None:  # what a hook returns replaces the output
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

    # What differs between scales and permutations.

    def parameter_as_data(self, x: Tensor) -> Tensor:
        """The channels of a parameter that is an operand rather than a weight: a position embedding, a layer scale."""
        return torch.tensor(FIXED)

    def elementwise(self, result: Tensor, x: Tensor) -> None:
        """A nonlinear function of each entry."""
        raise NotImplementedError

    def mixture(self, ids: Tensor) -> Tensor:
        """The channels of a result each entry of which depends on all of these."""
        raise NotImplementedError

    def constant_added(self, ids: Tensor) -> None:
        raise NotImplementedError

    def norm(self, result: Tensor, x: Tensor, axis: int, weight: Tensor | None, bias: Tensor | None, *,
             eps: float | None, statistics: Sequence[Tensor | None] = (), num_groups: int = 1,
             num_axes: int = 1) -> None:  # fmt: skip
        """A normalization whose weight and bias lie along one axis.

        statistics: the running mean and variance. num_groups: of channels that are normalized together.
        num_axes: that are normalized over (LayerNorm).
        """
        raise NotImplementedError

    # The channels of tensors.

    @property
    def channels(self) -> Channels:
        return self.trace.channels

    def ids(self, x: Tensor) -> Tensor:
        """The channels of x, with as many axes as x has; those of a constant are fixed."""
        if id(x) not in self._ids:
            self.set(x, self.parameter_as_data(x) if id(x) in self._parameters else torch.tensor(FIXED))
        return self._ids[id(x)]

    def set(self, x: Tensor, ids: Tensor) -> None:
        self._ids[id(x)] = compressed(ids, x.shape)

    def set_axis(self, x: Tensor, ids: Tensor, axis: int) -> None:
        """One channel for each place of one axis, ids: (n,)."""
        shape = [1] * x.ndim
        shape[axis] = len(ids)
        self.set(x, ids.view(shape))

    def occurs(self, x: Tensor | None, ids: Tensor, power: int) -> None:
        """These channels occur in x; they are fixed if x is computed, not a parameter or buffer."""
        if x is None:
            return
        if id(x) not in self._names:
            self.channels.fix(ids)
            return
        ids = ids.view([1] * (x.ndim - ids.ndim) + [*ids.shape])
        self.trace.occurrences.append(Occurrence(self._names[id(x)], ids, power))

    def unknown(self, tensors: Sequence[Tensor | None], results: Sequence[Tensor]) -> None:
        """Fixes all channels that go into an operation or come out of it."""
        for x in tensors:
            if x is not None and x.is_floating_point():
                self.channels.fix(self.ids(x))
        for x in results:
            self.set(x, torch.tensor(FIXED))

    def same(self, result: Any, x: Tensor) -> None:
        """The result has the channels of x, whatever happens along the axes on which they do not vary."""
        ids = self.ids(x)
        for y in tensors_in(result):
            fits = y.ndim == x.ndim and all(i in (1, n) for i, n in zip(ids.shape, y.shape, strict=True))
            self.set(y, ids if fits else self.mixture(ids))

    def linear_map(self, result: Tensor, axis: int, weight: Tensor, bias: Tensor | None, inputs: Tensor) -> None:
        """W x + b, with new channels along `axis` of the result; `inputs`, channels, broadcast to W."""
        outputs = self.channels.new(len(weight))
        self.occurs(weight, inputs, -1)
        self.occurs(weight, outputs.view([-1] + [1] * (weight.ndim - 1)), 1)
        self.occurs(bias, outputs, 1)
        self.set_axis(result, outputs, axis)

    # The rules.

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
            self.set(result, self.mixture(ids))
        else:
            self.set(result, ids if keepdim else ids.squeeze(tuple(axes)))

    _sum = _amax = _mean

    def _add(self, result: Tensor, input: Any, other: Any, **_: Any) -> None:
        """Both operands must change in the same way."""
        sides = [self.ids(x) for x in (input, other) if isinstance(x, Tensor)]
        if len(sides) == 2:
            self.channels.tie(*sides)
        else:
            self.constant_added(sides[0])
        self.set(result, torch.broadcast_tensors(*sides)[0])

    def _div(self, result: Tensor, input: Any, other: Any, **_: Any) -> None:
        if isinstance(other, Tensor):
            self.unknown([x for x in (input, other) if isinstance(x, Tensor)], [result])
        else:
            self.set(result, self.ids(input))

    def _linear(self, result: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None) -> None:
        ids = self.channels.along(self.ids(input), input.ndim, -1)
        self.linear_map(result, -1, weight, bias, ids[None, :])

    def _addmm(self, result: Tensor, input: Tensor, mat1: Tensor, mat2: Tensor, **scaled: Any) -> None:
        """input + mat1 mat2: a linear layer whose weight, mat2, is (in, out)."""
        if scaled or id(mat2) not in self._parameters or input.ndim != 1:
            self.unknown([input, mat1, mat2], [result])
            return
        outputs = self.channels.new(mat2.shape[1])
        self.occurs(mat2, self.channels.along(self.ids(mat1), 2, -1)[:, None], -1)
        self.occurs(mat2, outputs, 1)
        self.occurs(input, outputs, 1)
        self.set_axis(result, outputs, -1)

    def _conv2d(
        self, result: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None = None, *rest: Any, **more: Any
    ) -> None:
        groups = rest[3] if len(rest) > 3 else more.get("groups", 1)
        axis = 1 - weight.ndim  # without a batch axis it is the first
        ids = self.channels.along(self.ids(input), input.ndim, axis).expand(input.shape[axis])
        ids = ids.view(groups, -1).repeat_interleave(len(weight) // groups, dim=0) if groups > 1 else ids[None, :]
        self.linear_map(result, axis, weight, bias, ids.reshape(*ids.shape, *[1] * (weight.ndim - 2)))

    _conv1d = _conv3d = _conv2d

    def _batch_norm(self, result: Tensor, input: Tensor, running_mean: Any = None, running_var: Any = None,
                    weight: Any = None, bias: Any = None, *_: Any, eps: float = 1e-5, **__: Any) -> None:  # fmt: skip
        self.norm(result, input, 1, weight, bias, eps=eps, statistics=(running_mean, running_var))

    _instance_norm = _batch_norm

    def _layer_norm(
        self, result: Tensor, input: Tensor, shape: Any, weight: Any = None, bias: Any = None, eps: float = 1e-5
    ) -> None:
        self.norm(result, input, -1, weight, bias, eps=eps, num_axes=len(shape))

    def _rms_norm(
        self, result: Tensor, input: Tensor, shape: Any, weight: Any = None, eps: float | None = None
    ) -> None:
        self.norm(result, input, -1, weight, None, eps=eps, num_axes=len(shape))

    def _group_norm(
        self, result: Tensor, input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
    ) -> None:
        self.norm(result, input, 1, weight, bias, eps=eps, num_groups=num_groups)


def tensors_in(tree: Any) -> list[Tensor]:
    """All tensors in a value, also in the outputs of Hugging Face models, mappings that pytree may not know."""
    return [x for x in tree_leaves(dict(tree) if isinstance(tree, Mapping) else tree) if isinstance(x, Tensor)]


def _name_of(func: Callable[..., Any]) -> str:
    """`add` for add_, __iadd__ and the like: in place or not, the channels are the same."""
    name = getattr(func, "__name__", "")
    if not name.startswith("__"):
        name = name.rstrip("_")
    return ALIASES.get(name, name)
