"""Weights in bfloat16 and float16: every number is that of a float32 copy, and the model is left as it was found."""

import copy

import pytest
import torch
from networks import Dense, batches, cnn, flat, like, mlp, network
from torch import nn

from sam_optim import (
    Ball,
    average_sharpness,
    critical_sharpness,
    gradient_regret,
    hessian_eigenvalues,
    hessian_trace,
    pac_bayes_sigma,
    worst_case_sharpness,
)
from sam_optim.core.geometry import ProductBall
from sam_optim.loss import Loss

cross_entropy = nn.CrossEntropyLoss()
HALVES = (torch.bfloat16, torch.float16)
MEASURES = {
    "average": lambda loss: average_sharpness(loss, Ball(1e-3), num_samples=10).value,
    "average, adaptive": lambda loss: average_sharpness(loss, Ball(1e-3, adaptive=True), num_samples=10).value,
    "worst": lambda loss: worst_case_sharpness(loss, Ball(1e-3), num_steps=5).value,
    "eigenvalue": lambda loss: float(hessian_eigenvalues(loss).eigenvalues),
    "trace": lambda loss: hessian_trace(loss, num_probes=30).value,
    "critical": lambda loss: critical_sharpness(loss).value,
    "regret": lambda loss: gradient_regret(loss).value,
    "sigma": lambda loss: pac_bayes_sigma(loss, target=1e-3, num_samples=4).value,
}


def everything(model):
    return [(x.dtype, x.data_ptr(), x.detach().clone()) for x in (*model.parameters(), *model.buffers())]


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("kind", [mlp, cnn])
@pytest.mark.parametrize("name", MEASURES)
def test_measures_are_those_of_a_float32_copy(name, kind, dtype):
    """A displacement of 1e-3 is below the rounding of most of these weights."""
    model = network(kind).to(dtype)
    data = [(x.float(), y) for x, y in batches(kind)]  # the same for both, as are draws that depend on them
    before = everything(model)
    value = MEASURES[name](Loss(model, cross_entropy, data))
    expected = MEASURES[name](Loss(copy.deepcopy(model).float(), cross_entropy, data))
    assert value == expected
    for (*a, x), (*b, y) in zip(before, everything(model), strict=True):
        assert a == b
        assert torch.equal(x, y)


@pytest.mark.parametrize("matrix", ["hessian", "ggn", "empirical_fisher"])
def test_products_and_displaced_values_against_dense_float64(matrix):
    model = network(mlp).bfloat16()
    data = [(x.bfloat16(), y) for x, y in batches(mlp)]
    loss = Loss(model, cross_entropy, data)
    whole = torch.cat([x for x, _ in data]).double(), torch.cat([y for _, y in data])
    dense = Dense(copy.deepcopy(model).double().eval(), cross_entropy, whole)
    v = torch.linspace(-1, 1, len(dense.w), dtype=torch.float64)
    with loss.curvature(matrix) as product:
        result = flat(product(like(v.float(), loss.params)))
    torch.testing.assert_close(result.double(), dense.matrix(matrix) @ v, rtol=1e-4, atol=1e-6)
    with loss.displaced(like(1e-4 * v.float(), loss.params)):
        rise = float(loss.value())
    assert rise == pytest.approx(float(dense.loss(dense.w + 1e-4 * v)), rel=1e-6)
    assert loss.settings()["dtype"] == "bfloat16, in float32"


def test_the_ball_of_an_optimizer_and_weights_that_go_on_moving():
    model = network(mlp).bfloat16()
    data = [(x.bfloat16(), y) for x, y in batches(mlp)]
    loss, ball = Loss(model, cross_entropy, data), ProductBall([(Ball(0.1), list(model.parameters()))])
    first = worst_case_sharpness(loss, ball, num_steps=3)
    assert first.value > 0
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(2)
    wide = copy.deepcopy(model).float()
    expected = Loss(wide, cross_entropy, [(x.float(), y) for x, y in data])
    assert float(loss.value()) == float(expected.value())


class Failing(nn.Module):
    def __init__(self, inner):
        super().__init__()
        self.inner = inner

    def forward(self, x):
        assert self.inner[0].weight.dtype == torch.float32
        raise KeyboardInterrupt


def test_an_interrupt_leaves_the_halves_as_they_were():
    model = Failing(network(mlp).half())
    before = everything(model)
    with pytest.raises(KeyboardInterrupt):
        Loss(model, cross_entropy, [(x.half(), y) for x, y in batches(mlp)]).value()
    for (*a, x), (*b, y) in zip(before, everything(model), strict=True):
        assert a == b
        assert torch.equal(x, y)


def hooked(model, calls):
    """Both kinds of hooks on gradients of parameters."""
    for name, p in model.named_parameters():
        p.register_post_accumulate_grad_hook(lambda _, name=name: calls.append(("accumulated", name)))
        p.register_hook(lambda g, name=name: calls.append(("gradient", name)) or g.clamp(-1e-3, 1e-3))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("autocast", [False, True], ids=["", "autocast"])
def test_hooks_on_gradients_run_in_training_alone(name, dtype, autocast):
    calls, model = [], network(mlp).to(dtype).eval()
    data = [(x.to(dtype), y) for x, y in batches(mlp)]
    with torch.autocast("cpu", enabled=autocast):
        expected = MEASURES[name](Loss(copy.deepcopy(model), cross_entropy, data))
        twin = copy.deepcopy(model)
        hooked(model, calls)
        hooked(twin, [])
        assert MEASURES[name](Loss(model, cross_entropy, data)) == expected
        assert not calls
        for each in (model, twin):
            cross_entropy(each(data[0][0]).float(), data[0][1]).backward()
    assert len(calls) == 2 * len(list(model.parameters()))
    for p, q in zip(model.parameters(), twin.parameters(), strict=True):
        assert torch.equal(p.grad, q.grad)
