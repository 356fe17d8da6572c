"""Gradients that are missing, weights that are tied, sparse, mixed or low in precision, buffers of every kind, threads:
each against torch's own optimizer or a step by hand."""

from __future__ import annotations

import sys
import threading

import numpy
import pytest
import torch
from torch import nn

from sam_optim import ASAM, SAM, Perturbation


def values(params) -> list[torch.Tensor]:
    return [p.detach().clone() for p in params]


def equal(a, b) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# gradients that one pass has and the other has not


@pytest.mark.parametrize("foreach", [None, True, False])
@pytest.mark.parametrize("cls", [SAM, ASAM])
def test_a_gradient_in_one_pass_only(cls, foreach):
    """All four: neither, first, second, both. Moved by the first's, updated by the second's, back at w in any case."""
    names = ("neither", "first", "second", "both")
    for lr in (0.0, 0.5):
        params = {name: nn.Parameter(torch.ones(3)) for name in names}
        optimizer = cls(params.values(), torch.optim.SGD, lr=lr, momentum=0.9, rho=1.0, foreach=foreach)
        seen = []

        def closure(params=params, optimizer=optimizer, seen=seen):
            optimizer.zero_grad()
            seen.append({name: p.detach().clone() for name, p in params.items()})
            loss = sum(params[name].sum() for name in (("first", "both"), ("second", "both"))[len(seen) - 1])
            loss.backward()
            return loss

        optimizer.step(closure)
        assert {name for name in names if not torch.equal(seen[1][name], torch.ones(3))} == {"first", "both"}
        for name, p in params.items():
            assert torch.equal(p, torch.full((3,), 1 - lr if name in ("second", "both") else 1.0)), name
            assert (p.grad is None) == (name in ("neither", "first"))
            assert bool(optimizer.state.get(p)) == (name in ("second", "both"))


@pytest.mark.parametrize("kind", ["no gradient", "zero gradient"])
@pytest.mark.parametrize("base", [torch.optim.SGD, torch.optim.AdamW])
def test_nothing_to_learn_from_is_a_step_of_the_base(base, kind):
    w, v = (nn.Parameter(torch.ones(3)) for _ in range(2))
    optimizer, plain = SAM([w], base, lr=0.1, weight_decay=0.5), base([v], lr=0.1, weight_decay=0.5)
    for p in (w, v) if kind == "zero gradient" else ():
        p.grad = torch.zeros(3)

    def closure():
        return (w * 0.0).sum() if kind == "no gradient" else torch.zeros(())

    optimizer.step(lambda: torch.zeros(())) if kind == "no gradient" else optimizer.step()
    plain.step()
    assert torch.equal(w, v)
    assert len(optimizer.state) == len(plain.state)


# weights that are odd


def test_a_tied_weight_is_moved_once_and_stays_tied():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.embed, self.head = nn.Embedding(7, 4), nn.Linear(4, 7, bias=False)
            self.head.weight = self.embed.weight

        def forward(self, x):
            return self.head(self.embed(x).tanh())

    model, x = Tied(), torch.arange(7)
    where = model.embed.weight.data_ptr()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.5, module=model)
    w = model.embed.weight.detach().clone().double().requires_grad_()

    def loss(w):
        return nn.functional.cross_entropy(w[x].tanh() @ w.T, x)

    for _ in range(3):
        g = torch.autograd.grad(loss(w), w)[0]
        moved = (w + 0.5 * g / g.norm()).detach().requires_grad_()
        w = (w - 0.1 * torch.autograd.grad(loss(moved), moved)[0]).detach().requires_grad_()

        def closure():
            optimizer.zero_grad()
            result = nn.functional.cross_entropy(model(x), x)
            result.backward()
            return result

        optimizer.step(closure)
        assert optimizer.last_step.radius.item() == pytest.approx(0.5)
    torch.testing.assert_close(model.embed.weight.detach().double(), w.detach(), rtol=1e-5, atol=1e-6)
    assert model.head.weight is model.embed.weight
    assert model.embed.weight.data_ptr() == where
    with pytest.warns(UserWarning, match="duplicate parameters"):  # torch.optim's own words
        twice = SAM([model.embed.weight, model.head.weight], torch.optim.SGD, lr=0.1, rho=0.5)
    loss(model.embed.weight).backward()
    with twice.perturbed():
        moved = torch.linalg.vector_norm(model.embed.weight.detach().double() - w.detach()).item()
    assert moved == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("adaptive", [False, True])
def test_an_embedding_bag_with_sparse_gradients_trains_as_one_with_dense(adaptive):
    models = []
    for sparse in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.EmbeddingBag(10, 4, sparse=sparse), nn.Linear(4, 2)).double()
        optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.3, adaptive=adaptive, module=model)
        for i in range(5):
            x = torch.randint(10, (6, 3), generator=torch.Generator().manual_seed(i))

            def closure(model=model, optimizer=optimizer, x=x):
                optimizer.zero_grad()
                loss = model(x).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)
        models.append(model)
    assert models[1][0].weight.grad.is_sparse
    for p, q in zip(*(m.parameters() for m in models), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_float32_and_bfloat16_weights_have_one_norm():
    a, b = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2, dtype=torch.bfloat16))
    a.grad, b.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0], dtype=torch.bfloat16)
    sam = Perturbation([a, b], rho=5.0)
    with sam.perturbed():
        assert a.tolist() == [3.0, 0.0]
        assert b.tolist() == [0.0, 4.0]
    assert float(sam.last_step.dual_norm) == pytest.approx(5.0)
    assert a.tolist() == b.tolist() == [0.0, 0.0]


# nothing drifts


def deep(dtype=torch.float32) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Linear(20, 3)).to(dtype)


def stays_as_it_is(model: nn.Module, steps: int, **kwargs) -> bool:
    """Whether steps at a learning rate of 0 leave each weight, bit for bit and in its storage. All else changes:
    batches, gradients, perturbations."""
    before, where = values(model.parameters()), [p.data_ptr() for p in model.parameters()]
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.0, rho=0.5, **kwargs)
    x = torch.randn(64, 6, generator=torch.Generator().manual_seed(0)).to(before[0].dtype)

    for i in range(steps):

        def closure(i=i):
            optimizer.zero_grad()
            loss = model(x[i % 50 : i % 50 + 8]).float().square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
    return equal(model.parameters(), before) and [p.data_ptr() for p in model.parameters()] == where


@pytest.mark.filterwarnings("ignore:only .* survives the rounding")
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_weights_of_low_precision_come_back_exactly(dtype, rounding):
    assert stays_as_it_is(deep(dtype), 200, rounding=rounding)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:only .* survives the rounding")
@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_ten_thousand_steps_in_bfloat16_lose_no_bit(rounding):
    assert stays_as_it_is(deep(torch.bfloat16), 10_000, rounding=rounding)


@pytest.mark.parametrize(
    "kwargs", [{}, *(pytest.param({"foreach": f}, marks=pytest.mark.slow) for f in (True, False))], ids=str
)
def test_a_thousand_steps_leave_every_parameter_in_its_storage(kwargs):
    assert stays_as_it_is(deep(), 1000, **kwargs)


# draws and buffers


@pytest.mark.parametrize(("kwargs", "forwards"), [({"rho": 0.0}, 1), ({}, 2), ({"replay_rng": True}, 1)], ids=str)
def test_a_step_draws_as_one_forward_pass_or_as_two(kwargs, forwards):
    model, x = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)), torch.ones(4, 6)
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, **kwargs)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        return loss

    torch.manual_seed(3)
    for _ in range(forwards):
        model(x)
    expected, others = torch.get_rng_state(), numpy.random.get_state()[1].tolist()
    torch.manual_seed(3)
    optimizer.step(closure)
    assert torch.equal(torch.get_rng_state(), expected)
    assert numpy.random.get_state()[1].tolist() == others


def batchnorm_act():
    from timm.layers import BatchNormAct2d

    return nn.Sequential(nn.Conv2d(1, 4, 3), BatchNormAct2d(4), nn.Flatten(), nn.Linear(16, 3))


def image_model(norm) -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 4, 3), norm, nn.ReLU(), nn.Flatten(), nn.Linear(16, 3))


class RunningRange(nn.Module):
    """What a quantizer keeps: buffers that are replaced, not written to."""

    def __init__(self):
        super().__init__()
        self.register_buffer("low", torch.zeros(()))
        self.register_buffer("high", torch.zeros(()))

    def forward(self, x):
        if self.training:
            self.low, self.high = torch.minimum(self.low, x.detach().min()), torch.maximum(self.high, x.detach().max())
        return x


NORMS = {
    "momentum 0.1": lambda: image_model(nn.BatchNorm2d(4)),
    "momentum None": lambda: image_model(nn.BatchNorm2d(4, momentum=None)),
    "sync": lambda: image_model(nn.SyncBatchNorm(4)),
    "instance": lambda: image_model(nn.InstanceNorm2d(4, track_running_stats=True)),
    "timm": batchnorm_act,
    "spectral": lambda: nn.Sequential(
        nn.utils.parametrizations.spectral_norm(nn.Conv2d(1, 4, 3)), nn.Flatten(), nn.Linear(16, 3)
    ),
    "quantizer": lambda: image_model(RunningRange()),
}


@pytest.mark.parametrize("kind", NORMS)
def test_sixty_steps_leave_the_buffers_of_the_first_passes_alone(kind):
    """Against a twin that follows the weights and does the first forward passes only: all differences are 0."""
    torch.manual_seed(0)
    model = NORMS[kind]()
    torch.manual_seed(0)
    twin = NORMS[kind]()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.05, rho=0.3, module=model)
    for i in range(60):
        x = torch.randn(8, 1, 4, 4, generator=torch.Generator().manual_seed(i))

        def closure(x=x):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), torch.arange(8) % 3)
            loss.backward()
            return loss

        with torch.no_grad():
            for p, q in zip(twin.parameters(), model.parameters(), strict=True):
                p.copy_(q)
        twin(x)
        optimizer.step(closure)
        for (name, b), c in zip(model.named_buffers(), twin.buffers(), strict=True):
            assert torch.equal(b, c), (i, name)
    assert len(list(model.buffers())) > 0


# two at once


@pytest.mark.parametrize("foreach", [None, True])
def test_two_threads_with_a_model_each_train_as_if_alone(foreach):
    def train(seed: int) -> list[torch.Tensor]:
        x = torch.randn(16, 6, generator=torch.Generator().manual_seed(seed))
        optimizer = SAM(models[seed].parameters(), lr=0.05, rho=0.2, module=models[seed], foreach=foreach)
        for _ in range(50):

            def closure():
                optimizer.zero_grad()
                loss = models[seed](x).square().mean()
                loss.backward()
                return loss

            optimizer.step(closure)
        return values(models[seed].parameters())

    models = {seed: deep() for seed in (1, 2)}
    alone = {seed: train(seed) for seed in models}
    models = {seed: deep() for seed in (1, 2)}
    together, threads = {}, []
    for seed in models:
        threads.append(threading.Thread(target=lambda seed=seed: together.update({seed: train(seed)})))
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert all(equal(together[seed], alone[seed]) for seed in alone)


def test_what_another_thread_does_in_a_second_pass_is_not_taken_for_the_pass():
    """BatchNorm counts and gradients add up in another thread within this one's second pass: nothing is said."""
    x = torch.randn(16, 6)
    networks, barrier = [nn.Sequential(nn.Linear(6, 3), nn.BatchNorm1d(3)) for _ in range(2)], threading.Barrier(2)
    errors = []

    def accumulate(network: nn.Module) -> None:
        sgd = torch.optim.SGD(network.parameters(), lr=0.1)
        try:
            network(x).square().mean().backward()
            barrier.wait(30)
            barrier.wait(30)  # the first pass is over
            network(x).square().mean().backward()
            barrier.wait(30)
            barrier.wait(30)  # the second pass is over
            sgd.step()
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=accumulate, args=(networks[1],))
    thread.start()
    barrier.wait(30)
    optimizer = SAM(networks[0].parameters(), lr=0.05, rho=0.2, module=networks[0])
    networks[0](x).square().mean().backward()
    with optimizer.perturbed():
        barrier.wait(30)
        barrier.wait(30)
        networks[0](x).square().mean().backward()
    barrier.wait(30)
    thread.join(30)
    assert errors == []
    assert not thread.is_alive()


def test_of_two_optimizers_on_one_model_only_one_perturbs_at_a_time():
    """In one thread, and in four that begin at the same moment: one gets in, the others are told, no weight is lost."""
    w = nn.Parameter(torch.arange(8.0))
    w.grad = torch.ones(8)
    first, second = SAM([w], lr=0.1, rho=0.5), ASAM([w], lr=0.1, rho=0.5)
    first.first_step()
    w.grad = torch.ones(8)
    with pytest.raises(RuntimeError, match="another perturbation holds some of these parameters"):
        second.first_step()
    first.second_step()
    assert torch.equal(w, torch.arange(8.0) - 0.1)

    w = nn.Parameter(torch.arange(8.0))
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        for _ in range(150):
            w.grad = torch.ones(8)
            start, inside, refused = threading.Barrier(4), [], []

            def enter(start=start, inside=inside, refused=refused):
                sam = Perturbation([w], rho=0.5)
                start.wait()
                try:
                    sam.enter()
                    inside.append(sam)
                except RuntimeError as error:
                    refused.append(error)

            threads = [threading.Thread(target=enter) for _ in range(4)]
            for t in threads:
                t.start()
            for t in threads:
                t.join()
            assert (len(inside), len(refused)) == (1, 3)
            inside[0].exit()
            assert torch.equal(w, torch.arange(8.0))
    finally:
        sys.setswitchinterval(interval)
    w.grad = torch.ones(8)
    with Perturbation([w], rho=0.5).perturbed():  # nobody holds it any more
        assert not torch.equal(w, torch.arange(8.0))


def test_a_closure_that_zeroes_through_the_optimizer_has_its_draws_replayed_without_a_module():
    w, masks = nn.Parameter(torch.ones(50)), []
    optimizer = SAM([w], torch.optim.SGD, lr=0.1, replay_rng=True)

    def closure():
        optimizer.zero_grad()
        mask = torch.rand(50) < 0.5
        masks.append(mask)
        loss = (w * mask).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert torch.equal(*masks)


def test_a_backward_through_the_first_graph_is_refused_by_every_body():
    for foreach in (None, True, False):
        model = nn.Sequential(nn.Linear(3, 3), nn.Tanh(), nn.Linear(3, 2))
        loss = model(torch.ones(2, 3)).square().sum()
        loss.backward(retain_graph=True)
        refused = pytest.raises(RuntimeError, match="modified by an inplace operation")
        with Perturbation(model, rho=0.1, foreach=foreach).perturbed(), refused:
            loss.backward()


class OneByOne(torch.optim.Optimizer):
    """Plain descent that can stop between two parameters, as any for-loop can."""

    stop_at = None

    def __init__(self, params, lr):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self, closure=None):
        for i, p in enumerate(self.param_groups[0]["params"]):
            if i == self.stop_at:
                raise KeyboardInterrupt
            p.sub_(p.grad, alpha=self.param_groups[0]["lr"])


def test_half_an_update_of_the_base_is_left_as_the_base_leaves_it():
    """It cannot be taken back without a copy of the weights and of the base's state. Everything else is as after it."""
    model, x = deep(), torch.randn(8, 6, generator=torch.Generator().manual_seed(0))
    optimizer = SAM(model.parameters(), OneByOne, lr=0.1, rho=0.3, module=model)

    def closure():
        optimizer.zero_grad()
        loss = model(x).square().mean()
        loss.backward()
        return loss

    whole = deep()
    twin = SAM(whole.parameters(), OneByOne, lr=0.1, rho=0.3, module=whole)

    def clean():
        twin.zero_grad()
        loss = whole(x).square().mean()
        loss.backward()
        return loss

    before = values(model.parameters())
    twin.step(clean)
    optimizer.base_optimizer.stop_at = 3
    with pytest.raises(KeyboardInterrupt):
        optimizer.step(closure)
    assert equal(list(model.parameters())[:3], list(whole.parameters())[:3])
    assert equal(list(model.parameters())[3:], before[3:])
    assert equal(model.buffers(), whole.buffers())
    assert not optimizer.perturbation.active
    optimizer.base_optimizer.stop_at = None
    optimizer.step(closure)
