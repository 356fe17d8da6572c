"""What timm asks of an optimizer in its tests, asked of SAM and ASAM, whose steps take closures."""

import copy
import functools
import itertools
import math

import pytest
import torch
from torch import nn
from torch.nn import Parameter

from sam_optim import ASAM, SAM

timm_optim = pytest.importorskip("timm.optim")

BASES = {
    "sgd": functools.partial(torch.optim.SGD, lr=1e-2),
    "momentum": functools.partial(torch.optim.SGD, lr=3e-3, momentum=0.9, nesterov=True),
    "sgd decay": functools.partial(torch.optim.SGD, lr=3e-3, momentum=0.9, weight_decay=0.1),
    "adam": functools.partial(torch.optim.Adam, lr=1e-2),
    "adamw": functools.partial(torch.optim.AdamW, lr=1e-2, betas=(0.8, 0.95), weight_decay=0.05),
    "nadam": functools.partial(torch.optim.NAdam, lr=1e-3),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=1e-2),
    "timm nadamw": functools.partial(timm_optim.NAdamW, lr=1e-2),
    "timm lamb": functools.partial(timm_optim.Lamb, lr=1e-2),
    "timm lars": functools.partial(timm_optim.Lars, lr=1e-2),
    "timm lion": functools.partial(timm_optim.Lion, lr=1e-3),
    "timm adopt": functools.partial(timm_optim.Adopt, lr=1e-2),
    "timm sgdw": functools.partial(timm_optim.SGDW, lr=1e-2, momentum=0.9),
    "timm rmsproptf": functools.partial(timm_optim.RMSpropTF, lr=1e-2),
}
SAMS = {"sam": functools.partial(SAM, rho=0.05), "asam": functools.partial(ASAM, rho=0.5)}
GROUPS = {
    "list": lambda weight, bias: [weight, bias],
    "groups": lambda weight, bias: [{"params": [weight]}, {"params": [bias], "lr": 3e-3}],
    "radii": lambda weight, bias: [{"params": [weight], "rho": 0.1}, {"params": [bias], "rho": 0.0}],
    "one tensor": lambda weight, bias: [{"params": bias, "lr": 3e-3}],
}
every_optimizer = pytest.mark.parametrize("base", BASES)
both = pytest.mark.parametrize("sam", SAMS)


def problem(seed=0, *, contiguous=True):
    """||W x + b||^2, whose minimum is 0."""
    generator = torch.Generator().manual_seed(seed)
    weight, bias = torch.randn(10, 5, 2, generator=generator), torch.randn(10, 2, generator=generator)
    weight, bias = weight[..., 0], bias[..., 0]
    if contiguous:
        weight, bias = weight.contiguous(), bias.contiguous()
    return Parameter(weight), Parameter(bias), torch.randn(5, generator=generator)


def closure_of(optimizer, weight, bias, x):
    def closure():
        optimizer.zero_grad()
        loss = (weight.mv(x.to(weight.dtype)) + bias).square().sum()
        loss.backward()
        return loss

    return closure


def scalars_follow(state, param):
    """What timm asks of a state that was loaded for parameters of another dtype."""
    return all(
        v.dtype == param.dtype
        for v in state.values()
        if isinstance(v, torch.Tensor) and v.dim() and v.is_floating_point()
    )


@both
@every_optimizer
def test_the_loss_falls_for_every_layout_and_grouping(sam, base):
    for contiguous, grouping in [(False, "list"), *((True, g) for g in GROUPS)]:
        weight, bias, x = problem(contiguous=contiguous)
        optimizer = SAMS[sam](GROUPS[grouping](weight, bias), BASES[base])
        assert "over" in repr(optimizer)
        closure = closure_of(optimizer, weight, bias, x)
        first = closure().item()
        for _ in range(60):
            optimizer.step(closure)
        assert closure().item() < first


@both
@every_optimizer
@pytest.mark.parametrize("grouping", GROUPS)
def test_a_state_dict_goes_on_as_if_nothing_had_happened(sam, base, grouping):
    weight, bias, x = problem()
    optimizer = SAMS[sam](GROUPS[grouping](weight, bias), BASES[base])
    closure = closure_of(optimizer, weight, bias, x)
    for _ in range(10):
        optimizer.step(closure)
    weight_c, bias_c = (Parameter(p.detach().clone()) for p in (weight, bias))
    twin = SAMS[sam](GROUPS[grouping](weight_c, bias_c), BASES[base])
    closure_c = closure_of(twin, weight_c, bias_c, x)
    saved, given = (copy.deepcopy(optimizer.state_dict()) for _ in range(2))
    twin.load_state_dict(given)
    torch.testing.assert_close(given, saved, rtol=0, atol=0)  # what is loaded is not changed
    for _ in range(10):
        optimizer.step(closure)
        twin.step(closure_c)
        assert torch.equal(weight, weight_c)
        assert torch.equal(bias, bias_c)
    torch.testing.assert_close(twin.state_dict(), optimizer.state_dict(), rtol=0, atol=0)
    public = [{k for k in o.__dict__ if not k.startswith("_")} for o in (optimizer, copy.deepcopy(optimizer))]
    assert public[0] == public[1]
    twin.param_groups.extend(twin.param_groups)
    assert twin.state_dict()["param_groups"][-1] == optimizer.state_dict()["param_groups"][-1]


@both
@every_optimizer
def test_a_state_dict_moves_to_another_dtype(sam, base):
    weight, bias, x = problem()
    optimizer = SAMS[sam]([weight, bias], BASES[base])
    closure = closure_of(optimizer, weight, bias, x)
    for _ in range(10):
        optimizer.step(closure)
    wide = [Parameter(p.detach().double()) for p in (weight, bias)]
    twin = SAMS[sam](wide, BASES[base])
    twin.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    assert all(scalars_follow(state, p) for p, state in twin.state.items())
    start = [p.detach().double() for p in (weight, bias)]
    for _ in range(5):
        optimizer.step(closure)
        twin.step(closure_of(twin, *wide, x))
    moves, wide_moves = (
        torch.cat([(p.detach().double() - s).flatten() for p, s in zip(ps, start, strict=True)])
        for ps in ((weight, bias), wide)
    )
    assert torch.cosine_similarity(moves, wide_moves, dim=0) > 0.9


def valley(w):
    x, y = w
    return (1 - x) ** 2 + 100 * (y - x**2) ** 2


@both
@pytest.mark.parametrize(("base", "lr"), [("sgd", 1e-3), ("adam", 5e-2), ("adamw", 5e-2), ("timm lamb", 1e-3)])
def test_one_coordinate_at_a_time_down_a_bent_valley(sam, base, lr):
    """Rosenbrock's function, the closure leaving the gradient of x and of y in turn."""
    w = Parameter(torch.tensor([1.5, 1.5]))
    optimizer = functools.partial(SAMS[sam], rho=0.01)([w], BASES[base], lr=lr)
    minimum = torch.ones(2)
    start = w.detach().dist(minimum)

    def closure(i):
        optimizer.zero_grad()
        loss = valley(w)
        loss.backward()
        w.grad[1 - i % 2] = 0
        return loss

    for i in range(400):
        optimizer.step(functools.partial(closure, i))
    assert w.detach().dist(minimum) <= start


@both
@every_optimizer
def test_a_small_model_trains(sam, base):
    """The sum of a sigmoid network's outputs falls in every step; the first ones of some bases are for their state."""
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(2, 3), nn.Sigmoid(), nn.Linear(3, 1), nn.Sigmoid())
    optimizer = SAMS[sam](model.parameters(), BASES[base], module=model)
    x = torch.tensor([[0.1, 0.2], [0.3, 0.4], [0.5, 0.6]])

    def closure():
        optimizer.zero_grad()
        loss = model(x).sum()
        loss.backward()
        return loss

    losses = [optimizer.step(closure).item() for _ in range(20)]
    assert all(later < earlier for earlier, later in itertools.pairwise(losses[2:]))
    for way in ("contexts", "two steps"):
        loss = closure()
        if way == "contexts":
            with optimizer.perturbed():
                closure()
            optimizer.step()
        else:
            optimizer.first_step(zero_grad=True)
            closure()
            optimizer.second_step(zero_grad=True)
        assert closure() < loss


@both
@pytest.mark.parametrize("sched", ["cosine", "tanh", "step", "multistep", "poly", "wsd"])
def test_timms_schedulers_drive_it(sam, sched):
    """`create_scheduler_v2` on SAM itself gives the learning rates that it gives its base."""
    from timm.scheduler import create_scheduler_v2

    weight, bias, x = problem()
    optimizer = SAMS[sam]([weight, bias], torch.optim.SGD, lr=0.1)
    plain = torch.optim.SGD([Parameter(torch.ones(1))], lr=0.1)
    schedulers = [
        create_scheduler_v2(
            o, sched=sched, num_epochs=12, warmup_epochs=3, min_lr=1e-4, decay_epochs=2, decay_milestones=(4, 8),
            patience_epochs=1,
        )[0]
        for o in (optimizer, plain)
    ]  # fmt: skip
    if None in schedulers:
        pytest.skip(f"this timm has no scheduler {sched}")
    closure = closure_of(optimizer, weight, bias, x)
    rates = []
    for epoch in range(12):
        loss = optimizer.step(closure)
        assert math.isfinite(loss.item())
        for scheduler in schedulers:
            scheduler.step(epoch + 1, metric=1.0)
        rates.append(optimizer.param_groups[0]["lr"])
        assert rates[-1] == plain.param_groups[0]["lr"] == optimizer.base_optimizer.param_groups[0]["lr"]
    assert len(set(rates)) > 2


@both
def test_timms_groups_keep_their_decay_and_scale(sam):
    from timm.optim import param_groups_layer_decay, param_groups_weight_decay

    model = nn.Sequential(nn.Linear(4, 8), nn.LayerNorm(8), nn.Linear(8, 2))
    for groups in (param_groups_weight_decay(model, 0.05), param_groups_layer_decay(model, 0.05, layer_decay=0.75)):
        expected = [{k: v for k, v in g.items() if k != "params"} for g in groups]
        optimizer = SAMS[sam](groups, torch.optim.AdamW, lr=0.01)
        for group, given in zip(optimizer.param_groups, expected, strict=True):
            assert given.items() <= group.items()

        def closure(optimizer=optimizer):
            optimizer.zero_grad()
            loss = model(torch.ones(3, 4)).square().sum()
            loss.backward()
            return loss

        first = optimizer.step(closure)
        for _ in range(5):
            last = optimizer.step(closure)
        assert last < first


@both
def test_timms_ema_of_the_weights_sees_no_perturbation(sam):
    from timm.utils import ModelEmaV3

    torch.manual_seed(0)
    model = nn.Linear(5, 3)
    ema, expected = ModelEmaV3(model, decay=0.5), [p.detach().clone() for p in model.parameters()]
    optimizer = SAMS[sam](model.parameters(), torch.optim.SGD, lr=0.1, module=model)

    def closure():
        optimizer.zero_grad()
        loss = model(torch.ones(2, 5)).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        optimizer.step(closure)
        ema.update(model)
        expected = [0.5 * e + 0.5 * p.detach() for e, p in zip(expected, model.parameters(), strict=True)]
    for p, e in zip(ema.module.parameters(), expected, strict=True):
        torch.testing.assert_close(p, e)
