"""Two contexts that make the gradients in `p.grad` sharpness-aware, and leave the optimizer untouched."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from sam_optim.core import random as rng
from sam_optim.core.geometry import Ball, ProductBall
from sam_optim.core.module_state import Buffers
from sam_optim.core.results import LastStep
from sam_optim.optim import closures, kernels
from sam_optim.optim.closures import Closure
from sam_optim.optim.distributed import Ranks
from sam_optim.optim.kernels import dtensor as shards
from sam_optim.optim.kernels.plan import Plan
from sam_optim.optim.last_step import Diagnostics
from sam_optim.optim.outside import outside, prepare
from sam_optim.optim.param_groups import as_groups
from sam_optim.optim.passes import AscentPass, PerturbedPass
from sam_optim.optim.transaction import Apart, FirstForward, Rollback, Transaction, zeros_for


class Perturbation:
    """w -> w + e for the length of a second pass,  e = argmax <g, e> over ||T^-1 e||_p <= rho,  g = p.grad.

        with sam.microbatch():                     # keeps the gradients of earlier micro-batches apart
            criterion(model(x), y).backward()      # ascent gradient g, at w
            with sam.perturbed():                  # w -> w + e, gradients cleared; w comes back bit for bit
                criterion(model(x), y).backward()  # descent gradient, at w + e
        optimizer.step()                           # any optimizer, or scaler.step(optimizer)

    p = 2: e = rho T^2 g / ||T g||_2; p = inf: e = rho T sign(g). T = 1 (SAM, arXiv:2010.01412) or adaptive (ASAM,
    arXiv:2102.11600). One norm runs over all groups, and each group is moved by its own rho; groups with rho = 0 stay
    where they are, and out of the norm.
    If g is 0 or not finite, e = 0 for that step, and `num_unperturbed` counts it. A loss scale in g does not matter.

    Args:
        model_or_params: a model (then also `module`), parameters, (name, parameter) pairs, or groups: dicts with
            "params" and, where they differ from the arguments below, "rho", "adaptive", "eta", "norm", "maximize".
        rho: the radius, in units of T w (of w where T = 1), not relative to ||w||.
        adaptive: T; False: 1; True or "elementwise": |w| + eta; "filter", "layer": their norm + eta.
        norm: p, 2 or inf.
        module: the model, in its DDP or FSDP wrapper if it has one. With it, its buffers (BatchNorm statistics, ...)
            after the second pass are those of the first, and its `state_dict()` holds the clean weights also while they
            are perturbed; DDP synchronises only the second gradient, so that each rank has its own perturbation.
        sync_ascent: with DDP, True for one perturbation by the gradient of all ranks. FSDP and tensor parallel have
            no other.
        foreach: as in torch.optim. None chooses.
        fused: True for Triton's kernels, which are for CUDA; what they do not know moves as with None.
        rounding: of bf16 and fp16 weights. "nearest" loses much of a small e (see `last_step.realized`), "stochastic"
            keeps it on average, "float32" keeps it: `module` is and computes in float32 in the second pass, for the
            memory of a float32 copy of it and the time, activations and gradients of float32 (see `Float32Pass`).
        replay_rng: the second pass draws the same random numbers (dropout masks) as the first.
        seed: of the draws for stochastic rounding, which begin anew when training is resumed.

    Raises:
        ValueError: a radius, norm or T that does not exist; rounding="float32" without a module that it can do it for.
    """

    def __init__(
        self,
        model_or_params: nn.Module | Iterable[Any],
        *,
        rho: float | Tensor = 0.05,
        adaptive: bool | str = False,
        eta: float = 0.01,
        norm: float = 2,
        module: nn.Module | None = None,
        sync_ascent: bool | None = None,
        foreach: bool | None = None,
        fused: bool | None = None,
        rounding: str = "nearest",
        replay_rng: bool = False,
        maximize: bool = False,
        seed: int = 0,
    ):
        if module is not None and not isinstance(module, nn.Module):
            raise TypeError(f"module must be the model, a torch.nn.Module, got {type(module).__name__}")
        if isinstance(model_or_params, nn.Module):
            module = model_or_params if module is None else module
            model_or_params = list(model_or_params.parameters())
        prepare()
        defaults = {"rho": rho, "adaptive": adaptive, "eta": eta, "norm": norm, "maximize": maximize}
        self.param_groups = as_groups(model_or_params, defaults)
        self.module = module
        self.sync_ascent = sync_ascent
        self.foreach, self.fused = foreach, fused
        self.rounding = rounding
        self.replay_rng = replay_rng
        self.completed = False  # a perturbed pass has ended and no optimizer has used its gradients yet
        self._num_cleared = 0
        self._computes_all = False  # gradients that the ascent does not need, too: without them it has lost others
        self._noise = rng.Stream(seed) if rounding == "stochastic" else None
        kernels.fused.check_fused(self._params(), fused, foreach)
        self._plan = Plan(module, sync_ascent, foreach, rounding, self._noise, fused)
        self._pass: PerturbedPass | None = None
        self.stays_open = False  # the update will bring back the clean weights, and `exit` follows it
        self._first: AscentPass | None = None
        self._put_under: Callable[[], None] | None = None
        self._clean_buffers = Buffers()
        self._transaction = Transaction()
        self._rollback: Rollback | None = None
        self._first_forward = FirstForward(self.module) if replay_rng else None
        self._seen = Diagnostics()
        self._ranks()  # says at once what cannot be

    @property
    def balls(self) -> list[Ball]:
        """The ball of each group, as it is now."""
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
    def moved(self) -> list[kernels.Bucket]:
        return [] if self._pass is None else self._pass.moved

    @property
    def last_step(self) -> LastStep:
        """Diagnostics of the last perturbed pass."""
        return self._seen.last_step(self._params())

    @property
    def num_unperturbed(self) -> int | Tensor:
        """How many ascent gradients were 0 or not finite, so that e = 0."""
        return self._seen.num_unperturbed

    @contextmanager
    def microbatch(self) -> Iterator[None]:
        """Sets earlier gradients aside, and adds those of the perturbed pass inside to them at the end.

        On an exception inside, gradients, buffers and generators are as before.

        Raises:
            RuntimeError: no perturbed pass inside: the gradients would be those of the plain optimizer.
        """
        params = self._params()
        with self.all_or_nothing(keep_gradients=True):
            self.completed = False
            if self._first_forward is not None:
                self._first_forward.state = self._rng_state()
            apart = Apart(params)
            with self._first_pass(apart, apart.put_under):
                yield
                if not self.completed:
                    raise RuntimeError("microbatch() ended without a second pass: run it in `with sam.perturbed():`")

    @contextmanager
    def _first_pass(
        self, apart: Apart | None = None, put_under: Callable[[], None] | None = None
    ) -> Iterator[AscentPass]:
        """Around both passes: until `enter` they are the first one. Adds the gradients set aside at the end, or, where
        DDP is to average them, puts them under those of the second pass."""
        self._put_under = put_under
        self._first = AscentPass(self.param_groups, self._ranks(), computes_all=self._computes_all)
        try:
            self._first.begin()
            yield self._first
            self._computes_all = self._computes_all or self._first.lost()
        finally:
            self._first.end()
            if apart is not None:
                apart.end()
            self._first = self._put_under = None
        if apart is not None:
            apart.add()

    @contextmanager
    def perturbed(self) -> Iterator[None]:
        """w -> w + e with the gradients in `p.grad`, which are then cleared; on leaving, w is what it was, bit for bit.

        On an exception inside, the gradients of the first pass, the buffers and the generators come back, too. A loss
        scale in the gradients does not matter: with GradScaler, `unscale_` only after this.

        Raises:
            RuntimeError: no parameter has a gradient, or one is perturbed already.
        """
        # brought back by a copy, and not by the update: what runs between may look at the weights, or move them
        with self._stay(keep_gradients=True):
            yield

    @outside
    def backward(self, closure: Closure | Sequence[Closure], *, ascent_closure: Closure | None = None) -> Any:
        """Both passes: leaves the gradients at w + e in `p.grad`, and returns the loss at w.

        Args:
            closure: zeroes the gradients, runs forward and backward, returns the loss; it runs at w and at w + e.
                A list of closures is m-sharpness: each is perturbed by its own gradient, and the gradients at the
                perturbed points are averaged; the loss is the mean of theirs.
            ascent_closure: runs at w in place of `closure`: fewer examples, lower precision, ... Its loss is returned.

        Raises:
            RuntimeError: the closure forgot `backward()`, or left earlier gradients in place.
        """
        with self.all_or_nothing():
            if callable(closure):
                return closures.backward_of(self, closure, ascent_closure)
            if ascent_closure is not None:
                raise ValueError("ascent_closure goes with one closure: in m-sharpness each closure has its own ascent")
            return closures.backward_of_all(self, closure)

    @outside
    @torch.no_grad()
    def enter(self, *, zero_grad: bool = True, keep_gradients: bool = True) -> None:
        """w -> w + e; `exit` must follow. Use `perturbed()` where a context can be used."""
        self._check_inactive()
        params = self._params()
        ranks = self._ranks()
        ranks.check_resharded()
        looked_after = (self.module, self._clean_buffers, self._first_forward, self._plan.float32)
        stay = PerturbedPass(params, self._plan.buckets(self.param_groups), *looked_after, ranks.agreeing)
        if keep_gradients:
            self._rollback = Rollback(params, self._rng_state(), None, None, keep=True)
        self.completed = False
        try:
            self._pass = stay
            used = [p for p in params if ranks.needs_zeros and p.grad is not None]
            if self._first is not None:
                self._first.note()
            self._seen.moved(*stay.begin(self._rng_state, zero_grad=zero_grad))
            if self._first is None:
                ranks.compare(self._seen.norm)
            else:
                self._first.end()
                if self._put_under is not None and self._first.then_syncs:
                    self._put_under()
            zeros_for(used)
            self._seen.warn_once(stacklevel=6)
        except BaseException:
            self.exit(failed=True)
            raise

    @outside
    @torch.no_grad()
    def exit(self, *, failed: bool = False, is_updated: bool = False) -> None:
        """w + e -> w, with buffers. `failed`: also gradients and generators as `enter` found them. `is_updated`: the
        weights have had their update, from where they were saved, and it stays."""
        if self._pass is None:
            return
        try:
            try:
                self._pass.end(is_updated=is_updated)
            except BaseException:  # Ctrl-C in the middle: every part of it may be done again
                self._pass.end(is_updated=is_updated)
                raise
        finally:
            if failed and self._rollback is not None:
                self._rollback.undo()
            self._pass, self._rollback = None, None
        self.completed = not failed

    @contextmanager
    def _stay(self, *, keep_gradients: bool, stays_open: bool = False) -> Iterator[None]:
        self._check_inactive()
        failed = True
        try:
            try:
                self.enter(keep_gradients=keep_gradients)
                yield
                failed = False
            finally:
                if failed or not stays_open:
                    self.exit(failed=failed)
        except BaseException:  # also an interrupt on the way there
            self.exit(failed=True)
            raise

    def _check_inactive(self) -> None:
        if self.active:
            raise RuntimeError(
                "the weights are perturbed already: finish that pass before the next one begins, or give it up with "
                "exit(failed=True) of the perturbation"
            )

    def all_or_nothing(self, *, keep_gradients: bool = False) -> AbstractContextManager[None]:
        """After an exception inside: weights, gradients, buffers and generators as before.

        Not if the weights have changed since `watch`: half an update of an optimizer cannot be taken back.
        """
        give_up = functools.partial(self.exit, failed=True)  # an interrupt may come before a context of its own could
        return self._transaction.around(self._params(), self._rng_state, self.module, give_up, keep=keep_gradients)

    def watch(self) -> None:
        """From here on a change of the weights is an update."""
        weights = [shards.local(p) for p in self._params() if p.grad is not None]
        self._transaction.watch(weights, is_fused=any(g.get("fused") for g in self.param_groups))

    def forget(self) -> None:
        """What was learnt from gradients that have been cleared: that they are of a perturbed pass, and its draws."""
        self.completed = False
        self._num_cleared += 1
        if self._first_forward is not None and not self.active and self._first is None:
            self._first_forward.forget()

    @property
    def keeps_zeros(self) -> bool:
        """Whether gradients have to be zeros now where they would be None."""
        return self.active and self._ranks().needs_zeros

    @property
    def together(self) -> shards.Groups:
        """The process groups whose ranks must all take a step, or none of them."""
        return self._ranks().together

    def _ranks(self) -> Ranks:
        return self._plan.ranks(self._params())

    def _params(self) -> list[Tensor]:
        return [p for g in self.param_groups for p in g["params"]]

    def _rng_state(self) -> rng.GlobalState:
        return rng.state_for(self._params())

    def __getstate__(self) -> dict[str, Any]:
        if self.active:
            raise RuntimeError("the weights are perturbed: copy or pickle after the perturbed pass has ended")
        transient: dict[str, Any] = {"_plan": None, "_clean_buffers": Buffers(), "_first_forward": None}
        transient |= {"_transaction": Transaction()}
        return self.__dict__ | transient

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._plan = Plan(self.module, self.sync_ascent, self.foreach, self.rounding, self._noise, self.fused)
        if self.replay_rng:
            self._first_forward = FirstForward(self.module)
