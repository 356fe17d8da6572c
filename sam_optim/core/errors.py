"""Errors of a command: one line on stderr that says what was got and what to do, and an exit code."""

from __future__ import annotations

import io
import os
import signal
import sys
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from difflib import get_close_matches
from typing import Any

import torch

from sam_optim.core.text import printable

LONGEST = 2000  # characters of an error that are shown: what a file holds can be part of one
EXIT_FAILED, EXIT_BAD_INPUT, EXIT_INTERRUPTED = 1, 2, 128 + signal.SIGINT


class InputError(ValueError):
    """What the user can mend: the message says what was got and what to do, in one line whatever names it quotes."""

    def __init__(self, message: str = ""):
        from_worker = message.startswith("Caught ")  # by torch's data loader: the worker's traceback, for `one_line`
        super().__init__(message if from_worker else printable(message))


def unknown(kind: str, name: str, choices: Iterable[str], limit: int = 12) -> InputError:
    """An error that lists the choices; the nearest ones where there are too many to read."""
    choices = sorted(choices)
    shown = choices
    if len(choices) > limit:
        shown = get_close_matches(name, choices, n=limit, cutoff=0.4) or choices[:limit]
    rest = f" ... ({len(choices)} in all)" if len(shown) < len(choices) else ""
    return InputError(f"unknown {kind} {name!r}; choose from {', '.join(shown)}{rest}")


def one_line(error: BaseException) -> str:
    """The last non-empty line of an error; of the system's, the file and the reason.

    An error that crossed from a data worker carries that worker's traceback in the lines before.
    """
    if isinstance(error, OSError) and error.filename and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}"
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    text = lines[-1] if lines else type(error).__name__
    return text.removeprefix(f"{type(error).__module__}.{type(error).__name__}: ")


def say(text: str) -> None:
    """Prints a line on standard error, if that is open."""
    with suppress(OSError, ValueError):
        print(printable(text), file=sys.stderr, flush=True)


def show(text: str) -> None:
    """Prints to standard output without control characters, which names from files may contain."""
    print(printable(text, one_line=False), flush=True)


class _Output:
    """Standard output, without control characters, which names from files may contain. Where it ends early (`| head`, a
    full disk) the command goes on, and its files are written."""

    def __init__(self, stream: Any):
        self.stream = stream
        self.error: OSError | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        self._do(self.stream.write, printable(text, one_line=False))
        return len(text)

    def flush(self) -> None:
        self._do(self.stream.flush)

    def _do(self, call: Callable[..., Any], *arguments: str) -> None:
        try:
            call(*arguments)
        except OSError as error:
            self.error = error
            with suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), self.stream.fileno())


def run(main: Callable[[Sequence[str] | None], int], argv: Sequence[str] | None = None) -> int:
    """The exit code of a command. What the user can mend becomes one line on stderr and exit code 2.

    ValueError is what the library raises for users; its messages name the remedy. A reader that closes standard output
    early (`| head`) is no error.
    """
    while (handle := os.open(os.devnull, os.O_RDWR)) <= 2:  # closed ones: else a file of results would be opened as one
        pass
    os.close(handle)
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed: print(file=None) would take standard output
            setattr(sys, name, open(os.devnull, "w"))  # noqa: SIM115
        if isinstance(stream := getattr(sys, name), io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")  # ASCII terminals, file names that are not UTF-8
    before = sys.stdout
    sys.stdout = output = _Output(before)
    try:
        code = main(argv)
        output.flush()
        if output.error is None or isinstance(output.error, BrokenPipeError):
            return code
        say(f"error: standard output cannot be written: {output.error.strerror}")
    except (ValueError, OSError, ImportError) as error:
        say(f"error: {one_line(error)[:LONGEST]}")
    except KeyboardInterrupt as error:
        say(str(error) or "stopped")
        return EXIT_INTERRUPTED
    except torch.OutOfMemoryError as error:
        say(f"error: {one_line(error)} Lower --batch-size")
    finally:
        output.flush()
        sys.stdout = before
    return EXIT_BAD_INPUT
