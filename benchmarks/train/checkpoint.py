"""Checkpoints that are whole or absent: plain torch.save files, named by their step and SHA-256."""

from __future__ import annotations

import hashlib
import io
import pickle
import re
import sys
from pathlib import Path
from typing import Any

import torch

from benchmarks.command import InputError, one_line, write_atomic

KEEP = 2
NAME = re.compile(r"checkpoint-(\d{9})-([0-9a-f]{16})\.pt")


def save(directory: Path, state: dict[str, Any]) -> Path:
    """Writes `state` (tensors and plain values, "step" among them), then removes all but the last two.

    A kill at any point leaves the earlier checkpoints as they were: the name appears with the whole content.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    path = directory / f"checkpoint-{state['step']:09d}-{_digest(content)}.pt"
    directory.mkdir(parents=True, exist_ok=True)
    write_atomic(path, content)
    for old in found(directory)[KEEP:]:
        if old != path:
            old.unlink(missing_ok=True)
    for leftover in directory.glob(".checkpoint-*.tmp"):
        leftover.unlink(missing_ok=True)
    return path


def found(directory: Path) -> list[Path]:
    """Checkpoints, newest step first; of one step the one that was written last."""
    paths = [p for p in directory.glob("checkpoint-*.pt") if NAME.fullmatch(p.name)]
    return sorted(paths, key=lambda p: (p.name.split("-")[1], p.stat().st_mtime_ns), reverse=True)


def load(path: Path) -> dict[str, Any]:
    """The state in `path`, on the CPU.

    Raises:
        InputError: the content does not have the SHA-256 in the name, or holds more than tensors and plain values.
    """
    name = NAME.fullmatch(path.name)
    if name is None:
        raise InputError(f"{path} is not named checkpoint-STEP-SHA256.pt; a renamed checkpoint cannot be verified")
    content = path.read_bytes()
    if _digest(content) != name[2]:
        raise InputError(f"{path} is damaged: its SHA-256 begins with {_digest(content)}, its name says {name[2]}")
    try:
        return torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise InputError(f"{path} holds more than weights and numbers and was not loaded: {one_line(error)}") from None


def newest(directory: Path, *, missing_ok: bool = False) -> dict[str, Any] | None:
    """The state in the newest valid checkpoint; those that are damaged are named on stderr and passed over.

    Raises:
        InputError: all are damaged; or there is none, unless `missing_ok` (then None).
    """
    problems = []
    for path in found(directory):
        try:
            state = load(path)
        except (InputError, OSError) as error:
            problems.append(one_line(error))
            continue
        for problem in problems:
            print(f"warning: {problem}; using {path.name}", file=sys.stderr)
        return state
    if problems:
        raise InputError(f"no valid checkpoint left: {'; '.join(problems)}; start again with --force")
    if missing_ok:
        return None
    raise InputError(f"no checkpoint in {directory}; train first: python -m benchmarks.train --out RUN_DIR")


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]
