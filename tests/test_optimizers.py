"""SAM and ASAM as optimizers: all ways of stepping, torch's contract, and what the field gets wrong."""

import copy
import functools
import inspect
import io
import math
import pickle

import pytest
import torch
from torch import nn

from sam_optim import ASAM, SAM, Ball, Perturbation, asam_param_groups

LOSS = nn.CrossEntropyLoss()
BASES = {
    "sgd": functools.partial(torch.optim.SGD, lr=0.1),
    "momentum": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, dampening=0.1),
    "nesterov": functools.partial(torch.optim.SGD, lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": functools.partial(torch.optim.Adam, lr=0.01, amsgrad=True),
    "adamw": functools.partial(torch.optim.AdamW, lr=0.01, weight_decay=0.1),
    "rmsprop": functools.partial(torch.optim.RMSprop, lr=0.01, momentum=0.9),
    "adagrad": functools.partial(torch.optim.Adagrad, lr=0.1),
}


def timm_lamb(params):
    from timm.optim import Lamb

    return Lamb(params, lr=0.01)


BASES["timm lamb"] = timm_lamb


def network(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 20), nn.BatchNorm1d(20), nn.ReLU(), nn.Dropout(0.3), nn.Linear(20, 3))


def data(i, n=16):
    generator = torch.Generator().manual_seed(i)
    return torch.randn(n, 6, generator=generator), torch.randint(3, (n,), generator=generator)


def closure_of(model, optimizer, i, **zero):
    x, y = data(i)

    def closure():
        optimizer.zero_grad(**zero)
        loss = LOSS(model(x), y)
        loss.backward()
        return loss

    return closure


def train(model, optimizer, steps):
    for i in steps:
        torch.manual_seed(i)
        optimizer.step(closure_of(model, optimizer, i))
    return [p.detach().clone() for p in model.parameters()]


def equal(a, b):
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


# the ways of stepping


@pytest.mark.parametrize("base", BASES)
def test_rho_0_is_the_base_bit_for_bit(base):
    plain, wrapped, two_phase = network(), network(), network()
    optimizer = BASES[base](plain.parameters())
    for i in range(8):
        torch.manual_seed(i)
        optimizer.zero_grad()
        x, y = data(i)
        LOSS(plain(x), y).backward()
        optimizer.step()
    truth = [p.detach() for p in plain.parameters()]
    assert equal(train(wrapped, SAM(wrapped.parameters(), BASES[base], rho=0), range(8)), truth)
    assert equal(wrapped.buffers(), plain.buffers())
    sam = ASAM(two_phase.parameters(), BASES[base], rho=0, module=two_phase, replay_rng=True)
    for i in range(8):
        torch.manual_seed(i)
        x, y = data(i)
        sam.zero_grad()
        LOSS(two_phase(x), y).backward()
        with sam.perturbed():
            LOSS(two_phase(x), y).backward()
        sam.step()
    assert equal(two_phase.parameters(), truth)


@pytest.mark.parametrize("kwargs", [{}, {"adaptive": True}, {"adaptive": "filter"}, {"norm": math.inf}], ids=str)
def test_one_step_on_a_quadratic_is_its_closed_form(kwargs):
    """L = w'Aw/2 with A diagonal: the gradient at w + e is A (w + e)."""
    a, start = torch.tensor([1.0, 4.0, 9.0], dtype=torch.float64), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    w = nn.Parameter(start.clone())
    optimizer = SAM([w], torch.optim.SGD, lr=0.1, rho=0.2, **kwargs)

    def closure():
        optimizer.zero_grad()
        loss = 0.5 * (a * w * w).sum()
        loss.backward()
        return loss

    g = a * start
    t = start.abs() + 0.01 if kwargs.get("adaptive") else torch.ones(3, dtype=torch.float64)
    e = 0.2 * t * g.sign() if "norm" in kwargs else 0.2 * t * t * g / (t * g).norm()
    loss = optimizer.step(closure)
    torch.testing.assert_close(w.detach(), start - 0.1 * a * (start + e), rtol=1e-14, atol=0)
    step = optimizer.last_step
    before, after = 0.5 * (a * start**2).sum(), 0.5 * (a * (start + e) ** 2).sum()
    torch.testing.assert_close(loss.detach(), before)
    torch.testing.assert_close(step.sharpness, after - before)
    torch.testing.assert_close(step.loss, before)
    dual = (t * g).abs().sum() if "norm" in kwargs else (t * g).norm()
    assert step.dual_norm.item() == pytest.approx(dual.item(), rel=1e-12)
    assert step.grad_norm.item() == pytest.approx(g.norm().item(), rel=1e-12)
    assert step.radius.item() == pytest.approx(0.2, rel=1e-12)
    assert step.perturbation_norm.item() == pytest.approx(e.norm().item(), rel=1e-12)


def by_closure(model, optimizer, i):
    optimizer.step(closure_of(model, optimizer, i))


def by_closure_zeroing_in_place(model, optimizer, i):
    optimizer.step(closure_of(model, optimizer, i, set_to_none=False))


def by_contexts(model, optimizer, i):
    x, y = data(i)
    optimizer.zero_grad()
    LOSS(model(x), y).backward()
    with optimizer.perturbed():
        LOSS(model(x), y).backward()
    optimizer.step()


def by_two_steps(model, optimizer, i):
    x, y = data(i)
    LOSS(model(x), y).backward()
    optimizer.first_step(zero_grad=True)
    LOSS(model(x), y).backward()
    optimizer.second_step(zero_grad=True)


def by_microbatch(model, optimizer, i):
    x, y = data(i)
    optimizer.zero_grad()
    with optimizer.microbatch():
        LOSS(model(x), y).backward()
        with optimizer.perturbed():
            LOSS(model(x), y).backward()
    optimizer.step()


def by_list(model, optimizer, i):
    optimizer.step([closure_of(model, optimizer, i)])


def by_ascent_closure(model, optimizer, i):
    optimizer.step(closure_of(model, optimizer, i), ascent_closure=closure_of(model, optimizer, i))


def by_first_step_then_step(model, optimizer, i):
    x, y = data(i)
    optimizer.zero_grad()
    LOSS(model(x), y).backward()
    optimizer.first_step(zero_grad=True)
    LOSS(model(x), y).backward()
    optimizer.step()


WAYS = [
    by_closure,
    by_closure_zeroing_in_place,
    by_contexts,
    by_two_steps,
    by_microbatch,
    by_list,
    by_ascent_closure,
    by_first_step_then_step,
]


@pytest.mark.parametrize("way", WAYS, ids=lambda f: f.__name__)
@pytest.mark.parametrize("cls", [SAM, ASAM])
def test_every_way_of_stepping_gives_the_same_bits(way, cls):
    reference, model = network(), network()
    sam = Perturbation(reference, rho=0.1, adaptive=cls is ASAM)
    plain = torch.optim.SGD(reference.parameters(), lr=0.1, momentum=0.9)
    optimizer = cls(model.parameters(), torch.optim.SGD, rho=0.1, lr=0.1, momentum=0.9, module=model)
    for i in range(5):
        torch.manual_seed(i)
        x, y = data(i)
        plain.zero_grad()
        LOSS(reference(x), y).backward()
        with sam.perturbed():
            LOSS(reference(x), y).backward()
        plain.step()
        torch.manual_seed(i)
        way(model, optimizer, i)
    assert equal(model.parameters(), reference.parameters())
    assert equal(model.buffers(), reference.buffers())


def test_step_returns_the_loss_at_w():
    model = network().eval()
    optimizer = SAM(model.parameters(), rho=0.5, lr=0.1)
    x, y = data(0)
    truth = LOSS(model(x), y)
    loss = optimizer.step(closure_of(model, optimizer, 0))
    assert torch.equal(loss, truth)
    assert optimizer.last_step.perturbed_loss > optimizer.last_step.loss


def test_m_sharpness_is_the_mean_over_microbatches_of_the_gradient_at_each_ones_own_point():
    model = nn.Linear(6, 3).double()
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.3, lr=0.1)
    start, expected, losses = [p.detach().clone() for p in model.parameters()], [], []
    for i in range(3):
        x, y = (t.double() if t.is_floating_point() else t for t in data(i))
        loss = LOSS(nn.functional.linear(x, model.weight, model.bias), y)
        g = torch.autograd.grad(loss, list(model.parameters()))
        e = Ball(0.3).ascent(g, start)
        moved = [(w + d).requires_grad_() for w, d in zip(start, e, strict=True)]
        expected.append(torch.autograd.grad(LOSS(nn.functional.linear(x, *moved), y), moved))
        losses.append(loss.detach())

    def closure(i):
        x, y = (t.double() if t.is_floating_point() else t for t in data(i))
        optimizer.zero_grad()
        loss = LOSS(model(x), y)
        loss.backward()
        return loss

    loss = optimizer.step([functools.partial(closure, i) for i in range(3)])
    for p, w, *gs in zip(model.parameters(), start, *expected, strict=True):
        torch.testing.assert_close(p.detach(), w - 0.1 * sum(gs) / 3, rtol=1e-12, atol=1e-14)
    torch.testing.assert_close(loss.detach(), sum(losses) / 3)


def test_the_ascent_may_have_a_loss_of_its_own():
    model = nn.Linear(6, 3)
    optimizer = SAM(model.parameters(), rho=0.3, lr=0.1)
    start = [p.detach().clone() for p in model.parameters()]
    x, y = data(0)
    g = torch.autograd.grad(LOSS(model(x[:4]), y[:4]), list(model.parameters()))
    moved = [(w + d).requires_grad_() for w, d in zip(start, Ball(0.3).ascent(g, start), strict=True)]
    g = torch.autograd.grad(LOSS(nn.functional.linear(x, *moved), y), moved)

    def quarter():
        optimizer.zero_grad()
        loss = LOSS(model(x[:4]), y[:4])
        loss.backward()
        return loss

    optimizer.step(closure_of(model, optimizer, 0), ascent_closure=quarter)
    for p, w, d in zip(model.parameters(), start, g, strict=True):
        torch.testing.assert_close(p.detach(), w - 0.1 * d)


def test_step_without_closure_is_legal_only_where_no_gradient_could_be_misused():
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.Adam, lr=0.0)
    optimizer.step()  # no gradients
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    optimizer.step()  # torch.distributed.checkpoint makes optimizer state in this way
    assert len(optimizer.state) == len(list(model.parameters()))
    x, y = data(0)
    LOSS(model(x), y).backward()
    with pytest.raises(RuntimeError, match=r"with optimizer.perturbed\(\)"):
        optimizer.step()
    with optimizer.perturbed():
        LOSS(model(x), y).backward()
    optimizer.step()
    with pytest.raises(RuntimeError, match="plain gradients"):
        optimizer.step()  # the gradients of the perturbed pass are used up
    with optimizer.perturbed():
        LOSS(model(x), y).backward()
    optimizer.zero_grad()
    LOSS(model(x), y).backward()
    with pytest.raises(RuntimeError, match="plain gradients"):
        optimizer.step()


# torch's contract


@pytest.mark.parametrize("base", BASES)
def test_resuming_is_not_stopping(base):
    model, other = network(), network()
    optimizer = SAM(model.parameters(), BASES[base], rho=0.1)
    train(model, optimizer, range(5))
    buffer = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, buffer)
    truth = train(model, optimizer, range(5, 10))
    buffer.seek(0)
    saved = torch.load(buffer, weights_only=True)
    other.load_state_dict(saved["model"])
    resumed = SAM(other.parameters(), BASES[base], rho=0.7)
    resumed.load_state_dict(saved["optimizer"])
    assert resumed.ball == Ball(0.1)
    assert equal(train(other, resumed, range(5, 10)), truth)


def test_distributed_checkpoints_state_of_a_fresh_optimizer_and_back():
    """torch.distributed.checkpoint makes state by step(closure=None) with zero gradients and a learning rate of 0."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict

    model, other = network(), network()
    optimizer = SAM(model.parameters(), torch.optim.AdamW, lr=0.01, rho=0.1)
    get_optimizer_state_dict(model, optimizer)
    train(model, optimizer, range(3))
    saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer))
    other.load_state_dict(model.state_dict())
    resumed = SAM(other.parameters(), torch.optim.AdamW, lr=0.5, rho=0.5)
    set_optimizer_state_dict(other, resumed, saved)
    assert equal(train(other, resumed, range(3, 6)), train(model, optimizer, range(3, 6)))


def test_a_compiled_model_is_compiled_once_and_sees_the_perturbed_weights():
    from torch._dynamo.testing import CompileCounter

    model, twin, counter = network().eval(), network().eval(), CompileCounter()
    compiled = torch.compile(model, backend=counter)
    optimizer, plain = (SAM(m.parameters(), BASES["momentum"], rho=0.1, module=m) for m in (model, twin))
    for i in range(4):
        optimizer.step(closure_of(compiled, optimizer, i))
        plain.step(closure_of(twin, plain, i))
        assert optimizer.last_step.sharpness > 0
    assert counter.frame_count == 1
    assert equal(model.parameters(), twin.parameters())


def test_checkpoints_move_between_sam_and_its_base():
    model = network()
    plain = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    sam = ASAM(model.parameters(), torch.optim.SGD, lr=0.2, momentum=0.8, rho=0.3)
    train(model, plain, range(3))
    sam.load_state_dict(plain.state_dict())
    assert sam.param_groups[0]["lr"] == 0.1
    assert sam.ball == Ball(0.3, adaptive=True)
    assert equal(
        [s["momentum_buffer"] for s in sam.state.values()], [s["momentum_buffer"] for s in plain.state.values()]
    )
    train(model, sam, range(3))
    plain.load_state_dict(sam.state_dict())
    assert equal(
        [s["momentum_buffer"] for s in sam.state.values()], [s["momentum_buffer"] for s in plain.state.values()]
    )
    train(model, plain, range(3))
    assert sam.state_dict()["state"].keys() == plain.state_dict()["state"].keys()


def test_groups_and_state_are_the_bases_own_also_after_loading_and_copying():
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.Adam, lr=0.01)
    train(model, optimizer, range(2))
    copies = [optimizer, copy.deepcopy(optimizer), pickle.loads(pickle.dumps(optimizer))]
    optimizer.load_state_dict(optimizer.state_dict())  # as Accelerate's prepare does
    for o in copies:
        assert o.param_groups is o.base_optimizer.param_groups is o.perturbation.param_groups
        assert o.state is o.base_optimizer.state
        assert o.defaults is o.base_optimizer.defaults
    optimizer.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in model.parameters()]
    assert equal(train(model, optimizer, range(2)), before)


def test_copies_train_as_the_original():
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, module=model)
    train(model, optimizer, range(2))
    pairs = [copy.deepcopy((model, optimizer)), pickle.loads(pickle.dumps((model, optimizer)))]
    truth = train(model, optimizer, range(2, 5))
    for other, twin in pairs:
        assert equal(train(other, twin, range(2, 5)), truth)
        assert twin.perturbation.module is other


def test_add_param_group_schedulers_and_hooks():
    model, late = network(), nn.Parameter(torch.ones(2))
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.1)
    optimizer.add_param_group({"params": [late], "rho": 0.5, "lr": 1.0})
    assert optimizer.balls == [Ball(0.1), Ball(0.5)]
    assert optimizer.param_groups[1]["momentum"] == 0.9
    with pytest.raises(ValueError, match="-3"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "rho": -3})
    assert len(optimizer.param_groups) == 2
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    seen = []
    optimizer.register_step_pre_hook(lambda o, *_: seen.append(("pre", o is optimizer)))
    optimizer.register_step_post_hook(lambda o, *_: seen.append(("post", o is optimizer)))
    for way in (by_closure, by_contexts, by_two_steps):  # warnings are errors: no "lr_scheduler.step() before"
        way(model, optimizer, 0)
        scheduler.step()
    assert seen == [("pre", True), ("post", True)] * 3
    assert [g["lr"] for g in optimizer.base_optimizer.param_groups] == [0.1 / 8, 1.0 / 8]


def test_global_hooks_see_one_step():
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    model, seen = network(), []
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1)
    handle = register_optimizer_step_pre_hook(lambda *_: seen.append(1))
    try:
        by_closure(model, optimizer, 0)
    finally:
        handle.remove()
    assert seen == [1]


def test_wrap_takes_an_optimizer_that_exists():
    model, twin = network(), network()
    base = torch.optim.AdamW(model.parameters(), lr=0.01)
    scheduler = torch.optim.lr_scheduler.StepLR(base, 1, gamma=0.1)
    optimizer = ASAM.wrap(base, rho=0.3, module=model)
    assert optimizer.base_optimizer is base
    assert optimizer.ball == Ball(0.3, adaptive=True)
    by_closure(model, optimizer, 0)
    scheduler.step()
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.001)
    direct = ASAM(twin.parameters(), torch.optim.AdamW, lr=0.01, rho=0.3)
    torch.manual_seed(0)
    by_closure(twin, direct, 0)
    with pytest.raises(TypeError, match="rhoo"):
        SAM.wrap(base, rhoo=1)
    with pytest.raises(TypeError, match="optimizer instance"):
        SAM.wrap(torch.optim.SGD)


@pytest.mark.parametrize("flags", [{"foreach": True}, {"foreach": False}, {"fused": True}], ids=str)
def test_foreach_and_fused_reach_the_base_and_agree(flags):
    model, twin = network(), network()
    optimizer = SAM(model.parameters(), BASES["momentum"], rho=0.1, **flags)
    assert all(optimizer.param_groups[0][k] == v for k, v in flags.items())
    plain = SAM(twin.parameters(), BASES["momentum"], rho=0.1)
    for a, b in zip(train(model, optimizer, range(3)), train(twin, plain, range(3)), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-5)
    with pytest.raises(RuntimeError, match="cannot be `True` together"):
        SAM(model.parameters(), torch.optim.AdamW, lr=0.01, foreach=True, fused=True)


def test_named_parameters_and_groups():
    model = network()
    optimizer = SAM(model.named_parameters(), torch.optim.SGD, lr=0.1)
    assert optimizer.param_groups[0]["param_names"] == [n for n, _ in model.named_parameters()]
    by_closure(model, optimizer, 0)
    groups = asam_param_groups(model)
    assert [g["adaptive"] for g in groups] == [True, False]
    assert [p.ndim for p in groups[0]["params"]] == [2, 2]
    assert sum(len(g["params"]) for g in groups) == len(list(model.parameters()))
    by_closure(model, ASAM(groups, torch.optim.SGD, lr=0.1), 0)


def test_asam_groups_go_by_type_and_dimension_not_by_name():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(3))  # a vector that is called weight
            self.token = nn.Parameter(torch.ones(1, 1, 3))
            self.norm = nn.LayerNorm((4, 3))  # a normalization with a matrix
            self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)

    model = Odd()
    adaptive, plain = asam_param_groups(model)
    assert [p is q for p, q in zip(adaptive["params"], [model.token], strict=True)] == [True]
    assert {id(p) for p in plain["params"]} == {id(model.weight), id(model.norm.weight), id(model.norm.bias)}


def test_the_product_ball_holds_the_step():
    model = network()
    optimizer = ASAM(asam_param_groups(model), torch.optim.SGD, lr=0.1, rho=0.4)
    x, y = data(0)
    LOSS(model(x), y).backward()
    params = list(model.parameters())
    start = [p.detach().clone() for p in params]
    ball = optimizer.neighborhood
    scales = ball.scales(params)
    with optimizer.perturbed():
        u = [(p.detach() - w) / (0.4 * t) for p, w, t in zip(params, start, scales, strict=True)]
        assert torch.cat([x.flatten() for x in u]).norm().item() == pytest.approx(1, rel=1e-4)


def test_asam_is_sam_with_adaptive():
    a, b = network(), network()
    one = ASAM(a.parameters(), torch.optim.SGD, lr=0.1, rho=0.5)
    two = SAM(b.parameters(), torch.optim.SGD, lr=0.1, rho=0.5, adaptive=True)
    assert equal(train(a, one, range(3)), train(b, two, range(3)))
    assert inspect.signature(ASAM).parameters["rho"].default == 0.5


# what is refused, and what is left intact


def test_what_cannot_work_is_refused_with_the_remedy():
    model = network()
    params = list(model.parameters())
    cases = [
        (ValueError, "LBFGS needs a closure", lambda: SAM(params, torch.optim.LBFGS)),
        (ValueError, "Adadelta has a hyperparameter 'rho'", lambda: SAM(params, torch.optim.Adadelta)),
        (TypeError, r"SAM.wrap\(", lambda: SAM(params, torch.optim.SGD(params, lr=0.1))),
        (ValueError, "other parameters", lambda: SAM(params, lambda p: torch.optim.SGD(params[:1], lr=0.1))),
        (
            ValueError,
            "rho is a radius in weight space and must be finite and >= 0, got -0.5",
            lambda: SAM(params, rho=-0.5),
        ),
        (ValueError, "adaptive must be .* got 'rows'", lambda: SAM(params, adaptive="rows")),
        (ValueError, "norm must be 2 or inf .* got 1", lambda: SAM(params, norm=1)),
        (ValueError, "differentiable", lambda: SAM(params, torch.optim.SGD, lr=0.1, differentiable=True)),
        (ValueError, "empty parameter list", lambda: SAM([], torch.optim.SGD, lr=0.1)),
        (ValueError, "Rprop has no fused implementation", lambda: SAM(params, torch.optim.Rprop, fused=True)),
        (ValueError, "SAM already", lambda: SAM.wrap(SAM(params, lr=0.1))),
        (TypeError, "callable", lambda: SAM(params, "sgd")),
    ]
    for error, message, call in cases:
        with pytest.raises(error, match=message):
            call()


def test_a_closure_that_forgot_backward():
    model = network()
    optimizer = SAM(model.parameters(), lr=0.1)
    x, y = data(0)
    with pytest.raises(RuntimeError, match=r"call loss.backward\(\)"):
        optimizer.step(lambda: LOSS(model(x), y))
    optimizer.step(lambda: torch.tensor([1.0]))  # nothing to learn from: a step of torch.optim without gradients


@pytest.mark.parametrize("passes", [1, 2])
def test_gradients_left_in_place_by_the_closure_are_an_error(passes):
    """Lightning's accumulate_grad_batches: zero_grad only on the first micro-batch, the closure only for the last."""
    model = network()
    optimizer = SAM(model.parameters(), lr=0.1)
    x, y = data(0)
    LOSS(model(x), y).backward()

    def closure():
        for _ in range(passes):
            LOSS(model(x), y).backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1e-3)
        return LOSS(model(x), y)

    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="loop over the micro-batches inside"):
        optimizer.step(closure)
    assert equal(model.parameters(), before)
    optimizer.zero_grad(set_to_none=False)
    optimizer.step(closure)  # zeroed before the step instead: the gradients are the closure's own


def test_grad_scaler_with_a_closure_is_refused():
    model = network()
    optimizer = SAM(model.parameters(), lr=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = data(0)
    scaler.scale(LOSS(model(x), y)).backward()
    before = [p.detach().clone() for p in model.parameters()]
    with pytest.raises(RuntimeError, match="still scaled"):
        scaler.step(optimizer, closure_of(model, optimizer, 0))
    assert equal(model.parameters(), before)


@pytest.mark.parametrize("two_phase", ["contexts", "first_step"])
@pytest.mark.parametrize("overflow", [None, 1, 2])
def test_grad_scaler_in_two_phases(two_phase, overflow):
    model, twin = network().eval(), network().eval()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, rho=0.1)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = data(0)
    before = [p.detach().clone() for p in model.parameters()]

    def backward(number):
        scaler.scale(LOSS(model(x), y)).backward()
        if overflow == number:
            model[0].weight.grad[0, 0] = math.inf

    backward(1)
    if two_phase == "contexts":
        with optimizer.perturbed():
            backward(2)
    else:
        optimizer.first_step(zero_grad=True)
        backward(2)
    scaler.step(optimizer)
    scaler.update()
    if overflow is not None:  # one rule for both passes: w + e, and with it the gradient there, is not finite either
        assert equal(model.parameters(), before)
        assert scaler.get_scale() == 512
        return
    assert scaler.get_scale() == 1024
    reference = SAM(twin.parameters(), torch.optim.SGD, lr=0.1, rho=0.1)
    by_contexts(twin, reference, 0)
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("when", ["first", "second", "base"])
def test_a_fault_anywhere_in_a_step_is_all_or_nothing(when):
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, module=model)
    train(model, optimizer, range(2))
    state = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    calls = []
    inner = closure_of(model, optimizer, 5)

    def closure():
        calls.append(1)
        loss = inner()
        if len(calls) == {"first": 1, "second": 2, "base": 9}[when]:
            raise KeyboardInterrupt
        return loss

    if when == "base":
        optimizer.param_groups[0]["lr"] = "fast"  # the base's own error
    with pytest.raises((KeyboardInterrupt, TypeError, RuntimeError, ValueError)):
        optimizer.step(closure)
    if when == "base":
        optimizer.param_groups[0]["lr"] = 0.1
    assert all(torch.equal(v, state[0][k]) for k, v in model.state_dict().items())
    if when != "base":
        result = optimizer.state_dict()
        assert result["param_groups"] == state[1]["param_groups"]
        assert all(
            torch.equal(v["momentum_buffer"], state[1]["state"][k]["momentum_buffer"])
            for k, v in result["state"].items()
        )
    optimizer.step(inner)


def test_a_loss_of_exactly_zero_does_not_skip_the_step():
    w = nn.Parameter(torch.tensor([1.0]))
    optimizer = SAM([w], torch.optim.SGD, lr=0.5, rho=0.0)

    def closure():
        optimizer.zero_grad()
        loss = (w - 1.0).sum()
        loss.backward()
        return loss

    assert optimizer.step(closure) == 0
    assert w.item() == 0.5


@pytest.mark.parametrize("norm", [2, math.inf])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_in_the_first_pass_leaves_the_step_out(bad, norm):
    w = nn.Parameter(torch.ones(4))
    optimizer = SAM([w], torch.optim.SGD, lr=0.1, rho=0.1, norm=norm)
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = w.square().sum()
        loss.backward()
        calls.append(1)
        if len(calls) == 1:
            w.grad[1] = bad
        return loss

    with pytest.warns(UserWarning, match="skipped"):
        optimizer.step(closure)
    assert torch.equal(w.detach(), torch.ones(4))
    assert optimizer.num_skipped == 1
    optimizer.step(closure)
    assert not torch.equal(w.detach(), torch.ones(4))


def test_schedule_free_and_other_attributes_of_the_base_are_reached():
    class Base(torch.optim.SGD):
        mode = None

        def train(self):
            self.mode = "train"

    optimizer = SAM([nn.Parameter(torch.ones(1))], Base, lr=0.1)
    optimizer.train()
    assert optimizer.base_optimizer.mode == "train"
    with pytest.raises(AttributeError, match="nothing_of_this_name"):
        optimizer.nothing_of_this_name  # noqa: B018
    assert "SAM over Base" in repr(optimizer)


@pytest.mark.parametrize("passed", ["positionally", "by keyword"])
@pytest.mark.parametrize("fused", [False, True])
def test_a_closure_through_grad_scaler_is_refused_also_over_a_fused_base(passed, fused):
    """A fused base tells GradScaler that it unscales by itself; the scaler then hands over whatever it was given."""
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.AdamW, lr=0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = data(0)
    scaler.scale(LOSS(model(x), y)).backward()
    before = [p.detach().clone() for p in model.parameters()]
    closure = closure_of(model, optimizer, 0)
    with pytest.raises(RuntimeError, match=r"without a closure|Closure use is not currently supported"):
        scaler.step(optimizer, closure) if passed == "positionally" else scaler.step(optimizer, closure=closure)
    assert all(torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.filterwarnings("ignore:a gradient at w")
def test_a_descent_gradient_that_is_not_finite_skips_the_step(fused):
    model, control = network(), network()
    optimizers = [SAM(m.parameters(), torch.optim.AdamW, lr=0.1, fused=fused) for m in (model, control)]
    for i in range(4):
        for m, optimizer in zip((model, control), optimizers, strict=True):
            if i == 2 and m is control:
                continue  # it skips what the other one has to
            torch.manual_seed(i)
            x, y = data(i)
            LOSS(m(x), y).backward()
            with optimizer.perturbed():
                LOSS(m(x), y).backward()
                if i == 2:
                    m[4].bias.grad[1] = math.inf
            optimizer.step()
            optimizer.zero_grad()
    for a, b in zip(model.parameters(), control.parameters(), strict=True):
        assert torch.equal(a, b)
    assert [int(o.num_skipped) for o in optimizers] == [1, 0]


@pytest.mark.filterwarnings("ignore:a gradient at w")
def test_what_a_gradient_that_is_not_finite_does_can_be_chosen():
    w = nn.Parameter(torch.ones(3))

    def step(**options):
        optimizer = SAM([w], lr=0.1, **options)
        w.grad = torch.ones(3)
        with optimizer.perturbed():
            w.grad = torch.tensor([1.0, math.nan, 1.0])
        optimizer.step()
        return optimizer

    with pytest.raises(FloatingPointError, match="nonfinite='raise'"):
        step(nonfinite="raise")
    assert torch.equal(w, torch.ones(3))
    assert step(nonfinite="skip").num_skipped == 1
    assert torch.equal(w, torch.ones(3))
    assert step(nonfinite="ignore").num_skipped == 0
    assert w.isnan().tolist() == [False, True, False]
    with pytest.raises(ValueError, match="nonfinite must be"):
        SAM([w], lr=0.1, nonfinite="plain")


def test_large_gradients_are_not_taken_for_infinite_ones():
    w = nn.Parameter(torch.ones(3))
    optimizer = SAM([w], lr=1e-30, rho=0.1)
    w.grad = torch.ones(3)
    with optimizer.perturbed():
        w.grad = torch.full((3,), 1e30)  # their squares are not float32 numbers
    optimizer.step()
    assert optimizer.num_skipped == 0
    assert w.abs().max() < 1e-6
