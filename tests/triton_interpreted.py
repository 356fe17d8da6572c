"""Triton's kernels on the CPU, by its interpreter; `tests/test_triton.py` runs this file with TRITON_INTERPRET=1."""

import math

import pytest
import torch
from test_kernels import close_to, expected, make
from torch import nn

from sam_optim import Perturbation, kernels
from sam_optim.kernels import foreach, tables, triton_ascent
from sam_optim.kernels import triton as body

SHAPES = [(3, 5), (), (1,), (0,), (4, 3, 3, 3), (2049,), (3, 2731), (8192,)]
ADAPTIVE = [False, True, "filter", "layer"]
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16]
pytestmark = [
    pytest.mark.filterwarnings("ignore:only .* of the perturbation survives"),
    pytest.mark.filterwarnings("ignore:(invalid value|overflow|divide by zero) .*:RuntimeWarning"),  # numpy's, of inf
]


@pytest.fixture
def launches(monkeypatch):
    """The names of what is launched, in order."""
    names = []
    launch = tables.launch

    def recorded(kernel, programs, *args, **constants):
        names.append(kernel.fn.__name__)
        launch(kernel, programs, *args, **constants)

    monkeypatch.setattr(tables, "launch", recorded)
    return names


def poisoned(sam):
    """The storage of saved weights holds NaN: whatever reads it before it is written shows."""
    for store in sam._plan._stores:
        for x in store._inplace.values():
            x.fill_(math.nan)


def perturbed_bits(sam, params, grads=None):
    """Weights at w + e, and the check that they come back."""
    for p, g in zip(params, grads or [p.grad for p in params], strict=True):
        p.grad = g
    before = [p.detach().clone() for p in params]
    with sam.perturbed():
        found = [p.detach().clone() for p in params]
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))
    return found


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("norm", [2, math.inf])
@pytest.mark.parametrize("adaptive", ADAPTIVE)
def test_ascent_is_the_formula_of_the_paper_and_restore_is_exact(adaptive, norm, dtype, launches):
    params = make(SHAPES, dtype)
    truth = expected(params, 0.1, adaptive, norm=norm)
    sam = Perturbation(params, rho=0.1, adaptive=adaptive, norm=norm, fused=True)
    grads = [p.grad for p in params]
    for _ in range(2):
        for found, w in zip(perturbed_bits(sam, params, grads), truth, strict=True):
            close_to([found], [w], dtype)  # bfloat16 is cut off here where a device rounds: within the 2 ulps
        poisoned(sam)
    assert launches == ["norm_partials", "finalise", "perturb"] * 2
    generator = torch.cat([(t * g.double()).flatten() for t, g in zip(_t(params, adaptive), grads, strict=True)])
    assert float(sam.last_step.grad_norm) == pytest.approx(
        float(generator.norm() if norm == 2 else generator.abs().sum()), rel=1e-6
    )
    assert float(sam.last_step.perturbation_norm) == pytest.approx(0.1, rel=1e-9)


def _t(params, adaptive):
    from test_kernels import t_of

    return [t_of(p.detach().double(), adaptive, 0.01) for p in params]


@pytest.mark.parametrize("adaptive", ADAPTIVE)
def test_without_multiply_add_float32_gives_the_bits_of_the_reference(adaptive):
    """The factor agrees to float64; what follows is the same arithmetic in the same order."""
    ours, reference = make(SHAPES), make(SHAPES)
    found = perturbed_bits(Perturbation(ours, rho=0.1, adaptive=adaptive, fused=True), ours)
    truth = perturbed_bits(Perturbation(reference, rho=0.1, adaptive=adaptive, foreach=False), reference)
    for a, b in zip(found, truth, strict=True):
        ulps = torch.finfo(torch.float32).eps * b.abs().max() if b.numel() else 0.0
        assert torch.allclose(a, b, rtol=2**-23, atol=float(ulps))


@pytest.mark.parametrize("adaptive", [False, True])
def test_unaligned_gradients_give_the_same_bits(adaptive, launches):
    """As DDP's buckets make them: views of one buffer, at any entry."""
    params = make(SHAPES)
    grads = [p.grad for p in params]
    sam = Perturbation(params, rho=0.1, adaptive=adaptive, fused=True)
    aligned = perturbed_bits(sam, params, grads)
    flat = torch.cat([torch.zeros(1), *[g.flatten() for g in grads]])
    start, views = 1, []
    for g in grads:
        views.append(flat[start : start + g.numel()].view(g.shape))
        start += g.numel()
    assert any(v.data_ptr() % 16 for v in views)
    launches.clear()
    found = perturbed_bits(sam, params, views)
    assert launches.count("finalise") == 1
    assert launches.count("perturb") == 2  # some views are aligned
    for a, b in zip(found, aligned, strict=True):  # the order of the partial sums is another one
        torch.testing.assert_close(a, b, rtol=2**-22, atol=1e-7)
    again = perturbed_bits(sam, params, views)
    assert all(torch.equal(a, b) for a, b in zip(found, again, strict=True))


@pytest.mark.parametrize("adaptive", ADAPTIVE)
def test_layouts_that_weights_and_gradients_share(adaptive, launches):
    params = make([(8, 6, 3, 3), (20, 40, 5, 5), (30, 70)])
    for p in params[:2]:
        p.data, p.grad = (x.to(memory_format=torch.channels_last) for x in (p.data, p.grad))
    params[2].data, params[2].grad = (x.t().contiguous().t() for x in (params[2].data, params[2].grad))
    truth, strides = expected(params, 0.1, adaptive), [p.stride() for p in params]
    sam = Perturbation(params, rho=0.1, adaptive=adaptive, fused=True)
    with sam.perturbed():
        close_to(params, truth, torch.float32)
        assert [p.stride() for p in params] == strides
    assert launches == ["norm_partials", "finalise", "perturb"]


def test_what_the_kernels_do_not_know_moves_another_way_with_one_norm():
    """A gradient of another layout, a complex weight, a sparse gradient, weights that overlap: beside one that fits."""
    fits, turned = make([(40, 30), (8, 6, 3, 3)])
    turned.data = turned.data.to(memory_format=torch.channels_last)
    pairs = torch.randn(5, 2)
    complex_ = nn.Parameter(torch.view_as_complex(pairs.clone()))
    complex_.grad = torch.view_as_complex(torch.randn(5, 2))
    real = nn.Parameter(pairs)
    real.grad = torch.view_as_real(complex_.grad)
    rows, table = nn.Parameter(torch.randn(10, 3)), nn.Parameter(torch.randn(10, 3))
    rows.grad = torch.sparse_coo_tensor([[1, 4]], torch.randn(2, 3), (10, 3), check_invariants=True)
    table.data.copy_(rows.data)
    table.grad = rows.grad.to_dense()
    truth = expected([fits, turned, real, table], 0.1)
    params = [fits, turned, complex_, rows]
    before = [p.detach().clone() for p in params]
    sam = Perturbation(params, rho=0.1, fused=True)
    with sam.perturbed():
        bodies = {b.body.__name__.split(".")[-1] for b in sam._pass._buckets}
        assert bodies == {"triton", "foreach", "reference"} or bodies == {"triton", "reference"}
        close_to([fits, turned, torch.view_as_real(complex_.detach()), rows], truth, torch.float32)
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))


def test_weights_that_overlap_are_all_saved_before_one_moves():
    flat = torch.randn(30)
    before = flat.clone()
    params = [nn.Parameter(flat[:10]), nn.Parameter(flat[10:]), nn.Parameter(flat[5:])]
    for p in params:
        p.grad = torch.randn_like(p)
    sam = Perturbation(params, rho=1.0, fused=True)
    with sam.perturbed():
        assert {b.body for b in sam._pass._buckets} == {foreach}
        assert not torch.equal(flat, before)
    assert torch.equal(flat, before)


@pytest.mark.skipif(not hasattr(torch.Tensor, "grad_dtype"), reason="this torch refuses gradients of another dtype")
@pytest.mark.parametrize("types", [(torch.float64, torch.float32), (torch.float32, torch.bfloat16)], ids=str)
def test_gradients_of_another_dtype(types):
    params = make([(40, 3), (9,)], *types)
    truth = expected(params, 0.1, True)
    with Perturbation(params, rho=0.1, adaptive=True, fused=True).perturbed():
        close_to(params, truth, torch.float32)


def mixed_groups(params, **rho):
    return [
        {"params": params[:2], "rho": rho.get("rho", 0.1)},
        {"params": params[2:4], "rho": 0.03, "adaptive": True, "eta": 0.2},
        {"params": params[4:5], "rho": 0.2, "adaptive": "filter"},
        {"params": params[5:6], "rho": 0.01, "norm": math.inf},
        {"params": params[6:7], "rho": 0.0},
        {"params": params[7:], "rho": 0.02, "maximize": True},
    ]


@pytest.mark.parametrize("in_tensor", [False, True])
def test_groups_of_all_kinds_share_one_norm(in_tensor, launches):
    """Against foreach, group by group."""
    dtypes = [torch.float32] * 6 + [torch.float64, torch.float32]
    found = []
    for flags in ({"fused": True}, {"foreach": True}):
        params = [p for i, d in enumerate(dtypes) for p in [make(SHAPES, d)[i]]]
        rho = torch.tensor(0.1) if in_tensor else 0.1
        sam = Perturbation(mixed_groups(params, rho=rho), **flags)
        found.append((perturbed_bits(sam, params), sam.last_step))
    for a, b in zip(found[0][0], found[1][0], strict=True):
        torch.testing.assert_close(a, b, rtol=2**-21, atol=1e-6)
    for name in ("grad_norm", "perturbation_norm"):
        assert float(getattr(found[0][1], name)) == pytest.approx(float(getattr(found[1][1], name)), rel=1e-6)
    assert launches.count("finalise") == 1


def test_adaptive_and_plain_groups_need_three_launches(launches):
    """As `asam_param_groups` makes them: biases at T = 1."""
    params = make(SHAPES)
    sam = Perturbation(
        [{"params": params[:4], "adaptive": True}, {"params": params[4:], "adaptive": False}], rho=0.1, fused=True
    )
    others = make(SHAPES)
    other = Perturbation(
        [{"params": others[:4], "adaptive": True}, {"params": others[4:], "adaptive": False}], rho=0.1, foreach=False
    )
    for a, b in zip(perturbed_bits(sam, params), perturbed_bits(other, others), strict=True):
        torch.testing.assert_close(a, b, rtol=2**-22, atol=1e-7)
    assert launches == ["norm_partials", "finalise", "perturb"]


@pytest.mark.parametrize("bad", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("norm", [2, math.inf])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_gradient_that_leads_nowhere_moves_nothing_and_is_counted(adaptive, norm, bad):
    params = make(SHAPES)
    sam = Perturbation(params, rho=0.1, adaptive=adaptive, norm=norm, fused=True)
    for i in range(3):
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.zeros_like(p) if bad == 0 else torch.randn_like(p)
        if bad != 0:
            params[4].grad.view(-1)[7] = bad
        with sam.perturbed():
            assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))
        assert int(sam.num_unperturbed) == i + 1
        assert float(sam.last_step.perturbation_norm) == 0.0
    for p in params:
        p.grad = torch.ones_like(p)
    with sam.perturbed():
        assert not torch.equal(params[0], before[0])
    assert int(sam.num_unperturbed) == 3


@pytest.mark.parametrize("size", [1e-30, 1e25])
def test_gradients_whose_squares_leave_float32(size):
    params = make(SHAPES)
    for p in params:
        p.grad.mul_(size)
    truth = expected(params, 0.1)
    with Perturbation(params, rho=0.1, fused=True).perturbed():
        close_to(params, truth, torch.float32)


def test_the_steady_state_uploads_nothing_and_results_are_not_overwritten(monkeypatch):
    params = make(SHAPES)
    grads = [p.grad for p in params]
    sam = Perturbation(params, rho=0.1, fused=True)
    bits = perturbed_bits(sam, params, grads)
    seen = sam.last_step
    sent = []
    staged = tables.staged
    monkeypatch.setattr(tables, "staged", lambda values, *rest: sent.append(len(values)) or staged(values, *rest))
    monkeypatch.setattr(tables, "constant", None)  # no table is made
    assert all(torch.equal(a, b) for a, b in zip(perturbed_bits(sam, params, grads), bits, strict=True))
    assert not sent
    other = [g.clone() for g in grads]
    other[0] = torch.full_like(other[0], 1e4)
    perturbed_bits(sam, params, other)
    assert len(sent) == 1
    assert seen.grad_norm != sam.last_step.grad_norm


def test_parameters_that_come_and_go(launches):
    """A gradient that is missing in some steps, and weights that have been assigned anew."""
    params = make(SHAPES)
    grads = [p.grad for p in params]
    sam = Perturbation(params, rho=0.1, fused=True)
    perturbed_bits(sam, params, grads)
    perturbed_bits(sam, params, [None, *grads[1:]])
    for p in params:
        p.data = p.data.clone()
    others = make(SHAPES)
    found = perturbed_bits(sam, params, [None, *grads[1:]])
    truth = perturbed_bits(Perturbation(others, rho=0.1, foreach=False), others, [None, *grads[1:]])
    for a, b in zip(found, truth, strict=True):
        torch.testing.assert_close(a, b, rtol=2**-22, atol=1e-7)


def test_low_precision_says_what_its_rounding_left():
    params = make([(400,), (30, 30)], torch.bfloat16)
    others = make([(400,), (30, 30)], torch.bfloat16)
    shares = []
    for sam, of in ((Perturbation(params, rho=0.1, fused=True), params), (Perturbation(others, rho=0.1), others)):
        perturbed_bits(sam, of)
        shares.append(float(sam.last_step.realized))
    assert shares[0] == pytest.approx(shares[1], rel=0.05)  # the interpreter cuts bfloat16 off


def test_interpreted_or_not_is_known():
    assert body.IS_INTERPRETED
    assert kernels.fused.may_be_fused(make([(3,)]))
    assert not isinstance(triton_ascent.perturb, body.JITFunction)
