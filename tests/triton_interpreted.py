"""Triton's kernels on the CPU, by its interpreter; `tests/test_triton.py` runs this file with TRITON_INTERPRET=1."""

import gc
import itertools
import math
import sys
import weakref

import pytest
import torch
from test_kernels import assert_close_to, make, t_of
from torch import nn

from sam_optim import Perturbation
from sam_optim.optim import kernels
from sam_optim.optim.kernels import bucket
from sam_optim.optim.kernels import triton as body

SHAPES = [(3, 5), (), (0,), (4, 3, 3, 3), (2049,), (130, 127)]  # up to two whole chunks and a part
ADAPTIVE = [False, True, "filter", "layer"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
pytestmark = [
    pytest.mark.filterwarnings("ignore:only .* of the perturbation survives"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) .*:RuntimeWarning"),  # numpy's, of inf
]


class Truth:
    """The formula on one flat float64 vector: weights at w + e, and the norms of `last_step`."""

    def __init__(self, params, rho=0.1, adaptive=False, norm=2):
        ws = [p.detach().double() for p in params]
        w, t = (torch.cat([x.flatten() for x in some]) for some in (ws, [t_of(w, adaptive, 0.01) for w in ws]))
        g = torch.cat([p.grad.double().flatten() for p in params])
        self.dual_norm = (t * g).abs().sum() if norm == math.inf else (t * g).norm()
        self.grad_norm = g.norm()
        e = rho * t * g.sign() if norm == math.inf else rho * t * t * g / self.dual_norm
        self.perturbation_norm, self.radius = e.norm(), torch.tensor(rho)
        parts = (w + e).split([p.numel() for p in params])
        self.weights = [part.view(p.shape) for part, p in zip(parts, params, strict=True)]


def moved(sam, params, grads=None):
    """Weights at w + e, and the check that they come back; before, every copy of an earlier step is poisoned."""
    for storage in sam._backups._storages:
        for copy in storage.copies:
            copy.fill_(math.nan)
    for p, g in zip(params, grads or [p.grad for p in params], strict=True):
        p.grad = g
    before = [p.detach().clone() for p in params]
    sam.enter()
    perturbed = [p.detach().clone() for p in params]
    sam.exit(failed=True)  # no backward runs here
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))
    return perturbed


@pytest.fixture
def launches(monkeypatch):
    """The names of what is launched, in order."""
    names = []
    launch = body.launch

    def recorded(kernel, programs, *args, **constants):
        if programs:
            names.append(kernel.fn.__name__)
        launch(kernel, programs, *args, **constants)

    monkeypatch.setattr(body, "launch", recorded)
    return names


THREE = ["norm_partials", "finalize", "perturb"]


@pytest.mark.parametrize(("dtype", "norm"), [*((d, 2) for d in DTYPES), (torch.float32, math.inf)], ids=str)
@pytest.mark.parametrize("adaptive", ADAPTIVE)
def test_ascent_is_the_formula_of_the_paper_and_restore_is_exact(adaptive, norm, dtype, launches):
    params = make(SHAPES, dtype)
    truth = Truth(params, 0.1, adaptive, norm)
    sam = Perturbation(params, rho=0.1, adaptive=adaptive, norm=norm, fused=True)
    grads = [p.grad for p in params]
    first, second = moved(sam, params, grads), moved(sam, params, grads)
    assert_close_to(first, truth.weights, dtype)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    assert launches == THREE * 2
    for name in ("dual_norm", "grad_norm", "radius", "perturbation_norm"):
        assert float(getattr(sam.last_step, name)) == pytest.approx(float(getattr(truth, name)), rel=1e-6), name


@pytest.mark.parametrize("norm", [2, math.inf])
@pytest.mark.parametrize("adaptive", ADAPTIVE)
def test_float32_is_that_of_the_loop(adaptive, norm):
    """Within one ulp: the same arithmetic, but for the order of factors."""
    fused, plain = make(SHAPES), make(SHAPES)
    a = moved(Perturbation(fused, rho=0.1, adaptive=adaptive, norm=norm, fused=True), fused)
    b = moved(Perturbation(plain, rho=0.1, adaptive=adaptive, norm=norm, foreach=False), plain)
    for x, y in zip(a, b, strict=True):
        ulp = torch.finfo(torch.float32).eps
        torch.testing.assert_close(x, y, rtol=ulp, atol=ulp * float(y.abs().max()) if y.numel() else 0.0)


def views(grads):
    """As DDP's buckets make them: views of one buffer, at any entry."""
    flat = torch.cat([torch.zeros(1, dtype=grads[0].dtype), *[g.flatten() for g in grads]])
    return [x.view(g.shape) for x, g in zip(flat[1:].split([g.numel() for g in grads]), grads, strict=True)]


@pytest.mark.parametrize("adaptive", [False, True])
def test_unaligned_gradients_need_no_other_launch(adaptive, launches):
    params = make(SHAPES)
    grads = [p.grad for p in params]
    sam = Perturbation(params, rho=0.1, adaptive=adaptive, fused=True)
    truth = Truth(params, 0.1, adaptive).weights
    unaligned = views(grads)
    assert any(v.data_ptr() % 16 for v in unaligned)
    for some in (grads, unaligned, grads):  # other addresses in every step
        assert_close_to(moved(sam, params, some), truth, torch.float32)
    assert launches == THREE * 3


@pytest.mark.parametrize("adaptive", ADAPTIVE)
def test_layouts_that_weights_and_gradients_share(adaptive, launches):
    params = make([(8, 6, 3, 3), (20, 40, 5, 5), (30, 70)])
    for p in params[:2]:
        p.data, p.grad = (x.to(memory_format=torch.channels_last) for x in (p.data, p.grad))
    params[2].data, params[2].grad = (x.t().contiguous().t() for x in (params[2].data, params[2].grad))
    truth, strides = Truth(params, 0.1, adaptive), [p.stride() for p in params]
    sam = Perturbation(params, rho=0.1, adaptive=adaptive, fused=True)
    assert_close_to(moved(sam, params), truth.weights, torch.float32)
    assert [p.stride() for p in params] == strides
    assert launches == THREE


def test_weights_that_are_laid_out_anew_come_back(launches):
    """As by model.to(memory_format=torch.channels_last) between two steps: copies must lie as the weights do."""
    shapes = [(8, 6, 3, 3), (20,)]
    params = make(shapes)
    sam = Perturbation(params, rho=0.1, fused=True)
    for layout in (torch.contiguous_format, torch.channels_last, torch.contiguous_format):
        for p, q in zip(params, make(shapes), strict=True):
            p.data, p.grad = q.data, q.grad
        params[0].data, params[0].grad = (x.to(memory_format=layout) for x in (params[0].data, params[0].grad))
        assert_close_to(moved(sam, params), Truth(params_with_gradients(params)).weights, torch.float32)
    assert launches == THREE * 3


def params_with_gradients(params):
    for p, q in zip(params, make([tuple(p.shape) for p in params]), strict=True):
        p.grad = q.grad
    return params


def turned(params):
    params[0].data = params[0].data.to(memory_format=torch.channels_last)


def overlapping(params):
    flat = torch.randn(30)
    for p, part in zip(params, (flat[:10], flat[10:], flat[5:]), strict=False):
        p.data, p.grad = part, torch.randn_like(part)


def sparse(params):
    params[1].grad = torch.sparse_coo_tensor([[1, 4]], torch.randn(2, 3), (10, 3), check_invariants=True)


def with_gaps(params):
    params[1].data, params[1].grad = torch.randn(10, 6)[:, :3], torch.randn(10, 6)[:, :3]


class Subclass(torch.Tensor):
    pass


def subclass(params):
    params[1].grad = params[1].grad.as_subclass(Subclass)


@pytest.mark.parametrize("change", [turned, overlapping, sparse, with_gaps, subclass])
def test_what_the_kernels_do_not_know_moves_another_way(change, launches):
    params, others = make([(8, 6, 3, 3), (10, 3), (7,)]), make([(8, 6, 3, 3), (10, 3), (7,)])
    change(params)
    for p, q in zip(params, others, strict=True):
        q.data, q.grad = (
            p.data.clone(),
            p.grad.clone() if p.grad.is_sparse else p.grad.clone(memory_format=torch.preserve_format),
        )
    if change is overlapping:  # each of them is copied before one moves
        before = [p.detach().clone() for p in params]
        sam = Perturbation(params, rho=1.0, fused=True)
        sam.enter()
        assert not torch.equal(params[0].detach(), before[0])
        sam.exit(failed=True)
        assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))
    else:
        a = moved(Perturbation(params, rho=0.1, adaptive=True, fused=True), params)
        b = moved(Perturbation(others, rho=0.1, adaptive=True), others)
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not launches


def test_stochastic_rounding_moves_another_way(launches):
    params = make([(40, 30)], torch.bfloat16)
    moved(Perturbation(params, rho=0.1, fused=True, rounding="stochastic"), params)
    assert not launches


def test_complex_weights_are_pairs_of_real_ones(launches):
    pairs, grad = torch.randn(5, 2), torch.randn(5, 2)
    p, real = nn.Parameter(torch.view_as_complex(pairs.clone())), nn.Parameter(pairs.clone())
    p.grad, real.grad = torch.view_as_complex(grad.clone()), grad
    truth = Truth([real], 0.1, True).weights
    weights = moved(Perturbation([p], rho=0.1, adaptive=True, fused=True), [p])
    assert_close_to([torch.view_as_real(weights[0])], truth, torch.float32)
    assert launches == THREE


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch refuses gradients of another dtype")
@pytest.mark.parametrize("types", [(torch.float64, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
@pytest.mark.parametrize("adaptive", ADAPTIVE)
def test_gradients_of_another_dtype(adaptive, types, launches):
    params = make([(40, 3), (9,)], *types)
    truth = Truth(params, 0.1, adaptive).weights
    assert_close_to(moved(Perturbation(params, rho=0.1, adaptive=adaptive, fused=True), params), truth, torch.float32)
    assert launches == THREE


def mixed_groups(params, rho):
    return [
        {"params": params[:2], "rho": rho},
        {"params": params[2:3], "rho": 0.03, "adaptive": True, "eta": 0.2},
        {"params": params[3:4], "rho": 0.2, "adaptive": "filter"},
        {"params": params[4:5], "rho": 0.01, "norm": math.inf},
        {"params": params[5:6], "rho": 0.0},
        {"params": params[6:], "rho": 0.02, "maximize": True},
    ]


@pytest.mark.parametrize(("in_tensor", "norm"), [(False, 2), (True, 2), (False, math.inf)])
def test_groups_of_all_kinds_share_one_norm(in_tensor, norm, launches):
    """Against the loop, group by group. A radius that changes is seen, in a tensor and as a number."""
    shapes = [(3, 5), (), (300,), (40, 3, 3), (2049,), (9,), (130, 70), (30,)]
    dtypes = [torch.float32] * 6 + [torch.float64, torch.float32]
    results = []
    for flags in ({"fused": True}, {"foreach": False}):
        params = [make(shapes, d)[i] for i, d in enumerate(dtypes)]
        grads = [p.grad for p in params]
        groups = mixed_groups(params, torch.tensor(0.1) if in_tensor else 0.1)
        sam = Perturbation([{"norm": norm} | g for g in groups], **flags)
        results.append([])
        for rho in (0.1, 0.3):
            if in_tensor:
                sam.param_groups[0]["rho"].fill_(rho)
            else:
                sam.param_groups[0]["rho"] = rho
            results[-1].append((moved(sam, params, grads), sam.last_step))
    for (a, fused), (b, plain) in zip(*results, strict=True):
        for x, y in zip(a, b, strict=True):
            torch.testing.assert_close(x, y, rtol=2**-21, atol=1e-6)
        for name in ("dual_norm", "grad_norm", "radius", "perturbation_norm"):
            assert float(getattr(fused, name)) == pytest.approx(float(getattr(plain, name)), rel=2e-6), name
    assert launches.count("finalize") == 2


def test_a_radius_that_is_0_in_a_tensor_stays_out_of_the_norm():
    still, moving = (nn.Parameter(torch.ones(3)) for _ in range(2))
    still.grad, moving.grad = torch.full((3,), 100.0), torch.tensor([3.0, 4.0, 0.0])
    groups = [{"params": [still], "rho": torch.tensor(0.0)}, {"params": [moving], "rho": torch.tensor(0.5)}]
    a, b = moved(Perturbation(groups, fused=True), [still, moving])
    assert torch.equal(a, torch.ones(3))
    torch.testing.assert_close(b, torch.tensor([1.3, 1.4, 1.0]))


def test_adaptive_and_plain_groups_need_three_launches(launches):
    """As `asam_param_groups` makes them: biases at T = 1."""
    results = []
    for flags in ({"fused": True}, {"foreach": False}):
        params = make(SHAPES)
        groups = [{"params": params[:4], "adaptive": True}, {"params": params[4:], "adaptive": False}]
        results.append(moved(Perturbation(groups, rho=0.1, **flags), params))
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-22, atol=1e-7)
    assert launches == THREE


def test_settings_that_change_between_steps():
    """eta, the kind of T, p, and which of the weights have a gradient."""
    params = make(SHAPES)
    grads = [p.grad for p in params]
    sam = Perturbation(params, rho=0.1, fused=True)
    group = sam.param_groups[0]
    for adaptive, norm, present in (
        (False, 2, range(6)),
        ("filter", 2, range(6)),
        ("layer", 2, range(6)),
        ("layer", math.inf, range(1, 6)),
        (True, 2, range(2, 5)),
        (False, 2, range(6)),
    ):
        group["adaptive"], group["norm"] = adaptive, norm
        for i, p in enumerate(params):
            p.grad = grads[i] if i in present else None
            p.data = p.data.clone()
        chosen = [params[i] for i in present]
        assert_close_to(
            moved(sam, chosen), Truth(with_grads(chosen, grads, present), 0.1, adaptive, norm).weights, torch.float32
        )


def with_grads(params, grads, present):
    for p, i in zip(params, present, strict=True):
        p.grad = grads[i]
    return params


@pytest.mark.parametrize("norm", [2, math.inf])
@pytest.mark.parametrize("adaptive", ADAPTIVE)
def test_a_gradient_of_0_moves_nothing(adaptive, norm):
    params = make(SHAPES)
    before = [p.detach().clone() for p in params]
    sam = Perturbation(params, rho=0.1, adaptive=adaptive, norm=norm, fused=True)
    weights = moved(sam, params, [torch.zeros_like(p) for p in params])
    assert all(torch.equal(p, w) for p, w in zip(weights, before, strict=True))
    assert float(sam.last_step.radius) == float(sam.last_step.perturbation_norm) == 0


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
@pytest.mark.parametrize("norm", [2, math.inf])
@pytest.mark.parametrize("adaptive", ADAPTIVE)
def test_a_gradient_that_is_not_finite_makes_all_weights_nan(adaptive, norm, bad):
    """So that the gradient at w + e is not finite either, and the step is left out."""
    params = make(SHAPES)
    params[3].grad.view(-1)[7] = bad
    sam = Perturbation(params, rho=0.1, adaptive=adaptive, norm=norm, fused=True)
    assert all(w.isnan().all() for w in moved(sam, params))


@pytest.mark.parametrize("size", [1e-40, 1e-30, 1e-18, 1e25, 3e36])
@pytest.mark.parametrize("adaptive", [False, True, "layer"])
def test_a_finite_gradient_moves_by_rho_whatever_its_size(adaptive, size):
    """Also where its squares, or rho / ||T g||, are beyond float32."""
    params = make(SHAPES)
    for p in params:
        p.data.fill_(0.0) if not adaptive else p.data.mul_(1e-2)
        p.grad.mul_(size)
    sam = Perturbation(params, rho=0.1, adaptive=adaptive, fused=True)
    truth, ts = Truth(params, 0.1, adaptive), [t_of(p.detach().double(), adaptive, 0.01) for p in params]
    before = [p.detach().double() for p in params]
    weights = moved(sam, params)
    assert_close_to(weights, truth.weights, torch.float32)
    if not adaptive:  # w = 0, so that e is not rounded to w
        e = torch.cat([((a.double() - b) / t).flatten() for a, b, t in zip(weights, before, ts, strict=True)])
        assert float(e.norm()) == pytest.approx(0.1, rel=1e-5)
    assert float(sam.last_step.radius) == pytest.approx(0.1, rel=1e-5)
    assert float(sam.last_step.dual_norm) == pytest.approx(float(truth.dual_norm), rel=1e-5)
    assert float(sam.last_step.perturbation_norm) == pytest.approx(float(truth.perturbation_norm), rel=1e-5)


def test_one_norm_over_gradients_of_very_different_sizes():
    """Squares of some leave float32 and those of others do not."""
    params = make([(9000,), (9000,), (9000,)])
    for p, size in zip(params, (1e-25, 1.0, 1e22), strict=True):
        p.grad.mul_(size)
    truth = Truth(params)
    sam = Perturbation(params, rho=0.1, fused=True)
    assert_close_to(moved(sam, params), truth.weights, torch.float32)
    assert float(sam.last_step.dual_norm) == pytest.approx(float(truth.dual_norm), rel=1e-6)


def test_results_are_not_overwritten_by_the_next_step():
    params = make(SHAPES)
    grads = [p.grad for p in params]
    sam = Perturbation(params, rho=0.1, fused=True)
    moved(sam, params, grads)
    step = sam.last_step
    before = float(step.dual_norm), float(step.perturbation_norm)
    moved(sam, params, [100 * g for g in grads])
    assert (float(step.dual_norm), float(step.perturbation_norm)) == before
    assert float(sam.last_step.dual_norm) == pytest.approx(100 * before[0], rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("adaptive", [False, True])
def test_low_precision_says_what_its_rounding_left(adaptive, dtype):
    """Against the weights themselves, in float64."""
    params = make([(400,), (30, 30), (9000,)], dtype)
    truth = Truth(params, 0.1, adaptive)
    before = torch.cat([p.detach().double().flatten() for p in params])
    sam = Perturbation(params, rho=0.1, adaptive=adaptive, fused=True)
    left = torch.cat([w.double().flatten() for w in moved(sam, params)]) - before
    e = torch.cat([w.flatten() for w in truth.weights]) - before
    assert float(sam.last_step.realized) == pytest.approx(float(left @ e / (e @ e)), rel=1e-4)


def test_a_step_in_inference_mode_leaves_nothing_that_others_may_not_use():
    params = make(SHAPES)
    grads = [p.grad for p in params]
    sam = Perturbation(params, rho=torch.tensor(0.1), fused=True)
    with torch.inference_mode():
        first = moved(sam, params, grads)
    assert all(torch.equal(a, b) for a, b in zip(first, moved(sam, params, grads), strict=True))
    moved(sam, params, [2 * g for g in grads])


def test_gradients_are_not_held_on_to():
    """The next pass needs their memory."""
    params = make(SHAPES)
    sam = Perturbation(params, rho=0.1, adaptive="filter", fused=True)
    grads = [weakref.ref(p.grad) for p in params]
    moved(sam, params)
    gc.collect()
    assert all(g() is None for g in grads)


def test_a_captured_ascent_has_a_table_of_its_own(monkeypatch):
    """What a graph reads at every replay is not written to by later steps; a capture must not ask for pinned memory."""
    params = make(SHAPES)
    grads = [p.grad for p in params]
    sam = Perturbation(params, rho=0.1, fused=True)
    tables = []
    launch = body.launch
    monkeypatch.setattr(
        body, "launch", lambda kernel, n, *args, **c: (tables.append(args), launch(kernel, n, *args, **c))
    )
    monkeypatch.setattr(body, "is_capturing", lambda device: True)
    with pytest.raises(RuntimeError, match="run the step once before each capture"):
        moved(sam, params, grads)
    monkeypatch.setattr(body, "is_capturing", lambda device: False)
    truth = moved(sam, params, grads)
    eager = tables[0][0]
    monkeypatch.setattr(body, "is_capturing", lambda device: True)
    tables.clear()
    moved(sam, params, [g.clone() for g in grads])
    captured, values = tables[0][0], tables[0][0].clone()
    assert captured.untyped_storage().data_ptr() != eager.untyped_storage().data_ptr()
    with pytest.raises(RuntimeError, match="run the step once before each capture"):
        moved(sam, params, grads)
    monkeypatch.setattr(body, "is_capturing", lambda device: False)
    tables.clear()
    assert all(torch.equal(a, b) for a, b in zip(moved(sam, params, grads), truth, strict=True))
    assert tables[0][0].data_ptr() == eager.data_ptr()
    moved(sam, params, [2 * g for g in grads])
    assert torch.equal(captured, values)


# interrupts

HOST = {"ascend_", "launch", "_tables", "expect", "note", "save", "storages_for"}  # what a device leaves to Python


def at_line(number, act, run):
    """Calls `act` before the given line of the host's part of an ascent. Whether there was such a line."""
    left = number

    def trace(frame, event, arg):
        nonlocal left
        if frame.f_code.co_filename not in (body.__file__, bucket.__file__) or frame.f_code.co_name not in HOST:
            return None
        if event == "line":
            left -= 1
            if left == 0:
                sys.settrace(None)
                act()
        return trace

    sys.settrace(trace)
    try:
        run()
    finally:
        sys.settrace(None)
    return left <= 0


def interrupted():
    raise KeyboardInterrupt


@pytest.mark.parametrize("dtypes", [(torch.float32,) * 2, (torch.float32, torch.bfloat16)], ids=str)  # one move, or two
@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_an_interrupt_at_any_line_brings_the_weights_back(stride, dtypes):
    """In the second step: what the first has left in the copies is not what comes back."""
    for line in itertools.count(1, stride):
        params = [make([(30, 7)], d, seed=i)[0] for i, d in enumerate(dtypes)]
        grads = [p.grad for p in params]
        sam = Perturbation(params, rho=0.5, fused=True)
        moved(sam, params, grads)
        for p, g in zip(params, grads, strict=True):
            p.data.add_(1.0)
            p.grad = g.clone()
        before = [p.detach().clone() for p in params]
        try:
            reached = at_line(line, interrupted, sam.enter)
        except KeyboardInterrupt:
            reached = True
            assert not sam.active
        if not reached:
            break
        assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True)), line
        assert_close_to(moved(sam, params, grads), Truth(with_grads(params, grads, range(2)), 0.5).weights, dtypes[1])
    assert line > 40


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_a_signal_handler_sees_clean_weights_at_any_line(stride):
    """It may ask for a checkpoint between the launch and the note that it has been."""
    line, answers, reached = 1 - stride, 0, True
    while reached:
        line += stride
        p = make([(30, 7)])[0]
        sam = Perturbation([p], rho=0.5, fused=True)
        grad = p.grad
        moved(sam, [p], [grad])
        p.data.add_(1.0)
        p.grad, before, seen = grad.clone(), p.detach().clone(), []

        def ask(p=p, sam=sam, seen=seen):
            clean = sam._backups.clean(p)
            seen.append(p.detach().clone() if clean is None else clean.clone())

        reached = at_line(line, ask, sam.enter)
        assert all(torch.equal(w, before) for w in seen), line
        assert not torch.equal(p, before)
        answers += len(seen)
        sam.exit(failed=True)
        assert torch.equal(p, before)
    assert answers > 40 / stride


# bytes, counted where they are read and written


@pytest.fixture
def moved_bytes(monkeypatch):
    """Bytes of blocks of weights and gradients by kernel."""
    from triton.runtime.interpreter import InterpreterBuilder

    counted = {}
    launch, load, store = body.launch, InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    current = [None]

    def launched(kernel, programs, *args, **constants):
        current[0] = kernel.fn.__name__
        counted.setdefault(current[0], 0)
        launch(kernel, programs, *args, **constants)

    def count(pointers, mask):
        if pointers.data.size in (body.BLOCK.value, body.BLOCK.value // 2):
            counted[current[0]] += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8

    def masked_load(self, pointers, mask, *rest, **options):
        count(pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def masked_store(self, pointers, value, mask, *rest, **options):
        count(pointers, mask)
        return store(self, pointers, value, mask, *rest, **options)

    monkeypatch.setattr(body, "launch", launched)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", masked_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", masked_store)
    return counted


@pytest.mark.parametrize(("adaptive", "norm_bytes"), [(False, 4), (True, 8)])
def test_twenty_bytes_for_each_entry_and_twenty_four_for_asam(adaptive, norm_bytes, moved_bytes):
    params = make([(2049,), (40, 30), (), (20000,)])
    moved(Perturbation(params, rho=0.05, adaptive=adaptive, fused=True), params)
    number = sum(p.numel() for p in params)
    by_kernel = {k: v / number for k, v in moved_bytes.items() if k != "finalize"}
    assert by_kernel == {"norm_partials": norm_bytes, "perturb": 16}


def test_the_interpreter_is_known():
    assert body.IS_INTERPRETED
    assert kernels.may_be_fused(make([(3,)]))
