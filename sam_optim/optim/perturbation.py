"""Two contexts that make the gradients in `p.grad` sharpness-aware, and leave the optimizer untouched."""

from __future__ import annotations

import math
import operator
import os
import warnings
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import GradScaler

from sam_optim.core import random as rng
from sam_optim.core.geometry import Ball, ProductBall, canonical_adaptive, canonical_norm
from sam_optim.optim import kernels, transaction
from sam_optim.optim.callers import advice_for_caller
from sam_optim.optim.distributed import FirstPass, Ranks
from sam_optim.optim.kernels import Backups, Bucket, dtensor
from sam_optim.optim.kernels.bucket import LOW_PRECISION
from sam_optim.optim.last_step import LastStep, Record, mean_loss, retained
from sam_optim.optim.param_groups import as_groups, check_group, is_zero, setting_of_groups
from sam_optim.optim.passes import Graphs, PassCount, explain_used_graph
from sam_optim.optim.precision import Float32Pass
from sam_optim.optim.surroundings import Surroundings, scaler_in_sight
from sam_optim.optim.transaction import Draws, EarlierGradients, GradientStash, ModelGuard, has_values

ROUNDING = ("nearest", "stochastic", "float32")

Closure = Callable[[], Any]

_TRAINS = operator.attrgetter("requires_grad")
_KIND = operator.attrgetter("dtype", "layout", "device")  # tensors that differ in these go into separate buckets


class Perturbation:
    """w -> w + e for the length of a second pass,  e = argmax <g, e> over ||T^-1 e||_p <= rho,  g = p.grad.

        with sam.microbatch():                     # keeps the gradients of earlier micro-batches apart
            criterion(model(x), y).backward()      # ascent gradient g, at w
            with sam.perturbed():                  # w -> w + e, gradients cleared; w comes back bit for bit
                criterion(model(x), y).backward()  # descent gradient, at w + e
        optimizer.step()                           # any optimizer, or scaler.step(optimizer)

    p = 2: e = rho T^2 g / ||T g||_2; p = inf: e = rho T sign(g). T = 1 (SAM, arXiv:2010.01412) or adaptive (ASAM,
    arXiv:2102.11600). One norm runs over all groups, and each group is moved by its own rho; groups with rho = 0 stay
    where they are, and out of the norm. With a gradient of 0, e = 0. A gradient with an inf or NaN makes w + e NaN, and
    the gradient there, too: skip that step, as GradScaler and `SAM` do; w comes back all the same. A loss scale in g
    does not matter.

    Args:
        model_or_params: a model (then also `module`), parameters, (name, parameter) pairs, or groups: dicts with
            "params" and, where they differ from the arguments below, "rho", "adaptive", "eta", "norm", "maximize".
        rho: the radius, in units of T (of w where T = 1), not relative to ||w||.
        adaptive: T; False: 1; True or "elementwise": |w| + eta; "filter", "layer": their norm + eta.
        norm: p, 2 or inf.
        module: the model, in its DDP or FSDP wrapper if it has one, or a list of modules that a pass runs through. With
            it their buffers (BatchNorm statistics, ...) and the parameters that the optimizer does not step are, after
            the second pass, those of the first; `state_dict()` holds the clean weights also while they are perturbed;
            DDP synchronizes only the second gradient, so that each rank has its own perturbation.
        sync_ascent: with DDP, True for one perturbation by the gradient of all ranks. FSDP and tensor parallel have
            no other.
        foreach: as in torch.optim. None chooses.
        fused: True for the Triton kernels on CUDA; tensors that they cannot handle are moved as with None.
        rounding: how bf16 and fp16 weights are rounded. "nearest" loses much of a small e (see `last_step.realized`),
            "stochastic" keeps it on average, "float32" keeps it: in the second pass `module` is in float32, at the cost
            of the memory of float32 copies and of the time, activations and gradients of float32.
        replay_rng: the second pass draws the same random numbers (dropout masks) as the first. In two phases without
            `microbatch()` this holds only for draws inside `module`.
        seed: of the draws for stochastic rounding, which start again when training is resumed.

    Raises:
        ValueError: a radius, norm or T that does not exist; rounding="float32" without a module for which it works.
    """

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        *,
        rho: float | Tensor = 0.05,
        adaptive: bool | str = False,
        eta: float = 0.01,
        norm: float = 2,
        module: nn.Module | Sequence[nn.Module] | None = None,
        sync_ascent: bool | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        rounding: str = "nearest",
        replay_rng: bool = False,
        maximize: bool = False,
        seed: int = 0,
    ):
        if rounding not in ROUNDING:
            raise ValueError(f"rounding must be 'nearest', 'stochastic' or 'float32', got {rounding!r}")
        if isinstance(model_or_params, nn.Module):
            module = model_or_params if module is None else module
            model_or_params = list(model_or_params.parameters())
        defaults = {"rho": rho, "adaptive": adaptive, "eta": eta, "norm": norm, "maximize": maximize}
        self.param_groups = as_groups(model_or_params, defaults)
        self.sync_ascent = sync_ascent
        self.foreach, self.fused = foreach, fused
        self.rounding = rounding
        self.replay_rng = replay_rng
        self.completed = False  # a second pass has ended, and no optimizer has used its gradients yet
        self.was_empty = False  # the last second pass has left no gradient
        self.rule: Any = None  # a variant of SAM that changes gradients
        self.reads_zeros = False  # gradients that were written to and are 0 have been cleared too late, not computed
        self.one_pass = False  # e is known before the pass, so that a step has one: the rule says where it points
        self.reverses = False  # e points against what the rule says
        self.keeps_ascent_gradients = False  # for the rule's descent gradient
        self._radii: list[Any] | None = None
        self._noise = rng.Stream(seed) if rounding == "stochastic" else None
        self._has_warned = False
        self._record = Record()
        self._begin_anew()
        self.module = module

    def _begin_anew(self) -> None:
        """What lives only within steps."""
        self._listed = [p for g in self.param_groups for p in g["params"]]
        self._num_listed = len(self._listed)
        self._params = distinct(self.param_groups)
        self._geometry: list[tuple[Any, ...]] = []
        self._body = kernels.fused_body(self._params, self.fused, self.foreach)
        self._backups = Backups()
        self._pass: _SecondPass | None = None
        self._first: FirstPass | None = None
        self._draws: Draws | None = None
        self._stash: GradientStash | None = None
        self._earlier: EarlierGradients | None = None
        self._in_transaction = False
        self._versions_before_update: list[int] | None = None
        self._surroundings: Surroundings | None = None
        self.scaler = None
        self._arrivals: EarlierGradients | None = None  # in the second pass
        self._was_cleared = False  # by the optimizer's zero_grad(), since the first pass began
        self._was_written = False  # every gradient of this first pass, after it was made
        self._num_writes: tuple[Tensor, int] | None = None  # to a gradient of the first pass; a hint that costs nothing
        self._graphs: Graphs | None = None
        self._count: PassCount | None = None  # in the step after that hint
        self._has_counted = False
        self._is_new = True  # until a step's passes have ended: only so long values are read to find a wrong loop

    rho, adaptive, eta, norm = map(setting_of_groups, ("rho", "adaptive", "eta", "norm"))

    @property
    def scaler(self) -> GradScaler | None:
        """What multiplies the gradients of this loop, as far as that is known."""
        return None if self._scaler is None else self._scaler()

    @scaler.setter
    def scaler(self, scaler: GradScaler | None) -> None:
        self._scaler = None if scaler is None else weakref.ref(scaler)

    # the model

    @property
    def module(self) -> nn.Module | Sequence[nn.Module] | None:
        """What must not notice the second pass. It may be set later, between two steps."""
        return self._module

    @module.setter
    def module(self, module: nn.Module | Sequence[nn.Module] | None) -> None:
        self._check_inactive()
        self._surroundings = None
        self._guard = ModelGuard(module, self._params)
        self._float32 = Float32Pass(self._guard.roots) if self.rounding == "float32" else None
        self._ranks = Ranks(self._guard.modules, self._params, self.sync_ascent)
        if self._draws is not None:
            self._draws.forget()
        if self.replay_rng:
            self._draws = Draws(self._guard.roots, {p.device for p in self._params if p.is_cuda})
            self._draws.wait()
        self._module = module

    # what it searches, and what it saw

    def scale_radii(self, factor: float, radius: Callable[[dict[str, Any]], Any] | None = None) -> None:
        """From now on the radius of a group is `factor` times its rho, or where that is not 0 times `radius(group)`."""
        self._radii = []
        for group in self.param_groups:
            rho = group["rho"]
            if radius is not None and not is_zero(rho):
                rho = radius(group)
            self._radii.append(rho if factor == 1 else rho * factor if factor else 0.0)

    @property
    def balls(self) -> list[Ball]:
        """The ball of each group, by its rho; a schedule is not in it."""
        return [Ball(float(g["rho"]), norm=g["norm"], adaptive=g["adaptive"], eta=g["eta"]) for g in self.param_groups]

    @property
    def ball(self) -> Ball:
        """The ball of the first group."""
        return self.balls[0]

    @property
    def neighborhood(self) -> ProductBall:
        """The balls of all groups as one: what a measure takes to search just where this searches."""
        return ProductBall([(b, g["params"]) for b, g in zip(self.balls, self.param_groups, strict=True)])

    @property
    def active(self) -> bool:
        """Whether the weights are perturbed now."""
        return self._pass is not None

    @property
    def last_step(self) -> LastStep:
        """Diagnostics of the last perturbed pass."""
        return self._record.last_step(self._params)

    # the two passes

    @contextmanager
    def microbatch(self) -> Iterator[None]:
        """Sets earlier gradients aside, and adds those of the perturbed pass inside to them at the end.

        On an exception inside, weights, buffers and the earlier gradients are as before: you may skip that micro-batch.

        Raises:
            RuntimeError: no perturbed pass inside, where the step has one: the gradients would be those of the plain
            optimizer.
        """
        self._check_inactive()
        with self.transaction():
            self._begin_first_pass(GradientStash(self._all_params()))
            try:
                if not self.ascends:
                    self._await_last_pass(may_repeat=True)  # a perturbed pass may follow all the same
                yield
                if self.ascends and not self.completed:
                    raise RuntimeError("microbatch() ended without a second pass: run it in `with sam.perturbed():`")
                self._end_first_pass()
            except BaseException:  # also an interrupt on the way out
                self._end_first_pass(failed=True)
                raise
            self._earlier = EarlierGradients(self._params)

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """w -> w + e with the gradients in `p.grad`, which are then cleared; on leaving, w is what it was, bit for bit.

        A loss scale in the gradients does not matter: with GradScaler, `unscale_` only after this.

        Raises:
            RuntimeError: no parameter has a gradient, or gradients of an earlier pass are among them; another pass
                holds a parameter.
        """
        self._check_inactive()
        try:
            self.enter()
            yield
            self.exit()
        except BaseException as error:  # also an interrupt on the way in or out
            self.exit(failed=True)
            explain_used_graph(error)
            raise

    @torch._disable_dynamo  # type: ignore[untyped-decorator]
    def enter(self) -> None:
        """w -> w + e, and gradients cleared; `exit` must follow. Use `perturbed()` where a context can be used."""
        self._check_inactive()
        self.refresh()
        accumulates = self.one_pass and self.has_finished_pass()
        if self._stash is not None and self.completed and not self.one_pass:
            raise RuntimeError(
                "a second perturbed pass in one microbatch(): its gradient would replace that of the first. Open "
                "microbatch() anew for each micro-batch, inside the loop"
            )
        self._check_only_new_gradients()
        if self._surroundings is None and not self.one_pass:
            self._surroundings = Surroundings(self._params, self._guard)
            self.scaler = scaler_in_sight()
        elif self._scaler is not None and self.scaler is None:  # a loop that makes one for each step
            self.scaler = scaler_in_sight()
        self._ascend(clear=not accumulates)
        if self._surroundings is not None:
            self._surroundings.note_scale(self._params)

    @torch._disable_dynamo  # type: ignore[untyped-decorator]
    def exit(self, *, failed: bool = False) -> None:
        """w + e -> w, with buffers. `failed`: the second pass has not been finished, and its gradients are dropped."""
        if self._pass is not None:
            is_scaled = not failed and self._surroundings is not None and self._surroundings.leaves_scale()
            was_zero = self._was_written and not failed and self._had_zeros_at_w()
            self._return(failed=failed or is_scaled or was_zero)
            if failed or is_scaled or was_zero:
                for p in self._params:
                    p.grad = None
            elif self._stash is None:
                self._earlier = EarlierGradients(self._params)
                if self._draws is not None:
                    self._draws.wait()
            if is_scaled:
                raise RuntimeError(
                    "scaler.unscale_(optimizer) came before the perturbed pass, whose gradients it would leave scaled: "
                    "call it after that pass; e does not depend on the scale"
                )
            if was_zero:
                raise RuntimeError(
                    "all gradients of the first pass were zero when the second one began, and that has others at the "
                    "same weights: call zero_grad() before loss.backward(), and not between it and the perturbed pass"
                )
            self._is_new = self._is_new and (failed or not self.ascends)

    @torch._disable_dynamo  # type: ignore[untyped-decorator]
    def backward(self, closure: Closure | Sequence[Closure], *, ascent_closure: Closure | None = None) -> Any:
        """All passes of a step: leaves the gradients at w + e in `p.grad`, and returns the loss of the first pass.

        Args:
            closure: zeroes the gradients, runs forward and backward, returns the loss; it runs at w and at w + e.
                A list of closures is m-sharpness: each is perturbed by its own gradient, and the gradients at the
                perturbed points are averaged; the loss is the mean of theirs.
            ascent_closure: runs at w in place of `closure`: fewer examples, lower precision, ... Its loss is returned.

        Raises:
            RuntimeError: the closure forgot `backward()`, or left earlier gradients in place.
        """
        self._check_inactive()
        if self.one_pass and ascent_closure is not None:
            raise ValueError("ascent_closure is for the first of two passes, and this optimizer has one")
        with self.transaction():
            if callable(closure):
                loss, perturbed = self._both_passes(closure, ascent_closure)
            elif ascent_closure is None:
                loss, perturbed = self._mean_over(closure)
            else:
                raise ValueError("ascent_closure goes with one closure: in a list each closure has its own ascent")
        self._record.loss = loss.detach() if isinstance(loss, Tensor) else loss
        self._record.perturbed_loss = perturbed.detach() if isinstance(perturbed, Tensor) else perturbed
        self._record.same_loss = ascent_closure is None
        self._is_new = self._is_new and not self.ascends
        return perturbed if self.one_pass else loss

    def _all_params(self) -> list[Tensor]:
        return list(dict.fromkeys([*self._params, *self._guard.other_params]))

    def _mean_over(self, closures: Sequence[Closure]) -> tuple[Any, Any]:
        """Runs each closure with its own perturbation; averages their gradients, and their losses at w and at w + e."""
        closures = list(closures) if isinstance(closures, Iterable) and not isinstance(closures, Tensor) else [closures]
        if not closures or not all([callable(c) for c in closures]):
            raise TypeError(f"expected a closure or a list of at least one closure, got {closures!r}")
        params = self._all_params()
        had_gradients = any([p.grad is not None for p in self._params])
        for p in params:
            p.grad = None
        losses = []
        for i, closure in enumerate(closures):
            waits = self._ranks.averages_once and i < len(closures) - 1
            with self._ranks.no_sync() if waits else nullcontext():
                losses.append(self._both_passes(closure, None, GradientStash(params, in_backward=True)))
        if had_gradients and not self._ranks.may_lack_gradients and all([p.grad is None for p in self._params]):
            raise RuntimeError(
                "no closure of the list has left a gradient, but there were some before step(): run the backwards in "
                "the closures"
            )
        with torch.no_grad():
            for p in params:
                if p.grad is not None:
                    p.grad.div_(len(closures))
        return mean_loss([loss for loss, _ in losses]), mean_loss([perturbed for _, perturbed in losses])

    def _both_passes(
        self, closure: Closure, ascent_closure: Closure | None, stash: GradientStash | None = None
    ) -> tuple[Any, Any]:
        """The losses at w and at w + e."""
        grads_of_others = [(p, None if p.grad is None else p.grad.clone()) for p in self._guard.other_params]
        was_completed = self.completed and self.has_finished_pass()
        self._begin_first_pass(stash)
        failed = True
        try:
            with torch.enable_grad():
                if not self.ascends:  # the second pass would be the first one again
                    self._await_last_pass()
                    loss = perturbed = closure()
                    self._record, self.completed = Record(), True
                else:
                    is_alone = self._ranks.are_alone
                    reads = self._is_new and is_alone
                    earlier = EarlierGradients(self._params, may_be_assigned=True, reads=reads, has_ddp=not is_alone)
                    try:
                        if self.one_pass:
                            self._ascend(clear=False)
                        loss, perturbed = (ascent_closure or closure)(), None
                    finally:
                        earlier.stop()
                    if self.one_pass:
                        loss, perturbed = None, loss
                    if was_completed and earlier.are_untouched:  # a closure that does nothing, after both passes
                        self.completed = True
                    elif not self._has_ascent_gradient(
                        perturbed if self.one_pass else loss, earlier, must=ascent_closure is not None
                    ):
                        self._record, self.completed = Record(), True  # as in a step of torch.optim without gradients
                    elif not self.one_pass:
                        if self._surroundings is None:
                            self._surroundings = Surroundings(self._params, self._guard)
                        self._ascend()
                        if self._surroundings.is_watching:
                            self._surroundings.refuse_steps(self._params)
                        for p, grad in grads_of_others:  # as the first pass found them
                            p.grad = grad
                        perturbed = closure()
                    was_open = self._pass is not None and not self.one_pass
                    self._return()
                    if was_open and self.was_empty and not earlier.are_untouched:
                        raise RuntimeError(
                            "the closure left no gradient in the second pass: it runs at w and at w + e, and each time "
                            "has to zero the gradients, run forward and backward, and return the loss"
                        )
            failed = False
        finally:
            try:
                if failed:
                    self._return(failed=True)  # earlier gradients do not go to the float32 weights of a float32 pass
            finally:
                self._end_first_pass(failed=failed)
        return loss, perturbed

    def _has_ascent_gradient(self, loss: Any, earlier: EarlierGradients, *, must: bool) -> bool:
        """Or none was to be expected: a closure may skip its batch, and returns None or, after the first step, a
        constant; and one that returns a constant and clears nothing stands for none. must: all those are errors."""
        if earlier.are_mixed or earlier.are_left:
            raise RuntimeError(
                "the closure left gradients from before step(closure) in place, and the second pass would not include "
                "their data. Zero them in the closure, and call loss.backward() there; to accumulate, loop over the "
                "micro-batches inside the closure, pass step a list of closures, or use microbatch() and perturbed()"
                + advice_for_caller()
            )
        has_gradients = self._ranks.may_lack_gradients or any([p.grad is not None for p in self._params])
        if has_gradients and not earlier.new_are_cleared:
            return True
        if loss is not None:
            has_graph = isinstance(loss, Tensor) and loss.requires_grad
            was_cleared = self._is_new and (earlier.exist or self._was_cleared)
            must = must or has_graph or was_cleared or self._stash is not None
        if must or has_gradients or earlier.has_come:
            raise RuntimeError(
                "the closure left no gradient on the parameters of this optimizer: call loss.backward() in it, after "
                "zero_grad() and not before, and make the optimizer from the parameters that the model has now; a "
                "closure that skips its batch returns None"
            )
        return False

    def _had_zeros_at_w(self) -> bool:
        """Whether e is 0 and the second pass, at the same weights, has found a gradient that is not."""
        ascent = self._record.ascent
        if self.one_pass or not self._ranks.are_alone or ascent is None or not ascent.norms:
            return False
        moving = [p for g in self.param_groups if not is_zero(g["rho"]) for p in g["params"] if p.grad is not None]
        return any([has_values(p.grad) for p in moving]) and float(self._record.dual_norm) == 0  # type: ignore[arg-type]

    def _begin_first_pass(self, stash: GradientStash | None = None) -> None:
        """Until `_ascend`. With a stash, earlier gradients stay out of both passes."""
        if self._earlier is not None:
            self._earlier.stop()
        self._earlier, self._stash, self.completed, self._was_cleared = None, stash, False, False
        if self._draws is not None:
            self._draws.remember()
        self._first = None if self._ranks.are_alone else FirstPass(self._ranks)

    def _await_last_pass(self, *, may_repeat: bool = False) -> None:
        """Lets DDP average gradients again, those of earlier micro-batches with them."""
        if self._first is not None:
            self._first.end()
            if self._stash is not None and self._first.then_syncs:
                self._stash.put_under(may_repeat=may_repeat)

    def _end_first_pass(self, *, failed: bool = False) -> None:
        if self._first is not None:
            self._first.end()
        if self._stash is not None:
            self._stash.stop(failed=failed)
        if self._draws is not None:
            self._draws.wait()
        self._first = self._stash = None

    @torch.no_grad()
    def _ascend(self, *, clear: bool = True) -> None:
        """w -> w + e with the gradients in `p.grad`, which go, also those of parameters that others step; or with what
        the rule knows before the pass, and then earlier gradients may stay."""
        params, ranks = self._params, self._ranks
        second = _SecondPass(params, self._guard, self._backups, self._float32)
        second.claim()
        try:
            having = self._check_gradients()
        except BaseException:
            second.end()
            raise
        self.completed = self.was_empty = False
        used = having if ranks.needs_zeros and not self.one_pass else []
        self._pass = second
        try:  # before anything moves: a signal handler may ask for a checkpoint at any moment
            self._guard.begin_pass(params, second.clean, look=not self._in_transaction, restores=not self.one_pass)
            ascent = kernels.ascend_(self._buckets(second), self._backups, fused=self._body)
            torch.clear_autocast_cache()  # or the second forward reuses low-precision copies of w: SAM without SAM
            self._record = Record(ascent)
            if self.rule is not None:
                self.rule.has_moved(self._backups)
            if not self.one_pass:
                reads_zeros = self._is_new and self.reads_zeros
                # mypy: `having` are those with a gradient
                self._was_written = reads_zeros and all([p.grad._version for p in having])  # type: ignore[union-attr]
                self._num_writes = (having[-1], having[-1].grad._version) if having else None  # type: ignore[union-attr]
                if self._is_new and having and ranks.are_alone and self.ascends:
                    self._graphs = Graphs(having)
                if self._count is not None:
                    self._count.turn()
            if clear:
                for p in params:
                    p.grad = None
                for p in self._guard.other_params:
                    if p.requires_grad:  # else what it has is not of this loss
                        p.grad = None
            if self._first is not None:
                self._await_last_pass()
            elif not (ranks.are_alone or self.one_pass):
                ranks.compare(self._record.dual_norm)
            for p in used:
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if self._is_new and ranks.are_alone:
                self._arrivals = EarlierGradients(params, reads=True)
            if self._draws is not None:
                self._draws.replay()
            if not self._has_warned:
                self._warn_once(ascent)
            if self._surroundings is not None and self._surroundings.is_watching:
                self._surroundings.watch_scalers(having)
        except BaseException:
            self._return(failed=True)
            raise

    @torch.no_grad()
    def _return(self, *, failed: bool = False) -> None:
        """w + e -> w, and the gradients become those of the descent."""
        second = self._pass
        if second is None:
            return
        try:
            second.end()
        except BaseException:  # an interrupt on the way back: every part of it may be done again
            second.end()
            raise
        finally:
            arrivals, self._pass, self._arrivals = self._arrivals, None, None
            if arrivals is not None:
                arrivals.stop()
            if self._surroundings is not None and self._surroundings.is_watching:
                self._surroundings.end_pass(failed=failed)
        if failed:
            return
        is_local = self._float32 is None and not self._ranks.is_sharded  # FSDP1 exchanges storages all the time
        if is_local and any(map(operator.ne, second.pointers, map(Tensor.data_ptr, second.trained))):
            raise RuntimeError(
                "weights were assigned (p.data = ...) while they were perturbed; their earlier values are back: "
                "assign and load weights when the perturbed pass has ended"
            )
        p, num = self._num_writes or (None, 0)
        has_fewer = p is not None and p.grad is not None and p.grad._version < num
        if has_fewer or self._graphs is not None or self._count is not None:
            self._compare_passes(p if has_fewer else None)
        if self.keeps_ascent_gradients:
            self._replace_gradients(second)
        duals = [n.dual for n in self._record.ascent.norms] if self._record.ascent else []
        if not all([isinstance(x, Tensor) or math.isfinite(x) for x in duals]):  # a pass need not use the NaN weights
            for p in second.params:
                if p.grad is not None:
                    p.grad.mul_(math.nan)
        self.was_empty = all([p.grad is None for p in second.params]) and not self._ranks.may_lack_gradients
        self.was_empty = self.was_empty or (arrivals is not None and arrivals.new_are_cleared)
        self.completed = not self.was_empty

    def _buckets(self, second: _SecondPass) -> list[Bucket]:
        """Buckets of the weights that move: those with a gradient in groups with rho > 0, by group and kind."""
        is_sharded = self._ranks.is_sharded
        members: list[list[Tensor]] = []
        for k, group in enumerate(self.param_groups):
            rho, params = group["rho"] if self._radii is None else self._radii[k], group["params"]
            if is_zero(rho) if isinstance(rho, Tensor) else not rho:
                params = []
            if not (is_sharded or self.one_pass):  # a part of a weight needs no gradient: all ranks add up
                params = [p for p in params if p.grad is not None]
            members.append(params)
        if len(self._params) != self._num_listed:  # one listed twice moves once
            members = [list({id(p): p for p in params}.values()) for params in members]
        if self._float32 is not None and any(members):  # where nothing moves, the second pass is that of the base
            self._float32.enter([p for params in members for p in params if p.dtype in LOW_PRECISION])
        if self.one_pass:
            members, grads = self._foreknown(members)
        else:
            grads = [[dtensor.local_gradient(p) if is_sharded else p.grad for p in params] for params in members]
            if self.rule is not None:
                grads = self._ruled(second, members, grads)
        buckets: list[Bucket] = []
        for k, params in enumerate(members):
            if params:
                buckets += self._split(k, params, grads[k])
        return buckets

    def _split(self, group: int, params: list[Tensor], grads: list[Any]) -> list[Bucket]:
        """One bucket for each kind of weight and gradient; most models have one kind.

        Weights that are spread over ranks have theirs also without a gradient: all ranks add up the same.
        """
        is_sharded = self._ranks.is_sharded
        if not is_sharded and params[0].is_cpu:
            kinds = {(p.dtype, p.is_cpu) for p in params}, {(g.dtype, g.layout, g.is_cpu) for g in grads}
            if len(kinds[0]) == len(kinds[1]) == 1:
                return [self._bucket(group, params, params, grads)]
        by_kind: dict[Any, list[tuple[Tensor, Tensor, Any]]] = {}
        for p, g in zip(params, grads, strict=True):
            w, groups = (dtensor.local(p), self._ranks.groups_of(p) or ()) if is_sharded else (p, ())
            if groups or g is not None:
                same = by_kind.setdefault((w.dtype, w.device, groups, None if groups else _KIND(g)), [])
                same += [] if g is None else [(p, w, g)]
        buckets = []
        for (dtype, device, groups, _), same in by_kind.items():
            lists = map(list, zip(*same, strict=True))
            buckets.append(self._bucket(group, *lists) if same else self._empty(group, dtype, device))
            buckets[-1].groups = groups
        return buckets

    def _bucket(self, group: int, params: list[Tensor], weights: list[Tensor], grads: list[Tensor]) -> Bucket:
        w, g = weights[0], grads[0]
        bucket = self._empty(group, w.dtype, w.device, g)
        if bucket.t is not None:
            bucket.t = [_scale(p, self.param_groups[group]) for p in params]
        if w.is_complex():
            weights = [torch.view_as_real(w.detach()) for w in weights]
            grads = [torch.view_as_real(g) for g in grads]
            bucket.dtype = weights[0].dtype
        bucket.params, bucket.weights, bucket.grads = params, weights, grads
        return bucket

    def _empty(self, group: int, dtype: torch.dtype, device: torch.device, grad: Tensor | None = None) -> Bucket:
        rho, norm, adaptive, eta = self._geometry[group][-4:]
        t: list[Tensor] | None = [] if adaptive in ("filter", "layer") else None
        body = kernels.choose(grad, device, dtype, self.foreach)
        return Bucket(norm, rho, device, dtype, body, eta if adaptive == "elementwise" else None, self._noise, t=t)

    def _ruled(self, second: _SecondPass, members: list[list[Tensor]], grads: list[list[Any]]) -> list[list[Any]]:
        """The ascent gradients that the rule makes of those at w."""
        if self.keeps_ascent_gradients:
            second.grads_at_w = {p: dtensor.local_gradient(p) for p in self._params if p.grad is not None}
        pairs = [
            (p, g) for some in zip(members, grads, strict=True) for p, g in zip(*some, strict=True) if g is not None
        ]
        params, at_w = [p for p, _ in pairs], [g for _, g in pairs]
        ascent = dict(zip(params, self.rule.ascent_gradient(params, at_w) if pairs else (), strict=True))
        return [[ascent.get(p) for p in some] for some in members]

    def _foreknown(self, members: list[list[Tensor]]) -> tuple[list[list[Tensor]], list[list[Any]]]:
        """What moves, and along what, where that is known before the pass."""
        grads: list[list[Any]] = [list(self.rule.ascent_gradient(params, None)) for params in members]
        if self._ranks.is_sharded:
            return members, grads
        moving = [[p for p, g in zip(*both, strict=True) if g is not None] for both in zip(members, grads, strict=True)]
        return moving, [[g for g in some if g is not None] for some in grads]

    def _replace_gradients(self, second: _SecondPass) -> None:
        """The gradients at w + e become what the rule makes of them and of those at w."""
        params = [p for p in second.params if p.grad is not None]
        if not params:
            return
        grads: list[Any] = [dtensor.local_gradient(p) for p in params]
        at_w = [second.grads_at_w.get(p) for p in params]
        at_w = [torch.zeros_like(g) if a is None else a for a, g in zip(at_w, grads, strict=True)]
        descent = self.rule.descent_gradient(params, at_w, grads)
        for g, d in zip(grads, descent, strict=True):
            if d is not g:
                g.copy_(d)

    # guards

    def _compare_passes(self, p: Tensor | None) -> None:
        """Whether the second pass ran what the first one ran. p: a parameter that it has written to less often."""
        graphs, count, self._graphs, self._count = self._graphs, self._count, None, None
        if graphs is not None and graphs.are_old:
            raise RuntimeError(
                "the second pass has run backward through the graph of the first, and its gradient is that at w: run "
                "the model again in the perturbed pass, or in the closure"
            )
        if count is not None:
            count.compare()
        elif p is not None and not self._has_counted:
            modules = self._guard.modules or (self._surroundings.modules if self._surroundings else ())
            self._has_counted, self._count = True, PassCount(p, modules)

    def _check_inactive(self) -> None:
        if self._pass is not None:
            raise RuntimeError(
                "the weights are perturbed already: finish that pass before the next one begins, or give it up with "
                "exit(failed=True) of the perturbation"
            )

    def _check_only_new_gradients(self) -> None:
        """Raises RuntimeError if gradients of an earlier pass are among those of this first one."""
        earlier, self._earlier = self._earlier, None
        if earlier is not None and (earlier.stop().are_mixed or (earlier.are_left and not self.one_pass)):
            raise RuntimeError(
                "gradients of an earlier perturbed pass are among those of this first pass, and e would come from a "
                "mixture: call zero_grad() after each step; to accumulate, run the two passes of each micro-batch in "
                "`with sam.microbatch():`"
            )

    def _check_gradients(self) -> list[Tensor]:
        """The parameters with a gradient. Before anything moves: that there are some, and that radius, norm and T of
        every group exist."""
        ranks = self._ranks
        if ranks.fully_sharded:
            ranks.check_resharded()
        self._read_groups()
        used = [p for p in self._params if p.grad is not None]
        if used and getattr(used[-1], "grad_sample", None) is not None:
            raise RuntimeError(
                "the parameters have gradients of single examples (Opacus), which every backward adds to and counts: "
                "SAM would use every example twice, and the privacy budget would be wrong"
            )
        if used or ranks.may_lack_gradients or self.one_pass or not self.ascends:
            return used
        raise RuntimeError(
            "no parameter has a gradient: run loss.backward() before the perturbed pass"
            + (
                ", and not inside that of another optimizer, which has cleared them: use one, with a group for each"
                if transaction.is_other_moved(self._params)
                else ", and after that of an optimizer whose module= names this network, too, and which clears them"
            )
            + (", and with set_requires_gradient_sync(True): FSDP2 leaves no gradient else" * ranks.is_sharded)
        )

    def _read_groups(self) -> None:
        """The geometry of each group, checked again where a scheduler or the user has changed it."""
        geometry = self._geometry = self._geometry[: len(self.param_groups)]
        for k, group in enumerate(self.param_groups):
            rho = group["rho"] if self._radii is None else self._radii[k]
            is_negative = self.reverses or group.get("maximize", False)
            values = rho, group["adaptive"], group["eta"], group["norm"], is_negative
            if k < len(geometry) and all(map(operator.is_, values, geometry[k])):
                continue
            check_group(group)
            if isinstance(rho, Tensor):
                rho = rho.reshape(())
            norm, adaptive = canonical_norm(values[3]), canonical_adaptive(values[1])
            read = (*values, -rho if values[4] else rho, norm, adaptive, float(values[2]))
            geometry[k : k + 1] = [read]

    def _warn_once(self, ascent: kernels.Ascent) -> None:
        """Warns in the first step only: later steps must not wait for the device."""
        self._has_warned = True
        if (share := float(retained(ascent))) < 0.9:
            warnings.warn(
                f"only {share:.0%} of the perturbation survives the rounding of bf16/fp16 weights: pass "
                "rounding='float32' with module=model, keep the weights in float32 under autocast, or pass "
                "rounding='stochastic'",
                stacklevel=6,
            )

    # all or nothing

    @contextmanager
    def transaction(self) -> Iterator[None]:
        """After an exception inside, weights and buffers are as before; inside another transaction this is part of it.

        A step that does not ascend moves nothing of its own, and is as safe as one of the base. Not if an update of the
        weights has begun since `watch_update`: half of one cannot be taken back.
        """
        if self._in_transaction:
            yield
            return
        params, ascends = self.refresh(), self.ascends
        if ascends:
            self._guard.begin_step(params)
        self._versions_before_update = None
        try:
            self._in_transaction = True
            yield
        except BaseException as error:
            self.exit(failed=True)
            if ascends and not self._has_update_begun():
                self._guard.undo()
            explain_used_graph(error)
            raise
        finally:
            self._in_transaction = False

    def warn_of_scale(self) -> None:
        """Before an update: of gradients that are still scaled."""
        if self._surroundings is not None and self._surroundings.scale_calls:
            self._surroundings.warn_of_scale(self._params)

    def watch_update(self) -> None:
        """Marks the point after which a change of the weights is an update."""
        self._versions_before_update = [p._version for p in self._params]

    def _has_update_begun(self) -> bool:
        """Decided by versions; fused optimizers do not raise them, but change the bits that have just been restored."""
        params = self._params
        if self._versions_before_update is None:
            return False
        if params and params[0].is_cuda and torch.cuda.is_current_stream_capturing():
            return False  # nothing of a graph has run yet
        return self._versions_before_update != [p._version for p in params] or self._backups.differ()

    def has_finished_pass(self) -> bool:
        """Whether the gradients in `p.grad` are those of a finished second pass, and nothing has arrived since."""
        if self.completed and self._earlier is not None and self._earlier.have_company:
            self.completed = False
        return self.completed

    def forget(self) -> None:
        """The gradients have been cleared, and with them those of a perturbed pass."""
        self.completed = self.was_empty = False
        self._was_cleared = True
        if self._earlier is not None:
            self._earlier.stop()
            self._earlier = None
        if (
            self._draws is not None
            and self._pass is None
            and self._first is None
            and self._stash is None
            and not self._in_transaction
        ):
            self._draws.wait()

    @property
    def ascends(self) -> bool:
        """Whether the weights move in a step: not where every rho is 0."""
        for rho in [group["rho"] for group in self.param_groups] if self._radii is None else self._radii:
            if not is_zero(rho) if isinstance(rho, Tensor) else rho:
                return True
        return False

    @property
    def is_stepping(self) -> bool:
        """Whether it is inside `step(closure)`, `microbatch()` or a perturbed pass."""
        return self._in_transaction or self.active

    @property
    def together(self) -> Any:
        """The process groups whose ranks must all take a step, or none of them."""
        return () if self._ranks.are_alone else self._ranks.together

    @property
    def keeps_zeros(self) -> bool:
        """Whether gradients have to be zeros now where they would be None."""
        return self._pass is not None and self._ranks.needs_zeros

    def refresh(self) -> list[Tensor]:
        """Reads the parameters again: groups change, and FSDP replaces parameters and the class of the model."""
        listed = [p for g in self.param_groups for p in g["params"]]
        same = len(listed) == self._num_listed and all(map(operator.is_, listed, self._listed))
        if not same or not all([type(m) in self._ranks.types for m in self._guard.roots]):
            self._params = distinct(self.param_groups)
            self._ranks = Ranks(self._guard.look(self._params), self._params, self.sync_ascent)
            self._listed, self._num_listed = listed, len(listed)
        return self._params

    def __getstate__(self) -> dict[str, Any]:
        if self.active:
            raise RuntimeError("the weights are perturbed: copy or pickle after the perturbed pass has ended")
        lasting = ("param_groups", "sync_ascent", "foreach", "fused", "rounding", "replay_rng", "completed", "_noise")
        return {name: self.__dict__[name] for name in (*lasting, "_has_warned", "_module")}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.rule, self._record, self.was_empty, self._radii = None, Record(), False, None
        self.reads_zeros = self.one_pass = self.reverses = self.keeps_ascent_gradients = False
        self._begin_anew()
        self.module = state["_module"]


class _SecondPass:
    """What is needed between the two passes: what has moved, and how all of it comes back."""

    def __init__(self, params: list[Tensor], guard: ModelGuard, backups: Backups, float32: Float32Pass | None):
        self._is_open = False
        self._process = os.getpid()
        self._owner = object()  # not this pass, which must be freed when its optimizer is dropped
        self.params = params
        self.trained: list[Tensor] = []
        self.pointers: list[int] = []
        self.grads_at_w: dict[Tensor, Tensor | None] = {}
        self._guard, self._backups, self._float32 = guard, backups, float32

    def claim(self) -> None:
        """Before a gradient is read: torch crashes where one thread reads `p.grad` and another one clears it."""
        self._is_open = True
        if {*map(type, self.params)} <= {Tensor, nn.Parameter}:
            self.trained = list(filter(_TRAINS, self.params))
            self.pointers = list(map(Tensor.data_ptr, self.trained))
        transaction.claim(self.params, self._owner)

    def clean(self, tensor: Tensor) -> Tensor | None:
        """The clean value of a parameter or buffer of the model; None for any other tensor."""
        if self._float32 is not None and (saved := self._float32.clean(tensor)) is not None:
            return saved
        saved = self._backups.clean(tensor)
        return self._guard.clean_copy(tensor) if saved is None else dtensor.whole(saved, tensor).detach()

    def end(self) -> None:
        """Runs every cleanup step, even if one raises. May be called again after an interrupt."""
        try:
            with torch.no_grad():
                self._backups.restore_()
        finally:
            try:
                if self._float32 is not None:
                    self._float32.leave()
                torch.clear_autocast_cache()
            finally:
                try:
                    self._guard.end_pass()
                finally:
                    transaction.release(self.params, self._owner)
        self._is_open = False

    def __del__(self) -> None:
        """An optimizer that is dropped between its passes does not leave its weights at w + e; in a process that was
        forked meanwhile they are not its own."""
        if getattr(self, "_is_open", False) and self._process == os.getpid():
            self.end()


def distinct(groups: Sequence[dict[str, Any]]) -> list[Tensor]:
    """Every parameter once: torch.optim only warns of one that is listed twice."""
    return list({id(p): p for g in groups for p in g["params"]}.values())


def _scale(p: Tensor, group: dict[str, Any]) -> Tensor:
    """T of one parameter as a broadcastable tensor: of its entries on this rank."""
    t = dtensor.scale(p, str(group["adaptive"]), float(group["eta"]))
    return t.unsqueeze(-1) if p.is_complex() else t
