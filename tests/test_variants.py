"""Variants of SAM against their papers' formulas, written by hand in float64, in every way of stepping."""

import copy
import math

import pytest
import ranks
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from sam_optim import GSAM, SAM, FriendlySAM

LOSS = nn.functional.cross_entropy
STEPS = 20
EPS = 1e-12  # of weights of order 1: float64, over 20 steps


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 8), nn.Tanh(), nn.Linear(8, 3)).double()


def batch(i):
    generator = torch.Generator().manual_seed(i)
    return torch.randn(8, 6, generator=generator).double(), torch.randint(3, (8,), generator=generator)


def dot(xs, ys):
    return sum((x * y).sum() for x, y in zip(xs, ys, strict=True))


class ByHand:
    """w <- SGD with momentum 0.9 along what `descent` makes of g(w) and g(w + e), e = rho d / ||d||, d by `ascent`."""

    def __init__(self, rho=0.1, lr=0.1):
        self.model, self.rho, self.lr = network(), rho, lr
        self.weights = [p.detach().clone() for p in self.model.parameters()]
        self.momentum = [torch.zeros_like(w) for w in self.weights]
        self.mean = None

    def gradient(self, weights, i):
        with torch.no_grad():
            for p, w in zip(self.model.parameters(), weights, strict=True):
                p.copy_(w)
        x, y = batch(i)
        return torch.autograd.grad(LOSS(self.model(x), y), list(self.model.parameters()))

    def ascent(self, g):
        return g

    def descent(self, g, there):
        return there

    def step(self, i):
        g = self.gradient(self.weights, i)
        d = self.ascent(g)
        length = math.sqrt(dot(d, d))
        there = self.gradient([w + self.rho * x / length for w, x in zip(self.weights, d, strict=True)], i)
        self.momentum = [0.9 * v + x for v, x in zip(self.momentum, self.descent(g, there), strict=True)]
        self.weights = [w - self.lr * v for w, v in zip(self.weights, self.momentum, strict=True)]


class GSAMByHand(ByHand):
    def descent(self, g, there):
        share = dot(g, there) / dot(there, there)
        return [b - 0.4 * (a - share * b) for a, b in zip(g, there, strict=True)]


class FriendlyByHand(ByHand):
    def ascent(self, g):
        if self.mean is None:
            self.mean = [x.clone() for x in g]
            return g
        d = [x - 0.8 * m for x, m in zip(g, self.mean, strict=True)]
        self.mean = [0.9 * m + 0.1 * x for x, m in zip(g, self.mean, strict=True)]
        return d


VARIANTS = {
    "SAM": (SAM, {}, ByHand),
    "GSAM": (GSAM, {"alpha": 0.4}, GSAMByHand),
    "FriendlySAM": (FriendlySAM, {"sigma": 0.8, "lmbda": 0.9}, FriendlyByHand),
}


def make(name, model, **options):
    cls, settings, _ = VARIANTS[name]
    return cls(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9, **settings, **options)


def closure_of(model, optimizer, i):
    def closure():
        optimizer.zero_grad()
        loss = LOSS(model(batch(i)[0]), batch(i)[1])
        loss.backward()
        return loss

    return closure


def backward(model, i, scale=1.0):
    x, y = batch(i)
    (LOSS(model(x), y) * scale).backward()


def by_closure(model, optimizer, i):
    optimizer.step(closure_of(model, optimizer, i))


def by_list(model, optimizer, i):
    optimizer.step([closure_of(model, optimizer, i)])


def by_contexts(model, optimizer, i):
    optimizer.zero_grad()
    backward(model, i)
    with optimizer.perturbed():
        backward(model, i)
    optimizer.step()


def by_microbatch(model, optimizer, i):
    optimizer.zero_grad()
    with optimizer.microbatch():
        backward(model, i)
        with optimizer.perturbed():
            backward(model, i)
    optimizer.step()


def by_two_steps(model, optimizer, i):
    backward(model, i)
    optimizer.first_step(zero_grad=True)
    backward(model, i)
    optimizer.second_step(zero_grad=True)


def by_scaler(model, optimizer, i):
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    optimizer.zero_grad()
    for part in (None, optimizer.perturbed()):
        x, y = batch(i)
        if part is None:
            scaler.scale(LOSS(model(x), y)).backward()
        else:
            with part:
                scaler.scale(LOSS(model(x), y)).backward()
    scaler.step(optimizer)
    scaler.update()


WAYS = [by_closure, by_list, by_contexts, by_microbatch, by_two_steps, by_scaler]


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_its_formula_in_every_way_of_stepping(name, way):
    model, by_hand = network(), VARIANTS[name][2]()
    optimizer = make(name, model)
    for i in range(STEPS):
        way(model, optimizer, i)
        by_hand.step(i)
    for p, w in zip(model.parameters(), by_hand.weights, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=0, atol=EPS)


@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("name", VARIANTS)
def test_resuming_a_variant_is_not_stopping(name, base):
    cls, settings, _ = VARIANTS[name]
    lasting, model = network(), network()
    optimizer = cls(lasting.parameters(), base, lr=0.01, **settings)
    for i in range(8):
        by_closure(lasting, optimizer, i)
    optimizer = cls(model.parameters(), base, lr=0.01, **settings)
    for i in range(4):
        by_closure(model, optimizer, i)
    resumed = network()
    resumed.load_state_dict(model.state_dict())
    again = cls(resumed.parameters(), base, lr=0.01, **settings)
    again.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    for i in range(4, 8):
        by_closure(resumed, again, i)
    assert all(torch.equal(p, q) for p, q in zip(resumed.parameters(), lasting.parameters(), strict=True))


@pytest.mark.parametrize("name", VARIANTS)
def test_a_fault_in_the_second_pass_leaves_a_variants_state_as_it_was(name):
    model = network()
    optimizer = make(name, model)
    for i in range(3):
        by_closure(model, optimizer, i)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))
    calls = []

    def faulty():
        calls.append(1)
        loss = closure_of(model, optimizer, 3)()
        if len(calls) == 2:
            raise KeyboardInterrupt
        return loss

    with pytest.raises(KeyboardInterrupt):
        optimizer.step(faulty)
    after = model.state_dict(), optimizer.state_dict()["state"]
    torch.testing.assert_close(after, before, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore:a gradient at w")
def test_a_step_that_is_left_out_leaves_a_variants_state_as_it_was():
    model = network()
    optimizer = make("FriendlySAM", model)
    for i in range(2):
        by_closure(model, optimizer, i)
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()["state"]))

    def poisoned():
        loss = closure_of(model, optimizer, 2)()
        model[0].weight.grad[0, 0] = math.nan
        return loss

    optimizer.step(poisoned)
    assert optimizer.num_skipped == 1
    torch.testing.assert_close((model.state_dict(), optimizer.state_dict()["state"]), before, rtol=0, atol=0)


def worker(rank, name, way):
    model = network()
    ddp = DDP(model)
    optimizer = make(name, model, module=ddp)
    for i in range(STEPS):
        WAYS[way](ddp, optimizer, 2 * i + rank)
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


@pytest.mark.parametrize("way", [0, 2], ids=["closure", "contexts"])
@pytest.mark.parametrize("name", ["GSAM", "FriendlySAM"])
def test_over_two_ranks_a_variant_follows_the_gradient_of_all(name, way):
    """Both ranks have the same weights, those of one process that sees both batches."""

    class OfBoth(VARIANTS[name][2]):
        def gradient(self, weights, i):
            both = [super(OfBoth, self).gradient(weights, 2 * i + rank) for rank in range(2)]
            return [(a + b) / 2 for a, b in zip(*both, strict=True)]

    by_hand = OfBoth()
    for i in range(STEPS):
        by_hand.step(i)
    expected = torch.cat([w.flatten() for w in by_hand.weights])
    first, second = (torch.tensor(x, dtype=torch.float64) for x in ranks.spawn(worker, name, way))
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected, rtol=0, atol=EPS)


def test_wrap_makes_a_variant_around_an_optimizer_that_exists():
    model, by_hand = network(), GSAMByHand()
    base = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    optimizer = GSAM.wrap(base, rho=0.1, alpha=0.4)
    for i in range(3):
        by_closure(model, optimizer, i)
        by_hand.step(i)
    for p, w in zip(model.parameters(), by_hand.weights, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=0, atol=EPS)


def test_settings_that_do_not_exist_are_refused():
    model = network()
    for cls, bad in ((GSAM, {"alpha": -1}), (FriendlySAM, {"sigma": math.nan}), (FriendlySAM, {"lmbda": 1.0})):
        with pytest.raises(ValueError, match=str(next(iter(bad)))):
            cls(model.parameters(), torch.optim.SGD, lr=0.1, **bad)
