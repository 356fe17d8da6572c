"""Processor, commit and versions of a result."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib import metadata
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]


@contextmanager
def one_thread() -> Iterator[None]:
    """Threads that spin beside any other process cost 10 to 40 times."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def commit() -> str | None:
    """The commit of this checkout, "-dirty" added where tracked files differ; None without git."""
    return first_line(["git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"])


def first_line(command: Sequence[str]) -> str | None:
    """The first line that a command prints, run in the repository; None if it fails or prints nothing."""
    try:
        out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=10)
    except (OSError, subprocess.SubprocessError):
        return None
    return out.stdout.strip().splitlines()[0] if out.returncode == 0 and out.stdout.strip() else None


def versions(*packages: str) -> dict[str, str | None]:
    """Versions of this package, torch and `packages`; None for one that is not installed."""
    result: dict[str, str | None] = {"torch": torch.__version__, "python": platform.python_version()}
    for name in ("sam_optim", *packages):
        try:
            result[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            result[name] = None
    return result


def facts(*packages: str) -> dict[str, Any]:
    """Hardware and versions for results on a CPU."""
    return versions(*packages) | {
        "machine": platform.machine(),
        "processor": processor(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "commit": commit(),
    }
