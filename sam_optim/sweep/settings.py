"""Settings of all problems: which weights of a checkpoint are taken, and how the loss is computed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from sam_optim.loss import Loss
from sam_optim.sweep.processes import Processes
from sam_optim.vision import checkpoints, weights
from sam_optim.vision.checkpoints import Checkpoint

DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """Args:
    ema, key: which weights of a checkpoint, as in `vision.checkpoints.read`.
    normalize_logits, batch_statistics: as in `Loss`.
    dtype: "float32" or "float64"; None: float32, or what the function of a `FunctionProblem` returns.
    """

    ema: bool = False
    key: str | None = None
    normalize_logits: bool = False
    batch_statistics: bool = False
    dtype: str | None = None

    default_dtype: ClassVar[torch.dtype | None] = torch.float32

    @property
    def torch_dtype(self) -> torch.dtype | None:
        return DTYPES[self.dtype] if self.dtype else self.default_dtype


class Losses:
    """The losses of a problem at its checkpoints.

    notes: what the reader should know of the data. is_training: whether the examples are said to be those of training.
    choice: which weights of the last checkpoint were taken, if there was a choice, and what was left of its texts.
    """

    is_training = False
    choice: str | None = None

    def __init__(self, settings: Settings, here: Processes):
        self._settings, self._here = settings, here
        self.notes: list[str] = []

    def _read(self, checkpoint: Checkpoint, model: nn.Module | None = None) -> dict[str, Tensor]:
        """The weights of a checkpoint; those of several models in it are compared with `model`."""
        taken = checkpoints.read(checkpoint, ema=self._settings.ema, key=self._settings.key)
        self.choice = taken.choice
        if model is not None:
            self._compare(taken.state, model)
        return taken.state

    def _compare(self, state: dict[str, Tensor], model: nn.Module) -> None:
        words = [text for text in (self.choice, weights.choice(state, model.state_dict())) if text]
        self.choice = "; ".join(words) or None

    def _loss(self, model: nn.Module, criterion: Any, batches: Any) -> Loss:
        settings, device = self._settings, self._here.device
        return Loss(
            model.to(device, settings.torch_dtype),
            criterion,
            batches,
            normalize_logits=settings.normalize_logits,
            batch_statistics=settings.batch_statistics,
            device=device,
        )

    def _identity(self) -> dict[str, Any]:
        """The settings that a number depends on."""
        settings = self._settings
        return {
            "ema": settings.ema,
            **({"key": settings.key} if settings.key else {}),
            "normalize_logits": settings.normalize_logits,
            "batch_statistics": settings.batch_statistics,
            "dtype": str(settings.torch_dtype).removeprefix("torch."),
            "device": self._here.device.type,
        }
