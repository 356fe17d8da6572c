"""Sharpness at fixed probe batches while a model trains, within a budget of time."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sam_optim.core import module_state
from sam_optim.core import random as rng
from sam_optim.core.errors import one_line, unknown
from sam_optim.core.results import Estimate, Spectrum
from sam_optim.loss import Loss
from sam_optim.measures import critical_sharpness, hessian_eigenvalues, worst_case_sharpness
from sam_optim.monitor.edges import learning_rate, stability_edges
from sam_optim.monitor.writers import writer
from sam_optim.optim.last_step import LastStep
from sam_optim.optim.perturbation import Perturbation
from sam_optim.optim.transaction import is_moved

NAMES = ("lambda_max", "critical_sharpness", "worst_case")
STATE = ("num_steps", "spent", "trained", "history", "_next", "_before", "_vector")  # what a checkpoint has
TOL, STEP_TOL = 0.005, 0.02  # of lambda_max: a bound of its error; of the critical step
MOST_PRODUCTS, MOST_EVALUATIONS, NUM_STEPS = 40, 7, 2

Measure = str | Callable[[Loss], Any]


class SharpnessMonitor:
    """Sharpness during training, beside the edges of stability, within a budget of time; training is not changed.

        monitor = SharpnessMonitor(Loss(model, criterion, probes), every=50, budget=0.05, log="sharpness.csv")
        for x, y in loader:
            optimizer.step(closure)
            monitor.step(optimizer)

    A row of `history` has, by name:

        lambda_max             largest eigenvalue of the Hessian, mostly to 1 %: Lanczos from the last eigenvector
        critical_sharpness     2 / lr_c, lr_c the smallest learning rate at which the last update would have raised the
                               loss of the probes: at most 8 forward passes, also for weights spread over ranks
        worst_case             rise of the loss in the optimizer's ball, after two steps of ascent (with a SAM)
        edge, sgd_edge, sam_edge   the edges of stability, see `stability_edges`
        last_loss, last_sharpness, last_grad_norm, ...   `optimizer.last_step`, which costs nothing
        step, lr               calls so far, and the largest learning rate
        num_products           Hessian-vector products of lambda_max
        seconds, share         time of this row; share of the training's time that all rows have taken
        reason                 why a measure has no number

    Weights, buffers, gradients, modes and global generators stay as they are, bit for bit. A measure that fails is a
    warning, and a reason in the row.

    Args:
        loss: L on a few fixed batches, of the model that is trained, in eval mode; under torch.distributed each rank
            has its share, and all call `step`.
        every: steps between two rows, at least.
        measures: names of the above, or functions of a Loss, such as `hessian_trace` or a `functools.partial`.
        budget: largest share of the training's time; rows are spaced to keep it. None: a row every `every` steps.
        log: a path ending in .csv or .jsonl, which one process at a time can write, a TensorBoard SummaryWriter, a
            wandb run, any log(name, value, step), or a list of these; on the first rank alone.

    Attributes:
        history: a dict for each row. share: seconds spent here / seconds of training so far.

    Raises:
        ValueError: every < 1, a budget that is not in (0, 1], an unknown name. InputError: a log that cannot be
            written, or that another process writes.

    Source: critical sharpness, arXiv:2601.16979; SAM's edge, arXiv:2309.12488.
    """

    def __init__(
        self,
        loss: Loss,
        *,
        every: int = 100,
        measures: Sequence[Measure] = NAMES,
        budget: float | None = 0.05,
        log: Any = (),
    ):
        if every < 1:
            raise ValueError(f"every counts steps and must be >= 1, got {every}")
        if budget is not None and not 0 < budget <= 1:
            raise ValueError(f"budget is a share of the training's time, in (0, 1], or None; got {budget}")
        self.loss, self.every, self.budget = loss, every, budget
        self.history: list[dict[str, Any]] = []
        self.num_steps, self.spent, self.trained = 0, 0.0, 0.0
        self._next = every
        self._measures = dict(map(self._named, measures))
        is_many = isinstance(log, Iterable) and not isinstance(log, str)
        self._writers = [writer(x) for x in (log if is_many else [log])] if loss.rank == 0 else []
        self._clock: float | None = None  # when the last call ended
        self._before: list[Tensor] | None = None  # the weights before the update that the next call is about
        self._vector: list[Tensor] | None = None
        self._warned: set[str] = set()

    @property
    def share(self) -> float:
        return self.spent / self.trained if self.trained else 0.0

    def __str__(self) -> str:
        budget = "" if self.budget is None else f" (budget {self.budget:.1%})"
        return (
            f"{len(self.history)} rows in {self.num_steps} steps took {self.spent:.1f} s, {self.share:.1%} of "
            f"{self.trained:.1f} s of training{budget}"
        )

    def attach(self, optimizer: Optimizer, **arguments: Any) -> Any:
        """Calls `step` after every step of the optimizer, for loops of others (Accelerate, timm).

        Args:
            arguments: of `step`; a function is called each time, for what is made later.

        Returns:
            A handle, whose `remove()` ends it.
        """
        optimizer = getattr(optimizer, "optimizer", optimizer)  # inside Accelerate's

        def hook(*_: Any) -> None:
            self.step(optimizer, **{name: x() if callable(x) else x for name, x in arguments.items()})

        return optimizer.register_step_post_hook(hook)

    def step(
        self,
        optimizer: Optimizer,
        *,
        perturbation: Perturbation | None = None,
        scaler: torch.amp.GradScaler | None = None,
    ) -> dict[str, Any] | None:
        """Call it after each `optimizer.step()`, before a scheduler's. Returns the new row, if there is one.

        Args:
            perturbation: what perturbs the weights, where the optimizer is not a `SAM`.
            scaler: of the gradients, so that norms are in units of L.

        Raises:
            RuntimeError: the weights are perturbed now.
        """
        params = self.loss.params
        is_cuda = params[0].is_cuda
        if is_cuda and torch.cuda.is_current_stream_capturing():
            return None
        if is_moved(params):
            raise RuntimeError("the weights are at w + e: call monitor.step(optimizer) after optimizer.step()")
        is_due = self.num_steps + 1 >= self._next
        if is_due and is_cuda:
            torch.cuda.synchronize(params[0].device)
        now = time.perf_counter()
        if self._clock is not None:
            self.trained += now - self._clock
        self.num_steps += 1
        row = None
        if is_due:
            wait = self._wait()
            if wait == 0:
                row = self._row(optimizer, perturbation or getattr(optimizer, "perturbation", None), scaler)
            self._before = None
            self._next = self.num_steps + (wait or self.every)
        if self.num_steps + 1 == self._next and "critical_sharpness" in self._measures:
            self._before = [w.detach().clone() for w in params]
        self._clock = time.perf_counter()
        if row is not None or self._before is not None:
            self.spent += self._clock - now
        return row

    def _row(
        self, optimizer: Optimizer, perturbation: Perturbation | None, scaler: torch.amp.GradScaler | None
    ) -> dict[str, Any]:
        start = time.perf_counter()
        row: dict[str, Any] = {"step": self.num_steps, "lr": learning_rate(optimizer)}
        row |= self._last_step(perturbation, 1.0 if scaler is None else scaler.get_scale())
        if perturbation is not None and _is_plain(perturbation):
            row |= stability_edges(optimizer, row["last_radius"], row["last_grad_norm"])
        else:
            row |= stability_edges(optimizer)
        reasons, cuda = {}, [self.loss.device] if self.loss.device.type == "cuda" else []
        for name, measure in self._measures.items():
            row[name] = None
            try:
                with rng.preserved(cuda), module_state.measured(self.loss.model):
                    values = measure(optimizer=optimizer, perturbation=perturbation)
                reason = values.pop("reason", None)
                row |= values
            except Exception as error:
                reason = f"{type(error).__name__}: {one_line(error)}"
                if name not in self._warned:
                    warnings.warn(f"SharpnessMonitor has no {name} at step {self.num_steps}: {reason}", stacklevel=3)
                self._warned.add(name)
            if reason:
                reasons[name] = reason
        row["seconds"] = max(self.loss.over_ranks(time.perf_counter() - start))
        row["share"] = (self.spent + row["seconds"]) / self.trained if self.trained else None
        row["reason"] = "; ".join(f"{name}: {reason}" for name, reason in reasons.items()) or None
        self.history.append(row)
        for write in self._writers:
            write(self.history)
        return row

    def _wait(self) -> int:
        """How many steps more until the budget has room for another row: looked at when it is due, because the first
        steps of a training may take long (compilation), and so may the first row."""
        if self.budget is None or not self.history:
            return 0
        expected = self.history[-1]["seconds"] / (2 if len(self.history) == 1 else 1)  # the first starts cold
        missing = (self.spent + expected) / self.budget - self.trained
        wait = max(1, math.ceil(missing / self.trained * self.num_steps)) if missing > 0 and self.trained else 0
        return max(self.loss.over_ranks(wait))

    def _last_step(self, perturbation: Perturbation | None, scale: float) -> dict[str, float]:
        if perturbation is None:
            return {}
        last = perturbation.last_step
        values = {f.name: getattr(last, f.name) for f in fields(LastStep)}
        scaled = ("grad_norm", "dual_norm")
        return {f"last_{k}": float(x) / (scale if k in scaled else 1) for k, x in values.items() if x is not None}

    # measures: entries of the row, and the reason why there is no number, or a doubtful one

    def _named(self, measure: Measure) -> tuple[str, Callable[..., dict[str, Any]]]:
        if isinstance(measure, str):
            if measure not in NAMES:
                raise ValueError(str(unknown("measure", measure, NAMES)))
            return measure, getattr(self, f"_{measure}")
        function: Any = measure.func if isinstance(measure, partial) else measure
        name = function.__name__
        return name, lambda **_: _entry(name, measure(self.loss))

    def _lambda_max(self, **_: Any) -> dict[str, Any]:
        spectrum = hessian_eigenvalues(
            self.loss, tol=TOL, stop="value", max_products=MOST_PRODUCTS, start=self._vector, seed=self.num_steps
        )
        entry = _entry("lambda_max", spectrum)
        if spectrum.eigenvectors is not None and entry["lambda_max"] is not None:
            self._vector = spectrum.eigenvectors[0]
        return entry | {"num_products": spectrum.num_products}

    def _critical_sharpness(self, optimizer: Optimizer, **_: Any) -> dict[str, Any]:
        if self._before is None:
            return {"reason": "no update has been seen yet"}
        update = [b - w.detach() for b, w in zip(self._before, self.loss.params, strict=True)]
        with self.loss.displaced(update):  # where the update began
            result = critical_sharpness(
                self.loss, update, tol=STEP_TOL, first_step=1.0, max_evaluations=MOST_EVALUATIONS
            )
        return _entry("critical_sharpness", result, unit=learning_rate(optimizer), may_be_zero=False)

    def _worst_case(self, perturbation: Perturbation | None, **_: Any) -> dict[str, Any]:
        if perturbation is None or not perturbation.ascends:
            return {}
        ball = perturbation.neighborhood
        entry = _entry("worst_case", worst_case_sharpness(self.loss, ball, num_steps=NUM_STEPS, num_restarts=1))
        return entry if entry["worst_case"] is None else entry | {"reason": None}  # a single search is what it is

    # checkpoints

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors, for `torch.load(..., weights_only=True)`: a run that goes on has the rows of one
        that was not stopped."""
        return {name.removeprefix("_"): getattr(self, name) for name in STATE} | {"history": [*self.history]}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Raises ValueError, and changes nothing, if `state` is not what `state_dict` gives."""
        names = [name.removeprefix("_") for name in STATE]
        if missing := [name for name in names if not isinstance(state, Mapping) or name not in state]:
            raise ValueError(
                f"the state has no {', '.join(missing)}: give what state_dict() of a SharpnessMonitor returned"
            )
        for attribute, name in zip(STATE, names, strict=True):
            setattr(self, attribute, state[name])
        self.history, self._clock = [*self.history], None


def _is_plain(perturbation: Perturbation) -> bool:
    """Whether the last step moved the weights along g, by one radius: SAM itself, with T = 1."""
    balls = perturbation.balls
    is_sam = perturbation.rule is None and all(b == balls[0] and b.norm == 2 and not b.adaptive for b in balls)
    return is_sam and None not in (perturbation.last_step.radius, perturbation.last_step.grad_norm)


def _entry(name: str, result: Any, *, unit: float = 1.0, may_be_zero: bool = True) -> dict[str, Any]:
    value = float(result.eigenvalues[0]) if isinstance(result, Spectrum) else float(result)
    reason = result.reason if isinstance(result, Spectrum | Estimate) and not result.converged else None
    if not math.isfinite(value) or (value == 0 and not may_be_zero):
        return {name: None, "reason": reason or f"it is {value}"}
    return {name: value / unit, "reason": reason}
