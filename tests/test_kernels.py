"""The ascent of every body against the paper's formula on one flat float64 vector, and its restore against the bits."""

import math

import pytest
import torch

from sam_optim import SAM, Perturbation
from sam_optim.core.random import Stream
from sam_optim.optim import kernels
from sam_optim.optim.kernels import bucket, foreach, loop

SHAPES = [
    [(1,)],
    [(7,), (3, 5), ()],
    [(1025,), (0,), (4, 3, 3, 3)],
    [(70000,), (300, 300), (2, 8191), (5,)],
    [(600, 1000), (9,), *[(4000,)] * 40],
]
ADAPTIVE = [False, True, "filter", "layer"]
FOREACH = {"loop": None, "foreach": True}


def make(shapes, dtype=torch.float32, grad_dtype=None, seed=0):
    """Parameters with gradients; the second and later tensors are 10 and 100 times larger, so that scale matters."""
    generator = torch.Generator().manual_seed(seed)
    params = []
    for i, shape in enumerate(shapes):
        w = torch.randn(shape, generator=generator, dtype=torch.float64) * 10.0 ** (i % 3 - 2)
        p = torch.nn.Parameter(w.to(dtype))
        if grad_dtype is not None and hasattr(p, "grad_dtype"):
            p.grad_dtype = None  # newer versions of torch ask for this before a gradient of another dtype is assigned
        p.grad = torch.randn(shape, generator=generator, dtype=torch.float64).to(grad_dtype or dtype)
        params.append(p)
    return params


def t_of(w, adaptive, eta):
    """T in float64, written out again: |w| + eta; the norm of a filter + eta, elementwise below two dimensions."""
    if not adaptive:
        return torch.ones_like(w)
    if adaptive == "layer":
        return torch.full_like(w, w.norm() + eta)
    if adaptive == "filter" and w.ndim >= 2:
        norms = w.reshape(w.shape[0], -1).norm(dim=1) + eta
        return norms.reshape(-1, *[1] * (w.ndim - 1)).expand_as(w)
    return w.abs() + eta


def expected(params, rho, adaptive=False, eta=0.01, norm=2):
    ws, gs = [p.detach().double() for p in params], [p.grad.double() for p in params]
    ts = [t_of(w, adaptive, eta) for w in ws]
    if norm == math.inf:
        return [w + rho * t * g.sign() for w, g, t in zip(ws, gs, ts, strict=True)]
    length = torch.cat([(t * g).flatten() for g, t in zip(gs, ts, strict=True)]).norm()
    return [w + rho * t * t * g / length for w, g, t in zip(ws, gs, ts, strict=True)]


def assert_close_to(params, truth, dtype):
    """Within 2 ulps of the weights, and 16 float32 ulps of the largest, for the rounding of the norm."""
    ulp, arithmetic = torch.finfo(dtype).eps, torch.finfo(torch.promote_types(dtype, torch.float32)).eps
    for p, w in zip(params, truth, strict=True):
        if w.numel():
            torch.testing.assert_close(p.double(), w, rtol=2 * ulp, atol=16 * arithmetic * float(w.abs().max()))


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("norm", [2, math.inf])
@pytest.mark.parametrize("adaptive", ADAPTIVE)
@pytest.mark.parametrize("body", FOREACH)
@pytest.mark.filterwarnings("ignore:only .* of the perturbation survives")
def test_ascent_is_the_formula_of_the_paper_and_restore_is_exact(monkeypatch, body, adaptive, norm, dtype, shapes):
    if body == "foreach":  # of bf16, too, which it moves on devices alone
        monkeypatch.setattr(kernels, "choose", lambda *_: foreach)
    params = make(shapes, dtype)
    aliases = [p.detach() for p in params]
    truth = expected(params, 0.1, adaptive, norm=norm)
    before = [(p.detach().clone(), p.data_ptr()) for p in params]
    sam = Perturbation(params, rho=0.1, adaptive=adaptive, norm=norm, foreach=FOREACH[body])
    with sam.perturbed():
        assert_close_to(params, truth, dtype)
        assert all(p.grad is None for p in params)
        assert all(torch.equal(a, p) for a, p in zip(aliases, params, strict=True))
    for p, (w, pointer) in zip(params, before, strict=True):
        assert torch.equal(p, w)
        assert p.data_ptr() == pointer


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("flag", [None, True])
@pytest.mark.filterwarnings("ignore:only .* of the perturbation survives")
def test_low_precision_weights_take_at_most_one_float32_copy_of_the_largest(flag, adaptive, dtype):
    sizes = (400_000, 1_000_000, 300_000)
    params = make([(n,) for n in sizes], dtype)
    sam = Perturbation(params, rho=0.1, adaptive=adaptive, foreach=flag)
    for _ in range(2):  # the copies of the clean weights are made in the first step, and stay
        for p in params:
            p.grad = torch.ones_like(p)
        with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
            sam.enter()
            sam.exit()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = torch.tensor([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())])
    assert 0 < int(changes.cumsum(0).max()) <= 4 * max(sizes)


@pytest.mark.parametrize("shapes", SHAPES[1:], ids=str)
@pytest.mark.parametrize("norm", [2, math.inf])
@pytest.mark.parametrize("adaptive", ADAPTIVE)
@pytest.mark.parametrize("body", FOREACH)
def test_the_four_norms_of_the_last_step(body, adaptive, norm, shapes):
    """||T g||_q, ||g||_2, ||T^-1 e||_p and ||e||_2, all from the formula."""
    params = make(shapes, torch.float64)
    w, g = (torch.cat([x.flatten() for x in xs]) for xs in ([p.detach() for p in params], [p.grad for p in params]))
    t = torch.cat([t_of(p.detach(), adaptive, 0.01).flatten() for p in params])
    e = torch.cat([x.flatten() for x in expected(params, 0.1, adaptive, norm=norm)]) - w
    sam = Perturbation(params, rho=0.1, adaptive=adaptive, norm=norm, foreach=FOREACH[body])
    with sam.perturbed():
        pass
    last = sam.last_step
    assert last.dual_norm.item() == pytest.approx((t * g).norm(2 if norm == 2 else 1).item(), rel=1e-10)
    assert last.grad_norm.item() == pytest.approx(g.norm().item(), rel=1e-10)
    assert last.radius.item() == pytest.approx((e / t).norm(norm).item(), rel=1e-10)
    assert last.perturbation_norm.item() == pytest.approx(e.norm().item(), rel=1e-10)


@pytest.mark.parametrize("foreach_flag", [None, True])
def test_the_norm_of_25_million_entries_is_exact_to_float32(foreach_flag):
    """One long float32 sum is off by 1e-3 here."""
    p = torch.nn.Parameter(torch.zeros(25_000_000))
    p.grad = torch.rand(25_000_000, generator=torch.Generator().manual_seed(0)).add_(0.5)
    truth = float(sum(part.double().square().sum() for part in p.grad.split(1_000_000)) ** 0.5)
    sam = Perturbation([p], rho=1.0, foreach=foreach_flag)
    with sam.perturbed():
        pass
    # foreach uses torch's own norm on one tensor, which measured 4e-5 to 1.4e-3 at this length
    assert float(sam.last_step.dual_norm) == pytest.approx(truth, rel=1e-6 if foreach_flag is None else 2e-3)


@pytest.mark.parametrize("grad_dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch refuses gradients of another dtype")
def test_gradients_of_another_dtype(grad_dtype):
    params = make([(40, 3), (9,)], torch.float64, grad_dtype)
    truth = expected(params, 0.1, True)
    with Perturbation(params, rho=0.1, adaptive=True).perturbed():
        assert_close_to(params, truth, torch.float32)


@pytest.mark.parametrize("shapes", SHAPES, ids=str)
@pytest.mark.parametrize("norm", [2, math.inf])
def test_without_eta_a_weight_that_is_zero_stays(norm, shapes):
    params = make(shapes)
    for p in params:
        p.data.flatten()[1::2] = 0
    truth = expected(params, 0.1, True, eta=0.0, norm=norm)
    with Perturbation(params, rho=0.1, adaptive=True, eta=0.0, norm=norm).perturbed():
        assert_close_to(params, truth, torch.float32)
        assert all(bool((p.detach().flatten()[1::2] == 0).all()) for p in params)


def test_channels_last_weights_and_contiguous_gradients():
    params = make([(8, 6, 3, 3), (20, 40, 10, 10)])
    for p in params:
        p.data = p.data.to(memory_format=torch.channels_last)
    params[1].grad = params[1].grad.to(memory_format=torch.channels_last)
    truth, strides = expected(params, 0.1, True), [p.stride() for p in params]
    with Perturbation(params, rho=0.1, adaptive=True).perturbed():
        assert_close_to(params, truth, torch.float32)
        assert [p.stride() for p in params] == strides


@pytest.mark.parametrize("foreach_flag", [None, True])
def test_complex_weights_are_pairs_of_real_ones(foreach_flag):
    p = torch.nn.Parameter(torch.randn(5, 2, dtype=torch.complex64))
    p.grad = torch.randn(5, 2, dtype=torch.complex64)
    real = torch.nn.Parameter(torch.view_as_real(p.detach().clone()))
    real.grad = torch.view_as_real(p.grad.clone())
    truth = expected([real], 0.1, True)[0]
    before = p.detach().clone()
    with Perturbation([p], rho=0.1, adaptive=True, foreach=foreach_flag).perturbed():
        assert_close_to([torch.view_as_real(p.detach())], [truth], torch.float32)
    assert torch.equal(p, before)


@pytest.mark.parametrize("adaptive", ADAPTIVE)
def test_sparse_gradients_move_only_their_rows(adaptive):
    weight = torch.randn(10, 3)
    rows = torch.tensor([[1, 4, 1]])
    values = torch.randn(3, 3)
    dense, sparse = torch.nn.Parameter(weight.clone()), torch.nn.Parameter(weight.clone())
    sparse.grad = torch.sparse_coo_tensor(rows, values, (10, 3), check_invariants=True)
    dense.grad = sparse.grad.to_dense()
    truth = expected([dense], 0.1, adaptive)
    with Perturbation([sparse], rho=0.1, adaptive=adaptive).perturbed():
        assert_close_to([sparse], truth, torch.float32)
        assert torch.equal(sparse[0], weight[0])
    assert torch.equal(sparse, weight)


def test_foreach_moves_the_rows_of_a_sparse_gradient_as_the_loop_does():
    """As in torch.optim, where foreach=True leaves sparse gradients to the loop."""
    moved = []
    for flag in (True, None, False):
        p = torch.nn.Parameter(torch.ones(4, 2))
        p.grad = torch.sparse_coo_tensor([[1]], torch.tensor([[3.0, 4.0]]), (4, 2), check_invariants=True)
        with Perturbation([p], rho=0.5, foreach=flag).perturbed():
            moved.append(p.detach().clone())
        assert torch.equal(p, torch.ones(4, 2))
    torch.testing.assert_close(moved[0], torch.tensor([[1.0, 1.0], [1.3, 1.4], [1.0, 1.0], [1.0, 1.0]]))
    assert torch.equal(moved[0], moved[1])
    assert torch.equal(moved[0], moved[2])


def test_aliased_storage_is_moved_in_place_and_comes_back():
    """Views of one flat buffer, and two parameters on the same storage: everyone must see the perturbed weights."""
    flat = torch.randn(30)
    before = flat.clone()
    params = [torch.nn.Parameter(flat[:10]), torch.nn.Parameter(flat[10:]), torch.nn.Parameter(flat[10:])]
    for p in params:
        p.grad = torch.randn_like(p)
    with Perturbation(params, rho=1.0).perturbed():
        assert not torch.equal(flat[:10], before[:10])
        assert torch.equal(params[0].detach(), flat[:10])
    assert torch.equal(flat, before)
    assert params[0].data_ptr() == flat.data_ptr()


def test_maximize_flips_the_ascent():
    up, down = make([(6,)]), make([(6,)])
    truth = [2 * w.detach().double() - e for w, e in zip(up, expected(up, 0.1), strict=True)]
    with SAM(down, torch.optim.SGD, lr=0.1, rho=0.1, maximize=True).perturbed():
        assert_close_to(down, truth, torch.float32)


@pytest.mark.parametrize("norm", [2, math.inf])
@pytest.mark.parametrize("foreach_flag", [None, True])
def test_a_gradient_of_zero_moves_nothing(norm, foreach_flag):
    params = make([(5,), (4, 4)])
    for p in params:
        p.grad.zero_()
    before = [p.detach().clone() for p in params]
    sam = Perturbation(params, rho=0.1, adaptive=True, norm=norm, foreach=foreach_flag)
    with sam.perturbed():
        assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))
    assert float(sam.last_step.radius) == 0
    assert float(sam.last_step.perturbation_norm) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("norm", [2, math.inf])
@pytest.mark.parametrize("foreach_flag", [None, True])
def test_a_gradient_that_is_not_finite_makes_every_weight_nan_until_they_come_back(norm, foreach_flag, bad):
    """So that no gradient of the second pass is finite, and the step is left out by the one rule."""
    params = make([(5,), (4, 4), (70000,)])
    params[0].grad[2] = bad
    before = [p.detach().clone() for p in params]
    sam = Perturbation(params, rho=0.1, adaptive=True, norm=norm, foreach=foreach_flag)
    with sam.perturbed():
        assert all(bool(p.isnan().all()) for p in params)
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))
    assert math.isnan(float(sam.last_step.radius))


@pytest.mark.parametrize("size", [1e-8, 1e4])
def test_float16_gradients_neither_overflow_nor_vanish(size):
    """The sum of squares of 60,000 is not a float16; the weights are float32, as under GradScaler's autocast."""
    p = torch.nn.Parameter(torch.zeros(3000))
    p.grad = torch.full((3000,), max(size, 6e-8), dtype=torch.float32)
    p.grad = p.grad.to(torch.float16).float()
    truth = expected([p], 0.1)
    with Perturbation([p], rho=0.1).perturbed():
        assert_close_to([p], truth, torch.float32)
    h = torch.nn.Parameter(torch.zeros(3000, dtype=torch.float16))
    h.grad = p.grad.half() if p.grad is not None else torch.full((3000,), max(size, 6e-8), dtype=torch.float16)
    truth = expected([h], 0.1)
    with Perturbation([h], rho=0.1).perturbed():
        assert_close_to([h], truth, torch.float16)


def a_bucket(p, body, rho=0.1):
    return kernels.Bucket(2, rho, p.device, p.dtype, body, params=[p], weights=[p.detach()], grads=[p.grad])


@pytest.mark.parametrize("body", [loop, foreach])
@pytest.mark.parametrize("factor", [0.0, 0.5, math.nan])
def test_a_factor_on_a_device_is_the_number(body, factor):
    """The bodies for devices take it as a 0-d tensor, which they do not read."""
    moved = []
    for kind in (float, torch.tensor):
        (p,) = make([(4,)])
        b = a_bucket(p, body)
        bucket.Backups().save([b])
        body.measure(b)
        body.ascend_(b, kind(factor))
        moved.append(p.detach())
    torch.testing.assert_close(*moved, rtol=0, atol=0, equal_nan=True)


def test_stochastic_rounding_is_unbiased_and_between_neighbors():
    x = torch.full((200_000,), 1.0 + 2**-10)  # a quarter of the way from 1 to the next bfloat16
    y = loop.round_to(x, torch.bfloat16, Stream(0)).double()
    assert set(y.unique().tolist()) == {1.0, 1.0 + 2**-7}
    standard_error = 2**-7 * (0.125 * 0.875 / len(x)) ** 0.5
    assert float(y.mean()) == pytest.approx(1.0 + 2**-10, abs=4 * standard_error)


def test_storage_of_some_parameters_does_not_serve_others():
    """The clean weights of one step stay allocated for the next, in which other parameters have a gradient."""
    params = make([(9000,), (70000,), (3,), (5,)])
    grads = [p.grad for p in params]
    sam = Perturbation(params, rho=0.1, adaptive=True)
    for present in ([0, 1, 2, 3], [0, 2], [3], [1, 3], [0, 1, 2, 3]):
        for i, p in enumerate(params):
            p.grad = grads[i].clone() if i in present else None
        chosen = [params[i] for i in present]
        truth = expected(chosen, 0.1, True)
        before = [p.detach().clone() for p in params]
        with sam.perturbed():
            assert_close_to(chosen, truth, torch.float32)
        assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))


def test_a_radius_that_is_0_on_a_device_stays_out_of_the_norm():
    """There it is a tensor that is not read, and its group is among those that could move."""
    still, moving = (torch.nn.Parameter(torch.ones(3)) for _ in range(2))
    still.grad, moving.grad = torch.full((3,), 100.0), torch.tensor([3.0, 4.0, 0.0])
    buckets = [a_bucket(p, foreach, torch.tensor(rho)) for p, rho in ((still, 0.0), (moving, 0.5))]
    ascent = kernels.ascend_(buckets, bucket.Backups())
    assert [float(f) for f in ascent.factors] == pytest.approx([0.0, 0.5 * float(buckets[1].unit) / 5])
    assert torch.equal(still.detach(), torch.ones(3))
    torch.testing.assert_close(moving.detach(), torch.tensor([1.3, 1.4, 1.0]))
