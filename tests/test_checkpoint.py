"""Checkpoints: whole or absent, verified, harmless."""

from __future__ import annotations

import errno
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from benchmarks.command import read_jsonl
from benchmarks.train import checkpoint
from sam_optim.core.errors import InputError
from sam_optim.core.files import read_json, write_atomic, write_json


def state(step: int) -> dict:
    return {"step": step, "model": {"w": torch.full((50,), float(step))}, "name": "run"}


def test_what_was_saved_is_loaded(tmp_path):
    loaded = checkpoint.load(checkpoint.save(tmp_path, state(7)))
    assert loaded["step"] == 7
    assert loaded["name"] == "run"
    assert torch.equal(loaded["model"]["w"], state(7)["model"]["w"])


def test_a_checkpoint_is_a_plain_torch_file(tmp_path):
    assert torch.load(checkpoint.save(tmp_path, state(3)), weights_only=True)["step"] == 3


def test_the_last_two_are_kept_and_leftovers_of_kills_removed(tmp_path):
    (tmp_path / ".checkpoint-000000001-0.pt.123.tmp").write_bytes(b"half")
    for step in (1, 5, 20):
        checkpoint.save(tmp_path, state(step))
    assert [p.name[:20] for p in checkpoint.newest_first(tmp_path)] == ["checkpoint-000000020", "checkpoint-000000005"]
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("kind", ["cut", "flip", "zeros", "empty", "longer"])
def test_every_damage_is_refused_and_the_previous_one_used(tmp_path, capsys, kind):
    checkpoint.save(tmp_path, state(1))
    path = checkpoint.save(tmp_path, state(2))
    content, draw = path.read_bytes(), random.Random(0)
    for _ in range(60):
        damaged = bytearray(content)
        at = draw.randrange(len(content) - 64)
        if kind == "cut":
            del damaged[at:]
        elif kind == "flip":
            damaged[at] ^= 1 << draw.randrange(8)
        elif kind == "zeros":
            damaged[at : at + 64] = bytes(b ^ 255 for b in damaged[at : at + 64])
        elif kind == "empty":
            damaged.clear()
        else:
            damaged.append(0)
        path.write_bytes(damaged)
        with pytest.raises(InputError, match="is damaged"):
            checkpoint.load(path)
        assert checkpoint.newest(tmp_path)["step"] == 1
        assert "is damaged" in capsys.readouterr().err


def test_no_valid_checkpoint_left_is_an_error_that_names_them(tmp_path):
    path = checkpoint.save(tmp_path, state(1))
    path.write_bytes(b"")
    with pytest.raises(InputError, match=f"{path.name} is damaged.*--force"):
        checkpoint.newest(tmp_path)


def test_none_is_an_error_unless_it_may_be_missing(tmp_path):
    with pytest.raises(InputError, match="train first"):
        checkpoint.newest(tmp_path / "nowhere")
    assert checkpoint.newest(tmp_path, missing_ok=True) is None


class Malice:
    def __reduce__(self):
        return os.mkdir, ("harmed",)


def test_a_pickle_that_would_run_something_is_refused(tmp_path, monkeypatch):
    """Also with a right SHA-256 in its name."""
    monkeypatch.chdir(tmp_path)
    path = checkpoint.save(tmp_path, state(1) | {"extra": Malice()})
    with pytest.raises(InputError, match=r"holds more than weights: it refers to .*nothing in it was run"):
        checkpoint.load(path)
    assert not Path("harmed").exists()


def test_a_renamed_checkpoint_is_refused(tmp_path):
    path = checkpoint.save(tmp_path, state(1))
    with pytest.raises(InputError, match="renamed"):
        checkpoint.load(path.rename(tmp_path / "best.pt"))


def test_a_full_disk_leaves_the_old_file_and_names_path_and_bytes(tmp_path, monkeypatch):
    checkpoint.save(tmp_path, state(1))
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(_):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match=r"cannot write [\d,]+ bytes to .*checkpoint-000000002.*No space left"):
        checkpoint.save(tmp_path, state(2))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == before


KILLED = """
import sys, torch
from pathlib import Path
from benchmarks.train import checkpoint
for step in range(1, 10**6):
    checkpoint.save(Path(sys.argv[1]), {"step": step, "w": torch.full((500_000,), float(step))})
    print("saved", flush=True)
"""


@pytest.mark.parametrize("kills", [2, pytest.param(40, marks=pytest.mark.slow)])
def test_a_kill_during_saving_always_leaves_a_valid_checkpoint(tmp_path, kills):
    """One process for each kill, and it takes a while to import torch."""
    draw = random.Random(0)
    for _ in range(kills):
        process = subprocess.Popen([sys.executable, "-c", KILLED, str(tmp_path)], stdout=subprocess.PIPE)
        with process:
            assert process.stdout.readline() == b"saved\n"
            time.sleep(0.2 * draw.random())
            process.send_signal(signal.SIGKILL)
        newest = checkpoint.newest(tmp_path)
        assert torch.equal(newest["w"], torch.full((500_000,), float(newest["step"])))
        for path in checkpoint.newest_first(tmp_path):
            path.unlink()


def test_json_is_strict_and_atomic(tmp_path):
    path = tmp_path / "x.json"
    write_json(path, {"a": 1})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert read_json(path) == {"a": 1}
    assert [p.name for p in tmp_path.iterdir()] == ["x.json"]


def test_a_log_that_was_cut_anywhere_in_its_last_line_keeps_the_others(tmp_path):
    path, text = tmp_path / "m.jsonl", '{"epoch": 1}\n{"epoch": 2, "loss": 0.5}\n'
    for end in range(len('{"epoch": 1}\n'), len(text)):
        write_atomic(path, text[:end].encode())
        assert read_jsonl(path)[0] == {"epoch": 1}
    path.write_text('{"epo\n{"epoch": 2}\n')
    with pytest.raises(InputError, match="line 1 is not valid JSON"):
        read_jsonl(path)
