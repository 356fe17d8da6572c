"""benchmarks.tune: both arms on held-out data, from where it was stopped, with an honest last line."""

import json
import re
import signal

import pytest

pytest.importorskip("optuna")

from benchmarks import tune
from benchmarks.command import Interrupted
from benchmarks.paired import difference
from benchmarks.train import options as train_options
from benchmarks.tune import Chosen, Tuned
from sam_optim.core.errors import InputError

RHOS, DECAYS = (0.05, 0.1, 0.2), (0.001, 0.01)


@pytest.fixture(autouse=True)
def one_thread():
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def options(out, *more):
    argv = ["--data", "digits", "--train-examples", "200", "--epochs", "9", "--lr", "0.2", "--device", "cpu"]
    return train_options.parse([*argv, *more, "--out", str(out)])


def test_it_goes_on_where_it_was_stopped(tmp_path, monkeypatch):
    """Stopped after each 7th epoch, again and again: the numbers of a tuning that went through, and no run twice."""
    whole = tune.tune(options(tmp_path / "whole"), rhos=RHOS, decays=DECAYS, num_seeds=2)
    assert whole.sam.value in RHOS
    assert whole.base.value in DECAYS
    assert whole.sam.low <= whole.sam.value <= whole.sam.high
    assert whole.sam.num_trials == 3
    assert len(whole.sam.tests) == 2
    gains = [100 * (a - b) for a, b in zip(whole.sam.tests, whole.base.tests, strict=True)]
    assert whole.gain.mean == pytest.approx(sum(gains) / 2)

    epochs, stops = 0, 0

    def check():
        nonlocal epochs
        epochs += 1
        if epochs % 14 == 0:
            raise Interrupted(signal.SIGINT)

    while True:
        try:
            resumed = tune.tune(options(tmp_path / "stopped"), rhos=RHOS, decays=DECAYS, num_seeds=2, check=check)
            break
        except Interrupted:
            stops += 1
    assert stops >= 2
    assert resumed == whole
    written = json.loads((tmp_path / "stopped" / "tuned.json").read_text())
    assert written["sam"]["value"] == whole.sam.value
    monkeypatch.setattr(tune, "train", None)  # all is there already
    assert tune.tune(options(tmp_path / "whole"), rhos=RHOS, decays=DECAYS, num_seeds=2) == whole


def test_other_options_are_refused_and_nothing_is_trained(tmp_path, monkeypatch):
    tune.tune(options(tmp_path), rhos=(0.1,), decays=(0.0,), num_seeds=1)
    monkeypatch.setattr(tune, "train", None)
    with pytest.raises(InputError, match="another lr"):
        tune.tune(options(tmp_path, "--lr", "0.1"), rhos=(0.1,), decays=(0.0,), num_seeds=1)
    for arguments in ({"rhos": ()}, {"rhos": (0.0,)}, {"num_seeds": 0}):
        with pytest.raises(InputError, match="needs rhos"):
            tune.tune(options(tmp_path), **arguments)


def test_a_value_that_diverges_is_not_chosen(tmp_path):
    tuned = tune.tune(options(tmp_path, "--lr", "0.5"), rhos=(0.05,), decays=(0.001, 1e6), num_seeds=1)
    assert tuned.base.value == 0.001
    assert tuned.base.num_trials == 2
    assert tuned.base.num_stopped == 1


@pytest.mark.parametrize(
    ("sam", "base", "words"),
    [
        ([0.9, 0.92, 0.91], [0.8, 0.81, 0.82], r"\+10.0 points, 95 % interval .*\. SAM is better"),
        ([0.8, 0.81, 0.82], [0.9, 0.92, 0.91], r"-10.0 points, 95 % interval .*\. SAM is not worth it"),
        ([0.8, 0.9, 0.85], [0.85, 0.84, 0.86], "No difference seen, so SAM is not shown to be worth"),
        ([0.9], [0.8], "No interval, so neither is shown to be better"),
    ],
)
def test_the_line_at_the_end(sam, base, words):
    arms = [Chosen(*about, 0.05, 0.2, 0.9, 7, 4, tuple(t)) for about, t in (
        (("sam", "sam_rho", 0.1), sam), (("base", "weight_decay", 0.1), base))]  # fmt: skip
    line = str(Tuned(*arms, difference(*([100 * x for x in t] for t in (sam, base)))))
    assert "SAM, rho 0.1 (0.05 to 0.2): test accuracy" in line
    assert "\n" not in line
    assert re.search(words, line)


def test_the_command(tmp_path, capsys):
    arguments = "--data digits --train-examples 120 --epochs 2 --device cpu --rhos 0.1 --decays 0.01 --num-seeds 1"
    assert tune.main([*arguments.split(), "--out", str(tmp_path)]) == 0
    assert capsys.readouterr().out.splitlines()[-1].startswith("SAM, rho 0.1 (0.1 to 0.1): test accuracy")
