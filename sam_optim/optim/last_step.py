"""What the passes of a step have seen: read by users afterwards, at no cost meanwhile."""

from __future__ import annotations

import dataclasses
import numbers
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sam_optim.core.results import LastStep
from sam_optim.optim.kernels import Ascent, Scalar


class Diagnostics:
    """Numbers or 0-d tensors on the device, whatever the passes had."""

    def __init__(self) -> None:
        self._num_unperturbed: int | Tensor = 0
        self._counted: list[Tensor] = []  # by the kernels that found it out
        self._ascent: Ascent | None = None
        self._realized: Scalar | None = None
        self._losses: tuple[Any, Any] = (None, None)
        self._of_one_function = True
        self._warned = False

    def moved(self, ascent: Ascent | None, realized: Scalar | None) -> None:
        """The weights have moved, or stayed where they are because there was nothing to follow."""
        self._ascent, self._realized, self._losses = ascent, realized, (None, None)
        if ascent is None:
            return
        if ascent.stays is not None:
            if all(ascent.stays is not x for x in self._counted):
                self._counted.append(ascent.stays)
        elif isinstance(ascent.moved, bool):
            self._num_unperturbed += not ascent.moved
        else:
            stayed = ~ascent.moved if ascent.stayed is None else ascent.stayed  # type: ignore[operator]
            if isinstance(self._num_unperturbed, Tensor):
                self._num_unperturbed.add_(stayed)  # in place: a CUDA graph counts, too
            else:
                self._num_unperturbed = self._num_unperturbed + stayed.long()

    @property
    def num_unperturbed(self) -> int | Tensor:
        return sum(self._counted, self._num_unperturbed) if self._counted else self._num_unperturbed

    def without_ascent(self, *, plain: bool) -> None:
        """One pass only: of the plain base (rho = 0), or one that left no gradient."""
        self._ascent, self._realized = (Ascent(None, 0.0, False, []) if plain else None), None

    def losses(self, loss: Any, perturbed: Any, *, of_one_function: bool = True) -> None:
        """Of an ascent by another closure the difference is not a sharpness."""
        self._losses, self._of_one_function = (_detached(loss), _detached(perturbed)), of_one_function

    @property
    def norm(self) -> Scalar | None:
        return None if self._ascent is None else self._ascent.norm

    def last_step(self, params: Sequence[Tensor]) -> LastStep:
        wide = any(p.dtype in (torch.float64, torch.complex128) for p in params)
        length = None if self._ascent is None else self._ascent.length
        length = length() if callable(length) else length
        known = (None, None, None) if self._ascent is None else (self._ascent.norm, length, self._realized)
        step = LastStep.of(*self._losses, *known, dtype=torch.float64 if wide else torch.float32)
        return step if self._of_one_function else dataclasses.replace(step, sharpness=None)

    def warn_once(self, stacklevel: int) -> None:
        """Read on the first step only: later ones must not wait for the device."""
        if self._realized is None or self._warned:
            return
        self._warned = True
        if (share := float(self._realized)) < 0.9:
            warnings.warn(
                f"only {share:.0%} of the perturbation survives the rounding of bf16/fp16 weights: pass "
                "rounding='float32' with module=model, keep the weights in float32 under autocast, or pass "
                "rounding='stochastic'",
                stacklevel=stacklevel + 1,
            )

    def __getstate__(self) -> dict[str, Any]:
        counted = [x.clone() for x in self._counted]
        return self.__dict__ | {"_counted": counted, "_ascent": None, "_realized": None, "_losses": (None, None)}


def _detached(loss: Any) -> Any:
    """The loss without its graph; None for what is no number."""
    if isinstance(loss, Tensor):
        return loss.detach()
    return loss if isinstance(loss, numbers.Real) else None


def mean_loss(losses: list[Any]) -> Any:
    return None if any(x is None for x in losses) else sum(losses) / len(losses)
