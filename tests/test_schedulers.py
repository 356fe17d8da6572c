"""torch's learning rate schedulers and weight averages around SAM: what they do to its base."""

import copy

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers
from torch.optim.swa_utils import SWALR, AveragedModel, get_ema_multi_avg_fn, update_bn

from sam_optim import ASAM, SAM

X = torch.randn(12, 4, generator=torch.Generator().manual_seed(0))
MAKERS = {
    "LambdaLR": lambda o: schedulers.LambdaLR(o, [lambda n: 0.9**n, lambda n: 0.8**n]),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda n: 0.9),
    "StepLR": lambda o: schedulers.StepLR(o, 3),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 5]),
    "ConstantLR": lambda o: schedulers.ConstantLR(o, factor=0.4, total_iters=4),
    "LinearLR": lambda o: schedulers.LinearLR(o, start_factor=0.4, total_iters=4),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, total_iters=6, power=0.9),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 8),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 3, 2),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, step_size_up=3),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, [0.1, 0.2], total_steps=12),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1),
    "SequentialLR": lambda o: schedulers.SequentialLR(
        o, [schedulers.ConstantLR(o, 0.1, 3), schedulers.ExponentialLR(o, 0.9)], [3]
    ),
    "ChainedScheduler": lambda o: schedulers.ChainedScheduler(
        [schedulers.ExponentialLR(o, 0.9), schedulers.StepLR(o, 3)]
    ),
    "SWALR": lambda o: SWALR(o, swa_lr=0.05, anneal_epochs=3),
}


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2))


def groups_of(model):
    return [{"params": model[0].parameters()}, {"params": [*model[1].parameters(), *model[3].parameters()], "lr": 0.3}]


def step(model, optimizer, way="closure"):
    def closure():
        optimizer.zero_grad()
        loss = model(X).square().mean()
        loss.backward()
        return loss

    if way == "closure":
        return optimizer.step(closure)
    loss = closure()
    if way == "contexts":
        with optimizer.perturbed():
            closure()
        optimizer.step()
    else:
        optimizer.first_step(zero_grad=True)
        closure()
        optimizer.second_step()
    return loss


@pytest.mark.filterwarnings("ignore:The epoch parameter in")  # SequentialLR's own, in torch 2.8
@pytest.mark.parametrize("tensor_lr", [False, True], ids=["float", "tensor"])
@pytest.mark.parametrize("cls", [SAM, ASAM])
@pytest.mark.parametrize("name", MAKERS)
def test_every_scheduler_does_to_sam_what_it_does_to_its_base(name, cls, tensor_lr):
    """Warnings are errors here: that `lr_scheduler.step()` came before `optimizer.step()`, for one."""
    lr = (lambda x: torch.tensor(x)) if tensor_lr else float
    model, plain = network(), network()
    groups = groups_of(model)
    groups[1]["lr"] = lr(0.3)
    plain_groups = groups_of(plain)
    plain_groups[1]["lr"] = lr(0.3)
    optimizer = cls(groups, torch.optim.SGD, lr=lr(0.1), momentum=0.9)
    base = torch.optim.SGD(plain_groups, lr=lr(0.1), momentum=0.9)
    both = [MAKERS[name](o) for o in (optimizer, base)]
    keys = ("lr", "momentum", "initial_lr", "swa_lr")
    for i in range(12):
        step(model, optimizer, ("closure", "contexts", "two steps")[i % 3])
        base.step()
        if i < 11:
            for scheduler in both:
                scheduler.step(1.0) if name == "ReduceLROnPlateau" else scheduler.step()
        for a, b in zip(optimizer.param_groups, base.param_groups, strict=True):
            assert {k: float(a[k]) for k in keys if k in a} == {k: float(b[k]) for k in keys if k in b}
            assert isinstance(a["lr"], torch.Tensor) == isinstance(b["lr"], torch.Tensor)
    assert optimizer.base_optimizer.param_groups is optimizer.param_groups
    restored = MAKERS[name](copy.deepcopy(optimizer))
    restored.load_state_dict(both[0].state_dict())
    assert restored.get_last_lr() == both[0].get_last_lr()


@pytest.mark.parametrize("on", ["sam", "base"])
def test_a_scheduler_that_steps_too_early_is_told_so(on):
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    scheduler = schedulers.StepLR(optimizer if on == "sam" else optimizer.base_optimizer, 3)
    with pytest.warns(UserWarning, match=r"lr_scheduler.step\(\)` before `optimizer.step"):
        scheduler.step()
    step(model, optimizer)
    scheduler.step()


def test_a_radius_may_follow_a_schedule_too():
    """rho is a value of the groups, as the learning rate is: any code that sets one sets the other."""
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.1)
    for rho in (0.1, 0.05, torch.tensor(0.02), 0.0):
        optimizer.param_groups[0]["rho"] = rho
        step(model, optimizer)
        assert optimizer.last_step.radius.item() == pytest.approx(float(rho))


def test_averages_of_the_weights_hold_no_perturbation_and_batchnorm_can_be_renewed():
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.5, module=model)
    swa = AveragedModel(model)
    ema = AveragedModel(model, multi_avg_fn=get_ema_multi_avg_fn(0.5))
    weights = []
    for _ in range(3):
        step(model, optimizer)
        swa.update_parameters(model)
        ema.update_parameters(model)
        weights.append([p.detach().clone() for p in model.parameters()])
    for p, q, (a, b, c) in zip(swa.parameters(), ema.parameters(), zip(*weights, strict=True), strict=True):
        torch.testing.assert_close(p.detach(), (a + b + c) / 3)
        torch.testing.assert_close(q.detach(), 0.25 * a + 0.25 * b + 0.5 * c)
    update_bn([X], swa)
    norm = swa.module[1]
    hidden = swa.module[0](X).detach()
    torch.testing.assert_close(norm.running_mean, hidden.mean(0))
    torch.testing.assert_close(norm.running_var, hidden.var(0))
    assert norm.momentum == 0.1
