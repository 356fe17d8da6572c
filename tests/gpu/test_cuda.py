"""What only a device can show: Triton's kernels compiled, CUDA graphs, GradScaler, and that nothing waits."""

import copy
import math

import pytest
import torch
from test_kernels import close_to, expected, make
from torch import nn

from sam_optim import ASAM, SAM, GraphedStep, Perturbation

SHAPES = [(3, 5), (), (1,), (0,), (4, 3, 3, 3), (2049,), (300, 2731), (8192,), (1_000_003,)]
ADAPTIVE = [False, True, "filter", "layer"]
KINDS = [(torch.float32, adaptive, norm) for adaptive in ADAPTIVE for norm in (2, math.inf)]
KINDS += [(d, adaptive, 2) for d in (torch.float64, torch.bfloat16, torch.float16) for adaptive in (False, True)]
pytestmark = pytest.mark.filterwarnings("ignore:only .* of the perturbation survives")


def on_device(shapes, dtype=torch.float32):
    made = make(shapes, dtype)
    params = [nn.Parameter(p.detach().cuda()) for p in made]
    for p, q in zip(params, made, strict=True):
        p.grad = q.grad.cuda()
    return params


def moved(sam, params, grads=None):
    """Weights at w + e; they must come back."""
    for p, g in zip(params, grads or [p.grad for p in params], strict=True):
        p.grad = g
    before = [p.detach().clone() for p in params]
    with sam.perturbed():
        found = [p.detach().clone() for p in params]
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))
    return found


@pytest.mark.parametrize(("dtype", "adaptive", "norm"), KINDS, ids=str)
@pytest.mark.parametrize("flags", [{"fused": True}, {"foreach": True}], ids=str)
def test_ascent_is_the_formula_of_the_paper(flags, adaptive, norm, dtype):
    params = on_device(SHAPES, dtype)
    truth = expected(params, 0.1, adaptive, norm=norm)
    sam = Perturbation(params, rho=0.1, adaptive=adaptive, norm=norm, **flags)
    grads = [p.grad for p in params]
    found = moved(sam, params, grads)
    for a, w in zip(found, truth, strict=True):
        close_to([a.cpu()], [w.cpu()], dtype)
    again = moved(sam, params, grads)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


def test_unaligned_gradients_and_shared_layouts():
    params = on_device([(8, 6, 3, 3), (20, 40, 5, 5), (5001,)])
    for p in params[:2]:
        p.data, p.grad = (x.to(memory_format=torch.channels_last) for x in (p.data, p.grad))
    flat = torch.zeros(5002, device="cuda")
    flat[1:] = params[2].grad
    params[2].grad = flat[1:]
    truth = expected(params, 0.1, True)
    for a, w in zip(moved(Perturbation(params, rho=0.1, adaptive=True, fused=True), params), truth, strict=True):
        close_to([a.cpu()], [w.cpu()], torch.float32)


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("flags", [{"fused": True}, {"foreach": True}], ids=str)
def test_a_gradient_that_leads_nowhere_moves_nothing_and_is_counted(flags, bad):
    params = on_device(SHAPES)
    before = [p.detach().clone() for p in params]
    for p in params:
        p.grad.fill_(0.0)
    params[-1].grad[7] = bad
    sam = Perturbation(params, rho=0.1, **flags)
    with sam.perturbed():
        assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))
    assert int(sam.num_unperturbed) == 1


def test_the_steady_state_waits_for_nothing_and_allocates_nothing():
    params = on_device(SHAPES)
    grads = [p.grad for p in params]
    sam = Perturbation(params, rho=0.1, fused=True)

    def once():
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        sam.enter(keep_gradients=False)
        sam.exit()

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
    return nn.Sequential(nn.Linear(20, 64), nn.BatchNorm1d(64), nn.ReLU(), nn.Linear(64, 5)).cuda()


def batches(num):
    generator = torch.Generator().manual_seed(1)
    for _ in range(num):
        yield torch.randn(32, 20, generator=generator).cuda(), torch.randint(5, (32,), generator=generator).cuda()


BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "capturable": True}),
}


@pytest.mark.parametrize("base", BASES)
@pytest.mark.parametrize("kind", [SAM, ASAM])
@pytest.mark.parametrize("flags", [{"fused": True}, {}], ids=str)
def test_a_replayed_step_is_the_eager_one(flags, kind, base):
    factory, options = BASES[base]
    model, criterion = network(), nn.functional.cross_entropy
    other = copy.deepcopy(model)
    eager = kind(model.parameters(), factory, module=model, **options, **flags)
    graphed = kind(other.parameters(), factory, module=other, **options, **flags)
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
    assert int(graphed.num_unperturbed) == 0


@pytest.mark.parametrize("fused", [True, None])
def test_grad_scaler(fused):
    """With a scale that overflows at first, against float32."""
    losses = []
    for is_scaled in (True, False):
        model = network()
        optimizer = SAM(model.parameters(), torch.optim.AdamW, lr=0.01, module=model, fused=fused)
        scaler = torch.amp.GradScaler("cuda", init_scale=2.0**10, enabled=is_scaled)
        found = []
        for x, y in batches(10):
            with torch.autocast("cuda", torch.float16, enabled=is_scaled):
                loss = nn.functional.cross_entropy(model(x), y)
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            with optimizer.perturbed(), torch.autocast("cuda", torch.float16, enabled=is_scaled):
                scaler.scale(nn.functional.cross_entropy(model(x), y)).backward()
            scaler.step(optimizer)
            scaler.update()
            found.append(float(loss))
        losses.append(found)
    assert losses[0] == pytest.approx(losses[1], rel=0.05, abs=0.02)


def test_a_whole_step_waits_for_nothing():
    model = network()
    optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, fused=True)
    data = list(batches(4))

    for i, (x, y) in enumerate(data):

        def closure(x=x, y=y):
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(model(x), y)
            loss.backward()
            return loss.detach()

        torch.cuda.set_sync_debug_mode("error" if i == 3 else "default")
        try:
            optimizer.step(closure)
        finally:
            torch.cuda.set_sync_debug_mode("default")
