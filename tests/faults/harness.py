"""One injector, the state that a step may leave, and the rig that holds a model, an optimizer and the fault to come."""

from __future__ import annotations

import errno
import functools
import random
import signal
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy
import torch
from torch import Tensor, nn

from sam_optim import SAM, Perturbation

POINTS = (
    "before pass 1",
    "in pass 1",
    "end of pass 1",
    "after perturb",
    "in pass 2",
    "before restore",
    "in base step",
    "base step done",
    "after step",
)
UPDATED = frozenset(POINTS[7:])  # the weights are those after the step
RAISING = ("exception", "KeyboardInterrupt", "SIGTERM", "out of memory", "disk full")
POISON = ("nan", "inf")

State = dict[str, Any]  # names of weights, buffers and states of optimizers and scalers -> their bits


class Fault(Exception):
    """Raised on purpose."""


@dataclass(frozen=True)
class Variant:
    """What is trained, and how: `sam` goes to SAM or Perturbation, `base` makes the optimizer inside."""

    sam: dict[str, Any]
    base: Callable[..., torch.optim.Optimizer]
    model: Callable[[], nn.Module]
    with_module: bool = True
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Path:
    """One way of stepping.

    step: (rig, i) -> None, one update with batch i, which calls `rig.reach` at each of POINTS and `rig.mark` where a
    transaction of SAM begins. inside: the points from which a fault goes back to that mark. open: those where no
    context is around the perturbed pass, and `give_up` has to bring the weights back. num_batches: of one update, the
    mean of which is taken at the end, or in the loss of each.
    """

    step: Callable[[Rig, int], None]
    inside: frozenset[str] = frozenset()
    open: frozenset[str] = frozenset()
    give_up: Callable[[Rig], None] | None = None
    wrapped: bool = True  # SAM around the base; else Perturbation beside it
    scaler: bool = False
    num_batches: int = 1
    mean_at_end: bool = True  # else each batch's loss is divided by their number


class Rig:
    """A model and its optimizer in the middle of training, and at most one fault that is to come."""

    def __init__(self, variant: Variant, path: Path):
        self.variant, self.path = variant, path
        self.point = self.kind = None
        self.fired, self.number, self.saved = 0, 0, None
        self.loss_factor = 1.0
        self.marked: State = {}
        self.at_fault: State = {}
        seed(0)
        self.model = variant.model().to(variant.dtype)
        self.base: torch.optim.Optimizer
        self.optimizer: torch.optim.Optimizer
        self.sam: SAM | Perturbation
        self.make_optimizer()
        self.scaler = torch.amp.GradScaler("cpu", init_scale=1024.0) if path.scaler else None
        self.model.get_submodule("hidden").register_forward_hook(self._watch)
        self.where = self.pointers()

    def make_optimizer(self, base: torch.optim.Optimizer | None = None) -> None:
        module = self.model if self.variant.with_module else None
        if base is None:
            base = self.variant.base(self.model.parameters())
            base.register_step_post_hook(functools.partial(_after_step, weakref.ref(self)))
        self.base = base
        self.base.reach = self.reach  # type: ignore[attr-defined]
        if self.path.wrapped:
            self.optimizer = self.sam = SAM.wrap(base, module=module, **self.variant.sam)
        else:
            self.optimizer = base
            groups = [{k: g[k] for k in ("params", "rho") if k in g} for g in base.param_groups]
            self.sam = Perturbation(groups, module=module, **self.variant.sam)

    @property
    def perturbation(self) -> Perturbation:
        return self.sam.perturbation if isinstance(self.sam, SAM) else self.sam

    def pointers(self) -> list[int]:
        return [t.data_ptr() for t in (*self.model.parameters(), *self.model.buffers())]

    # the step

    def step(self, i: int) -> None:
        """With draws of its own: a fault may leave the generators anywhere."""
        seed(i)
        self.path.step(self, i)

    def backward(self, number: int, i: int, weight: float = 1.0) -> Tensor:
        """Forward and backward of pass `number` on batch i, with a draw from each of the generators."""
        if number == 2:
            self.reach("after perturb")
        self.number = number
        x, y = batch(i, self.variant.dtype)
        x = x + 0.01 * (random.random() + numpy.random.rand())
        loss = nn.functional.cross_entropy(self.model(x).float(), y) * (weight * self.loss_factor)
        self.loss_factor = 1.0
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        self.reach("end of pass 1" if number == 1 else "before restore")
        return loss.detach()

    def _watch(self, module: nn.Module, args: Any, output: Tensor) -> None:
        if output.requires_grad:
            output.register_hook(functools.partial(self.reach, f"in pass {self.number}"))

    # the fault

    def arm(self, point: str, kind: str) -> None:
        self.point, self.kind = point, kind

    def mark(self) -> None:
        if self.point is not None:
            self.marked = self.state()

    def reach(self, point: str, gradient: Tensor | None = None) -> Tensor | None:
        """Does what is armed for this point, once. Inside a backward, `gradient` is the one that flows there."""
        if point != self.point or self.fired:
            return None
        self.fired += 1
        self.at_fault = self.state()
        return self._poison(gradient) if self.kind in POISON else fire(self.kind, self)

    def _poison(self, gradient: Tensor | None) -> Tensor | None:
        """One entry that is not finite: of the gradient that flows, of the loss to come, or of one parameter's."""
        bad = float(self.kind)
        if gradient is not None:
            gradient = gradient.clone()
            gradient.view(-1)[-1] = bad
            return gradient
        if self.point == "after perturb":
            self.loss_factor = bad
        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        if grads:
            grads[POINTS.index(self.point) % len(grads)].view(-1)[0] = bad
        return None

    def attempt(self, i: int) -> BaseException | None:
        """The step in which the fault comes; returns what came out of it."""
        with handlers(self):
            try:
                self.step(i)
            except (Exception, KeyboardInterrupt, SystemExit) as error:
                return error.with_traceback(None)
        return None

    # what is left

    def state(self) -> State:
        """What a step promises about: not gradients or generators, which the next step clears and draws anyway."""
        state: State = {f"weight {k}": bits(p) for k, p in self.model.named_parameters()}
        state |= {f"buffer {k}": bits(b) for k, b in self.model.named_buffers()}
        for i, p in enumerate(self.model.parameters()):
            for key, value in self.base.state.get(p, {}).items():
                state[f"base state {i} {key}"] = bits(value) if isinstance(value, Tensor) else value
        for i, group in enumerate(self.base.param_groups):
            state[f"group {i}"] = {k: v for k, v in group.items() if k != "params"}
        if self.scaler is not None:
            state["scaler"] = self.scaler.state_dict()
        return state

    def left_open(self) -> list[str]:
        """What a step must never leave behind, whatever became of it."""
        left = []
        if self.perturbation.active:
            left.append("still perturbed")
        if self._is_held():
            left.append("parameters still held")
        if any(m._state_dict_hooks or m._forward_pre_hooks for m in self.model.modules()):
            left.append("hooks")
        if self.pointers() != self.where:
            left.append("storage")
        if not torch.is_grad_enabled():
            left.append("no_grad")
        return left

    def _is_held(self) -> bool:
        """Whether another perturbation is refused; one that moves nothing."""
        grads = [p.grad for p in self.model.parameters()]
        try:
            with Perturbation(self.model.parameters(), rho=0.0).perturbed():
                return False
        except RuntimeError as error:  # a scaler whose step has failed is another matter
            return "another perturbation" in str(error)
        finally:
            for p, g in zip(self.model.parameters(), grads, strict=True):
                p.grad = g

    def settle(self) -> None:
        """What GradScaler asks for after every iteration, also after one that failed in its `step`."""
        states = [] if self.scaler is None else self.scaler._per_optimizer_states.values()
        if any(s["found_inf_per_device"] for s in states):
            self.scaler.update()
        if not self.path.wrapped:
            self.sam.forget()  # the draws of a first pass that came to nothing; SAM.zero_grad does it

    def load(self, other: Rig) -> None:
        """As from a checkpoint: through the state_dict of each part."""
        self.model.load_state_dict({k: v.clone() for k, v in other.model.state_dict().items()})
        self.optimizer.load_state_dict(copied(other.optimizer.state_dict()))
        if self.scaler is not None:
            self.scaler.load_state_dict(other.scaler.state_dict())


def _after_step(rig: weakref.ref[Rig], *_: Any) -> None:
    if (alive := rig()) is not None:
        alive.reach("after step")


def fire(kind: str, rig: Rig) -> None:
    if kind == "exception":
        raise Fault
    if kind == "out of memory":
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    if kind == "disk full":
        with open("/dev/full", "wb", buffering=0) as file:
            torch.save(rig.model.state_dict(), file)
    if kind in ("KeyboardInterrupt", "SIGTERM", "save", "SIGKILL"):
        number = {"KeyboardInterrupt": signal.SIGINT, "SIGTERM": signal.SIGTERM, "save": signal.SIGUSR1}
        signal.raise_signal(number.get(kind, signal.SIGKILL))


def raised_by(kind: str, error: BaseException | None) -> bool:
    """Whether the error is the fault's own, unchanged."""
    expected = {
        "exception": Fault,
        "KeyboardInterrupt": KeyboardInterrupt,
        "SIGTERM": SystemExit,
        "out of memory": torch.OutOfMemoryError,
        "disk full": OSError,
    }
    return type(error) is expected[kind] and (kind != "disk full" or error.errno == errno.ENOSPC)


@contextmanager
def handlers(rig: Rig) -> Iterator[None]:
    """Ctrl-C raises KeyboardInterrupt, SIGTERM stops the process, SIGUSR1 only saves."""

    def save(*_: Any) -> None:
        rig.saved = {"model": copied(rig.model.state_dict()), "base": copied(rig.optimizer.state_dict())}

    def stop(*_: Any) -> None:
        raise SystemExit(143)

    wanted = {signal.SIGINT: signal.default_int_handler, signal.SIGTERM: stop, signal.SIGUSR1: save}
    before = {number: signal.signal(number, handler) for number, handler in wanted.items()}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def differences(state: State, expected: State) -> list[str]:
    """The names of what is not equal, bit for bit."""
    return sorted(k for k in state.keys() | expected.keys() if k not in state or state[k] != expected.get(k))


def only(state: State, *kinds: str) -> State:
    return {k: v for k, v in state.items() if k.startswith(kinds)}


def bits(t: Tensor) -> bytes:
    return t.detach().reshape(-1).view(torch.uint8).numpy().tobytes()


def copied(value: Any) -> Any:
    """A deep copy in which tensors share nothing."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {k: copied(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(copied(v) for v in value)
    return value


def seed(value: int) -> None:
    torch.manual_seed(value)
    random.seed(value)
    numpy.random.seed(value)


@functools.lru_cache(maxsize=64)
def batch(i: int, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(i)
    x, y = torch.randn(8, 4, generator=generator), torch.randint(3, (8,), generator=generator)
    return x.to(dtype), y
