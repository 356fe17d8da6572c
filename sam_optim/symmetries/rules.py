"""What is a symmetry: positive factors of channels, and channels that change places."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from sam_optim.symmetries.channels import FIXED
from sam_optim.symmetries.tracing import Follower


class Scales(Follower):
    """Positive factors, x -> alpha x in every channel, through functions with f(alpha x) = alpha f(x)."""

    def of_parameter(self, x: Tensor) -> Tensor:
        """A parameter that is data (a position embedding, a class token, a layer scale) takes one factor."""
        ids = self.channels.new([1])
        self._as_data = {**getattr(self, "_as_data", {}), int(ids): x}
        self.touch(x, ids, 1)
        return ids

    def curve(self, result: Tensor, x: Tensor) -> None:
        self.unknown([x], [result])

    def mixed(self, ids: Tensor) -> Tensor:
        return self.channels.one(ids)

    def shifted(self, ids: Tensor) -> None:
        self.channels.fix(ids)

    def _mul(self, result: Tensor, input: Any, other: Any, **_: Any) -> None:
        """A parameter (layer scale) takes up what comes and what goes; a gate is fixed; a number changes nothing."""
        if not (isinstance(input, Tensor) and isinstance(other, Tensor)):
            self.set(result, self.ids(input if isinstance(input, Tensor) else other))
            return
        x, gate = (input, other) if input.numel() >= other.numel() else (other, input)
        before, ids = self.ids(x), self.ids(gate)
        parameter = getattr(self, "_as_data", {}).get(int(ids)) if ids.numel() == 1 else None
        if parameter is not None and self.channels.find(int(ids)) == int(ids):
            self.touch(parameter, self.channels.one(before), -1)
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
        ids = self.ids(other)
        first = ids.narrow(-2, 0, 1)
        self.channels.tie(ids, first)
        self.set(result, first)

    def _scaled_dot_product_attention(
        self, result: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any
    ) -> None:
        self.channels.fix(self.ids(query))
        self.channels.fix(self.ids(key))
        ids = self.ids(value)
        self.channels.tie(ids, ids.narrow(-2, 0, 1))
        self.keep(result, value)

    def _normalized(
        self, result: Tensor, x: Tensor, eps: float | None, weight: Tensor | None, bias: Tensor | None, axis: int
    ) -> Tensor:
        """One factor of the whole input is divided out, if eps follows; weight and bias give the output new ones."""
        one = self.channels.one(self.ids(x))
        owners = (n for n in reversed(self.stack) if getattr(self.model.get_submodule(n), "eps", None) == eps)
        owner = next(owners, None)
        if owner is None or eps is None:
            self.channels.fix(one)
        else:
            self.channels.tie(one, self.found.norms.setdefault(owner, one))
        if weight is None or weight.ndim != 1:
            self.unknown([t for t in (weight, bias) if t is not None], [result])
        else:
            new = self.channels.new([len(weight)])
            self.touch(weight, new, 1)
            self.touch(bias, new, 1)
            self.spread(result, new, axis)
        return one

    def _batch_norm(self, result: Tensor, input: Tensor, running_mean: Any, running_var: Any, weight: Any = None,
                    bias: Any = None, training: bool = False, momentum: Any = 0,
                    eps: float = 1e-5) -> None:  # fmt: skip
        one = self._normalized(result, input, eps, weight, bias, 1)
        self.touch(running_mean, one, 1)
        self.touch(running_var, one, 2)

    def _instance_norm(self, result: Tensor, input: Tensor, running_mean: Any = None, running_var: Any = None,
                       weight: Any = None, bias: Any = None, use_input_stats: bool = True, momentum: Any = 0.1,
                       eps: float = 1e-5) -> None:  # fmt: skip
        self._batch_norm(result, input, running_mean, running_var, weight, bias, eps=eps)

    def _layer_norm(
        self,
        result: Tensor,
        input: Tensor,
        normalized_shape: Any,
        weight: Any = None,
        bias: Any = None,
        eps: float = 1e-5,
    ) -> None:
        self._normalized(result, input, eps, weight, bias, -1)

    def _rms_norm(
        self, result: Tensor, input: Tensor, normalized_shape: Any, weight: Any = None, eps: float | None = None
    ) -> None:
        self._normalized(result, input, eps, weight, None, -1)

    def _group_norm(
        self, result: Tensor, input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
    ) -> None:
        self._normalized(result, input, eps, weight, bias, 1)


class Permutations(Follower):
    """Channels that change places, through any elementwise function. A class of channels is a unit: what belongs to it
    moves with it."""

    def curve(self, result: Tensor, x: Tensor) -> None:
        self.keep(result, x)

    def mixed(self, ids: Tensor) -> Tensor:
        self.channels.fix(ids)
        return torch.tensor(FIXED)

    def shifted(self, ids: Tensor) -> None:
        pass

    def weighted(self, result: Tensor, axis: int, weight: Tensor, bias: Tensor | None, inputs: Tensor) -> None:
        if len(inputs) == 1:
            super().weighted(result, axis, weight, bias, inputs)
        elif inputs.numel() == len(weight) == len(inputs):  # depthwise: what comes in and what goes out move together
            self.touch(weight, inputs, 1)
            self.touch(bias, inputs.flatten(), 1)
            self.spread(result, inputs.flatten(), axis)
        else:
            self.channels.fix(inputs)
            self.unknown([], [result])

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
        all_three = (query, key, value)
        if query.ndim < 4 or len({x.shape[-3] for x in all_three}) > 1:  # one head, or queries that share keys
            self.unknown([*all_three], [result])
            return
        head = self.ids(query)[..., :1, :1]
        for x in all_three:
            self.channels.tie(self.ids(x), head)
        self.keep(result, value)

    def _per_channel(self, result: Tensor, x: Tensor, axis: int, *own: Tensor | None) -> None:
        ids = self.channels.along(self.ids(x), x.ndim, axis)
        for t in own:
            self.touch(t, ids, 1)
        self.keep(result, x)

    def _batch_norm(self, result: Tensor, input: Tensor, running_mean: Any = None, running_var: Any = None,
                    weight: Any = None, bias: Any = None, *_: Any, **__: Any) -> None:  # fmt: skip
        self._per_channel(result, input, 1, running_mean, running_var, weight, bias)

    _instance_norm = _batch_norm

    def _layer_norm(
        self,
        result: Tensor,
        input: Tensor,
        normalized_shape: Any,
        weight: Any = None,
        bias: Any = None,
        *_: Any,
        **__: Any,
    ) -> None:
        if len(normalized_shape) == 1:
            self._per_channel(result, input, -1, weight, bias)
        else:
            self.unknown([input], [result])

    def _rms_norm(
        self, result: Tensor, input: Tensor, normalized_shape: Any, weight: Any = None, *_: Any, **__: Any
    ) -> None:
        self._layer_norm(result, input, normalized_shape, weight)

    def _group_norm(
        self, result: Tensor, input: Tensor, num_groups: int, weight: Any = None, bias: Any = None, *_: Any, **__: Any
    ) -> None:
        """Whole groups change places; within the only group, its channels do."""
        if num_groups > 1:
            ids = self.channels.along(self.ids(input), input.ndim, 1).expand(input.shape[1]).view(num_groups, -1)
            self.channels.tie(ids, ids[:, :1])
        self._per_channel(result, input, 1, weight, bias)
