"""torch.compile around a step: what is compiled, what stays outside, and that both are the eager step."""

import re
import shutil

import pytest
import torch
from torch import nn
from torch._dynamo.testing import CompileCounter, CompileCounterWithBackend
from torch._dynamo.utils import counters

from sam_optim import ASAM, SAM, Perturbation

BASES = {"sgd": (torch.optim.SGD, {"momentum": 0.9}), "adamw": (torch.optim.AdamW, {})}
X = torch.randn(16, 6, generator=torch.Generator().manual_seed(0))
Y = torch.randint(3, (16,), generator=torch.Generator().manual_seed(1))
# Dynamo looks at the loss that a step returns, of any optimizer
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf")


@pytest.fixture(autouse=True)
def fresh_dynamo():
    torch._dynamo.reset()
    counters.clear()
    yield
    assert torch._C._dynamo.eval_frame.set_eval_frame(None) is None  # no compiler is left behind
    torch._dynamo.reset()


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.BatchNorm1d(8), nn.Linear(8, 3))


def closure_of(model, optimizer):
    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(X), Y)
        loss.backward()
        return loss

    return closure


def step_itself(model, optimizer, backend):
    compiled = torch.compile(optimizer.step, backend=backend)
    closure = closure_of(model, optimizer)
    return lambda: compiled(closure)


def function_around(model, optimizer, backend):
    closure = closure_of(model, optimizer)
    return torch.compile(lambda: optimizer.step(closure), backend=backend)


def function_with_its_closure(model, optimizer, backend):
    @torch.compile(backend=backend)
    def train():
        def closure():
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(X), Y)
            loss.backward()
            return loss

        return optimizer.step(closure)

    return train


def only_the_update(model, optimizer, backend):
    compiled = torch.compile(optimizer.step, backend=backend)
    closure = closure_of(model, optimizer)

    def step():
        closure()
        if isinstance(optimizer, SAM):
            with optimizer.perturbed():
                closure()
        compiled()

    return step


def all_in_two_phases(model, optimizer, backend):
    closure = closure_of(model, optimizer)

    @torch.compile(backend=backend)
    def step():
        closure()
        if isinstance(optimizer, SAM):
            with optimizer.perturbed():
                closure()
        optimizer.step()

    return step


def in_two_steps(model, optimizer, backend):
    closure = closure_of(model, optimizer)

    @torch.compile(backend=backend)
    def step():
        closure()
        if not isinstance(optimizer, SAM):
            return optimizer.step()
        optimizer.first_step(zero_grad=True)
        closure()
        return optimizer.second_step()

    return step


WAYS = [
    step_itself,
    function_around,
    function_with_its_closure,
    only_the_update,
    all_in_two_phases,
    in_two_steps,
]


def name(value):
    return getattr(value, "__name__", value)


every_way = pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
every_base = pytest.mark.parametrize("base", BASES)


def eager(base, cls, **kwargs):
    model = network()
    factory, flags = BASES[base]
    optimizer = cls(model.parameters(), factory, lr=0.01, module=model, **flags, **kwargs)
    closure = closure_of(model, optimizer)
    for _ in range(6):
        optimizer.step(closure)
    return model


@pytest.mark.parametrize("cls", [SAM, ASAM])
@pytest.mark.parametrize(("way", "base"), [(w, list(BASES)[i % 2]) for i, w in enumerate(WAYS)], ids=name)
def test_a_compiled_step_is_the_eager_one_and_is_compiled_once(way, base, cls):
    truth = eager(base, cls, rho=0.1)
    model, counter = network(), CompileCounter()
    factory, flags = BASES[base]
    optimizer = cls(model.parameters(), factory, lr=0.01, rho=0.1, module=model, **flags)
    step = way(model, optimizer, counter)
    for _ in range(2):  # the base's state is made in the first
        step()
    compiled = counter.frame_count
    with torch._dynamo.config.patch(error_on_recompile=True):
        for _ in range(4):
            step()
    assert counter.frame_count == compiled
    assert optimizer.last_step.radius.item() == pytest.approx(0.1)
    for p, q in zip((*model.parameters(), *model.buffers()), (*truth.parameters(), *truth.buffers()), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(("way", "base"), [(w, list(BASES)[(i + 1) % 2]) for i, w in enumerate(WAYS)], ids=name)
def test_of_sam_and_its_base_nothing_is_compiled(way, base):
    """Graphs break at the border of SAM, as torch's optimizers break them, and nowhere inside."""
    factory, flags = BASES[base]
    model, counter = network(), CompileCounterWithBackend("eager")
    step = way(model, SAM(model.parameters(), factory, lr=0.01, **flags), counter)
    for _ in range(3):
        step()
    calls = [[str(n.target) for n in g.graph.nodes if n.op.startswith("call")] for g in counter.graphs]
    assert all(any("cross_entropy" in call for call in graph) for graph in calls)
    assert len(calls) == (way in (all_in_two_phases, in_two_steps))  # what is in the user's function, not in a closure
    ours = {
        f for reason in counters["graph_break"] for f in re.findall(r"`(?:SAM|Perturbation|sam_optim)\.\w+`", reason)
    }
    assert ours
    assert ours <= {"`SAM.step`", "`SAM.zero_grad`", "`SAM.perturbed`", "`SAM.first_step`", "`SAM.second_step`"}


def test_what_a_base_of_ones_own_remembers_is_not_dropped():
    """Dynamo forgets what an Optimizer assigns to itself in a frame with tensor operations: it is kept out of that."""

    class Counting(torch.optim.SGD):
        steps = 0

        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for p in group["params"]:
                    p.add_(p.grad, alpha=-group["lr"])
            self.steps += 1

    model = network()
    optimizer = SAM(model.parameters(), Counting, lr=0.01)
    step = step_itself(model, optimizer, "eager")
    for _ in range(3):
        step()
    assert optimizer.base_optimizer.steps == 3


def test_a_fault_in_a_compiled_closure_leaves_nothing_behind():
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.AdamW, lr=0.01, rho=0.5, module=model)
    calls = []

    def closure():
        calls.append(1)
        loss = closure_of(model, optimizer)()
        if len(calls) == 2:
            raise ZeroDivisionError
        return loss

    compiled = torch.compile(optimizer.step, backend="eager")
    before = [t.clone() for t in (*model.parameters(), *model.buffers())]
    with pytest.raises(ZeroDivisionError):
        compiled(closure)
    assert all(torch.equal(a, b) for a, b in zip(before, (*model.parameters(), *model.buffers()), strict=True))
    assert not optimizer.perturbation.active
    assert torch._C._dynamo.eval_frame.set_eval_frame(None) is None
    compiled(closure)
    assert optimizer.last_step.sharpness > 0


def closures(sam, base, closure):
    loss = sam.backward(closure)
    base.step()
    return loss


def contexts(sam, base, closure):
    loss = closure()
    with sam.perturbed():
        closure()
    base.step()
    return loss


def microbatches(sam, base, closure):
    with sam.microbatch():
        loss = closure()
        with sam.perturbed():
            closure()
    base.step()
    return loss


@pytest.mark.parametrize("passes", [closures, contexts, microbatches])
def test_a_perturbation_alone_in_a_compiled_function(passes):
    runs = []
    for compile_it in (False, True):
        torch._dynamo.reset()
        model = network()
        sam, base = Perturbation(model, rho=0.1), torch.optim.SGD(model.parameters(), lr=0.1)
        step = torch.compile(passes, backend="eager") if compile_it else passes
        losses = [step(sam, base, closure_of(model, base)).detach() for _ in range(4)]
        runs.append([*model.parameters(), *model.buffers(), torch.stack(losses)])
    for p, q in zip(*runs, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-7)


@pytest.mark.filterwarnings("ignore:Using .torch.compile.module:UserWarning")  # an optimizer of another test may wait
@pytest.mark.parametrize("compiled", ["model", "step"])
def test_replayed_draws_in_compiled_code(compiled):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 64), nn.Dropout(0.5), nn.Linear(64, 3))
    optimizer = SAM(model.parameters(), lr=0.0, rho=1e-6, module=model, replay_rng=True)
    network = torch.compile(model, backend="eager") if compiled == "model" else model
    closure = closure_of(network, optimizer)
    step = torch.compile(optimizer.step, backend="eager") if compiled == "step" else optimizer.step
    losses = []
    for _ in range(4):
        step(closure)
        losses.append(optimizer.last_step.loss.item())
        assert abs(optimizer.last_step.sharpness) < 1e-5  # other masks would make it 0.1
    assert len(set(losses)) == 4


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("g++") is None, reason="Inductor compiles C++")
@every_way
@every_base
def test_inductors_step_is_the_eager_one(way, base):
    truth = eager(base, SAM, rho=0.1)
    model = network()
    factory, flags = BASES[base]
    optimizer = SAM(model.parameters(), factory, lr=0.01, rho=0.1, module=model, **flags)
    step = way(model, optimizer, "inductor")
    for i in range(6):
        with torch._dynamo.config.patch(error_on_recompile=i > 1):
            step()
    for p, q in zip((*model.parameters(), *model.buffers()), (*truth.parameters(), *truth.buffers()), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-4, atol=1e-5)
