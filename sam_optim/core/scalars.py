"""Numbers that users pass: Python's, NumPy's or one-element tensors, made plain; an error names anything else."""

from __future__ import annotations

import math
from contextlib import suppress
from typing import Any


def whole(name: str, value: Any) -> int:
    """An int. Raises ValueError for what is no whole number, or does not fit into 64 bits."""
    with suppress(TypeError, ValueError, RuntimeError, OverflowError):
        if _is_number(value) and value == int(value) and abs(int(value)) < 1 << 64:
            return int(value)
    raise ValueError(f"{name} must be a whole number, got {shown(value)}")


def real(name: str, value: Any) -> float:
    """A finite float. Raises ValueError for anything else."""
    with suppress(TypeError, ValueError, RuntimeError, OverflowError):
        if _is_number(value) and math.isfinite(number := float(value)):
            return number
    raise ValueError(f"{name} must be a finite number, got {shown(value)}")


def shown(value: Any) -> str:
    """A value in an error: one line, and not the whole of an array."""
    text = " ".join(repr(value).split())
    return text if len(text) <= 80 else f"{text[:77]}..."


def _is_number(value: Any) -> bool:
    is_bool = isinstance(value, bool) or str(getattr(value, "dtype", "")) in ("bool", "torch.bool")
    return not is_bool and not isinstance(value, (str, bytes))
