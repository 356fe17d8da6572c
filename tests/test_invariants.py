"""What every optimizer of this package promises, whatever its variant, base and body."""

import copy
import functools
import math

import pytest
import torch
from torch import nn

from sam_optim import ASAM, SAM

VARIANTS = {
    "sam": functools.partial(SAM, rho=0.05),
    "sam inf": functools.partial(SAM, rho=0.001, norm=math.inf),
    "asam": functools.partial(ASAM, rho=0.5),
    "asam eta 0": functools.partial(ASAM, rho=0.5, eta=0.0),
    "asam inf": functools.partial(ASAM, rho=0.01, norm=math.inf),
    "filter": functools.partial(SAM, rho=0.05, adaptive="filter"),
    "layer": functools.partial(SAM, rho=0.01, adaptive="layer"),
    "sam foreach": functools.partial(SAM, rho=0.05, foreach=True),
    "asam foreach": functools.partial(ASAM, rho=0.5, foreach=True),
    "sam for-loop": functools.partial(SAM, rho=0.05, foreach=False),
}
BASES = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.05, momentum=0.9),
    "adamw": functools.partial(torch.optim.AdamW, lr=0.01),
}
every_optimizer = pytest.mark.parametrize(
    "make",
    [functools.partial(v, base_optimizer=b) for v in VARIANTS.values() for b in BASES.values()],
    ids=[f"{v}-{b}" for v in VARIANTS for b in BASES],
)


def network(dtype=torch.float32):
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(1, 4, 3),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(4 * 36, 30),
        nn.ReLU(),
        nn.Linear(30, 3),
    ).to(dtype)


X = torch.randn(24, 1, 8, 8, generator=torch.Generator().manual_seed(1))
Y = torch.arange(24) % 3


def closure_for(model, optimizer, x=X):
    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x.to(next(model.parameters()).dtype)), Y)
        loss.backward()
        return loss

    return closure


def copies(tensors):
    return [t.detach().clone() for t in tensors]


def state(model):
    return copies((*model.parameters(), *model.buffers()))


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def equal_states(a, b):
    """Of two state dicts of optimizers: groups, and every entry of the state."""
    leaves = [[torch.as_tensor(v) for x in s["state"].values() for v in x.values() if v is not None] for s in (a, b)]
    return a["param_groups"] == b["param_groups"] and a["state"].keys() == b["state"].keys() and equal(*leaves)


@every_optimizer
def test_at_learning_rate_zero_nothing_drifts_and_no_storage_moves(make):
    model = network()
    optimizer = make(model.parameters(), module=model)
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    before, where = copies(model.parameters()), [p.data_ptr() for p in model.parameters()]
    for _ in range(20):
        optimizer.step(closure_for(model, optimizer))
    assert equal(model.parameters(), before)
    assert [p.data_ptr() for p in model.parameters()] == where


@every_optimizer
def test_the_perturbed_loss_is_higher_and_training_lowers_both(make):
    model = network()
    optimizer = make(model.parameters(), module=model)
    first = optimizer.step(closure_for(model, optimizer))
    assert optimizer.last_step.sharpness > 0
    for _ in range(30):
        last = optimizer.step(closure_for(model, optimizer))
    assert last < 0.5 * first


@every_optimizer
def test_the_same_steps_give_the_same_bits(make):
    runs = []
    for _ in range(2):
        model = network()
        optimizer = make(model.parameters(), module=model)
        for _ in range(5):
            optimizer.step(closure_for(model, optimizer))
        runs.append(state(model))
    assert equal(*runs)


@every_optimizer
def test_the_batch_is_counted_once_and_the_gradients_stay_the_users(make):
    model = network()
    optimizer = make(model.parameters(), module=model)
    for _ in range(3):
        optimizer.step(closure_for(model, optimizer))
    assert int(model[1].num_batches_tracked) == 3
    assert all(p.grad is not None and p.grad.is_contiguous() for p in model.parameters())


@every_optimizer
def test_state_holds_what_the_base_holds_and_no_copy_of_the_weights(make):
    model, twin = network(), network()
    optimizer = make(model.parameters())
    base = make.keywords["base_optimizer"](twin.parameters())
    for o, m in ((optimizer, model), (base, twin)):
        o.step(closure_for(m, o))
    ours, plain = optimizer.state_dict(), base.state_dict()
    shapes = lambda s: {k: {n: getattr(v, "shape", None) for n, v in x.items()} for k, x in s["state"].items()}  # noqa: E731
    assert shapes(ours) == shapes(plain)
    assert set(ours["param_groups"][0]) - set(plain["param_groups"][0]) == {"rho", "adaptive", "eta", "norm"}
    plain_types = int, float, str, bool, type(None), list, tuple
    assert all(isinstance(v, plain_types) for v in ours["param_groups"][0].values())


@every_optimizer
def test_a_fault_in_the_second_pass_is_as_if_the_step_had_not_begun(make):
    model = network()
    optimizer = make(model.parameters(), module=model)
    closure = closure_for(model, optimizer)
    for _ in range(2):
        optimizer.step(closure)
    before, saved, calls = state(model), copy.deepcopy(optimizer.state_dict()), []

    def faulty():
        calls.append(1)
        if len(calls) == 2:
            raise KeyboardInterrupt
        return closure()

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(faulty)
    assert equal(state(model), before)
    assert equal_states(optimizer.state_dict(), saved)
    optimizer.step(closure)


@pytest.mark.filterwarnings("ignore:a gradient at w")
@pytest.mark.parametrize("bad", [1, 2])
@every_optimizer
def test_a_step_with_nan_in_either_gradient_is_left_out_and_counted(make, bad):
    model = network()
    optimizer = make(model.parameters(), module=model)
    closure, calls = closure_for(model, optimizer), []
    optimizer.step(closure)
    weights, saved = copies(model.parameters()), copy.deepcopy(optimizer.state_dict())

    def closure_with_nan():
        loss = closure()
        calls.append(1)
        if len(calls) == bad:
            model[0].weight.grad[0] = math.nan
        return loss

    optimizer.step(closure_with_nan)
    assert equal(model.parameters(), weights)
    assert equal_states(optimizer.state_dict(), saved)
    assert all(bool(t.isfinite().all()) for t in model.buffers())
    assert int(optimizer.num_skipped) == 1
    optimizer.step(closure)
    assert not equal(model.parameters(), weights)


@every_optimizer
def test_float64_follows_float32(make):
    """The gradient at w + e, which the base has not touched; 1e-3 is the error of a float32 backward here."""
    grads = []
    for dtype in (torch.float32, torch.float64):
        model = network(dtype)
        optimizer = make(model.parameters(), module=model)
        optimizer.step(closure_for(model, optimizer))
        grads.append([p.grad.double() for p in model.parameters()])
    for a, b in zip(*grads, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-3 * float(b.abs().max()) + 1e-6)
