"""Gradients, losses and batches that are not finite: no weight follows them, and the next step is as if they had never
been."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import nn

from faults import tally
from faults.cases import PATHS, VARIANTS, every_case
from faults.control import Control
from faults.harness import POINTS, POISON, Rig, differences, only
from sam_optim import ASAM, SAM

# the policy warns of the first step that it leaves out
pytestmark = pytest.mark.filterwarnings("ignore:a gradient at w")


def effect(rig: Rig) -> str | None:
    """What a value that is not finite at this point has to do: "none", "skipped"; None: not SAM's."""
    if rig.point in ("before pass 1", "after step"):
        is_accumulated = rig.point == "before pass 1" and not rig.path.mean_at_end
        return "skipped" if is_accumulated else "none"  # else it is zeroed before it is used
    return "skipped" if rig.point in POINTS[1:6] else None  # also at w: the gradient at w + e is not finite either


@every_case
def test_no_weight_follows_a_value_that_is_not_finite(variant, path):
    wrong = []
    for point in POINTS:
        for kind in POISON:
            rig = Rig(VARIANTS[variant], PATHS[path])
            rig.arm(point, kind)
            expected = effect(rig)
            by_user = not rig.path.wrapped and rig.scaler is None  # a plain optimizer skips nothing
            if expected is None or (expected == "skipped" and by_user):
                continue
            problems = compare(rig, skip=expected == "skipped")
            tally.add(poisoned=1, poisoned_wrong=bool(problems))
            if problems:
                wrong.append((point, kind, problems))
    assert not wrong


def compare(rig: Rig, *, skip: bool) -> list[str]:
    """Three steps, the second with the bad value, against the same by hand."""
    control = Control(rig)
    control.step(0)
    control.step(1, skip=skip)
    truth = [control.state()]
    control.step(2)
    truth.append(control.state())
    rig.point, point = None, rig.point
    rig.step(0)
    rig.point, before = point, rig.state()
    error = rig.attempt(1)
    problems = [] if error is None else [repr(error)]
    states = [rig.state()]
    rig.step(2)
    states.append(rig.state())
    for a, b in zip(states, truth, strict=True):
        problems += differences(*(only(s, "weight", "buffer", "base", "scaler") for s in (a, b)))
    if skip:
        problems += differences(only(states[0], "weight", "base"), only(before, "weight", "base"))
    num_skipped = int(getattr(rig.optimizer, "num_skipped", 0))
    if num_skipped != (skip and rig.scaler is None):  # GradScaler counts its own
        problems.append(f"num_skipped {num_skipped}")
    return problems + rig.left_open()


KINDS = {
    "sam": functools.partial(SAM, rho=0.3),
    "asam": functools.partial(ASAM, rho=0.3),
    "filter": functools.partial(SAM, rho=0.3, adaptive="filter"),
    "layer": functools.partial(SAM, rho=0.1, adaptive="layer"),
    "inf": functools.partial(SAM, rho=0.05, norm=math.inf),
    "foreach": functools.partial(SAM, rho=0.3, foreach=True),
}
DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16)


def small_network(dtype):
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.LayerNorm(5), nn.Tanh(), nn.Linear(5, 3)).to(dtype)


def in_turn(kind: str, dtype: torch.dtype):
    """For each parameter: SAM, a model for it, and the closure that puts `bad` into one entry of its gradient in the
    pass that is asked for."""
    x = torch.randn(8, 4, generator=torch.Generator().manual_seed(1)).to(dtype)
    for j in range(6):
        model = small_network(dtype)
        optimizer = KINDS[kind](model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, module=model)

        def closure(bad=None, bad_pass=0, j=j, model=model, optimizer=optimizer, calls=[]):  # noqa: B006
            calls.append(1)
            optimizer.zero_grad()
            loss = model(x).float().square().mean()
            loss.backward()
            if bad is not None and 2 - len(calls) % 2 == (1 if bad_pass == 1 else 2):
                list(model.parameters())[j].grad.view(-1)[-1] = bad
            return loss

        yield optimizer, model, closure


@pytest.mark.filterwarnings("ignore:only .* survives the rounding")
@pytest.mark.parametrize("bad_pass", [1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(
    "kind", [k if k in ("sam", "asam", "foreach") else pytest.param(k, marks=pytest.mark.slow) for k in KINDS]
)
def test_one_bad_entry_of_each_parameter_in_turn_stops_the_update(kind, dtype, bad_pass):
    wrong = 0
    for bad in (math.nan, -math.inf):
        for optimizer, model, closure in in_turn(kind, dtype):
            for _ in range(3):
                optimizer.step(functools.partial(closure, bad, bad_pass))
            stood = all(
                torch.equal(p, q) for p, q in zip(model.parameters(), small_network(dtype).parameters(), strict=True)
            )
            stood &= not optimizer.state
            stood &= int(optimizer.num_skipped) == 3
            tally.add(poisoned=3, poisoned_wrong=0 if stood else 3)
            wrong += not stood
    assert wrong == 0


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("bad_pass", [1, 2])
def test_the_step_after_a_skipped_one_is_that_of_a_run_without_it(kind, bad_pass):
    for bad in (math.nan, math.inf):
        for (one, model, closure), (two, twin, clean) in zip(
            in_turn(kind, torch.float32), in_turn(kind, torch.float32), strict=True
        ):
            for k in range(4):
                one.step(functools.partial(closure, bad if k == 1 else None, bad_pass))
                if k != 1:
                    two.step(clean)
            assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
            assert int(one.num_skipped) == 1
            assert int(two.num_skipped) == 0


@pytest.mark.parametrize("bad_pass", [1, 2])
def test_policy_raise_is_all_or_nothing(bad_pass):
    model = small_network(torch.float32)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.3, module=model, nonfinite="raise")
    x, calls = torch.ones(2, 4), []

    def closure():
        calls.append(1)
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        if len(calls) == bad_pass:
            model[0].bias.grad[0] = math.nan
        return loss

    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(FloatingPointError):
        optimizer.step(closure)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))
    assert not optimizer.state
    optimizer.step(closure)
    assert not any(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_policy_ignore_does_what_the_plain_base_does():
    model, twin = small_network(torch.float32), small_network(torch.float32)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.0, nonfinite="ignore")
    plain = torch.optim.SGD(twin.parameters(), lr=0.1)

    def closure(m):
        m.zero_grad()
        loss = m(torch.ones(2, 4)).square().mean()
        loss.backward()
        m[0].bias.grad[0] = math.nan
        return loss

    optimizer.step(functools.partial(closure, model))
    plain.step(functools.partial(closure, twin))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=0, equal_nan=True)
    assert bool(model[0].bias[0].isnan())


@pytest.mark.parametrize("policy", [None, "skip", "raise", "ignore"])
def test_a_loss_that_is_not_finite_with_gradients_that_are(policy):
    """It is reported, and steers nothing: the update is that of the finite loss with the same gradients."""
    weights = []
    for constant in (0.0, math.inf):
        model = small_network(torch.float32)
        optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.3, nonfinite=policy)

        def closure(model=model, optimizer=optimizer, constant=constant):
            optimizer.zero_grad()
            loss = model(torch.ones(2, 4)).square().mean() + constant
            loss.backward()
            return loss

        loss = optimizer.step(closure)
        weights.append([p.detach().clone() for p in model.parameters()])
    assert loss == math.inf
    assert optimizer.last_step.loss == math.inf
    assert all(torch.equal(p, q) for p, q in zip(*weights, strict=True))
