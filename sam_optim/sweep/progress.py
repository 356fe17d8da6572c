"""Progress of a long command on standard error: tqdm's bars on a terminal; elsewhere a line for each result, and one
every half minute during a long measure."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from typing import Any

from sam_optim.core.errors import say
from sam_optim.core.text import printable

SILENCE = 30.0  # seconds: the longest time without a line while a measure reports steps


class Progress:
    """Over `total` numbers. `shown=False` says nothing at all."""

    def __init__(self, total: int, *, shown: bool):
        self._total, self._shown, self._done = total, shown, 0
        self._bars = _tqdm() if shown and sys.stderr is not None and sys.stderr.isatty() else None
        self._outer: Any = self._bars(total=total, unit="number", position=0) if self._bars else None
        self._inner: Any = None
        self._started = self._spoke = time.monotonic()
        self._label = ""

    def say(self, text: str) -> None:
        if not self._shown:
            return
        if self._outer is not None:
            self._outer.write(printable(text), file=sys.stderr)
        else:
            say(text)

    def start(self, label: str) -> Callable[[int, int], None] | None:
        """Begins a measure; returns its callback for (done, total) steps, or None."""
        self._started = self._spoke = time.monotonic()
        self._label = label
        if not self._shown:
            return None
        if self._bars is None:
            return self._told
        self._inner = self._bars(desc=label, position=1, leave=False)
        return self._step

    def done(self, text: str) -> None:
        """Ends the measure."""
        self._done += 1
        seconds = time.monotonic() - self._started
        self._close_inner()
        self.say(f"[{self._done}/{self._total}] {text} ({seconds:.1f} s)")
        if self._outer is not None:
            self._outer.update(1)

    def skip(self, count: int) -> None:
        """Numbers that need no work."""
        self._done += count
        if self._outer is not None:
            self._outer.update(count)

    def close(self) -> None:
        self._close_inner()
        if self._outer is not None:
            self._outer.close()

    def _told(self, done: int, total: int) -> None:
        now = time.monotonic()
        if now - self._spoke >= SILENCE:
            self._spoke = now
            seconds = now - self._started
            self.say(f"[{self._done}/{self._total}] {self._label}: {done} of at most {total} steps, {seconds:.0f} s")

    def _step(self, done: int, total: int) -> None:
        self._inner.total = total
        self._inner.update(done - self._inner.n)  # tqdm redraws only a few times a second

    def _close_inner(self) -> None:
        if self._inner is not None:
            self._inner.close()
            self._inner = None


def _tqdm() -> Any:
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    return tqdm
