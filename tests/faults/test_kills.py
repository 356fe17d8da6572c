"""SIGKILL in a step and while saving: on the disk there is always a checkpoint, whole, of a state that was."""

from __future__ import annotations

import os
import random
import signal
from pathlib import Path

import pytest
import torch

from benchmarks.train import checkpoint
from faults import tally
from faults.cases import PATHS, VARIANTS, trajectory
from faults.harness import POINTS, Rig, differences, only
from faults.victims import Victims, saved

SIGKILL = {"killed_by": signal.SIGKILL}
MOMENTS = [
    "before write",
    "during write",
    "after write",
    "before fsync",
    "after fsync",
    "before replace",
    "after replace",
    "before unlink",
    "after unlink",
]


@pytest.fixture(scope="module")
def victims():
    with Victims() as result:
        yield result


def in_a_step():
    """What is on the disk does not depend on how weights move: each variant and each way of stepping once."""
    for variant in VARIANTS:
        for path in PATHS:
            if variant == "sam" or path == "step(closure)":
                marks = () if (variant, path) == ("sam", "step(closure)") else pytest.mark.slow
                yield pytest.param(variant, path, id=f"{variant}-{path}", marks=marks)


@pytest.mark.parametrize(("variant", "path"), list(in_a_step()))
def test_a_kill_at_any_point_of_a_step_loses_that_step_only(tmp_path, victims, variant, path):
    clean = trajectory(variant, path)
    lost = 0
    for point in POINTS:
        directory = tmp_path / point.replace(" ", "-")
        killed = victims.run("train", directory=str(directory), variant=variant, path=path, point=point)
        newest = checkpoint.newest(directory, missing_ok=True)
        rig = Rig(VARIANTS[variant], PATHS[path])
        if newest is not None:
            rig.model.load_state_dict(newest["model"])
            rig.optimizer.load_state_dict(newest["base"])
        kinds = ("weight", "buffer", "base state", "group")
        lost += (
            killed != SIGKILL or newest is None or bool(differences(only(rig.state(), *kinds), only(clean[1], *kinds)))
        )
        tally.add(kills=1)
    tally.add(kills_lost=lost)
    assert lost == 0


def kept(directory: Path, at_least: int) -> bool:
    """Whether the newest checkpoint is whole, and not older than the last that was finished for certain."""
    newest = checkpoint.newest(directory, missing_ok=True)
    return newest is not None and newest["step"] >= at_least and torch.equal(newest["w"], saved(newest["step"])["w"])


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_kill_at_each_moment_of_saving(tmp_path, victims, moment):
    """The two that were there, then the third; the next run saves over what is left behind."""
    assert victims.run("save_killed_at", directory=str(tmp_path), first=1, call=moment) == SIGKILL
    ok = kept(tmp_path, 2)
    tally.add(save_kills=1, save_lost=not ok)
    assert ok
    checkpoint.save(tmp_path, saved(9))
    assert kept(tmp_path, 9)
    assert all(p.name.startswith("checkpoint-") for p in tmp_path.iterdir())


@pytest.mark.parametrize("kills", [15, pytest.param(200, marks=pytest.mark.slow)])
def test_kills_at_random_times_while_saving(tmp_path, victims, kills):
    """Each child goes on in the directory that the one before has left."""
    draw, last, lost = random.Random(0), 0, 0
    checkpoint.save(tmp_path, saved(0))
    for _ in range(kills):
        after = 1 + 20 * draw.random()
        assert victims.run("save_on_and_on", directory=str(tmp_path), first=last + 1, after_ms=after) == SIGKILL
        ok = kept(tmp_path, last)
        lost += not ok
        last = checkpoint.newest(tmp_path)["step"] if ok else last
    tally.add(save_kills=kills, save_lost=lost)
    assert lost == 0
    assert last >= kills  # each child has saved, and was killed while it went on


def test_saving_is_durable_before_it_is_visible(tmp_path, monkeypatch):
    """A power cut loses what has not been synchronized: content, then name, then the directory that holds the name."""
    calls = []
    for name in ("fsync", "replace"):
        real = getattr(os, name)

        def noted(*args, name=name, real=real):
            is_directory = name == "fsync" and os.path.isdir(f"/proc/self/fd/{args[0]}")
            calls.append("fsync of the directory" if is_directory else name)
            return real(*args)

        monkeypatch.setattr(os, name, noted)
    checkpoint.save(tmp_path, saved(1))
    assert calls == ["fsync", "replace", "fsync of the directory"]
