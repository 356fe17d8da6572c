"""Ctrl-C and SIGTERM to a training run at random times: it saves all that is done, says so, and goes on bit for bit."""

from __future__ import annotations

import hashlib
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from limits import ONE_THREAD, PATIENCE

from benchmarks.train import __main__ as train
from benchmarks.train import checkpoint
from benchmarks.train.run import Training
from faults import tally
from faults.harness import bits
from sam_optim.core import errors

RUN = [
    "--device",
    "cpu",
    "--label-noise",
    "0.4",
    "--sam-rho",
    "0.1",
    "--measures",
    "none",
    "--epochs",
    "6",
    "--momentum",
    "0.9",
]
CODES = {signal.SIGINT: 130, signal.SIGTERM: 143}


@pytest.fixture(autouse=True)
def one_thread():
    """The bits of a sum depend on how many threads share it."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def digest(model: dict[str, torch.Tensor]) -> str:
    return hashlib.sha256(b"".join(bits(v) for v in model.values())).hexdigest()


def run(*options: str) -> int:
    return errors.run(train.main, list(options))


def whole(out: Path, monkeypatch) -> dict[int, str]:
    """A run without stops: the weights and buffers after each update."""
    result, after_update = {}, Training._after_update

    def noting(self, batch):
        result[self.position.updates + 1] = digest(self.model.state_dict())
        after_update(self, batch)

    with monkeypatch.context() as patch:
        patch.setattr(Training, "_after_update", noting)
        assert run(*RUN, "--out", str(out)) == 0
    return result


class Stopper:
    """Sends a signal to this process at a random time of the training that begins next."""

    def __init__(self, seed: int):
        self._draw = random.Random(seed)
        self.signum = signal.SIGINT

    def around(self, training_run):
        def stopped(training, signals):
            self.signum = self._draw.choice(list(CODES))
            timer = threading.Timer(0.1 * self._draw.random(), os.kill, (os.getpid(), self.signum))
            timer.start()
            try:
                training_run(training, signals)
            finally:
                timer.cancel()
                timer.join()

        return stopped


@pytest.mark.parametrize("signals", [10, pytest.param(200, marks=pytest.mark.slow)])
def test_signals_at_random_times_lose_nothing(tmp_path, monkeypatch, capsys, signals):
    weights = whole(tmp_path / "whole", monkeypatch)
    truth = checkpoint.newest(tmp_path / "whole" / "checkpoints")
    stopper, sent, lost, runs = Stopper(0), 0, 0, 0
    monkeypatch.setattr(Training, "run", stopper.around(Training.run))
    while sent < signals:
        runs += 1
        out = tmp_path / f"cut{runs}"
        code = run(*RUN, "--out", str(out))
        while code:
            sent += 1
            error = capsys.readouterr().err
            result = checkpoint.newest(out / "checkpoints", missing_ok=True)
            done = re.search(r"stopped by SIG(?:INT|TERM) after (\d+) updates; all are saved", error)
            ok = code == CODES[stopper.signum] and done is not None and result is not None
            ok = (
                ok
                and result["step"] == int(done[1])
                and (not int(done[1]) or digest(result["model"]) == weights[result["step"]])
            )
            tally.add(stops=1, stops_lost=not ok)
            lost += not ok
            code = run("--resume", "--out", str(out))
        final = checkpoint.newest(out / "checkpoints")
        same = digest(final["model"]) == digest(truth["model"]) and final["position"] == truth["position"]
        lost += not same
        tally.add(stops_lost=not same)
    assert lost == 0


@pytest.mark.parametrize(
    "signum", [signal.SIGTERM, pytest.param(signal.SIGINT, marks=pytest.mark.slow)], ids=lambda s: s.name
)
def test_a_second_signal_to_a_real_process_ends_it_at_once(tmp_path, signum):
    """The first is being answered by a write that takes long; the second does not wait for it."""
    slow_write = (
        "import signal, time; from sam_optim.core import errors;"
        "from benchmarks.train import checkpoint, __main__ as train;"
        "signal.signal(signal.SIGINT, signal.default_int_handler);"  # shells ignore it in the background
        "save = checkpoint.save;"
        "checkpoint.save = lambda *a: (print('saving', flush=True), time.sleep(3600));"
        "raise SystemExit(errors.run(train.main))"
    )
    arguments = [sys.executable, "-c", slow_write, *RUN, "--epochs", "500", "--out", str(tmp_path / "run")]
    environment = os.environ | ONE_THREAD
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    with subprocess.Popen(arguments, text=True, env=environment, **pipes) as process:
        assert any(line.startswith("saving") for line in process.stdout)
        process.send_signal(signum)
        time.sleep(0.2)
        process.send_signal(signum)
        process.wait(timeout=PATIENCE)  # a third of what the write would take
    assert process.returncode in (CODES[signum], -signum)
