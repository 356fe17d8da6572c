"""What a perturbed pass must not change: the rest of the model, and earlier gradients.

Buffers, frozen parameters and `state_dict()` of the model are those of the clean pass at every moment.
"""

from __future__ import annotations

import functools
import math
import operator
import warnings
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from itertools import chain, filterfalse
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.weak import TensorWeakRef

from sam_optim.core import random as rng
from sam_optim.core.module_state import Buffers, modules_of
from sam_optim.optim.kernels import dtensor

_TRAINS = operator.attrgetter("requires_grad")
_held: dict[int, object] = {}  # id of a parameter that a pass moves, and keeps alive -> whose it is


def claim(params: Sequence[Tensor], owner: object) -> None:
    """Raises RuntimeError if another pass holds one of the parameters: two perturbations would save each other's w + e.

    Without a lock, which an interrupt could leave locked: each entry is set in one operation.
    """
    if any([_held.setdefault(id(p), owner) is not owner for p in params]):
        release(params, owner)
        raise RuntimeError(
            "another perturbation holds some of these parameters, and only one at a time can move them: finish its "
            "pass, or give it up with its exit(failed=True)"
        )


def is_other_moved(params: Iterable[Tensor]) -> bool:
    """Whether an open pass holds other parameters than these."""
    return bool(_held.keys() - map(id, params))


def is_moved(params: Iterable[Tensor]) -> bool:
    """Whether an open pass holds one of them (it is then at w + e)."""
    return any([id(p) in _held for p in params])


def release(params: Sequence[Tensor], owner: object) -> None:
    """May be called again after an interrupt."""
    for p in params:
        if _held.get(id(p)) is owner:
            del _held[id(p)]


class ModelGuard:
    """What a pass through some modules must leave unchanged, except the weights that the optimizer steps.

    Args:
        module: the modules that the user has named.
        stepped: the parameters that the optimizer steps.
    """

    def __init__(self, module: nn.Module | Sequence[nn.Module] | None, stepped: Sequence[Tensor]):
        self.roots = _roots(module)
        self.modules: list[nn.Module] = []
        self.other_params: list[Tensor] = []  # in the modules, and not stepped
        self._stepped: Sequence[Tensor] = ()
        self._stepped_ids: set[int] = set()
        self._versions: dict[int, tuple[int, int]] = {}
        self._candidates: list[Tensor] | None = None  # None: before the first pair of passes
        self._moves_unseen: set[int] = set()
        self._movers: list[Tensor] | None = []  # without a gradient, moved by the last second pass; None: warned of
        self._attributes: list[tuple[dict[str, Any], str, Any]] = []
        self._assigned: list[tuple[dict[str, Any], str]] | None = None  # attributes that a pass assigns anew
        self._before_step = Buffers()
        self._before_pass = Buffers()
        self._hooked: list[nn.Module] = []
        self._clean: CleanStateDict | None = None
        self._evaluation: EvaluationWarning | None = None
        self.look(stepped)

    def begin_step(self, stepped: Sequence[Tensor]) -> None:
        """Before the first pass, for `undo`."""
        if self.roots:
            self.look(stepped)
            self._before_step.save(self.modules)

    def undo(self) -> None:
        """Buffers as before the step."""
        self._before_step.restore()

    def begin_pass(
        self,
        stepped: Sequence[Tensor],
        clean: Callable[[Tensor], Tensor | None],
        *,
        look: bool = True,
        restores: bool = True,
    ) -> None:
        """Before the second pass: what it changes will come back, and checkpoints get the clean weights.

        look: at the modules, which have not been looked at since the step began.
        restores: False for the only pass of a step, whose traces in buffers are to stay.
        """
        if not self.roots:
            return
        versions = self._versions
        if look:
            self.look(stepped)
        if restores:
            if self._movers:
                self._warn_of_movers(self._movers)
            unseen = self._moves_unseen
            if self._candidates is None:  # what is written to through `.data` has no version
                self._candidates = alike([p for p in self.other_params if p.grad is None], stepped)
                unseen = {*map(id, self._candidates)}
            slots = self._assigned
            if slots is None:
                places = [d for m in self.modules for d in (m.__dict__, m._parameters)]
                slots = [(d, name) for d in places for name, x in d.items() if _is_state(x)]
            if slots:
                self._attributes = [(d, name, d.get(name)) for d, name in slots]
            changed = [  # by a forward pass
                p for p in self.other_params if versions.get(id(p)) != _version(p) or id(p) in unseen
            ]
            self._before_pass.save(self.modules, changed)
        self._clean = CleanStateDict(clean)
        self._hooked = [m for m in self.modules if m._parameters or m._buffers]
        for m in self._hooked:
            m._state_dict_hooks[id(self._clean)] = self._clean
            m._load_state_dict_pre_hooks[id(self._clean)] = _refuse_loading
        if training := [m for m in self.roots if m.training]:
            self._evaluation = EvaluationWarning()
            for m in training:
                m._forward_pre_hooks[id(self._evaluation)] = self._evaluation

    def end_pass(self) -> None:
        """May be called again after an interrupt."""
        if self._clean is None:
            return
        try:
            movers = list(filter(self._differs, self._candidates or ()))
            self._moves_unseen.update(map(id, movers))
            self._candidates = []
            self._before_pass.restore()
            assigned = []
            for d, name, x in self._attributes:
                if d.get(name) is not x:
                    assigned.append((d, name))
                    if _is_state(x) and _is_state(d.get(name)) and d[name].shape == x.shape:
                        d[name] = x
            self._attributes, self._assigned = [], assigned if self._assigned is None else self._assigned
        finally:
            for m in self._hooked:
                m._state_dict_hooks.pop(id(self._clean), None)
                m._load_state_dict_pre_hooks.pop(id(self._clean), None)
            for m in self.roots:
                m._forward_pre_hooks.pop(id(self._evaluation), None)
        self._clean = None
        versions = {id(p): _version(p) for p in self.other_params}
        if self._movers is not None:
            if versions != self._versions:
                late = [p for p in self.other_params if versions[id(p)][0] != self._versions[id(p)][0]]
                movers += [p for p in late if p.grad is None and self._before_pass.clean_copy(p) is None]
            self._movers = movers
        self._versions = versions

    def _differs(self, x: Tensor) -> bool:
        """Whether it has another value than the last pass began with."""
        copy = self._before_pass.clean_copy(x)
        return copy is not None and copy.shape == x.shape and not torch.equal(dtensor.local(copy), dtensor.local(x))

    def _warn_of_movers(self, movers: list[Tensor]) -> None:
        """Warns once of those that stand where the last second pass has begun, or has left them: only it moves them."""
        late = [p for p in movers if not self._differs(p)]
        self._movers = None if late else []
        for root in self.roots:
            if any([p is late[0] for p in root.parameters()] if late else []):
                warnings.warn(
                    f"{type(root).__name__} in module= has parameters (an EMA, a teacher, a key encoder) that change "
                    "in the perturbed pass alone, where they would follow w + e: update them before the first pass or "
                    "after optimizer.step()",
                    stacklevel=11,
                )
                return

    def clean_copy(self, tensor: Tensor) -> Tensor | None:
        """A tensor of its own: what writes to the values of a state_dict (timm's EMA) writes to the model as long as
        nothing has changed there, and never to what will be restored."""
        copy = self._before_pass.clean_copy(tensor)
        return copy.clone() if copy is not None and self._differs(tensor) else None

    def look(self, stepped: Sequence[Tensor]) -> list[nn.Module]:
        """All modules and parameters, as they are now."""
        self.modules = modules_of(*self.roots)
        if stepped is not self._stepped:
            self._stepped, self._stepped_ids = stepped, set(map(id, stepped))
        ids = self._stepped_ids
        if frozen := list(filterfalse(_TRAINS, stepped)):  # a key encoder that the optimizer was given, too
            ids = ids.difference(map(id, frozen))
        params = [p for m in self.modules if m._parameters for p in m._parameters.values()]
        self.other_params = [p for p in params if p is not None and id(p) not in ids]
        self._versions = {id(p): _version(p) for p in self.other_params}
        return self.modules


def alike(others: Iterable[Tensor], stepped: Sequence[Tensor]) -> list[Tensor]:
    """Those that may be averages of the stepped ones: of each shape no more than of those, for what is much larger is
    not to be read."""
    num = Counter([p.shape for p in stepped if not nn.parameter.is_lazy(p)])
    chosen: list[Tensor] = []
    for p in others:
        if type(p) is nn.Parameter and not p.is_meta and num[p.shape] > 0:
            num[p.shape] -= 1
            chosen.append(p)
    return chosen


def _is_state(x: Any) -> bool:
    """A tensor, or a frozen parameter, that a module may carry from pass to pass; not a view of a flat one (FSDP1)."""
    return type(x) in (Tensor, nn.Parameter) and not (x.requires_grad or x._is_view())


def _version(p: Tensor) -> tuple[int, int]:
    """Another one after a change in place, and after `p.data = ...`."""
    return p._version, p.data_ptr() if type(p) is nn.Parameter else 0


def _roots(module: Any) -> list[nn.Module]:
    roots = [] if module is None else list(module) if isinstance(module, (list, tuple)) else [module]
    for m in roots:
        if not isinstance(m, nn.Module):
            raise TypeError(f"module must be the model, a torch.nn.Module, or a list of them, got {type(m).__name__}")
        if isinstance(m, torch.jit.ScriptModule):
            raise TypeError(
                "module is a ScriptModule, whose buffers are out of reach: pass the nn.Module that was scripted"
            )
    return roots


class CleanStateDict:
    """A state_dict hook that hands out clean values while the weights are perturbed.

    A checkpoint from a signal handler, an EMA or a callback must not hold w + e. It is on every submodule, whose own
    entries it replaces, and only for that time: a hook that stayed would be pickled with the model.
    """

    def __init__(self, clean: Callable[[Tensor], Tensor | None]):
        self._clean = weakref.WeakMethod(clean)  # the model must not keep a pass alive that its optimizer has dropped

    def __call__(self, module: nn.Module, state_dict: dict[str, Any], prefix: str, local_metadata: Any) -> None:
        clean = self._clean()
        for name, tensor in chain(module._parameters.items(), module._buffers.items()):
            if clean is not None and tensor is not None and prefix + name in state_dict:
                value = clean(tensor)
                if value is not None:
                    state_dict[prefix + name] = value

    def __reduce_ex__(self, protocol: Any) -> Any:
        if self._clean() is not None:
            raise RuntimeError(
                "the model's weights are perturbed: copy or pickle it when the perturbed pass has ended; for a copy at "
                "w + e, make it before the passes, and copy parameter by parameter"
            )
        return _no_hook.__name__  # pickled as the module-level function that it is

    def __deepcopy__(self, memo: Any) -> Any:
        self.__reduce_ex__(4)
        return _no_hook


def _no_hook(*_: Any) -> None:
    """What is left in a copy of a hook whose pass has ended."""


def _refuse_loading(*_: Any) -> None:
    raise RuntimeError(
        "load_state_dict() while the weights of module= are perturbed: load a checkpoint, or update an EMA, a teacher "
        "or a target network, before the first pass or after optimizer.step()"
    )


class EvaluationWarning:
    """A forward hook for the time that the weights of a model in training mode are perturbed."""

    def __init__(self) -> None:
        self._warned = False

    def __call__(self, module: nn.Module, args: Any) -> None:
        if not module.training and not self._warned:
            self._warned = True
            warnings.warn(
                "the model is evaluated while its weights are perturbed, so this is not the loss at w: evaluate it "
                "after the perturbed pass (a loop that stops after first_step() ends it with "
                "optimizer.perturbation.exit(failed=True)), or a copy of it that loads model.state_dict()",
                stacklevel=5,
            )


class Draws:
    """The generators' state where a pass begins, so that the second pass can draw the same numbers as the first.

    Closures and `microbatch()` say where that is. In other two-phase loops it is the first call of the model: what is
    drawn before it is not replayed. The hook that waits for that call is torch's global one, and goes with it: one on
    the model would be saved with it.
    """

    def __init__(self, roots: Sequence[nn.Module], devices: Iterable[torch.device]):
        self._roots = roots
        self._devices = list(devices)
        self._state: rng.GlobalState | None = None
        self._at_forward = False
        self._stop_watching: Callable[[], Any] = _no_hook

    def remember(self) -> None:
        """The first pass begins now."""
        self.forget()
        self._state, self._at_forward = rng.GlobalState(self._devices), False

    def wait(self) -> None:
        """The first pass begins with the next call of the model in training mode."""
        self.forget()
        if self._roots:
            self._at_forward = True
            self._watch_forward()

    def replay(self) -> None:
        """Begins the second pass. Raises RuntimeError if the begin of the first pass was not seen."""
        if self._state is None:
            raise RuntimeError(
                "replay_rng=True has to know where the first pass begins: pass module=, run both passes in `with "
                "sam.microbatch():`, or use step(closure)"
            )
        if self._at_forward:
            self._watch_forward()
        else:
            self._state.restore()

    def forget(self) -> None:
        self._state = None
        self._stop_watching()

    def _watch_forward(self) -> None:
        register = nn.modules.module.register_module_forward_pre_hook
        if hasattr(self._roots[0], "_orig_mod"):  # torch.compile warns of global hooks
            register = self._roots[0].register_forward_pre_hook  # type: ignore[assignment]
        # the handle finds its hook by a weak reference, which is dead in a cycle that is collected with it
        self._stop_watching = weakref.finalize(self, register(ModelCalls(self)).remove)

    def called(self, module: nn.Module, *_: Any) -> None:
        if not any([module is m for m in self._roots]) or not module.training or not torch.is_grad_enabled():
            return
        self._stop_watching()
        if self._state is None:
            self._state = rng.GlobalState(self._devices)
        else:
            self._state.restore()


class ModelCalls:
    """A hook that does not keep alive whom it tells, and is nothing in a copy of the model."""

    def __init__(self, listener: Any = None):
        self._listener = None if listener is None else weakref.ref(listener)

    @torch._disable_dynamo  # type: ignore[untyped-decorator]
    def __call__(self, *args: Any) -> None:
        listener = None if self._listener is None else self._listener()
        if listener is not None:
            listener.called(*args)

    def __reduce__(self) -> tuple[Any, ...]:
        return (ModelCalls, ())


class EarlierGradients:
    """Watches whether new gradients are added to earlier ones that were not cleared.

    Looks at the first and the last parameter that have a gradient, at the moment when a new one arrives: is the earlier
    one still there, and not zero? One of the two may be of a part that this loss does not use. Values are read only
    where an earlier gradient still is; one that was set to None costs nothing.

    Args:
        may_be_assigned: a tensor that somebody assigns to `p.grad` again is a new gradient. So that the two can be told
            apart, the earlier ones are other tensors on the same storage until `stop`.
        has_ddp: whether a DistributedDataParallel may write to the gradients.
        reads: also looks, at the first and the last parameter of all if none has a gradient, whether what arrives is
            not zero, which waits for the device.
    """

    are_mixed = False  # a new gradient was added to an earlier one that was not zero
    has_come = False  # a new gradient was not zero; known where it `reads`
    are_untouched = False  # all of them are still there, and none was added to, cleared or written to

    def __init__(
        self,
        params: Sequence[Tensor],
        *,
        may_be_assigned: bool = False,
        reads: bool = False,
        has_ddp: bool = True,
    ):
        is_end = _has_gradient if not reads or any(map(_has_gradient, params)) else _can_have_gradient
        last = next(filter(is_end, reversed(params)), None)
        first = None if last is None else next(filter(is_end, params))
        ends = [] if last is None else [last] if first is last else [first, last]
        self.exist = bool(ends) and is_end is _has_gradient
        self._params = params if reads else ()
        self._has_ddp = has_ddp
        self._watched = [_Watched(p, may_be_assigned, reads) for p in ends]  # type: ignore[arg-type]
        self._alone: list[_Watched] = []

    def stop(self) -> EarlierGradients:
        """Ends the watch; its findings can be read afterwards."""
        watched, self._watched = self._watched, []
        self.are_untouched = self._none_came = bool(watched)
        for w in watched:
            w.hooks.pop(w.key, None)
            self._none_came = self._none_came and not w.arrived
            self.has_come = self.has_come or w.has_come
            g, earlier = w.p.grad, w.earlier()
            is_there = g is not None and g is w.seen()
            # a backward puts another tensor there, too, but one with a graph, or, under DDP, a view of a bucket
            is_backwards = g is None or g.requires_grad or (self._has_ddp and g._is_view())
            was_assigned = not (is_there or is_backwards)
            self.are_mixed = self.are_mixed or (w.is_mixed and not was_assigned)
            is_alone = is_there and not w.arrived
            self._alone += [w] if is_alone else []
            self.are_untouched = self.are_untouched and is_alone and g._version == w.version  # type: ignore[union-attr]
            if is_there and earlier is not None:
                w.p.grad = earlier
        return self

    @property
    def remain(self) -> bool:
        """Whether they are there and not zero, and none was added to: clipping may have written to them."""
        return any([has_values(w.p.grad) for w in self._alone])  # type: ignore[arg-type]

    @property
    def are_left(self) -> bool:
        """Whether they are untouched, and not zero."""
        return self.are_untouched and self.remain

    @property
    def new_are_cleared(self) -> bool:
        """Whether there are gradients, but all zero: new ones that were not, or no new ones have come since."""
        lost = self.has_come or (self.exist and self._none_came and not self.are_untouched)
        grads = [p.grad for p in self._params if p.grad is not None]
        return lost and bool(grads) and not any([not _can_be_read(g) or has_values(g) for g in grads])

    @property
    def have_company(self) -> bool:
        """Whether a new gradient has arrived by now, whatever became of the earlier one."""
        return any([w.arrived for w in self._watched])


def _can_have_gradient(p: Tensor) -> bool:
    return not nn.parameter.is_lazy(p) and p.requires_grad and p.is_leaf


def _has_gradient(p: Tensor) -> bool:
    return p.grad is not None and p.requires_grad and p.is_leaf


class _Watched:
    """One parameter, and the gradient that it has had, if any."""

    def __init__(self, p: Tensor, by_view: bool, reads: bool):
        self.p, self.reads = p, reads
        g: Any = p.grad
        self.earlier = self.seen = _nothing if g is None else TensorWeakRef(g)
        if by_view and g is not None:
            p.grad = g = g.detach()
            self.seen = TensorWeakRef(g)
        self.version = 0 if g is None else g._version
        self.arrived = self.is_mixed = self.has_come = False
        references = [weakref.ref(self)]
        self.key = p.register_hook(functools.partial(_arrive, references)).id
        hooks: Any = p._backward_hooks
        self.hooks = hooks
        # removes the hook of an optimizer that is dropped after a pass; its handle would not find it from a cycle
        references.append(weakref.ref(self, functools.partial(hooks.pop, self.key)))


def _nothing() -> None:
    """In the place of a reference to a gradient."""


@torch._disable_dynamo  # type: ignore[untyped-decorator]
def _arrive(references: list[weakref.ref[_Watched]], grad: Tensor) -> None:
    """A hook that an interrupt leaves behind does nothing."""
    w = references[0]()
    if w is not None and w.reads and not w.has_come:
        w.has_come = has_values(grad) and 0 < float(grad.detach().norm()) < math.inf
    if w is not None and not w.arrived:  # what comes after the first one is added to that
        w.arrived, g = True, w.p.grad
        w.is_mixed = g is not None and g is w.seen() and has_values(g)  # type: ignore[arg-type]


def _can_be_read(grad: Tensor) -> bool:
    return not (grad.is_meta or (grad.is_cuda and torch.cuda.is_current_stream_capturing()))


def has_values(grad: Tensor) -> bool:
    """Whether any entry is not zero. Waits for the device; while a graph is captured it cannot, and says no."""
    if not _can_be_read(grad):
        return False
    if dtensor.is_dtensor(grad):  # all ranks must get the same answer
        norm = torch.linalg.vector_norm(grad)
        return float(norm.full_tensor() if hasattr(norm, "full_tensor") else norm) != 0
    return bool((grad.coalesce().values() if grad.is_sparse else grad).count_nonzero())


class GradientStash:
    """Gradients that were there before, set aside while others are made.

    They are added at the end, in the tensors that they were in; or, for DDP, which averages over its ranks what a
    backward leaves in `p.grad`, put under the gradients to come.
    """

    def __init__(self, params: Sequence[Tensor], *, in_backward: bool = False):
        """`in_backward`: `put_under` waits for the next gradient, for a closure that zeroes gradients first."""
        self._params = params
        self._in_backward = in_backward
        self._earlier = [None if p.grad is None else _owned(p.grad) for p in params]
        self._hooks: list[Any] = []
        self._is_under = False
        for p in params:
            p.grad = None

    def put_under(self, *, may_repeat: bool = False) -> None:
        """`may_repeat`: this pass may not be the last one, and what is put under it is a copy."""
        self._is_under = True
        for i, (p, g) in enumerate(zip(self._params, self._earlier, strict=True)):
            if g is not None and self._in_backward and p.requires_grad:
                self._hooks.append(p.register_hook(functools.partial(self._join, i)))
            elif g is not None:
                p.grad = g.clone() if may_repeat else g

    def _join(self, i: int, grad: Tensor) -> Tensor:
        earlier, self._earlier[i] = self._earlier[i], None
        return grad if earlier is None else grad + earlier

    @torch.no_grad()
    def stop(self, *, failed: bool) -> None:
        """The earlier gradients are added to those that are there now, or, after a fault, put in their place.

        Not if they are under them already.
        """
        for hook in self._hooks:
            hook.remove()
        if self._is_under:
            return
        for p, g in zip(self._params, self._earlier, strict=True):
            if failed:
                p.grad = g
            elif g is not None:
                p.grad = g if p.grad is None else g.add_(p.grad)


def _owned(grad: Tensor) -> Tensor:
    """The gradient, or a copy of one that lives in storage that the next backward writes to (DDP's bucket views)."""
    return grad.clone() if grad._is_view() else grad
