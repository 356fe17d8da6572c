"""SAM for Lightning's automatic optimization, around the optimizer that the module returns, and a monitor."""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from sam_optim.core import random as rng
from sam_optim.integrations.around import (
    ParamGroups,
    check_schedule,
    follow_schedule,
    missing,
    parameters_of,
    perturbation_around,
)
from sam_optim.monitor import SharpnessMonitor
from sam_optim.monitor.writers import numbers
from sam_optim.optim.perturbation import Perturbation

try:
    if "pytorch_lightning" in sys.modules and "lightning.pytorch" not in sys.modules:
        from pytorch_lightning import Callback  # the same code under its older name
    else:
        from lightning.pytorch import Callback
    from torchmetrics import Metric, MetricCollection
except ImportError as error:
    raise missing("lightning", error) from error


class SAMCallback(Callback):
    """After each backward: w -> w + e, `training_step` and backward once more, and w comes back bit for bit.

    e = argmax <g, e> over ||T^-1 e||_p <= rho, g the gradient of the batch, as `Perturbation` says. What reaches the
    optimizer, `gradient_clip_val` and the loss scaler is the gradient at w + e. In the second pass `self.log` does
    nothing, and buffers (BatchNorm statistics) and torchmetrics stay those of the first.

        trainer = Trainer(callbacks=[SAMCallback(rho=0.05)], precision="16-mixed", accumulate_grad_batches=2)

    With `accumulate_grad_batches` each batch has its own perturbation: m-sharpness, m its size. With DDP so has each
    rank, unless sync_ascent=True; a model that is sharded over ranks has one global perturbation.

    Put it first: callbacks before it see the first pass's gradients in `on_after_backward`. Side effects of
    `training_step` (counters, random draws, `self.logger.experiment`) happen twice.

    Args:
        rho, adaptive, eta, norm, sync_ascent, rounding, replay_rng: as of `Perturbation`.
        schedule: from `trainer.global_step` to a factor of rho, such as `late_phase(start)`; 0: one pass.
        param_groups: from the module to groups with their own "adaptive", "rho", "eta" or "norm", such as
            `asam_param_groups`. Parameters that the optimizer does not train are left out.

    Raises:
        RuntimeError: when training starts, for a module that steps its optimizers itself or whose `training_step`
            takes an iterator, and for a strategy with a backward of its own (DeepSpeed).
        ValueError: a radius, norm or T that does not exist; rounding="float32". When training starts, for a `SAM` from
            `configure_optimizers`.

    Source: Foret et al. (2020), arXiv:2010.01412.
    """

    def __init__(
        self,
        *,
        rho: float | Tensor = 0.05,
        adaptive: bool | str = False,
        eta: float = 0.01,
        norm: float = 2,
        param_groups: ParamGroups | None = None,
        sync_ascent: bool | None = None,
        rounding: str = "nearest",
        replay_rng: bool = False,
        schedule: Callable[[int], float] | None = None,
    ):
        check_schedule(schedule)
        self._schedule, self._ascends = schedule, True
        self._settings: dict[str, Any] = {"rho": rho, "adaptive": adaptive, "eta": eta, "norm": norm}
        self._settings |= {"sync_ascent": sync_ascent, "rounding": rounding}
        Perturbation(nn.LayerNorm(1), **self._settings)  # raises for wrong settings; draws no random numbers
        if rounding == "float32":
            raise ValueError(
                "rounding='float32' acts on calls of the module, and Lightning calls training_step: use "
                "rounding='stochastic', or float32 weights with precision='bf16-mixed'"
            )
        self._param_groups = param_groups
        self._replay_rng = replay_rng
        self.perturbation: Perturbation | None = None
        self._num_trained = 0
        self._devices: set[torch.device] = set()
        self._arguments: tuple[Any, ...] = ()
        self._before: rng.GlobalState | None = None
        self._micro_batch: ExitStack | None = None

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        _check(trainer, pl_module)
        self.perturbation = None

    def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
        trained = parameters_of(trainer.optimizers[0])
        if self.perturbation is None or len(trained) != self._num_trained:  # a callback has unfrozen some
            self.perturbation = perturbation_around(
                trainer.strategy.model, trainer.optimizers[0], param_groups=self._param_groups, **self._settings
            )
            self._num_trained = len(trained)
            self._devices = {p.device for p in trained if p.is_cuda}
        self._ascends = follow_schedule(self.perturbation, self._schedule, trainer.global_step)
        if self._ascends:
            trainer.strategy.training_step = functools.partial(self._first_pass, trainer.strategy)

    def _first_pass(self, strategy: Any, *args: Any) -> Any:
        """Replaces the strategy's method for one call: the last moment before the forward pass, in which the model may
        draw and DDP decides whether to average."""
        del strategy.training_step
        self._arguments = args
        self._before = rng.GlobalState(self._devices) if self._replay_rng else None
        with _averaging(strategy.model, bool(self._settings["sync_ascent"])):
            return strategy.training_step(*args)

    def on_before_backward(self, trainer: Any, pl_module: Any, loss: Tensor) -> None:
        assert self.perturbation is not None
        if not self._ascends:
            return
        with ExitStack() as entered:
            entered.enter_context(self.perturbation.microbatch())
            self._micro_batch = entered.pop_all()

    def on_after_backward(self, trainer: Any, pl_module: Any) -> None:
        assert self.perturbation is not None
        if not self._ascends:
            return
        assert self._micro_batch is not None
        micro_batch, self._micro_batch = self._micro_batch, None
        with micro_batch, self.perturbation.perturbed(), _unseen(pl_module), self._draws():
            output = trainer.strategy.training_step(*self._arguments)
            loss = output["loss"] if isinstance(output, Mapping) else output
            if loss is None:
                raise RuntimeError(
                    "training_step returned a loss at w and None at w + e: return a loss, or None, in both"
                )
            loss = loss / trainer.accumulate_grad_batches
            scaler = getattr(trainer.precision_plugin, "scaler", None)
            loss = loss if scaler is None else scaler.scale(loss)
            trainer.precision_plugin.backward(loss, pl_module, trainer.optimizers[0])

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        trainer.strategy.__dict__.pop("training_step", None)
        self._arguments, self._before = (), None  # frees their memory

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        """After a fault in the first backward, weights and buffers are as before the micro-batch."""
        trainer.strategy.__dict__.pop("training_step", None)
        micro_batch, self._micro_batch = self._micro_batch, None
        if micro_batch is not None:
            micro_batch.__exit__(type(exception), exception, exception.__traceback__)

    @contextmanager
    def _draws(self) -> Iterator[None]:
        """With replay_rng the second pass draws what the first drew, and the generators advance once."""
        if self._before is None:
            yield
            return
        with rng.preserved(self._devices):
            self._before.restore()
            yield


class MonitorCallback(Callback):
    """A `SharpnessMonitor` that is called after every step of the first optimizer; its numbers also go to the trainer's
    loggers, its state to the checkpoints.

        trainer = Trainer(callbacks=[SAMCallback(rho=0.05), MonitorCallback(SharpnessMonitor(loss))])
    """

    def __init__(self, monitor: SharpnessMonitor):
        self.monitor = monitor
        self._handle: Any = None
        self._num_logged = 0

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        sam = next((c for c in trainer.callbacks if isinstance(c, SAMCallback)), None)
        arguments = {} if sam is None else {"perturbation": lambda: sam.perturbation}
        scaler = getattr(trainer.precision_plugin, "scaler", None)
        self._handle = self.monitor.attach(trainer.optimizers[0], scaler=scaler, **arguments)
        self._num_logged = len(self.monitor.history)

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        for row in self.monitor.history[self._num_logged :]:
            for logger in trainer.loggers:
                logger.log_metrics(numbers(row), step=trainer.global_step)
        self._num_logged = len(self.monitor.history)

    def teardown(self, trainer: Any, pl_module: Any, stage: str) -> None:
        if self._handle is not None:
            self._handle.remove()

    def state_dict(self) -> dict[str, Any]:
        return self.monitor.state_dict()

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.monitor.load_state_dict(state_dict)


def _check(trainer: Any, pl_module: Any) -> None:
    if not pl_module.automatic_optimization:
        raise RuntimeError(
            f"SAMCallback needs automatic optimization, and {type(pl_module).__name__} steps its optimizers itself: in "
            "its training_step use the contexts of sam_optim.Perturbation around self.manual_backward"
        )
    if trainer.strategy.handles_gradient_accumulation:
        raise RuntimeError(
            f"{type(trainer.strategy).__name__} runs a backward of its own, and SAM cannot run its second pass"
        )
    if "dataloader_iter" in inspect.signature(pl_module.training_step).parameters:
        raise RuntimeError("training_step(dataloader_iter) would see another batch in the second pass: take `batch`")
    perturbation_around(pl_module, trainer.optimizers[0], param_groups=None)  # refuses a SAM


@contextmanager
def _averaging(model: Any, over_ranks: bool) -> Iterator[None]:
    """Sets whether the backward of a forward pass inside averages gradients over the ranks of DDP."""
    if not isinstance(model, DistributedDataParallel):
        yield
        return
    before, model.require_backward_grad_sync = model.require_backward_grad_sync, over_ranks
    try:
        yield
    finally:
        model.require_backward_grad_sync = before


@contextmanager
def _unseen(pl_module: nn.Module) -> Iterator[None]:
    """Suppresses the side effects of training_step: `log`, and updates of torchmetrics."""
    with ExitStack() as restored:
        for module in pl_module.modules():
            if isinstance(module, (Metric, MetricCollection)):
                restored.callback(_bring_back, module, dict(module.__dict__))
                for name in getattr(module, "_defaults", ()):
                    state = module.__dict__[name]
                    module.__dict__[name] = state.clone() if isinstance(state, Tensor) else list(state)
            elif hasattr(type(module), "log_dict"):  # pl_module, and modules of its kind inside it
                for name in ("log", "log_dict"):
                    restored.callback(module.__dict__.pop, name)
                    module.__dict__[name] = _log_nothing
        yield


def _bring_back(module: nn.Module, attributes: dict[str, Any]) -> None:
    module.__dict__.update(attributes)
    for name in module.__dict__.keys() - attributes.keys():
        del module.__dict__[name]


def _log_nothing(*_: Any, **__: Any) -> None:
    """Replaces `log` and `log_dict`."""
