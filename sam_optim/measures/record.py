"""What all measures share: how a result is written down, and how progress is told."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from sam_optim.core.results import Estimate, plain, provenance
from sam_optim.loss import Loss

Progress = Callable[[int, int], None]


def settings(measure: str, loss: Loss, **own: Any) -> dict[str, Any]:
    """The name, what the caller chose, and what the loss says of itself: enough to make the number again."""
    return {"measure": measure} | {name: plain(value) for name, value in own.items()} | loss.settings()


FEWEST = 4  # samples for a standard error: with three of them it is itself uncertain by half


def estimate(
    value: float, stderr: float, *, settings: dict[str, Any], reason: str | None = None, **more: Any
) -> Estimate:
    """An Estimate that never passes off as a number what is not: a value that is not finite is nan, with a reason; and
    one that says when its standard error is itself a guess."""
    if not math.isfinite(value):
        value, stderr = math.nan, math.nan
        reason = reason or "the loss or one of its derivatives is not finite"
    elif 0 < stderr < math.inf and (n := more.get("num_samples", 1)) < FEWEST:
        reason = reason or f"few samples: the standard error is over {n}"
    more["converged"] = more.get("converged", True) and math.isfinite(value)
    return Estimate(value, stderr, settings=settings, provenance=provenance(), reason=reason, **more)


class Ticks:
    """Counts steps, and tells `progress` after each."""

    def __init__(self, progress: Progress | None, total: int):
        self._progress, self._total, self._done = progress, total, 0

    def __call__(self) -> None:
        self.to(self._done + 1)

    def to(self, done: int) -> None:
        """`done` steps are behind, of which some were not needed."""
        if done > self._done and self._progress is not None:
            self._progress(done, self._total)
        self._done = max(done, self._done)


def flat(tensors: Sequence[Tensor]) -> Tensor:
    """One vector of all entries, in float32 or better."""
    dtype = torch.float32
    for x in tensors:
        dtype = torch.promote_types(dtype, x.dtype)
    return torch.cat([x.detach().flatten().to(dtype) for x in tensors])


def unflat(v: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """The parts of v in the shapes of `like`: views, in the dtype of v."""
    parts = v.split([w.numel() for w in like])
    return [x.view(w.shape) for x, w in zip(parts, like, strict=True)]
