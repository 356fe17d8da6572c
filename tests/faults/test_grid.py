"""Every point x every kind of fault x every variant x every way of stepping: all or nothing."""

from __future__ import annotations

from faults import tally
from faults.cases import PATHS, VARIANTS, every_case, trajectory
from faults.harness import POINTS, RAISING, UPDATED, Rig, State, differences, only, raised_by


def expected_after(rig: Rig) -> State:
    """What a fault at this point has to leave."""
    if rig.point in rig.path.inside:
        return rig.marked
    if rig.point in rig.path.open:  # the caller gives the pass up: weights and buffers are those before it
        return rig.at_fault | only(rig.marked, "weight", "buffer")
    return rig.at_fault  # nothing of SAM's is going on, and nothing of it may change a thing


def check(rig: Rig, error: BaseException | None, clean: list[State]) -> list[str]:
    """What is wrong after the fault in step 1, and after one more step."""
    problems = [] if rig.fired == 1 else [f"the fault came {rig.fired} times"]
    if not raised_by(rig.kind, error):
        problems.append(f"raised {error!r}")
    error = None
    if rig.perturbation.active and rig.path.give_up is not None:
        rig.path.give_up(rig)
    state = rig.state()
    problems += differences(state, expected_after(rig))
    which = clean[2] if rig.point in UPDATED else clean[1]
    problems += differences(only(state, "weight", "base", "group"), only(which, "weight", "base", "group"))
    problems += rig.left_open()
    rig.settle()
    return problems + next_step(rig, clean)


def next_step(rig: Rig, clean: list[State]) -> list[str]:
    """A step from here is that of a run that was never disturbed, or of one that was resumed here."""
    if not differences(rig.state(), clean[1]):
        rig.step(1)
        return differences(rig.state(), clean[2])
    twin = Rig(rig.variant, rig.path)
    twin.load(rig)
    twin.step(2)
    rig.step(2)
    return differences(rig.state(), twin.state()) + rig.left_open()


@every_case
def test_after_a_fault_all_is_as_before_the_step_or_as_after_it(variant, path):
    clean, wrong = trajectory(variant, path), []
    for point in POINTS:
        for kind in RAISING:
            rig = Rig(VARIANTS[variant], PATHS[path])
            rig.step(0)
            rig.arm(point, kind)
            problems = check(rig, rig.attempt(1), clean)
            tally.add(faults=1, wrong=bool(problems))
            if problems:
                wrong.append((point, kind, problems))
    assert not wrong
