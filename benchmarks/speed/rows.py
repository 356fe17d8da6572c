"""What `speed.measures` compares: two functions that compute the same thing, and the data they compute it on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Row:
    """ours, peer: run once each and return a mapping of their values, for the results. peer is None where
    it is not installed. bar: the ratio of times, ours / peer, that is asked for; None where none is."""

    name: str
    ours: Callable[[], Any]
    peer: Callable[[], Any] | None
    bar: float | None


@dataclass(frozen=True)
class Problem:
    """make_model: a new model on the device, the same at each call. criterion: (outputs, target) -> mean.
    batches: (x, y) on the device."""

    make_model: Callable[[], Any]
    criterion: Callable[[Any, Any], Any]
    batches: list[tuple[Any, Any]]
