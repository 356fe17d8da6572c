"""What the commands share: errors in one line and exit code 2, signals, strict JSON, files whole or absent."""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import torch

EXIT_BAD_INPUT = 2


class InputError(ValueError):
    """What the user can mend: the message says what was got and what to do."""


def unknown(kind: str, name: str, choices: Iterable[str], limit: int = 12) -> InputError:
    """An error that lists the choices; the nearest ones where there are too many to read."""
    choices = sorted(choices)
    shown = (
        choices if len(choices) <= limit else get_close_matches(name, choices, n=limit, cutoff=0.4) or choices[:limit]
    )
    rest = f" ... ({len(choices)} in all)" if len(shown) < len(choices) else ""
    return InputError(f"unknown {kind} {name!r}; choose from {', '.join(shown)}{rest}")


def one_line(error: BaseException) -> str:
    """The last non-empty line: an error that crossed from a data worker carries that worker's traceback before it."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    return text.removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")


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


def fsync_directory(directory: Path) -> None:
    """Makes a rename inside `directory` survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, content: bytes) -> None:
    """The old file or the new one, never a part of it: temporary file, fsync, rename, fsync of the directory."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        reason = error.strerror or error
        message = f"cannot write {len(content):,} bytes to {path} ({reason}); free some space or choose another --out"
        raise InputError(message) from None
    fsync_directory(path.parent)


def write_json(path: Path, value: Any) -> None:
    write_atomic(path, (json.dumps(value, indent=2, sort_keys=True, allow_nan=False) + "\n").encode())


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({one_line(error)}); it was changed or damaged") from None


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
