"""Writers of a monitor's numbers: files, TensorBoard, Weights & Biases, or any log(name, value, step)."""

from __future__ import annotations

import csv
import io
import json
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from weakref import WeakValueDictionary, finalize

from sam_optim.core.files import reserved, write_atomic
from sam_optim.core.results import plain

Row = Mapping[str, Any]
Writer = Callable[[Sequence[Row]], None]  # all rows so far, the newest last
PREFIX = "sharpness/"


def writer(log: Any) -> Writer:
    """The writer for a path (.csv, .jsonl), a TensorBoard SummaryWriter, a wandb run, or log(name, value, step).

    Raises:
        ValueError: a file of another kind. InputError: it cannot be written, or a monitor of another process writes it.
        TypeError: none of these.
    """
    if isinstance(log, (str, Path)):
        path = Path(log)
        if path.suffix not in FILES:
            raise ValueError(f"log must end in .csv or .jsonl, got {str(path)!r}")
        return _File(path)
    if hasattr(log, "add_scalar"):
        return lambda rows: _each(log.add_scalar, rows[-1])
    if hasattr(log, "define_metric"):
        return _wandb(log)
    if callable(log):
        return lambda rows: _each(log, rows[-1])
    raise TypeError(
        "log must be a path (.csv, .jsonl), a TensorBoard SummaryWriter, a wandb run or log(name, value, step), "
        f"got {type(log).__name__}"
    )


class _File:
    """Writes all rows anew: a run resumed from a checkpoint replaces the lines that were written after it."""

    def __init__(self, path: Path):
        self.path, self.content = path, FILES[path.suffix]
        self.lock = _locks.get(path.resolve()) or _Lock(path.resolve())

    def __call__(self, rows: Sequence[Row]) -> None:
        write_atomic(self.path, self.content(rows).encode(), "log")


class _Lock:
    """No other process writes the file while a monitor of this one may."""

    def __init__(self, path: Path):
        stack = ExitStack()
        stack.enter_context(reserved(path, "log"))
        finalize(self, stack.close)
        _locks[path] = self


_locks: WeakValueDictionary[Path, _Lock] = WeakValueDictionary()


def numbers(row: Row) -> dict[str, float]:
    """The numbers of a row by the names that loggers get."""
    return {PREFIX + name: float(x) for name, x in row.items() if name != "step" and isinstance(x, (int, float))}


def _each(log: Callable[[str, float, int], Any], row: Row) -> None:
    for name, value in numbers(row).items():
        log(name, value, row["step"])


def _wandb(run: Any) -> Writer:
    """Uses a step axis of its own: wandb drops values whose step is below its own count."""
    run.define_metric(PREFIX + "step")
    run.define_metric(PREFIX + "*", step_metric=PREFIX + "step")
    return lambda rows: run.log(numbers(rows[-1]) | {PREFIX + "step": rows[-1]["step"]})


def _jsonl(rows: Sequence[Row]) -> str:
    return "".join(json.dumps(plain(row), allow_nan=False) + "\n" for row in rows)


def _csv(rows: Sequence[Row]) -> str:
    text = io.StringIO()
    table = csv.DictWriter(text, list(dict.fromkeys(name for row in rows for name in row)), lineterminator="\n")
    table.writeheader()
    table.writerows(rows)
    return text.getvalue()


FILES = {".csv": _csv, ".jsonl": _jsonl}
