"""SAM for the Trainer of Hugging Face transformers, around the optimizer that its arguments name."""

from __future__ import annotations

import copy
import dis
import inspect
import io
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from sam_optim.core.files import write_atomic
from sam_optim.integrations.around import (
    ParamGroups,
    check_schedule,
    follow_schedule,
    missing,
    perturbation_around,
)
from sam_optim.monitor import SharpnessMonitor
from sam_optim.monitor.writers import numbers
from sam_optim.optim.perturbation import Perturbation
from sam_optim.optim.sam import SAM
from sam_optim.vision.tensor_files import read_file

try:
    from transformers import Trainer, TrainerCallback
except ImportError as error:
    raise missing("transformers", error) from error


class SAMTrainer(Trainer):
    """A Trainer in which each training step runs twice, at w and at w + e; then w comes back bit for bit.

    e = argmax <g, e> over ||T^-1 e||_p <= rho, g the gradient at w, as `Perturbation` says. What reaches
    `max_grad_norm` and the optimizer, which stays the one of the arguments, is the gradient at w + e; the loss that is
    logged is the one at w. With `gradient_accumulation_steps` each micro-batch has its own perturbation.

        trainer = SAMTrainer(model, arguments, train_dataset=dataset, rho=0.05)

    A `SAM` or a variant of it may be the optimizer, too: optimizers=(MSAM(...), None). It has its own settings then,
    and none of these may be given.

    A trainer that is a subclass already can copy the seven lines of `training_step`.

    Args:
        rho, adaptive, eta, norm, sync_ascent, rounding, replay_rng: as of `Perturbation`.
        schedule: from the Trainer's global step to a factor of rho, such as `late_phase(start)`; 0: one pass.
        param_groups: from the model to groups with their own "adaptive", "rho", "eta" or "norm", such as
            `asam_param_groups`. Parameters that the optimizer does not train are left out.
        args, kwargs: the Trainer's own.

    Raises:
        TypeError: a trainer whose `training_step` makes its own batch (GRPO, RLOO), another one in the second pass.
        RuntimeError: with DeepSpeed, whose engine runs a backward of its own, and with optimizers that step in one.
        ValueError: when training starts with a `SAM` in `optimizers` and settings here.

    Source: Foret et al. (2020), arXiv:2010.01412.
    """

    def __init__(
        self,
        *args: Any,
        rho: float | Tensor = 0.05,
        adaptive: bool | str = False,
        eta: float = 0.01,
        norm: float = 2,
        param_groups: ParamGroups | None = None,
        sync_ascent: bool | None = None,
        rounding: str = "nearest",
        replay_rng: bool = False,
        schedule: Callable[[int], float] | None = None,
        **kwargs: Any,
    ):
        _refuse_other_batches(type(self))
        check_schedule(schedule)
        self._sam_schedule = schedule
        self._sam_settings: dict[str, Any] = {"rho": rho, "adaptive": adaptive, "eta": eta, "norm": norm}
        self._sam_settings |= {"sync_ascent": sync_ascent, "rounding": rounding, "replay_rng": replay_rng}
        defaults = [0.05, False, 0.01, 2, None, "nearest", False]
        self._has_settings = [*self._sam_settings.values()] != defaults or (schedule or param_groups) is not None
        Perturbation(nn.LayerNorm(1), **self._sam_settings)  # raises for wrong settings; draws no random numbers
        self._sam_param_groups = param_groups
        self._sam_is_for: tuple[Any, Any] = (None, None)
        self.perturbation: Perturbation | SAM | None = None
        super().__init__(*args, **kwargs)
        if self.is_deepspeed_enabled:
            raise RuntimeError(
                "DeepSpeed runs a backward of its own, and SAM cannot run its second pass: use FSDP or DDP"
            )
        optim = str(getattr(self.args.optim, "value", self.args.optim))
        if "lomo" in optim or "layerwise" in optim:
            raise RuntimeError(f"optim={optim!r} updates the weights in the first backward: choose another optim")

    def training_step(self, model: nn.Module, *args: Any, **kwargs: Any) -> Tensor:
        sam = self._around(model)
        ascends = sam.ascends if isinstance(sam, SAM) else self._follow(sam)
        if not ascends:
            return super().training_step(model, *args, **kwargs)
        if isinstance(sam, SAM) and sam.one_pass:
            with sam.perturbed():
                return super().training_step(model, *args, **kwargs)
        with sam.microbatch():
            loss = super().training_step(model, *args, **kwargs)
            with sam.perturbed(), _unseen(self):
                super().training_step(model, *args, **kwargs)
        return loss

    def _follow(self, perturbation: Perturbation) -> bool:
        return follow_schedule(perturbation, self._sam_schedule, self.state.global_step)

    def _around(self, model: nn.Module) -> Perturbation | SAM:
        """Created once `train` has prepared model and optimizer: FSDP replaces the parameters."""
        if self._sam_is_for[0] is not model or self._sam_is_for[1] is not self.optimizer:
            optimizer: Any = getattr(self.optimizer, "optimizer", self.optimizer)  # inside Accelerate's wrapper
            if (
                isinstance(optimizer, SAM) and not self._has_settings
            ):  # its settings are its own; the wrapped model is known only now
                optimizer.module = model
                self.perturbation = optimizer
            else:
                self.perturbation = perturbation_around(
                    model, optimizer, param_groups=self._sam_param_groups, **self._sam_settings
                )
            self._sam_is_for = model, self.optimizer
        assert self.perturbation is not None
        return self.perturbation


def _refuse_other_batches(cls: type) -> None:
    """Raises TypeError for a trainer that generates or fetches its batch in each call of training_step."""
    for base in cls.__mro__[: cls.__mro__.index(Trainer)]:
        for name in {"training_step", "_prepare_inputs"} & base.__dict__.keys():
            code = inspect.unwrap(base.__dict__[name]).__code__
            generates = any("generat" in called for called in code.co_names)
            buffers = any(i.opname == "STORE_ATTR" for i in dis.get_instructions(code)) and name == "_prepare_inputs"
            if generates or buffers:
                raise TypeError(
                    f"{base.__name__}.{name} makes a new batch in each call (it "
                    f"{'generates text' if generates else 'goes on in a buffer'}): the second pass would see another "
                    "batch than the first, and SAM needs one for both"
                )


@contextmanager
def _unseen(trainer: Trainer) -> Iterator[None]:
    """The numbers and containers in private attributes (metrics, counts of tokens) are afterwards as before."""
    saved = {
        k: _copied(v) for k, v in trainer.__dict__.items() if k[0] == "_" and isinstance(v, (int, float, list, dict))
    }
    try:
        yield
    finally:
        for name, value in saved.items():
            now = trainer.__dict__[name]
            if isinstance(value, dict):  # in place: others may hold a reference to it
                now.clear()
                now.update(value)
            elif isinstance(value, list):
                now[:] = value
            else:
                trainer.__dict__[name] = value


def _copied(value: Any) -> Any:
    """A copy of the containers, not of the values in them."""
    if isinstance(value, dict):
        copied = copy.copy(value)
        copied.update({k: _copied(v) for k, v in value.items()})
        return copied
    return [_copied(v) for v in value] if isinstance(value, list) else value


class MonitorCallback(TrainerCallback):
    """A `SharpnessMonitor` that is called after every step of a Trainer; its numbers also go where the trainer reports
    to, its state into the trainer's checkpoints.

        trainer.add_callback(MonitorCallback(trainer, SharpnessMonitor(loss)))
    """

    FILE = "sharpness_monitor.pt"

    def __init__(self, trainer: Trainer, monitor: SharpnessMonitor):
        self.trainer, self.monitor = trainer, monitor
        self._handle: Any = None
        self._num_logged = 0

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step and self._file(args, state).exists():
            self.monitor.load_state_dict(read_file(self._file(args, state)))
        scaler = getattr(self.trainer.accelerator, "scaler", None)
        arguments = {"perturbation": lambda: self.trainer.perturbation} if hasattr(self.trainer, "perturbation") else {}
        self._handle = self.monitor.attach(self.trainer.optimizer, scaler=scaler, **arguments)
        self._num_logged = len(self.monitor.history)

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        for row in self.monitor.history[self._num_logged :]:
            self.trainer.log(numbers(row))
        self._num_logged = len(self.monitor.history)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._handle.remove()

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero:
            torch.save(self.monitor.state_dict(), content := io.BytesIO())
            write_atomic(self._file(args, state), content.getvalue())

    def _file(self, args: Any, state: Any) -> Path:
        return Path(args.output_dir) / f"checkpoint-{state.global_step}" / self.FILE
