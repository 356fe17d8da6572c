"""`sam-optim measure`: every measure at every checkpoint, each number kept as soon as it is there."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from sam_optim.core.errors import EXIT_FAILED, EXIT_INTERRUPTED, one_line
from sam_optim.core.files import write_atomic
from sam_optim.core.text import cell, csv_text, headline, is_finite, printable, text_table
from sam_optim.measures import registry
from sam_optim.sweep.columns import Column, columns
from sam_optim.sweep.problems import Images, Target, problem
from sam_optim.sweep.processes import Processes, started
from sam_optim.sweep.progress import Progress
from sam_optim.sweep.store import Entry, Store, Unwritable, digest
from sam_optim.vision.checkpoints import Checkpoint, find

# of one checkpoint, or of one measure at it: the others go on
FAULTS = (ValueError, RuntimeError, OSError, NotImplementedError, TypeError, KeyError, AttributeError, IndexError)


def measure(args: argparse.Namespace) -> int:
    """The table on standard output; 1 where a number is missing or not finite."""
    return measured(args)[0]


def measured(args: argparse.Namespace) -> tuple[int, Mapping[tuple[str, str], Entry]]:
    """What `measure` does and returns, and the entries of this command by (checkpoint, label of the column)."""
    with started(args.device) as here:
        found: list[Checkpoint] = find(args.checkpoints)
        study = Study(args, here, found)
        try:
            study.run()
        except KeyboardInterrupt:
            if here.is_first:
                print(f"stopped; {study.where_to_go_on()}", file=sys.stderr)
            return EXIT_INTERRUPTED, study.table
        finally:
            study.progress.close()
        return (study.show() if here.is_first else study.exit_code()), study.table


class Study:
    """Checkpoints x columns; what the store has is not measured again.

    A number is the same as one in the store if all of this is: the content of the checkpoint, the data, the model, the
    settings of the loss, the function and every option of the measure, and the versions of torch and this package.
    """

    def __init__(self, args: argparse.Namespace, here: Processes, found: Sequence[Checkpoint]):
        self._args, self._here = args, here
        self._rows: list[Checkpoint | None] = list(found) or [None]
        self._columns = columns(args)
        self._store: Store = here.of_first(lambda: Store(args.json))
        if not here.is_first:
            self._store.only_read()
        self._problem: Images | Target = problem(args, here, found)
        self.table: dict[tuple[str, str], Entry] = {}  # (checkpoint, label of the column) -> what was found
        self._failed: dict[str, str] = {}
        self._kept = 0
        self.progress = Progress(len(self._rows) * len(self._columns), shown=here.is_first and not args.quiet)

    def run(self) -> None:
        for note in self._problem.notes:
            self.progress.say(f"note: {note}")
        for checkpoint in self._rows:
            name = checkpoint.name if checkpoint else self._args.target
            try:
                self._measure_all(name, checkpoint)
            except Unwritable:
                raise
            except FAULTS as error:
                self._fail(name, one_line(error))
            else:
                self._store.discard(name, _LOADING)
        if self._kept:
            self.progress.say(f"{self._kept} of {len(self.table)} numbers were in {self._args.json} already")

    def _measure_all(self, name: str, checkpoint: Checkpoint | None) -> None:
        content = checkpoint.digest() if checkpoint else None
        about = self._problem.identity(checkpoint)
        identities = [{"checkpoint": content, "loss": about} | column.identity() for column in self._columns]
        todo = []
        for column, identity in zip(self._columns, identities, strict=True):
            entry = self._store.find(name, key := digest(identity))
            if entry is None:
                todo.append((column, identity, key))
            else:
                self._keep(name, column, entry)
        if not todo:
            return
        loss = self._problem.loss(checkpoint)
        for column, identity, key in todo:
            told = self.progress.start(f"{name} {column.label}")
            entry = {"checkpoint": name, "sha256": content, "column": column.label, "measure": column.measure}
            entry |= {"rho": column.rho, "key": key, "identity": identity, "data": self._problem.about}
            try:
                result = registry.call(column.measure, loss, column.options, told).to_dict()
                entry |= {"result": result}
                text = cell(result)
            except FAULTS as error:
                text = one_line(error)
                entry |= {"error": text}
            self._store.put(entry)
            self.table[name, column.label] = entry
            self.progress.done(f"{name}  {column.label}: {text}")

    def _keep(self, name: str, column: Column, entry: Mapping[str, Any]) -> None:
        if entry["checkpoint"] != name:  # a file with the same content
            entry = dict(entry) | {"checkpoint": name}
            self._store.put(entry)
        self.table[name, column.label] = entry
        self._kept += 1
        self.progress.skip(1)

    def _fail(self, name: str, reason: str) -> None:
        self._failed[name] = reason
        self._store.put({"checkpoint": name, "key": _LOADING, "column": None, "error": reason})
        self.progress.skip(len(self._columns) - 1)
        self.progress.done(_about(name, reason))

    def exit_code(self) -> int:
        good = all("result" in e and is_finite(e["result"]) for e in self.table.values())
        return 0 if good and not self._failed else EXIT_FAILED

    def where_to_go_on(self) -> str:
        done = f"{len(self.table)} of {len(self._rows) * len(self._columns)} numbers are done"
        return f"{done}; the same command goes on" if self._args.json else f"{done}; with --json they would be kept"

    def show(self) -> int:
        names = [c.name if c else self._args.target for c in self._rows]
        labels = [column.label for column in self._columns]
        rows = [[name, *(self._cell(name, label) for label in labels)] for name in names]
        print(text_table(["checkpoint", *labels], rows))
        problems = [_about(name, reason) for name, reason in self._failed.items()]
        alike: dict[tuple[str, str], list[str]] = {}
        for (name, label), entry in self.table.items():
            reason = entry.get("error") or entry["result"].get("reason")
            if reason:
                alike.setdefault((label, reason), []).append(name)
        for (label, reason), found in alike.items():
            others = f" and {len(found) - 1} more" if len(found) > 1 else ""
            problems.append(f"{found[0]}{others}, {label}: {reason}")
        for text in problems:
            print(printable(text), file=sys.stderr)
        if self._args.csv is not None:
            write_atomic(self._args.csv, self._csv(names, labels).encode(), "--csv")
        return self.exit_code()

    def _cell(self, name: str, label: str) -> str:
        entry = self.table.get((name, label))
        return "failed" if entry is None or "error" in entry else cell(entry["result"])

    def _csv(self, names: Sequence[str], labels: Sequence[str]) -> str:
        """A column for each number and one for its error; nothing stands where there is none."""
        rows = []
        for name in names:
            row: list[Any] = [name]
            for label in labels:
                row += headline(self.table.get((name, label), {}).get("result") or {})
            rows.append(row)
        return csv_text(["checkpoint", *(x for label in labels for x in (label, f"{label} error"))], rows)


def _about(name: str, reason: str) -> str:
    """Most reasons begin with the name already."""
    return reason if reason.startswith(name) else f"{name}: {reason}"


_LOADING = "loading"  # the key of a checkpoint that could not be read or measured at all
