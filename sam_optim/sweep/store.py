"""Results in one JSON file that is whole at every moment, and knows what is in it already."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from sam_optim.core.errors import InputError
from sam_optim.core.files import read_json, write_atomic

FORMAT = "sam_optim measures 1"

Entry = Mapping[str, Any]


def digest(value: Any) -> str:
    """Of plain values: what is equal has one digest, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(value, sort_keys=True, allow_nan=False).encode()).hexdigest()[:16]


def read(path: Path) -> list[dict[str, Any]]:
    """The entries of a file that `Store` wrote.

    Raises:
        InputError: not such a file.
    """
    content = read_json(path)
    if not isinstance(content, dict) or content.get("format") != FORMAT or not isinstance(content.get("entries"), list):
        raise InputError(f"{path} holds no results of `sam-optim measure` and is left alone; choose another --json")
    for entry in content["entries"]:
        if not (isinstance(entry, dict) and {"checkpoint", "key"} <= entry.keys()):
            raise InputError(f"{path} has an entry without checkpoint or key; it was changed or damaged")
    return content["entries"]


class Unwritable(InputError):
    """Results cannot be written: the sweep stops, where after a checkpoint that fails it goes on."""


class Store:
    """Entries by (checkpoint, key), in the order in which they came; each `put` is on the disk when it returns.

    Args:
        path: the file; what it holds stays. None: in memory only.

    Raises:
        InputError: a file that this class has not written.
    """

    def __init__(self, path: Path | None):
        self._path = path
        entries = read(path) if path is not None and path.exists() else []
        self._entries: dict[tuple[str, str], Entry] = {(e["checkpoint"], e["key"]): e for e in entries}
        self._texts = {name: _text(e) for name, e in self._entries.items()}  # a write formats only what is new
        self._seen = self._stamp()

    def only_read(self) -> None:
        """For the other processes of one command: from here on all stays in memory."""
        self._path = None

    def find(self, checkpoint: str, key: str) -> Entry | None:
        """The result under this key, of this checkpoint or of one with the same content; failures do not count."""
        same_name = [self._entries[checkpoint, key]] if (checkpoint, key) in self._entries else []
        same_content = (e for (_, k), e in self._entries.items() if k == key)
        return next((e for e in (*same_name, *same_content) if "result" in e), None)

    def put(self, entry: Entry) -> None:
        name = (entry["checkpoint"], entry["key"])
        self._entries[name], self._texts[name] = entry, _text(entry)
        self._write()

    def discard(self, checkpoint: str, key: str) -> None:
        if self._entries.pop((checkpoint, key), None) is not None:
            del self._texts[checkpoint, key]
            self._write()

    def _write(self) -> None:
        if self._path is None:
            return
        if self._stamp() != self._seen:
            raise Unwritable(f"{self._path} was changed by another process; give each its own --json")
        lines = ",\n".join(self._texts.values())
        content = f'{{"format": {json.dumps(FORMAT)}, "entries": [\n{lines}\n]}}\n'
        try:
            write_atomic(self._path, content.encode(), "--json")
        except InputError as error:
            raise Unwritable(str(error)) from None
        self._seen = self._stamp()

    def _stamp(self) -> tuple[int, int] | None:
        if self._path is None or not self._path.exists():
            return None
        stat = self._path.stat()
        return stat.st_mtime_ns, stat.st_size


def _text(entry: Entry) -> str:
    return json.dumps(entry, sort_keys=True, allow_nan=False)
