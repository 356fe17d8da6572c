"""Contexts that restore something at their end."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def undone(restore: Callable[[], None]) -> Iterator[None]:
    """Calls `restore` on the way out, and once more where an interrupt has cut it short."""
    try:
        yield
    finally:
        try:
            restore()
        except BaseException:
            restore()
            raise
