"""Checkpoints that are whole or absent: plain torch.save files, named by their step and SHA-256."""

from __future__ import annotations

import hashlib
import io
from pathlib import Path
from typing import Any

import torch

from sam_optim.core.errors import InputError, one_line, say
from sam_optim.core.files import write_atomic
from sam_optim.vision.tensor_files import NAMED_BY_CONTENT, read_file

KEEP = 2


def save(directory: Path, state: dict[str, Any]) -> Path:
    """Writes `state` (tensors and plain values, "step" among them), then removes all but the last two.

    A kill at any point leaves the earlier checkpoints as they were: the name appears with the whole content.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    content = buffer.getvalue()
    path = directory / f"checkpoint-{state['step']:09d}-{hashlib.sha256(content).hexdigest()[:16]}.pt"
    directory.mkdir(exist_ok=True)
    write_atomic(path, content, folder=False)
    for outdated in newest_first(directory)[KEEP:]:
        if outdated != path:
            outdated.unlink(missing_ok=True)
    for leftover in directory.glob(".checkpoint-*.tmp"):
        leftover.unlink(missing_ok=True)
    return path


def newest_first(directory: Path) -> list[Path]:
    """Checkpoints, newest step first; of one step the one that was written last."""
    paths = [p for p in directory.glob("checkpoint-*.pt") if NAMED_BY_CONTENT.fullmatch(p.name)]
    return sorted(paths, key=lambda p: (p.name.split("-")[1], p.stat().st_mtime_ns), reverse=True)


def load(path: Path) -> dict[str, Any]:
    """The state in `path`, on the CPU.

    Raises:
        InputError: the content does not have the SHA-256 in the name, or holds more than tensors and plain values.
    """
    if not NAMED_BY_CONTENT.fullmatch(path.name):
        raise InputError(f"{path} is not named checkpoint-STEP-SHA256.pt; a renamed checkpoint cannot be verified")
    return read_file(path)


def newest(directory: Path, *, missing_ok: bool = False) -> dict[str, Any] | None:
    """The state in the newest valid checkpoint; those that are damaged are named on stderr and passed over.

    Raises:
        InputError: all are damaged; or there is none, unless `missing_ok` (then None).
    """
    problems = []
    for path in newest_first(directory):
        try:
            state = load(path)
        except (InputError, OSError) as error:
            problems.append(one_line(error))
            continue
        for problem in problems:
            say(f"warning: {problem}; using {path.name}")
        return state
    if problems:
        raise InputError(f"no valid checkpoint left: {'; '.join(problems)}; start again with --force")
    if missing_ok:
        return None
    raise InputError(f"no checkpoint in {directory}; train first: python -m benchmarks.train --out RUN_DIR")
