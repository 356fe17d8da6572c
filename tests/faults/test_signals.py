"""A checkpoint, an average of the weights or an evaluation that comes in the middle of a step sees clean weights."""

from __future__ import annotations

import random
import signal
import sys
import threading
from contextlib import contextmanager

import pytest
import torch

from faults import tally
from faults.cases import PATHS, VARIANTS, every_case, with_batchnorm
from faults.harness import POINTS, UPDATED, Rig, State, bits, differences, only
from sam_optim import Perturbation

HERE = ("sam_optim", "faults")


def saved_state(rig: Rig) -> State:
    """What a checkpoint of the model holds, in the words of `Rig.state`."""
    buffers = dict(rig.model.named_buffers())
    return {f"{'buffer' if k in buffers else 'weight'} {k}": bits(v) for k, v in rig.model.state_dict().items()}


class Saver:
    """Takes checkpoints in the middle of steps and says which are polluted.

    The weights of one must be those of the last step that was finished or of the one that is going on, and each buffer
    must be as some first pass has left it: no first pass knows of w + e.
    """

    def __init__(self, rig: Rig):
        self.rig = rig
        self.taken: list[tuple[int, State]] = []
        self.now = 0  # steps that are finished

    def save(self, *_) -> None:
        self.taken.append((self.now, saved_state(self.rig)))

    def polluted(self, clean: list[State], buffers: set[tuple[str, bytes]]) -> int:
        wrong = 0
        for i, result in self.taken:
            weights = only(result, "weight")
            known = any(weights == only(clean[k], "weight") for k in (i, min(i + 1, len(clean) - 1)))
            wrong += not (known and set(only(result, "buffer").items()) <= buffers)
        return wrong


def clean_run(variant: str, path: str, num_steps: int) -> tuple[list[State], set[tuple[str, bytes]]]:
    """The states between the steps, and all values that buffers have at the ends of first passes."""
    rig = Rig(VARIANTS[variant], PATHS[path])
    states, buffers = [rig.state()], set(only(rig.state(), "buffer").items())
    original = rig.reach

    def reach(point, gradient=None):
        if point == "end of pass 1":
            buffers.update(only(rig.state(), "buffer").items())
        return original(point, gradient)

    rig.reach = rig.base.reach = reach
    for i in range(num_steps):
        rig.step(i)
        states.append(rig.state())
    return states, buffers


with_module = [v for v in VARIANTS if v != "no module"]


@pytest.mark.parametrize(
    ("variant", "path"), [(v, "step(closure)") for v in with_module] + [("sam", p) for p in list(PATHS)[1:]]
)
def test_a_checkpoint_at_every_line_of_a_step(variant, path):
    """Python runs signal handlers between any two lines: here all of them, in this package and in what calls it."""
    clean, buffers = clean_run(variant, path, 3)
    rig = Rig(VARIANTS[variant], PATHS[path])
    saver = Saver(rig)
    rig.step(0)
    saver.now = 1

    def trace(frame, event, arg):
        name = frame.f_code.co_filename
        if not any(place in name for place in HERE) or frame.f_code.co_name in ("state", "bits"):
            return None
        if event == "line":
            saver.save()
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        rig.step(1)
    finally:
        sys.settrace(previous)
    saver.now = 2
    saver.save()
    assert len(saver.taken) > 100
    polluted = saver.polluted(clean, buffers)
    tally.add(signals=len(saver.taken), polluted=polluted)
    assert polluted == 0
    assert not differences(rig.state(), clean[2])


@contextmanager
def random_signals(handler, *, seed: int):
    """SIGUSR1 to this process, again and again, at random times of up to 3 ms."""
    draw, done = random.Random(seed), threading.Event()

    def send():
        while not done.wait(0.003 * draw.random()):
            signal.raise_signal(signal.SIGUSR1)

    before = signal.signal(signal.SIGUSR1, handler)
    sender = threading.Thread(target=send)
    sender.start()
    try:
        yield
    finally:
        done.set()
        sender.join()
        signal.signal(signal.SIGUSR1, before)


@pytest.mark.parametrize("path", ["step(closure)", "microbatch()"])
@pytest.mark.parametrize("variant", ["foreach", "fused"])
def test_checkpoints_from_handlers_of_real_signals(variant, path):
    """The base's own update is one operation here: a for-loop that is interrupted half-way has updated half."""
    rig = Rig(VARIANTS[variant], PATHS[path])
    saver = Saver(rig)
    with random_signals(saver.save, seed=0):
        while len(saver.taken) < 100:
            rig.step(saver.now)
            saver.now += 1
    clean, buffers = clean_run(variant, path, saver.now)
    polluted = saver.polluted(clean, buffers)
    tally.add(signals=len(saver.taken), polluted=polluted)
    assert polluted == 0
    assert not differences(rig.state(), clean[-1])


@every_case
def test_a_handler_that_only_saves_changes_nothing_and_saves_what_can_be_resumed(variant, path):
    """At each point of a step: the step ends as if no signal had come; weights and base state saved are one state."""
    if not VARIANTS[variant].with_module:
        pytest.skip("without module= nobody can hand out clean weights")
    clean, buffers = clean_run(variant, path, 3)
    wrong = []
    for point in POINTS:
        rig = Rig(VARIANTS[variant], PATHS[path])
        rig.step(0)
        rig.arm(point, "save")
        error = rig.attempt(1)
        problems = [] if error is None and rig.fired == 1 else [repr(error)]
        problems += differences(rig.state(), clean[2]) + rig.left_open()
        resumed = Rig(rig.variant, rig.path)
        resumed.model.load_state_dict(rig.saved["model"])
        resumed.optimizer.load_state_dict(rig.saved["base"])
        result, truth = resumed.state(), clean[2] if point in UPDATED else clean[1]
        problems += differences(only(result, "weight", "base", "group"), only(truth, "weight", "base", "group"))
        problems += [str(k) for k, _ in set(only(result, "buffer").items()) - buffers]
        tally.add(signals=1, polluted=bool(problems))
        if problems:
            wrong.append((point, problems))
    assert not wrong


def test_evaluation_while_perturbed_warns_once_and_a_frozen_mode_does_not():
    model, x = with_batchnorm(), torch.ones(4, 4)
    sam = Perturbation(model, rho=0.1)
    model(x).square().sum().backward()
    with sam.perturbed():
        model(x)  # as the second pass does
        model.eval()
        with pytest.warns(UserWarning, match="evaluated while its weights are perturbed"):
            model(x)
        model(x)  # warned once
        model.train()
    model.eval()
    model(x).square().sum().backward()
    with sam.perturbed():  # fine-tuning with frozen statistics is in this mode all the time
        model(x).square().sum().backward()
    assert not model._forward_pre_hooks
