"""What watches the user's model and gradients during a step, and what brings them back after a fault."""

from __future__ import annotations

import functools
import sys
import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from sam_optim.core import random as rng
from sam_optim.core.module_state import Buffers, modules_of
from sam_optim.optim.outside import outside


class Rollback:
    """What a fault must bring back beside the weights: which gradients there were, buffers, generators.

    With `keep`, the gradients themselves, which cost their memory meanwhile; else one that has gone comes back as 0.
    """

    def __init__(
        self,
        params: list[Tensor],
        state: rng.GlobalState,
        module: nn.Module | None,
        buffers: Buffers | None,
        *,
        keep: bool,
    ):
        self._params = params
        self._present = [p.grad is not None for p in params]
        self._grads = [p.grad for p in params] if keep else None
        self._rng = state
        self._buffers = buffers if module is not None else None
        if module is not None and buffers is not None:
            buffers.save(module)

    @torch.no_grad()
    def undo(self) -> None:
        for i, p in enumerate(self._params):
            if self._grads is not None:
                p.grad = self._grads[i]
            elif not self._present[i]:
                p.grad = None
            elif p.grad is None:
                p.grad = torch.zeros_like(p)
        if self._buffers is not None:
            self._buffers.restore()
        self._rng.restore()


class UpdateProbe:
    """Whether an update of these weights has begun: by their versions, and where the optimizer is fused, which does not
    raise them, by the bits of a few entries."""

    def __init__(self, weights: list[Tensor], *, is_fused: bool):
        self._weights = weights
        self._versions = [w._version for w in weights]
        found = [w for w in weights if w.numel() and not w.is_meta] if is_fused else []
        some = {id(w): w for w in (*found[:1], *found[len(found) // 2 :][:1], *found[-1:])}
        self._entries = [(entries, entries.clone()) for entries in map(_first_entries, some.values())]

    def has_begun(self) -> bool:
        if self._weights and self._weights[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return False  # of a graph nothing has run yet
        if self._versions != [w._version for w in self._weights]:
            return True
        return any(not torch.equal(now, before) for now, before in self._entries)


def _first_entries(w: Tensor) -> Tensor:
    row = w.detach()[(0,) * (w.ndim - 1)]
    return row[:64] if w.ndim else row


class Transaction:
    """All or nothing: what happens inside `around` has happened, or nothing has. Inside another one it is a part of it.

    After an exception everything is as before, but where weights have changed since `watch`: half an update of an
    optimizer cannot be taken back.
    """

    def __init__(self) -> None:
        self._current: weakref.ref[Rollback] | None = None
        self._buffers = Buffers()
        self._watched: UpdateProbe | None = None

    @contextmanager
    def around(
        self,
        params: list[Tensor],
        state: Callable[[], rng.GlobalState],
        module: nn.Module | None,
        give_up: Callable[[], None],
        *,
        keep: bool,
    ) -> Iterator[None]:
        if self._current is not None and self._current() is not None:
            yield
            return
        rollback = Rollback(params, state(), module, self._buffers, keep=keep)
        self._watched = None
        try:
            self._current = weakref.ref(rollback)  # gone with it, also where an interrupt skips the next line
            yield
        except BaseException:
            give_up()
            if self._watched is None or not self._watched.has_begun():
                rollback.undo()
            raise
        finally:
            self._current = self._watched = None

    def undo(self) -> None:
        """Back to the beginning, to try once more."""
        rollback = None if self._current is None else self._current()
        if rollback is not None:
            rollback.undo()

    def watch(self, weights: list[Tensor], *, is_fused: bool) -> None:
        """From here on a change of the weights is an update."""
        self._watched = UpdateProbe(weights, is_fused=is_fused)


class CleanStateDict:
    """A state_dict hook that hands out clean values while the weights are perturbed.

    A checkpoint from a signal handler, an EMA or a callback must not hold w + e. It is on every submodule, whose own
    entries it replaces, and registered only for that time: a hook that stayed would be pickled with the model.
    """

    def __init__(self, clean: Callable[[Tensor], Tensor | None]):
        self._clean = weakref.WeakMethod(clean)  # the model must not keep a pass alive that its optimizer has dropped

    def register(self, module: nn.Module) -> None:
        for m in modules_of(module):
            if m._parameters or m._buffers:  # half of a transformer's modules have none, and a hook costs its step time
                m.register_state_dict_post_hook(self)

    def remove(self, module: nn.Module) -> None:
        """Not by handles: an interrupt could lose one."""
        for m in modules_of(module):
            _remove(m._state_dict_hooks, self)

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        clean = self._clean()
        for name, tensor in chain(module._parameters.items(), module._buffers.items()):
            if clean is not None and tensor is not None and prefix + name in state_dict:
                value = clean(tensor)
                if value is not None:
                    state_dict[prefix + name] = value

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._clean() is not None:
            raise RuntimeError("the model's weights are perturbed: copy or pickle it when the perturbed pass has ended")
        return _no_hook.__name__  # pickled as the module-level function that it is

    def __deepcopy__(self, memo: Any) -> Any:
        self.__reduce_ex__(4)
        return _no_hook


def _remove(hooks: dict[int, Any], hook: Any) -> None:
    for key in [k for k, found in hooks.items() if found is hook]:
        del hooks[key]


def _no_hook(*_: Any) -> None:
    """What is left in a copy of a hook whose pass has ended."""


class EvaluationWarning:
    """A forward hook for the time that the weights of a model in training mode are perturbed."""

    def __init__(self) -> None:
        self._warned = False

    def register(self, module: nn.Module) -> None:
        module.register_forward_pre_hook(self)

    def remove(self, module: nn.Module) -> None:
        _remove(module._forward_pre_hooks, self)

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not module.training and not self._warned:
            self._warned = True
            warnings.warn(
                "the model is evaluated while its weights are perturbed, so this is not the loss at w: evaluate it "
                "after the perturbed pass, or a copy of it that loads model.state_dict()",
                stacklevel=5,
            )


class FirstForward:
    """The generators' state before the first forward pass of a step, for a second pass with the same draws."""

    def __init__(self, module: nn.Module | None):
        self.state: rng.GlobalState | None = None
        if module is not None:
            module.register_forward_pre_hook(_RememberState(self))

    def forget(self) -> None:
        self.state = None

    def replay(self) -> None:
        if self.state is None:
            raise RuntimeError("replay_rng=True has to see the first forward pass: pass module=, or use microbatch()")
        self.state.restore()
        self.state = None


class _RememberState:
    """A forward hook that survives pickling and copying of the model as a hook that does nothing."""

    def __init__(self, owner: FirstForward | None = None):
        self._owner = owner

    @outside
    def __call__(self, module: nn.Module, args: Any) -> None:
        if self._owner is not None and self._owner.state is None and module.training and torch.is_grad_enabled():
            devices = {p.device for p in module.parameters() if p.is_cuda}
            self._owner.state = rng.GlobalState(devices)

    def __reduce__(self) -> tuple[Any, ...]:
        return (_RememberState, ())


class LeftoverProbe:
    """What a closure did to gradients of before it: zero them, add its own to them, or nothing.

    Looks at three parameters, when the first gradient of the closure is about to be added: is the earlier one still
    there, not written to since, and not zero? And afterwards: is it still there, with what was added to it? No host
    sync unless it is there and not written to.
    """

    def __init__(self, params: list[Tensor]):
        present = [p for p in params if p.grad is not None and not p.grad.is_sparse and p.requires_grad and p.is_leaf]
        chosen = {id(p): p for p in (present[:1] + present[len(present) // 2 :][:1] + present[-1:])}
        self._seen: list[tuple[Tensor, Tensor, int]] = [(p, p.grad, p.grad._version) for p in chosen.values()]  # type: ignore[misc,union-attr]
        self._left: set[int] = set()
        self._handles: dict[int, Any] = {}
        for i, (p, _, _) in enumerate(self._seen):  # weakly: a hook that an interrupt leaves behind does nothing
            self._handles[i] = p.register_hook(functools.partial(_look, weakref.ref(self), i))
        self._num_nodes = torch.autograd._get_sequence_nr()
        self.ran_nothing = False

    def check(self, i: int) -> None:
        if self._is_untouched(i) and has_values(self._seen[i][1]):
            self._left.add(i)
        if i in self._handles:
            self._handles[i].remove()  # what is added after the first is the closure's own

    def _is_untouched(self, i: int) -> bool:
        p, grad, version = self._seen[i]
        return p.grad is grad and grad._version == version

    def kept(self) -> bool:
        """To be called once, after the closure, also when it raised. Sets `ran_nothing`: no graph made, none used."""
        for handle in self._handles.values():
            handle.remove()
        untouched = [i for i in range(len(self._seen)) if self._is_untouched(i)]
        for i in untouched:  # no gradient came: it is still that of before
            self.check(i)
        self.ran_nothing = len(untouched) == len(self._seen) and torch.autograd._get_sequence_nr() == self._num_nodes
        return any(self._is_in(p.grad, grad) for p, grad, _ in (self._seen[i] for i in self._left))

    @staticmethod
    def _is_in(grad: Tensor | None, earlier: Tensor) -> bool:
        """Autograd adds in place, but where it makes a graph; any other tensor is the closure's own choice."""
        return grad is earlier or (grad is not None and grad.requires_grad)


def refuse_callers_that_misuse_closures(*, is_scaled: bool) -> None:
    """Raises RuntimeError for a step(closure) inside one of two calls that train something else without a sign.

    is_scaled: whether GradScaler has left its findings on the optimizer, as it does for those that unscale themselves.
    """
    frame = sys._getframe(1)
    for _ in range(14):  # past the wrappers of no_grad, Dynamo, hooks and schedulers
        if frame is None:
            break
        package = str(frame.f_globals.get("__name__", "")).split(".")[0]
        is_scaled = is_scaled or (package == "torch" and frame.f_code.co_name == "_maybe_opt_step")
        if package == "accelerate" and frame.f_code.co_name == "step":
            accelerate = getattr(frame.f_locals.get("self"), "gradient_state", None)
            if (num := getattr(accelerate, "num_steps", 1)) > 1:
                raise RuntimeError(
                    f"gradient_accumulation_steps={num}: Accelerate runs the closure of one micro-batch in {num}, and "
                    "the data of the others would never be used: run the two backwards of each in `with "
                    "optimizer.optimizer.microbatch():` and `with optimizer.optimizer.perturbed():`, and step() without"
                )
        frame = frame.f_back  # type: ignore[assignment]
    if is_scaled:
        raise RuntimeError(
            "scaler.step(optimizer, closure) steps with gradients that are still scaled: run scaled backwards around "
            "`with optimizer.perturbed():` and call scaler.step(optimizer) without a closure"
        )


def has_values(grad: Tensor) -> bool:
    """Whether any entry is not zero. Waits for the device."""
    if grad.is_meta:
        return False
    return bool((grad.coalesce().values() if grad.is_sparse else grad).count_nonzero())


@outside
def _look(probe: weakref.ref[LeftoverProbe], i: int, _: Tensor) -> None:
    if (found := probe()) is not None:
        found.check(i)


class Apart:
    """Gradients that were there before, set aside while others are made.

    They are added at the end, in the tensors that they were in if they own them; or, for DDP, which averages over its
    ranks what a backward leaves in `p.grad`, put under the gradients to come. On an exception meanwhile the caller's
    rollback brings them back.
    """

    def __init__(self, params: list[Tensor]):
        self._params = params = list(dict.fromkeys(params))
        self._earlier = [None if p.grad is None else _own(p.grad) for p in params]
        self._hooks: list[Any] = []
        self._is_under = False
        for p in params:
            p.grad = None

    def put_under(self) -> None:
        """As copies: after an exception the earlier ones must be what they were."""
        self._is_under = True
        for p, g in zip(self._params, self._earlier, strict=True):
            if g is not None:
                p.grad = g.clone()

    def put_under_next_backward(self) -> None:
        """As `put_under`, for a closure that zeroes gradients first."""
        self._is_under = True
        for i, (p, g) in enumerate(zip(self._params, self._earlier, strict=True)):
            if g is not None and p.requires_grad:
                self._hooks.append(p.register_hook(functools.partial(self._join, i)))

    def _join(self, i: int, grad: Tensor) -> Tensor:
        earlier, self._earlier[i] = self._earlier[i], None
        return grad if earlier is None else grad + earlier

    def end(self) -> None:
        for hook in self._hooks:
            hook.remove()

    @torch.no_grad()
    def add(self) -> None:
        if self._is_under:
            return
        for p, g in zip(self._params, self._earlier, strict=True):
            if g is not None:
                p.grad = g if p.grad is None else g.add_(p.grad)


def zeros_for(params: list[Tensor]) -> None:
    """Gradients of 0 where there are none."""
    for p in params:
        p.grad = torch.zeros_like(p) if p.grad is None else p.grad


def _own(grad: Tensor) -> Tensor:
    """The gradient, or a copy of one that lives in storage that the next backward writes to (DDP's bucket views)."""
    return grad.clone() if grad._is_view() else grad
