"""What the commands share: errors in one line and exit code 2, signals, strict JSON, files whole or absent."""

from __future__ import annotations

import json
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from sam_optim.core.errors import EXIT_BAD_INPUT, InputError, one_line, unknown
from sam_optim.core.files import fsync_directory, read_json, write_atomic, write_json

__all__ = [
    "EXIT_BAD_INPUT",
    "InputError",
    "Interrupted",
    "Signals",
    "fsync_directory",
    "one_line",
    "read_json",
    "read_jsonl",
    "run",
    "unknown",
    "write_atomic",
    "write_json",
]


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """The exit code of a command; what the user can mend becomes one line on stderr and exit code 2.

    ValueError is what the library raises for users; its messages name the remedy.
    """
    try:
        return main(argv)
    except (ValueError, OSError) as error:
        print(f"error: {one_line(error)}", file=sys.stderr)
    except torch.OutOfMemoryError as error:
        print(f"error: {one_line(error)} Lower --batch-size, or set --amp bf16", file=sys.stderr)
    except KeyboardInterrupt:
        print("stopped", file=sys.stderr)
        return 128 + signal.SIGINT
    return EXIT_BAD_INPUT


def read_jsonl(path: Path) -> list[dict[str, Any]]:
    """The records of a log; a last line that was cut when the process was killed does not count."""
    records: list[dict[str, Any]] = []
    lines = path.read_text().splitlines() if path.exists() else []
    for i, line in enumerate(lines):
        try:
            records.append(json.loads(line))
        except json.JSONDecodeError:
            if i < len(lines) - 1:
                raise InputError(f"{path}, line {i + 1} is not valid JSON; it was changed or damaged") from None
    return records


class Interrupted(Exception):
    """A signal asked the command to stop."""

    def __init__(self, signum: int):
        super().__init__(signum)
        self.signum, self.name = signum, signal.Signals(signum).name


class Signals:
    """While active, the first Ctrl-C or SIGTERM is only noted, and `check` raises it where stopping is safe.

    A second one acts at once, as if this had never been.
    """

    def __init__(self) -> None:
        self.received: int | None = None
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():  # Python allows handlers nowhere else
            self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *_: object) -> None:
        for signum, handler in self._before.items():
            signal.signal(signum, handler)

    def _note(self, signum: int, _: object) -> None:
        self.received = signum
        self.__exit__()

    def check(self) -> None:
        if self.received is not None:
            raise Interrupted(self.received)
