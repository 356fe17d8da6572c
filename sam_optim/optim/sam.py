"""SAM and ASAM as torch.optim optimizers around any base optimizer."""

from __future__ import annotations

import functools
import inspect
import math
import sys
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Self

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sam_optim.core.geometry import Ball, ProductBall
from sam_optim.optim import kernels
from sam_optim.optim.base_update import BaseUpdate, accepted, check_base, takes_found_inf
from sam_optim.optim.callers import advice_for_caller, calling_scaler, refuse_inside_zero, refuse_to_lose_micro_batches
from sam_optim.optim.checkpoints import adapted
from sam_optim.optim.kernels import Backups, dtensor
from sam_optim.optim.last_step import LastStep
from sam_optim.optim.param_groups import check_group, listed, setting_of_groups
from sam_optim.optim.perturbation import Closure, Perturbation
from sam_optim.optim.schedules import factor_at
from sam_optim.optim.transaction import has_values

_KEYS = ("rho", "adaptive", "eta", "norm")
_STEP = "sam_step"  # in the groups of an optimizer that counts its steps, and so in its checkpoints


class SAM(Optimizer):
    """w <- base(w, grad L(w + e)),   e = argmax <g, e> over ||T^-1 e||_p <= rho,   g = grad L(w).

    p = 2: e = rho T^2 g / ||T g||_2; p = inf: e = rho T sign(g). T = 1, or adaptive: |w| + eta, or a norm for each
    filter or layer. The norm runs over all groups; each group is moved by its own rho. `param_groups` and `state` are
    the base's own objects, so a checkpoint of the plain base loads into SAM and the reverse.

        optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.1, momentum=0.9)
        loss = optimizer.step(closure)            # closure: zero_grad, forward, backward, return the loss; runs twice

        loss.backward()                           # or in two phases, for GradScaler, clipping, loops of your own
        with optimizer.perturbed():
            criterion(model(x), y).backward()
        optimizer.step()

    Args:
        params: as for any torch optimizer; groups may have their own rho, adaptive, eta and norm.
        base_optimizer: a class, or any callable that creates an optimizer from params; it gets `base_kwargs`.
        rho: the radius, in units of T (of w where T = 1), not relative to ||w||.
        adaptive: T. False: 1. True or "elementwise": |w| + eta. "filter", "layer": their norm + eta.
        eta: added to T; matters only where adaptive.
        norm: p, 2 or inf.
        module: the model, in its DDP or FSDP wrapper if it has one. With it the second pass leaves no trace in its
            buffers (BatchNorm statistics), its `state_dict()` holds the clean weights at every moment, and each rank of
            DDP has its own perturbation, with one exchange of gradients a step.
        schedule: from the step number (0, 1, ...) to a factor on rho, such as `late_phase(start)`; the count is saved
            in checkpoints. Where the factor is 0 a step has one pass: closures run once, and a two-phase
            loop may skip its second pass (ask `optimizer.ascends` before it).
        sync_ascent: True for one perturbation by the gradient of all of DDP's ranks.
        foreach, fused: as in torch.optim. None chooses. fused=True is for the base and, on CUDA, also for SAM's own
            ascent, which takes three launches of Triton kernels.
        rounding, replay_rng: see `Perturbation`.
        nonfinite: what a gradient with an inf or NaN does, at w (which makes w + e NaN) or at w + e. "skip" leaves
            weights and state as they are and counts in `num_skipped`; "raise" raises; "ignore" steps with it. None:
            "skip" where that needs no host sync: on the CPU, and on a device with a fused base.

    Raises:
        ValueError: a radius, norm or T that does not exist; a base whose own step needs a closure (LBFGS), which has a
            hyperparameter of the same name (Adadelta's rho), or which holds other parameters.

    Source: SAM, Foret et al. (2020), arXiv:2010.01412; ASAM, Kwon et al. (2021), arXiv:2102.11600.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: Callable[..., Optimizer] = torch.optim.SGD,
        *,
        rho: float | Tensor = 0.05,
        adaptive: bool | str = False,
        eta: float = 0.01,
        norm: float = 2,
        module: nn.Module | Sequence[nn.Module] | None = None,
        schedule: Callable[[int], float] | None = None,
        sync_ascent: bool | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        rounding: str = "nearest",
        replay_rng: bool = False,
        nonfinite: str | None = None,
        **base_kwargs: Any,
    ):
        if isinstance(base_optimizer, Optimizer):
            raise TypeError(
                f"base_optimizer is a {type(base_optimizer).__name__} that exists already and holds its own "
                f"parameters: pass its class, or use {type(self).__name__}.wrap(base_optimizer, rho=...)"
            )
        if not callable(base_optimizer):
            raise TypeError(f"base_optimizer must be an optimizer class or a callable, got {base_optimizer!r}")
        given = {"rho": rho, "adaptive": adaptive, "eta": eta, "norm": norm}
        check_group(given)
        flags = {k: v for k, v in (("foreach", foreach), ("fused", fused)) if v is not None}
        refuse_inside_zero()
        params, members = listed(params)
        base = base_optimizer(params, **accepted(base_optimizer, flags), **base_kwargs)
        held = [p for group in base.param_groups for p in group["params"]]
        if members is not None and {id(p) for p in held} != members:
            raise ValueError("the base optimizer holds other parameters than those passed: create it with `params`")
        options: dict[str, Any] = {"module": module, "sync_ascent": sync_ascent, "foreach": foreach}
        options |= {"rounding": rounding, "replay_rng": replay_rng}
        options["fused"] = fused if kernels.may_be_fused(held) else None  # on the CPU it means the base alone
        self._adopt(base, given, schedule=schedule, nonfinite=nonfinite, **options)

    @classmethod
    def wrap(cls, base_optimizer: Optimizer, **kwargs: Any) -> Self:
        """SAM around an existing optimizer, such as one from timm's factory. Keyword arguments are those of the class;
        `fused` is for SAM's own part only."""
        if not isinstance(base_optimizer, Optimizer):
            raise TypeError(f"wrap takes an optimizer instance, got {base_optimizer!r}")
        values: dict[str, Any] = {}
        for ancestor in reversed(cls.__mro__[: cls.__mro__.index(SAM) + 1]):  # a subclass may name only what it changes
            named = inspect.signature(ancestor.__init__).parameters.items()  # type: ignore[misc]
            values |= {k: v.default for k, v in named if v.kind is v.KEYWORD_ONLY}
        if unknown := [k for k in kwargs if k not in values]:
            raise TypeError(f"wrap has no argument {unknown[0]!r}; it takes {', '.join(values)}")
        values |= kwargs
        given = {k: values.pop(k) for k in _KEYS}
        self = cls.__new__(cls)
        self.configure(**{k: values.pop(k) for k in set(values) - set(inspect.signature(SAM.__init__).parameters)})
        check_group(given)
        self._adopt(base_optimizer, given, **values)
        return self

    def _adopt(
        self, base: Optimizer, given: dict[str, Any], *, schedule: Any, nonfinite: str | None, **options: Any
    ) -> None:
        if isinstance(base, SAM):
            raise ValueError("the base is a SAM already: wrap the plain optimizer")
        if schedule is not None and not callable(schedule):
            raise TypeError(
                f"schedule must be callable, from the number of a step to a factor of rho, got {schedule!r}"
            )
        check_base(base, _KEYS)
        self.check_variant(base)
        update = BaseUpdate(base, nonfinite)
        for key in [k for k in _KEYS if k in base.defaults]:  # of a SAM around it before
            for group in base.param_groups:
                if group.get(key) == base.defaults[key]:
                    del group[key]
        for group in base.param_groups:
            check_group(given | {k: group[k] for k in _KEYS if k in group})
        super().__init__(base.param_groups, given)  # adds missing keys to the base's own groups
        base.defaults.update(given)
        self.base_optimizer = base
        self.schedule = schedule
        self._counts = schedule is not None or type(self).factor_of is not SAM.factor_of
        for group in base.param_groups if self._counts else ():
            group.setdefault(_STEP, 0)
        self._perturbation_options = options
        self._base_update = update
        options["replay_rng"] = options["replay_rng"] and not self.one_pass  # one pass draws once
        if self._is_variant and options["sync_ascent"] is None:
            options["sync_ascent"] = True  # what it remembers, and what it makes of g(w), must be alike on DDP's ranks
        self._is_of_training = True
        self._changes_update = type(self).update_gradient is not SAM.update_gradient
        self._pending: dict[tuple[Tensor, str], Tensor] = {}  # what a variant remembers when the step has ended
        self._relink()

    def _relink(self) -> None:
        """One truth: groups, state, defaults and hooks are the base's own objects."""
        base = self.base_optimizer
        self.param_groups, self.state, self.defaults = base.param_groups, base.state, base.defaults
        self._linked = {"param_groups": base.param_groups, "state": base.state}
        for hooks in ("_optimizer_step_pre_hooks", "_optimizer_step_post_hooks"):
            if hooks in base.__dict__:
                self.__dict__[hooks] = base.__dict__[hooks]
        if "perturbation" not in self.__dict__:
            # torch.optim only warns of a parameter that a group lists twice
            groups = [g | {"params": list(dict.fromkeys(g["params"]))} for g in self.param_groups]
            self.perturbation = Perturbation(groups, **self._perturbation_options)
        self.perturbation.param_groups = self.param_groups
        self.perturbation.reads_zeros = True
        if self._is_variant:
            self.perturbation.rule = weakref.proxy(self)
            self.perturbation.one_pass, self.perturbation.reverses = self.one_pass, self.reverses
            self.perturbation.keeps_ascent_gradients = type(self).descent_gradient is not SAM.descent_gradient

    # stepping

    @torch._disable_dynamo  # type: ignore[untyped-decorator]
    @torch.no_grad()
    def step(  # type: ignore[override]
        self, closure: Closure | Sequence[Closure] | None = None, *, ascent_closure: Closure | None = None
    ) -> Any:
        """One update. Returns the loss at w, before it; None without a closure.

        Args:
            closure: zeroes the gradients, runs forward and backward, returns the loss. It runs at w and at w + e. A
                list of closures is m-sharpness: each has its own perturbation, the gradients at the perturbed points
                are averaged. None: the base update with the gradients in `p.grad`, to finish a perturbed pass.
            ascent_closure: another loss for the ascent: fewer examples, lower precision. Its loss is the one returned.

        Raises:
            RuntimeError: no closure and no perturbed pass; a closure that forgot `backward()` or left earlier gradients
                in place; a closure given through `GradScaler.step`, or through Accelerate where it accumulates.
        """
        self._begin()
        try:
            if closure is not None:
                return self._step_closure(closure, ascent_closure)
            if ascent_closure is not None:
                raise ValueError("ascent_closure needs a closure for the descent: step(closure, ascent_closure=...)")
            self.perturbation.refresh()
            self._finish_pass()
            self._update()
        except BaseException:
            self._forget_scale()
            self._pending.clear()
            self._is_of_training = True
            raise

    def _step_closure(self, closure: Closure | Sequence[Closure], ascent_closure: Closure | None) -> Any:
        if "found_inf" in self.__dict__:
            raise RuntimeError(
                "scaler.step(optimizer, closure) steps with gradients that are still scaled: run scaled backwards "
                "around `with optimizer.perturbed():` and call scaler.step(optimizer) without a closure"
            )
        if "accelerate.optimizer" in sys.modules:
            refuse_to_lose_micro_batches()
        perturbation = self.perturbation
        with perturbation.transaction():
            if perturbation.active and callable(closure):  # first_step(), and a closure that is pass 2 or does nothing
                with torch.enable_grad():
                    loss = closure()
                self._finish_pass()
            else:
                loss = perturbation.backward(closure, ascent_closure=ascent_closure)
            self._update()
        return loss

    @torch._disable_dynamo  # type: ignore[untyped-decorator]
    def perturbed(self) -> AbstractContextManager[None]:
        """Context: w -> w + e with the gradients in `p.grad`, which it clears; then `step()` without a closure."""
        self._begin_pass()
        return self.perturbation.perturbed()

    @torch._disable_dynamo  # type: ignore[untyped-decorator]
    def microbatch(self) -> AbstractContextManager[None]:
        """Context around the two passes of one micro-batch: adds its gradient to those of earlier micro-batches."""
        self._begin()
        if self._pending and all([p.grad is None for p in self._parameters()]):
            self._pending.clear()
        return self.perturbation.microbatch()

    @torch._disable_dynamo  # type: ignore[untyped-decorator]
    def first_step(self, zero_grad: bool = False) -> None:
        """w -> w + e with the gradients in `p.grad`; the names of davda54/sam, for loops written for it.

        The gradients are cleared whatever `zero_grad` says: those of the second pass must not be added to them.

        Raises:
            RuntimeError: an earlier one has not been followed by `second_step()`. That pass is given up, and w comes
                back, so that a loop that goes on after errors loses one batch and not all of them.
        """
        if self.perturbation.active:
            self.perturbation.exit(failed=True)
            raise RuntimeError(
                "first_step() came twice: the pass of the earlier one is given up now, and w is back. Call "
                "second_step() after each; to accumulate, run the two passes of each micro-batch in `with "
                "optimizer.microbatch():`, the second one in `with optimizer.perturbed():`, and then step(); to leave "
                "a batch out between the two, call optimizer.perturbation.exit(failed=True)"
            )
        self._begin_pass()
        self.perturbation.enter()

    @torch._disable_dynamo  # type: ignore[untyped-decorator]
    def second_step(self, zero_grad: bool = False) -> None:
        """w + e -> w, then the base update with the gradients in `p.grad`."""
        if not self.perturbation.active:
            raise RuntimeError("second_step() without first_step(): the weights are not perturbed")
        self.step()
        if zero_grad:
            self.zero_grad()

    @torch._disable_dynamo  # type: ignore[untyped-decorator]
    def zero_grad(self, set_to_none: bool = True) -> None:
        super().zero_grad(set_to_none and not self.perturbation.keeps_zeros)
        if not self.perturbation.is_stepping:  # GradScaler may have left out the step that the passes before were for
            self._pending.clear()
        self.perturbation.forget()

    def _begin(self) -> None:
        """Runs first in a step: takes the groups from the base, and the radii of this step from the schedule."""
        self._follow_base()
        if self._counts:
            factor = self.factor_of(self.param_groups[0][_STEP])
            radius = getattr(self.schedule, "radius", None)
            self.perturbation.scale_radii(factor, radius and functools.partial(radius, defaults=self.defaults))

    def _begin_pass(self) -> None:
        self._begin()
        self._forget_scale()
        if self._pending and not self.perturbation.is_stepping and not self.perturbation.has_finished_pass():
            self._pending.clear()

    @property
    def ascends(self) -> bool:
        """Whether the next step perturbs the weights. If not, a two-phase loop may skip its second pass."""
        self._begin()
        return self.perturbation.ascends

    def _forget_scale(self) -> None:
        """Drops what a GradScaler sets on the optimizer and removes only after a step that returns; the next step would
        be scaled by it once more."""
        self.__dict__.pop("found_inf", None)
        self.__dict__.pop("grad_scale", None)

    def _finish_pass(self) -> None:
        """Ends the perturbed pass; without one a step is legal only where no gradient could be misused."""
        perturbation = self.perturbation
        perturbation.exit()
        if perturbation.was_empty:
            raise RuntimeError(
                "the perturbed pass has left no gradient: run the second forward and backward inside `with "
                "optimizer.perturbed():`, or between first_step() and second_step()"
            )
        if perturbation.has_finished_pass() or (not perturbation.ascends and not self._is_idle()):
            return
        if "found_inf" in self.__dict__ and bool(self.__dict__["found_inf"]):
            return  # GradScaler leaves this step out
        if any([p.grad is not None and has_values(p.grad) for p in self._parameters()]):
            if not perturbation.ascends:
                return
            which = "the" if self.one_pass else "a second"
            raise RuntimeError(
                "step() without a closure has only plain gradients, and would train the base optimizer alone: pass a "
                f"closure, or run {which} forward and backward inside `with optimizer.perturbed():` first"
                + advice_for_caller()
            )
        self._is_of_training = False

    def _is_idle(self) -> bool:
        """Whether a step might only create the base's state, as torch.distributed.checkpoint has it do: lr is 0."""
        return self._counts and not self.state and not any([float(g.get("lr", 1.0)) for g in self.param_groups])

    def _update(self) -> None:
        """The base's update with the gradients in `p.grad`, as GradScaler has set it up if it calls."""
        is_of_training, self._is_of_training = self._is_of_training, True
        if is_of_training and self._changes_update:
            self._change_update()
        self.perturbation.watch_update()
        if "found_inf" in self.__dict__:
            has_updated = self._base_update.scaled(self.__dict__["found_inf"], self.__dict__.get("grad_scale"))
        else:
            self.perturbation.warn_of_scale()
            has_updated = self._base_update(self.perturbation.together)
        if has_updated and self._pending:
            self._keep_pending()
        self._pending.clear()
        self.perturbation.forget()
        if self._counts and is_of_training:
            step = self.param_groups[0][_STEP] + 1
            for group in self.param_groups:
                group[_STEP] = step

    def _change_update(self) -> None:
        """The gradients become what a variant makes of them at the end of all passes."""
        params = [p for p in self._parameters() if p.grad is not None]
        grads: list[Any] = [dtensor.local_gradient(p) for p in params]
        scale = self.__dict__.get("grad_scale") if "found_inf" in self.__dict__ else None
        for g, new in zip(grads, self.update_gradient(params, grads, scale), strict=True):
            if new is not g:
                g.copy_(new)

    def _keep_pending(self) -> None:
        """What a variant remembers goes into `state`, in place, so that a CUDA graph can hold it; on a device, where a
        skip is not seen, only what is finite."""
        if self.gradient_means:
            self.perturbation.scaler = calling_scaler()
        scale = self._loss_scale() if self.gradient_means else None
        for (p, name), value in self._pending.items():
            if scale is not None and name in self.gradient_means:
                value = value / scale.to(value)
            earlier = dtensor.local(self.state[p][name]) if name in self.state[p] else None
            if value.device.type != "cpu":
                before = torch.zeros_like(value) if earlier is None else earlier
                value = torch.where(value.isfinite().all(), value, before)
            if earlier is None or (earlier.shape, earlier.dtype) != (value.shape, value.dtype):
                self.state[p][name] = dtensor.whole(value, p)
            else:
                earlier.copy_(value)

    def _loss_scale(self) -> Tensor | None:
        """What a GradScaler multiplies the gradients of this step by; None: nothing."""
        scaler = self.perturbation.scaler
        return scaler._scale if scaler is not None and scaler.is_enabled() else None

    def _parameters(self) -> Iterator[Tensor]:
        return iter(dict.fromkeys(p for group in self.param_groups for p in group["params"]))

    def _follow_base(self) -> None:
        """Frameworks assign `param_groups` and `state` anew, `base.load_state_dict` too: on whichever they hold."""
        self = self.__dict__.get("_optimizer", self)  # Lightning's and Fabric's wrappers imitate the class
        base = self.base_optimizer
        for name, linked in self._linked.items():
            mine, theirs = self.__dict__[name], base.__dict__[name]
            if mine is linked and theirs is not linked:
                if name == "param_groups":
                    _fill(theirs, [{k: g[k] for k in (*_KEYS, _STEP) if k in g} for g in linked])
                setattr(self, name, theirs)
            elif theirs is not mine:
                setattr(base, name, mine)
            self._linked[name] = self.__dict__[name]
        self.perturbation.param_groups = self.param_groups

    @property
    def _step_supports_amp_scaling(self) -> bool:
        """While perturbed, GradScaler must call `step` whatever it found: skipping would leave the weights at w + e.
        And a fused base unscales by itself, without reading anything back."""
        perturbation = self.__dict__.get("perturbation")
        if perturbation is None:
            return False
        idle = not perturbation.active and not perturbation.completed  # then a step is refused, whatever was found
        return perturbation.active or idle or takes_found_inf(self.base_optimizer)

    # what it searches, and what it saw

    @property
    def module(self) -> nn.Module | Sequence[nn.Module] | None:
        """What must not notice the second pass, see the class. It may be set after construction, between two steps."""
        return self.perturbation.module

    @module.setter
    def module(self, module: nn.Module | Sequence[nn.Module] | None) -> None:
        self._follow_base()
        self.perturbation.refresh()
        self.perturbation.module = module

    rho, adaptive, eta, norm = map(setting_of_groups, _KEYS)

    @property
    def ball(self) -> Ball:
        """The ball of the first group. Where all have the same, `worst_case_sharpness(loss, optimizer.ball)` is what
        training minimized; where they differ, that is `optimizer.neighborhood`."""
        return self.balls[0]

    @property
    def balls(self) -> list[Ball]:
        """The ball of each group."""
        self._follow_base()
        return self.perturbation.balls

    @property
    def neighborhood(self) -> ProductBall:
        """The balls of all groups as one, for measures where the groups differ (`asam_param_groups`)."""
        self._follow_base()
        return self.perturbation.neighborhood

    @property
    def last_step(self) -> LastStep:
        return self.perturbation.last_step

    @property
    def nonfinite(self) -> str | None:
        """What a gradient that is not finite does."""
        return self._base_update.nonfinite

    @property
    def num_skipped(self) -> int | Tensor:
        """How many steps had a gradient that was not finite, and left weights and state as they were."""
        return self._base_update.num_skipped

    # What a variant changes: it overrides some of these. All tensors are the entries on this rank, and arguments must
    # not be changed; `recall` and `remember` keep tensors from step to step.

    gradient_means: tuple[str, ...] = ()  # what it remembers in units of the gradient: in `state` without a loss scale
    one_pass = False  # e is known before the pass: `ascent_gradient` gets no gradients, and a step has one pass
    reverses = False  # e points against `ascent_gradient`, whether the loss is minimized or maximized

    def configure(self) -> None:
        """Checks and sets the hyperparameters that a variant adds to those of SAM."""

    def check_variant(self, base: Optimizer) -> None:
        """Raises ValueError for a base that the variant cannot have."""

    def factor_of(self, step: int) -> float:
        """The factor of rho in a step: that of the schedule. 0: the step has one pass."""
        return 1.0 if self.schedule is None else factor_at(self.schedule, step)

    def ascent_gradient(self, params: Sequence[Tensor], grads: Sequence[Tensor] | None) -> Sequence[Tensor | None]:
        """What e is to point along, given the gradients at w of the parameters that move."""
        assert grads is not None
        return grads

    def has_moved(self, backups: Backups) -> None:
        """The weights are w + e now."""

    def descent_gradient(
        self, params: Sequence[Tensor], grads_at_w: Sequence[Tensor], grads: Sequence[Tensor]
    ) -> Iterable[Tensor]:
        """The gradient of a second pass, given those at w + e and at w (0 where there was none)."""
        return grads

    def update_gradient(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], scale: Tensor | None
    ) -> Iterable[Tensor]:
        """What the base gets, given the gradients of all passes of the step, averaged over ranks, also of a step
        without an ascent; they may be changed in place. scale: of a GradScaler, by which they are still multiplied."""
        return grads

    def recall(self, p: Tensor, name: str) -> Tensor | None:
        """What `remember` has kept of a parameter: its entries on this rank; None if there is nothing."""
        pending = self._pending.get((p, name))
        if pending is not None or name not in self.state.get(p, ()):
            return pending
        value = dtensor.local(self.state[p][name])
        scale = self._loss_scale() if name in self.gradient_means else None
        return value if scale is None else value * scale.to(value)

    def remember(self, p: Tensor, name: str, value: Tensor) -> None:
        """Keeps a tensor of the parameter's shape in `state`, and so in checkpoints, if the step completes."""
        self._pending[p, name] = value

    def dot(self, params: Sequence[Tensor], xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
        """<x, y> over all entries of the parameters, on all ranks: 0-d float64."""
        return dtensor.dot(params, xs, ys)

    # torch.optim's book-keeping

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        if "base_optimizer" not in self.__dict__:  # called by Optimizer.__init__
            super().add_param_group(param_group)
            return
        self._follow_base()
        check_group(self.defaults | param_group)
        if self._counts:
            param_group.setdefault(_STEP, self.param_groups[0][_STEP])
        self.base_optimizer.add_param_group(param_group)

    def state_dict(self) -> dict[str, Any]:
        """The base's, with rho, adaptive, eta and norm in its groups."""
        self._follow_base()
        if type(self.base_optimizer).state_dict is not Optimizer.state_dict:
            return self.base_optimizer.state_dict()
        return super().state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """From SAM, from the plain base (then rho, adaptive, eta and norm stay as they are), or from another SAM."""
        if self.perturbation.active:
            raise RuntimeError("the weights are perturbed: call load_state_dict when the perturbed pass has ended")
        self._follow_base()
        state_dict = adapted(state_dict, self.param_groups)
        if type(self.base_optimizer).load_state_dict is Optimizer.load_state_dict:
            super().load_state_dict(state_dict)
            return
        before = [{k: g[k] for k in (*_KEYS, _STEP) if k in g} for g in self.param_groups]
        self.base_optimizer.load_state_dict(state_dict)
        _fill(self.base_optimizer.param_groups, before)
        self._relink()

    def __getstate__(self) -> dict[str, Any]:
        skipped = ("_linked", "_pending", "param_groups", "state", "defaults")
        own = {k: v for k, v in self.__dict__.items() if k not in skipped and "hooks" not in k}
        return super().__getstate__() | own

    @property
    def _is_variant(self) -> bool:
        methods = ("ascent_gradient", "descent_gradient", "update_gradient")
        return any(getattr(type(self), name) is not getattr(SAM, name) for name in methods)

    def __setstate__(self, state: dict[str, Any]) -> None:
        self._pending = {}
        keys = (*_KEYS, _STEP)
        before = [{k: g[k] for k in keys if k in g} for g in self.__dict__.get("param_groups", [])]
        super().__setstate__(state)
        base_state = {"state": self.state, "param_groups": self.param_groups}
        self.base_optimizer.__setstate__(base_state)  # fills keys that older checkpoints lack
        _fill(self.base_optimizer.param_groups, before)
        for group in self.base_optimizer.param_groups:
            for key in _KEYS:
                group.setdefault(key, self.defaults[key])
            if self._counts:
                group.setdefault(_STEP, 0)
        self._relink()

    def __getattr__(self, name: str) -> Any:
        """What only the base has: train() and eval() of schedule-free ones, consolidate_state_dict of ZeRO, ..."""
        if not name.startswith("_") and "base_optimizer" in self.__dict__:
            return getattr(self.base_optimizer, name)
        raise AttributeError(f"{type(self).__name__!r} object has no attribute {name!r}")

    def __repr__(self) -> str:
        return super().__repr__().replace(f"{type(self).__name__} (", f"{self._title()} (", 1)

    def _title(self) -> str:
        return f"{type(self).__name__} over {type(self.base_optimizer).__name__}"


class ASAM(SAM):
    """SAM with T = |w| + eta: e = rho T^2 g / ||T g||_2. Larger radii than SAM's; 0.5 is the paper's for CIFAR-10.

    The paper leaves biases and normalization parameters at T = 1: pass `asam_param_groups(model)` for that.

    Source: Kwon et al. (2021), arXiv:2102.11600.
    """

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: Callable[..., Optimizer] = torch.optim.SGD,
        *,
        rho: float | Tensor = 0.5,
        adaptive: bool | str = True,
        eta: float = 0.01,
        **kwargs: Any,
    ):
        super().__init__(params, base_optimizer, rho=rho, adaptive=adaptive, eta=eta, **kwargs)


def check_number(name: str, value: float, *, below: float = math.inf) -> float:
    """A finite number in [0, below), or a ValueError."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 <= value < min(below, math.inf):
        bound = "" if below == math.inf else f" and < {below:g}"
        raise ValueError(f"{name} must be a finite number >= 0{bound}, got {value!r}")
    return float(value)


def _fill(groups: list[dict[str, Any]], values: list[dict[str, Any]]) -> None:
    for group, value in zip(groups, values, strict=False):
        for key in value:
            group.setdefault(key, value[key])
