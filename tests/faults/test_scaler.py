"""GradScaler: an overflow in either pass of any iteration, against training without a scale that leaves out the same
update. Scales are powers of 2 and the gradients float32, so that nothing is rounded and all bits must be equal."""

from __future__ import annotations

import functools
import math

import pytest
import torch
from torch import nn

from faults.cases import plain
from faults.harness import batch
from sam_optim import ASAM, SAM, Perturbation

ITERATIONS = 4
BASES = {
    "sgd": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9),
    "adamw": lambda params: torch.optim.AdamW(params, lr=0.01),
    "fused": lambda params: torch.optim.AdamW(params, lr=0.01, fused=True),
}


def loss_of(model: nn.Module, i: int) -> torch.Tensor:
    x, y = batch(i)
    return nn.functional.cross_entropy(model(x), y)


def network() -> nn.Module:
    torch.manual_seed(0)
    return plain()


def overflow(model: nn.Module) -> None:
    model.head.weight.grad[1, 2] = math.inf


def scaled_run(cls, base: str, way: str, at: int, where: str, *, unscale: bool) -> tuple[nn.Module, list, list]:
    """Four iterations with one `update` each; what the scale was after each, and how many base steps there were."""
    model = network()
    if way == "Perturbation":
        optimizer = BASES[base](model.parameters())
        sam = Perturbation(model, rho=0.2, adaptive=cls is ASAM)
    else:
        optimizer = sam = cls.wrap(BASES[base](model.parameters()), rho=0.2, module=model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_factor=2.0, backoff_factor=0.5, growth_interval=2)
    scales, steps = [], []
    optimizer.register_step_post_hook(lambda *_: steps.append(1))
    for i in range(ITERATIONS):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, i)).backward()
        if i == at and where in ("first", "both"):
            overflow(model)
        if way == "first_step":
            optimizer.first_step(zero_grad=True)
            scaler.scale(loss_of(model, i)).backward()
        else:
            with sam.perturbed():
                scaler.scale(loss_of(model, i)).backward()
        if i == at and where in ("second", "both"):
            overflow(model)
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return model, scales, steps


@functools.lru_cache(maxsize=128)
def control_run(cls, base: str, at: int) -> tuple[nn.Module, list]:
    """Without a scale, and without the update in which one of the passes overflows; and plain training with GradScaler
    that overflows in the same update, for the scales."""
    model = network()
    optimizer, sam = BASES[base](model.parameters()), Perturbation(model, rho=0.2, adaptive=cls is ASAM)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_factor=2.0, backoff_factor=0.5, growth_interval=2)
    other, scales = network(), []
    plain_optimizer = BASES[base](other.parameters())
    for i in range(ITERATIONS):
        model.zero_grad()
        loss_of(model, i).backward()
        with sam.perturbed():
            loss_of(model, i).backward()
        if i != at:
            optimizer.step()
        plain_optimizer.zero_grad()
        scaler.scale(loss_of(other, i)).backward()
        if i == at:
            overflow(other)
        scaler.step(plain_optimizer)
        scaler.update()
        scales.append(scaler.get_scale())
    return model, scales


@pytest.mark.parametrize(
    ("way", "unscale"),  # unscale_ comes after the perturbed pass, and that of first_step ends in scaler.step
    [("perturbed", False), ("perturbed", True), ("first_step", False), ("Perturbation", False), ("Perturbation", True)],
)
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("cls", [SAM, ASAM])
def test_an_overflow_in_any_pass_of_any_iteration(cls, base, way, unscale):
    for at in range(ITERATIONS + 1):
        for where in ("first", "second", "both") if at < ITERATIONS else ("nowhere",):
            model, scales, steps = scaled_run(cls, base, way, at, where, unscale=unscale)
            control, expected = control_run(cls, base, at)
            assert scales == expected, (at, where)
            for p, q in zip(model.parameters(), control.parameters(), strict=True):
                assert torch.equal(p, q), (at, where)
            skipped = where != "nowhere"
            if way != "first_step" and base != "fused":  # there `step` itself is told, and leaves the update out
                assert len(steps) == ITERATIONS - skipped
            if skipped:
                assert min(scales) >= 2.0**9  # halved once
