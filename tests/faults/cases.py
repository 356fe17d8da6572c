"""The variants and the ways of stepping that faults are injected into. A new way is one more entry of PATHS."""

from __future__ import annotations

import functools
import math
from collections import OrderedDict

import pytest
import torch
from torch import nn

from faults.harness import POINTS, Path, Rig, State, Variant


def with_batchnorm() -> nn.Module:
    parts = {"hidden": nn.Linear(4, 5), "norm": nn.BatchNorm1d(5), "act": nn.ReLU(), "drop": nn.Dropout(0.3)}
    return nn.Sequential(OrderedDict(parts | {"head": nn.Linear(5, 3)}))


def plain() -> nn.Module:
    return nn.Sequential(OrderedDict({"hidden": nn.Linear(4, 5), "act": nn.Tanh(), "head": nn.Linear(5, 3)}))


def wide() -> nn.Module:
    """With a weight that is not small, moved on its own."""
    return nn.Sequential(OrderedDict({"hidden": nn.Linear(4, 1100), "act": nn.Tanh(), "head": nn.Linear(1100, 3)}))


def flat() -> nn.Module:
    """All parameters are views of one buffer, as in a flattened optimizer: they have to be moved in place."""
    model = with_batchnorm()
    whole = torch.cat([p.detach().flatten() for p in model.parameters()])
    parts = whole.split([p.numel() for p in model.parameters()])
    for p, part in zip(model.parameters(), parts, strict=True):
        p.data = part.view_as(p)
    return model


def reaching(base: type[torch.optim.Optimizer]) -> type[torch.optim.Optimizer]:
    """The base, with the two points of its own step."""

    class Reaching(base):
        def step(self, closure=None):
            self.reach("in base step")
            step = base.step
            (step.__wrapped__ if getattr(step, "hooked", None) else step)(self)  # its hooks are this step's
            self.reach("base step done")

    return Reaching


SGD, AdamW = reaching(torch.optim.SGD), reaching(torch.optim.AdamW)
MOMENTUM = functools.partial(SGD, lr=0.1, momentum=0.9)


def variant(base=MOMENTUM, model=with_batchnorm, with_module=True, dtype=torch.float32, **sam) -> Variant:
    return Variant({"rho": 0.3} | sam, base, model, with_module, dtype)


def two_groups(params):
    """The head stays where it is in the ascent."""
    *moving, weight, bias = params
    return SGD([{"params": moving}, {"params": [weight, bias], "rho": 0.0}], lr=0.1, momentum=0.9)


VARIANTS = {
    "sam": variant(),
    "asam": variant(adaptive=True),
    "filter": variant(adaptive="filter"),
    "layer": variant(adaptive="layer", rho=0.1),
    "inf": variant(norm=math.inf, rho=0.05),
    "foreach": variant(functools.partial(SGD, lr=0.1, momentum=0.9, foreach=True), foreach=True),
    "for-loop": variant(functools.partial(SGD, lr=0.1, momentum=0.9, foreach=False), foreach=False),
    "adamw": variant(functools.partial(AdamW, lr=0.01), adaptive=True),
    "fused": variant(functools.partial(AdamW, lr=0.01, fused=True)),
    "replay": variant(replay_rng=True),
    "wide": variant(model=wide, rho=1.0),
    "flat": variant(model=flat),
    "groups": variant(two_groups),
    "no module": variant(model=plain, with_module=False),
    "float32 pass": variant(dtype=torch.bfloat16, rounding="float32"),
    "bfloat16": variant(model=plain, dtype=torch.bfloat16, rho=20.0),  # smaller radii are lost in rounding
}


def by_closure(rig: Rig, i: int) -> None:
    rig.mark()
    rig.optimizer.step(_closure(rig, i))


def by_ascent_closure(rig: Rig, i: int) -> None:
    """Another loss for the ascent: half of it."""
    rig.mark()

    def ascent():
        rig.reach("before pass 1")
        rig.optimizer.zero_grad()
        return rig.backward(1, i, 0.5)

    def descent():
        rig.optimizer.zero_grad()
        return rig.backward(2, i)

    rig.optimizer.step(descent, ascent_closure=ascent)


def by_list(rig: Rig, i: int) -> None:
    rig.mark()
    rig.optimizer.step([_quiet(rig, _closure(rig, 2 * i)), _closure(rig, 2 * i + 1)])


def by_contexts(rig: Rig, i: int) -> None:
    rig.reach("before pass 1")
    rig.optimizer.zero_grad()
    rig.backward(1, i)
    rig.mark()
    with rig.sam.perturbed():
        rig.backward(2, i)
    if rig.scaler is None:
        rig.optimizer.step()
    else:
        rig.scaler.step(rig.optimizer)
        rig.scaler.update()


def by_two_steps(rig: Rig, i: int) -> None:
    rig.reach("before pass 1")
    rig.optimizer.zero_grad()
    rig.backward(1, i)
    rig.mark()
    rig.optimizer.first_step(zero_grad=True)
    rig.backward(2, i)
    if rig.scaler is None:
        rig.optimizer.second_step()
    else:
        rig.scaler.step(rig.optimizer)
        rig.scaler.update()


def by_microbatches(rig: Rig, i: int) -> None:
    rig.optimizer.zero_grad()
    with rig.sam.microbatch():
        _quiet(rig, lambda: rig.backward(1, 2 * i, 0.5))()
        with rig.sam.perturbed():
            _quiet(rig, lambda: rig.backward(2, 2 * i, 0.5))()
    rig.reach("before pass 1")
    rig.mark()
    with rig.sam.microbatch():
        rig.backward(1, 2 * i + 1, 0.5)
        with rig.sam.perturbed():
            rig.backward(2, 2 * i + 1, 0.5)
    rig.optimizer.step()


def _closure(rig: Rig, i: int):
    calls = []

    def closure():
        calls.append(1)
        if len(calls) == 1:
            rig.reach("before pass 1")
        rig.optimizer.zero_grad()
        return rig.backward(len(calls), i)

    return closure


def _quiet(rig: Rig, backward):
    """The batch before the one that the fault is for."""

    def run():
        point, rig.point = rig.point, None
        try:
            return backward()
        finally:
            rig.point = point

    return run


def _exit(rig: Rig) -> None:
    rig.perturbation.exit(failed=True)


def _drop(rig: Rig) -> None:
    del rig.optimizer, rig.sam  # freed at once: nothing in the package makes a cycle with it
    rig.make_optimizer(rig.base)


PASS_2 = frozenset(POINTS[3:6])
PATHS = {
    "step(closure)": Path(by_closure, inside=frozenset(POINTS[:7])),
    "step(closure, ascent_closure)": Path(by_ascent_closure, inside=frozenset(POINTS[:7])),
    "step([closures])": Path(by_list, inside=frozenset(POINTS[:7]), num_batches=2),
    "perturbed()": Path(by_contexts, inside=PASS_2),
    "first_step, exit": Path(by_two_steps, open=PASS_2, give_up=_exit),
    "first_step, dropped": Path(by_two_steps, open=PASS_2, give_up=_drop),
    "microbatch()": Path(by_microbatches, inside=frozenset(POINTS[1:6]), num_batches=2, mean_at_end=False),
    "Perturbation": Path(by_contexts, inside=PASS_2, wrapped=False),
    "Perturbation.microbatch()": Path(
        by_microbatches, inside=frozenset(POINTS[1:6]), wrapped=False, num_batches=2, mean_at_end=False
    ),
    "GradScaler": Path(by_contexts, inside=PASS_2, scaler=True),
    "GradScaler, first_step": Path(by_two_steps, open=PASS_2, scaler=True, give_up=_exit),
}


@functools.lru_cache(maxsize=4)
def trajectory(variant: str, path: str) -> list[State]:
    """The states before and after each step of a run without faults."""
    rig = Rig(VARIANTS[variant], PATHS[path])
    states = [rig.state()]
    for i in range(3):
        rig.step(i)
        states.append(rig.state())
    return states


def _cases():
    """All variants with one way of stepping, and all ways of stepping with one variant; the rest is slow."""
    for variant in VARIANTS:
        for path in PATHS:
            if not (VARIANTS[variant].dtype == torch.bfloat16 and PATHS[path].scaler):
                marks = () if variant == "sam" or path == "step(closure)" else pytest.mark.slow
                yield pytest.param(variant, path, id=f"{variant}-{path}", marks=marks)


every_case = pytest.mark.parametrize(("variant", "path"), list(_cases()))
