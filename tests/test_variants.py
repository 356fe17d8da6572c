"""Variants of SAM against their papers' formulas, written by hand in float64, in every way of stepping."""

import copy
import math
import pickle

import pytest
import ranks
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel as DDP

from sam_optim import GSAM, MSAM, SAM, FriendlySAM, LookSAM, StaleSAM, VaSSO, late_phase, periodic

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
        length = math.sqrt(dot(d, d)) or 1.0
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


class VaSSOByHand(ByHand):
    def ascent(self, g):
        before = g if self.mean is None else self.mean
        self.mean = [0.7 * d + 0.3 * x for d, x in zip(before, g, strict=True)]
        return self.mean


class LookByHand(ByHand):
    """Every third step is SAM's."""

    across = None

    def step(self, i):
        self.ascends = self.across is None or i % 3 == 0
        super().step(i)

    def ascent(self, g):
        return g if self.ascends else [0 * x for x in g]

    def descent(self, g, there):
        if self.ascends:
            share = dot(g, there) / dot(g, g)
            self.across = [b - share * a for a, b in zip(g, there, strict=True)]
            return there
        factor = 0.6 * math.sqrt(dot(g, g) / dot(self.across, self.across))
        return [a + factor * v for a, v in zip(g, self.across, strict=True)]


class MSAMByHand(ByHand):
    def ascent(self, g):
        return [-v for v in self.momentum]


class StaleByHand(ByHand):
    def ascent(self, g):
        return [0 * x for x in g] if self.mean is None else self.mean

    def descent(self, g, there):
        self.mean = there
        return there


VARIANTS = {
    "SAM": (SAM, {}, ByHand),
    "GSAM": (GSAM, {"alpha": 0.4}, GSAMByHand),
    "FriendlySAM": (FriendlySAM, {"sigma": 0.8, "lmbda": 0.9}, FriendlyByHand),
    "VaSSO": (VaSSO, {"theta": 0.3}, VaSSOByHand),
    "LookSAM": (LookSAM, {"every": 3, "alpha": 0.6}, LookByHand),
    "MSAM": (MSAM, {}, MSAMByHand),
    "StaleSAM": (StaleSAM, {}, StaleByHand),
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


def by_needed_passes(model, optimizer, i):
    """As a loop does that asks which passes are needed."""
    optimizer.zero_grad()
    if not optimizer.one_pass:
        backward(model, i)
    if optimizer.ascends:
        with optimizer.perturbed():
            backward(model, i)
    optimizer.step()


WAYS = [by_closure, by_list, by_contexts, by_microbatch, by_two_steps, by_scaler, by_needed_passes]


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


@pytest.mark.parametrize("base", ["SGD", "fused SGD"])
@pytest.mark.parametrize("way", ["contexts", "microbatch", "first and second step", "unscaled before clipping"])
@pytest.mark.parametrize("name", VARIANTS)
def test_a_loss_scale_that_changes_is_in_nothing_that_a_variant_remembers(name, way, base):
    """Also after a step that is left out for an inf, and in a run that is resumed from a checkpoint."""
    model, by_hand = network(), VARIANTS[name][2]()
    cls, settings, _ = VARIANTS[name]
    arguments = {"rho": 0.1, "lr": 0.1, "momentum": 0.9, **({"fused": True} if base == "fused SGD" else {}), **settings}
    optimizer = cls(model.parameters(), torch.optim.SGD, **arguments)
    scaler = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2, growth_factor=4.0)

    def backward_scaled(i, factor=1.0):
        scaler.scale(LOSS(model(batch(i)[0]), batch(i)[1]) * factor).backward()

    def passes(i, factor=1.0):
        if not optimizer.one_pass:
            backward_scaled(i, factor)
        with optimizer.perturbed():
            backward_scaled(i, factor)

    for i in range(STEPS):
        if i == 7 and (name, base) != ("LookSAM", "fused SGD"):  # where it is the base that skips, the step is counted
            optimizer.zero_grad()
            passes(i, math.inf)
            scaler.step(optimizer)
            scaler.update()
            optimizer.zero_grad()
        if i == 12:
            saved = copy.deepcopy((optimizer.state_dict(), scaler.state_dict()))
            optimizer = cls(model.parameters(), torch.optim.SGD, **arguments)
            optimizer.load_state_dict(saved[0])
            scaler = torch.amp.GradScaler("cpu")
            scaler.load_state_dict(saved[1])
        optimizer.zero_grad()
        if way == "microbatch":
            with optimizer.microbatch():
                passes(i)
        elif way == "first and second step" and not optimizer.one_pass:
            backward_scaled(i)
            optimizer.first_step()
            backward_scaled(i)
        else:
            passes(i)
        if way == "unscaled before clipping":
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
        by_hand.step(i)
    assert scaler.get_scale() > 1e4
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
        if len(calls) == 2 or optimizer.one_pass:
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


def replicated(rank, name, way):
    model = network()
    ddp = DDP(model)
    optimizer = make(name, model, module=ddp)
    for i in range(STEPS):
        WAYS[way](ddp, optimizer, 2 * i + rank)
    return torch.cat([p.detach().flatten() for p in model.parameters()]).tolist()


def sharded(rank, name):
    from torch.distributed import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    model = network()
    fully_shard(model, mesh=init_device_mesh("cpu", (2,)))
    optimizer = make(name, model, module=model)
    for i in range(6):
        by_needed_passes(model, optimizer, 2 * i + rank)
    return torch.cat([p.full_tensor().detach().flatten() for p in model.parameters()]).tolist()


REPLICATED = [(name, way) for name in VARIANTS if name != "SAM" for way in (0, 2)]
SHARDED = ["VaSSO", "LookSAM", "MSAM", "StaleSAM"]


def worker(rank):
    return [replicated(rank, *case) for case in REPLICATED], [sharded(rank, name) for name in SHARDED]


@pytest.fixture(scope="module")
def of_ranks():
    """The weights of every case on both ranks."""
    return ranks.spawn(worker)


@pytest.mark.parametrize(("name", "way"), REPLICATED)
def test_over_two_ranks_a_variant_follows_the_gradient_of_all(of_ranks, name, way):
    """Both ranks have the same weights, those of one process that sees both batches."""

    class OfBoth(VARIANTS[name][2]):
        def gradient(self, weights, i):
            both = [super(OfBoth, self).gradient(weights, 2 * i + rank) for rank in range(2)]
            return [(a + b) / 2 for a, b in zip(*both, strict=True)]

    by_hand = OfBoth()
    for i in range(STEPS):
        by_hand.step(i)
    expected = torch.cat([w.flatten() for w in by_hand.weights])
    case = REPLICATED.index((name, way))
    first, second = (torch.tensor(replicas[case], dtype=torch.float64) for replicas, _ in of_ranks)
    assert torch.equal(first, second)
    torch.testing.assert_close(first, expected, rtol=0, atol=EPS)


@pytest.mark.parametrize("name", SHARDED)
def test_over_a_sharded_model_a_variant_has_the_norms_of_all_of_it(of_ranks, name):
    class OfBoth(VARIANTS[name][2]):
        def gradient(self, weights, i):
            both = [super(OfBoth, self).gradient(weights, 2 * i + rank) for rank in range(2)]
            return [(a + b) / 2 for a, b in zip(*both, strict=True)]

    by_hand = OfBoth()
    for i in range(6):
        by_hand.step(i)
    expected = torch.cat([w.flatten() for w in by_hand.weights])
    for _, shards in of_ranks:
        weights = torch.tensor(shards[SHARDED.index(name)], dtype=torch.float64)
        torch.testing.assert_close(weights, expected, rtol=0, atol=EPS)


@pytest.mark.parametrize("name", VARIANTS)
def test_a_variant_is_copied_and_pickled_and_takes_a_checkpoint_of_its_base(name):
    model = network()
    optimizer = make(name, model)
    for i in range(4):
        by_closure(model, optimizer, i)
    copies = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    by_closure(model, optimizer, 4)
    for twin, its_optimizer in copies:
        by_closure(twin, its_optimizer, 4)
        assert all(torch.equal(p, q) for p, q in zip(twin.parameters(), model.parameters(), strict=True))
    plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    plain.load_state_dict(optimizer.state_dict())
    optimizer.load_state_dict(plain.state_dict())
    by_closure(model, optimizer, 5)


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
    bad_settings = [(GSAM, {"alpha": -1}), (FriendlySAM, {"sigma": math.nan}), (FriendlySAM, {"lmbda": 1.0})]
    bad_settings += [(LookSAM, {"every": 0}), (LookSAM, {"alpha": -1}), (VaSSO, {"theta": 1.5})]
    for cls, bad in bad_settings:
        with pytest.raises(ValueError, match=str(next(iter(bad)))):
            cls(model.parameters(), torch.optim.SGD, lr=0.1, **bad)


def calls_of(cls, steps=7, **options):
    model, calls = network(), []
    optimizer = cls(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, **options)
    for i in range(steps):
        num_calls = 0
        inner = closure_of(model, optimizer, i)

        def closure(inner=inner):
            nonlocal num_calls
            num_calls += 1
            return inner()

        optimizer.step(closure)
        calls.append(num_calls)
    return calls


def test_a_step_has_as_many_passes_as_it_needs():
    assert calls_of(MSAM) == calls_of(StaleSAM) == [1] * 7
    assert calls_of(LookSAM, every=3) == [2, 1, 1, 2, 1, 1, 2]
    assert calls_of(LookSAM, every=3, schedule=late_phase(2)) == [1, 1, 2, 2, 1, 1, 2]
    assert calls_of(GSAM, schedule=periodic(2)) == [2, 1, 2, 1, 2, 1, 2]


@pytest.mark.parametrize("decay", [0.0, 0.1])
@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_msam_is_the_algorithm_that_rests_at_the_perturbed_weights(momentum, decay):
    """As its authors' code does it over SGD: off the perturbation, v <- mu v + g, w - lr v, on again; one norm."""
    model, by_hand = network(), ByHand()
    optimizer = MSAM(model.parameters(), lr=0.1, momentum=momentum, weight_decay=decay, rho=0.3)
    resting = by_hand.weights
    v = [torch.zeros_like(w) for w in resting]
    factor = 0.0
    for i in range(STEPS):
        loss = by_closure(model, optimizer, i)
        g = [x + decay * w for x, w in zip(by_hand.gradient(resting, i), resting, strict=True)]
        clean = [w + factor * x for w, x in zip(resting, v, strict=True)]
        v = [momentum * x + y for x, y in zip(v, g, strict=True)]
        factor = 0.3 / math.sqrt(dot(v, v))
        clean = [w - 0.1 * x for w, x in zip(clean, v, strict=True)]
        resting = [w - factor * x for w, x in zip(clean, v, strict=True)]
    assert loss is None
    for p, w in zip(model.parameters(), clean, strict=True):
        torch.testing.assert_close(p.detach(), w, rtol=0, atol=EPS)


@pytest.mark.parametrize("momentum", [0.0, 0.5, 0.9])
def test_on_a_quadratic_msam_ends_in_the_cycle_of_its_closed_form(momentum):
    """|w| = lr rho c / (2 (1 + mu) - lr c) for curvature c, in the norm over several tensors."""
    lr, rho, c = 0.1, 0.5, 4.0
    params = [torch.tensor([1.0, 0.5], dtype=torch.float64), torch.tensor([[0.3]], dtype=torch.float64)]
    params = [nn.Parameter(p) for p in params]
    optimizer = MSAM(params, lr=lr, momentum=momentum, rho=rho)

    def closure():
        optimizer.zero_grad()
        loss = sum((p**2).sum() for p in params) * c / 2
        loss.backward()
        return loss

    for _ in range(4000):
        optimizer.step(closure)
    length = math.sqrt(sum(float((p.detach() ** 2).sum()) for p in params))
    assert length == pytest.approx(lr * rho * c / (2 * (1 + momentum) - lr * c), rel=1e-9)


def test_gradients_of_several_perturbed_passes_add_up_where_a_step_has_one_pass():
    model, whole = network(), network()
    parts, one = (MSAM(m.parameters(), lr=0.1, momentum=0.9, rho=0.1) for m in (model, whole))
    for i in range(4):
        for k in range(2):
            with parts.perturbed():
                backward(model, 2 * i + k, scale=0.5)
        parts.step()
        parts.zero_grad()
        with one.perturbed():
            backward(whole, 2 * i, scale=0.5)
            backward(whole, 2 * i + 1, scale=0.5)
        one.step()
        one.zero_grad()
    for p, q in zip(model.parameters(), whole.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=0, atol=EPS)


def test_the_only_pass_of_a_step_leaves_its_trace_in_buffers_and_clean_weights_in_checkpoints():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4), nn.BatchNorm1d(4), nn.Linear(4, 3)).double()
    optimizer = MSAM(model.parameters(), lr=0.1, momentum=0.9, module=model)
    for i in range(3):
        before = copy.deepcopy(model.state_dict())
        with optimizer.perturbed():
            backward(model, i)
            inside = model.state_dict()
        assert torch.equal(inside["0.weight"], before["0.weight"])
        assert torch.equal(model[0].weight, before["0.weight"])
        assert model[1].num_batches_tracked == i + 1
        optimizer.step()
        optimizer.zero_grad()


def test_msam_takes_only_bases_whose_momentum_it_knows():
    with pytest.raises(ValueError, match="RMSprop"):
        MSAM(network().parameters(), torch.optim.RMSprop, lr=0.1)
    with pytest.raises(ValueError, match="ascent_closure"):
        MSAM(network().parameters(), lr=0.1).step(lambda: None, ascent_closure=lambda: None)


def test_plain_training_of_a_variant_with_one_pass_is_refused():
    model = network()
    optimizer = MSAM(model.parameters(), lr=0.1, momentum=0.9)
    backward(model, 0)
    with pytest.raises(RuntimeError, match=r"the forward and backward inside `with optimizer.perturbed\(\)"):
        optimizer.step()


@pytest.mark.parametrize("size", [1e-25, 1.0, 1e22])
def test_inner_products_of_gradients_whose_products_no_float32_holds(size):
    torch.manual_seed(0)
    x, y = torch.randn(100_000), torch.randn(100_000)
    p = nn.Parameter(torch.zeros(100_000))
    optimizer = GSAM([p], torch.optim.SGD, rho=0.1, lr=1.0, alpha=0.4)
    p.grad = size * x
    optimizer.first_step()
    p.grad = size * y
    optimizer.second_step()
    x, y = (size * x).double(), (size * y).double()
    expected = (1 + 0.4 * (x @ y) / (y @ y)) * y - 0.4 * x
    torch.testing.assert_close(-p.detach().double() / size, expected / size, rtol=2e-6, atol=2e-6)
