"""The contrast of single batches with their mean, for measures that are not linear in the loss."""

import functools
import json
import math

import pytest
import torch
from networks import NETWORKS, Dense, batches, flat, mlp, network
from quadratic import Quadratic, mean, symmetric
from test_golden import GOLDEN, loss_of
from test_gradients import FACTORS, relu_mlp, rescaled
from torch import nn

from sam_optim.core.geometry import Ball
from sam_optim.loss import Loss
from sam_optim.measures import (
    average_sharpness,
    contrastive_sharpness,
    fisher_rao_norm,
    hessian_eigenvalues,
    hessian_trace,
    relative_flatness,
    worst_case_sharpness,
)

SIZES = (5, 5, 2)
cross_entropy = nn.CrossEntropyLoss()


def gradient_norm(loss):
    return float(flat(loss.gradient()).norm())


def joined(data):
    return torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])


@pytest.mark.parametrize("kind", NETWORKS)
def test_contrast_is_the_ratio_of_dense_eigenvalues(kind):
    model, data = network(kind).eval(), batches(kind, SIZES)

    def largest(batch):
        return float(torch.linalg.eigvalsh(Dense(model, cross_entropy, batch).matrix("hessian"))[-1])

    parts = [largest(batch) for batch in data]
    ratio = sum(n * x for n, x in zip(SIZES, parts, strict=True)) / 12 / largest(joined(data))
    result = contrastive_sharpness(hessian_eigenvalues, Loss(model, cross_entropy, data), tol=1e-8)
    assert result.value == pytest.approx(ratio, rel=1e-8)
    assert result.value > 1  # the largest eigenvalue is convex
    assert result.converged
    assert result.settings["of"] == "hessian_eigenvalues"
    assert result.settings["arguments"] == {"tol": 1e-8}
    assert result.details["batch_values"] == pytest.approx(parts, rel=1e-8)
    p = torch.tensor(SIZES, dtype=torch.float64) / 12
    average = float(p @ torch.tensor(parts, dtype=torch.float64))
    spread = 3 / 2 * sum(float(q) ** 2 * (x - average) ** 2 for q, x in zip(p, parts, strict=True))
    assert result.stderr == pytest.approx(math.sqrt(spread) / largest(joined(data)), rel=1e-6)


def test_the_whole_is_one_unit():
    """m-sharpness of the mean loss has one perturbation for all examples, however they are batched."""
    model, data = network(mlp), batches(mlp, SIZES)
    result = contrastive_sharpness(worst_case_sharpness, Loss(model, cross_entropy, data), ball=Ball(0.05))
    whole = worst_case_sharpness(Loss(model, cross_entropy, [joined(data)]), Ball(0.05)).value
    parts = worst_case_sharpness(Loss(model, cross_entropy, data), Ball(0.05))
    assert result.details["whole"] == pytest.approx(whole, rel=1e-9)
    assert result.value == pytest.approx(parts.value / whole, rel=1e-9)
    assert result.value > 1


def test_contrast_tells_scattered_minima_from_similar_ones():
    """Quadratics of one curvature: the eigenvalue does not see where the minima are, the gradient norm does."""
    model = Quadratic(symmetric([3.0, 1.0, 0.2]), None, torch.ones(3, dtype=torch.float64))
    x = torch.tensor([[1.0, -2.0, 0.5]], dtype=torch.float64)
    near, far = (Loss(model, mean, [(s * x, x), (-s * x, x)]) for s in (0.01, 3.0))
    assert contrastive_sharpness(hessian_eigenvalues, far).value == pytest.approx(1, rel=1e-6)
    assert 1 <= contrastive_sharpness(gradient_norm, near).value < 1.001
    assert contrastive_sharpness(gradient_norm, far).value > 1.1


@pytest.mark.parametrize(
    ("measure", "arguments"),
    [
        (hessian_trace, {}),
        (average_sharpness, {"ball": Ball(0.1)}),
        (fisher_rao_norm, {}),
        (relative_flatness, {"layer": "0"}),
        (functools.partial(hessian_trace, num_probes=5), {}),
        (lambda loss: hessian_trace(loss, num_probes=5), {}),
    ],
    ids=["trace", "average", "fisher-rao", "relative", "partial", "lambda"],
)
def test_linear_measures_are_refused(measure, arguments):
    with pytest.raises(ValueError, match="is linear in the loss"):
        contrastive_sharpness(measure, Loss(network(mlp), cross_entropy, batches(mlp)), **arguments)


def test_a_measure_can_say_that_it_is_linear():
    def value(loss):
        return float(loss.value())

    loss = Loss(network(mlp), cross_entropy, batches(mlp))
    assert contrastive_sharpness(value, loss).value == pytest.approx(1, rel=1e-12)
    value.linear = True
    with pytest.raises(ValueError, match="value is linear"):
        contrastive_sharpness(value, loss)


def test_what_is_linear_is_1():
    """Why they are refused: the mean over batches is the value of the mean."""
    loss = Loss(network(mlp), cross_entropy, batches(mlp, SIZES))
    for measure, arguments in (
        (hessian_trace, {"num_probes": 4}),
        (average_sharpness, {"ball": Ball(0.1), "num_samples": 4}),
        (fisher_rao_norm, {}),
        (relative_flatness, {"layer": "0"}),
    ):
        parts = [measure(single, **arguments).value for single in loss.single_batches()]
        average = sum(n * x for n, x in zip(SIZES, parts, strict=True)) / 12
        assert average == pytest.approx(measure(loss, **arguments).value, rel=1e-10)


def test_a_ratio_is_invariant_where_its_parts_are_not():
    """One factor for the whole network multiplies every curvature alike: with rho in units of T, and one layer."""
    data = batches(mlp, (20, 20))
    losses = [Loss(m, cross_entropy, data) for m in (network(relu_mlp), rescaled(network(relu_mlp), FACTORS))]
    relative = Ball(0.0, adaptive=True, eta=0.0)
    before, after = (contrastive_sharpness(hessian_eigenvalues, loss, ball=relative, tol=1e-8).value for loss in losses)
    assert after == pytest.approx(before, rel=1e-7)


def test_what_has_not_converged_is_said():
    loss = Loss(network(mlp), cross_entropy, batches(mlp))
    result = contrastive_sharpness(hessian_eigenvalues, loss, max_products=2)
    assert not result.converged
    assert "hessian_eigenvalues" in result.reason
    zero = contrastive_sharpness(lambda loss: 0.0, loss)
    assert math.isnan(zero.value)
    assert "is 0" in zero.reason
    data = batches(mlp)
    data[1] = (data[1][0] * torch.nan, data[1][1])
    broken = contrastive_sharpness(gradient_norm, Loss(network(mlp), cross_entropy, data))
    assert math.isnan(broken.value)
    assert not broken.converged
    assert json.loads(json.dumps(broken.to_dict(), allow_nan=False))["value"] is None


def test_wrong_arguments_are_refused():
    data = batches(mlp)
    with pytest.raises(ValueError, match="split it"):
        contrastive_sharpness(gradient_norm, Loss(network(mlp), cross_entropy, data[:1]))
    with pytest.raises(TypeError, match="list"):
        contrastive_sharpness(lambda loss: [1.0], Loss(network(mlp), cross_entropy, data))


def test_the_standard_error_over_random_partitions():
    """200 partitions of 60 examples, M(L) fixed: the spread of the contrast of the gradient norm."""
    model, (x, y) = network(mlp).eval(), batches(mlp, (60,))[0]
    single = Loss(model, cross_entropy, list(zip(x.split(1), y.split(1), strict=True)))
    g = torch.stack([flat(part.gradient()) for part in single.single_batches()])
    loss, result = Loss(model, cross_entropy, list(zip(x.split(5), y.split(5), strict=True))), []
    for seed in range(200):
        order = torch.randperm(60, generator=torch.Generator().manual_seed(seed))
        norms = iter([g.mean(0).norm(), *(part.mean(0).norm() for part in g[order].split(5))])
        result.append(contrastive_sharpness(lambda loss, norms=norms: next(norms), loss))
    values = torch.tensor([f.value for f in result], dtype=torch.float64)
    errors = torch.tensor([f.stderr for f in result], dtype=torch.float64)
    inside = ((values - values.mean()).abs() < errors).double().mean()
    assert inside > 0.54  # at least the nominal rate: batches of one partition are not independent
    assert ((values - values.mean()).abs() > 4 * errors).sum() <= 1
    assert errors.square().mean().sqrt() < 2 * values.std()


@pytest.mark.skipif(not GOLDEN.exists(), reason=f"the golden values are not at {GOLDEN}")
def test_golden_contrast():
    exact = json.loads((GOLDEN / "mlp.json").read_text())["exact"]
    loss, expected = loss_of(128), exact["contrastive_even_4x128"]
    result = contrastive_sharpness(hessian_eigenvalues, loss)
    assert result.value == pytest.approx(expected["lambda_max_ratio"], rel=1e-6)
    assert result.details["batch_values"] == pytest.approx(expected["batch_lambda_max"], rel=1e-6)
    result = contrastive_sharpness(gradient_norm, loss)
    assert result.value == pytest.approx(exact["regret"]["even_4x128"]["norm_ratio_mean_batch_over_full"], rel=1e-11)


@pytest.mark.slow
@pytest.mark.skipif(not GOLDEN.exists(), reason=f"the golden values are not at {GOLDEN}")
def test_golden_contrast_of_the_frobenius_norm():
    """From all columns of the Hessians."""

    def frobenius(loss):
        squares = []
        with loss.curvature() as product:
            for i in range(sum(w.numel() for w in loss.params)):
                e = [torch.zeros(w.numel(), dtype=w.dtype) for w in loss.params]
                k = i
                for part in e:
                    if k < len(part):
                        part[k] = 1
                        break
                    k -= len(part)
                v = product([part.view(w.shape) for part, w in zip(e, loss.params, strict=True)])
                squares.append(float(flat(v).square().sum()))
        return math.sqrt(math.fsum(squares))

    expected = json.loads((GOLDEN / "mlp.json").read_text())["exact"]["contrastive_even_4x128"]
    result = contrastive_sharpness(frobenius, loss_of(128))
    assert result.value == pytest.approx(expected["frobenius_ratio"], rel=1e-11)
