"""What watches the user's model and gradients during a step, and what brings them back after a fault."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from sam_optim import rng
from sam_optim.batchnorm import Buffers


class Rollback:
    """What a fault must bring back beside the weights: which gradients there were, buffers, generators."""

    def __init__(self, params: list[Tensor], state: rng.GlobalState, module: nn.Module | None, buffers: Buffers):
        self._grads = [(p, p.grad) for p in params]
        self._rng = state
        self._buffers = buffers if module is not None else None
        if module is not None:
            buffers.save(module)

    @torch.no_grad()
    def undo(self) -> None:
        for p, g in self._grads:
            if p.grad is not g:
                p.grad = g
        if self._buffers is not None:
            self._buffers.restore()
        self._rng.restore()


class CleanStateDict:
    """A state_dict hook that hands out clean values while the weights are perturbed.

    A checkpoint from a signal handler, an EMA or a callback must not hold w + e. Registered only for that time: a hook
    that stayed would be pickled with the model.
    """

    def __init__(self, clean: Callable[[Tensor], Tensor | None]):
        self._clean = clean

    @classmethod
    def register(cls, module: nn.Module, clean: Callable[[Tensor], Tensor | None]) -> list[Any]:
        """On the model and on what it wraps (DDP's `module`, a compiled model's `_orig_mod`); returns the handles."""
        hook = cls(clean)
        return [m.register_state_dict_post_hook(hook) for m in _wrapped(module)]

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        named = chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
        for name, tensor in named:
            if prefix + name in state_dict and (value := self._clean(tensor)) is not None:
                state_dict[prefix + name] = value


def _wrapped(module: nn.Module) -> Iterator[nn.Module]:
    inner: Any = module
    while isinstance(inner, nn.Module):
        yield inner
        inner = inner._modules.get("module") or inner._modules.get("_orig_mod")


class FirstForward:
    """The generators' state before the first forward pass of a step, for a second pass with the same draws."""

    def __init__(self, module: nn.Module | None):
        self.state: rng.GlobalState | None = None
        if module is not None:
            module.register_forward_pre_hook(_RememberState(self))

    def replay(self) -> None:
        if self.state is None:
            raise RuntimeError("replay_rng=True has to see the first forward pass: pass module=, or use microbatch()")
        self.state.restore()
        self.state = None


class _RememberState:
    """A forward hook that survives pickling and copying of the model as a hook that does nothing."""

    def __init__(self, owner: FirstForward | None = None):
        self._owner = owner

    def __call__(self, module: nn.Module, args: Any) -> None:
        if self._owner is not None and self._owner.state is None and module.training and torch.is_grad_enabled():
            devices = {p.device for p in module.parameters() if p.is_cuda}
            self._owner.state = rng.GlobalState(devices)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_RememberState, ())


class LeftoverProbe:
    """Whether a closure left gradients of before it in place, so that its own were added to them.

    One parameter tells for all: either its gradient is gone, or another tensor, or was written to before the first
    gradient of the closure was added (`zero_grad(set_to_none=False)`). No host sync unless it was left in place.
    """

    def __init__(self, params: list[Tensor]):
        found = next((p for p in reversed(params) if p.grad is not None and not p.grad.is_sparse), None)
        self._param = found
        self._handle: Any = None
        if found is None or found.grad is None:
            return
        self._grad = found.grad
        self._before = found.grad.detach().clone()
        self._version = found.grad._version
        self._version_at_first: int | None = None
        if found.requires_grad and found.is_leaf:
            self._handle = found.register_post_accumulate_grad_hook(self._accumulated)

    def _accumulated(self, param: Tensor) -> None:
        if self._version_at_first is None and param.grad is self._grad:
            self._version_at_first = self._grad._version - 1  # the accumulation itself wrote once

    def kept(self) -> bool:
        """To be called once, after the closure, also when it raised."""
        if self._handle is not None:
            self._handle.remove()
        if self._param is None or self._param.grad is not self._grad:
            return False
        first = self._version_at_first
        untouched = (self._grad._version if first is None else first) == self._version
        return untouched and bool(self._before.count_nonzero())


@contextmanager
def gradients_apart(params: list[Tensor]) -> Iterator[None]:
    """Sets gradients aside, and adds those made inside to them, in the tensors that they were in.

    On an exception inside, nothing is added: the caller's rollback brings the gradients back.
    """
    earlier = [p.grad for p in params]
    for p in params:
        p.grad = None
    yield
    with torch.no_grad():
        for p, g in zip(params, earlier, strict=True):
            if g is not None:
                p.grad = g if p.grad is None else g.add_(p.grad)
