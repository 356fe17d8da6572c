"""Triton's kernels on the CPU, by its interpreter; `tests/test_triton.py` runs this file with TRITON_INTERPRET=1."""

import copy
import gc
import math
import weakref

import pytest
import torch
from sam_optim.optim.kernels.triton_descent import Descent
from test_kernels import close_to, expected, make
from torch import nn

from sam_optim import SAM, Perturbation
from sam_optim.optim import kernels
from sam_optim.optim.kernels import foreach, tables, triton_ascent
from sam_optim.optim.kernels import triton as body

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


@pytest.mark.parametrize(("dtype", "norm"), [*((d, 2) for d in DTYPES), (torch.float32, math.inf)], ids=str)
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
    assert float(sam.last_step.dual_norm) == pytest.approx(
        float(generator.norm() if norm == 2 else generator.abs().sum()), rel=1e-6
    )
    assert float(sam.last_step.radius) == pytest.approx(0.1, rel=1e-9)


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
    params = make(SHAPES[:6])
    sam = Perturbation(params, rho=0.1, adaptive=adaptive, norm=norm, fused=True)
    for i in range(2):
        before = [p.detach().clone() for p in params]
        for p in params:
            p.grad = torch.zeros_like(p) if bad == 0 else torch.randn_like(p)
        if bad != 0:
            params[4].grad.view(-1)[7] = bad
        with sam.perturbed():
            assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))
        assert int(sam.num_unperturbed) == i + 1
        assert float(sam.last_step.radius) == 0.0
    for p in params:
        p.grad = torch.ones_like(p)
    with sam.perturbed():
        assert not torch.equal(params[0], before[0])
    assert int(sam.num_unperturbed) == 2


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
    assert seen.grad_norm != sam.last_step.dual_norm


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


def test_weights_that_are_laid_out_anew_come_back():
    """As by model.to(memory_format=torch.channels_last) between two steps: what is saved must lie as they do."""
    params = make([(8, 6, 3, 3), (20,)])
    sam = Perturbation(params, rho=0.1, fused=True)
    perturbed_bits(sam, params)
    for layout in (torch.channels_last, torch.contiguous_format):
        others = make([(8, 6, 3, 3), (20,)])
        for p, q in zip(params, others, strict=True):
            p.data, p.grad = q.data, q.grad
        params[0].data, params[0].grad = (x.to(memory_format=layout) for x in (others[0].data, others[0].grad))
        truth = expected(params, 0.1)
        close_to(perturbed_bits(sam, params), truth, torch.float32)


def test_bodies_that_do_not_move_together_send_their_addresses_once(monkeypatch):
    """A graph has pinned memory for one table of each kind, and must not ask for more while it is captured."""
    params = make([(40, 30), (8, 6, 3, 3)])
    params[1].data = params[1].data.to(memory_format=torch.channels_last)  # its gradient is not: foreach moves it
    truth = expected(params, 0.1)
    sam, asked = Perturbation(params, rho=0.1, fused=True), []
    of = tables.Uploaded.of
    monkeypatch.setattr(tables.Uploaded, "of", lambda self, values: asked.append(self) or of(self, values))
    close_to(perturbed_bits(sam, params), truth, torch.float32)
    assert len(asked) == len(set(map(id, asked))) == 2  # addresses and radii


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


# the update that reads saved weights

BASES = {
    "sgd": (torch.optim.SGD, {"lr": 0.1}),
    "momentum": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "weight_decay": 0.01}),
    "nesterov": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True, "maximize": True}),
    "dampening": (torch.optim.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "adam": (torch.optim.Adam, {"lr": 0.01, "weight_decay": 0.1}),
    "adamw": (torch.optim.AdamW, {"lr": 0.01, "maximize": True}),
    "amsgrad": (torch.optim.AdamW, {"lr": torch.tensor(0.01), "amsgrad": True, "betas": (0.8, 0.99)}),
    "capturable": (torch.optim.Adam, {"lr": 0.01, "amsgrad": True, "capturable": True, "weight_decay": 0.1}),
}
UPDATED = [(3, 5), (), (0,), (2049,), (41, 70)]


def as_it_is(x):
    return x


def channels_last(x):
    return x.to(memory_format=torch.channels_last) if x.dim() == 4 else x


def same_steps(base, options, dtype=torch.float32, steps=4, shapes=UPDATED, layout=as_it_is, place=as_it_is, amp=None):
    """Torch's optimizer in `dtype`, and the kernels over weights that hold NaN, with the same gradients.

    place: where our gradients are. amp: of each step found_inf and the factor in the gradients.
    """
    ours, theirs = make(shapes, dtype), make(shapes, dtype)
    for p in [*ours, *theirs]:
        p.data, p.grad = layout(p.data), layout(p.grad)
    optimizers = [base(params, fused=True, **options) for params in (ours, theirs)]
    for optimizer in optimizers:
        optimizer.step()  # the first makes the state
    descent = Descent(optimizers[0])
    for k in range(steps):
        saved = {p: p.detach().clone() for p in ours}
        found_inf, scale = (None, None) if amp is None else map(torch.tensor, amp[k])
        for p, q, g in zip(ours, theirs, [layout(p.grad) for p in make(shapes, dtype, seed=k + 1)], strict=True):
            g = g if scale is None else g * scale
            p.grad, q.grad = place(g), g.clone()
            p.data.fill_(math.nan)
        update = descent.update(list(saved), list(saved.values()))
        assert update is not None
        descent.run(update, found_inf, scale)
        if amp is not None:
            optimizers[1].found_inf, optimizers[1].grad_scale = found_inf, scale
        optimizers[1].step()
        for p, q in zip(ours, theirs, strict=True):
            close(p.grad, q.grad)  # torch leaves them without the factor
    return (ours, optimizers[0]), (theirs, optimizers[1])


def close(a, b):
    """Within 4 ulps of the largest entry."""
    if a.numel():
        ulp = torch.finfo(a.dtype).eps
        torch.testing.assert_close(a, b, rtol=4 * ulp, atol=4 * ulp * float(b.detach().abs().max()))


@pytest.mark.parametrize("name", BASES)
def test_the_update_is_torchs_own(name, launches):
    base, options = BASES[name]
    (ours, optimizer), (theirs, other) = same_steps(base, options)
    for p, q in zip(ours, theirs, strict=True):
        close(p, q)
        assert optimizer.state[p].keys() == other.state[q].keys()
        for key, value in optimizer.state[p].items():
            assert value.dtype == other.state[q][key].dtype
            close(value, other.state[q][key])
    assert launches == (["sgd"] if base is torch.optim.SGD else ["adam_steps", "adam"]) * 4


def check_same(ours, theirs):
    for p, q in zip(ours[0], theirs[0], strict=True):
        close(p, q)
        for key, value in ours[1].state[p].items():
            close(value, theirs[1].state[q][key])


@pytest.mark.parametrize("name", ["nesterov", "amsgrad"])
def test_the_update_in_float64(name):
    check_same(*same_steps(*BASES[name], dtype=torch.float64))


@pytest.mark.parametrize("name", ["momentum", "adamw"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_update_in_low_precision(name, dtype):
    """Within 4 ulps: the interpreter cuts bfloat16 off."""
    check_same(*same_steps(*BASES[name], dtype=dtype, steps=2))


def one_entry_off(g):
    """As in DDP's buckets: a view that begins 4 bytes after what a wide load can read."""
    flat = torch.empty(g.numel() + 1, dtype=g.dtype)
    view = torch.as_strided(flat, g.shape, g.stride(), 1)
    return view.copy_(g)


@pytest.mark.parametrize("name", ["momentum", "amsgrad"])
@pytest.mark.parametrize("how", [{"layout": channels_last}, {"place": one_entry_off}], ids=["channels_last", "views"])
def test_the_update_on_any_layout_and_address(name, how, launches):
    shapes = [(4, 6, 3, 3), (2049,), ()]
    check_same(*same_steps(*BASES[name], shapes=shapes, steps=2, **how))
    parts = [x for x in launches if x in ("sgd", "adam")]
    assert len(parts) == 2  # one for each step: all of them are aligned, or none


def test_gradients_that_move_to_other_addresses_get_other_tables():
    """Aligned in one step, not in the next: what was compiled for 16 bytes must not read them."""
    calls = iter([as_it_is, as_it_is, as_it_is, one_entry_off, one_entry_off, one_entry_off] * 2)
    shapes = [(4, 6, 3, 3), (2049,), (5,)]
    check_same(*same_steps(*BASES["adam"], shapes=shapes, place=lambda g: next(calls)(g)))


@pytest.mark.parametrize("name", ["momentum", "nesterov", "adam", "adamw", "amsgrad"])
def test_found_inf_and_grad_scale_are_what_torchs_own_fused_update_makes_of_them(name):
    check_same(*same_steps(*BASES[name], amp=[(0.0, 1024.0), (1.0, 1024.0), (0.0, 512.0), (0.0, 3.0)]))


def pair(base, options):
    """SAM fused, and SAM that restores by copy, each with its closure over the same loss."""
    found = []
    for fused in (True, None):
        params = make(UPDATED)
        sam = SAM.wrap(base(params, fused=fused, **options), rho=0.05, fused=fused)
        found.append((params, sam, closure_of(params, sam)))
    return found


def closure_of(params, sam, is_bad=False):
    centres = [0.1 * g.grad for g in make(UPDATED)]

    def closure():
        sam.zero_grad()
        loss = sum(((p - c) ** 2).sum() for p, c in zip(params, centres, strict=True))
        loss.backward()
        if is_bad and sam.perturbation.active:
            params[3].grad[5] = math.nan
        return loss.detach()

    return closure


@pytest.mark.parametrize("name", ["momentum", "adamw"])
@pytest.mark.parametrize("how", ["closure", "two steps"])
def test_a_step_restores_in_its_update(name, how, launches):
    base, options = BASES[name]
    fused, plain = pair(base, options)
    for k in range(3):
        launches.clear()
        for _, sam, closure in (fused, plain):
            if how == "closure":
                sam.step(closure)
            else:
                closure()
                sam.first_step(zero_grad=True)
                closure()
                sam.second_step()
            assert not sam.perturbation.active
        update = ["nonfinite", *(["sgd"] if base is torch.optim.SGD else ["adam_steps", "adam"])]
        assert launches == ["norm_partials", "finalise", "perturb", *(update if k else [])]
    for p, q in zip(fused[0], plain[0], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_a_checkpoint_moves_between_fused_and_not(name):
    fused, plain = pair(*BASES[name])
    for _ in range(2):
        fused[1].step(fused[2])
    with torch.no_grad():
        for p, q in zip(fused[0], plain[0], strict=True):
            q.copy_(p)
    state = copy.deepcopy(fused[1].state_dict())
    for group in state["param_groups"]:
        group["fused"] = None
    plain[1].load_state_dict(state)
    for _, sam, closure in (fused, plain):
        sam.step(closure)
    for p, q in zip(fused[0], plain[0], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-6)


def test_a_descent_gradient_that_is_not_finite_leaves_weights_and_state():
    """As a device does it, where the flag goes to the kernels; and as the CPU does it."""
    (params, sam, closure), _ = pair(*BASES["amsgrad"])
    for _ in range(2):
        sam.step(closure)
    kept = [p.detach().clone() for p in params]
    state = [{k: v.clone() for k, v in sam.state[p].items()} for p in params]
    for p in params:
        p.grad = torch.full_like(p, math.nan)
        p.data.fill_(7.0)
    descent = Descent(sam.base_optimizer)
    descent.run(descent.update(params, kept), torch.tensor(1.0))
    for p, w, before in zip(params, kept, state, strict=True):
        assert torch.equal(p, w)
        assert all(torch.equal(sam.state[p][k], v) for k, v in before.items())
    sam.step(closure_of(params, sam, is_bad=True))
    assert sam.num_skipped == 1
    assert all(torch.equal(p, w) for p, w in zip(params, kept, strict=True))


@pytest.mark.parametrize("name", ["momentum", "adamw"])
def test_a_list_of_closures_restores_in_the_update_after_its_last(name, launches):
    """Between two of them by a copy, since the next ascent begins at w."""
    fused, plain = pair(*BASES[name])
    for k in range(3):
        launches.clear()
        for _, sam, closure in (fused, plain):
            sam.step([closure, closure])
            assert not sam.perturbation.active
        assert ("nonfinite" in launches) == bool(k)  # torch's own makes the state in the first
        assert launches.count("perturb") == 2
    for p, q in zip(fused[0], plain[0], strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


class Scaler:
    """What GradScaler leaves on a fused optimizer in `step`, as it does on a device."""

    def __init__(self, scale, found_inf=0.0):
        self.scale, self.found_inf = torch.tensor(scale), torch.tensor(found_inf)

    def step(self, sam):
        assert sam._step_supports_amp_scaling
        sam.grad_scale, sam.found_inf = self.scale, self.found_inf
        sam.step()
        del sam.grad_scale, sam.found_inf


@pytest.mark.parametrize("name", ["momentum", "adamw"])
@pytest.mark.parametrize("is_bad", [False, True])
def test_grad_scaler_in_two_steps_restores_in_the_update(name, is_bad, launches):
    """`first_step`, backward, `scaler.step(optimizer)`: nobody can look at the weights in between."""
    (params, sam, closure), (others, other, other_closure) = pair(*BASES[name])
    for k in range(3):
        closure()
        sam.first_step(zero_grad=True)
        closure()
        for p in params:
            p.grad.mul_(1024.0)
        before = [p.detach().clone() for p in others]
        launches.clear()
        Scaler(1024.0, float(is_bad and k == 2)).step(sam)
        assert not sam.perturbation.active
        assert ("sgd" in launches or "adam" in launches) == bool(k)
        assert "nonfinite" not in launches  # GradScaler has looked
        if is_bad and k == 2:
            assert all(torch.allclose(p, q, rtol=1e-5, atol=1e-5) for p, q in zip(params, before, strict=True))
        else:
            other.step(other_closure)
    for p, q in zip(params, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-5, atol=1e-5)


def test_what_runs_after_a_perturbed_context_sees_clean_weights():
    """So there the weights come back by a copy, and the update is the base's own."""
    (params, sam, closure), _ = pair(*BASES["momentum"])
    for _ in range(2):
        sam.step(closure)
    before = [p.detach().clone() for p in params]
    closure()
    with sam.perturbed():
        closure()
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))


@pytest.mark.parametrize("name", ["momentum", "amsgrad"])
def test_the_steady_state_of_a_whole_step_uploads_nothing_and_makes_no_table(name, monkeypatch):
    """Where gradients keep their addresses."""
    (params, sam, _), _ = pair(*BASES[name])
    grads = [p.grad for p in make(UPDATED)]

    def closure():
        sam.zero_grad()
        torch.ones((), requires_grad=True).mul(2.0).backward()
        for p, g in zip(params, grads, strict=True):
            p.grad = g
        return torch.zeros(())

    for _ in range(3):
        sam.step(closure)
    sent = []
    staged = tables.staged
    monkeypatch.setattr(tables, "staged", lambda values, *rest: sent.append(values) or staged(values, *rest))
    monkeypatch.setattr(tables, "constant", None)
    sam.step(closure)
    assert not sent
    sam.param_groups[0]["lr"] = 0.02
    sam.step(closure)
    assert len(sent) == 1  # the numbers of the groups


@pytest.mark.parametrize("name", ["momentum", "adam"])
def test_a_number_in_place_of_a_tensor_is_seen(name):
    """Also a zero: what stood there was another tensor's value."""
    base, options = BASES[name]
    (params, sam, closure), _ = pair(base, options | {"lr": torch.tensor(0.1), "weight_decay": 0.0})
    for _ in range(3):
        sam.step(closure)
    sam.param_groups[0]["lr"] = 0.0
    before = [p.detach().clone() for p in params]
    sam.step(closure)
    assert all(torch.equal(p, w) for p, w in zip(params, before, strict=True))


def test_after_an_interrupt_between_two_launches_infinities_are_still_found(monkeypatch):
    """The programs of the first have counted themselves, and those of the second never will."""
    (params, sam, closure), _ = pair(*BASES["momentum"])
    flats = [torch.zeros(p.numel() + 1) for p in params[:2]]
    is_bad = False

    def split():
        loss = closure()
        for p, flat in zip(params[:2], flats, strict=True):  # unaligned: a launch of their own
            p.grad = flat[1:].copy_(p.grad.flatten()).view_as(p)
        if is_bad and sam.perturbation.active:
            params[3].grad[5] = math.nan
        return loss

    for _ in range(2):
        sam.step(split)
    launch, seen = tables.launch, []

    def interrupted(kernel, *args, **constants):
        seen.append(kernel.fn.__name__)
        if seen.count("nonfinite") == 2:
            raise KeyboardInterrupt
        launch(kernel, *args, **constants)

    kept = [p.detach().clone() for p in params]
    monkeypatch.setattr(tables, "launch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        sam.step(split)
    monkeypatch.setattr(tables, "launch", launch)
    assert all(torch.equal(p, w) for p, w in zip(params, kept, strict=True))
    sam.step(split)
    assert not torch.equal(params[3], kept[3])
    kept, is_bad = [p.detach().clone() for p in params], True
    sam.step(split)
    assert int(sam.num_skipped) == 1
    assert all(torch.equal(p, w) for p, w in zip(params, kept, strict=True))


def test_gradients_are_not_held_on_to():
    """The next pass needs their memory."""
    (params, sam, closure), _ = pair(*BASES["adamw"])
    for _ in range(3):
        sam.step(closure)
    seen = [weakref.ref(p.grad) for p in params]
    sam.zero_grad()
    gc.collect()
    assert all(g() is None for g in seen)


# bytes, counted where they are read and written


@pytest.fixture
def moved_bytes(monkeypatch):
    """Bytes of whole blocks by kernel: what is read of tables, a few numbers for each 2048 entries, is left out."""
    from triton.runtime.interpreter import InterpreterBuilder

    found = {}
    launch, load, store = tables.launch, InterpreterBuilder.create_masked_load, InterpreterBuilder.create_masked_store
    current = [None]

    def launched(kernel, programs, *args, **constants):
        current[0] = kernel.fn.__name__
        found.setdefault(current[0], 0)
        launch(kernel, programs, *args, **constants)

    def count(pointers, mask):
        if pointers.data.size == tables.BLOCK:
            found[current[0]] += int(mask.data.sum()) * pointers.get_element_ty().primitive_bitwidth // 8

    def masked_load(self, pointers, mask, *rest, **options):
        count(pointers, mask)
        return load(self, pointers, mask, *rest, **options)

    def masked_store(self, pointers, value, mask, *rest, **options):
        count(pointers, mask)
        return store(self, pointers, value, mask, *rest, **options)

    monkeypatch.setattr(tables, "launch", launched)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", masked_load)
    monkeypatch.setattr(InterpreterBuilder, "create_masked_store", masked_store)
    return found


SGD_BYTES, ADAM_BYTES, AMSGRAD_BYTES = 20, 28, 36  # torch's own: w, g and the state read, w and the state written


@pytest.mark.parametrize(("adaptive", "ascent"), [(False, 20), (True, 24)])
@pytest.mark.parametrize(("name", "base"), [("momentum", SGD_BYTES), ("adamw", ADAM_BYTES), ("amsgrad", AMSGRAD_BYTES)])
def test_the_bytes_of_a_whole_step(adaptive, ascent, name, base, moved_bytes):
    factory, options = BASES[name]
    params = make([(2049,), (40, 30), ()])
    how = {"rho": 0.05, "adaptive": adaptive, "fused": True}
    sam = SAM.wrap(factory(params, fused=True, **options), nonfinite="ignore", **how)
    number = sum(p.numel() for p in params)

    def closure():
        sam.zero_grad()
        loss = sum((p**2).sum() for p in params)
        loss.backward()
        return loss.detach()

    for _ in range(2):
        moved_bytes.clear()
        sam.step(closure)
    by_kernel = {k: v / number for k, v in moved_bytes.items() if k not in ("finalise", "adam_steps")}
    update = "sgd" if factory is torch.optim.SGD else "adam"
    assert by_kernel == {"norm_partials": ascent - 16, "perturb": 16, update: base}
    checked = SAM.wrap(sam.base_optimizer, **how)
    sam = checked
    moved_bytes.clear()
    sam.step(closure)
    assert moved_bytes["nonfinite"] / number == 4


@pytest.mark.parametrize("where", ["second pass", "update"])
def test_a_fault_brings_the_weights_back(where, monkeypatch):
    (params, sam, closure), _ = pair(*BASES["momentum"])
    for _ in range(2):
        sam.step(closure)
    kept = [p.detach().clone() for p in params]
    launch = tables.launch

    def failing(kernel, programs, *args, **constants):
        if kernel.fn.__name__ == "sgd" and where == "update":
            raise RuntimeError("out of memory")
        launch(kernel, programs, *args, **constants)

    def closure_that_fails():
        loss = closure()
        if sam.perturbation.active and where == "second pass":
            raise RuntimeError("out of memory")
        return loss

    monkeypatch.setattr(tables, "launch", failing)
    with pytest.raises(RuntimeError, match="out of memory"):
        sam.step(closure_that_fails)
    assert not sam.perturbation.active
    assert all(torch.equal(p, w) for p, w in zip(params, kept, strict=True))
    monkeypatch.setattr(tables, "launch", launch)
    sam.step(closure)
    assert not torch.equal(params[0], kept[0])


def test_what_the_update_does_not_know_is_the_bases_own(launches):
    """A subclass may do anything; a parameter that only the ascent has seen must come back, too."""

    class Own(torch.optim.SGD):
        pass

    for base, drops in ((Own, False), (torch.optim.SGD, True)):
        (params, sam, closure), _ = pair(base, {"lr": 0.1, "momentum": 0.9})

        def second(params=params, sam=sam, closure=closure, drops=drops):
            loss = closure()
            if drops and sam.perturbation.active:
                params[0].grad = None
            return loss

        before = params[0].detach().clone()
        for _ in range(3):
            launches.clear()
            sam.step(second)
        assert "sgd" not in launches
        assert torch.equal(params[0], before) == drops
