"""A process that has imported torch once, and forks a child for each kill.

    python -m faults.victims        one JSON object per line in, one out: {"killed_by": 9}, or {"exit": 0}

A child runs the named function of this module with the other keys as arguments. With "after_ms" it is killed from
outside, so long after it has made some progress; else it is left to its own end.
"""

from __future__ import annotations

import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from pathlib import Path
from typing import Any, Self

import torch
from limits import ONE_THREAD

from benchmarks.train import checkpoint
from faults.cases import PATHS, VARIANTS
from faults.harness import Rig
from sam_optim.core import errors, files

ENTRIES = 20_000  # of what is saved again and again: large enough for a kill to come in the middle


class Victims:
    """The forking process, from the side of the tests."""

    def __init__(self) -> None:
        tests = Path(__file__).resolve().parents[1]
        environment = os.environ | {**ONE_THREAD, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
        pipes: dict[str, Any] = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
        self._process = subprocess.Popen([sys.executable, "-m", "faults.victims"], env=environment, **pipes)

    def run(self, name: str, **arguments: Any) -> dict[str, int]:
        self._process.stdin.write(json.dumps({"name": name} | arguments) + "\n")
        self._process.stdin.flush()
        return json.loads(self._process.stdout.readline())

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait()
        self._process.stdout.close()


def train(directory: str, variant: str, path: str, point: str) -> None:
    """Saves after the first step, and is killed at the given point of the second."""
    rig = Rig(VARIANTS[variant], PATHS[path])
    rig.step(0)
    rig.arm(point, "SIGKILL")
    checkpoint.save(Path(directory), {"step": 1, "model": rig.model.state_dict(), "base": rig.optimizer.state_dict()})
    rig.step(1)
    checkpoint.save(Path(directory), {"step": 2, "model": rig.model.state_dict(), "base": rig.optimizer.state_dict()})


def saved(step: int) -> dict[str, Any]:
    return {"step": step, "w": torch.full((ENTRIES,), float(step))}


def save_on_and_on(directory: str, first: int, ready: int) -> None:
    for step in range(first, first + 100_000):
        checkpoint.save(Path(directory), saved(step))
        os.write(ready, b".")


def save_killed_at(directory: str, first: int, call: str) -> None:
    """Killed at one moment of saving: before or after a call of the operating system, or half-way through a write."""
    when, name = call.split()
    checkpoint.save(Path(directory), saved(first))
    checkpoint.save(Path(directory), saved(first + 1))
    real = {"write": open, "unlink": Path.unlink}.get(name) or getattr(os, name)

    def die(*args: Any, **kwargs: Any) -> Any:
        if when == "after":
            real(*args, **kwargs)
        os.kill(os.getpid(), signal.SIGKILL)

    def open_and_die(path: Any, mode: str = "r", **kwargs: Any) -> Any:
        file = real(path, mode, **kwargs)
        write = file.write

        class Half:
            def write(self, content: bytes) -> None:
                write(content[: {"before": 0, "during": len(content) // 2, "after": len(content)}[when]])
                file.flush()
                os.kill(os.getpid(), signal.SIGKILL)

            def __enter__(self) -> Self:
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

        return Half()

    if name == "write":
        files.open = open_and_die  # type: ignore[attr-defined]
    elif name == "unlink":
        Path.unlink = die  # type: ignore[method-assign]
    else:
        setattr(os, name, die)
    checkpoint.save(Path(directory), saved(first + 2))


def command(module: str, argv: list[str], log: str, ready: int | None = None) -> None:
    """A command as from a terminal, its output in a file."""
    if ready is not None:
        os.write(ready, b".")
    output = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 99
    try:
        code = errors.run(importlib.import_module(module).main, argv)
    except Exception:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _serve() -> None:
    for line in sys.stdin:
        request = json.loads(line)
        if request["name"] == "command":
            importlib.import_module(request["module"])  # once, and not in each child
        after_ms = request.pop("after_ms", None)
        if after_ms is not None:
            progress, request["ready"] = os.pipe()
        child = os.fork()
        if child == 0:
            os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
            code = 1
            try:
                globals()[request.pop("name")](**request)
                code = 0
            finally:
                os._exit(code)
        if after_ms is not None:
            os.read(progress, 1)
            time.sleep(after_ms / 1000)
            os.kill(child, signal.SIGKILL)
            os.close(progress)
            os.close(request["ready"])
        _, status = os.waitpid(child, 0)
        is_killed = os.WIFSIGNALED(status)
        result = {"killed_by": os.WTERMSIG(status)} if is_killed else {"exit": os.WEXITSTATUS(status)}
        print(json.dumps(result), flush=True)


if __name__ == "__main__":
    _serve()
