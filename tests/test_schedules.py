"""Schedules of rho: the factor of each step, passes, checkpoints, and every way of stepping."""

import copy
import math

import pytest
import ranks
import torch
import torch.distributed.checkpoint.state_dict as dcp
from test_variants import WAYS, ByHand, backward, batch, by_closure, closure_of, network
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from sam_optim import ASAM, MSAM, SAM, LookSAM, late_phase, periodic, proportional_to_lr, warmup


def sgd_with(cls, model, **options):
    return cls(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.1, **options)


def same(first, second):
    return all(torch.equal(p, q) for p, q in zip(first.parameters(), second.parameters(), strict=True))


def test_factors():
    assert [late_phase(2)(i) for i in range(5)] == [0, 0, 1, 1, 1]
    assert [late_phase(1, ramp=3)(i) for i in range(6)] == [0, 0.25, 0.5, 0.75, 1, 1]
    assert [periodic(3)(i) for i in range(5)] == [1, 0, 0, 1, 0]
    assert [warmup(1)(i) for i in range(3)] == [0.5, 1, 1]


@pytest.mark.parametrize("make", [late_phase, periodic, warmup])
@pytest.mark.parametrize("value", [-1, 1.5, True])
def test_settings_that_do_not_exist_are_refused(make, value):
    with pytest.raises(ValueError, match=repr(value)):
        make(value)


@pytest.mark.parametrize("value", [-0.5, math.nan, math.inf, "1", None])
def test_a_factor_that_does_not_exist_is_refused_before_anything_moves(value):
    model = network()
    before = copy.deepcopy(model.state_dict())
    optimizer = sgd_with(SAM, model, schedule=lambda step: value)
    with pytest.raises(ValueError, match=r"schedule\(0\)"):
        by_closure(model, optimizer, 0)
    torch.testing.assert_close(model.state_dict(), before, rtol=0, atol=0)


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
def test_before_the_late_phase_a_step_is_the_bases_and_then_sams(way):
    model, by_hand = network(), ByHand()
    optimizer = sgd_with(SAM, model, schedule=late_phase(4, ramp=1))
    for i in range(8):
        by_hand.rho = 0.1 * late_phase(4, ramp=1)(i)
        way(model, optimizer, i)
        by_hand.step(i)
    for p, w in zip(model.parameters(), by_hand.weights, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cls", [SAM, ASAM, MSAM])
def test_a_plain_step_has_the_bits_of_the_base(cls):
    model, plain = network(), network()
    optimizer = sgd_with(cls, model, schedule=late_phase(5))
    base = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for i in range(5):
        assert not optimizer.ascends
        by_closure(model, optimizer, i)
        base.step(closure_of(plain, base, i))
    assert same(model, plain)
    assert optimizer.ascends


def test_micro_batches_of_a_plain_step_add_up():
    model, plain = network(), network()
    optimizer = sgd_with(SAM, model, schedule=periodic(2))
    base = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    by_closure(model, optimizer, 0)
    plain.load_state_dict(model.state_dict())
    base.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.zero_grad()
    for i in (1, 2):
        with optimizer.microbatch():
            backward(model, i)
            if optimizer.ascends:
                raise AssertionError
        backward(plain, i)
    optimizer.step()
    base.step()
    assert same(model, plain)


def test_resuming_in_any_phase_is_not_stopping():
    for stop in (2, 4, 5):
        lasting, model, resumed = network(), network(), network()
        optimizer = sgd_with(SAM, lasting, schedule=late_phase(4, ramp=2))
        for i in range(8):
            by_closure(lasting, optimizer, i)
        optimizer = sgd_with(SAM, model, schedule=late_phase(4, ramp=2))
        for i in range(stop):
            by_closure(model, optimizer, i)
        resumed.load_state_dict(model.state_dict())
        again = sgd_with(SAM, resumed, schedule=late_phase(4, ramp=2))
        again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        for i in range(stop, 8):
            by_closure(resumed, again, i)
        assert same(resumed, lasting)


def test_a_checkpoint_of_the_base_loads_and_the_count_goes_on():
    model = network()
    optimizer = sgd_with(SAM, model, schedule=late_phase(3))
    for i in range(2):
        by_closure(model, optimizer, i)
    plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer.load_state_dict(plain.state_dict())
    by_closure(model, optimizer, 2)
    assert optimizer.ascends


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_distributed_checkpoint_asks_for_the_state_without_a_step(momentum):
    model = network()
    optimizer = SAM(model.parameters(), lr=0.1, momentum=momentum, schedule=late_phase(1))
    dcp.get_state_dict(model, optimizer)
    assert not optimizer.ascends
    by_closure(model, optimizer, 0)
    assert optimizer.ascends


def test_a_fault_does_not_count():
    model = network()
    optimizer = sgd_with(SAM, model, schedule=late_phase(1))
    with pytest.raises(ZeroDivisionError):
        optimizer.step(lambda: 1 / 0)
    assert not optimizer.ascends


def test_the_radius_follows_the_learning_rate_and_schedulers_go_on_working():
    model = network()
    optimizer = sgd_with(SAM, model, schedule=proportional_to_lr(0.02, 0.1, lr_min=0.01))
    scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=6, eta_min=0.01)
    for i in range(6):
        lr = optimizer.param_groups[0]["lr"]
        by_closure(model, optimizer, i)
        expected = 0.02 + 0.08 * (lr - 0.01) / (0.1 - 0.01)
        assert float(optimizer.last_step.radius) == pytest.approx(expected, rel=1e-12)
        scheduler.step()
    with pytest.raises(ValueError, match="lr_min"):
        sgd_with(SAM, model, schedule=proportional_to_lr(0.02, 0.1, lr_min=1.0)).step(lambda: None)


def test_the_schedule_multiplies_the_rho_that_groups_have_now():
    model = network()
    groups = [{"params": model[0].parameters()}, {"params": model[2].parameters(), "rho": 0.0}]
    optimizer = SAM([*groups, {"params": model[4].parameters(), "rho": 0.3}], lr=0.1, rho=0.1, schedule=lambda i: 0.5)
    optimizer.add_param_group({"params": [nn.Parameter(torch.zeros(2).double())], "rho": 0.0})
    for group in optimizer.param_groups:
        group["rho"] *= 2
    before = copy.deepcopy(model.state_dict())
    backward(model, 0)
    g = {name: p.grad.clone() for name, p in model.named_parameters()}
    length = math.sqrt(sum(float((x**2).sum()) for name, x in g.items() if name[0] != "2"))
    with optimizer.perturbed():
        for name, p in model.named_parameters():
            rho = {"0": 0.1, "2": 0.0, "4": 0.3}[name[0]]
            torch.testing.assert_close(p.detach(), before[name] + rho * g[name] / length, rtol=0, atol=1e-12)
        backward(model, 0)
    optimizer.step()


def worker(rank):
    model = network()
    ddp = DDP(model)
    optimizer = sgd_with(SAM, model, module=ddp, schedule=late_phase(4))
    for i in range(3):
        by_closure(ddp, optimizer, 2 * i + rank)
    optimizer.zero_grad()
    for k in (3, 4):
        with optimizer.microbatch():
            backward(ddp, 2 * k + rank, scale=0.5)
    optimizer.step()
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


def test_a_plain_step_averages_over_ranks():
    plain = network()
    base = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9)
    for batches in ((0, 1), (2, 3), (4, 5), (6, 7, 8, 9)):
        base.zero_grad()
        for k in batches:
            backward(plain, k, scale=1 / len(batches))
        base.step()
    expected = torch.cat([p.detach().flatten() for p in plain.parameters()])
    for weights in ranks.spawn(worker):
        torch.testing.assert_close(torch.tensor(weights, dtype=torch.float64), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("cls", [SAM, LookSAM, MSAM])
@pytest.mark.parametrize("fused", [None, True])
def test_a_plain_step_after_a_loss_scale(cls, fused):
    """One backward, whose gradients GradScaler has not unscaled yet where the base can do it itself."""
    model, plain = network().float(), network().float()
    optimizer = cls(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, fused=fused, schedule=late_phase(3))
    base = torch.optim.SGD(plain.parameters(), lr=0.1, momentum=0.9, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for i in range(3):
        optimizer.zero_grad()
        base.zero_grad()
        x, y = batch(i)
        scaler.scale(nn.functional.cross_entropy(model(x.float()), y)).backward()
        assert not optimizer.ascends
        scaler.step(optimizer)
        scaler.update()
        nn.functional.cross_entropy(plain(x.float()), y).backward()
        base.step()
    assert same(model, plain)
