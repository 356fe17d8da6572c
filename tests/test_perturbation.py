"""The two contexts: what they leave behind, in order and out of order."""

import copy
import io
import itertools
import math
import pickle
import random
from contextlib import nullcontext

import numpy
import pytest
import torch
from torch import nn

from sam_optim import Ball, Perturbation

LOSS = nn.CrossEntropyLoss()


def network(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(
        nn.Linear(6, 20), nn.BatchNorm1d(20, momentum=None), nn.ReLU(), nn.Dropout(dropout), nn.Linear(20, 3)
    )


def batch(n=16, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)


def snapshot(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def same(model, state):
    result = dict(model.named_parameters()) | dict(model.named_buffers())
    return all(torch.equal(result[k], v) for k, v in state.items())


def pointers(model):
    return [t.data_ptr() for t in (*model.parameters(), *model.buffers())]


def global_rng():
    return torch.get_rng_state().tolist(), random.getstate(), numpy.random.get_state()[1].tolist()


def test_the_gradient_is_the_one_at_the_perturbed_point():
    model, (x, y) = network(), batch()
    sam = Perturbation(model, rho=0.1)
    LOSS(model(x), y).backward()
    e = Ball(0.1).ascent([p.grad for p in model.parameters()], list(model.parameters()))
    moved = copy.deepcopy(model)
    for p, d in zip(moved.parameters(), e, strict=True):
        p.data.add_(d)
    moved.zero_grad()
    LOSS(moved(x), y).backward()
    with sam.perturbed():
        LOSS(model(x), y).backward()
    for p, q in zip(model.parameters(), moved.parameters(), strict=True):
        torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-6)


class Fault(BaseException):
    pass


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, Fault, torch.OutOfMemoryError])
@pytest.mark.parametrize("adaptive", [False, True, "filter"])
@pytest.mark.parametrize("foreach", [None, True])
def test_a_fault_in_the_second_pass_leaves_everything_as_before(kind, adaptive, foreach):
    model, (x, y) = network(dropout=0.5), batch()
    sam = Perturbation(model, rho=0.5, adaptive=adaptive, foreach=foreach)
    LOSS(model(x), y).backward()
    state, where = snapshot(model), pointers(model)

    def second_pass():
        with sam.perturbed():
            assert not same(model, state)
            LOSS(model(x), y).backward()
            random.random(), numpy.random.rand()
            raise kind("on purpose")

    with pytest.raises(kind, match="on purpose"):
        second_pass()
    assert same(model, state)
    assert pointers(model) == where
    assert not sam.active


@pytest.mark.parametrize("foreach", [None, True])
@pytest.mark.parametrize("adaptive", [False, True])
def test_an_interrupt_between_two_operations_of_the_move_leaves_no_mixture(adaptive, foreach):
    """Ctrl-C may come at any instruction: wherever the move stopped, all must come back."""
    from torch.utils._python_dispatch import TorchDispatchMode

    class Interrupt(TorchDispatchMode):
        def __init__(self, stop):
            super().__init__()
            self.left = stop

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            self.left -= 1
            if self.left == 0:
                raise KeyboardInterrupt
            return func(*args, **(kwargs or {}))

    stopped = 0
    for stop in itertools.count(1):
        model, (x, y) = wide_network(), batch()
        LOSS(model(x), y).backward()
        state = snapshot(model)
        sam = Perturbation(model, rho=0.5, adaptive=adaptive, foreach=foreach)
        try:
            with Interrupt(stop), sam.perturbed():
                pass
        except KeyboardInterrupt:
            stopped += 1
        assert same(model, state)
        assert not sam.active
        if stopped < stop:
            break
    assert stopped > 10


def wide_network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 1000), nn.ReLU(), nn.Linear(1000, 10), nn.ReLU(), nn.Linear(10, 3))


def test_buffers_are_those_of_the_first_pass():
    """momentum=None averages over all batches and counts them: setting the momentum to 0 would be wrong here."""
    model, plain, (x, y) = network(), network(), batch()
    for i in range(3):
        plain(x + i)
        LOSS(model(x + i), y).backward()
        with Perturbation(model, rho=0.5).perturbed():
            LOSS(model(x + i), y).backward()
        model.zero_grad()
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), plain.buffers(), strict=True))
    assert int(model[1].num_batches_tracked) == 3


@pytest.mark.parametrize("keep", [False, True])
def test_state_dict_while_perturbed_holds_clean_weights(keep):
    model, (x, y) = network(), batch()
    wrapper = nn.ModuleDict({"inner": model})
    kept = model.state_dict() if keep else None
    LOSS(model(x), y).backward()
    clean = snapshot(model)
    with Perturbation(model, rho=0.5).perturbed():
        model(x)
        assert not same(model, clean)
        for result in (model.state_dict(), {k.removeprefix("inner."): v for k, v in wrapper.state_dict().items()}):
            assert result.keys() == clean.keys()
            assert all(torch.equal(result[k], clean[k]) for k in clean)
    assert not model._state_dict_hooks
    assert pickle.loads(pickle.dumps(model)) is not None
    assert kept is None or same(model, clean)


def test_gradient_missing_in_one_pass():
    """Stochastic depth: no gradient in pass 1 means not moved; none in pass 2 means moved, and brought back."""
    a, b, c = (nn.Parameter(torch.ones(3)) for _ in range(3))
    sam = Perturbation([a, b, c], rho=1.0)
    (a.sum() + b.sum()).backward()
    with sam.perturbed():
        assert not torch.equal(a, torch.ones(3))
        assert torch.equal(c, torch.ones(3))
        (b.sum() + c.sum()).backward()
    assert all(torch.equal(p, torch.ones(3)) for p in (a, b, c))
    assert a.grad is None
    assert c.grad is not None


def test_one_autocast_region_around_both_passes():
    """Autocast caches low-precision copies of the weights: without clearing them the second pass sees the first's."""
    model = nn.Linear(8, 4)
    x = torch.randn(32, 8)
    sam = Perturbation(model, rho=5.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first = model(x).float().square().mean()
        first.backward()
        with sam.perturbed():
            together = model(x).float().square().mean()
            together.backward()
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        first_again = model(x).float().square().mean()
        first_again.backward()
    with sam.perturbed(), torch.autocast("cpu", dtype=torch.bfloat16):
        apart = model(x).float().square().mean()
        apart.backward()
    assert together.item() == apart.item() > first.item() == first_again.item()


def test_groups_have_one_norm_and_their_own_radius():
    a, b, c = (nn.Parameter(torch.zeros(2)) for _ in range(3))
    a.grad, b.grad, c.grad = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 4.0]), torch.ones(2) * 100
    groups = [{"params": [a], "rho": 1.0}, {"params": [b], "rho": 2.0}, {"params": [c], "rho": 0.0}]
    sam = Perturbation(groups)
    with sam.perturbed():
        torch.testing.assert_close(a.detach(), torch.tensor([0.6, 0.0]))
        torch.testing.assert_close(b.detach(), torch.tensor([0.0, 1.6]))
        assert torch.equal(c, torch.zeros(2))
    assert float(sam.last_step.dual_norm) == pytest.approx(5.0)
    assert float(sam.last_step.radius) == pytest.approx(math.hypot(0.6, 1.6))


def test_microbatches_accumulate_the_mean_of_their_own_sharpness_aware_gradients():
    model, half = nn.Linear(6, 3), batch(8)
    other = batch(8, seed=1)
    sam = Perturbation(model, rho=0.3)
    alone = []
    for x, y in (half, other):
        with sam.microbatch():
            LOSS(model(x), y).backward()
            with sam.perturbed():
                LOSS(model(x), y).backward()
        alone.append([p.grad.clone() for p in model.parameters()])
        model.zero_grad()
    for x, y in (half, other):
        with sam.microbatch():
            (LOSS(model(x), y) / 2).backward()
            with sam.perturbed():
                (LOSS(model(x), y) / 2).backward()
    for p, g, h in zip(model.parameters(), *alone, strict=True):
        torch.testing.assert_close(p.grad, (g + h) / 2)


def test_microbatch_keeps_the_tensor_that_gradients_accumulate_in():
    model, (x, y) = network(), batch()
    sam = Perturbation(model, rho=0.3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    static = [p.grad for p in model.parameters()]
    state = snapshot(model)

    def faulty():
        with sam.microbatch():
            LOSS(model(x), y).backward()
            with sam.perturbed():
                raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        faulty()
    assert same(model, state)
    for p, g in zip(model.parameters(), static, strict=True):
        p.grad = g
    with sam.microbatch():
        LOSS(model(x), y).backward()
        with sam.perturbed():
            LOSS(model(x), y).backward()
    assert all(p.grad is g for p, g in zip(model.parameters(), static, strict=True))


def test_microbatch_without_a_perturbed_pass_is_an_error():
    model, (x, y) = network(), batch()
    sam = Perturbation(model)
    with pytest.raises(RuntimeError, match="perturbed"), sam.microbatch():
        LOSS(model(x), y).backward()


@pytest.mark.parametrize("how", ["microbatch", "closure"])
def test_replay_rng_draws_the_same_numbers_and_advances_once(how):
    """Also those that are drawn before the model is called."""
    model, (x, _) = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)), batch()
    sam = Perturbation(model, rho=1e-6, replay_rng=True)
    masks, noises = [], []

    def forward():
        noises.append(torch.randn(()))
        out = model(x + noises[-1])
        masks.append((out == 0).clone())
        out.square().sum().backward()

    torch.manual_seed(5)
    forward()
    once = torch.get_rng_state()
    model.zero_grad()
    torch.manual_seed(5)
    if how == "microbatch":
        with sam.microbatch():
            forward()
            with sam.perturbed():
                forward()
    else:
        sam.backward(forward)
    assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert len(set(map(float, noises))) == 1
    assert torch.equal(torch.get_rng_state(), once)
    assert not model._forward_pre_hooks
    assert copy.deepcopy(model) is not None


def test_replay_rng_has_to_know_where_the_first_pass_begins():
    model, (x, y) = network(), batch()
    sam = Perturbation(list(model.parameters()), replay_rng=True)
    LOSS(model(x), y).backward()
    with pytest.raises(RuntimeError, match="microbatch"), sam.perturbed():
        pass


def test_in_two_phases_the_draws_of_the_module_are_replayed():
    """Whatever is drawn around it; and nothing of it stays in the model."""
    model, (x, _) = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)), batch()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    sam, masks = Perturbation(model, rho=1e-6, replay_rng=True), []
    for _ in range(3):
        for pass_ in (nullcontext(), sam.perturbed()):
            with pass_:
                out = model(x + torch.randn(()))
                masks.append((out == 0).clone())
                out.square().sum().backward()
        assert torch.equal(*masks[-2:])
        optimizer.step()
        optimizer.zero_grad()
    assert not torch.equal(masks[0], masks[2])
    torch.save(model, buffer := io.BytesIO())
    assert b"sam_optim" not in buffer.getvalue()


def test_without_replay_the_second_pass_draws_anew():
    model, (x, _) = nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.5)), batch()
    model(x).square().sum().backward()
    first = torch.get_rng_state()
    with Perturbation(model, rho=1e-6).perturbed():
        model(x).square().sum().backward()
    assert not torch.equal(torch.get_rng_state(), first)


def test_a_backward_through_the_graph_of_the_first_pass_is_refused():
    """It would mix activations at w with weights at w + e."""
    model, (x, y) = network(), batch()
    loss = LOSS(model(x), y)
    loss.backward(retain_graph=True)
    with (
        Perturbation(model, rho=0.1).perturbed(),
        pytest.raises(RuntimeError, match="modified by an inplace operation"),
    ):
        loss.backward()


def test_misuse_is_refused_with_the_remedy():
    model, (x, y) = network(), batch()
    sam = Perturbation(model)
    with pytest.raises(RuntimeError, match=r"loss.backward\(\) before"), sam.perturbed():
        pass
    LOSS(model(x), y).backward()
    with sam.perturbed():
        LOSS(model(x), y).backward()
        with pytest.raises(RuntimeError, match="perturbed already"), sam.perturbed():
            pass
        with pytest.raises(RuntimeError, match="another perturbation"), Perturbation(model).perturbed():
            pass
        with pytest.raises(RuntimeError, match="copy or pickle after"):
            copy.deepcopy(sam)
    assert not sam.active
    for bad in ({"rho": -1}, {"rho": math.nan}, {"rho": "x"}, {"norm": 3}, {"adaptive": "rows"}, {"eta": -0.1}):
        with pytest.raises(ValueError, match=str(next(iter(bad.values())))):
            Perturbation(model, **bad)
    with pytest.raises(ValueError, match="sideways"):
        Perturbation(model, rounding="sideways")
    with pytest.raises(ValueError, match="empty"):
        Perturbation([])
    with pytest.raises(TypeError, match="one tensor"):
        Perturbation(torch.zeros(3))


def test_a_radius_that_a_schedule_made_negative_moves_nothing():
    model, (x, y) = network(), batch()
    sam = Perturbation(model)
    LOSS(model(x), y).backward()
    sam.param_groups[0]["rho"] = -0.1
    state = snapshot(model)
    with pytest.raises(ValueError, match=r"-0\.1"), sam.perturbed():
        pass
    assert same(model, state)


def test_bfloat16_weights_say_how_much_survives_and_stochastic_rounding_keeps_it():
    def make():
        torch.manual_seed(0)
        p = nn.Parameter(torch.randn(100, 100).bfloat16())
        p.grad = torch.randn(100, 100).bfloat16()
        return p

    p = make()
    before = p.detach().clone()
    sam = Perturbation([p], rho=0.05)
    with pytest.warns(UserWarning, match="survives the rounding"), sam.perturbed():
        pass
    lost = float(sam.last_step.realized)
    assert lost < 0.5
    p.grad = torch.randn(100, 100).bfloat16()
    with sam.perturbed():  # warned once
        pass
    assert torch.equal(p, before)
    shares = []
    for seed in range(50):
        q = make()
        keeping = Perturbation([q], rho=0.05, rounding="stochastic", seed=seed)
        with pytest.MonkeyPatch.context() as m:
            m.setattr("warnings.warn", lambda *a, **k: None)
            with keeping.perturbed():
                pass
        assert torch.equal(q, before)
        shares.append(float(keeping.last_step.realized))
    mean, error = numpy.mean(shares), numpy.std(shares, ddof=1) / len(shares) ** 0.5
    assert abs(mean - 1) < 4 * error
    assert error < 0.2


def test_float32_weights_keep_the_perturbation():
    p = nn.Parameter(torch.randn(10))
    p.grad = torch.randn(10)
    sam = Perturbation([p], rho=0.05)
    with sam.perturbed():
        pass
    assert float(sam.last_step.realized) == 1.0


def test_microbatches_with_every_radius_0_are_the_plain_gradient():
    """A radius that a schedule starts at 0: there must be something to compute a gradient of in the first pass."""
    model, twin, (x, y) = network(), network(), batch()
    LOSS(twin(x), y).backward()
    sam = Perturbation(model, rho=0.0)
    with sam.microbatch():
        LOSS(model(x), y).backward()
        with sam.perturbed():
            LOSS(model(x), y).backward()
    assert all(torch.equal(p.grad, q.grad) for p, q in zip(model.parameters(), twin.parameters(), strict=True))
