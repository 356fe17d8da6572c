"""Schedules for `SAM(..., schedule=...)`: functions of the step number that return a factor on rho.

Where the factor is 0, a step has one pass and costs what a step of the base costs.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from sam_optim.optim.kernels import Scalar


@dataclass(frozen=True)
class _Ramp:
    start: int
    ramp: int

    def __call__(self, step: int) -> float:
        return min(1.0, max(0, step - self.start + 1) / (self.ramp + 1))


@dataclass(frozen=True)
class _Periodic:
    every: int

    def __call__(self, step: int) -> float:
        return float(step % self.every == 0)


@dataclass(frozen=True)
class _ProportionalToLR:
    rho_min: float
    rho_max: float
    lr_min: float
    lr_max: float | None

    def __call__(self, step: int) -> float:
        return 1.0

    def radius(self, group: dict[str, Any], defaults: dict[str, Any]) -> Scalar:
        """The radius of a group now; its own rho only says whether it is perturbed at all."""
        peak = self.lr_max
        if peak is None:
            peak = group.get("max_lr", group.get("initial_lr", defaults.get("lr", group["lr"])))
        if not peak > self.lr_min:
            raise ValueError(
                f"proportional_to_lr needs a learning rate above lr_min={self.lr_min:g}, and the largest one is "
                f"{float(peak):g}: pass lr_max"
            )
        share = (group["lr"] - self.lr_min) / (peak - self.lr_min)
        return self.rho_min + (self.rho_max - self.rho_min) * share


def late_phase(start: int, ramp: int = 0) -> _Ramp:
    """0 before step `start`, then 1: SAM only in the last part of training.

    Args:
        start: the first step with an ascent; steps count from 0.
        ramp: number of steps from there with a part of rho, 1/(ramp + 1), 2/(ramp + 1), ...

    Source: Zhou et al. (2024), arXiv:2410.10373.
    """
    return _Ramp(_whole("start", start, 0), _whole("ramp", ramp, 0))


def periodic(every: int) -> _Periodic:
    """1 in steps 0, every, 2 every, ... and 0 between them."""
    return _Periodic(_whole("every", every, 1))


def warmup(num: int) -> _Ramp:
    """1/(num + 1), 2/(num + 1), ... in the first `num` steps, then 1."""
    return _Ramp(0, _whole("num", num, 0))


def proportional_to_lr(
    rho_min: float, rho_max: float, *, lr_min: float = 0.0, lr_max: float | None = None
) -> _ProportionalToLR:
    """rho = rho_min + (rho_max - rho_min) (lr - lr_min) / (lr_max - lr_min) in each group whose own rho is not 0.

    Args:
        lr_min, lr_max: of the learning rate's schedule. None: what the scheduler has noted in the group ("max_lr" or
            "initial_lr"), or the learning rate that the optimizer was made with.

    Source: the radius of GSAM, Zhuang et al. (2022), arXiv:2203.08065.
    """
    for name, value in (("rho_min", rho_min), ("rho_max", rho_max), ("lr_min", lr_min), ("lr_max", lr_max)):
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"{name} must be a finite number >= 0, got {value!r}")
    if rho_min > rho_max:
        raise ValueError(f"rho_min must not be above rho_max, got {rho_min!r} and {rho_max!r}")
    return _ProportionalToLR(rho_min, rho_max, lr_min, lr_max)


def factor_at(schedule: Any, step: int) -> float:
    """The factor of a step, or a ValueError."""
    factor = schedule(step)
    if isinstance(factor, bool) or not isinstance(factor, (int, float)) or not 0 <= factor < math.inf:
        raise ValueError(f"schedule({step}) must be a finite number >= 0, the factor of rho, got {factor!r}")
    return float(factor)


def _whole(name: str, value: int, least: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be a whole number >= {least}, got {value!r}")
    return value
