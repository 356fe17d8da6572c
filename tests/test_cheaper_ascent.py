"""Gradients that the ascent does not need are not computed, and nothing else changes."""

import pytest
import torch
from torch import nn

from sam_optim import SAM, Perturbation

LOSS = nn.CrossEntropyLoss()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.LayerNorm(16), nn.Tanh(), nn.Linear(16, 3)).double()


def batch(i=0):
    generator = torch.Generator().manual_seed(i)
    return torch.randn(8, 6, generator=generator, dtype=torch.float64), torch.randint(3, (8,), generator=generator)


def groups(model, rho=0.1):
    return [
        {"params": model[1].parameters(), "rho": rho},
        {"params": [*model[0].parameters(), *model[3].parameters()], "rho": 0.0},
    ]


def by_hand(steps):
    """w <- w - lr grad L(w + e), e along the gradient of the normalisation layer alone."""
    model = network()
    for i in range(steps):
        x, y = batch(i)
        norm_params = list(model[1].parameters())
        grads = torch.autograd.grad(LOSS(model(x), y), norm_params)
        length = sum(g.square().sum() for g in grads).sqrt()
        before = [p.detach().clone() for p in norm_params]
        with torch.no_grad():
            for p, g in zip(norm_params, grads, strict=True):
                p += 0.1 * g / length
        descent = torch.autograd.grad(LOSS(model(x), y), list(model.parameters()))
        with torch.no_grad():
            for p, w in zip(norm_params, before, strict=True):
                p.copy_(w)
            for p, g in zip(model.parameters(), descent, strict=True):
                p -= 0.5 * g
    return [p.detach().clone() for p in model.parameters()]


class Counted:
    """How many gradients of a parameter were computed."""

    def __init__(self, parameter):
        self.times = 0
        parameter.register_hook(self)

    def __call__(self, grad):
        self.times += 1


def by_closure(model, optimizer, x, y):
    def closure():
        optimizer.zero_grad()
        loss = LOSS(model(x), y)
        loss.backward()
        return loss

    optimizer.step(closure)


def by_closures(model, optimizer, x, y):
    def closure():
        optimizer.zero_grad()
        LOSS(model(x), y).backward()

    optimizer.step([closure])


def by_microbatch(model, optimizer, x, y):
    with optimizer.microbatch():
        LOSS(model(x), y).backward()
        with optimizer.perturbed():
            LOSS(model(x), y).backward()
    optimizer.step()
    optimizer.zero_grad()


@pytest.mark.parametrize("path", [by_closure, by_closures, by_microbatch])
def test_parameters_that_stay_where_they_are_get_one_gradient(path):
    model = network()
    still, moving = Counted(model[0].weight), Counted(model[1].weight)
    optimizer = SAM(groups(model), torch.optim.SGD, lr=0.5)
    for i in range(3):
        path(model, optimizer, *batch(i))
        assert all(p.requires_grad for p in model.parameters())
    assert (still.times, moving.times) == (3, 6)
    for p, truth in zip(model.parameters(), by_hand(3), strict=True):
        torch.testing.assert_close(p.detach(), truth, rtol=0, atol=1e-13)


def test_a_frozen_parameter_stays_frozen():
    model = network()
    model[0].weight.requires_grad_(False)
    optimizer = SAM(groups(model), torch.optim.SGD, lr=0.5)
    by_closure(model, optimizer, *batch())
    assert [p.requires_grad for p in model.parameters()] == [False] + [True] * 5


@pytest.mark.parametrize("passes", [1, 2])
def test_after_a_fault_in_either_pass_gradients_are_required_as_before(passes):
    model = network()
    optimizer = SAM(groups(model), torch.optim.SGD, lr=0.5)
    calls = []

    def closure():
        calls.append([p.requires_grad for p in model.parameters()])
        optimizer.zero_grad()
        if len(calls) == passes:
            raise KeyboardInterrupt
        LOSS(model(batch()[0]), batch()[1]).backward()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert calls[0] == [False, False, True, True, False, False]
    assert all(p.requires_grad for p in model.parameters())


def test_a_loss_that_hangs_on_nothing_that_moves_is_computed_again():
    """Then the first pass without those gradients would have none at all; its draws and buffers are taken back."""
    model = network()
    dropout = nn.Dropout(0.5)
    optimizer = SAM(groups(model), torch.optim.SGD, lr=0.5, module=nn.Sequential(model, dropout))
    drawn = []

    def closure():
        optimizer.zero_grad()
        drawn.append(dropout(torch.ones(20)))
        loss = model[0](batch()[0]).square().mean()
        loss.backward()
        return loss

    torch.manual_seed(3)
    optimizer.step(closure)
    assert torch.equal(drawn[0], drawn[1])  # the first pass, twice
    assert not torch.equal(drawn[1], drawn[2])
    assert optimizer.last_step.radius is None  # no gradient to follow


def test_an_error_of_the_users_own_is_not_tried_again():
    model = network()
    optimizer = SAM(groups(model), torch.optim.SGD, lr=0.5)
    calls = []

    def closure():
        calls.append(None)
        raise RuntimeError("mine")

    with pytest.raises(RuntimeError, match="mine"):
        optimizer.step(closure)
    assert len(calls) == 1


def test_ascent_closure_runs_at_w_and_closure_at_w_plus_e():
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.5, rho=0.1)
    x, y = batch()
    sizes = []

    def closure_of(n):
        def closure():
            optimizer.zero_grad()
            sizes.append(n)
            loss = LOSS(model(x[:n]), y[:n])
            loss.backward()
            return loss

        return closure

    reference = network()
    grads = torch.autograd.grad(LOSS(reference(x[:2]), y[:2]), list(reference.parameters()))
    length = sum(g.square().sum() for g in grads).sqrt()
    moved = network()
    with torch.no_grad():
        for p, g in zip(moved.parameters(), grads, strict=True):
            p += 0.1 * g / length
    descent = torch.autograd.grad(LOSS(moved(x), y), list(moved.parameters()))
    optimizer.step(closure_of(8), ascent_closure=closure_of(2))
    assert sizes == [2, 8]
    for p, w, g in zip(model.parameters(), reference.parameters(), descent, strict=True):
        torch.testing.assert_close(p.detach(), w.detach() - 0.5 * g, rtol=0, atol=1e-13)


def test_microbatch_of_a_perturbation_leaves_gradients_of_all_parameters():
    model = network()
    sam = Perturbation(groups(model))
    x, y = batch()
    with sam.microbatch():
        LOSS(model(x), y).backward()
        assert model[0].weight.grad is None
        with sam.perturbed():
            LOSS(model(x), y).backward()
    assert all(p.grad is not None for p in model.parameters())


def test_reentrant_checkpoints_lose_gradients_in_one_step_at_most():
    """They compute none where no input of theirs needs one; so from then on the ascent computes all of them."""
    from torch.utils.checkpoint import checkpoint

    def run(reentrant):
        torch.manual_seed(0)
        model = nn.ModuleDict(
            {
                "embed": nn.Embedding(5, 8),
                "block": nn.Sequential(nn.Linear(8, 8), nn.LayerNorm(8)),
                "head": nn.LayerNorm(8),
            }
        ).double()
        norms = [*model["block"][1].parameters(), *model["head"].parameters()]
        others = [p for p in model.parameters() if not any(p is q for q in norms)]
        optimizer = SAM([{"params": norms, "rho": 0.3}, {"params": others, "rho": 0.0}], torch.optim.SGD, lr=0.0)
        grad_norms = []

        def closure():
            optimizer.zero_grad()
            x = model["embed"](torch.arange(5))
            x = checkpoint(model["block"], x, use_reentrant=True) if reentrant else model["block"](x)
            loss = (model["head"](x) * torch.arange(8)).tanh().sum()
            loss.backward()
            return loss

        for _ in range(3):
            optimizer.step(closure)
            grad_norms.append(float(optimizer.last_step.dual_norm))
        return grad_norms

    import warnings

    truth = run(False)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "None of the inputs have requires_grad=True")
        found = run(True)
    assert found[0] < 0.99 * truth[0]
    assert found[1:] == pytest.approx(truth[1:])
