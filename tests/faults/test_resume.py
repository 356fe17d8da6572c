"""Stopping at any step and going on from the file is not stopping: weights, momentum, loss scale, schedule, draws,
position in the data and counters; and what a checkpoint of SAM holds."""

from __future__ import annotations

import functools
import io
import math
import random

import numpy
import pytest
import torch
from torch import nn

from faults import tally
from faults.cases import VARIANTS, with_batchnorm
from faults.harness import bits, copied, seed
from sam_optim import ASAM, SAM

STEPS = 20
BASES = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=1e-3),
    "adam": functools.partial(torch.optim.Adam, lr=0.01, amsgrad=True),
}
X = torch.randn(64, 4, generator=torch.Generator().manual_seed(0))
Y = torch.arange(64) % 3


class Sampler:
    """Batches of 8 in an order that is drawn anew for each epoch; its state is where it is in that order."""

    def __init__(self) -> None:
        self.order, self.at = torch.randperm(64), 0

    def next(self) -> tuple[torch.Tensor, torch.Tensor]:
        if self.at == 64:
            self.order, self.at = torch.randperm(64), 0
        chosen = self.order[self.at : self.at + 8]
        self.at += 8
        return X[chosen], Y[chosen]


class Run:
    """Everything that training has: BatchNorm, dropout, draws of all three generators, a schedule of the rate and of
    rho, clipping, and every fifth step a gradient that is not finite in one of the passes."""

    def __init__(self, base: str, amp: bool):
        seed(0)
        self.model = with_batchnorm()
        self.optimizer = SAM(self.model.parameters(), BASES[base], rho=0.2, module=self.model)
        self.schedule = torch.optim.lr_scheduler.CosineAnnealingLR(self.optimizer, STEPS)
        self.scaler = torch.amp.GradScaler("cpu", init_scale=64.0, growth_interval=3) if amp else None
        self.sampler, self.step = Sampler(), 0

    def backward(self, x, y, number: int) -> None:
        with torch.autocast("cpu", torch.bfloat16, enabled=self.scaler is not None):
            loss = nn.functional.cross_entropy(self.model(x + 0.1 * random.random() + 0.1 * numpy.random.rand()), y)
        (loss if self.scaler is None else self.scaler.scale(loss)).backward()
        if self.step % 5 == 2 + number:
            self.model.hidden.bias.grad[0] = math.inf

    def advance(self) -> None:
        x, y = self.sampler.next()
        self.optimizer.zero_grad()
        self.backward(x, y, 1)
        with self.optimizer.perturbed():
            self.backward(x, y, 2)
        if self.scaler is None:
            self.optimizer.step()
        else:
            self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_(self.model.parameters(), 1.0)
            self.scaler.step(self.optimizer)
            self.scaler.update()
        self.schedule.step()
        self.optimizer.param_groups[0]["rho"] = 0.2 * (1 - self.step / (2 * STEPS))
        self.step += 1

    def save(self) -> bytes:
        numpy_name, keys, *numpy_rest = numpy.random.get_state()
        state = {
            "step": self.step,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "sampler": {"order": self.sampler.order, "at": self.sampler.at},
            "rng": [torch.get_rng_state(), random.getstate(), [numpy_name, torch.from_numpy(keys), *numpy_rest]],
        }
        file = io.BytesIO()
        torch.save(state, file)
        return file.getvalue()

    def load(self, content: bytes) -> None:
        state = torch.load(io.BytesIO(content), weights_only=True)
        self.step = state["step"]
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        if self.scaler:
            self.scaler.load_state_dict(state["scaler"])
        self.sampler.order, self.sampler.at = state["sampler"]["order"], state["sampler"]["at"]
        drawn, python, (name, keys, *rest) = state["rng"]
        torch.set_rng_state(drawn)
        random.setstate(python)
        numpy.random.set_state((name, keys.numpy(), *rest))


def loaded(content: bytes):
    """What a file holds, with tensors as their bits, so that == compares all of it."""

    def plain(value):
        if isinstance(value, torch.Tensor):
            return value.dtype, value.shape, bits(value)
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return [plain(v) for v in value] if isinstance(value, (list, tuple)) else value

    return plain(torch.load(io.BytesIO(content), weights_only=True))


@functools.lru_cache(maxsize=4)
def whole(base: str, amp: bool) -> tuple[list[bytes], list[bytes], int]:
    """A run without stops: its checkpoints and weights after each step, and how many steps were skipped."""
    run, files, weights = Run(base, amp), [], []
    for _ in range(STEPS):
        run.advance()
        files.append(run.save())
        weights.append(b"".join(bits(p) for p in run.model.parameters()))
    return files, weights, int(run.optimizer.num_skipped)


@pytest.mark.filterwarnings("ignore:a gradient at w")
@pytest.mark.parametrize("stop", range(1, STEPS + 1))
@pytest.mark.parametrize("amp", [False, True], ids=["fp32", "amp"])
@pytest.mark.parametrize("base", BASES)
def test_stopping_at_any_step_changes_no_bit(base, amp, stop):
    files, weights, num_skipped = whole(base, amp)
    assert len(set(weights)) == STEPS - 8  # it trains, but for the steps that are skipped
    run = Run(base, amp)
    seed(1234)
    run.load(files[stop - 1])
    equal = b"".join(bits(p) for p in run.model.parameters()) == weights[stop - 1]
    before = run.optimizer.num_skipped
    for k in range(stop, STEPS):
        run.advance()
        equal &= b"".join(bits(p) for p in run.model.parameters()) == weights[k]
    equal &= loaded(run.save()) == loaded(files[-1])
    tally.add(resumes=1, resumes_equal=equal)
    assert equal
    assert before == 0
    assert num_skipped == (0 if amp else 8)  # GradScaler counts its own
    assert run.optimizer.num_skipped == len([k for k in range(stop, STEPS) if not amp and k % 5 in (3, 4)])


def size_of(state) -> int:
    file = io.BytesIO()
    torch.save(state, file)
    return len(file.getvalue())


@pytest.mark.parametrize("variant", VARIANTS)
def test_the_state_is_the_bases_own_and_two_kilobytes_at_most(variant):
    """A copy of the weights in it would be 20 kB here."""
    v = VARIANTS[variant]
    sizes = []
    for make in (lambda m: SAM(m.parameters(), v.base, module=m, **v.sam), lambda m: v.base(m.parameters())):
        model = (
            nn.Linear(100, 50).to(v.dtype)
            if variant != "groups"
            else nn.Sequential(nn.Linear(100, 50), nn.Linear(50, 2))
        )
        optimizer = make(model)
        base = getattr(optimizer, "base_optimizer", optimizer)
        base.reach = lambda *_: None

        def closure(model=model, optimizer=optimizer):
            optimizer.zero_grad()
            loss = model(torch.ones(2, 100, dtype=v.dtype)).float().square().mean()
            loss.backward()
            return loss

        if optimizer is base:
            closure()
            optimizer.step()
        else:
            optimizer.step(closure)
            optimizer.step(closure)
        state = optimizer.state_dict()
        sizes.append(size_of(state))
        file = io.BytesIO()
        torch.save(state, file)
        assert torch.load(io.BytesIO(file.getvalue()), weights_only=True)["param_groups"] == state["param_groups"]
    assert abs(sizes[0] - sizes[1]) <= 2048


def old_style_state(model: nn.Module, kind: str) -> dict:
    """What other packages' SAM save: scratch of the size of the weights, and no momentum of the base."""
    scratch = {"davda54": ["old_p"], "pytorch_optimizer": ["old_p", "e_w"]}[kind]
    params = list(model.parameters())
    state = {i: {name: torch.full_like(p, 7.0) for name in scratch} for i, p in enumerate(params)}
    group = {"rho": 0.07, "adaptive": False, "lr": 0.3, "momentum": 0.9, "dampening": 0, "weight_decay": 0}
    group |= {"nesterov": False, "params": list(range(len(params)))}
    return {"state": state, "param_groups": [group]}


@pytest.mark.parametrize("kind", ["davda54", "pytorch_optimizer"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("cls", [SAM, ASAM])
def test_the_state_of_other_packages_loads_and_its_scratch_is_left_out(cls, base, kind):
    model, twin = nn.Linear(3, 2), nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    result, fresh = (cls(m.parameters(), base, lr=0.1) for m in (model, twin))
    saved = old_style_state(model, kind)
    if base is torch.optim.AdamW:
        saved["param_groups"][0] = {**fresh.state_dict()["param_groups"][0], "rho": 0.07, "adaptive": False, "lr": 0.3}
    with pytest.warns(UserWarning, match="was never in that file and is lost"):
        result.load_state_dict(saved)
    assert not any(result.state.values())
    group = result.param_groups[0]
    assert (group["rho"], group["adaptive"], group["lr"]) == (0.07, False, 0.3)
    fresh.param_groups[0] |= {k: v for k, v in group.items() if k != "params"}
    for optimizer, m in ((result, model), (fresh, twin)):

        def closure(optimizer=optimizer, m=m):
            optimizer.zero_grad()
            loss = m(torch.ones(2, 3)).square().sum()
            loss.backward()
            return loss

        optimizer.step(closure)
        optimizer.step(closure)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))


@pytest.mark.parametrize("through", ["base", "sam"])
def test_state_loaded_through_either_of_the_two_objects_holds(through):
    """`SAM.wrap(base)`: schedulers and checkpoints may know the base only."""
    model, twin = nn.Linear(3, 2), nn.Linear(3, 2)
    twin.load_state_dict(model.state_dict())
    bases = [torch.optim.SGD(m.parameters(), lr=0.1, momentum=0.9) for m in (model, twin)]
    one, two = (SAM.wrap(b, rho=0.1) for b in bases)

    def closure(m):
        m.zero_grad()
        loss = m(torch.ones(2, 3)).square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        one.step(functools.partial(closure, model))
    plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    plain.load_state_dict(one.state_dict())
    for state in (
        one.state_dict(),
        {**plain.state_dict(), "param_groups": [dict(plain.param_groups[0], lr=0.05, params=[0, 1])]},
    ):
        target = bases[1] if through == "base" else two
        for key in ("rho", "adaptive", "eta", "norm"):
            state["param_groups"][0].pop(key, None)  # of a plain optimizer
        twin.load_state_dict(model.state_dict())
        target.load_state_dict(copied(state))
        one.param_groups[0]["lr"] = state["param_groups"][0]["lr"]
        for _ in range(2):
            one.step(functools.partial(closure, model))
            two.step(functools.partial(closure, twin))
        assert all(torch.equal(p, q) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
        assert two.ball == one.ball
