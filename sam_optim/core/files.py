"""Files that are whole or absent, and strict JSON."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

from sam_optim.core.errors import InputError, one_line


def fsync_directory(directory: Path) -> None:
    """Makes a rename inside `directory` survive a power cut."""
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_atomic(path: Path, content: bytes, option: str = "--out") -> None:
    """The old file or the new one, never a part of it: temporary file, fsync, rename, fsync of the directory."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        temporary.unlink(missing_ok=True)
        reason = error.strerror or error
        message = f"cannot write {len(content):,} bytes to {path} ({reason}); free some space or choose another"
        raise InputError(f"{message} {option}") from None
    fsync_directory(path.parent)


def write_json(path: Path, value: Any, option: str = "--out") -> None:
    text = json.dumps(value, indent=2, sort_keys=True, allow_nan=False)
    write_atomic(path, (text + "\n").encode(), option)


def read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path} is not valid JSON ({one_line(error)}); it was changed or damaged") from None
