"""The two symmetries: positive factors of channels, and permutations of channels."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from sam_optim.symmetries.channels import FIXED
from sam_optim.symmetries.tracing import Tracer


class Scales(Tracer):
    """Positive factors, x -> alpha x in every channel, through functions with f(alpha x) = alpha f(x)."""

    def __init__(self, model: nn.Module):
        super().__init__(model)
        self._data: dict[int, Tensor] = {}  # channel -> the parameter whose one factor it is

    def parameter_as_data(self, x: Tensor) -> Tensor:
        """A parameter that is data (a position embedding, a class token, a layer scale) takes one factor."""
        ids = self.channels.new(1)
        self._data[int(ids)] = x
        self.occurs(x, ids, 1)
        return ids

    def elementwise(self, result: Tensor, x: Tensor) -> None:
        self.unknown([x], [result])

    def mixture(self, ids: Tensor) -> Tensor:
        return self.channels.merge(ids)

    def constant_added(self, ids: Tensor) -> None:
        self.channels.fix(ids)

    def norm(self, result: Tensor, x: Tensor, axis: int, weight: Tensor | None, bias: Tensor | None, *,
             eps: float | None, statistics: Sequence[Tensor | None] = (), num_groups: int = 1,
             num_axes: int = 1) -> None:  # fmt: skip
        """One factor of the whole input is divided out, if eps follows; weight and bias give the output new ones."""
        factor = self.channels.merge(self.ids(x))
        owners = [n for n in reversed(self.stack) if getattr(self.model.get_submodule(n), "eps", None) == eps]
        if not owners or eps is None:
            self.channels.fix(factor)
        else:
            self.channels.tie(factor, self.trace.norms.setdefault(owners[0], factor))
        if weight is None or weight.ndim != 1:
            self.unknown([weight, bias], [result])
        else:
            outputs = self.channels.new(len(weight))
            self.occurs(weight, outputs, 1)
            self.occurs(bias, outputs, 1)
            self.set_axis(result, outputs, axis)
        for power, statistic in enumerate(statistics, 1):
            self.occurs(statistic, factor, power)

    def _mul(self, result: Tensor, input: Any, other: Any, **_: Any) -> None:
        """A parameter (layer scale) takes up what comes and what goes; a gate is fixed; a number changes nothing."""
        if not (isinstance(input, Tensor) and isinstance(other, Tensor)):
            self.set(result, self.ids(input if isinstance(input, Tensor) else other))
            return
        x, gate = (input, other) if input.numel() >= other.numel() else (other, input)
        before, ids = self.ids(x), self.ids(gate)
        parameter = self._data.get(int(ids)) if ids.numel() == 1 else None
        if parameter is not None and self.channels.root(int(ids)) == int(ids):
            self.occurs(parameter, self.channels.merge(before), -1)
            self.set(result, ids)
        else:
            self.channels.fix(ids)
            self.set(result, torch.broadcast_tensors(before, ids)[0])

    def _matmul(self, result: Tensor, input: Tensor, other: Tensor) -> None:
        """Fixed weights times data, as in attention."""
        self.channels.fix(self.ids(input))
        if min(input.ndim, other.ndim) < 2:
            self.unknown([other], [result])
            return
        self.set(result, self._over_tokens(other))

    def _scaled_dot_product_attention(
        self, result: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> None:
        self.unknown([query, key], [])
        self._over_tokens(value)
        self.same(result, value)

    def _over_tokens(self, value: Tensor) -> Tensor:
        """The channels of a weighted mean over axis -2: those that are summed are tied."""
        ids = self.ids(value)
        first = ids.narrow(-2, 0, 1)
        self.channels.tie(ids, first)
        return first


class Permutations(Tracer):
    """Permutations of channels, through any elementwise function. A class of tied channels moves as one unit."""

    def elementwise(self, result: Tensor, x: Tensor) -> None:
        self.same(result, x)

    def mixture(self, ids: Tensor) -> Tensor:
        self.channels.fix(ids)
        return torch.tensor(FIXED)

    def constant_added(self, ids: Tensor) -> None:
        pass

    def linear_map(self, result: Tensor, axis: int, weight: Tensor, bias: Tensor | None, inputs: Tensor) -> None:
        if len(inputs) == 1:
            super().linear_map(result, axis, weight, bias, inputs)
        elif inputs.numel() == len(weight) == len(inputs):  # depthwise: input and output channels move together
            self.occurs(weight, inputs, 1)
            self.occurs(bias, inputs.flatten(), 1)
            self.set_axis(result, inputs.flatten(), axis)
        else:
            self.channels.fix(inputs)
            self.unknown([], [result])

    def norm(self, result: Tensor, x: Tensor, axis: int, weight: Tensor | None, bias: Tensor | None, *,
             eps: float | None, statistics: Sequence[Tensor | None] = (), num_groups: int = 1,
             num_axes: int = 1) -> None:  # fmt: skip
        """Channels take their weight, bias and statistics along; of several groups, whole groups change places."""
        if num_axes > 1:
            self.unknown([x], [result])
            return
        ids = self.channels.along(self.ids(x), x.ndim, axis)
        if num_groups > 1:
            of_group = ids.expand(x.shape[axis]).view(num_groups, -1)
            self.channels.tie(of_group, of_group[:, :1])
        for t in (weight, bias, *statistics):
            self.occurs(t, ids, 1)
        self.same(result, x)

    def _mul(self, result: Tensor, input: Any, other: Any, **_: Any) -> None:
        self._add(result, input, other)

    def _softmax(self, result: Tensor, input: Tensor, dim: int = -1, *_: Any, **__: Any) -> None:
        ids = self.ids(input)
        if ids.shape[dim] > 1:
            self.channels.fix(ids)
        self.set(result, ids)

    def _scaled_dot_product_attention(
        self, result: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> None:
        """Whole heads change places, axis -3 of all three: a head is one unit."""
        operands = (query, key, value)
        if query.ndim < 4 or len({x.shape[-3] for x in operands}) > 1:  # one head, or queries that share keys
            self.unknown(operands, [result])
            return
        head = self.ids(query)[..., :1, :1]
        for x in operands:
            self.channels.tie(self.ids(x), head)
        self.same(result, value)
