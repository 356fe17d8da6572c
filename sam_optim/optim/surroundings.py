"""Networks, optimizers and scalers of the training loop, searched in the first step in the variables of the callers."""

from __future__ import annotations

import functools
import inspect
import operator
import sys
import threading
import warnings
import weakref
from collections.abc import Iterator, Sequence
from types import FrameType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler

from sam_optim.core.module_state import modules_of
from sam_optim.optim.transaction import EarlierGradients, ModelGuard, alike

_NOT_OPENED = (ModuleType, type, Tensor, nn.Module)
_TRAINS = operator.attrgetter("requires_grad")
_LIBRARIES = {"torch", "contextlib", "sam_optim"}


class Surroundings:
    """The other networks, optimizers and scalers of a loop, and what the first second pass does to them.

    Args:
        params: the parameters that the perturbation moves.
        guard: of the modules that the user has named.
    """

    def __init__(self, params: Sequence[Tensor], guard: ModelGuard):
        by_id = {id(y): y for y in map(_unwrapped, _variables(sys._getframe(1)))}
        seen = by_id.values()
        self._ids = set(by_id)
        ours = {id(p) for p in params} | {id(p) for p in guard.other_params}
        self.is_watching = True
        self._unscaled: list[Any] = []
        self._optimizers = [weakref.ref(x) for x in seen if isinstance(x, Optimizer)]
        self._handles: list[Any] = []
        self._epochs: list[Any] = []
        self.scale_calls: list[_ScaleCalls] = []
        self._schedulers = [weakref.ref(x) for x in seen if isinstance(x, LRScheduler)]
        self._modules = [weakref.ref(x) for x in seen if isinstance(x, nn.Module)]
        self._scalers = [weakref.ref(x) for x in seen if isinstance(x, GradScaler)]
        named = set(guard.modules)
        if any([isinstance(x, DistributedDataParallel) and x.module in named and x not in named for x in seen]):
            warnings.warn(
                "module= is inside a DistributedDataParallel: pass that, or set optimizer.module = ddp before the "
                "first step. As it is, all ranks have one e where DDP averages the first pass, and else each its own",
                stacklevel=8,
            )
        modules = [m for x in seen if isinstance(x, nn.Module) for m in x.modules()] if named else []
        self._counters = [
            m.num_batches_tracked
            for m in dict.fromkeys(modules)
            if isinstance(m, nn.modules.batchnorm._BatchNorm) and m not in named and m.num_batches_tracked is not None
        ]
        tensors = [(m, k, x) for m in guard.modules for k, x in m.__dict__.items() if isinstance(x, Tensor)]
        # what needs a gradient comes from a parameter: the views that FSDP1 puts in the place of its own
        tensors = [(m, name, x) for m, name, x in tensors if not (x.is_inference() or x.requires_grad)]
        self._attributes = [(m, name, x, x._version) for m, name, x in tensors]
        self._versions = [x._version for x in self._counters]
        trained = ours | {id(p) for x in seen if isinstance(x, Optimizer) for p in parameters_of(x)}
        networks = [x for x in seen if isinstance(x, nn.Module)]
        owners = {id(p): (p, m) for m in networks for p in m.parameters() if id(p) not in trained}
        averages = {*map(id, alike([p for p, _ in owners.values()], params))}
        self._averages = [(p, type(m).__name__, _state(p)) for p, m in owners.values() if id(p) in averages]
        self._others = []
        for x in seen:
            theirs = parameters_of(x) if isinstance(x, Optimizer) else []
            if theirs and not any([id(p) in ours for p in theirs]):
                self._others.append((weakref.ref(x), theirs, EarlierGradients(theirs)))

    def refuse_steps(self, params: Sequence[Tensor]) -> None:
        """In a closure, until the pass ends: a step of another optimizer is an error, one of a scheduler is noted."""
        ids = {*map(id, params)}
        self._epochs = [(ref, _epoch(s)) for ref in self._schedulers if (s := ref()) is not None]
        for x in [x for ref in self._optimizers if (x := ref()) is not None]:
            theirs = [p for p in parameters_of(x) if isinstance(p, nn.Parameter)]  # and no adversarial example
            if theirs and ids.isdisjoint(map(id, theirs)):
                self._handles.append(x.register_step_pre_hook(_refuse_step))

    @property
    def modules(self) -> list[nn.Module]:
        return modules_of(*[m for ref in self._modules if (m := ref()) is not None])

    def watch_scalers(self, params: Sequence[Tensor]) -> None:
        """Until the pass ends: whether what they scale reaches a parameter. params: those with a gradient at w."""
        seen = [x for ref in self._scalers if (x := ref()) is not None and "scale" not in x.__dict__]
        p = next(filter(_TRAINS, reversed(params)), None)
        self.scale_calls = [] if p is None else [_ScaleCalls(x, p) for x in seen]
        for calls in self.scale_calls:
            weakref.finalize(self, calls.remove)

    def warn_of_scale(self, params: Sequence[Tensor]) -> None:
        """Before an update, once: of gradients that are still multiplied by the scale of a scaler."""
        calls, self.scale_calls = self.scale_calls, []
        self.note_scale(params)
        if self._unscaled:
            return
        for scaler in [x for c in calls if (x := c.scaler()) is not None and c.are_in_gradient(x)]:
            warnings.warn(
                "scaler.scale() has multiplied the loss of the perturbed pass, and its gradients have not been "
                f"unscaled: this update is {scaler.get_scale():g} times too long. Call scaler.unscale_(optimizer) "
                "before second_step(), or scaler.step(optimizer) in its place; a closure takes a loss without a "
                "scale",
                stacklevel=7,
            )

    def note_scale(self, params: Sequence[Tensor]) -> None:
        """Which scalers have unscaled the gradients of this optimizer."""
        ids = {*map(id, params)} if self._scalers else set()
        optimizers = {id(x): x for x in (ref() for ref in self._optimizers) if x is not None} if ids else {}
        self._unscaled = [
            (ref, state)
            for ref in self._scalers
            for key, state in getattr(ref(), "_per_optimizer_states", {}).items()
            if state["stage"].name == "UNSCALED"
            and key in optimizers
            and ids & {*map(id, parameters_of(optimizers[key]))}
        ]

    def leaves_scale(self) -> bool:
        """Whether such a scaler takes the second pass's gradients for unscaled, too. Not if it was updated since."""
        unscaled, self._unscaled = self._unscaled, []
        return any(
            [state is s for ref, s in unscaled for state in getattr(ref(), "_per_optimizer_states", {}).values()]
        )

    def end_pass(self, *, failed: bool) -> None:
        """After the second pass: warns of what has counted it."""
        for handle in (*self._handles, *self.scale_calls):
            handle.remove()
        self._handles = []
        mixed = [(o(), params) for o, params, earlier in self._others if earlier.stop().are_mixed]
        counted = [x._version for x in self._counters] != self._versions
        changed = [(m, name) for m, name, x, version in self._attributes if x._version != version]
        moved = dict.fromkeys([name for p, name, state in self._averages if _state(p) != state]) if not failed else {}
        stepped = [s for ref, epoch in self._epochs if (s := ref()) is not None and _epoch(s) != epoch]
        self._counters, self._attributes, self._others, self.is_watching = [], [], [], False
        self._averages, self._epochs = [], []
        if failed or not (mixed or counted or changed or moved or stepped) or self._ids & _ids_in_other_threads():
            return  # who has changed what another thread holds is not known
        if counted:
            warnings.warn(
                "a BatchNorm in training mode that is not in `module` has counted both passes: pass all networks that "
                "the loss runs through, module=[G, D, criterion]",
                stacklevel=8,
            )
        for m, name in changed:
            warnings.warn(
                f"{type(m).__name__}.{name} is a tensor that forward() changes, and it has seen both passes: register "
                "it with register_buffer, and it will be that of the first",
                stacklevel=8,
            )
        if stepped:
            warnings.warn(
                f"{type(stepped[0]).__name__}.step() is called in the closure, which runs twice in a step: call it "
                "after optimizer.step(closure)",
                stacklevel=8,
            )
        for name in moved:
            warnings.warn(
                f"{name} has parameters that this optimizer does not step and the second pass has changed (an EMA, a "
                "teacher): update it after optimizer.step(), or name it, module=[model, ema], and it moves once",
                stacklevel=8,
            )
        for optimizer, params in mixed:
            if optimizer is not None:
                _refuse_sum(optimizer, params)


def _state(p: Tensor) -> tuple[float, float]:
    """Another one after a change, also one through `.data`, which has no version; the same after a perturbed pass of
    another optimizer, whose version is another one."""
    p = torch.view_as_real(p.detach()) if p.is_complex() else p.detach()
    return float(p.sum(dtype=torch.float64)), float(p.abs().sum(dtype=torch.float64))


def _epoch(scheduler: LRScheduler) -> Any:
    return getattr(scheduler, "last_epoch", None)  # a ChainedScheduler has none


class _ScaleCalls:
    """Stands for `scaler.scale` until it is removed, and looks at what the backwards of scaled losses leave in `p`."""

    def __init__(self, scaler: GradScaler, p: Tensor):
        self.scaler, self._p = weakref.ref(scaler), weakref.ref(p)
        self._scale = functools.partial(type(scaler).scale, weakref.proxy(scaler))
        self._is_in_backward = False
        self._norm: Tensor | None = None
        self._handle = p.register_post_accumulate_grad_hook(self._look)
        # on the instance until the pass ends: torch has no hook for it, and the scaler's state does not tell
        scaler.scale = self  # type: ignore[assignment, method-assign]

    def __call__(self, outputs: Any) -> Any:
        scaled = self._scale(outputs)
        for x in scaled if isinstance(scaled, (list, tuple)) else [scaled]:
            if isinstance(x, Tensor) and x.requires_grad:
                x.register_hook(self._begin)
        return scaled

    def _begin(self, _: Tensor) -> None:
        self._is_in_backward = True
        # as DDP does: torch has no public way to be told that a backward has ended; its stubs do not know the engine
        torch.autograd.Variable._execution_engine.queue_callback(self._end)  # type: ignore[attr-defined]

    def _end(self) -> None:
        self._is_in_backward = False

    def _look(self, p: Tensor) -> None:
        if self._is_in_backward and p.grad is not None:
            self._norm = p.grad.detach().norm()

    def remove(self) -> None:
        self._handle.remove()
        if (scaler := self.scaler()) is not None:
            scaler.__dict__.pop("scale", None)

    def are_in_gradient(self, scaler: GradScaler) -> bool:
        """Not if it is as small as without a scale: somebody has divided it, or clipped it to less than that."""
        p = self._p()
        if self._norm is None or p is None or p.grad is None:
            return False
        return float(p.grad.detach().norm()) * scaler.get_scale() > 1.01 * float(self._norm)

    def __reduce__(self) -> tuple[Any, ...]:
        return getattr, (self.scaler(), "scale")  # of a copy of the scaler its own


def scaler_in_sight() -> GradScaler | None:
    """The one GradScaler that the calling functions have; None where there are several."""
    scalers = [x for x in _variables(sys._getframe(1)) if isinstance(x, GradScaler)]
    return scalers[0] if len(scalers) == 1 else None


def _refuse_step(optimizer: Optimizer, *_: Any) -> None:
    raise RuntimeError(
        f"{type(optimizer).__name__}.step() is called in the closure of another optimizer, which runs twice in a step: "
        "call it after optimizer.step(closure), with the gradients that this leaves"
    )


def _refuse_sum(optimizer: Optimizer, params: Sequence[Tensor]) -> None:
    """The next step of another optimizer is an error, unless the sum of both passes has been cleared by then."""
    total = EarlierGradients(params)

    def check(_: Optimizer, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        handle.remove()
        has_closure = len(args) > 1 or bool(kwargs)  # which clears them
        if not has_closure and (total.stop().are_mixed or total.remain):
            raise RuntimeError(
                f"{type(optimizer).__name__} would step with the sum of the gradients at w and at w + e: name its "
                "network, SAM(..., module=model) or module=[...], and it has those at w + e"
            )

    handle = optimizer.register_step_pre_hook(check)


def _unwrapped(x: Any) -> Any:
    """The optimizer in Accelerate's, Lightning's or Fabric's wrapper."""
    inner = getattr(x, "optimizer", x) if isinstance(x, Optimizer) else x
    return inner if isinstance(inner, Optimizer) else x


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]


_SIMPLE = {str, int, float, bool, bytes, type(None)}
_KINDS = (GradScaler, Optimizer, LRScheduler, nn.Module)


def _variables(frame: FrameType | None, num_frames: int = 24, *, only_named: bool = False) -> Iterator[Any]:
    """Each once: what the variables of `frame` and its callers hold, and what lists and attributes in those, and in
    what they hold, have (`self.optimizers["head"]`).

    Of the globals those that the code names if `only_named`, else all.
    """
    seen: set[int] = set()
    opened: dict[int, tuple[Any, list[Any]]] = {}
    for _ in range(num_frames):
        if frame is None:
            return
        local = frame.f_locals
        values = list(local.values())
        if frame.f_code.co_flags & inspect.CO_OPTIMIZED and isinstance(local, dict):
            local.clear()  # before Python 3.13 a copy, which would keep the tensors alive
        if str(frame.f_globals.get("__name__")).split(".")[0] not in _LIBRARIES:
            names = frame.f_code.co_names if only_named else list(frame.f_globals)
            values += [frame.f_globals[name] for name in names if name in frame.f_globals]
        for x in values:
            inside = _inside(x, opened)
            for y in (x, *inside, *[z for w in inside for z in _inside(w, opened)]):
                if issubclass(type(y), _KINDS) and id(y) not in seen:
                    seen.add(id(y))
                    yield y
        frame = frame.f_back


def _ids_in_other_threads() -> set[int]:
    """Ids of the networks, optimizers and scalers that other running threads use."""
    me = threading.get_ident()
    frames = [frame for thread, frame in sys._current_frames().items() if thread != me]
    return {id(_unwrapped(x)) for frame in frames for x in _variables(frame, 200, only_named=True)}


def _inside(x: Any, opened: dict[int, tuple[Any, list[Any]]]) -> list[Any]:
    """What a list, dict, function or other object holds; `opened` remembers it by id, and keeps the object alive."""
    kind = type(x)
    if kind in _SIMPLE or issubclass(kind, _KINDS) or issubclass(kind, _NOT_OPENED):
        return []
    if id(x) not in opened:
        try:
            if kind in (list, tuple):
                inside = list(x[:20])
            elif kind is FunctionType:
                inside = [cell.cell_contents for cell in x.__closure__ or ()]
            else:
                inside = list((x if kind is dict else x.__dict__).values())[:200]
        except Exception:  # no attributes, an empty cell, or a proxy of something that is gone
            inside = []
        opened[id(x)] = x, inside
    return opened[id(x)][1]
