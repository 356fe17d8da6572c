"""What a row of `measure_cost` is: one measure of this package beside the published code's algorithm for it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import nn


@dataclass(frozen=True)
class Problem:
    """make_model: the model to measure, the same weights each time. batches: list of (x, y)."""

    make_model: Callable[[], nn.Module]
    criterion: Callable[[Any, Any], Any]
    batches: list[Any]


@dataclass(frozen=True)
class Row:
    """ours and peer are timed interleaved; the ratio of their medians is held against bar (None: for information)."""

    name: str
    ours: Callable[[], Any]
    peer: Callable[[], Any]
    bar: float | None
