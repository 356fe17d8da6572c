"""A disk that is full: what was there stays, nothing half-written is left, and the message names path and bytes."""

from __future__ import annotations

import resource
from contextlib import contextmanager
from pathlib import Path

import pytest
import torch

from benchmarks.train import __main__ as train
from benchmarks.train import checkpoint
from faults import tally
from sam_optim.core import errors
from sam_optim.core.errors import InputError
from sam_optim.core.files import write_atomic

RUN = ["--device", "cpu", "--label-noise", "0.4", "--sam-rho", "0.1", "--measures", "none", "--epochs", "2"]


@contextmanager
def largest_file(size: int):
    """No file of this process grows beyond `size` bytes: what a full disk does to a write, without needing a disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def content(directory: Path) -> dict[str, bytes]:
    return {str(p.relative_to(directory)): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def state(step: int) -> dict:
    return {"step": step, "w": torch.full((5000,), float(step))}


@pytest.mark.parametrize("share", [i / 20 for i in range(20)])
def test_a_checkpoint_that_does_not_fit(tmp_path, share):
    for step in (1, 2):
        path = checkpoint.save(tmp_path, state(step))
    before, size = content(tmp_path), path.stat().st_size
    with largest_file(int(share * size)), pytest.raises(InputError) as error:
        checkpoint.save(tmp_path, state(3))
    ok = content(tmp_path) == before and checkpoint.newest(tmp_path)["step"] == 2
    tally.add(full_disks=1, full_lost=not ok)
    assert ok
    assert f"cannot write {size:,} bytes to {tmp_path}/checkpoint-000000003" in str(error.value)
    checkpoint.save(tmp_path, state(3))  # there is room again
    assert checkpoint.newest(tmp_path)["step"] == 3


def test_the_systems_own_full_device():
    """ "No space left on device" from the system itself."""
    with pytest.raises(InputError, match=r"cannot write 8,000 bytes to /dev/full \(No space left on device\)"):
        write_atomic(Path("/dev/full"), b"12345678" * 1000)


@pytest.mark.parametrize("share", [i / 20 for i in range(0, 20, 4)])
def test_a_log_that_does_not_fit(tmp_path, share):
    path, text = tmp_path / "metrics.jsonl", b'{"epoch": 1, "loss": 0.5}\n' * 200
    write_atomic(path, text)
    with largest_file(int(share * len(text))), pytest.raises(InputError, match="cannot write 5,201 bytes to"):
        write_atomic(path, text + b"\n")
    ok = content(tmp_path) == {"metrics.jsonl": text}
    tally.add(full_disks=1, full_lost=not ok)
    assert ok


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    out = tmp_path_factory.mktemp("disk") / "whole"
    assert errors.run(train.main, [*RUN, "--out", str(out)]) == 0
    return out


@pytest.mark.parametrize("size", [0, 300, 3000, 20_000])
def test_a_training_run_on_a_full_disk_goes_on_where_it_was(tmp_path, capsys, whole, size):
    """Exit code 2, one line; with room again --resume ends with the bits of a run that always had room."""
    cut = tmp_path / "cut"
    with largest_file(size):
        code = errors.run(train.main, [*RUN, "--out", str(cut)])
    err = capsys.readouterr().err
    assert code == 2
    assert err.startswith("error: cannot write")
    assert err.count("\n") == 1
    again = ["--resume", "--out", str(cut)] if (cut / "config.json").exists() else [*RUN, "--out", str(cut)]
    assert errors.run(train.main, again) == 0
    a, b = (checkpoint.newest(out / "checkpoints") for out in (whole, cut))
    ok = all(torch.equal(v, b["model"][k]) for k, v in a["model"].items())
    tally.add(full_disks=1, full_lost=not ok)
    assert ok
