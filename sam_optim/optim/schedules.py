"""How much of rho each step has: functions of the number of the step, for `SAM(..., schedule=...)`.

A factor of 0 means that the step makes one pass, as the base optimizer would.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

Schedule = Callable[[int], float]


def late_phase(start: int, ramp: int = 0) -> Schedule:
    """The base optimizer first, then SAM:  0 for steps before `start`, then 1.

    Args:
        start: the first step (from 0) with an ascent.
        ramp: over so many steps the factor rises in equal parts to 1; 0 for at once.

    Source: Zhou et al. (2024), arXiv:2410.10373.
    """
    _check_count("start", start, 0)
    _check_count("ramp", ramp, 0)
    return functools.partial(_late_phase, start, ramp)


def periodic(every: int) -> Schedule:
    """SAM in steps 0, every, 2 every, ...; the base optimizer in the others."""
    _check_count("every", every, 1)
    return functools.partial(_periodic, every)


def warmup(num: int) -> Schedule:
    """The factor rises in equal parts over the first `num` steps: 1 / num in step 0, 1 from step num - 1 on."""
    _check_count("num", num, 1)
    return functools.partial(_warmup, num)


def _late_phase(start: int, ramp: int, step: int) -> float:
    return 0.0 if step < start else min(1.0, (step - start + 1) / (ramp + 1))


def _periodic(every: int, step: int) -> float:
    return float(step % every == 0)


def _warmup(num: int, step: int) -> float:
    return min(1.0, (step + 1) / num)


def _check_count(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} is a number of steps and must be an integer >= {low}, got {value!r}")
