"""Results in one JSON file that is complete at every moment; what it holds is not measured again."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import NoneType
from typing import Any

from sam_optim.core.errors import InputError
from sam_optim.core.files import is_stream, read_json, reserved, write_atomic
from sam_optim.sweep.processes import Processes

FORMAT = "sam_optim measures 1"

Entry = Mapping[str, Any]


def digest(value: Any) -> str:
    """A digest of plain values; equal values have equal digests, whatever the order of their keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()[:16]


def read(path: Path) -> list[dict[str, Any]]:
    """The entries of a file that `Store` wrote.

    Raises:
        InputError: not such a file, or an entry that was changed or damaged.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("entries"), list):
        raise InputError(f"{path} holds no results of `sam-optim measure` and is left alone; choose another --json")
    for entry in content["entries"]:
        check_entry(path, entry)
    return content["entries"]


def check_entry(path: Path, entry: Any) -> None:
    types: dict[str, Any] = {"checkpoint": str, "key": str, "column": (str, NoneType), "error": str}
    types |= dict.fromkeys(("identity", "result", "quality"), dict)
    is_intact = (
        isinstance(entry, dict)
        and {"checkpoint", "key"} <= entry.keys()
        and ("result" in entry or "error" in entry)
        and all(isinstance(entry[name], kind) for name, kind in types.items() if name in entry)
        and isinstance(entry.get("identity", {}).get("loss", {}), dict)
        and all(_numbers(value, 0) for value in entry.get("quality", {}).values())
    )
    if not is_intact:
        raise InputError(f"{path} has an entry that was changed or damaged; choose another --json")
    if "result" in entry:
        check_result(path, entry["result"])


def check_result(path: Path, result: Mapping[str, Any]) -> None:
    """Raises InputError if the `to_dict()` of a result holds something else where a number or a text belongs."""
    shapes = {"value": 0, "stderr": 0, "tau": 0, "low": 0, "high": 0, "p": 0, "granulated": 0, "n": 0, "num_samples": 0}
    shapes |= dict.fromkeys(("eigenvalues", "errors", "residuals", "grid", "density"), 1) | {"coordinates": 2}
    if isinstance(axes := result.get("coordinates"), list):
        shapes["losses"] = len(axes)
    if isinstance(result.get("stderr"), list) and result.get("type") == "Spectrum":  # of a density
        shapes["stderr"] = 1
    for name, depth in shapes.items():
        if name in result and not _numbers(result[name], depth):
            raise InputError(f"{path}: {name!r} of a result is no {'list of ' * depth}number; the file was changed")
    kinds = {"reason": str, "type": str, "converged": bool}
    kinds |= dict.fromkeys(("settings", "provenance", "directions"), dict)
    for name, kind in kinds.items():
        if not isinstance(result.get(name, kind()), kind):
            raise InputError(f"{path}: {name!r} of a result is no {kind.__name__}; the file was changed")


def _numbers(value: Any, depth: int) -> bool:
    if depth:
        return isinstance(value, list) and all(_numbers(v, depth - 1) for v in value)
    return value is None or (isinstance(value, (int, float)) and not isinstance(value, bool) and abs(value) < 1e308)


class Unwritable(InputError):
    """Results cannot be written. This stops the sweep; a checkpoint that fails does not."""


class Store:
    """Entries by (checkpoint, key), in order of arrival; `put` returns when the entry is on disk.

    A device or pipe (/dev/stdout) is written once, by `close`.

    Args:
        path: the file; None: in memory only. entries: what it holds already.
    """

    def __init__(self, path: Path | None, entries: Iterable[Entry] = ()):
        self._path = path
        self._is_stream = path is not None and is_stream(path)
        self._entries: dict[tuple[str, str], Entry] = {}
        self._texts: dict[tuple[str, str], str] = {}  # a write formats only what is new
        for entry in entries:
            self._add(entry)

    def find(self, checkpoint: str, key: str) -> Entry | None:
        """The result under this key, of this checkpoint or of one with the same content; failures do not count."""
        same_name = [self._entries[checkpoint, key]] if (checkpoint, key) in self._entries else []
        same_content = (e for (_, k), e in self._entries.items() if k == key)
        return next((e for e in (*same_name, *same_content) if "result" in e), None)

    def put(self, entry: Entry) -> None:
        self._add(entry)
        self._changed()

    def discard(self, checkpoint: str, key: str) -> None:
        if self._entries.pop((checkpoint, key), None) is not None:
            del self._texts[checkpoint, key]
            self._changed()

    def close(self) -> None:
        if self._is_stream:
            self._write()

    def _add(self, entry: Entry) -> None:
        name = (entry["checkpoint"], entry["key"])
        self._entries[name], self._texts[name] = entry, json.dumps(entry, sort_keys=True, allow_nan=False)

    def _changed(self) -> None:
        if self._path is not None and not self._is_stream:
            self._write()

    def _write(self) -> None:
        assert self._path is not None
        lines = ",\n".join(self._texts.values())
        content = f'{{"format": {json.dumps(FORMAT)}, "entries": [\n{lines}\n]}}\n'
        try:
            write_atomic(self._path, content.encode(), "--json")
        except InputError as error:
            raise Unwritable(str(error)) from None


@contextmanager
def opened(path: Path | None, here: Processes) -> Iterator[Store]:
    """A store that no other process can write; of several processes of one command only the first writes.

    Raises:
        InputError: a file that `Store` has not written, or that another process is writing.
    """
    with ExitStack() as held:

        def entries() -> list[dict[str, Any]]:
            held.enter_context(reserved(path, "--json"))
            return [] if path is None or is_stream(path) or not path.exists() else read(path)

        store = Store(path if here.is_first else None, here.of_first(entries))
        try:
            yield store
        finally:
            store.close()
