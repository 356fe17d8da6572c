"""Checkpoints that other SAMs have written."""

import copy
import io

import pytest
import torch
from torch import nn

from sam_optim import ASAM, SAM, Ball

X = torch.randn(8, 5, generator=torch.Generator().manual_seed(0))
WIDTHS = {"old_p": "davda54/sam", "e_w": "Composer", "old_g": "GSAM"}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2))


def train(model, optimizer, steps):
    def closure():
        optimizer.zero_grad()
        loss = model(X).square().sum()
        loss.backward()
        return loss

    for _ in range(steps):
        optimizer.step(closure)
    return [p.detach().clone() for p in model.parameters()]


def checkpoint(model, *, scratch, **group):
    """As davda54/sam writes it: the groups of the base with rho and adaptive, and a weight for each weight."""
    base = torch.optim.SGD(model.parameters(), lr=0.02, momentum=0.8, nesterov=True)
    checkpoint = base.state_dict()
    checkpoint["param_groups"][0] |= {"rho": 0.07, "adaptive": True} | group
    checkpoint["state"] = {i: {scratch: p.detach().clone()} for i, p in enumerate(model.parameters())}
    stored = io.BytesIO()
    torch.save(checkpoint, stored)
    stored.seek(0)
    return torch.load(stored, weights_only=True)


@pytest.mark.parametrize("scratch", WIDTHS, ids=WIDTHS.values())
def test_hyperparameters_are_loaded_scratch_is_not_and_what_is_lost_is_said_once(scratch):
    model, twin = network(), network()
    given = checkpoint(model, scratch=scratch, **({"epsilon": 1e-12} if scratch == "e_w" else {}))
    before = copy.deepcopy(given)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.5, momentum=0.1, eta=0.0)
    train(model, optimizer, 2)
    model.load_state_dict(twin.state_dict())
    with pytest.warns(UserWarning, match=r"momentum .* was never in that file and is lost") as warned:
        optimizer.load_state_dict(given)
    assert len(warned) == 1
    assert warned[0].filename == __file__
    assert given.keys() == before.keys()
    assert given["param_groups"] == before["param_groups"]
    assert all(torch.equal(s[scratch], before["state"][i][scratch]) for i, s in given["state"].items())
    assert not optimizer.state
    assert optimizer.ball == Ball(0.07, adaptive=True, eta=0.0)
    group = optimizer.state_dict()["param_groups"][0]
    assert (group["lr"], group["momentum"], group["nesterov"]) == (0.02, 0.8, True)
    assert "epsilon" not in group
    fresh = ASAM(twin.parameters(), torch.optim.SGD, lr=0.02, momentum=0.8, nesterov=True, rho=0.07, eta=0.0)
    for a, b in zip(train(model, optimizer, 4), train(twin, fresh, 4), strict=True):
        assert torch.equal(a, b)


def test_the_state_of_the_base_is_taken_from_where_others_put_it():
    """pytorch_optimizer's wrappers have it beside, its SAM among its own; a checkpoint mid-step has scratch, too."""
    model, twin, other = network(), network(), network()
    plain = SAM(model.parameters(), torch.optim.AdamW, lr=0.01, rho=0.1)
    train(model, plain, 3)
    ours = plain.state_dict()
    beside = {
        "state": {i: {"old_p": p.detach().clone()} for i, p in enumerate(model.parameters())},
        "param_groups": copy.deepcopy(ours["param_groups"]),
        "base_optimizer": {"state": copy.deepcopy(ours["state"]), "param_groups": ours["param_groups"]},
    }
    among = copy.deepcopy(ours)
    for i, p in enumerate(model.parameters()):
        among["state"][i]["old_p"] = p.detach().clone()
    weights = copy.deepcopy(model.state_dict())
    truth = None
    for start, given in ((twin, beside), (other, among)):
        start.load_state_dict(weights)
        resumed = SAM(start.parameters(), torch.optim.AdamW, lr=1.0, rho=0.5)
        resumed.load_state_dict(given)
        assert all(state.keys() == {"step", "exp_avg", "exp_avg_sq"} for state in resumed.state.values())
        resumed_run = train(start, resumed, 3)
        truth = train(model, plain, 3) if truth is None else truth
        assert all(torch.equal(a, b) for a, b in zip(resumed_run, truth, strict=True))


def test_pytorch_optimizers_own_checkpoint_goes_on_in_ours():
    theirs = pytest.importorskip("pytorch_optimizer", minversion="4.1")  # 3.5 saves nothing of the base
    model, twin = network(), network()
    optimizer = theirs.SAM(model.parameters(), torch.optim.SGD, lr=0.02, momentum=0.9, rho=0.0)

    def step():
        optimizer.zero_grad()
        model(X).square().sum().backward()

        def closure():
            optimizer.zero_grad()
            model(X).square().sum().backward()

        optimizer.step(closure)

    for _ in range(3):
        step()
    twin.load_state_dict(model.state_dict())
    resumed = SAM(twin.parameters(), torch.optim.SGD, lr=1.0)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert resumed.ball.rho == 0.0
    for _ in range(3):
        step()
    for a, b in zip(train(twin, resumed, 3), model.parameters(), strict=True):
        torch.testing.assert_close(a, b.detach(), rtol=1e-5, atol=1e-6)


def test_before_its_first_step_another_sam_has_nothing_to_lose():
    model = network()
    given = checkpoint(model, scratch="old_p")
    given["state"] = {}
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.5)
    optimizer.load_state_dict(given)  # warnings are errors here
    assert optimizer.ball == Ball(0.07, adaptive=True)
