"""Fisher-Rao norm, relative flatness, sigma and alpha against dense matrices, closed forms and published values."""

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
    fisher_rao_norm,
    flatness_bounds,
    pac_bayes_sigma,
    relative_flatness,
    sharpness_alpha,
    worst_case_sharpness,
)

EPS = torch.finfo(torch.float64).eps
SIZES = (5, 5, 2)
cross_entropy = nn.CrossEntropyLoss()
golden = pytest.mark.skipif(not GOLDEN.exists(), reason=f"the golden values are not at {GOLDEN}")


def joined(data):
    return torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])


def exact_values():
    return json.loads((GOLDEN / "mlp.json").read_text())


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("matrix", ["fisher", "ggn", "empirical_fisher"])
def test_fisher_rao_norm_is_the_quadratic_form(kind, matrix):
    model, data = network(kind).eval(), batches(kind, SIZES)
    dense = Dense(model, cross_entropy, joined(data))
    result = fisher_rao_norm(Loss(model, cross_entropy, data), matrix=matrix)
    assert result.value == pytest.approx(float(dense.w @ dense.matrix(matrix) @ dense.w), rel=1e-10)
    assert result.details["norm"] ** 2 == pytest.approx(result.value)
    forms = [float(dense.w @ Dense(model, cross_entropy, b).matrix(matrix) @ dense.w) for b in data]
    assert result.details["batch_values"] == pytest.approx(forms, rel=1e-10)
    assert result.stderr > 0


def test_fisher_rao_norm_is_the_divergence_of_a_common_rescaling():
    """KL(p_w || p_{(1 + eps) w}) = eps^2 / 2 w^T F w, and the norm does not change with the parametrization."""
    model, (x, y) = network(relu_mlp), batches(mlp, (30,))[0]
    result, eps = fisher_rao_norm(Loss(model, cross_entropy, [(x, y)])), 1e-4
    moved = fisher_rao_norm(Loss(rescaled(network(relu_mlp), FACTORS), cross_entropy, [(x, y)]))
    assert moved.value == pytest.approx(result.value, rel=1e3 * EPS)
    with torch.no_grad():
        before = model(x).log_softmax(1)
        for p in model.parameters():
            p.mul_(1 + eps)
        divergence = (before.exp() * (before - model(x).log_softmax(1))).sum(1).mean()
    assert float(divergence) == pytest.approx(eps**2 / 2 * result.value, rel=1e-3)


def weighted_traces(hessian, weight, start):
    """sum_{s,s'} <W_s, W_s'> tr H_{s,s'}, from the definition."""
    w = weight.detach().flatten(1)
    rows, columns = w.shape
    block = hessian[start : start + w.numel(), start : start + w.numel()].view(rows, columns, rows, columns)
    return sum(float(w[s] @ w[t]) * float(block[s, :, t, :].trace()) for s in range(rows) for t in range(rows))


LAYERS = {"mlp": ("0", "3"), "cnn": ("0.weight", "4"), "Attention": ("qkv", "head")}


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("matrix", ["hessian", "ggn"])
def test_relative_flatness_is_its_definition(kind, place, matrix):
    """Convolutions with their filters as rows; more rows than columns and fewer."""
    model, data = network(kind).eval(), batches(kind, SIZES)
    layer = LAYERS[kind.__name__][place]
    name = layer if layer.endswith("weight") else f"{layer}.weight"
    named, start = dict(model.named_parameters()), 0
    for other, p in named.items():
        if other == name:
            break
        start += p.numel()
    dense = Dense(model, cross_entropy, joined(data)).matrix(matrix)
    expected, loss = weighted_traces(dense, named[name], start), Loss(model, cross_entropy, data)
    result = relative_flatness(loss, layer, matrix=matrix)
    assert result.value == pytest.approx(expected, rel=1e-9)
    assert result.stderr == 0
    assert result.settings["layer"] == name
    for same in (named[name], model.get_submodule(name.removesuffix(".weight"))):
        assert relative_flatness(loss, same, matrix=matrix).value == result.value
    drawn = relative_flatness(loss, layer, matrix=matrix, exact=False, num_probes=50)
    assert abs(drawn.value - expected) < 4 * drawn.stderr
    assert drawn.details["batch_values"] == pytest.approx(
        [
            relative_flatness(Loss(model, cross_entropy, [b]), layer, matrix=matrix, exact=False, num_probes=50).value
            for b in data
        ],
        rel=1e-9,
    )


def test_relative_flatness_does_not_change_with_the_scale_of_a_layer():
    data = batches(mlp, SIZES)
    losses = [
        Loss(m, cross_entropy, data)
        for m in (network(relu_mlp), rescaled(network(relu_mlp), torch.full((6,), 3.0, dtype=torch.float64)))
    ]
    for layer in ("0", "2"):
        before, after = (relative_flatness(loss, layer).value for loss in losses)
        assert after == pytest.approx(before, rel=1e4 * EPS)


def test_relative_flatness_of_a_layer_without_weights_is_0():
    model = network(mlp)
    with torch.no_grad():
        model[0].weight.zero_()
    assert relative_flatness(Loss(model, cross_entropy, batches(mlp)), "0").value == 0


class Bilinear(nn.Module):
    """A quadratic of a matrix: its relative flatness has a variance that is known."""

    def __init__(self, a, w):
        super().__init__()
        self.register_buffer("a", a)
        self.weight = nn.Parameter(w)

    def forward(self, x):
        w = self.weight.flatten()
        return 0.5 * (w @ self.a @ w) * x.new_ones(len(x))


def test_relative_flatness_over_seeds():
    """200 seeds: unbiased, with Hutchinson's variance, and standard errors at the nominal rate."""
    generator = torch.Generator().manual_seed(0)
    w = torch.randn(3, 4, generator=generator, dtype=torch.float64)
    a = symmetric(torch.linspace(0.1, 2, 12).tolist())
    x = torch.zeros(2, 1, dtype=torch.float64)
    loss = Loss(Bilinear(a, w), mean, [(x, x)])
    exact = weighted_traces(a, w, 0)
    assert relative_flatness(loss, "weight").value == pytest.approx(exact, rel=1e-12)
    result = [relative_flatness(loss, "weight", exact=False, num_probes=30, seed=seed) for seed in range(200)]
    values = torch.tensor([f.value for f in result], dtype=torch.float64)
    errors = (values - exact).abs() / torch.tensor([f.stderr for f in result], dtype=torch.float64)
    assert abs(values.mean() - exact) < 4 * values.std() / math.sqrt(200)
    assert 0.54 < (errors < 1).double().mean() < 0.82
    assert (errors > 4).sum() <= 2


class Fast(Loss):
    """The loss of a quadratic in closed form: 200 seeds of a search in seconds."""

    def value(self):
        d = self.model.parts[0].detach() - self.model.m
        return 0.5 * d @ self.model.a @ d


def quadratic(a, m, w):
    x = torch.zeros(2, len(w), dtype=torch.float64)
    return Fast(Quadratic(a, m, w), mean, [(x, x)])


@pytest.mark.parametrize("adaptive", [False, True])
def test_sigma_of_a_quadratic(adaptive):
    """sqrt(2 target / tr T A T), in 200 seeds within the standard errors at the nominal rate."""
    a = symmetric(torch.linspace(0.2, 2, 20).tolist())
    w = torch.linspace(0.5, 2, 20, dtype=torch.float64)
    loss = quadratic(a, w, w)  # at the minimum
    t = w if adaptive else torch.ones(20, dtype=torch.float64)
    exact = math.sqrt(2 * 0.3 / float((t * a.diagonal() * t).sum()))
    result = [
        pac_bayes_sigma(loss, target=0.3, adaptive=adaptive, eps=0.0, num_samples=20, seed=seed) for seed in range(200)
    ]
    values = torch.tensor([f.value for f in result], dtype=torch.float64)
    errors = (values - exact).abs() / torch.tensor([f.stderr for f in result], dtype=torch.float64)
    assert float(values.mean()) == pytest.approx(exact, rel=0.03)  # its inverse square is unbiased, not itself
    assert 0.54 < (errors < 1).double().mean() < 0.82
    assert (errors > 4).sum() <= 4  # ten pairs, whose rises are skewed
    covered = sum(f.details["interval"][0] <= exact <= f.details["interval"][1] for f in result)
    assert covered >= 0.85 * 200
    assert all(0.3 * (1 - 4e-3) <= f.details["rise"] <= 0.3 for f in result)


def test_sigma_in_a_slope_and_with_eps():
    """The slope cancels between z and -z; eps adds eps^2/2 tr A of its own."""
    a, w = symmetric([3.0, 1.0, 0.5]), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    down, level = quadratic(a, 10 * w, w), quadratic(a, w, w)
    assert pac_bayes_sigma(down, target=0.3).value == pytest.approx(pac_bayes_sigma(level, target=0.3).value, rel=2e-3)
    left = 0.3 - 0.2**2 / 2 * float(a.trace())
    exact = math.sqrt(2 * left / float((w.square() * a.diagonal()).sum()))
    result = pac_bayes_sigma(level, target=0.3, adaptive=True, eps=0.2, num_samples=1000)
    assert abs(result.value - exact) < 4 * result.stderr
    assert result.stderr < 0.1 * exact
    beyond = pac_bayes_sigma(level, target=0.3, adaptive=True, eps=2.0)
    assert math.isnan(beyond.value)
    assert "eps" in beyond.reason


def test_the_search_is_that_of_the_whole_loss():
    """The closed form above, and the loss through its batches."""
    a, w = symmetric([3.0, 1.0, 0.5]), torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
    x = torch.zeros(3, 3, dtype=torch.float64)
    result = pac_bayes_sigma(Loss(Quadratic(a, w, w), mean, [(x, x), (x[:1], x[:1])]), target=0.3)
    assert result.value == pytest.approx(pac_bayes_sigma(quadratic(a, w, w), target=0.3).value, rel=1e-12)


@pytest.mark.parametrize("adaptive", [False, True])
def test_sigma_is_the_largest_that_the_loss_bears(adaptive):
    """Independent draws, a fifth to either side of sigma; the same seed gives the same bits."""
    loss, rises = Loss(network(mlp), cross_entropy, batches(mlp, (20, 20))), []
    result = pac_bayes_sigma(loss, target=0.1, adaptive=adaptive, num_samples=100)
    few = [pac_bayes_sigma(loss, target=0.1, adaptive=adaptive, num_samples=4) for _ in range(2)]
    assert few[0] == few[1]
    generator, base = torch.Generator().manual_seed(77), float(loss.value())
    for factor in (0.8, 1.2):
        total = 0.0
        for _ in range(60):
            z = [torch.randn(w.shape, generator=generator, dtype=w.dtype) for w in loss.params]
            s = result.value * factor
            widths = [((s * w.detach()) ** 2 + 1e-6).sqrt() if adaptive else s for w in loss.params]
            for sign in (1, -1):
                with loss.displaced([sign * width * x for width, x in zip(widths, z, strict=True)]):
                    total += float(loss.value()) / 120
        rises.append(total - base)
    assert rises[0] < 0.1 < rises[1]


def test_no_sigma_is_said():
    x = torch.zeros(2, 3, dtype=torch.float64)
    level = Loss(Quadratic(symmetric([-1.0, -2.0, -0.5])), mean, [(x, x)])
    result = pac_bayes_sigma(level, target=0.1)
    assert math.isnan(result.value)
    assert not result.converged
    assert "smaller target" in result.reason
    data = batches(mlp)
    data[0] = (data[0][0] * torch.nan, data[0][1])
    result = pac_bayes_sigma(Loss(network(mlp), cross_entropy, data), target=0.1)
    assert math.isnan(result.value)
    assert "at the weights" in result.reason
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["value"] is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("exact", [True, False])
def test_flatness_of_weights_that_are_not_finite_is_not_a_number(bad, exact):
    model = network(mlp)
    name, weight = next(iter(model.named_parameters()))
    with torch.no_grad():
        weight[0, 0] = bad
    result = relative_flatness(Loss(model, cross_entropy, batches(mlp)), name, exact=exact)
    assert math.isnan(result.value)
    assert not result.converged
    assert "at the weights" in result.reason


def test_alpha_at_a_minimum_of_a_quadratic():
    """The gradient there is 0 and has no signs; with a diagonal Hessian every corner of the box is a maximum."""
    x = torch.zeros(2, 3, dtype=torch.float64)
    loss = Loss(Quadratic(torch.diag(torch.tensor([3.0, 2.0, 1.0], dtype=torch.float64))), mean, [(x, x)])
    with torch.no_grad():
        for w in loss.params:
            w.zero_()
    result = sharpness_alpha(loss, target=0.3, tol=1e-6)
    assert result.value == pytest.approx(math.sqrt(2 * 0.3 / 6.0), rel=1e-5)


def test_sigma_and_alpha_in_relative_units_do_not_change_with_the_parametrization():
    data = batches(mlp, (20, 20))
    losses = [Loss(m, cross_entropy, data) for m in (network(relu_mlp), rescaled(network(relu_mlp), FACTORS))]
    for measure in (pac_bayes_sigma, sharpness_alpha):
        before, after = (measure(loss, target=0.1, adaptive=True, eps=0.0).value for loss in losses)
        assert after == pytest.approx(before, rel=1e-9)
        before, after = (measure(loss, target=0.1).value for loss in losses)
        assert abs(after / before - 1) > 0.01


def test_alpha_of_a_quadratic():
    """max over the box of a convex quadratic is at a corner: all of them, by hand."""
    a = symmetric([3.0, 1.0, 0.5, 0.2])
    x = torch.zeros(2, 4, dtype=torch.float64)
    loss = Loss(Quadratic(a, None, torch.full((4,), 0.3, dtype=torch.float64)), mean, [(x, x), (x, x)])
    w, signs = (
        torch.full((4,), 0.3, dtype=torch.float64),
        torch.cartesian_prod(*[torch.tensor([-1.0, 1.0])] * 4).double(),
    )
    result = sharpness_alpha(loss, target=0.4)

    def rise(alpha):
        d = w + alpha * signs
        return float((0.5 * ((d @ a) * d).sum(1)).max() - 0.5 * w @ a @ w)

    assert rise(result.value) == pytest.approx(0.4, rel=0.02)
    assert rise(result.value) <= 0.4
    assert result.details["rise"] == pytest.approx(rise(result.value), rel=1e-6)


def test_flatness_bounds_are_their_formulas():
    model, data = network(mlp).eval(), batches(mlp, (20, 10))
    loss = Loss(model, cross_entropy, data)
    w0 = [torch.full_like(w, 0.1) for w in loss.params]
    seen = []
    few = {"num_samples": 4, "num_steps": 4}
    result = flatness_bounds(loss, of="loss", initial_weights=w0, delta=0.2, **few, progress=lambda *x: seen.append(x))
    assert seen == [(i, 4) for i in range(1, 5)]
    w, d = flat(loss.params), flat(loss.params) - 0.1
    n, p, eps = 30, len(w), 1e-3
    assert len(result) == 12
    for mag, adaptive in (("", False), ("mag_", True)):
        s = pac_bayes_sigma(loss, target=0.1, adaptive=adaptive, num_samples=4).value
        a = sharpness_alpha(loss, target=0.1, adaptive=adaptive, num_steps=4).value
        assert result[f"pacbayes_{mag}flatness"].value == pytest.approx(1 / s**2)
        assert result[f"sharpness_{mag}flatness"].value == pytest.approx(1 / a**2)
        for name, v in (("orig", w), ("init", d)):
            square = float(v @ v)
            if mag:
                above = eps**2 + (s**2 + 1) * square / p
                first = float((above / (eps**2 + s**2 * v**2)).log().sum()) / 4 + math.log(n / s) + 10
                above = eps**2 + (a**2 + 4 * math.log(2 * p / 0.2)) * square / p
                second = float((above / (eps**2 + a**2 * v**2)).log().sum()) / 4 + math.log(n / 0.2) + 10
            else:
                first = square / (4 * s**2) + math.log(n / s) + 10
                second = square * math.log(2 * p) / (4 * a**2) + math.log(n / a) + 10
            assert result[f"pacbayes_{mag}{name}"].value == pytest.approx(first, rel=1e-12)
            assert result[f"sharpness_{mag}{name}"].value == pytest.approx(second, rel=1e-12)
    sigma = pac_bayes_sigma(loss, target=0.1, num_samples=4)
    assert result["pacbayes_flatness"].stderr == pytest.approx(2 * sigma.stderr / sigma.value**3, rel=1e-4)
    assert "pacbayes_init" not in flatness_bounds(loss, of="loss", **few)


@golden
def test_golden_fisher_rao_and_relative_flatness():
    exact = exact_values()["exact"]
    for m in (512, 128):
        assert fisher_rao_norm(loss_of(m)).value == pytest.approx(exact["fisher_rao"]["fisher"], rel=1e-11)
        empirical = fisher_rao_norm(loss_of(m), matrix="empirical_fisher").value
        assert empirical == pytest.approx(exact["fisher_rao"]["empirical"], rel=1e-11)
        result = relative_flatness(loss_of(m), "fc2")
        assert result.value == pytest.approx(exact["relative_flatness"]["values"]["fc2.weight"], rel=1e-11)
    result = relative_flatness(loss_of(512), "fc1")
    assert result.value == pytest.approx(exact["relative_flatness"]["values"]["fc1.weight"], rel=1e-11)
    result = relative_flatness(loss_of(512), "fc1", exact=False)
    assert abs(result.value - exact["relative_flatness"]["values"]["fc1.weight"]) < 4 * result.stderr


@golden
def test_golden_sigma_is_a_standard_deviation():
    """Published code reports sigma where the noise has the standard deviation sigma^2, and stops within 0.01 of the
    target 0.1, with 20 repetitions of 10 draws."""
    peer, exact = exact_values()["landscape"]["nitarshan_pacbayes"], exact_values()["exact"]
    result = pac_bayes_sigma(loss_of(512), target=0.1, of="error", num_samples=100)
    assert abs(result.value - peer["effective_noise_std_mean"]) < 4 * result.stderr + 0.005
    assert result.value < 0.6 * peer["sigma"]["mean"]
    for adaptive, name in ((False, "hessian_exact"), (True, "adaptive_hessian_exact")):
        result = pac_bayes_sigma(loss_of(512), target=1e-6, adaptive=adaptive, eps=0.0, num_samples=40)
        assert abs(result.value - math.sqrt(2e-6 / exact[name]["trace"])) < 4 * result.stderr


@golden
def test_golden_alpha_is_where_the_worst_case_meets_the_target():
    """The search of the worst case is a stronger one: it finds a rise up to a tenth beyond the target."""
    for adaptive in (False, True):
        result = sharpness_alpha(loss_of(512), target=0.05, adaptive=adaptive, eps=0.0)
        box = Ball(result.value, norm=math.inf, adaptive=adaptive, eta=0.0)
        best = worst_case_sharpness(loss_of(512), box, num_steps=20, num_restarts=1).value
        assert 0.05 * 0.97 < best < 0.05 * 1.1


def test_wrong_arguments_are_refused():
    loss = Loss(network(mlp), cross_entropy, batches(mlp))
    for wrong, say in (
        ({"target": 0.0}, "target"),
        ({"target": 1.0, "of": "error"}, "error"),
        ({"target": 0.1, "of": "accuracy"}, "of must be"),
        ({"target": 0.1, "tol": 0.0}, "tol"),
        ({"target": 0.1, "eps": -1.0}, "eps"),
        ({"target": 0.1, "adaptive": "neuron"}, "adaptive"),
    ):
        for measure in (pac_bayes_sigma, sharpness_alpha):
            with pytest.raises(ValueError, match=say):
                measure(loss, **wrong)
    with pytest.raises(ValueError, match="num_samples"):
        pac_bayes_sigma(loss, target=0.1, num_samples=1)
    with pytest.raises(ValueError, match="num_steps"):
        sharpness_alpha(loss, target=0.1, num_steps=0)
    with pytest.raises(ValueError, match=r"0\.weight, 3\.weight; got 'fc'"):
        relative_flatness(loss, "fc")
    with pytest.raises(ValueError, match="shape"):
        relative_flatness(loss, "0.bias")
    with pytest.raises(ValueError, match="num_probes"):
        relative_flatness(loss, "0", num_probes=1)
    with pytest.raises(ValueError, match="matrix"):
        fisher_rao_norm(loss, matrix="hessian")
    with pytest.raises(ValueError, match="initial_weights"):
        flatness_bounds(loss, initial_weights=loss.params[:1])
    with pytest.raises(ValueError, match="delta"):
        flatness_bounds(loss, delta=1.0)


@pytest.mark.parametrize("kind", NETWORKS)
def test_the_model_is_left_as_it_was_found(kind):
    model = network(kind)
    before = {name: x.clone() for name, x in model.state_dict().items()}
    state, loss = torch.get_rng_state(), Loss(model, cross_entropy, batches(kind, SIZES))

    def stop(done, total):
        if done == 2:
            raise KeyboardInterrupt

    layer = LAYERS[kind.__name__][0]
    for measure in (
        fisher_rao_norm,
        lambda loss, **more: relative_flatness(loss, layer, **more),
        lambda loss, **more: pac_bayes_sigma(loss, target=0.1, of="error", num_samples=4, **more),
        lambda loss, **more: sharpness_alpha(loss, target=0.1, num_steps=3, **more),
    ):
        assert json.dumps(measure(loss).to_dict(), allow_nan=False)
        with pytest.raises(KeyboardInterrupt):
            measure(loss, progress=stop)
        assert model.training
        assert torch.equal(state, torch.get_rng_state())
        assert all(torch.equal(x, before[name]) for name, x in model.state_dict().items())
        assert all(p.grad is None for p in model.parameters())
