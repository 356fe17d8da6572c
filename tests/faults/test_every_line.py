"""Ctrl-C at every line that a step runs in this package and in Python's contexts."""

from __future__ import annotations

import sys

import pytest
import torch

from faults import tally
from faults.cases import PATHS, VARIANTS, trajectory
from faults.harness import Rig, State, differences, only
from faults.test_grid import next_step

PLACES = ("sam_optim", "contextlib.py")
WHOLE = ("step(closure)", "step([closures])")  # one call is the whole step: all of the state goes back, or forth
CASES = [("sam", p) for p in PATHS if p != "first_step, dropped"] + [
    (v, "step(closure)") for v in ("groups", "flat", "wide", "fused", "replay")
]


def interrupted(rig: Rig, stop: int) -> bool:
    """Whether step 1 was stopped, before line number `stop`."""
    lines = 0

    def trace(frame, event, arg):
        nonlocal lines
        if not any(place in frame.f_code.co_filename for place in PLACES) or frame.f_code.co_name == "__del__":
            return None
        if event == "line":
            lines += 1
            if lines == stop + 1:
                sys.settrace(previous)
                raise KeyboardInterrupt
        return trace

    previous = sys.gettrace()
    sys.settrace(trace)
    try:
        rig.step(1)
    except KeyboardInterrupt:
        return True
    finally:
        sys.settrace(previous)
        torch.set_grad_enabled(True)  # torch's own contexts were interrupted, too
    return False


def check(rig: Rig, clean: list[State], path: str) -> list[str]:
    if rig.path.give_up is not None:
        rig.path.give_up(rig)
    rig.settle()
    state = rig.state()
    kinds = ("weight", "base", "group") + (("buffer",) if path in WHOLE else ())
    by_state = [differences(only(state, *kinds), only(s, *kinds)) for s in clean[1:3]]
    return min(by_state, key=len) + rig.left_open() + next_step(rig, clean)


@pytest.mark.parametrize("every", [53, pytest.param(1, marks=pytest.mark.slow)])
@pytest.mark.parametrize(("variant", "path"), CASES)
def test_ctrl_c_at_each_of_so_many_lines(variant, path, every):
    clean, wrong = trajectory(variant, path), []
    count = 0
    for stop in range(every // 7, 10_000, every):
        rig = Rig(VARIANTS[variant], PATHS[path])
        rig.step(0)
        if not interrupted(rig, stop):
            break
        count += 1
        problems = check(rig, clean, path)
        tally.add(faults=1, wrong=bool(problems))
        if problems:
            wrong.append((stop, problems))
    assert not wrong
    assert count > 10
