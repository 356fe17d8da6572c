"""Regret, coherence and noise scale against their formulas, pair by pair, example by example."""

import copy
import itertools
import json
import math

import pytest
import torch
from networks import NETWORKS, Dense, batches, flat, mlp, network
from quadratic import Quadratic, mean, shifted, symmetric
from test_golden import GOLDEN, loss_of
from torch import nn

from sam_optim.core.geometry import Ball
from sam_optim.core.random import Stream
from sam_optim.loss import Loss
from sam_optim.measures import gradient_coherence, gradient_noise_scale, gradient_regret
from sam_optim.measures import gradients as gradients_module
from sam_optim.measures import gram as gram_module
from sam_optim.measures.conjugate_gradient import damped_share

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
    result = gradient_regret(Loss(model, cross_entropy, data), metric=metric, **own)
    assert result.value == pytest.approx(mean_over_pairs(gradients, inverse, SIZES), rel=1e-6)
    assert result.stderr == pytest.approx(jackknife(gradients, inverse, SIZES), rel=1e-5)
    norms = [math.sqrt(float(g @ inverse @ g)) for g in gradients]
    assert result.details["norms"] == pytest.approx(norms, rel=1e-6)
    assert result.details["mean_norm"] == pytest.approx(sum(n * s for n, s in zip(norms, SIZES, strict=True)) / 15)
    full = flat(Loss(model, cross_entropy, data).gradient())
    assert result.details["gradient_norm"] == pytest.approx(math.sqrt(float(full @ inverse @ full)), rel=1e-5)
    assert result.converged


def test_regret_of_a_quadratic():
    """g_b = A (w - m - mean x_b)."""
    model = Quadratic(symmetric([3.0, 1.0, 0.2]), None, torch.ones(3, dtype=torch.float64))
    loss = shifted(model, [3, 1, 2])
    gradients = [model.a @ (model.w.detach() - x.mean(0)) for x, _ in loss._batches]
    result = gradient_regret(loss)
    assert result.value == pytest.approx(mean_over_pairs(gradients, torch.eye(3).double(), [3, 1, 2]), rel=1e3 * EPS)


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
    result = gradient_regret(Loss(model, mean, [(x, x), (x, x), (x, x)]))
    assert abs(result.value) <= 10 * EPS * result.details["mean_norm"]
    assert result.details["mean_cosine"] == pytest.approx(1, rel=10 * EPS)


def test_a_batch_without_a_gradient_leaves_the_weights_where_they_are():
    x = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    model = Quadratic(symmetric([3.0, 1.0, 0.2]))
    for metric in ("euclidean", "fisher"):
        result = gradient_regret(Loss(model, mean, [(x, x), (0 * x, x)]), metric=metric)
        assert result.value == pytest.approx(result.details["norms"][0] / 2, rel=10 * EPS)
        assert result.converged
        assert math.isnan(result.stderr)


def test_conjugate_gradients_that_stop_early_say_so():
    result = gradient_regret(Loss(network(mlp), cross_entropy, batches(mlp)), metric="fisher", max_products=2)
    assert not result.converged
    assert max(result.details["residuals"]) > 1e-4
    assert "conjugate gradients" in result.reason
    assert math.isfinite(result.value)


@pytest.mark.parametrize("metric", ["euclidean", "fisher"])
def test_what_is_not_finite_is_not_a_number(metric):
    data = batches(mlp)
    data[1] = (data[1][0] * torch.nan, data[1][1])
    result = gradient_regret(Loss(network(mlp), cross_entropy, data), metric=metric)
    assert math.isnan(result.value)
    assert not result.converged
    assert "is nan at the weights" in result.reason
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["value"] is None


def test_results_say_how_they_were_made():
    loss, seen = Loss(network(mlp), cross_entropy, batches(mlp)), []
    result = gradient_regret(loss, metric="fisher", progress=lambda done, total: seen.append((done, total)))
    assert {total for _, total in seen} == {3 + 7 * 1001}  # three gradients; three solves and four probes at most
    done = [i for i, _ in seen]
    assert done[:3] == [1, 2, 3]
    assert done == sorted(set(done))
    assert {3 + i * 1001 for i in range(1, 8)} <= set(done)
    assert len(done) > 3 + sum(result.details["num_products"])  # one for each product
    settings = json.loads(json.dumps(result.to_dict(), allow_nan=False))["settings"]
    assert settings | {"metric": "fisher", "damping": 1e-3, "m": 5, "n": 12} == settings
    assert result == gradient_regret(loss, metric="fisher")
    assert settings["damping"] == result.details["damping"]
    assert "damping" not in gradient_regret(loss).settings


def test_wrong_arguments_are_refused():
    data = batches(mlp)
    with pytest.raises(ValueError, match="split it"):
        gradient_regret(Loss(network(mlp), cross_entropy, data[:1]))
    for wrong in ({"metric": "hyperbolic"}, {"damping": 0.0}, {"tol": 0.0}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            gradient_regret(Loss(network(mlp), cross_entropy, data), **wrong)


RELATIVE = Ball(0.0, adaptive=True, eta=0.0)  # T = |w|


def gradients_of(model, data):
    return [flat(Loss(model, cross_entropy, [batch]).gradient()) for batch in data]


@pytest.mark.parametrize("metric", ["euclidean", "fisher"])
def test_regret_in_a_geometry_is_that_of_the_scaled_gradients(metric):
    """With T: gradients T g, and the inverse of T G T + damping."""
    model, data = network(mlp).eval(), batches(mlp, SIZES)
    t = flat(list(model.parameters())).abs() + 0.01
    gradients = [t * g for g in gradients_of(model, data)]
    inverse = torch.eye(len(t), dtype=torch.float64)
    if metric == "fisher":
        joined = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
        ggn = Dense(model, cross_entropy, joined).matrix("ggn")
        inverse = torch.linalg.inv(t[:, None] * ggn * t + 1e-2 * inverse)
    own = {"damping": 1e-2, "tol": 1e-8} if metric == "fisher" else {}
    ball = Ball(1.0, adaptive=True, eta=0.01)
    result = gradient_regret(Loss(model, cross_entropy, data), metric=metric, ball=ball, **own)
    assert result.value == pytest.approx(mean_over_pairs(gradients, inverse, SIZES), rel=1e-7)
    assert result.settings["ball"]["adaptive"] == "elementwise"


def test_the_parts_of_the_regret():
    result = gradient_regret(Loss(network(mlp), cross_entropy, batches(mlp, SIZES)))
    gradients = gradients_of(network(mlp).eval(), batches(mlp, SIZES))
    details, pairs = result.details, list(itertools.permutations(range(4), 2))
    mass = sum(SIZES[i] * SIZES[j] for i, j in pairs)
    norm = sum(SIZES[i] * SIZES[j] * float(gradients[j].norm()) for i, j in pairs) / mass
    assert details["product_of_means"] == pytest.approx(norm * (1 - details["mean_cosine"]), rel=1e-12)
    assert details["product_of_means"] + details["covariance"] == pytest.approx(result.value, rel=1e-12)
    squares = sum(n * float(g @ g) for n, g in zip(SIZES, gradients, strict=True)) / 15
    assert details["root_mean_square_norm"] == pytest.approx(math.sqrt(squares), rel=1e-12)
    assert details["mean_norm"] < details["root_mean_square_norm"]
    assert details["rank"] == 4


def rescaled(model, factor):
    """A hidden layer of ReLUs multiplied by `factor` per neuron, the next divided by it: the same function."""
    first, second = model[0], model[2]
    with torch.no_grad():
        first.weight.mul_(factor[:, None])
        first.bias.mul_(factor)
        second.weight.div_(factor)
    return model


def relu_mlp():
    return nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3))


FACTORS = torch.tensor([0.2, 3.0, 1.0, 7.0, 0.5, 2.0], dtype=torch.float64)


def test_what_is_invariant_under_rescaling_and_what_is_not():
    """T = |w|, whatever the damping: to rounding, or to what the tolerance of conjugate gradients leaves, in which
    rounding grows. T = 1 is not, unless the damping vanishes."""
    models = network(relu_mlp), rescaled(network(relu_mlp), FACTORS)
    losses = [Loss(model, cross_entropy, batches(mlp, SIZES)) for model in models]
    assert float(losses[0].value()) == pytest.approx(float(losses[1].value()), rel=10 * EPS)
    fisher = {"metric": "fisher", "num_probes": 0, "damping": 1e-3}
    for arguments, tolerance in (({}, 1e4 * EPS), (fisher, 1e-5), (fisher | {"damping": 0.1, "tol": 1e-10}, 1e-10)):
        before, after = (gradient_regret(loss, ball=RELATIVE, **arguments) for loss in losses)
        assert after.value == pytest.approx(before.value, rel=tolerance)
        assert after.stderr == pytest.approx(before.stderr, rel=10 * tolerance)
        assert before.converged
        before, after = (gradient_regret(loss, **arguments) for loss in losses)
        assert abs(after.value / before.value - 1) > 1e-3
    for measure in (gradient_coherence, gradient_noise_scale):
        before, after = (measure(loss, ball=RELATIVE) for loss in losses)
        assert after.value == pytest.approx(before.value, rel=1e4 * EPS)
        before, after = (measure(loss) for loss in losses)
        assert abs(after.value / before.value - 1) > 1e-3
    before, after = (gradient_regret(loss, metric="fisher", num_probes=0) for loss in losses)
    assert after.value == pytest.approx(before.value, rel=1e-5)  # unless T or the damping says otherwise
    assert before.value == gradient_regret(losses[0], ball=RELATIVE, **fisher).value


def test_the_fisher_regret_becomes_invariant_as_the_damping_vanishes():
    """Gradients lie in the range of the Fisher matrix, so g^T F^+ g has a limit, which no parametrization changes."""
    data = batches(mlp, (40, 40, 20))
    models = network(relu_mlp), rescaled(network(relu_mlp), FACTORS)
    losses = [Loss(m, cross_entropy, data) for m in models]
    moved = []
    for damping in (1e-3, 1e-7):
        values = [
            gradient_regret(loss, metric="fisher", damping=damping, tol=1e-8, num_probes=0).value for loss in losses
        ]
        moved.append(abs(values[1] / values[0] - 1))
    assert moved[0] > 1e-2
    assert moved[1] < 1e-3
    joined = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    ggn = Dense(models[0].eval(), cross_entropy, joined).matrix("ggn")
    exact = mean_over_pairs(
        gradients_of(models[0], data), torch.linalg.pinv(ggn, rtol=1e-12, hermitian=True), (40, 40, 20)
    )
    assert values[0] == pytest.approx(exact, rel=1e-3)


def test_effective_dimension_is_a_trace():
    model, data, damping = network(mlp).eval(), batches(mlp, (20, 20)), 1e-2
    joined = torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])
    values = torch.linalg.eigvalsh(Dense(model, cross_entropy, joined).matrix("ggn"))
    result = gradient_regret(Loss(model, cross_entropy, data), metric="fisher", damping=damping, num_probes=20).details
    error = result["effective_dimension"] - float((values / (values + damping)).sum())
    assert 0 < result["effective_dimension_stderr"] < 1
    assert abs(error) < 4 * result["effective_dimension_stderr"]


def test_probes_of_the_effective_dimension():
    """200 seeds: unbiased, with the variance of Hutchinson's estimator, each settled to the digits that it promises."""
    values = torch.logspace(0, -6, 60, dtype=torch.float64)
    a, damping = symmetric(values.tolist()), 1e-3
    share = torch.linalg.solve(a + damping * torch.eye(60), a)
    exact, result = float(share.trace()), []
    for seed in range(200):
        z = Stream(seed).rademacher_like(values)
        value, settled = damped_share(lambda v: a @ v + damping * v, z, damping, tol=1e-3, limit=100)
        assert settled
        assert value == pytest.approx(float(z @ share @ z), rel=1e-3)
        result.append(value)
    result = torch.tensor(result, dtype=torch.float64)
    one = math.sqrt(2 * float(share.square().sum() - share.diagonal().square().sum()))
    assert abs(result.mean() - exact) < 4 * one / math.sqrt(200)
    assert float(result.std()) == pytest.approx(one, rel=0.2)
    assert not damped_share(lambda v: a @ v + damping * v, z, damping, tol=1e-9, limit=3)[1]


def test_the_gradients_need_not_fit_in_memory(monkeypatch):
    """Ranges of parameters, one pass over the data for each: the same numbers, and only so much held."""
    loss = Loss(network(mlp), cross_entropy, batches(mlp, SIZES))
    whole = [gradient_regret(loss), gradient_coherence(loss), gradient_noise_scale(loss)]
    monkeypatch.setattr(gram_module, "BUDGET", 8 * 4 * 10)  # ten entries of each of four gradients
    held, seen = [], []
    original = gram_module.inner_products
    monkeypatch.setattr(gram_module, "inner_products", lambda a, b: held.append(sum(map(len, a))) or original(a, b))
    again = [
        gradient_regret(loss, progress=lambda done, total: seen.append((done, total))),
        gradient_coherence(loss),
        gradient_noise_scale(loss),
    ]
    for result, expected in zip(again, whole, strict=True):
        assert result.value == pytest.approx(expected.value, rel=1e-12)
    assert again[1].details["signal_to_noise"] == pytest.approx(whole[1].details["signal_to_noise"], rel=1e-12)
    assert max(held) == 40
    assert seen[-1] == (24, 24)  # 51 parameters are six ranges


def test_coherence_is_its_formula():
    model, data = network(mlp).eval(), batches(mlp, SIZES)
    g = torch.stack(gradients_of(model, data))
    p = torch.tensor(SIZES, dtype=torch.float64) / 15
    pairs = list(itertools.permutations(range(4), 2))
    mass = sum(float(p[i] * p[j]) for i, j in pairs)

    def mean(f):
        return sum(float(p[i] * p[j] * f(g[i], g[j])) for i, j in pairs) / mass

    result = gradient_coherence(Loss(model, cross_entropy, data))
    second = float(p @ g.square().sum(1))
    assert result.value == pytest.approx(mean(lambda a, b: a @ b / (a.norm() * b.norm())), rel=1e-10)
    assert result.details["agreement"] == pytest.approx(mean(lambda a, b: a @ b) / second, rel=1e-10)
    assert result.details["share_positive"] == pytest.approx(mean(lambda a, b: a @ b > 0), rel=1e-10)
    assert result.details["m_coherence"] == pytest.approx(4 * float((p @ g).square().sum()) / second, rel=1e-10)
    variance = p @ (g - p @ g).square() / (1 - p @ p)
    assert result.details["signal_to_noise"] == pytest.approx(float(((p @ g) ** 2 / variance).mean()), rel=1e-10)
    left = [gradient_coherence(Loss(model, cross_entropy, data[:b] + data[b + 1 :])).value for b in range(4)]
    spread = torch.tensor(left, dtype=torch.float64).var(unbiased=False)
    assert result.stderr == pytest.approx(float((3 * spread).sqrt()), rel=1e-9)


def test_coherence_of_batches_that_agree_oppose_and_ignore_each_other():
    a = symmetric([3.0, 1.0, 0.2])
    x = torch.linalg.solve(a, torch.eye(3, dtype=torch.float64))  # rows whose gradients are -1, 0, 0 and so on
    for rows, expected in (([0, 0, 0], 1.0), ([0, 1, 2], 0.0)):
        data = [(x[i : i + 1], x[i : i + 1]) for i in rows]
        result = gradient_coherence(Loss(Quadratic(a), mean, data))
        assert result.value == pytest.approx(expected, abs=1e-12)
        assert result.details["m_coherence"] == pytest.approx(3 if expected else 1)
        assert result.stderr == pytest.approx(0, abs=1e-12)
    opposite = gradient_coherence(Loss(Quadratic(a), mean, [(x[:1], x[:1]), (-x[:1], x[:1])]))
    assert opposite.value == pytest.approx(-1)


def test_the_noise_scale_of_single_examples_is_exact():
    """Per-example gradients, covariance divided by N: no error, for the batches are the population."""
    model, (x, y) = network(mlp).eval(), batches(mlp, (30,))[0]
    g = torch.stack(gradients_of(model, list(zip(x.split(1), y.split(1), strict=True))))
    trace, squared = float(g.var(0, unbiased=False).sum()), float(g.mean(0).square().sum())
    result = gradient_noise_scale(Loss(model, cross_entropy, list(zip(x.split(1), y.split(1), strict=True))))
    assert result.value == pytest.approx(trace / squared, rel=1e-10)
    assert result.details["trace"] == pytest.approx(trace, rel=1e-10)
    assert result.stderr == 0
    sampled = gradient_noise_scale(
        Loss(model, cross_entropy, list(zip(x.split(1), y.split(1), strict=True))), sampled=True
    )
    trace = trace * 30 / 29
    assert sampled.details["trace"] == pytest.approx(trace, rel=1e-10)
    assert sampled.details["squared_gradient"] == pytest.approx(squared - trace / 30, rel=1e-10)


def spread_of(found, exact):
    values = torch.tensor([f.value for f in found], dtype=torch.float64)
    errors = torch.tensor([f.stderr for f in found], dtype=torch.float64)
    return values, (values - exact).abs() / errors


def measured(monkeypatch, measure, loss, gram, **arguments):
    """What the measure makes of the inner products `gram` of batches of the sizes that `loss` has."""
    monkeypatch.setattr(gradients_module, "gram_matrix", lambda *args, **kwargs: gram)
    return measure(loss, **arguments)


@pytest.mark.parametrize("sizes", [[8] * 12, [4, 12] * 6], ids=["even", "uneven"])
def test_the_noise_scale_over_random_partitions(sizes, monkeypatch):
    """200 partitions of 96 examples: unbiased, and within the standard errors at the nominal rate or a little above."""
    model, (x, y) = network(mlp).eval(), batches(mlp, (96,))[0]
    g = torch.stack(gradients_of(model, list(zip(x.split(1), y.split(1), strict=True))))
    exact = float(g.var(0, unbiased=False).sum() / g.mean(0).square().sum())
    loss, result = Loss(model, cross_entropy, list(zip(x.split(sizes), y.split(sizes), strict=True))), []
    for seed in range(200):
        order = torch.randperm(96, generator=torch.Generator().manual_seed(seed))
        rows = torch.stack([part.mean(0) for part in g[order].split(sizes)])
        result.append(measured(monkeypatch, gradient_noise_scale, loss, rows @ rows.T))
    values, errors = spread_of(result, exact)
    assert abs(values.mean() - exact) < 4 * values.std() / math.sqrt(200)
    assert 0.54 < (errors < 1).double().mean() < 0.9
    assert (errors < 2).double().mean() > 0.9
    assert (errors > 4).sum() <= 2


def samples(sizes, num, eigenvalues, offset):
    """Gradients A (w - m - mean x) of quadratics with normal shifts: G = A (w - m), Sigma = A^2."""
    a, size = symmetric(eigenvalues), len(eigenvalues)
    generator = torch.Generator().manual_seed(0)
    root = torch.tensor(sizes, dtype=torch.float64).sqrt()[:, None]
    draws = torch.randn(num, len(sizes), size, generator=generator, dtype=torch.float64) / root
    data = [(torch.zeros(n, size).double(), torch.zeros(n)) for n in sizes]
    return Loss(Quadratic(a), mean, data), (offset - draws) @ a, a @ offset


@pytest.mark.parametrize("sizes", [[8] * 32, [4, 12] * 16], ids=["even", "uneven"])
def test_the_noise_scale_of_a_sample_speaks_of_the_distribution(sizes, monkeypatch):
    """200 samples of 256 examples. The parts are unbiased, and the ratio is within its standard error at about the
    nominal rate: a ratio has longer tails than a normal."""
    offset = torch.tensor([2.0, -1.0, 1.0], dtype=torch.float64)
    loss, samples_of, gradient = samples(sizes, 200, [3.0, 1.0, 0.2], offset)
    result = [measured(monkeypatch, gradient_noise_scale, loss, g @ g.T, sampled=True) for g in samples_of]
    trace, squared = 3.0**2 + 1 + 0.2**2, float(gradient @ gradient)
    for name, exact in (("trace", trace), ("squared_gradient", squared)):
        values = torch.tensor([f.details[name] for f in result], dtype=torch.float64)
        assert abs(values.mean() - exact) < 4 * values.std() / math.sqrt(200)
    _, errors = spread_of(result, trace / squared)
    assert 0.54 < (errors < 1).double().mean() < 0.82
    assert (errors > 4).sum() <= 4


@pytest.mark.parametrize("sizes", [[2] * 24, [2] * 23 + [1]], ids=["even", "last uneven"])
def test_the_jackknife_over_batches(sizes, monkeypatch):
    """200 sets of 24 batches from one distribution: the standard error is the spread. In 40 dimensions: in three, a
    few pairs of opposite gradients make most of the regret, and no set of 24 batches knows how often they come."""
    loss, samples_of, _ = samples(sizes, 200, [1.0] * 20 + [0.5] * 20, torch.ones(40, dtype=torch.float64))
    result = [measured(monkeypatch, gradient_regret, loss, g @ g.T) for g in samples_of]
    values, errors = spread_of(result, sum(f.value for f in result) / 200)
    rms = math.sqrt(sum(f.stderr**2 for f in result) / 200)
    assert rms == pytest.approx(float(values.std()), rel=0.25)
    assert 0.54 < (errors < 1).double().mean() < 0.82


@pytest.mark.slow
@pytest.mark.parametrize("sampled", [False, True])
@pytest.mark.parametrize("num_batches", [4, 15])
@pytest.mark.parametrize("eigenvalues", [[1.0] * 20, [i**-0.5 for i in range(1, 21)]], ids=["flat", "decay"])
def test_intervals_of_the_noise_scale(sampled, num_batches, eigenvalues, monkeypatch):
    """Of 600 samples, 92 to 98 % of the intervals hold the value of the distribution, or that of the sample itself.
    Where one eigenvalue of the covariance outweighs all others it is a little less."""
    offset = 3 * torch.ones(20, dtype=torch.float64)
    examples, gradient = samples([1] * (8 * num_batches), 600, eigenvalues, offset)[1:]
    truths = [math.fsum(x * x for x in eigenvalues) / float(gradient.square().sum())] * 600
    if not sampled:
        truths = [float(g.var(0, unbiased=False).sum() / g.mean(0).square().sum()) for g in examples]
    loss = samples([8] * num_batches, 1, eigenvalues, offset)[0]
    held = 0
    for g, truth in zip(examples.view(600, num_batches, 8, -1).mean(2), truths, strict=True):
        low, high = measured(monkeypatch, gradient_noise_scale, loss, g @ g.T, sampled=sampled).interval
        held += low <= truth <= high
    assert 0.92 <= held / 600 <= 0.98


def test_a_gradient_that_is_noise_alone_has_no_scale():
    model = Quadratic(symmetric([3.0, 1.0, 0.2]))
    x = torch.tensor([[1.0, 2.0, 3.0]], dtype=torch.float64)
    loss = Loss(model, mean, [(x, x), (-x, x)])  # the gradients cancel
    for sampled in (False, True):
        result = gradient_noise_scale(loss, sampled=sampled)
        assert math.isnan(result.value)
        assert not result.converged
        assert "gradient" in result.reason
        assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["value"] is None


@pytest.mark.parametrize("measure", [gradient_coherence, gradient_noise_scale])
def test_coherence_and_noise_scale_refuse_and_report(measure):
    data = batches(mlp)
    few = [(x[:1], y[:1]) for x, y in data[:1]] if measure is gradient_noise_scale else data[:1]
    with pytest.raises(ValueError, match="split it"):
        measure(Loss(network(mlp), cross_entropy, few))
    data[1] = (data[1][0] * torch.nan, data[1][1])
    result = measure(Loss(network(mlp), cross_entropy, data))
    assert math.isnan(result.value)
    assert not result.converged
    assert "is nan at the weights" in result.reason


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_model_is_left_as_it_was_found(kind):
    model = network(kind)
    for p in model.parameters():
        p.grad = torch.full_like(p, 3.0)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    state = torch.get_rng_state()
    loss = Loss(model, cross_entropy, batches(kind, SIZES))

    def stop(done, total):
        raise KeyboardInterrupt

    for metric in ("euclidean", "fisher"):
        gradient_regret(loss, metric=metric)
        with pytest.raises(KeyboardInterrupt):
            gradient_regret(loss, metric=metric, progress=stop)
    gradient_coherence(loss), gradient_noise_scale(loss)
    assert model.training
    assert torch.equal(state, torch.get_rng_state())
    assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
    assert all((p.grad == 3.0).all() for p in model.parameters())


def rescaled_resnet(model, seed=0):
    """A residual network of timm with another parametrization: in each block the first normalization and the filters
    that follow its ReLU, and the filters before that normalization with its statistics, by random positive factors."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for block in model.modules():
            if not hasattr(block, "conv2"):
                continue
            conv1, bn1, conv2 = block.conv1, block.bn1, block.conv2
            a, b = (
                (torch.randn(2, bn1.num_features, generator=generator, dtype=torch.float64) * 1.5).exp().to(bn1.weight)
            )
            bn1.weight.mul_(a)
            bn1.bias.mul_(a)
            conv2.weight.div_(a[:, None, None])
            conv1.weight.mul_(b[:, None, None, None])
            bn1.running_mean.mul_(b)
            bn1.running_var.copy_(b**2 * (bn1.running_var + bn1.eps) - bn1.eps)
    return model


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-9), (torch.float32, 1e-3)], ids=str)
def test_regret_of_a_real_network_under_rescaling(dtype, tolerance):
    """373,658 parameters, BatchNorm and ReLU: invariant with T = |w|, not with T = 1."""
    timm = pytest.importorskip("timm")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = timm.create_model("test_resnet", num_classes=10).to(dtype)
        x, y = torch.randn(32, 3, 32, 32, dtype=dtype), torch.randint(10, (32,))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
        for _ in range(10):  # away from zero biases and unit scales
            optimizer.zero_grad()
            cross_entropy(model(x), y).backward()
            optimizer.step()
    data = list(zip(x.split(16), y.split(16), strict=True))
    losses = [Loss(m, cross_entropy, data) for m in (model, rescaled_resnet(copy.deepcopy(model)))]
    assert float(losses[1].value()) == pytest.approx(float(losses[0].value()), rel=1e-5)
    fisher = {"metric": "fisher", "damping": 1.0, "num_probes": 0, "tol": 1e-4 if dtype == torch.float32 else 1e-6}
    for arguments, allowed in (({}, tolerance), (fisher, max(tolerance, 1e-5))):
        before, after = (gradient_regret(loss, ball=RELATIVE, **arguments) for loss in losses)
        assert before.converged
        assert after.value == pytest.approx(before.value, rel=allowed)
    before, after = (gradient_regret(loss) for loss in losses)
    assert abs(after.value / before.value - 1) > 1e-4


golden = pytest.mark.skipif(not GOLDEN.exists(), reason=f"the golden values are not at {GOLDEN}")


def exact_values():
    return json.loads((GOLDEN / "mlp.json").read_text())["exact"]


@golden
def test_golden_noise_scale_and_coherence():
    exact = exact_values()
    result = gradient_noise_scale(loss_of(1))
    assert result.value == pytest.approx(exact["gradient_noise"]["B_simple"], rel=1e-11)
    assert result.details["trace"] == pytest.approx(exact["gradient_noise"]["tr_sigma"], rel=1e-11)
    assert result.details["mean_norm"] == pytest.approx(exact["gradient_noise"]["mean_norm"], rel=1e-11)
    assert result.stderr == 0
    whole = gradient_noise_scale(loss_of(512))  # one batch is taken apart
    assert (whole.value, whole.settings["m"]) == (result.value, 1)
    for m, name in ((32, "sixteen_16x32"), (128, "even_4x128")):
        drawn = gradient_noise_scale(loss_of(m))
        assert abs(drawn.value - result.value) < 4 * drawn.stderr
        coherence = gradient_coherence(loss_of(m))
        assert coherence.value == pytest.approx(exact["regret"][name]["mean_cos_offdiag"], rel=1e-10)
        assert coherence.details["mean_norm"] == pytest.approx(exact["regret"][name]["mean_norm"], rel=1e-11)
    assert "more examples" in gradient_noise_scale(loss_of(32), sampled=True).reason


@golden
@pytest.mark.slow
@pytest.mark.parametrize("name", ["even_4x128", "sixteen_16x32"])
@pytest.mark.parametrize("damping", [0.1, 0.01, 0.001, 0.0001])
def test_golden_regret_in_the_kl_ball(name, damping):
    import numpy as np

    kl = exact_values()["regret"][name]["kl_ball"]["by_damping"][str(damping)]
    loss = loss_of(128 if name == "even_4x128" else 32)
    result = gradient_regret(loss, metric="fisher", damping=damping)
    assert result.converged
    assert result.value == pytest.approx(kl["mean_offdiag"], rel=1e-6)
    assert result.details["mean_cosine"] == pytest.approx(kl["mean_cos_offdiag"], rel=1e-3)
    assert result.details["mean_norm"] == pytest.approx(kl["mean_norm"], rel=1e-6)
    values = torch.tensor(np.load(GOLDEN / "mlp_exact.npz")["ggn_eigenvalues"]).clamp(min=0)
    dimension = float((values / (values + damping)).sum())
    assert abs(result.details["effective_dimension"] - dimension) < 8 * result.details["effective_dimension_stderr"]


@golden
@pytest.mark.slow
def test_golden_stiffness_of_single_examples():
    result = gradient_coherence(loss_of(1)).value
    assert result == pytest.approx(exact_values()["gradient_noise"]["stiffness_mean_cos"], rel=1e-9)
