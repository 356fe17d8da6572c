"""Every measure at every checkpoint; each result is saved as soon as it is computed."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from sam_optim.core.errors import EXIT_FAILED, InputError, one_line
from sam_optim.core.files import is_stream, open_regular, reserved, write_atomic
from sam_optim.core.text import cell, csv_text, headline, is_finite, number, text_table
from sam_optim.measures import registry
from sam_optim.sweep.columns import Column, Measures
from sam_optim.sweep.problems import Problem
from sam_optim.sweep.processes import is_first_process, started
from sam_optim.sweep.progress import Progress
from sam_optim.sweep.quality import QUALITY, quality
from sam_optim.sweep.store import Entry, Store, Unwritable, digest, opened
from sam_optim.vision.checkpoints import Checkpoint, find

# errors of one checkpoint or one measure: the rest of the sweep continues
FAULTS = (ValueError, RuntimeError, OSError, NotImplementedError, TypeError, KeyError, AttributeError, IndexError)
LOADING = "loading"  # the key of a checkpoint that could not be read or measured at all


@dataclass(frozen=True)
class Sweep:
    """What was measured: rows are checkpoints, columns are measures.

    rows: names of checkpoints, or that of the function. columns: labels. entries: (row, column) -> a record with
    "result" or "error", "quality" (loss, accuracy) and all that the number depends on. failures: row -> why nothing was
    measured there. is_training: whether the examples are said to be those of training.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    entries: dict[tuple[str, str], Entry] = field(default_factory=dict)
    failures: dict[str, str] = field(default_factory=dict)
    is_training: bool = False

    @property
    def exit_code(self) -> int:
        """0, or 1 where a number is missing or not finite."""
        good = all("result" in e and is_finite(e["result"]) for e in self.entries.values())
        return 0 if good and not self.failures else EXIT_FAILED

    def text(self) -> str:
        """The table, with the loss, and for classes the accuracy, on the measured examples."""
        qualities = {row: self._quality(row) for row in self.rows}
        shown = [name for name in QUALITY if any(quality.get(name) is not None for quality in qualities.values())]
        lines = [
            [row, *(number(quality.get(name), 4) for name in shown), *(self._cell(row, c) for c in self.columns)]
            for row, quality in qualities.items()
        ]
        return text_table(["checkpoint", *shown, *self.columns], lines)

    def remarks(self) -> list[str]:
        """Why checkpoints and numbers failed, and warnings; each remark once, however many rows it is about."""
        rows_by_remark: dict[tuple[str, str], list[str]] = {}
        for (row, column), entry in self.entries.items():
            if reason := entry.get("error") or entry["result"].get("reason"):
                rows_by_remark.setdefault((column, reason), []).append(row)
        remarks = [_about(row, reason) for row, reason in self.failures.items()]
        remarks += [f"{_first(rows)}, {column}: {reason}" for (column, reason), rows in rows_by_remark.items()]
        if guesses := [row for row in self.rows if self.is_training and self._is_guess(row)]:
            remarks.append(
                f"warning: {_first(guesses)}: the accuracy is no better than a guess; look at the numbers of the "
                "classes (--class-to-idx) and the model; where examples are images, at their mean and size"
            )
        return remarks

    def csv(self) -> str:
        """A column for each number and one for its error; empty cells where a number is missing."""
        head = ["checkpoint", *QUALITY, *(x for column in self.columns for x in (column, f"{column} error"))]
        lines: list[list[Any]] = []
        for row in self.rows:
            results = [self.entries.get((row, column), {}).get("result") or {} for column in self.columns]
            numbers = [self._quality(row).get(name) for name in QUALITY]
            lines.append([row, *numbers, *(x for result in results for x in headline(result))])
        return csv_text(head, lines)

    def _quality(self, row: str) -> Mapping[str, Any]:
        entries = (self.entries.get((row, column), {}) for column in self.columns)
        return next((entry["quality"] for entry in entries if "quality" in entry), {})

    def _is_guess(self, row: str) -> bool:
        quality = self._quality(row)
        return "accuracy" in quality and quality["accuracy"] <= quality["chance"]

    def _cell(self, row: str, column: str) -> str:
        entry = self.entries.get((row, column))
        return "failed" if entry is None or "error" in entry else cell(entry["result"])


def measure_checkpoints(
    checkpoints: Sequence[str | Path],
    problem: Problem,
    measures: Measures,
    *,
    json: Path | None = None,
    csv: Path | None = None,
    device: str = "cpu",
    quiet: bool = True,
) -> Sweep:
    """Every measure at every checkpoint.

    A number in the file `json` is not measured again if all of this is the same: the content of the checkpoint, the
    data, the model, the settings of the loss, the function and every option of the measure, and the versions of torch
    and this package. Under torchrun the batches are shared out.

    Args:
        checkpoints: files, directories and globs; none where a `FunctionProblem` brings its own weights.
        json: holds every number as soon as it is there. csv: the table, written at the end.
        quiet: no progress on standard error.

    Raises:
        InputError: something is wrong for all checkpoints, or a file cannot be written.
        KeyboardInterrupt: on Ctrl-C; its text says what is done and how to go on.
    """
    with reserved(csv if is_first_process() else None, "--csv"), started(device) as here:
        _check_table(csv)
        with opened(json, here) as store:
            rows, columns = find(checkpoints), measures.columns()
            losses = problem.open(here, rows)
            names = [checkpoint.name for checkpoint in rows] or [problem.name]
            sweep = Sweep(names, [column.label for column in columns], is_training=losses.is_training)
            progress = Progress(len(names) * len(columns), shown=here.is_first and not quiet)
            study = _Study(rows or [None], columns, losses, store, sweep, progress)
            try:
                study.run()
            except KeyboardInterrupt:
                raise KeyboardInterrupt(f"stopped; {study.how_to_go_on(json)}" if here.is_first else "") from None
            finally:
                progress.close()
        if csv is not None and here.is_first:
            write_atomic(csv, sweep.csv().encode(), "--csv")
        return sweep


def _check_table(path: Path | None) -> None:
    """Raises InputError for a file of something else, which the table would replace: a checkpoint, data."""
    if path is None or is_stream(path) or not path.exists():
        return
    with open_regular(path) as file:
        if file.read(11) not in (b"", b"checkpoint,"):
            raise InputError(f"{path} holds no table of `sam-optim measure` and is left alone; choose another --csv")


@dataclass
class _Study:
    checkpoints: Sequence[Checkpoint | None]
    columns: Sequence[Column]
    losses: Any  # of the problem
    store: Store
    sweep: Sweep
    progress: Progress
    num_cached: int = 0
    choice: str | None = None  # the last note about which weights were taken

    def run(self) -> None:
        for note in self.losses.notes:
            self.progress.say(f"note: {note}")
        for row, checkpoint in zip(self.sweep.rows, self.checkpoints, strict=True):
            try:
                self._measure_all(row, checkpoint)
            except Unwritable:
                raise
            except FAULTS as error:
                self._fail(row, one_line(error))
            else:
                self.store.discard(row, LOADING)
        if self.num_cached:
            self.progress.say(f"{self.num_cached} of {len(self.sweep.entries)} numbers were there already")

    def how_to_go_on(self, json: Path | None) -> str:
        done = f"{len(self.sweep.entries)} of {len(self.sweep.rows) * len(self.columns)} numbers are done"
        return f"{done}; the same command continues" if json else f"{done}; with --json they would be saved"

    def _measure_all(self, row: str, checkpoint: Checkpoint | None) -> None:
        content = checkpoint.digest() if checkpoint else None
        about = {"checkpoint": content, "loss": self.losses.identity(checkpoint)}
        missing = list(self._without_cached(row, about))
        if not missing:
            return
        loss = self.losses.loss(checkpoint)
        if self.losses.choice not in (None, self.choice):
            self.choice = self.losses.choice
            self.progress.say(f"note: {row}: {self.choice}")
        measured_quality = quality(loss)
        for column, identity, key in missing:
            step = self.progress.start(f"{row} {column.label}")
            entry: dict[str, Any] = {"checkpoint": row, "sha256": content, "column": column.label, "key": key}
            entry |= {"measure": column.measure, "rho": column.rho, "identity": identity}
            entry |= {"data": self.losses.about, "quality": measured_quality}
            try:
                result = registry.call(column.measure, loss, column.options, step).to_dict()
                entry |= {"result": result}
                text = cell(result)
            except FAULTS as error:
                text = one_line(error)
                entry |= {"error": text}
            self.store.put(entry)
            self.sweep.entries[row, column.label] = entry
            self.progress.done(f"{row}  {column.label}: {text}")

    def _without_cached(self, row: str, about: Mapping[str, Any]) -> Iterator[tuple[Column, dict[str, Any], str]]:
        """The columns that the store lacks, each with everything its number depends on, and a digest of that."""
        for column in self.columns:
            identity = {**about, **column.identity()}
            key = digest(identity)
            entry = self.store.find(row, key)
            if entry is None:
                yield column, identity, key
                continue
            if entry["checkpoint"] != row:  # a file with the same content
                entry = dict(entry) | {"checkpoint": row}
                self.store.put(entry)
            self.sweep.entries[row, column.label] = entry
            self.num_cached += 1
            self.progress.skip(1)

    def _fail(self, row: str, reason: str) -> None:
        self.sweep.failures[row] = reason
        self.store.put({"checkpoint": row, "key": LOADING, "column": None, "error": reason})
        self.progress.skip(len(self.columns) - 1)
        self.progress.done(_about(row, reason))


def _first(rows: Sequence[str]) -> str:
    return rows[0] + (f" and {len(rows) - 1} more" if len(rows) > 1 else "")


def _about(name: str, reason: str) -> str:
    """Most reasons begin with the name already."""
    return reason if reason.startswith(name) else f"{name}: {reason}"
