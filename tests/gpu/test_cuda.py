"""What only a device can show: Triton's kernels compiled, CUDA graphs, GradScaler, and that nothing waits."""

import copy
import math

import pytest
import torch
from test_kernels import assert_close_to, expected, make
from torch import nn

from sam_optim import ASAM, SAM, GraphedStep, Perturbation

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # the CPU: in Triton's interpreter
SHAPES = [(3, 5), (), (1,), (0,), (4, 3, 3, 3), (2049,)]
SHAPES += [(300, 2731), (8192,), (1_000_003,)] if DEVICE == "cuda" else []
ADAPTIVE = [False, True, "filter", "layer"]
KINDS = [(torch.float32, adaptive, norm) for adaptive in ADAPTIVE for norm in (2, math.inf)]
KINDS += [(d, adaptive, 2) for d in (torch.float64, torch.bfloat16, torch.float16) for adaptive in (False, True)]
pytestmark = [
    pytest.mark.filterwarnings("ignore:only .* of the perturbation survives"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) .*:RuntimeWarning"),  # numpy's, of inf
]


def on_device(shapes, dtype=torch.float32):
    on_host = make(shapes, dtype)
    params = [nn.Parameter(p.detach().to(DEVICE)) for p in on_host]
    for p, q in zip(params, on_host, strict=True):
        p.grad = q.grad.to(DEVICE)
    return params


def moved(sam, params, grads=None):
    """Weights at w + e; they must come back."""
    for p, g in zip(params, grads or [p.grad for p in params], strict=True):
        p.grad = g
    before = [p.detach().clone() for p in params]
    sam.enter()
    perturbed = [p.detach().clone() for p in params]
    sam.exit(failed=True)  # no backward runs here
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))
    return perturbed


@pytest.mark.parametrize(("dtype", "adaptive", "norm"), KINDS, ids=str)
@pytest.mark.parametrize("flags", [{"fused": True}, {"foreach": True}], ids=str)
def test_ascent_is_the_formula_of_the_paper(flags, adaptive, norm, dtype):
    params = on_device(SHAPES, dtype)
    truth = expected(params, 0.1, adaptive, norm=norm)
    sam = Perturbation(params, rho=0.1, adaptive=adaptive, norm=norm, **flags)
    grads = [p.grad for p in params]
    weights = moved(sam, params, grads)
    for a, w in zip(weights, truth, strict=True):
        assert_close_to([a.cpu()], [w.cpu()], dtype)
    again = moved(sam, params, grads)
    assert all(torch.equal(a, b) for a, b in zip(weights, again, strict=True))


def test_unaligned_gradients_and_shared_layouts():
    params = on_device([(8, 6, 3, 3), (20, 40, 5, 5), (5001,)])
    for p in params[:2]:
        p.data, p.grad = (x.to(memory_format=torch.channels_last) for x in (p.data, p.grad))
    flat = torch.zeros(5002, device=DEVICE)
    flat[1:] = params[2].grad
    params[2].grad = flat[1:]
    truth = expected(params, 0.1, True)
    for a, w in zip(moved(Perturbation(params, rho=0.1, adaptive=True, fused=True), params), truth, strict=True):
        assert_close_to([a.cpu()], [w.cpu()], torch.float32)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("flags", [{"fused": True}, {"foreach": True}], ids=str)
def test_a_gradient_of_0_moves_nothing_and_one_that_is_not_finite_makes_nan(flags, bad):
    params = on_device(SHAPES)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad.fill_(0.0)
    params[-1].grad[7] = bad
    weights = moved(Perturbation(params, rho=0.1, **flags), params)
    if bad == 0:
        assert all(torch.equal(p, w) for p, w in zip(weights, before, strict=True))
    else:
        assert all(bool(w.isnan().all()) for w in weights)


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e-18, 1e18, 1e25, 3e36])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_finite_gradient_moves_by_rho_whatever_its_size(adaptive, size):
    """Also where its squares, or rho / ||T g||, are beyond float32: a device must not flush small numbers to 0."""
    params = on_device(SHAPES)
    for p in params:
        p.grad.mul_(size)
    truth = expected(params, 0.1, adaptive)
    sam = Perturbation(params, rho=0.1, adaptive=adaptive, fused=True)
    for a, w in zip(moved(sam, params), truth, strict=True):
        assert_close_to([a.cpu()], [w.cpu()], torch.float32)
    assert float(sam.last_step.radius) == pytest.approx(0.1, rel=1e-5)


@pytest.mark.cuda
def test_the_steady_state_waits_for_nothing_and_allocates_nothing():
    params = on_device(SHAPES)
    grads = [p.grad for p in params]
    sam = Perturbation(params, rho=0.1, fused=True)

    def once():
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        sam.enter()
        sam.exit(failed=True)  # no backward runs here

    for _ in range(3):
        once()
    torch.cuda.synchronize()
    before = torch.cuda.memory_stats()["allocation.all.allocated"]
    torch.cuda.set_sync_debug_mode("error")
    try:
        once()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert torch.cuda.memory_stats()["allocation.all.allocated"] == before


def network():
    torch.manual_seed(0)
    # no bias before the normalization: its gradient is rounding alone, which Adam makes steps of full length of
    return nn.Sequential(nn.Linear(20, 64, bias=False), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 5)).to(DEVICE)


def batches(num):
    generator = torch.Generator().manual_seed(1)
    for _ in range(num):
        x, y = torch.randn(32, 20, generator=generator), torch.randint(5, (32,), generator=generator)
        yield x.to(DEVICE), y.to(DEVICE)


BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "capturable": True}),
    "amsgrad": (torch.optim.Adam, {"lr": 0.01, "capturable": True, "amsgrad": True, "weight_decay": 0.1}),
}


@pytest.mark.cuda
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", [SAM, ASAM])
@pytest.mark.parametrize("flags", [{"fused": True}, {}], ids=str)
def test_a_replayed_step_is_the_eager_one(flags, kind, base):
    factory, options = BASES[base]
    model, criterion = network(), nn.functional.cross_entropy
    other = copy.deepcopy(model)
    options = options | {"fused": bool(flags) or factory is torch.optim.SGD}  # whose lr a graph reads on the device
    eager, graphed = (kind.wrap(factory(m.parameters(), **options), module=m, **flags) for m in (model, other))
    step = GraphedStep(graphed, lambda x, y: criterion(other(x), y))
    for i, (x, y) in enumerate(batches(20)):

        def closure(x=x, y=y):
            eager.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            return loss

        expected_loss, loss = eager.step(closure), step(x, y)
        torch.testing.assert_close(loss, expected_loss.detach(), rtol=1e-3, atol=1e-4, msg=f"step {i}")
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)
    assert int(graphed.num_skipped) == 0


@pytest.mark.cuda
@pytest.mark.parametrize("fused", [True, None])
def test_grad_scaler(fused):
    """With a scale that overflows at first, against float32."""
    losses = []
    for is_scaled in (True, False):
        model = network()
        optimizer = SAM(model.parameters(), torch.optim.AdamW, lr=0.01, module=model, fused=fused)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, enabled=is_scaled)
        curve = []
        for x, y in batches(10):
            with torch.autocast("cuda", torch.float16, enabled=is_scaled):
                loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            with optimizer.perturbed(), torch.autocast("cuda", torch.float16, enabled=is_scaled):
                scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
            curve.append(float(loss))
        losses.append(curve)
    assert losses[0] == pytest.approx(losses[1], rel=0.05, abs=0.02)


def closure_of(model, optimizer, x, y):
    def closure():
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    return closure


@pytest.mark.parametrize("base", BASES)
@pytest.mark.filterwarnings("ignore:a gradient at w or w . e has an inf or NaN")  # on the CPU
def test_a_descent_gradient_that_is_not_finite_leaves_weights_and_state(base):
    factory, options = BASES[base]
    params = on_device(SHAPES)
    optimizer = SAM.wrap(factory(params, fused=True, **options), rho=0.05, fused=True)
    for i in range(5):
        for bad in (None, math.nan if i == 3 else None):
            for p, q in zip(params, make(SHAPES, seed=i), strict=True):
                p.grad = q.grad.to(DEVICE)
            if bad is not None:
                params[-1].grad.view(-1)[-1] = bad
            if not optimizer.perturbation.active:
                before = [p.detach().clone() for p in params]
                state = [v.clone() for p in params for v in optimizer.state[p].values()]
                optimizer.first_step()
        optimizer.second_step()
        assert int(optimizer.num_skipped) == (i >= 3)
        assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True)) == (i == 3)
        if i == 3:
            after = [v for p in params for v in optimizer.state[p].values()]
            assert all(torch.equal(a, b) for a, b in zip(after, state, strict=True))


@pytest.mark.cuda
@pytest.mark.parametrize("fused", [True, None])
def test_grad_scaler_in_two_steps(fused):
    """As davda54/sam has it: `first_step`, backward, `scaler.step(optimizer)`, against the same without a scale."""
    results = []
    for is_scaled in (True, False):
        model = network()
        base = torch.optim.AdamW(model.parameters(), lr=0.01, fused=True)
        optimizer = SAM.wrap(base, module=model, fused=fused)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, enabled=is_scaled)
        for x, y in batches(6):
            optimizer.zero_grad()
            scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
            optimizer.first_step(zero_grad=True)
            scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
        results.append([p.detach().clone() for p in model.parameters()])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-3, atol=1e-4)


@pytest.mark.cuda
@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("flags", [{"fused": True}, {}], ids=str)
def test_a_whole_step_waits_for_nothing(base, flags):
    factory, options = BASES[base]
    model = network()
    optimizer = SAM.wrap(factory(model.parameters(), fused=True, **options), module=model, **flags)
    for i, (x, y) in enumerate(batches(5)):
        closure = closure_of(model, optimizer, x, y)
        before = [p.detach().clone() for p in model.parameters()]
        torch.cuda.set_sync_debug_mode("error" if i == 4 else "default")
        try:
            optimizer.step(closure)
        finally:
            torch.cuda.set_sync_debug_mode("default")
    assert any(not torch.equal(p, w) for p, w in zip(model.parameters(), before, strict=True))  # it was a step


@pytest.mark.cuda
@pytest.mark.parametrize("base", BASES)
def test_a_graph_is_captured_again(base):
    """When a hyperparameter changes that is a number in the graph, and when a state was loaded."""
    factory, options = BASES[base]
    model = network()
    optimizer = SAM.wrap(factory(model.parameters(), fused=True, **options), module=model, fused=True)
    step = GraphedStep(optimizer, lambda x, y: nn.functional.cross_entropy(model(x), y), warmup=1)
    for i, (x, y) in enumerate(batches(12)):
        if i in (6, 9):
            optimizer.param_groups[0]["weight_decay"] = 0.01 * i
        if i == 9:
            optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
        loss = step(x, y)
    assert math.isfinite(float(loss))
    assert int(optimizer.num_skipped) == 0
