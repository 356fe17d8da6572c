"""The regret between batches against the formula, pair by pair."""

import itertools
import json
import math

import pytest
import torch
from networks import NETWORKS, Dense, batches, flat, mlp, network
from quadratic import Quadratic, mean, shifted, symmetric
from torch import nn

from sam_optim.loss import Loss
from sam_optim.measures import gradient_regret

EPS = torch.finfo(torch.float64).eps
SIZES = (5, 5, 2, 3)
cross_entropy = nn.CrossEntropyLoss()


def regret(g1, g2, inverse):
    n1, n2 = (g1 @ inverse @ g1).sqrt(), (g2 @ inverse @ g2).sqrt()
    return float(n2 * (1 - g1 @ inverse @ g2 / (n1 * n2)))


def mean_over_pairs(gradients, inverse, sizes):
    pairs = list(itertools.permutations(range(len(sizes)), 2))
    weights = [sizes[i] * sizes[j] for i, j in pairs]
    regrets = [regret(gradients[i], gradients[j], inverse) for i, j in pairs]
    return sum(w * r for w, r in zip(weights, regrets, strict=True)) / sum(weights)


def jackknife(gradients, inverse, sizes):
    kept = [[i for i in range(len(sizes)) if i != b] for b in range(len(sizes))]
    left = torch.tensor([mean_over_pairs([gradients[i] for i in k], inverse, [sizes[i] for i in k]) for k in kept])
    return float(((len(sizes) - 1) * left.double().var(unbiased=False)).sqrt())


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("metric", ["euclidean", "fisher"])
def test_regret_is_the_formula(kind, metric):
    model, data = network(kind).eval(), batches(kind, SIZES)
    gradients = [flat(Loss(model, cross_entropy, [batch]).gradient()) for batch in data]
    inverse = torch.eye(len(gradients[0]), dtype=torch.float64)
    if metric == "fisher":
        joined = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
        inverse = torch.linalg.inv(Dense(model, cross_entropy, joined).matrix("ggn") + 1e-2 * inverse)
    own = {"damping": 1e-2, "tol": 1e-8} if metric == "fisher" else {}
    found = gradient_regret(Loss(model, cross_entropy, data), metric=metric, **own)
    assert found.value == pytest.approx(mean_over_pairs(gradients, inverse, SIZES), rel=1e-6)
    assert found.stderr == pytest.approx(jackknife(gradients, inverse, SIZES), rel=1e-5)
    norms = [math.sqrt(float(g @ inverse @ g)) for g in gradients]
    assert found.details["norms"] == pytest.approx(norms, rel=1e-6)
    assert found.details["mean_norm"] == pytest.approx(sum(n * s for n, s in zip(norms, SIZES, strict=True)) / 15)
    full = flat(Loss(model, cross_entropy, data).gradient())
    assert found.details["gradient_norm"] == pytest.approx(math.sqrt(float(full @ inverse @ full)), rel=1e-5)
    assert found.converged


def test_regret_of_a_quadratic():
    """g_b = A (w - m - mean x_b)."""
    model = Quadratic(symmetric([3.0, 1.0, 0.2]), None, torch.ones(3, dtype=torch.float64))
    loss = shifted(model, [3, 1, 2])
    gradients = [model.a @ (model.w.detach() - x.mean(0)) for x, _ in loss._batches]
    found = gradient_regret(loss)
    assert found.value == pytest.approx(mean_over_pairs(gradients, torch.eye(3).double(), [3, 1, 2]), rel=1e3 * EPS)


def test_regret_is_what_a_small_step_forgoes():
    """The definition itself: l_2 at the minimum of l_1 in a small ball, less its own minimum there."""
    loss, eps = Loss(network(mlp), cross_entropy, batches(mlp, (6, 6))), 1e-6
    gradients = [single.gradient() for single in loss.single_batches()]
    norms, values = [flat(g).norm() for g in gradients], []
    for own, other in ((0, 1), (1, 0)):
        with loss.displaced([-eps / norms[own] * x for x in gradients[own]]):
            there = loss.batch_values()[other]
        with loss.displaced([-eps / norms[other] * x for x in gradients[other]]):
            best = loss.batch_values()[other]
        values.append(float(there - best) / eps)
    assert gradient_regret(loss).value == pytest.approx(sum(values) / 2, rel=1e-4)


def test_batches_that_agree_have_no_regret():
    x = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    model = Quadratic(symmetric([3.0, 1.0, 0.2]))
    found = gradient_regret(Loss(model, mean, [(x, x), (x, x), (x, x)]))
    assert abs(found.value) <= 10 * EPS * found.details["mean_norm"]
    assert found.details["mean_cosine"] == pytest.approx(1, rel=10 * EPS)


def test_a_batch_without_a_gradient_leaves_the_weights_where_they_are():
    x = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    model = Quadratic(symmetric([3.0, 1.0, 0.2]))
    for metric in ("euclidean", "fisher"):
        found = gradient_regret(Loss(model, mean, [(x, x), (0 * x, x)]), metric=metric)
        assert found.value == pytest.approx(found.details["norms"][0] / 2, rel=10 * EPS)
        assert found.converged
        assert math.isnan(found.stderr)


def test_conjugate_gradients_that_stop_early_say_so():
    found = gradient_regret(Loss(network(mlp), cross_entropy, batches(mlp)), metric="fisher", max_products=2)
    assert not found.converged
    assert max(found.details["residuals"]) > 1e-4
    assert "conjugate gradients" in found.reason
    assert math.isfinite(found.value)


@pytest.mark.parametrize("metric", ["euclidean", "fisher"])
def test_what_is_not_finite_is_not_a_number(metric):
    data = batches(mlp)
    data[1] = (data[1][0] * torch.nan, data[1][1])
    found = gradient_regret(Loss(network(mlp), cross_entropy, data), metric=metric)
    assert math.isnan(found.value)
    assert not found.converged
    assert "finite" in found.reason
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["value"] is None


def test_results_say_how_they_were_made():
    loss, seen = Loss(network(mlp), cross_entropy, batches(mlp)), []
    found = gradient_regret(loss, metric="fisher", progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i, 6) for i in range(1, 7)]
    settings = json.loads(json.dumps(found.to_dict(), allow_nan=False))["settings"]
    assert settings | {"metric": "fisher", "damping": 1e-3, "m": 5, "n": 12} == settings
    assert found == gradient_regret(loss, metric="fisher")
    assert "damping" not in gradient_regret(loss).settings


def test_wrong_arguments_are_refused():
    data = batches(mlp)
    with pytest.raises(ValueError, match="split it"):
        gradient_regret(Loss(network(mlp), cross_entropy, data[:1]))
    for wrong in ({"metric": "hyperbolic"}, {"damping": 0.0}, {"tol": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            gradient_regret(Loss(network(mlp), cross_entropy, data), **wrong)
