"""Odd groups, odd buffers, odd orders of events: each of these was once wrong here or is in other packages."""

import copy
import gc
import math
import pickle
from contextlib import nullcontext
from functools import partial

import numpy
import pytest
import torch
from interrupts import interrupted_after
from torch import nn

from sam_optim import ASAM, SAM, Perturbation


def parameter(*values):
    return nn.Parameter(torch.tensor(values))


def squares(optimizer, *params):
    def closure():
        optimizer.zero_grad()
        loss = sum(p.square().sum() for p in params)
        loss.backward()
        return loss

    return closure


def assert_free(model):
    """No pass that has ended holds the parameters: another perturbation may take them."""
    for p in model.parameters():
        p.grad = torch.zeros_like(p)
    with Perturbation(model.parameters(), rho=0.0).perturbed():
        pass


@pytest.mark.parametrize("foreach", [None, True])
def test_two_norms_and_a_group_whose_gradient_is_zero(foreach):
    a, b = parameter(0.0, 0.0), parameter(1.0, 1.0)
    optimizer = SAM([{"params": [a]}, {"params": [b], "norm": math.inf}], lr=0.1, rho=0.05, foreach=foreach)
    optimizer.step(squares(optimizer, a, b))
    assert torch.equal(a, torch.zeros(2))
    torch.testing.assert_close(b.detach(), torch.full((2,), 1 - 0.1 * 2 * 1.05))
    assert optimizer.last_step.radius.item() == pytest.approx(0.05)


@pytest.mark.parametrize("foreach", [None, True])
def test_two_parameters_on_one_storage_are_moved_by_both_gradients(foreach):
    flat = torch.zeros(2)
    a, b = nn.Parameter(flat), nn.Parameter(flat)
    a.grad, b.grad = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
    with Perturbation([a, b], rho=1.0, foreach=foreach).perturbed():
        torch.testing.assert_close(flat, torch.full((2,), 0.5**0.5))
    assert torch.equal(flat, torch.zeros(2))


def test_an_optimizer_dropped_between_its_passes_brings_the_weights_back():
    model = nn.Linear(2, 2)
    before = model.weight.detach().clone()
    optimizer = SAM(model.parameters(), lr=0.1, rho=1.0, module=model)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.first_step(zero_grad=True)
    assert not torch.equal(model.weight, before)
    del optimizer
    assert torch.equal(model.weight, before)
    again = SAM(model.parameters(), lr=0.1)
    again.step(squares(again, *model.parameters()))


def test_a_weight_that_cannot_be_brought_back_does_not_stop_the_others():
    model = nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2))
    x = torch.randn(4, 2)
    sam = Perturbation(model, rho=1.0)
    model(x).square().sum().backward()
    weight, buffers = model[0].weight.detach().clone(), [b.clone() for b in model.buffers()]

    def second_pass():
        with sam.perturbed():
            model(x)
            model[0].bias.data = torch.zeros(5)

    with pytest.raises(RuntimeError, match="1 weights could not be restored"):
        second_pass()
    assert torch.equal(model[0].weight, weight)
    assert all(torch.equal(a, b) for a, b in zip(model.buffers(), buffers, strict=True))
    assert not sam.active
    assert_free(model)


@pytest.mark.parametrize("kind", ["expanded", "inference", "resized", "replaced"])
def test_buffers_of_every_kind(kind):
    class Model(nn.Linear):
        def forward(self, x):
            if kind == "resized":
                self.extra.resize_(5)
            if kind == "replaced":
                self.extra = torch.ones(3)
            return super().forward(x)

    model = Model(2, 2)
    with torch.inference_mode(kind == "inference"):
        model.register_buffer("extra", torch.arange(3.0))
    if kind == "expanded":
        model.extra = torch.arange(3.0).expand(4, 3)
    optimizer = SAM(model.parameters(), lr=0.1, rho=0.1, module=model)
    for _ in range(3):
        model(torch.ones(1, 2)).sum().backward()
        with optimizer.perturbed():
            model(torch.ones(1, 2)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
    expected = {"resized": (5,), "expanded": (4, 3)}.get(kind, (3,))
    assert model.extra.shape == expected
    if kind == "replaced":
        assert torch.equal(model.extra, torch.ones(3))
    elif kind != "resized":
        assert torch.equal(model.extra, torch.arange(3.0).expand(expected))


@pytest.mark.parametrize("how", ["head without gradient", "create_graph", "data.zero_", "set_to_none=False"])
def test_leftover_gradients_are_seen_where_they_are_and_only_there(how):
    a, b = parameter(1.0, 2.0), parameter(3.0)
    optimizer = SAM([a, b], lr=0.1)
    (a.square().sum() + b.sum()).backward()
    if how == "head without gradient":
        optimizer.zero_grad(set_to_none=False)
        a.square().sum().backward()  # b's gradient is 0

    def closure():
        if how == "data.zero_":
            for p in (a, b):
                if p.grad is not None:
                    p.grad.data.zero_()
        if how == "set_to_none=False":
            optimizer.zero_grad(set_to_none=False)
        loss = a.square().sum()
        loss.backward(create_graph=how == "create_graph")
        return loss

    if how in ("data.zero_", "set_to_none=False"):
        optimizer.step(closure)
        return
    expected = pytest.raises(RuntimeError, match="left gradients")
    with pytest.warns(UserWarning, match="create_graph") if how == "create_graph" else nullcontext(), expected:
        optimizer.step(closure)
    a.grad = None  # create_graph makes a cycle


def test_gradients_that_live_in_a_buffer_that_the_next_backward_writes_to():
    """DDP with gradient_as_bucket_view: `p.grad` is a view of a bucket that every backward fills anew."""
    plain, viewed, bucket = parameter(1.0, 2.0), parameter(1.0, 2.0), torch.zeros(2)
    for w in (plain, viewed):
        sam = Perturbation([w], rho=0.1)

        def backward(scale, w=w):
            (scale * w.square().sum()).backward()
            if w is viewed:
                bucket.copy_(w.grad)
                w.grad = bucket.view(2)

        for scale in (1.0, 2.0, 3.0):
            with sam.microbatch():
                backward(scale)
                with sam.perturbed():
                    backward(scale)
    assert torch.equal(plain.grad, viewed.grad)


def test_a_frozen_backbone_trains_its_head():
    a, b = parameter(1.0), parameter(1.0)
    optimizer = SAM([{"params": [a]}, {"params": [b], "rho": 0.0}], lr=0.1)
    optimizer.step(squares(optimizer, b))
    assert b.item() == pytest.approx(0.8)


def test_replayed_draws_are_those_of_this_step_also_after_a_batch_was_skipped():
    model = nn.Dropout(0.5)
    weight = nn.Parameter(torch.ones(100))
    optimizer = SAM([weight], lr=0.1, replay_rng=True, module=model)
    for o, m in ((optimizer, model), copy.deepcopy((optimizer, model))):
        w, masks = o.param_groups[0]["params"][0], []
        m(torch.ones(3))  # a batch that was given up
        o.zero_grad()
        for _ in range(2):
            masks.clear()
            masks.append(m(w))
            masks[-1].sum().backward()
            with o.perturbed():
                masks.append(m(w))
                masks[-1].sum().backward()
            o.step()
            o.zero_grad()
            assert torch.equal(masks[0] == 0, masks[1] == 0)


@pytest.mark.parametrize("fails", ["first pass", "second pass", "after both"])
def test_a_micro_batch_that_fails_may_be_left_out(fails):
    """Nothing of it is in the gradient of the others, in the tensors that they were in."""
    w = parameter(1.0, 2.0)
    sam = Perturbation([w], rho=0.1)

    def micro_batch(scale, fails=""):
        with sam.microbatch():
            (scale * w.square().sum()).backward()
            if fails == "first pass":
                raise torch.OutOfMemoryError
            with sam.perturbed():
                (scale * w.square().sum()).backward()
                if fails == "second pass":
                    raise torch.OutOfMemoryError
            if fails == "after both":
                raise torch.OutOfMemoryError

    micro_batch(1.0)
    grad = w.grad
    with pytest.raises(torch.OutOfMemoryError):
        micro_batch(100.0, fails)
    assert w.grad is grad
    micro_batch(2.0)
    start = torch.tensor([1.0, 2.0])
    torch.testing.assert_close(w.grad, 3 * 2 * (start + 0.1 * start / 5**0.5))


def test_gradients_of_a_second_pass_that_failed_do_not_point_the_next_ascent():
    w = parameter(1.0, 2.0)
    sam = Perturbation([w], rho=0.1)

    def second_pass(fails):
        with sam.perturbed():
            w.square().sum().backward()
            if fails:
                raise torch.OutOfMemoryError

    w.square().sum().backward()
    with pytest.raises(torch.OutOfMemoryError):
        second_pass(True)
    with pytest.raises(RuntimeError, match="no parameter has a gradient"):
        second_pass(False)


def test_gradients_of_the_first_pass_are_gone_in_the_second():
    """Their memory is what the second pass needs; step(closure) also lets those of the step before go."""
    w = nn.Parameter(torch.ones(12345))
    optimizer = SAM([w], lr=0.1)

    def closure():
        optimizer.zero_grad()
        counts.append(sum(type(x) in (torch.Tensor, nn.Parameter) and x.shape == (12345,) for x in gc.get_objects()))
        loss = w.square().sum()
        loss.backward()
        return loss

    for _ in range(3):
        counts = []
        optimizer.step(closure)
    first, second = counts
    assert second <= first + 1  # the clean weights, beside the perturbed ones


def test_last_step_forgets_what_it_no_longer_knows():
    w = parameter(1.0)
    optimizer = SAM([w], lr=0.1, rho=0.05)
    optimizer.step(squares(optimizer, w))
    assert optimizer.last_step.radius.item() == pytest.approx(0.05)
    assert not optimizer.last_step.loss.requires_grad
    optimizer.param_groups[0]["rho"] = 0.0
    optimizer.step(squares(optimizer, w))
    assert optimizer.last_step.radius == 0
    assert optimizer.last_step.dual_norm is None
    assert optimizer.last_step.sharpness == 0


def test_models_that_change_between_steps():
    model = nn.Linear(3, 200)
    optimizer = ASAM(model.parameters(), lr=0.01, rho=0.1, module=model)
    for change in (lambda: None, model.double, model.float, lambda: model.requires_grad_(False), model.requires_grad_):
        change()
        dtype = model.weight.dtype
        before, where = model.weight.detach().clone(), model.weight.data_ptr()

        def closure(dtype=dtype):
            optimizer.zero_grad()
            loss = model(torch.ones(2, 3, dtype=dtype)).square().sum()
            if loss.requires_grad:
                loss.backward()
            return loss

        optimizer.step(closure)
        assert model.weight.dtype == dtype
        assert model.weight.data_ptr() == where
        assert torch.equal(model.weight, before) == (not model.weight.requires_grad)


@pytest.mark.parametrize("foreach", [None, True])
def test_a_parameter_that_is_cut_short_in_its_own_storage(foreach):
    """Pruning by `p.data = p.data[:k]`: the same address, strides and dtype, another shape."""
    w = nn.Parameter(torch.ones(10))
    sam = Perturbation([w], rho=1.0, foreach=foreach)
    for length in (10, 4):
        w.data, w.grad = w.data[:length], None
        w.square().sum().backward()
        with sam.perturbed():
            torch.testing.assert_close(w.detach(), torch.full((length,), 1 + length**-0.5))
        assert torch.equal(w, torch.ones(length))


def test_wrapping_again_takes_the_new_radius():
    w = parameter(1.0)
    base = torch.optim.SGD([w], lr=0.1)
    SAM.wrap(base, rho=0.05)
    assert ASAM.wrap(base, rho=0.5).ball.rho == 0.5
    assert ASAM.wrap(base).ball.adaptive == "elementwise"

    class Mine(SAM):
        def __init__(self, params, **kwargs):
            super().__init__(params, **kwargs)

    assert Mine.wrap(base, rho=0.2).ball.rho == 0.2


def test_groups_as_torch_takes_them():
    p, q = parameter(1.0), parameter(2.0)
    with pytest.raises(TypeError):
        SAM([{"params": {p, q}}], lr=0.1)
    group = {"params": (x for x in (p, q))}
    assert SAM([group], lr=0.1).param_groups[0] is group
    with pytest.raises(ValueError, match="listed twice"):
        Perturbation([p, q, p])
    assert SAM([p], lr=0.1, rho=numpy.float32(0.05)).ball.rho == pytest.approx(0.05)
    with pytest.raises(TypeError, match="expected a closure"):
        SAM([p], lr=0.1).step(torch.ones(()))


def test_a_model_is_not_copied_while_it_is_perturbed_and_its_parts_give_clean_weights():
    model = nn.Sequential(nn.Sequential(nn.Linear(2, 2)), nn.Linear(2, 1))
    clean = {k: v.clone() for k, v in model[0].state_dict().items()}
    sam = Perturbation(model, rho=1.0)
    model(torch.ones(1, 2)).sum().backward()
    with sam.perturbed():
        assert all(torch.equal(v, clean[k]) for k, v in model[0].state_dict().items())
        for copying in (copy.deepcopy, pickle.dumps):
            with pytest.raises(RuntimeError, match="weights are perturbed"):
                copying(model)
        model(torch.ones(1, 2)).sum().backward()
    copy.deepcopy(model), pickle.dumps(model)


@pytest.mark.parametrize("adaptive", [True, "filter", "layer"])
def test_complex_weights_in_every_geometry(adaptive):
    w = nn.Parameter(torch.randn(3, 2, dtype=torch.complex64))
    before = w.detach().clone()
    optimizer = SAM([w], torch.optim.SGD, lr=0.0, rho=0.1, adaptive=adaptive)

    def closure():
        optimizer.zero_grad()
        loss = (w * w.conj()).real.sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    assert optimizer.last_step.sharpness > 0
    assert torch.equal(w, before)


@pytest.mark.parametrize("rho", [torch.tensor(0.1), torch.tensor([0.1])], ids=str)
@pytest.mark.parametrize("foreach", [None, True])
def test_a_radius_in_a_tensor(rho, foreach):
    w, zero_d = parameter(3.0, 4.0), nn.Parameter(torch.tensor(0.0))
    w.grad, zero_d.grad = torch.tensor([3.0, 4.0]), torch.tensor(0.0)
    with Perturbation([w, zero_d], rho=rho, foreach=foreach).perturbed():
        torch.testing.assert_close(w.detach(), torch.tensor([3.06, 4.08]))


@pytest.mark.parametrize("stride", [5, pytest.param(1, marks=pytest.mark.slow)])
def test_ctrl_c_at_any_line_of_a_step_leaves_the_state_before_it_or_after_it(stride):
    """KeyboardInterrupt at every line that a step runs in this package and in the contexts of Python and torch."""
    places = ("sam_optim", "contextlib", "_contextlib", "grad_mode")
    x = torch.randn(8, 3, generator=torch.Generator().manual_seed(0))

    def make():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2))
        optimizer = SAM(model.parameters(), torch.optim.SGD, lr=0.1, momentum=0.9, rho=0.5, module=model)

        def closure():
            for p in model.parameters():
                p.grad = None
            loss = model(x).square().sum()
            loss.backward()
            return loss

        return model, optimizer, closure

    def state(model):
        return [t.detach().clone() for t in (*model.parameters(), *model.buffers())]

    def same(a, b):
        return all(torch.equal(s, t) for s, t in zip(a, b, strict=True))

    model, optimizer, closure = make()
    before = state(model)
    optimizer.step(closure)
    after = state(model)
    for lines in range(0, 3000, stride):
        model, optimizer, closure = make()
        try:
            if not interrupted_after(lines, places, partial(optimizer.step, closure)):
                break
            now = state(model)
            assert same(now, before) or same(now, after), f"a mixture after line {lines}"
            assert not optimizer.perturbation.active
            assert_free(model)
        finally:
            torch.set_grad_enabled(True)  # torch's own contexts were interrupted, too
    assert lines > 500


def test_gradients_that_a_closure_puts_back_after_zeroing_are_its_own():
    """The same tensors in each call: not left from before, since zero_grad has taken them away."""
    w = parameter(1.0, 2.0)
    optimizer = SAM([w], lr=0.1, rho=1.0)
    grad, seen = torch.tensor([3.0, 4.0]), []

    def closure():
        optimizer.zero_grad()
        seen.append(w.detach().clone())
        w.grad = grad
        return w.detach().sum()

    for _ in range(2):
        optimizer.step(closure)
    assert torch.equal(seen[2], w.detach() + 0.1 * grad)
    torch.testing.assert_close(seen[3] - seen[2], torch.tensor([0.6, 0.8]))


@pytest.mark.parametrize("shapes", [[(0, 1)], [(0,), (3, 0)], [(0,), (2,)]], ids=str)
@pytest.mark.parametrize("foreach", [None, False, True])
def test_parameters_without_entries(shapes, foreach):
    params = [nn.Parameter(torch.ones(s)) for s in shapes]
    optimizer = SAM(params, torch.optim.SGD, lr=0.1, momentum=0.9, foreach=foreach)
    for _ in range(2):
        optimizer.step(squares(optimizer, *params))
    assert all(p.isfinite().all() for p in params)


def test_an_ascent_of_its_own_has_no_sharpness():
    """The difference of two losses on different examples is none."""
    w = parameter(1.0, 2.0)
    optimizer = SAM([w], lr=0.1, rho=0.5)
    optimizer.step(squares(optimizer, w), ascent_closure=squares(optimizer, w))
    assert optimizer.last_step.sharpness is None
    assert optimizer.last_step.loss is not None
    optimizer.step(squares(optimizer, w))
    assert optimizer.last_step.sharpness > 0
