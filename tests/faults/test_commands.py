"""Two commands with one output, and commands that are killed at random times: nothing is lost or half written."""

from __future__ import annotations

import json
import random
import re
import shutil
import signal
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from test_frontier import PLAN

from faults import tally
from faults.victims import Victims
from sam_optim.core.files import read_json
from sam_optim.sweep import store

pytest.importorskip("timm")
pytestmark = pytest.mark.slow
TRAIN, MEASURE, STUDY = "benchmarks.train.__main__", "sam_optim.cli", "benchmarks.study.__main__"
FRONTIER = "benchmarks.frontier.__main__"
RUN = ["--epochs", "3", "--train-examples", "400", "--checkpoint-steps", "2", "--measures", "none", "--lr", "0.05"]
SMALL = """name = "small"
[grid]
lr = [0.05, 0.1]
seed = [0, 1]
[fixed]
epochs = 2
train_examples = 200
"""


@pytest.fixture(scope="module")
def two():
    with Victims() as first, Victims() as second:
        yield first, second


class Commands:
    """Commands in a directory: alone, killed, and two at a time."""

    def __init__(self, directory, victims):
        self.directory, self._victims, self._draw = directory, victims, random.Random(0)

    def log(self, number=0):
        return (self.directory / f"log{number}").read_text()

    def run(self, module, *argv, number=0, **more):
        log = str(self.directory / f"log{number}")
        return self._victims[number].run("command", module=module, argv=[str(a) for a in argv], log=log, **more)

    def passes(self, module, *argv):
        """How long it takes."""
        started = time.monotonic()
        assert self.run(module, *argv) == {"exit": 0}, self.log()
        return time.monotonic() - started

    def both(self, module, a, b, seconds):
        """Exit codes of two commands, the second of which begins up to so many seconds later."""
        with ThreadPoolExecutor(2) as pool:
            first = pool.submit(self.run, module, *a)
            time.sleep(self._draw.choice([0, seconds * self._draw.random()]))
            second = pool.submit(self.run, module, *b, number=1)
            return first.result()["exit"], second.result()["exit"]

    def killed(self, module, *argv, seconds):
        """Whether it was killed before its end, at a random time."""
        ended = self.run(module, *argv, after_ms=1000 * seconds * self._draw.random())
        assert ended in ({"killed_by": signal.SIGKILL}, {"exit": 0}), self.log()
        return "killed_by" in ended


@pytest.fixture
def commands(tmp_path, two):
    return Commands(tmp_path, two)


def result(out):
    """The last line of a training that two runs with the same options share."""
    line = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])
    return {k: v for k, v in line.items() if "loss" in k or "accuracy" in k}


def is_holder_named(log):
    return re.fullmatch(r"error: .* is being written by process \d+; wait for it, or choose another .*\n", log)


@pytest.mark.parametrize("force", [[], ["--force"]], ids=["new", "force"])
def test_two_trainings_with_one_out(tmp_path, commands, force):
    seconds = [commands.passes(TRAIN, *RUN, "--seed", s, "--out", tmp_path / f"alone{s}") for s in range(2)]
    out, both = tmp_path / "run", 0
    for _ in range(8):
        shutil.rmtree(out, ignore_errors=True)
        argv = [[*RUN, "--seed", s, "--out", out, *force] for s in range(2)]
        codes = commands.both(TRAIN, *argv, seconds=min(seconds))
        for number, code in enumerate(codes):
            if code:
                log = commands.log(number)
                assert code == 2
                assert is_holder_named(log) or (not force and log.count("\n") == 1 and "is not empty" in log), log
        seed = read_json(out / "config.json")["options"]["seed"]
        assert codes[seed] == 0
        assert force or sorted(codes) == [0, 2]
        assert result(out) == result(tmp_path / f"alone{seed}")  # of one run, not a mixture of both
        both += codes == (0, 0)
    assert both < 8


def measure(folder, *runs, measures="trace"):
    paths = [folder / name for name in runs]
    return ["measure", *paths, "--data", "digits", "--measures", measures, "--num-probes", 10, "--quiet"]


def test_two_measures_with_one_json(tmp_path, commands):
    for s in range(2):
        commands.passes(TRAIN, *RUN, "--seed", s, "--out", tmp_path / f"run{s}")
    path, lost = tmp_path / "o.json", 0
    seconds = commands.passes(MEASURE, *measure(tmp_path, "run0"), "--json", path)
    for _ in range(40):
        path.unlink()
        a, b = ([*measure(tmp_path, f"run{s}"), "--json", path] for s in range(2))
        codes = commands.both(MEASURE, a, b, seconds=1.3 * seconds)
        assert all(is_holder_named(commands.log(k)) for k, code in enumerate(codes) if code), codes
        names = {entry["checkpoint"] for entry in store.read(path)}
        lost += names != {str(tmp_path / f"run{k}") for k, code in enumerate(codes) if code == 0}
    assert lost == 0


def test_a_killed_training_goes_on(tmp_path, commands):
    seconds = commands.passes(TRAIN, *RUN, "--out", tmp_path / "alone")
    out, kills, lost = tmp_path / "run", 0, 0
    for _ in range(12):
        shutil.rmtree(out, ignore_errors=True)
        kills += commands.killed(TRAIN, *RUN, "--out", out, seconds=seconds)
        begun = (out / "config.json").exists()
        commands.passes(TRAIN, *RUN, "--out", out, "--resume" if begun else "--force")
        lost += result(out) != result(tmp_path / "alone") or len((out / "metrics.jsonl").read_text().splitlines()) != 3
    tally.add(command_kills=kills, command_lost=lost)
    assert lost == 0
    assert kills > 0


def test_a_killed_measure_goes_on(tmp_path, commands):
    for s in range(2):
        commands.passes(TRAIN, *RUN, "--seed", s, "--out", tmp_path / f"run{s}")
    first, path = tmp_path / "first.json", tmp_path / "o.json"
    commands.passes(MEASURE, *measure(tmp_path, "run0"), "--json", first)
    argv = [*measure(tmp_path, "run0", "run1", measures="trace,frobenius"), "--json", path]
    seconds, kills, lost = commands.passes(MEASURE, *argv), 0, 0
    for _ in range(20):
        shutil.copy(first, path)
        kills += commands.killed(MEASURE, *argv, seconds=seconds)
        then = store.read(path)
        lost += any(entry not in then for entry in store.read(first))
        commands.passes(MEASURE, *argv)
        final = store.read(path)
        lost += len(final) != 4 or any(entry not in final for entry in then)
    tally.add(command_kills=kills, command_lost=lost)
    assert lost == 0
    assert kills > 0


def test_a_killed_study_goes_on(tmp_path, commands):
    pytest.importorskip("optuna")
    (tmp_path / "s.toml").write_text(SMALL)
    argv = ["run", tmp_path / "s.toml", "--heartbeat", 1, "--grace", 2, "--out"]
    seconds, kills, out = commands.passes(STUDY, *argv, tmp_path / "alone"), 0, tmp_path / "study"
    for _ in range(4):
        kills += commands.killed(STUDY, *argv, out, seconds=seconds / 2)
    commands.passes(STUDY, *argv, out)
    commands.passes(STUDY, "status", tmp_path / "s.toml", "--out", out)
    lost = "4 of 4" not in commands.log()
    for folder in ("study", "alone"):
        commands.passes(STUDY, "report", tmp_path / "s.toml", "--targets", "test_error", "--out", tmp_path / folder)
    tally.add(command_kills=kills, command_lost=lost)
    assert not lost
    assert kills > 0


def test_a_killed_comparison_goes_on(tmp_path, commands):
    (tmp_path / "p.toml").write_text(PLAN)
    argv = ["run", tmp_path / "p.toml", "--out"]
    seconds, kills = commands.passes(FRONTIER, *argv, tmp_path / "alone"), 0
    for _ in range(6):
        kills += commands.killed(FRONTIER, *argv, tmp_path / "killed", seconds=seconds / 2)
    commands.passes(FRONTIER, *argv, tmp_path / "killed")

    def records(folder):
        paths = sorted((tmp_path / folder / "small" / "records").glob("*.json"))
        return [{k: v for k, v in read_json(p).items() if k not in ("cpu_seconds", "provenance")} for p in paths]

    lost = records("killed") != records("alone")
    tally.add(command_kills=kills, command_lost=lost)
    assert not lost
    assert kills > 0
