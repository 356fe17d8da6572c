"""Does it work in my loop? What people write around an optimizer, beside SAM by hand in float64.

Each row of the table in docs/integrations/loops.md names its test here or in a file beside this one.
"""

import contextlib
import copy
import functools
import gc
import itertools
import os
import pickle
import subprocess
import sys
import warnings

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

from sam_optim import ASAM, MSAM, SAM, Perturbation, norm_only_param_groups

RHO, LR = 0.1, 0.1
WAYS = ["closure", "list", "contexts", "first and second step", "microbatch"]


def network(*, batch_norm=False, seed=0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        norm = [nn.BatchNorm1d(9)] if batch_norm else []
        return nn.Sequential(nn.Linear(6, 9), *norm, nn.Tanh(), nn.Linear(9, 3)).double()


def batches(num=4, size=8):
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(num * size, 6, dtype=torch.float64, generator=generator)
    y = torch.randint(3, (num * size,), generator=generator)
    return list(zip(x.split(size), y.split(size), strict=True))


def sam(model, cls=SAM, **kwargs):
    return cls(model.parameters(), torch.optim.SGD, **{"rho": RHO, "lr": LR, "module": model} | kwargs)


def gradients_by_hand(model, loss_of, *, moved=None, rho=RHO):
    """Of all parameters at w + e, e = rho g / ||g|| over those that `moved` names; the model stays as it is."""
    there = copy.deepcopy(model)
    there.zero_grad()
    loss_of(there).backward()
    params = [p for name, p in there.named_parameters() if p.grad is not None and (moved is None or name in moved)]
    norm = torch.stack([p.grad.square().sum() for p in params]).sum().sqrt()
    with torch.no_grad():
        for p in params:
            p.add_(p.grad * (rho / norm))
    there.zero_grad()
    loss_of(there).backward()
    return [None if p.grad is None else p.grad.clone() for p in there.parameters()]


def assert_close(tensors, truth, *, tolerance=1e-12):
    for a, b in zip(tensors, truth, strict=True):
        torch.testing.assert_close(a.detach(), b.detach(), rtol=tolerance, atol=tolerance)


def copies(model):
    return [p.detach().clone() for p in model.parameters()]


def take_step(way, optimizer, loss_of, *, clear=None):
    """One step of SAM in one of the ways of writing it."""
    clear = clear or optimizer.zero_grad
    if way in ("closure", "list"):

        def closure():
            clear()
            loss = loss_of()
            loss.backward()
            return loss

        optimizer.step(closure if way == "closure" else [closure])
        return
    clear()
    if way == "first and second step":
        loss_of().backward()
        optimizer.first_step(zero_grad=True)
        loss_of().backward()
        optimizer.second_step()
        return
    if way == "contexts":
        loss_of().backward()
        with optimizer.perturbed():
            loss_of().backward()
    else:
        with optimizer.microbatch():
            loss_of().backward()
            with optimizer.perturbed():
                loss_of().backward()
    optimizer.step()


# accumulation


@pytest.mark.parametrize("way", ["SAM", "first and second step", "Perturbation"])
def test_accumulating_around_both_passes_names_microbatch(way):
    model = network()
    start = copies(model)
    optimizer = sam(model) if way != "Perturbation" else torch.optim.SGD(model.parameters(), lr=LR)
    contexts = optimizer if way != "Perturbation" else Perturbation(model, rho=RHO)

    def loop():
        for x, y in batches():
            (cross_entropy(model(x), y) / 4).backward()
            if way == "first and second step":
                optimizer.first_step()
                (cross_entropy(model(x), y) / 4).backward()
                optimizer.perturbation.exit()
            else:
                with contexts.perturbed():
                    (cross_entropy(model(x), y) / 4).backward()
        optimizer.step()

    with pytest.raises(RuntimeError, match=r"mixture.*microbatch\(\)"):
        loop()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), start, strict=True))


def test_accumulating_in_microbatches_is_the_sum_of_their_own_gradients():
    model = network()
    optimizer = sam(model)
    truth = [0.0] * len(list(model.parameters()))
    for x, y in batches():
        grads = gradients_by_hand(model, lambda m, x=x, y=y: cross_entropy(m(x), y) / 4)
        truth = [t + g for t, g in zip(truth, grads, strict=True)]
        with optimizer.microbatch():
            (cross_entropy(model(x), y) / 4).backward()
            with optimizer.perturbed():
                (cross_entropy(model(x), y) / 4).backward()
    assert_close([p.grad for p in model.parameters()], truth)
    optimizer.step()


def test_all_first_passes_and_then_all_second_ones_are_one_step_of_the_whole_batch():
    model = network()
    optimizer = sam(model)
    truth = gradients_by_hand(model, lambda m: sum(cross_entropy(m(x), y) / 4 for x, y in batches()))
    for x, y in batches():
        (cross_entropy(model(x), y) / 4).backward()
    with optimizer.perturbed():
        for x, y in batches():
            (cross_entropy(model(x), y) / 4).backward()
    assert_close([p.grad for p in model.parameters()], truth)


def test_a_second_pass_without_a_new_first_one_is_an_error():
    model, (x, y) = network(), batches()[0]
    optimizer = sam(model)
    cross_entropy(model(x), y).backward()
    with optimizer.perturbed():
        cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="earlier perturbed pass"), optimizer.perturbed():
        cross_entropy(model(x), y).backward()


@pytest.mark.parametrize("kind", ["Perturbation", "SAM"])
def test_accumulating_with_accelerate_around_both_passes(kind):
    accelerate = pytest.importorskip("accelerate")
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
    model = network()
    plain = sam(model) if kind == "SAM" else torch.optim.SGD(model.parameters(), lr=LR)
    model, optimizer = accelerator.prepare(model, plain)
    contexts = plain if kind == "SAM" else Perturbation(model, rho=RHO)

    def loop():
        for x, y in batches():
            with accelerator.accumulate(model):
                accelerator.backward(cross_entropy(model(x), y))
                with contexts.perturbed():
                    accelerator.backward(cross_entropy(model(x), y))
                optimizer.step()
                optimizer.zero_grad()

    with pytest.raises(RuntimeError, match=r"mixture.*microbatch\(\)"):
        loop()


def accumulate(optimizer, model, parts, *, both, clip=False):
    """All backwards of a step: `parts` in the first phase, `both` in the second."""
    contexts = optimizer if isinstance(optimizer, SAM) else Perturbation(model, rho=RHO)
    for x, y in parts:
        (cross_entropy(model(x), y) / len(parts)).backward()
    if clip:
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
    with contexts.perturbed():
        for x, y in both:
            (cross_entropy(model(x), y) / len(both)).backward()


@pytest.mark.parametrize("way", ["contexts", "microbatch", "closure", "no module", "accelerate"])
def test_a_second_phase_on_fewer_micro_batches_is_warned_of_in_the_second_step(way):
    model, parts = network(), batches()
    optimizer = sam(model, module=None if way == "no module" else model)

    def step(second=None):
        optimizer.zero_grad()
        if way == "closure":
            rest = iter([*parts, parts[-1]])

            def closure():
                optimizer.zero_grad()
                for x, y in itertools.islice(rest, 4):
                    (cross_entropy(model(x), y) / 4).backward()

            optimizer.step(closure)
            return
        with optimizer.microbatch() if way == "microbatch" else contextlib.nullcontext():
            accumulate(optimizer, model, parts, both=parts[-1:])
        optimizer.step()

    if way == "accelerate":
        accelerate = pytest.importorskip("accelerate")
        accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=4)
        optimizer = torch.optim.SGD(model.parameters(), lr=LR)
        wrapped, prepared = accelerator.prepare(model, optimizer)
        contexts = Perturbation(wrapped, rho=RHO)

        def step():
            for x, y in parts:
                with accelerator.accumulate(wrapped):
                    accelerator.backward(cross_entropy(wrapped(x), y))
                    if accelerator.sync_gradients:
                        with contexts.perturbed():
                            accelerator.backward(cross_entropy(wrapped(x), y))
                    prepared.step()
                    prepared.zero_grad()

    step()
    with pytest.warns(UserWarning, match=r"run 4 backwards and the second 1, on 25% of its data.*microbatch\(\)"):
        step()
    step()  # said once


class Tied(nn.Module):
    """Uses each weight in two calls, and recomputes activations in the backward."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(6, 6), nn.Tanh()).double()

    def forward(self, x):
        again = torch.utils.checkpoint.checkpoint(self.net, self.net(x), use_reentrant=False)
        return (again @ self.net[0].weight.T)[:, :3]


@pytest.mark.parametrize("kind", ["clipped at w", "one batch at w + e", "losses joined at w + e", "tied"])
def test_phases_on_the_same_data_are_not_warned_of(kind):
    """Warnings are errors; each is compared with SAM on the whole batch."""
    model, parts = Tied() if kind == "tied" else network(), batches()
    optimizer = sam(model, lr=0.0)
    whole = [(torch.cat([x for x, _ in parts]), torch.cat([y for _, y in parts]))]
    if kind == "losses joined at w + e":
        parts = whole
    truth = gradients_by_hand(model, lambda m: cross_entropy(m(whole[0][0]), whole[0][1]))
    for _ in range(3):
        optimizer.zero_grad()
        if kind == "losses joined at w + e":
            (x, y), regression = whole[0], lambda out: 1e-9 * out.square().mean()
            out = model(x)
            cross_entropy(out, y).backward(retain_graph=True)
            regression(out).backward()
            with optimizer.perturbed():
                out = model(x)
                (cross_entropy(out, y) + regression(out)).backward()
        else:
            both = whole if kind == "one batch at w + e" else parts
            accumulate(optimizer, model, parts, both=both, clip=kind == "clipped at w")
        assert_close([p.grad for p in model.parameters()], truth, tolerance=1e-8)
        optimizer.step()


@pytest.mark.parametrize("once", ["loss", "outputs", "embedding"])
@pytest.mark.parametrize("way", WAYS)
def test_a_second_backward_through_the_first_graph_is_an_error(way, once):
    """Where that needs no weights, which torch would find changed: in the first layer."""
    x, y = torch.arange(8) % 5, batches()[0][1]
    rest = network() if once == "embedding" else nn.Identity()
    model = nn.Sequential(nn.Embedding(5, 6 if once == "embedding" else 3).double(), rest)
    optimizer, start = sam(model), copies(model)
    outputs = model[0](x)
    loss = cross_entropy(outputs, y) if once == "loss" else None

    class Again:
        def backward(self):
            total = loss / 4 if once == "loss" else cross_entropy(rest(outputs), y)
            total.backward(retain_graph=True)

    with pytest.raises(RuntimeError, match=r"graph of the first.*run the model again"):
        take_step(way, optimizer, Again)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), start, strict=True))
    truth = gradients_by_hand(model, lambda m: cross_entropy(m(x), y))
    expected = [p - LR * g for p, g in zip(start, truth, strict=True)]
    take_step(way, optimizer, lambda: cross_entropy(model(x), y))
    assert_close(model.parameters(), expected)


@pytest.mark.parametrize("way", WAYS)
def test_graphs_made_before_that_lead_elsewhere_or_are_views(way):
    """What a generator has made once, and a transposed weight that was taken once: its values follow the weight."""
    generator, model, (x, y) = network(seed=1), nn.Linear(6, 3).double(), batches()[0]
    fake, transposed = generator(x).repeat(1, 2), model.weight.t()
    optimizer = sam(model)

    class Loss:
        def backward(self):
            cross_entropy(fake @ transposed + model.bias, y).backward(retain_graph=True)

    truth = gradients_by_hand(model, lambda m: cross_entropy(m(fake.detach()), y))
    expected = [p - LR * g for p, g in zip(copies(model), truth, strict=True)]
    take_step(way, optimizer, Loss)
    assert_close(model.parameters(), expected)


@pytest.mark.parametrize("way", WAYS)
def test_a_linear_loss_has_the_same_gradient_in_both_passes(way):
    model = nn.Linear(1, 1, bias=False).double()
    optimizer = sam(model)
    take_step(way, optimizer, lambda: model.weight.sum())
    take_step(way, optimizer, lambda: model.weight.sum())
    assert float(model.weight.grad) == 1


# more than one optimizer, more than one network


@pytest.mark.parametrize("way", WAYS)
def test_a_second_optimizer_gets_the_gradient_at_w_plus_e(way):
    model, (x, y) = network(), batches()[0]
    trunk, head = list(model[0].parameters()), list(model[2].parameters())
    optimizer = SAM(trunk, torch.optim.SGD, rho=RHO, lr=LR, module=model)
    other = torch.optim.SGD(head, lr=LR)
    for _ in range(3):
        truth = gradients_by_hand(model, lambda m: cross_entropy(m(x), y), moved=("0.weight", "0.bias"))
        expected = [p - LR * g for p, g in zip(model.parameters(), truth, strict=True)]
        other.zero_grad()
        take_step(way, optimizer, lambda: cross_entropy(model(x), y))
        other.step()
        assert_close(model.parameters(), expected)


@pytest.mark.parametrize("way", ["contexts", "first and second step"])
def test_a_second_optimizer_of_a_network_that_nobody_named_does_not_step_with_the_sum_of_both_passes(way):
    model, (x, y) = network(), batches()[0]
    optimizer = SAM(model[0].parameters(), torch.optim.SGD, rho=RHO, lr=LR)
    other = torch.optim.SGD(model[2].parameters(), lr=LR)
    take_step(way, optimizer, lambda: cross_entropy(model(x), y))
    with pytest.raises(RuntimeError, match=r"SGD would step with the sum.*module="):
        other.step()
    other.step()  # said once: a caller that goes on knows of it


@pytest.mark.parametrize("held", ["attribute", "list", "dict", "object", "function"])
def test_the_other_optimizer_is_seen_wherever_a_trainer_holds_it(held):
    model, (x, y) = network(), batches()[0]

    class Trainer:
        pass

    def make():
        trainer, inner = Trainer(), Trainer()
        inner.head = head = torch.optim.SGD(model[2].parameters(), lr=LR)
        trainer.trunk = SAM(model[0].parameters(), torch.optim.SGD, rho=RHO, lr=LR)
        trainer.head = {
            "attribute": head,
            "list": [head],
            "dict": {"head": head},
            "object": inner,
            "function": lambda: head.step(),
        }[held]
        return trainer

    trainer = make()
    take_step("contexts", trainer.trunk, lambda: cross_entropy(model(x), y))
    step = {
        "list": lambda: trainer.head[0].step(),
        "dict": lambda: trainer.head["head"].step(),
        "object": lambda: trainer.head.head.step(),
        "function": lambda: trainer.head(),
    }.get(held, lambda: trainer.head.step())
    with pytest.raises(RuntimeError, match=r"SGD would step with the sum.*module="):
        step()


@pytest.mark.parametrize("way", WAYS[2:])
def test_clipping_the_gradients_of_two_optimizers_between_the_passes(way):
    """Those of the second one's network are clipped with the others, and are those at w + e; unnamed, it is refused."""
    model, (x, y) = network(), batches()[0]
    names = ["0.weight", "0.bias"]
    truth = gradients_by_hand(model, lambda m: cross_entropy(m(x), y), moved=names)
    bound = 0.3 * float(torch.cat([g.flatten() for g in truth]).norm())
    expected = [p - LR * 0.3 * g for p, g in zip(copies(model), truth, strict=True)]

    for named in (True, False):
        model = network()
        trunk = SAM(model[0].parameters(), torch.optim.SGD, rho=RHO, lr=LR, module=model if named else None)
        head = torch.optim.SGD(model[2].parameters(), lr=LR)

        def clipped_pass(model=model):
            cross_entropy(model(x), y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), bound)

        if way == "first and second step":
            clipped_pass()
            trunk.first_step()
            clipped_pass()
            trunk.second_step()
        else:
            with trunk.microbatch() if way == "microbatch" else contextlib.nullcontext():
                clipped_pass()
                with trunk.perturbed():
                    clipped_pass()
            trunk.step()
        if named:
            head.step()
            assert_close(model.parameters(), expected, tolerance=1e-5)  # torch adds 1e-6 to the norm
        else:
            with pytest.raises(RuntimeError, match="the sum of the gradients at w and at w"):
                head.step()


@pytest.mark.parametrize("named", [True, False])
@pytest.mark.parametrize("way", ["closure", "list"])
def test_a_step_of_another_optimizer_in_the_closure_is_an_error(way, named):
    model, (x, y) = network(), batches()[0]
    trunk = SAM(model[0].parameters(), torch.optim.SGD, rho=RHO, lr=LR, module=model if named else None)
    head = torch.optim.SGD(model[2].parameters(), lr=LR, momentum=0.9)

    class Stepping:
        def backward(self):
            cross_entropy(model(x), y).backward()
            head.step()

    start = copies(model[0])
    with pytest.raises(RuntimeError, match=r"SGD.step\(\) is called in the closure.*runs twice"):
        take_step(way, trunk, Stepping)
    assert all(torch.equal(p, w) for p, w in zip(model[0].parameters(), start, strict=True))
    head.step()  # nothing is left on it


def test_a_step_of_another_optimizer_in_the_second_pass_stays():
    """Of a network whose parameters have the shapes of those that are moved."""
    model, (x, _) = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double(), batches()[0]
    trunk = SAM(model[0].parameters(), torch.optim.SGD, rho=RHO, lr=LR, module=model)
    head = torch.optim.SGD(model[2].parameters(), lr=LR)
    for _ in range(3):
        model.zero_grad()
        truth = gradients_by_hand(model, lambda m: m(x).square().mean(), moved=("0.weight", "0.bias"))
        expected = [p - LR * g for p, g in zip(copies(model), truth, strict=True)]
        model(x).square().mean().backward()
        with trunk.perturbed():
            model(x).square().mean().backward()
            head.step()
        trunk.step()
        assert_close(model.parameters(), expected)


def test_an_attack_with_an_optimizer_of_its_own_in_the_closure():
    model, (x, y) = network(), batches()[0]
    optimizer, shift = sam(model), torch.zeros_like(x, requires_grad=True)
    attack = torch.optim.SGD([shift], lr=0.1)

    def loss_of(m=model):
        with torch.no_grad():
            shift.zero_()
        attack.zero_grad()
        (-cross_entropy(m(x + shift), y)).backward(inputs=[shift])
        attack.step()
        return cross_entropy(m(x + shift.detach()), y)

    truth = gradients_by_hand(model, loss_of)
    expected = [p - LR * g for p, g in zip(copies(model), truth, strict=True)]
    take_step("closure", optimizer, loss_of)
    assert_close(model.parameters(), expected)


def test_a_scheduler_that_steps_in_the_closure_is_warned_of():
    model, (x, y) = network(), batches()[0]
    optimizer = sam(model)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 30)

    def loss_of():
        scheduler.step()
        return cross_entropy(model(x), y)

    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always")
        take_step("closure", optimizer, loss_of)
    assert any("StepLR.step() is called in the closure" in str(w.message) for w in warned)


def test_two_of_them_whose_passes_are_nested_name_the_remedy():
    model, (x, y) = network(), batches()[0]
    trunk, head = (SAM(part.parameters(), rho=RHO, lr=LR, module=model) for part in (model[0], model[2]))
    cross_entropy(model(x), y).backward()
    trunk.first_step()
    with pytest.raises(RuntimeError, match=r"inside that of another optimizer.*use one, with a group for each"):
        head.first_step()


def test_a_second_optimizer_that_clears_the_sum_of_both_passes_steps_as_ever():
    """As the two optimizers of a GAN do, each before its own backward."""
    model, (x, y) = network(), batches()[0]
    optimizer = SAM(model[0].parameters(), torch.optim.SGD, rho=RHO, lr=LR)
    other = torch.optim.SGD(model[2].parameters(), lr=LR)
    take_step("contexts", optimizer, lambda: cross_entropy(model(x), y))
    other.zero_grad()
    cross_entropy(model(x), y).backward()
    expected = [p - LR * p.grad for p in model[2].parameters()]
    other.step()
    assert_close(model[2].parameters(), expected)


class MovingKey(nn.Module):
    """A key encoder that `forward` moves towards the query encoder, as in MoCo and BYOL; `how` it is written to."""

    def __init__(self, how):
        super().__init__()
        self.how, self.query, self.key = how, network(), network(seed=1)
        self.key.requires_grad_(False)

    @torch.no_grad()
    def follow(self):
        for k, q in zip(self.key.parameters(), self.query.parameters(), strict=True):
            if self.how == "in place":
                k.mul_(0.9).add_(q, alpha=0.1)
            elif self.how == "p.data.mul_":  # which has no version
                k.data.mul_(0.9).add_(q.data, alpha=0.1)
            else:
                k.data = k.data * 0.9 + q.data * 0.1

    def forward(self, x):
        self.follow()
        return self.query(x) + self.key(x)


@pytest.mark.parametrize("how", ["in place", "p.data =", "p.data.mul_"])
@pytest.mark.parametrize("way", WAYS)
def test_a_key_encoder_moves_once_and_towards_w(way, how):
    model, (x, y) = MovingKey(how), batches()[0]
    optimizer = SAM(model.query.parameters(), torch.optim.SGD, rho=RHO, lr=LR, module=model)
    for _ in range(3):
        after_first = copy.deepcopy(model)
        after_first.follow()
        names = [f"query.{name}" for name, _ in model.query.named_parameters()]
        truth = gradients_by_hand(model, lambda m: cross_entropy(m(x), y), moved=names)
        take_step(way, optimizer, lambda: cross_entropy(model(x), y))
        assert_close(model.key.parameters(), after_first.key.parameters())
        assert_close([p.grad for p in model.query.parameters()], [g for g in truth if g is not None])


@pytest.mark.parametrize("way", WAYS)
def test_all_networks_that_are_named_count_one_pass(way):
    """A GAN: G runs, in training mode, while D steps; and a loss with a state of its own."""

    class Criterion(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("center", torch.zeros(1, dtype=torch.float64))

        def forward(self, out):
            self.center.mul_(0.9).add_(out.detach().mean(), alpha=0.1)
            return (out - self.center).square().mean()

    torch.manual_seed(0)
    generator = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6)).double()
    discriminator = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5), nn.Linear(5, 1)).double()
    z, x = torch.randn(8, 4).double(), torch.randn(8, 6).double()
    criterion = Criterion()
    twins = copy.deepcopy((generator, discriminator, criterion))
    networks = [generator, discriminator, criterion]
    optimizer = SAM(discriminator.parameters(), torch.optim.SGD, rho=RHO, lr=LR, module=networks)

    def loss_of(g, d, c):
        return c(d(g(z).detach())) + d(x).square().mean()

    take_step(way, optimizer, lambda: loss_of(*networks))
    loss_of(*twins)
    for network_, twin in zip(networks, twins, strict=True):
        assert_close(network_.buffers(), twin.buffers())
    assert int(generator[1].num_batches_tracked) == 1
    assert int(discriminator[1].num_batches_tracked) == 2


@pytest.mark.parametrize("way", ["closure", "contexts"])
def test_a_network_that_is_not_named_and_counts_both_passes_is_warned_of_once(way):
    generator, discriminator = network(batch_norm=True), network()
    x, y = batches()[0]
    optimizer = sam(discriminator)
    loss_of = lambda: cross_entropy(discriminator(x + generator(x).repeat(1, 2).detach()), y)  # noqa: E731
    with pytest.warns(UserWarning, match=r"BatchNorm.*not in `module`.*module=\[G, D, criterion\]") as warned:
        take_step(way, optimizer, loss_of)
    assert len(warned) == 1
    take_step(way, optimizer, loss_of)  # warnings are errors


@pytest.mark.parametrize("named", ["nothing", "the model", "both"])
@pytest.mark.parametrize("way", WAYS)
def test_an_average_that_is_updated_in_the_passes_is_warned_of_or_named(way, named):
    """`AveragedModel`, updated at the end of the closure."""
    model, (x, y) = network(), batches()[0]
    average = torch.optim.swa_utils.AveragedModel(
        model, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.9), use_buffers=True
    )
    optimizer = sam(model, module={"nothing": None, "the model": model, "both": [model, average]}[named])

    def loss_of():
        loss = cross_entropy(model(x), y)
        average.update_parameters(model)
        return loss

    expected = (
        warnings.catch_warnings() if named == "both" else pytest.warns(UserWarning, match="AveragedModel has.*EMA")
    )
    with expected:
        take_step(way, optimizer, loss_of)
    truth = copies(model) if named == "both" else None
    averages = copies(average)
    take_step(way, optimizer, loss_of)  # warnings are errors
    if named == "both":
        assert int(average.n_averaged) == 2
        assert_close(average.parameters(), [0.9 * a + 0.1 * w for a, w in zip(averages, truth, strict=True)])


def test_a_tensor_that_is_no_buffer_and_changes_in_both_passes_is_warned_of_once():
    class Counts(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.seen = network(), torch.zeros(())

        def forward(self, x):
            self.seen += 1
            return self.net(x)

    model, (x, y) = Counts(), batches()[0]
    optimizer = sam(model)
    with pytest.warns(UserWarning, match=r"Counts\.seen is a tensor.*register_buffer"):
        take_step("closure", optimizer, lambda: cross_entropy(model(x), y))
    take_step("closure", optimizer, lambda: cross_entropy(model(x), y))


def test_a_cache_that_grows_in_the_second_pass_stays_as_long_as_the_model_thinks():
    class Cached(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.length = network(), 0
            self.register_buffer("cache", torch.zeros(0, dtype=torch.float64), persistent=False)

        def forward(self, x):
            if len(x) > self.length:
                self.length, self.cache = len(x), torch.linspace(0, 1, len(x), dtype=torch.float64)
            return self.net(x * self.cache[: len(x), None])

    model, (x, y) = Cached(), batches(size=16)[0]
    optimizer = sam(model)

    def closure(num):
        optimizer.zero_grad()
        loss = cross_entropy(model(x[:num]), y[:num])
        loss.backward()
        return loss

    for _ in range(2):
        optimizer.step(functools.partial(closure, 16), ascent_closure=functools.partial(closure, 8))
    assert len(model.cache) == model.length == 16


# plain training


def constant(loss, kind):
    return {"its number": lambda: loss.item(), "nothing": lambda: None, "the loss": lambda: loss}[kind]


@pytest.mark.parametrize("kind", ["its number", "nothing", "the loss"])
@pytest.mark.parametrize("way", ["closure", "list", "ascent", "descent", "after a dropped pass"])
def test_a_closure_without_a_backward_is_not_training(way, kind):
    model, (x, y) = network(), batches()[0]
    optimizer = sam(model)
    start = copies(model)

    def closure():
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    if way == "after a dropped pass":
        cross_entropy(model(x), y).backward()
        with optimizer.perturbed():
            cross_entropy(model(x), y).backward()
        model.zero_grad()
    loss = cross_entropy(model(x), y)
    loss.backward()
    stands_still = constant(loss, kind)
    passed, ascent = {
        "list": ([stands_still], None),
        "ascent": (closure, stands_still),
        "descent": (stands_still, closure),
    }.get(way, (stands_still, None))
    with pytest.raises(RuntimeError, match="gradient"):
        optimizer.step(passed, ascent_closure=ascent)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), start, strict=True))
    optimizer.step(closure)


@pytest.mark.parametrize("drop", ["model.zero_grad()", "p.grad = None", "p.grad.zero_()", "nothing", "p.grad = g"])
def test_a_dropped_pass_does_not_stand_for_the_next_one(drop):
    model, (x, y) = network(), batches()[0]
    optimizer = sam(model)
    cross_entropy(model(x), y).backward()
    with optimizer.perturbed():
        cross_entropy(model(x), y).backward()
    for p in model.parameters():
        if drop == "p.grad.zero_()":
            p.grad.zero_()
        elif drop != "nothing":
            p.grad = None
    if drop == "p.grad = g":
        grads = torch.autograd.grad(cross_entropy(model(x), y), list(model.parameters()))
        for p, g in zip(model.parameters(), grads, strict=True):
            p.grad = g
    else:
        cross_entropy(model(x), y).backward()
    with pytest.raises(RuntimeError, match="only plain gradients"):
        optimizer.step()


@pytest.mark.parametrize("way", ["contexts", "first and second step", "scaler"])
def test_a_second_pass_without_a_backward_is_an_error(way):
    model, (x, y) = network(), batches()[0]
    optimizer = sam(model)
    scaler = torch.amp.GradScaler("cpu")
    scaler.scale(cross_entropy(model(x), y)).backward()
    if way == "first and second step":
        optimizer.first_step()
    else:
        with optimizer.perturbed():
            cross_entropy(model(x), y)
    with pytest.raises(RuntimeError, match="left no gradient"):
        {"contexts": optimizer.step, "scaler": lambda: scaler.step(optimizer)}.get(way, optimizer.second_step)()


@pytest.mark.parametrize("kind", ["SAM", "first and second step", "microbatch", "Perturbation"])
@pytest.mark.parametrize("clip", [False, True])
def test_unscaling_before_the_perturbed_pass_is_an_error(kind, clip):
    model, (x, y) = network().float(), batches()[0]
    x = x.float()
    start = copies(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR) if kind == "Perturbation" else sam(model)
    contexts = Perturbation(model, rho=RHO) if kind == "Perturbation" else optimizer
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def passes():
        scaler.scale(cross_entropy(model(x), y)).backward()
        scaler.unscale_(optimizer)
        if clip:
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        if kind == "first and second step":
            optimizer.first_step(zero_grad=True)
            scaler.scale(cross_entropy(model(x), y)).backward()
        else:
            with contexts.perturbed():
                scaler.scale(cross_entropy(model(x), y)).backward()
        scaler.step(optimizer)

    def whole():
        if kind != "microbatch":
            return passes()
        with optimizer.microbatch():
            return passes()

    with pytest.raises(RuntimeError, match=r"scaler.unscale_\(optimizer\) came before"):
        whole()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), start, strict=True))


@pytest.mark.parametrize("way", ["closure", "contexts", "first and second step"])
@pytest.mark.parametrize("scaler", ["scales", "unscales", "is unused", "is off"])
def test_an_update_with_gradients_that_are_still_scaled_is_warned_of(way, scaler):
    model, (x, y) = network().float(), batches()[0]
    x, optimizer, kind = x.float(), sam(model), scaler
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0, enabled=kind != "is off")

    def backward():
        loss = cross_entropy(model(x), y)
        (loss if kind == "is unused" else scaler.scale(loss)).backward()
        return loss

    def closure():
        optimizer.zero_grad()
        return backward()

    def update():
        if way == "closure":
            return optimizer.step(closure)
        closure()
        if way == "contexts":
            with optimizer.perturbed():
                backward()
        else:
            optimizer.first_step()
            backward()
        if kind == "unscales":
            scaler.unscale_(optimizer)
        (optimizer.step if way == "contexts" else optimizer.second_step)()
        if kind == "unscales":
            scaler.update()

    is_scaled = kind == "scales" or (kind == "unscales" and way == "closure")
    truth = gradients_by_hand(model, lambda m: cross_entropy(m(x), y))
    expected = [p - LR * (1024 if is_scaled else 1) * g for p, g in zip(model.parameters(), truth, strict=True)]
    if is_scaled:
        with pytest.warns(UserWarning, match=r"1024 times too long. Call scaler.unscale_\(optimizer\)"):
            update()
    else:
        update()
    assert_close(model.parameters(), expected, tolerance=1e-4)
    assert "scale" not in scaler.__dict__
    update()  # it is said once


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "kind", ["divided by hand", "scale of another loss", "another optimizer has stepped", "clipped", "clipped short"]
)
def test_only_gradients_that_are_still_scaled_are_warned_of(way, kind):
    """Warnings are errors. What is clipped to less than the gradient without a scale is right."""
    model, other, (x, y) = network().float(), network(seed=1).float(), batches()[0]
    x, optimizer, plain = x.float(), sam(model), torch.optim.SGD(other.parameters(), lr=LR)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    if kind == "another optimizer has stepped":
        scaler.scale(cross_entropy(other(x), y)).backward()
        scaler.step(plain)

    class Loss:
        def backward(self):
            loss = cross_entropy(model(x), y)
            if kind == "scale of another loss":
                scaler.scale(cross_entropy(other(x), y)).backward()
                return loss.backward()
            scaler.scale(loss).backward()
            for p in model.parameters() if kind == "divided by hand" else ():
                p.grad /= scaler.get_scale()
            if kind.startswith("clipped"):
                nn.utils.clip_grad_norm_(model.parameters(), length)

    truth = gradients_by_hand(model, lambda m: cross_entropy(m(x), y))
    norm = float(torch.cat([g.flatten() for g in truth]).norm())
    length = norm * {"clipped": 1.5, "clipped short": 0.5}.get(kind, 1024 if "stepped" in kind else 1)
    is_wrong = length > norm
    expected = [p - LR * g * (length / norm) for p, g in zip(copies(model), truth, strict=True)]
    with pytest.warns(UserWarning, match="1024 times too long") if is_wrong else contextlib.nullcontext():
        take_step(way, optimizer, Loss)
    assert_close(model.parameters(), expected, tolerance=1e-4)


@pytest.mark.parametrize("by", ["scaler.step", "unscale_"])
def test_micro_batches_of_scaled_losses_that_are_unscaled_in_the_end_are_right(by):
    """Warnings are errors: the sum is 4 times the gradient of the first micro-batch."""
    model, (x, y) = network().float(), batches()[0]
    x, optimizer = x.float(), sam(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    truth = gradients_by_hand(model, lambda m: cross_entropy(m(x), y))
    expected = [p - LR * 4 * g for p, g in zip(copies(model), truth, strict=True)]
    for _ in range(4):
        with optimizer.microbatch():
            scaler.scale(cross_entropy(model(x), y)).backward()
            with optimizer.perturbed():
                scaler.scale(cross_entropy(model(x), y)).backward()
    if by == "unscale_":
        scaler.unscale_(optimizer)
        optimizer.step()
    else:
        scaler.step(optimizer)
    assert_close(model.parameters(), expected, tolerance=1e-5)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_scaler_that_is_copied_kept_or_left_in_the_perturbed_pass_works_on(copied):
    model, (x, y) = network().float(), batches()[0]
    optimizer = sam(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(cross_entropy(model(x.float()), y)).backward()
    optimizer.first_step()
    twin, scale = copied(scaler), scaler.scale
    del optimizer
    gc.collect()
    assert "scale" not in scaler.__dict__
    assert not any(p._backward_hooks for p in model.parameters())
    assert float(twin.scale(torch.ones(()))) == float(scale(torch.ones(()))) == 1024


def test_unscaling_for_another_optimizer_is_nobodys_affair():
    model, other, (x, y) = network().float(), network().float(), batches()[0]
    x = x.float()
    optimizer, plain = sam(model), torch.optim.SGD(other.parameters(), lr=LR)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(cross_entropy(other(x), y)).backward()
    scaler.unscale_(plain)
    truth = gradients_by_hand(model, lambda m: cross_entropy(m(x), y))
    expected = [p - LR * g for p, g in zip(model.parameters(), truth, strict=True)]
    scaler.scale(cross_entropy(model(x), y)).backward()
    with optimizer.perturbed():
        scaler.scale(cross_entropy(model(x), y)).backward()
    scaler.unscale_(optimizer)
    scaler.step(optimizer)
    assert_close(model.parameters(), expected, tolerance=1e-5)


@pytest.mark.parametrize("way", WAYS)
def test_a_loss_over_trainable_parameters_is_the_same_in_norm_only_groups(way):
    model, (x, y) = network(batch_norm=True), batches()[0]

    def loss_of(m):
        return cross_entropy(m(x), y) + 0.01 * sum(p.square().sum() for p in m.parameters() if p.requires_grad)

    optimizer = SAM(norm_only_param_groups(model), torch.optim.SGD, rho=RHO, lr=LR, module=model)
    truth = gradients_by_hand(model, loss_of, moved=("1.weight", "1.bias"))
    expected = float(loss_of(copy.deepcopy(model)).detach())
    seen = []

    def noted():
        loss = loss_of(model)
        seen.append(float(loss.detach()))
        return loss

    take_step(way, optimizer, noted)
    assert seen[0] == expected
    assert_close([p.grad for p in model.parameters()], truth)
    if way == "closure":
        assert float(optimizer.last_step.sharpness) == pytest.approx(seen[1] - seen[0], rel=1e-12)


# random numbers


@pytest.mark.parametrize("how", ["model", "list"])
def test_replayed_masks_also_where_numbers_are_drawn_before_the_model_is_called(how):
    model, (x, y) = network(), batches()[0]
    model.insert(1, nn.Dropout(0.5))
    masks = []
    model[1].register_forward_hook(lambda _, inputs, out: masks.append(out != 0))
    named = model if how == "model" else [nn.Linear(2, 2), model]
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=RHO, lr=LR, module=named, replay_rng=True)
    for _ in range(3):
        masks.clear()
        torch.rand(3)
        cross_entropy(model(x), y).backward()
        with optimizer.perturbed():
            torch.rand(7)
            cross_entropy(model(x), y).backward()
        optimizer.step()
        optimizer.zero_grad()
        assert torch.equal(*masks)


def test_masks_are_those_of_the_batch_after_one_that_was_left_out():
    model, (x, y) = network(), batches()[0]
    model.insert(1, nn.Dropout(0.5))
    masks = []
    model[1].register_forward_hook(lambda _, inputs, out: masks.append(out != 0))
    optimizer = sam(model, replay_rng=True)
    cross_entropy(model(x), y)
    optimizer.zero_grad()
    take_step("contexts", optimizer, lambda: cross_entropy(model(x), y))
    assert torch.equal(*masks[1:])


def test_parts_in_a_list_have_their_masks_replayed_from_the_first_that_runs():
    parts, (x, y) = [nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.5)).double(), nn.Linear(9, 3).double()], batches()[0]
    masks = []
    parts[0][1].register_forward_hook(lambda _, inputs, out: masks.append(out != 0))
    params = [p for part in parts for p in part.parameters()]
    optimizer = SAM(params, torch.optim.SGD, rho=RHO, lr=LR, module=parts[::-1], replay_rng=True)
    take_step("contexts", optimizer, lambda: cross_entropy(parts[1](parts[0](x)), y))
    assert torch.equal(*masks)


def test_a_module_list_whose_call_nobody_sees_is_an_error():
    parts = nn.ModuleList([nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.5)), nn.Linear(9, 3)]).double()
    x, y = batches()[0]
    optimizer = sam(parts, replay_rng=True)
    with pytest.raises(RuntimeError, match=r"where the first pass begins.*microbatch\(\)"):
        take_step("contexts", optimizer, lambda: cross_entropy(parts[1](parts[0](x)), y))


def test_replaying_leaves_no_hook_on_the_model_which_loads_without_this_package(tmp_path):
    model, (x, y) = nn.Sequential(nn.Linear(6, 9), nn.Dropout(0.5), nn.Linear(9, 3)), batches()[0]
    for _ in range(3):
        optimizer = sam(model, replay_rng=True)
        take_step("contexts", optimizer, lambda: cross_entropy(model(x.float()), y))
        optimizer.zero_grad()
        torch.save(model, tmp_path / "model.pt")
    code = (
        "import sys; sys.modules['sam_optim'] = None\nimport torch; from torch import nn\n"
        "torch.serialization.add_safe_globals([nn.Sequential, nn.Linear, nn.Dropout, set])\n"
        f"torch.load({str(tmp_path / 'model.pt')!r}, weights_only=True)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    del optimizer
    gc.collect()
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
    assert not nn.modules.module._global_forward_pre_hooks


# settings


@pytest.mark.parametrize("in_cycle", [False, True])
@pytest.mark.parametrize("dropped", ["new", "in a pass", "after a pass", "after a microbatch", "after a step"])
@pytest.mark.parametrize("replay_rng", [False, True])
def test_an_optimizer_that_is_dropped_leaves_nothing_behind(dropped, in_cycle, replay_rng):
    model, (x, y) = network(), batches()[0]
    start = copies(model)
    optimizer = sam(model, lr=0.0, replay_rng=replay_rng)
    if in_cycle:
        optimizer.itself = optimizer
    if dropped != "new":
        with optimizer.microbatch() if "microbatch" in dropped else contextlib.nullcontext():
            cross_entropy(model(x), y).backward()
            optimizer.first_step()
            cross_entropy(model(x), y).backward()
            if dropped != "in a pass":
                optimizer.perturbation.exit()
        if dropped == "after a step":
            optimizer.step()
    del optimizer
    gc.collect()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), start, strict=True))
    assert not nn.modules.module._global_forward_pre_hooks
    assert not any(p._backward_hooks for p in model.parameters())
    for m in model.modules():
        assert not m._forward_pre_hooks
        assert not m._state_dict_hooks
        assert not m._load_state_dict_pre_hooks


@pytest.mark.parametrize("name", ["rho", "adaptive", "eta", "norm"])
@pytest.mark.parametrize("make", [sam, Perturbation])
def test_a_setting_of_the_groups_is_no_attribute(make, name):
    optimizer = make(network())
    with pytest.raises(AttributeError, match=rf"{name} is a setting of each group.*param_groups.*= 0\.5"):
        setattr(optimizer, name, 0.5)
    assert not hasattr(optimizer, name)


def test_modules_that_cannot_be_looked_after_are_refused_and_lazy_ones_work():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit.script is deprecated
        script, inner = torch.jit.script(network()), torch.jit.script(nn.BatchNorm1d(6))
    with pytest.raises(TypeError, match=r"ScriptModule.*pass the nn\.Module"):
        sam(script)
    x, y = batches()[0]
    model = nn.Sequential(inner, nn.Linear(6, 3)).double()
    take_step("closure", sam(model), lambda: cross_entropy(model(x), y))
    assert int(inner.num_batches_tracked) == 1

    model = nn.Sequential(nn.LazyLinear(4), nn.LazyBatchNorm1d(), nn.Linear(4, 3))
    optimizer = sam(model, lr=0.0)
    take_step("closure", optimizer, lambda: cross_entropy(model(x.float()), y))
    assert int(model[1].num_batches_tracked) == 1
    twin = copy.deepcopy(model)
    truth = gradients_by_hand(twin, lambda m: cross_entropy(m(x.float()), y))
    assert_close([p.grad for p in model.parameters()], truth, tolerance=1e-6)


@pytest.mark.parametrize(
    "returns", [lambda loss: loss, lambda loss: loss.item(), lambda loss: None], ids=["loss", "number", "None"]
)
@pytest.mark.parametrize("clear", ["optimizer", "model", "model in place", "p.grad.zero_()"])
@pytest.mark.parametrize("way", ["SAM", "ASAM", "MSAM", "list", "last of a list", "ascent", "descent"])
def test_zero_grad_after_backward_in_the_closure(way, clear, returns):
    model, (x, y) = network(), batches()[0]
    start = copies(model)
    optimizer = sam(model, cls={"ASAM": ASAM, "MSAM": MSAM}.get(way, SAM))

    def right():
        optimizer.zero_grad()
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    def wrong():
        loss = cross_entropy(model(x), y)
        loss.backward()
        if clear == "p.grad.zero_()":
            for p in model.parameters():
                p.grad.zero_()
        else:
            (optimizer if clear == "optimizer" else model).zero_grad(set_to_none=clear != "model in place")
        return returns(loss)

    passed, ascent = {
        "list": ([wrong, wrong], None),
        "last of a list": ([right, wrong], None),
        "ascent": (right, wrong),
        "descent": (wrong, right),
    }.get(way, (wrong, None))
    words = "gradient in the second pass" if way == "descent" else r"loss.backward\(\) in it, after zero_grad\(\)"
    with pytest.raises(RuntimeError, match=words):
        optimizer.step(passed, ascent_closure=ascent)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), start, strict=True))
    optimizer.zero_grad()
    optimizer.step(right)


@pytest.mark.parametrize("set_to_none", [True, False])
@pytest.mark.parametrize("returns", ["loss", "number", "detached"])
@pytest.mark.parametrize("way", ["SAM", "MSAM", "list", "last of a list", "ascent", "descent"])
def test_a_closure_that_forgets_backward_after_zero_grad(way, returns, set_to_none):
    model, (x, y) = network(), batches()[0]
    start = copies(model)
    optimizer = sam(model, cls=MSAM if way == "MSAM" else SAM)
    cross_entropy(model(x), y).backward()

    def closure(forgets):
        optimizer.zero_grad(set_to_none=set_to_none)
        loss = cross_entropy(model(x), y)
        if not forgets:
            loss.backward()
        return {"loss": loss, "number": loss.item(), "detached": loss.detach()}[returns]

    right, wrong = functools.partial(closure, False), functools.partial(closure, True)
    passed, ascent = {
        "list": ([wrong], None),
        "last of a list": ([right, wrong], None),
        "ascent": (right, wrong),
        "descent": (wrong, right),
    }.get(way, (wrong, None))
    with pytest.raises(RuntimeError, match="left no gradient"):
        optimizer.step(passed, ascent_closure=ascent)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), start, strict=True))


@pytest.mark.parametrize("way", ["SAM", "MSAM", "list", "ascent"])
def test_a_first_pass_by_hand_before_a_closure_that_does_not_clear_it(way):
    """Refused; a list of closures sets it aside, and is right."""
    model, (x, y) = network(), batches()[0]
    start = copies(model)
    truth = gradients_by_hand(model, lambda m: cross_entropy(m(x), y))
    optimizer = sam(model, cls=MSAM if way == "MSAM" else SAM)
    cross_entropy(model(x), y).backward()

    def closure():
        loss = cross_entropy(model(x), y)
        loss.backward()
        return loss

    if way == "list":
        optimizer.step([closure])
        assert_close(model.parameters(), [w - LR * g for w, g in zip(start, truth, strict=True)])
        return
    with pytest.raises(RuntimeError, match=r"left gradients from before step\(closure\) in place"):
        optimizer.step(closure, ascent_closure=closure if way == "ascent" else None)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), start, strict=True))


@pytest.mark.parametrize("cls", [SAM, MSAM])
def test_a_closure_that_returns_none_skips_its_batch(cls):
    model, (x, y) = network(), batches()[0]
    optimizer = sam(model, cls=cls)
    before = copies(model)
    for _ in range(2):
        cross_entropy(model(x), y).backward()
        optimizer.step(optimizer.zero_grad)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("where", ["before the second pass", "after it", "both"])
@pytest.mark.parametrize("way", ["contexts", "first and second step"])
def test_zero_grad_in_place_after_a_backward_in_two_phases(way, where):
    model, (x, y) = network(), batches()[0]
    start = copies(model)
    optimizer = sam(model)

    def step():
        cross_entropy(model(x), y).backward()
        if where != "after it":
            (optimizer if where == "both" else model).zero_grad(set_to_none=False)
        optimizer.first_step()
        cross_entropy(model(x), y).backward()
        if where != "before the second pass":
            model.zero_grad(set_to_none=False)
        if way == "contexts":
            optimizer.perturbation.exit()
            optimizer.step()
        else:
            optimizer.second_step()

    words = "gradients of the first pass were zero" if where == "before the second pass" else "left no gradient"
    with pytest.raises(RuntimeError, match=words):
        step()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), start, strict=True))


@pytest.mark.parametrize("way", WAYS)
def test_a_gradient_that_is_zero_is_no_error(way):
    """A hinge loss that is satisfied at w; in the next batch it is not."""
    model, (x, _) = network(), batches()[0]
    optimizer = sam(model, lr=0.0)
    take_step(way, optimizer, lambda: (model(x) - 1e3).relu().mean())
    assert not any(p.grad.count_nonzero() for p in model.parameters())
    take_step(way, optimizer, lambda: (model(x) + 1e3).relu().mean())
    truth = gradients_by_hand(model, lambda m: (m(x) + 1e3).relu().mean())
    assert_close([p.grad for p in model.parameters()], truth)


# bases and wrappers that cannot work


def test_bases_that_differentiate_their_gradients_or_need_a_closure_are_refused():
    timm_optim = pytest.importorskip("timm.optim")
    model = network()
    for make in (lambda: sam_over(model, timm_optim.Adahessian), lambda: sam_over(model, torch.optim.LBFGS)):
        with pytest.raises(ValueError, match="cannot be the base of SAM"):
            make()
    with pytest.raises(ValueError, match="create_graph=True"):
        SAM.wrap(timm_optim.Adahessian(model.parameters(), lr=LR))


def sam_over(model, base):
    return SAM(model.parameters(), base, rho=RHO, lr=LR)


@pytest.mark.parametrize("inner", [SAM, ASAM, functools.partial(SAM, rho=RHO)], ids=["SAM", "ASAM", "partial"])
def test_inside_zero_redundancy_it_is_refused_with_the_nesting_that_works(inner, tmp_path):
    from torch.distributed.optim import ZeroRedundancyOptimizer

    torch.distributed.init_process_group("gloo", rank=0, world_size=1, init_method=f"file://{tmp_path}/store")
    try:
        model, (x, y) = network(), batches()[0]
        with pytest.raises(ValueError, match="The other way round works"):
            ZeroRedundancyOptimizer(model.parameters(), optimizer_class=inner, lr=LR)
        zero = functools.partial(ZeroRedundancyOptimizer, optimizer_class=torch.optim.SGD)
        optimizer = SAM(model.parameters(), zero, rho=RHO, lr=LR)
        truth = gradients_by_hand(model, lambda m: cross_entropy(m(x), y))
        expected = [p - LR * g for p, g in zip(model.parameters(), truth, strict=True)]
        take_step("closure", optimizer, lambda: cross_entropy(model(x), y))
        assert_close(model.parameters(), expected)
    finally:
        torch.distributed.destroy_process_group()


@pytest.mark.parametrize("frozen", ["nothing", "the last layer"])
@pytest.mark.parametrize("way", ["closure", "contexts"])
def test_gradients_of_single_examples_are_refused(way, frozen):
    """Opacus leaves them in p.grad_sample, which `zero_grad` does not clear."""
    model, (x, y) = network(), batches()[0]
    model[2].requires_grad_(frozen == "nothing")
    optimizer = sam(model)

    class Leaves(torch.autograd.Function):
        @staticmethod
        def forward(ctx, loss):
            return loss.clone()

        @staticmethod
        def backward(ctx, grad):
            for p in model.parameters():
                if p.requires_grad:
                    p.grad_sample = torch.zeros(len(x), *p.shape)
            return grad

    with pytest.raises(RuntimeError, match=r"single examples.*privacy"):
        take_step(way, optimizer, lambda: Leaves.apply(cross_entropy(model(x), y)))


# numbers


@pytest.mark.parametrize("scale", [1.4e-45, 1e-43, 1e-38, 1e-30, 1e-23, 1e30, 3e38])
@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("adaptive", [False, True, "filter"])
@pytest.mark.parametrize("norm", [2, float("inf")])
def test_the_radius_of_tiny_and_of_huge_gradients(scale, foreach, adaptive, norm):
    generator = torch.Generator().manual_seed(2)
    p = nn.Parameter(torch.randn(5, 10, generator=generator))
    optimizer = SAM([p], torch.optim.SGD, rho=RHO, lr=LR, foreach=foreach, adaptive=adaptive, norm=norm)
    w = p.detach().double()
    p.grad = ((2 * torch.rand(5, 10, generator=generator) - 1).double() * scale).float()
    assert p.grad.count_nonzero()
    with optimizer.perturbed():
        e = p.detach().double() - w
        p.grad = torch.ones(5, 10)
    scaled = e / {False: 1.0, True: w.abs() + 0.01, "filter": w.norm(dim=1, keepdim=True) + 0.01}[adaptive]
    radius = float(scaled.norm() if norm == 2 else scaled.abs().max())
    assert radius == pytest.approx(RHO, rel=2e-5)  # 1e-5 for e, and the rounding of w + e in float32
    assert float(optimizer.last_step.radius) == pytest.approx(RHO, rel=1e-6)


@pytest.mark.parametrize("foreach", [False, True])
@pytest.mark.parametrize("kind", ["a group", "a dtype"])
def test_the_radius_of_tiny_gradients_beside_others_that_are_zero(kind, foreach):
    zero = nn.Parameter(torch.ones(5, dtype=torch.float64 if kind == "a dtype" else torch.float32))
    tiny = nn.Parameter(torch.ones(5))
    groups = [{"params": [zero]}, {"params": [tiny], "rho": RHO}]
    perturbation = Perturbation([zero, tiny] if kind == "a dtype" else groups, rho=RHO, foreach=foreach)
    zero.grad, tiny.grad = torch.zeros_like(zero), torch.full_like(tiny, 1e-43)
    with perturbation.perturbed():
        assert torch.equal(zero.detach(), torch.ones_like(zero))
        assert float((tiny.detach() - 1).norm()) == pytest.approx(RHO, rel=1e-5)


@pytest.mark.parametrize("norm", [2, float("inf")])
@pytest.mark.parametrize("rho", [RHO, 0.0])
@pytest.mark.parametrize("way", ["contexts", "closure", "scaler"])
def test_a_nan_at_w_whose_weights_the_second_pass_does_not_use(way, rho, norm):
    """The step is left out by the one rule, also where the gradient that the second pass leaves is finite."""
    used, unused = (nn.Parameter(torch.ones(3, dtype=torch.float64)) for _ in range(2))
    groups = [{"params": [unused]}, {"params": [used], "rho": rho}]
    optimizer = SAM(groups, torch.optim.SGD, rho=RHO, lr=LR, norm=norm)

    def loss_of(bad):
        return used.square().sum() + (unused * bad).sum() * 0.0 if bad else used.square().sum()

    def closure():
        optimizer.zero_grad()
        loss = loss_of(0.0 if optimizer.perturbation.active else float("inf"))
        loss.backward()
        return loss

    with pytest.warns(UserWarning, match="has an inf or NaN") if way != "scaler" else contextlib.nullcontext():
        if way == "closure":
            optimizer.step(closure)
        else:
            scaler = torch.amp.GradScaler("cpu", init_scale=8.0, enabled=way == "scaler")
            scaler.scale(loss_of(float("inf"))).backward()
            with optimizer.perturbed():
                scaler.scale(loss_of(0.0)).backward()
            scaler.step(optimizer)
            scaler.update()
    assert torch.equal(used.detach(), torch.ones(3, dtype=torch.float64))
    assert torch.equal(unused, used)


def test_a_list_of_closures_beside_a_frozen_group_runs_each_closure_twice():
    model = network(batch_norm=True)
    frozen = nn.Parameter(torch.zeros(3, dtype=torch.float64), requires_grad=False)
    groups = [{"params": list(model.parameters())}, {"params": [frozen], "rho": 0.2}]
    optimizer = SAM(groups, torch.optim.SGD, rho=RHO, lr=LR, module=model)
    num_calls = []

    def make(x, y):
        def closure():
            num_calls.append(1)
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        return closure

    optimizer.step([make(x, y) for x, y in batches()])
    assert len(num_calls) == 8
    assert int(model[1].num_batches_tracked) == 4
    x, y = batches()[0]
    take_step("microbatch", optimizer, lambda: cross_entropy(model(x), y))


def test_steps_that_are_left_out_for_nan_are_warned_of_at_powers_of_ten():
    model, (x, y) = network(), batches()[0]
    optimizer = sam(model)

    def steps():
        for _ in range(120):
            take_step("closure", optimizer, lambda: cross_entropy(model(x), y) * float("nan"))

    with pytest.warns(UserWarning, match=r"so far.*lower lr or rho") as warned:
        steps()
    assert [str(w.message).split("(")[1].split()[0] for w in warned] == ["1", "10", "100"]


# parameters and copies that come and go


def descend_by_hand(model, loss_of):
    grads = gradients_by_hand(model, loss_of)
    with torch.no_grad():
        for p, g in zip(model.parameters(), grads, strict=True):
            if g is not None:
                p.sub_(LR * g)


@pytest.mark.parametrize("how", ["a new group", "frozen in every second step"])
@pytest.mark.parametrize("way", WAYS)
def test_a_layer_that_trains_only_from_time_to_time(way, how):
    model, truth = network(), network()
    new_group = how == "a new group"
    params = model[2].parameters() if new_group else model.parameters()
    optimizer = SAM(params, torch.optim.SGD, rho=RHO, lr=LR, module=model)
    for k, (x, y) in enumerate(batches()):
        for m in (model, truth):
            m[0].requires_grad_(k > 1 if new_group else k % 2 == 1)
        if new_group and k == 2:
            optimizer.add_param_group({"params": list(model[0].parameters())})
        take_step(way, optimizer, lambda x=x, y=y: cross_entropy(model(x), y))
        descend_by_hand(truth, lambda m, x=x, y=y: cross_entropy(m(x), y))
        assert_close(model.parameters(), truth.parameters())


@pytest.mark.parametrize("way", WAYS)
def test_model_and_optimizer_that_are_copied_together_train_on_apart(way):
    model = network()
    optimizer = sam(model)
    data = batches()
    take_step(way, optimizer, lambda: cross_entropy(model(data[0][0]), data[0][1]))
    pairs = [(model, optimizer), copy.deepcopy((model, optimizer))]
    assert pairs[1][1].module is pairs[1][0]
    for (m, o), (x, y) in zip(pairs, data[1:], strict=False):
        truth = copy.deepcopy(m)
        take_step(way, o, lambda m=m, x=x, y=y: cross_entropy(m(x), y))
        descend_by_hand(truth, lambda m, x=x, y=y: cross_entropy(m(x), y))
        assert_close(m.parameters(), truth.parameters())


def test_a_closure_that_assigns_what_autograd_grad_returns():
    """Of a matrix it returns a transposed view, and the gradient of the last step has not been cleared."""
    model, truth, (x, y) = network(), network(), batches()[0]
    optimizer = sam(model)

    def closure():
        loss = cross_entropy(model(x), y)
        params = list(model.parameters())
        for p, g in zip(params, torch.autograd.grad(loss, params), strict=True):
            p.grad = g
        return loss

    for _ in range(3):
        optimizer.step(closure)
        descend_by_hand(truth, lambda m: cross_entropy(m(x), y))
    assert_close(model.parameters(), truth.parameters())


# faults while perturbed


@pytest.mark.parametrize("what", ["the model", "a part of it", "the optimizer", "p.data ="])
def test_loading_while_perturbed_is_an_error_and_changes_nothing(what):
    model, (x, y) = network(), batches()[0]
    optimizer = sam(model)
    other = network(seed=7)
    start = copies(model)

    def load():
        if what == "the model":
            model.load_state_dict(other.state_dict())
        elif what == "a part of it":
            model[2].load_state_dict(other[2].state_dict())
        elif what == "the optimizer":
            optimizer.load_state_dict(optimizer.state_dict())
        else:
            model[2].bias.data = torch.zeros(3, dtype=torch.float64)

    def passes():
        cross_entropy(model(x), y).backward()
        with optimizer.perturbed():
            load()
            cross_entropy(model(x), y).backward()

    with pytest.raises(RuntimeError, match="perturbed"):
        passes()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), start, strict=True))
    assert not optimizer.perturbation.active
    take_step("closure", optimizer, lambda: cross_entropy(model(x), y))


def test_a_child_process_leaves_the_weights_that_it_shares_alone():
    model, (x, y) = network().share_memory(), batches()[0]
    optimizer = sam(model)
    start = copies(model)
    cross_entropy(model(x), y).backward()
    optimizer.first_step()
    perturbed = copies(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python warns of threads
        child = os.fork()
    if child == 0:
        del optimizer
        gc.collect()
        os._exit(0)
    os.waitpid(child, 0)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), perturbed, strict=True))
    del optimizer
    gc.collect()
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), start, strict=True))


@pytest.mark.parametrize("batch_norm", [False, True])
@pytest.mark.parametrize("way", ["closure", "contexts"])
def test_after_a_step_under_inference_mode_the_next_one_works(way, batch_norm):
    model, (x, y) = network(batch_norm=batch_norm), batches()[0]
    optimizer = sam(model)
    with pytest.raises(RuntimeError, match="does not require grad"), torch.inference_mode():
        take_step(way, optimizer, lambda: cross_entropy(model(x), y))
    truth = gradients_by_hand(model, lambda m: cross_entropy(m(x), y))
    take_step(way, optimizer, lambda: cross_entropy(model(x), y))
    assert_close([p.grad for p in model.parameters()], truth)


# Lightning, where the module steps its optimizer itself


@pytest.mark.filterwarnings("ignore:.*LeafSpec.*is deprecated:FutureWarning")
@pytest.mark.filterwarnings("ignore:.*does not have many workers")
@pytest.mark.parametrize("way", ["contexts", "first and second step", "microbatch"])
@pytest.mark.parametrize("named", [False, True])
def test_lightnings_manual_optimization(way, named):
    lightning = pytest.importorskip("lightning")

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.automatic_optimization = False
            self.net = network()

        def training_step(self, batch, batch_idx):
            optimizer, (x, y) = self.optimizers(), batch

            class Loss:
                def backward(_):
                    self.manual_backward(cross_entropy(self.net(x), y))

            take_step(way, optimizer, Loss)

        def configure_optimizers(self):
            return sam(self.net, module=self if named else None)

    module = Module()
    twin = copy.deepcopy(module.net)
    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    data = [pair for x, y in batches() for pair in zip(x, y, strict=True)]
    trainer.fit(module, torch.utils.data.DataLoader(data, batch_size=8))
    for x, y in batches():
        truth = gradients_by_hand(twin, lambda m, x=x, y=y: cross_entropy(m(x), y))
        with torch.no_grad():
            for p, g in zip(twin.parameters(), truth, strict=True):
                p.sub_(g, alpha=LR)
    assert_close(module.net.parameters(), twin.parameters())
    assert trainer.global_step == len(batches())


def test_a_loop_written_for_davda54_runs_as_it_is_with_eta_0():
    """Its ASAM has T = |w|: pass eta=0 for the same numbers."""
    model, (x, y) = network(), batches()[0]
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=2.0, adaptive=True, eta=0.0, lr=LR)
    there = copy.deepcopy(model)
    cross_entropy(there(x), y).backward()
    norm = torch.stack([(p.detach().abs() * p.grad).norm() for p in there.parameters()]).norm()
    with torch.no_grad():
        for p in there.parameters():
            p.add_(p.square() * p.grad * (2.0 / norm))
    there.zero_grad()
    cross_entropy(there(x), y).backward()
    cross_entropy(model(x), y).backward()
    optimizer.first_step(zero_grad=True)
    cross_entropy(model(x), y).backward()
    assert_close([p.grad for p in model.parameters()], [p.grad for p in there.parameters()])
    optimizer.second_step(zero_grad=True)


class TwoTowers(nn.Module):
    """A query encoder, and a key encoder that follows it in every forward pass."""

    def __init__(self, moves):
        super().__init__()
        torch.manual_seed(0)
        self.query = nn.Sequential(nn.Linear(6, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 3)).double()
        self.key = copy.deepcopy(self.query).requires_grad_(False)
        self.moves = moves

    def forward(self, x):
        for k, q in zip(self.key.parameters(), self.query.parameters(), strict=True):
            self.moves(k, 0.9 * k.data + 0.1 * q.data)
        return self.query(x) + self.key(x)


def replace_data(p, value):
    p.data = value


@pytest.mark.parametrize("moves", [lambda p, value: p.data.copy_(value), replace_data], ids=["in place", "replaced"])
@pytest.mark.parametrize("way", ["closure", "contexts", "microbatch"])
def test_a_frozen_encoder_moves_once_also_where_the_optimizer_was_given_it(way, moves):
    model, by_hand = TwoTowers(moves), TwoTowers(moves)
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, module=model)
    weights = list(by_hand.query.parameters())
    for i in range(4):
        x, y = batches()[i]

        def loss(x=x, y=y):
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            loss.backward()
            return loss

        if way == "closure":
            optimizer.step(loss)
        else:
            optimizer.zero_grad()
            with optimizer.microbatch() if way == "microbatch" else contextlib.nullcontext():
                cross_entropy(model(x), y).backward()
                with optimizer.perturbed():
                    cross_entropy(model(x), y).backward()
            optimizer.step()

        grads = torch.autograd.grad(cross_entropy(by_hand(x), y), weights)
        after, w = copy.deepcopy(by_hand.state_dict()), [p.detach().clone() for p in weights]
        norm = torch.stack([g.norm() for g in grads]).norm()
        with torch.no_grad():
            for p, g in zip(weights, grads, strict=True):
                p += 0.1 * g / norm
        grads = torch.autograd.grad(cross_entropy(by_hand(x), y), weights)
        by_hand.load_state_dict(after)
        with torch.no_grad():
            for p, value, g in zip(weights, w, grads, strict=True):
                p.copy_(value - 0.1 * g)
    torch.testing.assert_close(model.state_dict(), by_hand.state_dict(), rtol=0, atol=1e-12)


def test_gradients_that_a_frozen_network_has_from_its_own_loss_stay():
    """A GAN in two phases: D's backward comes first, and D is frozen while G trains."""
    torch.manual_seed(0)
    g, d = nn.Linear(4, 4).double(), nn.Linear(4, 1).double()
    optimizer = SAM(g.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, module=[g, d])
    x = torch.randn(8, 4, dtype=torch.float64)
    d(x).square().mean().backward()
    expected = d.weight.grad.clone()
    d.requires_grad_(False)
    d(g(x)).mean().backward()
    with optimizer.perturbed():
        d(g(x)).mean().backward()
    d.requires_grad_(True)
    assert torch.equal(d.weight.grad, expected)


def test_two_perturbed_passes_in_one_microbatch_are_refused():
    model = network()
    optimizer = sam(model)
    before = [p.detach().clone() for p in model.parameters()]

    def accumulate():
        with optimizer.microbatch():
            for x, y in batches():
                cross_entropy(model(x), y).backward()
                with optimizer.perturbed():
                    cross_entropy(model(x), y).backward()

    with pytest.raises(RuntimeError, match="anew for each micro-batch"):
        accumulate()
    assert all(map(torch.equal, before, model.parameters()))


# loops with two networks, and what they keep from pass to pass


@pytest.mark.parametrize("retain", [False, True])
@pytest.mark.parametrize("way", ["closure", "list", "contexts", "microbatch"])
def test_torchs_error_of_a_graph_that_is_used_twice_says_what_to_do(way, retain):
    """Outputs (fakes, log-probabilities) made once for both passes: without and with what torch's words advise."""
    model, (x, y) = network(), batches()[0]
    optimizer, start = sam(model), copies(model)
    loss = cross_entropy(model(x), y)

    class Once:
        def backward(self):
            loss.backward(retain_graph=retain)

    words = "modified by an inplace operation" if retain else "a second time"
    with pytest.raises(RuntimeError, match=words) as error:
        take_step(way, optimizer, Once)
    (note,) = error.value.__notes__
    assert "run the model inside the closure, or both before the perturbed pass and in it" in note
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), start, strict=True))
    take_step(way, optimizer, lambda: cross_entropy(model(x), y))
    descend_by_hand(truth := network(), lambda m: cross_entropy(m(x), y))
    assert_close(model.parameters(), truth.parameters())


def descend_one_of_two(pair, loss_of, name):
    moved = [key for key, _ in pair.named_parameters() if key.startswith(name)]
    grads = gradients_by_hand(pair, loss_of, moved=moved)
    with torch.no_grad():
        for (key, p), g in zip(pair.named_parameters(), grads, strict=True):
            if key in moved:
                p.sub_(LR * g)


@pytest.mark.parametrize("way", WAYS)
def test_fakes_that_are_made_once_serve_one_pass_of_the_generator(way):
    """DCGAN: D's loss on fake.detach(), then G's loss on D(fake), and in its second pass on D(G(z)): D's passes, which
    restore the buffers of G, leave the graph of fake valid. Every network counts each batch once."""
    y, discriminator = batches()[0][1], nn.Sequential(nn.BatchNorm1d(3), nn.Linear(3, 3))
    pair = nn.ModuleDict({"G": network(batch_norm=True), "D": discriminator}).double()
    truth = copy.deepcopy(pair)
    step_d, step_g = (SAM(pair[k].parameters(), rho=RHO, lr=LR, module=pair) for k in "DG")

    def loss_d(m, fake, z):
        return cross_entropy(m["D"](z[:, :3]), y) - cross_entropy(m["D"](fake.detach()), y)

    for z, _ in batches():
        fake = pair["G"](z)
        take_step(way, step_d, lambda z=z, fake=fake: loss_d(pair, fake, z))
        fakes = (pair["G"](z) if again else fake for again in (False, True))
        take_step(way, step_g, lambda fakes=fakes: cross_entropy(pair["D"](next(fakes)), y))

        fake = truth["G"](z)
        loss_d(truth, fake, z)  # for the buffers, as is the other call below
        descend_one_of_two(truth, lambda m, z=z, fake=fake: loss_d(m, fake, z), "D")
        truth["D"](fake)
        descend_one_of_two(truth, lambda m, z=z: cross_entropy(m["D"](m["G"](z)), y), "G")
        assert_close(
            [t.double() for t in pair.state_dict().values()], [t.double() for t in truth.state_dict().values()]
        )


def test_a_first_step_without_a_second_one_gives_the_pass_up_and_names_microbatch():
    """A loop that goes on after an error loses the batch that fails and the next one, not all of them."""
    model, truth = network(), network()
    optimizer = sam(model)
    for i, (x, y) in enumerate(batches(6)):
        optimizer.zero_grad()
        cross_entropy(model(x), y).backward()
        if i == 2:  # the batch after the one that has failed
            with pytest.raises(RuntimeError, match=r"came twice.*optimizer.microbatch\(\).*exit\(failed=True\)"):
                optimizer.first_step(zero_grad=True)
            continue
        optimizer.first_step(zero_grad=True)
        if i != 1:
            cross_entropy(model(x), y).backward()
            optimizer.second_step(zero_grad=True)
            descend_by_hand(truth, lambda m, x=x, y=y: cross_entropy(m(x), y))
    assert_close(model.parameters(), truth.parameters())


@pytest.mark.parametrize("where", ["in both passes", "in the perturbed pass", "after the step"])
@pytest.mark.parametrize("way", WAYS)
def test_a_teacher_that_load_state_dict_updates_in_a_pass_is_an_error_that_says_when(way, where):
    model, teacher = network(), network(seed=1).requires_grad_(False)
    truth, (x, y) = copy.deepcopy((model, teacher)), batches()[0]
    optimizer = sam(model, module=[model, teacher])

    def update(model, teacher):
        average = {k: 0.9 * v + 0.1 * model.state_dict()[k] for k, v in teacher.state_dict().items()}
        teacher.load_state_dict(average)

    def loss_of():
        if where == "in both passes" or (where == "in the perturbed pass" and optimizer.perturbation.active):
            update(model, teacher)
        return cross_entropy(model(x) + teacher(x), y)

    if where != "after the step":
        with pytest.raises(RuntimeError, match=r"perturbed.*an EMA, a teacher.*before the first pass or after"):
            take_step(way, optimizer, loss_of)
        return
    for _ in range(3):
        take_step(way, optimizer, loss_of)
        update(model, teacher)
        descend_by_hand(truth[0], lambda m: cross_entropy(m(x) + truth[1](x), y))
        update(*truth)
        assert_close(model.parameters(), truth[0].parameters())
        assert_close(teacher.parameters(), truth[1].parameters())


@pytest.mark.parametrize("how", ["lerp_", ".data"])
@pytest.mark.parametrize("frozen", [True, False])
@pytest.mark.parametrize("way", ["contexts", "first and second step", "microbatch"])
def test_an_average_that_moves_in_the_perturbed_pass_alone_is_warned_of_in_the_second_step(way, frozen, how):
    model = network()
    average, (x, y) = copy.deepcopy(model).requires_grad_(not frozen), batches()[0]
    optimizer = sam(model, module=[model, average])

    def update():
        with torch.no_grad():
            for a, p in zip(average.parameters(), model.parameters(), strict=True):
                a.lerp_(p, 0.1) if how == "lerp_" else a.data.mul_(0.9).add_(p.data, alpha=0.1)

    def loss_of():
        if optimizer.perturbation.active:
            update()
        return cross_entropy(model(x), y)

    take_step(way, optimizer, loss_of)
    with pytest.warns(UserWarning, match=r"Sequential in module= has.*an EMA.*after optimizer.step\(\)"):
        take_step(way, optimizer, loss_of)
    take_step(way, optimizer, loss_of)  # said once


@pytest.mark.parametrize("way", WAYS)
def test_timms_average_in_the_closure_moves_once_where_it_is_named(way):
    """It writes to the tensors of its state_dict(), which in the second pass must not be those that are restored."""
    timm_utils = pytest.importorskip("timm.utils")
    model, (x, y) = network(batch_norm=True), batches()[0]
    average = timm_utils.ModelEmaV3(model, decay=0.9)
    optimizer = sam(model, module=[model, average])

    def loss_of():
        loss = cross_entropy(model(x), y)
        average.update(model)
        return loss

    for _ in range(3):
        truth = [0.9 * a + 0.1 * w for a, w in zip(average.module.parameters(), copies(model), strict=True)]
        take_step(way, optimizer, loss_of)
        assert_close(average.module.parameters(), truth)


class Centered(nn.Module):
    """DINO's loss, with a center that is no buffer and that each pass assigns anew, and its teacher in eval mode."""

    def __init__(self, kind):
        super().__init__()
        self.teacher, self.kind = network(seed=1).eval().requires_grad_(False), kind
        self.center = self.kind(torch.zeros(3, dtype=torch.float64))

    def forward(self, out, x):
        target = self.teacher(x)
        loss = cross_entropy(out, (target - self.center).softmax(dim=1))
        self.center = self.kind(0.9 * self.center + 0.1 * target.mean(dim=0) + 0.1 * out.detach().mean(dim=0))
        return loss


def frozen_parameter(x):
    return nn.Parameter(x, requires_grad=False)


@pytest.mark.parametrize("kind", [torch.clone, frozen_parameter], ids=["tensor", "frozen parameter"])
@pytest.mark.parametrize("way", WAYS)
def test_a_tensor_that_each_pass_assigns_anew_is_that_of_the_first(way, kind):
    """Warnings are errors: a teacher that is in eval mode all the time is no evaluation at w + e."""
    model, truth, criterion = network(), network(), Centered(kind)
    by_hand, optimizer = Centered(kind), sam(model, module=[model, criterion])
    for x, _ in batches():
        take_step(way, optimizer, lambda x=x: criterion(model(x), x))
        after_first = copy.deepcopy(by_hand)
        after_first(truth(x), x)
        passes = iter([by_hand, copy.deepcopy(after_first)])
        descend_by_hand(truth, lambda m, x=x, passes=passes: next(passes)(m(x), x))
        by_hand = after_first
        assert_close([criterion.center, *model.parameters()], [by_hand.center, *truth.parameters()])


def two_losses(pair, z, y):
    """Of D on the output of G, and of G through a D that is frozen meanwhile."""
    loss_d = cross_entropy(pair["D"](pair["G"](z).detach()), y)
    pair["D"].requires_grad_(False)
    loss_g = -cross_entropy(pair["D"](pair["G"](z)), y)
    pair["D"].requires_grad_(True)
    return loss_d, loss_g


@pytest.mark.parametrize("way", ["contexts", "first and second step"])
def test_passes_of_two_optimizers_that_are_nested_perturb_both_networks_at_once(way):
    """Each of the two is given its own network alone. Warnings are errors: what the other one moves is no average."""
    z, y = batches()[0]
    pair = nn.ModuleDict({"G": network(), "D": nn.Linear(3, 3)}).double()
    there, start = copy.deepcopy(pair), copies(pair)
    step_d, step_g = (SAM(pair[k].parameters(), rho=RHO, lr=LR, module=pair[k]) for k in "DG")
    with contextlib.ExitStack() as passes:
        for loss in two_losses(pair, z, y):
            loss.backward()
        for optimizer in (step_d, step_g):
            passes.enter_context(optimizer.perturbed()) if way == "contexts" else optimizer.first_step()
        for loss in two_losses(pair, z, y):
            loss.backward()
    for optimizer in (step_g, step_d):
        optimizer.step() if way == "contexts" else optimizer.second_step()

    for _ in range(2):
        there.zero_grad()
        for loss in two_losses(there, z, y):
            loss.backward()
        grads = {k: [p.grad for p in there[k].parameters()] for k in "DG"}
        with torch.no_grad():
            for k in "DG":
                norm = torch.stack([g.norm() for g in grads[k]]).norm()
                for p, g in zip(there[k].parameters(), grads[k], strict=True):
                    p.add_(g * (RHO / norm))
    assert_close(pair.parameters(), [w - LR * g for w, g in zip(start, [*grads["G"], *grads["D"]], strict=True)])


def test_first_passes_of_two_networks_before_the_perturbed_ones_name_the_order():
    z, y = batches()[0]
    pair = nn.ModuleDict({"G": network(), "D": nn.Linear(3, 3)}).double()
    truth = copy.deepcopy(pair)
    step_d, step_g = (SAM(pair[k].parameters(), rho=RHO, lr=LR, module=pair) for k in "DG")
    for loss in two_losses(pair, z, y):
        loss.backward()
    with step_d.perturbed():
        two_losses(pair, z, y)[0].backward()
    with (
        pytest.raises(RuntimeError, match=r"loss.backward\(\).*after that of an optimizer whose module= names this"),
        step_g.perturbed(),
    ):
        pass
    step_d.step()
    take_step("contexts", step_g, lambda: two_losses(pair, z, y)[1])
    descend_one_of_two(truth, lambda m: two_losses(m, z, y)[0], "D")
    descend_one_of_two(truth, lambda m: two_losses(m, z, y)[1], "G")
    assert_close(pair.parameters(), truth.parameters())
