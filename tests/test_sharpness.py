"""Sharpness in a ball against closed forms on quadratics."""

import json
import math

import pytest
import torch
from networks import Attention, batches, cnn, flat, mlp, network
from quadratic import Quadratic, mean, shifted, symmetric, unshifted
from torch import nn

from sam_optim.core.geometry import Ball, ProductBall
from sam_optim.core.results import mean_over_batches
from sam_optim.loss import Loss
from sam_optim.measures import average_in_ball, average_sharpness, worst_case_sharpness
from sam_optim.measures.sharpness import _without_slope

EPS = torch.finfo(torch.float64).eps
EIGENVALUES = [5.0, 2.0, 0.5, 0.0, -1.0]
W = torch.tensor([1.0, -2.0, 0.5, 0.1, 3.0], dtype=torch.float64)
cross_entropy = nn.CrossEntropyLoss()


def at_minimum(**kwargs):
    return unshifted(Quadratic(symmetric(EIGENVALUES), W, W, **kwargs))


def away(**kwargs):
    return unshifted(Quadratic(symmetric(EIGENVALUES), torch.zeros_like(W), W, **kwargs))


def scale(ball):
    return torch.cat(list(ball.scales([W])[0].expand(5)[None]))


def quadratic_maximum(a, g, rho):
    """max g.d + 1/2 d A d over ||d||_2 <= rho: (mu - A) d = g with mu >= lambda_max such that ||d|| = rho."""
    values, vectors = torch.linalg.eigh(a)
    c = vectors.T @ g
    low, high = float(values[-1]), float(values[-1] + c.norm() / rho + 1)
    for _ in range(200):
        mu = (low + high) / 2
        low, high = (mu, high) if float((c / (mu - values)).norm()) > rho else (low, mu)
    d = vectors @ (c / (high - values))
    return float(g @ d + 0.5 * d @ a @ d)


@pytest.mark.parametrize("ball", [Ball(1.0), Ball(1.0, adaptive=True), Ball(1.0, adaptive="layer")], ids=str)
@pytest.mark.parametrize("rho", [1e-3, 0.1, 2.0])
def test_worst_case_at_a_minimum_is_the_largest_eigenvalue(ball, rho):
    """Exact on a quadratic for every rho; the search needs a direction to start in, so w is 1e-6 off the minimum."""
    loss = at_minimum()
    t = torch.diag(scale(ball))
    expected = rho**2 / 2 * torch.linalg.eigvalsh(t @ loss.model.a @ t)[-1]
    with loss.displaced([torch.full((5,), 1e-6 * rho, dtype=torch.float64)]):
        result = worst_case_sharpness(loss, Ball(rho, adaptive=ball.adaptive), num_steps=100)
    assert result.value == pytest.approx(float(expected), rel=1e-3)


@pytest.mark.parametrize("adaptive", [False, True, "layer"])
@pytest.mark.parametrize("rho", [1e-4, 0.1, 3.0])
def test_worst_case_is_the_maximum_of_the_quadratic(rho, adaptive):
    loss, ball = away(sizes=[2, 3]), Ball(rho, adaptive=adaptive)
    t = flat([s.expand_as(p) for s, p in zip(ball.scales(loss.params), loss.params, strict=True)])
    g, a = loss.model.gradient(), loss.model.a
    expected = quadratic_maximum(t[:, None] * a * t, t * g, rho)
    result = worst_case_sharpness(loss, ball, num_steps=50)
    assert result.value == pytest.approx(expected, rel=1e-3)
    assert result.value <= expected + 100 * EPS * (expected + float(loss.value()))


@pytest.mark.parametrize("adaptive", [False, True])
def test_worst_case_in_the_cube_is_at_a_vertex(adaptive):
    """Where all g_i have the sign of their neighbors' pull, A = diag: rho |g| t + rho^2/2 t^2 A_ii."""
    a = torch.diag(torch.tensor([3.0, 1.0, 0.5, 2.0, 0.1], dtype=torch.float64))
    loss, ball = unshifted(Quadratic(a, None, W)), Ball(0.3, norm=math.inf, adaptive=adaptive, eta=0.5)
    t = scale(ball)
    expected = float((0.3 * t * loss.model.gradient().abs() + 0.045 * t**2 * a.diagonal()).sum())
    assert worst_case_sharpness(loss, ball).value == pytest.approx(expected, rel=100 * EPS)


@pytest.mark.parametrize("norm", [2, math.inf])
@pytest.mark.parametrize("adaptive", [False, True])
def test_one_step_is_the_perturbation_of_the_optimizer(norm, adaptive):
    loss, ball = away(), Ball(0.2, norm=norm, adaptive=adaptive)
    before = loss.value()
    with loss.displaced(ball.ascent(loss.gradient(), loss.params)):
        expected = float(loss.value() - before)
    assert worst_case_sharpness(loss, ball, num_steps=1).value == pytest.approx(expected, rel=100 * EPS)


def test_worst_case_of_batches_is_weighted_by_their_size():
    loss = shifted(Quadratic(symmetric(EIGENVALUES), None, W), [6, 3, 1])
    result = worst_case_sharpness(loss, Ball(0.1))
    alone = [worst_case_sharpness(single, Ball(0.1)).value for single in loss.single_batches()]
    assert result.details["batch_values"] == alone
    assert result.value == pytest.approx(0.6 * alone[0] + 0.3 * alone[1] + 0.1 * alone[2], rel=4 * EPS)
    assert result.num_samples == 3
    equal = shifted(Quadratic(symmetric(EIGENVALUES), None, W), [4, 4, 4, 4])
    result = worst_case_sharpness(equal, Ball(0.1))
    x = torch.tensor(result.details["batch_values"], dtype=torch.float64)
    assert result.stderr == pytest.approx(float(x.std() / 2), rel=1e-6)


@pytest.mark.parametrize("ball", [Ball(0.1), Ball(0.01, norm=math.inf, adaptive=True)], ids=["l2", "linf"])
@pytest.mark.parametrize("kind", [mlp, cnn, Attention])
def test_worst_case_does_not_depend_on_the_order_of_the_batches(kind, ball):
    data = batches(kind, (5, 5, 2))
    values = [
        worst_case_sharpness(Loss(network(kind), cross_entropy, order), ball, num_steps=5, num_restarts=2).value
        for order in (data, data[::-1], data[1:] + data[:1])
    ]
    assert values[0] == values[1] == values[2]
    assert values[0] > 0


@pytest.mark.parametrize("norm", [2, math.inf])
@pytest.mark.parametrize("adaptive", [False, True, "filter", "layer"])
def test_the_points_tried_are_in_the_ball_and_the_best_one_counts(norm, adaptive, monkeypatch):
    loss = Loss(network(cnn), cross_entropy, batches(cnn, (6,)))
    ball, tried = Ball(0.5, norm=norm, adaptive=adaptive), []
    clean = [p.detach().clone() for p in loss.params]
    real = Loss.value_and_gradient

    def recorded(self):
        d = [p.detach() - w for p, w in zip(self.params, clean, strict=True)]
        value, gradient = real(self)
        tried.append((float(ball.length(d, clean)), float(value)))
        return value, gradient

    monkeypatch.setattr(Loss, "value_and_gradient", recorded)
    result = worst_case_sharpness(loss, ball, num_steps=10, num_restarts=3)
    assert len(tried) == 3 * 10  # one forward and backward for each step, and the last needs no gradient
    assert max(length for length, _ in tried) <= 0.5 * (1 + 1e3 * EPS)
    assert result.value >= max(value for _, value in tried) - tried[0][1]
    assert result.value >= worst_case_sharpness(loss, ball, num_steps=10, num_restarts=1).value > 0


def test_a_maximum_at_the_weights_is_zero():
    loss = unshifted(Quadratic(-symmetric([1.0, 2.0]), None, None))
    result = worst_case_sharpness(loss, Ball(0.1), num_restarts=3)
    assert result.value == 0
    assert result.details["lengths"] == [0.0]


def test_weights_of_zero_do_not_move_without_eta():
    """The published code divides 0 by 0 here, and then never projects."""
    w = torch.tensor([1.0, 0.0, -2.0], dtype=torch.float64)
    loss = unshifted(Quadratic(symmetric([1.0, 3.0, 2.0]), torch.ones(3, dtype=torch.float64), w))
    for norm in (2, math.inf):
        ball = Ball(0.5, norm=norm, adaptive=True, eta=0.0)
        t = torch.diag(w.abs()[[0, 2]])
        a, g = (t @ loss.model.a[[0, 2]][:, [0, 2]] @ t), t @ loss.model.gradient()[[0, 2]]
        result = worst_case_sharpness(loss, ball, num_steps=50, num_restarts=3).value
        if norm == 2:
            assert result == pytest.approx(quadratic_maximum(a, g, 0.5), rel=1e-3)
        average = average_sharpness(loss, ball, num_samples=1000)
        expected = 0.125 * float(a.trace()) / (1 if norm == 2 else 3)
        assert abs(average.value - expected) < 4 * average.stderr


def test_groups_of_a_product_ball_have_their_own_radius():
    loss = away(sizes=[2, 3])
    first, second = loss.params
    g, a = loss.model.gradient(), loss.model.a
    ball = ProductBall([(Ball(0.3), [first]), (Ball(0.1, adaptive=True), [second])])
    s = torch.cat([torch.full((2,), 0.3).double(), 0.1 * (W[2:].abs() + 0.01)])
    expected = quadratic_maximum(s[:, None] * a * s, s * g, 1.0)
    assert worst_case_sharpness(loss, ball, num_steps=50).value == pytest.approx(expected, rel=1e-3)
    only = ProductBall([(Ball(0.3), [first])])
    expected = quadratic_maximum(a[:2, :2] * 0.09, 0.3 * g[:2], 1.0)
    assert worst_case_sharpness(loss, only, num_steps=50).value == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("norm", [2, math.inf])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("rho", [1e-3, 1.0])
def test_average_is_half_the_trace(rho, adaptive, norm):
    """Exact on a quadratic for every rho, also where the gradient is not 0: the pairs cancel it."""
    loss, ball = away(), Ball(rho, norm=norm, adaptive=adaptive)
    expected = rho**2 / 2 * float((scale(ball) ** 2 * loss.model.a.diagonal()).sum()) / (1 if norm == 2 else 3)
    result = average_sharpness(loss, ball, num_samples=2000)
    assert result.stderr == result.details["stderr_draws"] < 0.1 * abs(expected)
    assert abs(result.value - expected) < 4 * result.stderr
    assert result.num_samples == 2000


@pytest.mark.parametrize("kind", [mlp, Attention])
def test_average_of_a_network_for_small_rho_is_half_the_trace(kind):
    loss = Loss(network(kind), cross_entropy, batches(kind))
    trace = 0.0
    for i, p in enumerate(loss.params):
        for j in range(p.numel()):
            v = [torch.zeros_like(q) for q in loss.params]
            v[i].view(-1)[j] = 1
            trace += float(loss.hessian_product(v)[i].view(-1)[j])
    result = average_sharpness(loss, Ball(1e-4), num_samples=400)
    assert abs(2e8 * result.value - trace) < 4 * 2e8 * result.details["stderr_draws"]
    assert result.details["stderr_draws"] < 0.5 * result.value


def assert_errors_are_the_spread(values, errors):
    """stderr^2 estimates the variance of the value without bias; the variance of 200 values is known to 0.2 or so."""
    variance = torch.tensor(values).double().var()
    assert float(torch.tensor(errors).double().square().mean() / variance) == pytest.approx(1, abs=0.4)


def test_the_standard_error_over_draws_is_that_of_repetitions():
    loss = away()
    result = [average_sharpness(loss, Ball(0.1), num_samples=12, seed=seed) for seed in range(200)]
    assert_errors_are_the_spread([f.value for f in result], [f.details["stderr_draws"] for f in result])


def test_the_standard_error_over_draws_and_batches_is_that_of_repetitions():
    """New batches and new draws in every repetition, a loss whose sharpness differs between batches."""

    class Scaled(Quadratic):
        def forward(self, x=None):
            return super().forward() * (1 + 0.3 * x[:, 0])

    model, result = Scaled(symmetric([1.0, 0.5, 2.0])), []
    for seed in range(200):
        generator = torch.Generator().manual_seed(seed)
        data = [(torch.randn(1, 3, generator=generator).double(), torch.zeros(1)) for _ in range(5)]
        result.append(average_sharpness(Loss(model, mean, data), Ball(0.1), num_samples=6, seed=seed))
    assert_errors_are_the_spread([f.value for f in result], [f.stderr for f in result])
    assert all(f.stderr >= f.details["stderr_draws"] for f in result)


@pytest.mark.parametrize("measure", [average_sharpness, worst_case_sharpness])
def test_the_same_seed_gives_the_same_bits(measure):
    results = []
    own = {"num_restarts": 2} if measure is worst_case_sharpness else {"num_samples": 8}
    for global_seed in (1, 2):
        with torch.random.fork_rng():
            torch.manual_seed(global_seed)
            loss = Loss(network(cnn), cross_entropy, batches(cnn))
            state = torch.get_rng_state()
            results.append(measure(loss, Ball(2.0), seed=3, **own))
            assert torch.equal(torch.get_rng_state(), state)
    assert results[0] == results[1]
    assert measure(loss, Ball(2.0), seed=4, **own).value != results[0].value


def test_what_is_not_finite_is_not_a_number():
    model = network(mlp)
    data = batches(mlp)
    loss = Loss(model, lambda o, y: cross_entropy(o, y) + (model[0].weight.abs().max() - 3).clamp(min=0).log(), data)
    bad = Loss(model, cross_entropy, [(x * torch.nan, y) for x, y in data])
    overflowing = Loss(model, lambda o, y: cross_entropy(o, y) * (1e308 * (1 + model[0].weight[0, 0])), data)
    for case in (loss, bad, overflowing):
        for result in (worst_case_sharpness(case, Ball(5.0)), average_sharpness(case, Ball(50.0), num_samples=4)):
            assert math.isnan(result.value)
            assert not result.converged
            assert any(f"{value} at " in result.reason for value in ("nan", "inf"))
            assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["value"] is None


def test_results_say_how_they_were_made():
    seen = []
    loss = Loss(network(cnn), cross_entropy, batches(cnn))
    progress = lambda done, total: seen.append((done, total))  # noqa: E731
    result = worst_case_sharpness(
        loss, Ball(0.1, adaptive=True), num_steps=3, num_restarts=2, seed=5, progress=progress
    )
    assert seen == [(i, 18) for i in range(1, 19)]
    written = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert written["settings"]["ball"] == {"rho": 0.1, "norm": 2, "adaptive": "elementwise", "eta": 0.01}
    assert (
        written["settings"] | {"measure": "worst_case_sharpness", "num_steps": 3, "seed": 5, "m": 5}
        == written["settings"]
    )
    assert written["settings"]["batch_norm"] == "running statistics"
    assert set(written["provenance"]) >= {"sam_optim", "torch"}
    assert len(written["details"]["batch_values"]) == 3
    seen.clear()
    average_sharpness(loss, Ball(0.1, norm=math.inf), num_samples=3, progress=progress)
    assert seen == [(i, 9) for i in range(1, 10)]
    assert average_sharpness(loss, Ball(0.1), num_samples=2).stderr > 0


@pytest.mark.parametrize("measure", [average_sharpness, worst_case_sharpness])
def test_wrong_arguments_are_refused(measure):
    loss = away()
    with pytest.raises(ValueError, match="rho > 0"):
        measure(loss, Ball(0.0))
    with pytest.raises(ValueError, match="seed"):
        measure(loss, Ball(0.1), seed=-1)
    for name in ("num_steps", "num_restarts") if measure is worst_case_sharpness else ("num_samples",):
        with pytest.raises(ValueError, match=name):
            measure(loss, Ball(0.1), **{name: 0})


def test_mean_over_batches():
    mean_, stderr = mean_over_batches([1.0, 2.0, 6.0], [2, 2, 2])
    assert mean_ == pytest.approx(3.0, rel=EPS)
    assert stderr == pytest.approx(math.sqrt(7 / 3), rel=4 * EPS)
    assert math.isnan(mean_over_batches([1.0], [7])[1])


def test_a_grid_of_radii_never_falls_and_shares_the_gradient_at_the_weights(monkeypatch):
    loss = Loss(network(cnn), cross_entropy, batches(cnn))
    real, calls = Loss.value_and_gradient, []
    monkeypatch.setattr(Loss, "value_and_gradient", lambda self: calls.append(0) or real(self))
    rhos = (2.0, 0.1, 0.5)
    grid = worst_case_sharpness(loss, [Ball(rho) for rho in rhos], num_steps=10, num_restarts=1)
    assert len(calls) == 3 * (1 + 3 * 9)  # batches, and balls with 9 gradients away from the weights
    assert [g.settings["ball"]["rho"] for g in grid] == list(rhos)
    ascending = [grid[k].details["batch_values"] for k in (1, 2, 0)]
    assert all(a <= b <= c for a, b, c in zip(*ascending, strict=True))
    assert grid[1].value == worst_case_sharpness(loss, Ball(0.1), num_steps=10, num_restarts=1).value
    assert max(grid[0].details["lengths"]) <= 2.0 * (1 + 1e3 * EPS)


def test_a_smaller_ball_counts_for_a_larger_one():
    """The loss has one narrow peak at a distance of 0.1, which a full step in a ball of radius 1 jumps over."""

    class Peak(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))

        def forward(self, x):
            return (1 - 10 * (torch.linalg.vector_norm(self.w - torch.tensor([0.1, 0.0])))).expand(len(x))

    loss = Loss(Peak(), mean, [(torch.zeros(2, 1), torch.zeros(2))])
    small, large = worst_case_sharpness(loss, [Ball(0.1), Ball(1.0)], num_steps=2)
    assert small.value == pytest.approx(1.0, rel=1e-6)
    assert large.details["batch_values"] == small.details["batch_values"]
    assert large.details["lengths"] == pytest.approx([0.1])


def test_a_grid_of_the_average_is_that_of_single_balls():
    loss = Loss(network(cnn), cross_entropy, batches(cnn))
    for norm in (2, math.inf):
        balls = [Ball(rho, norm=norm, adaptive=True) for rho in (0.3, 0.1)]
        for together, ball in zip(average_sharpness(loss, balls, num_samples=10), balls, strict=True):
            alone = average_sharpness(loss, ball, num_samples=10)
            assert together.details["batch_values"] == pytest.approx(alone.details["batch_values"], rel=1e-9)
            assert together.settings == alone.settings


@pytest.mark.parametrize("measure", [average_sharpness, worst_case_sharpness])
def test_a_grid_of_different_balls_is_refused(measure):
    for balls in ([Ball(0.1), Ball(0.2, norm=math.inf)], [Ball(0.1), Ball(0.1, adaptive=True)], []):
        with pytest.raises(ValueError, match="rho alone"):
            measure(away(), balls)


def test_the_slope_costs_no_accuracy():
    """Where the gradient is large the draws vary by rho ||g||, but the value only by what the Hessian gives."""
    loss, ball = away(), Ball(1e-3)
    result = average_sharpness(loss, ball, num_samples=100)
    hessian = float((loss.model.a**2).sum())
    assert result.stderr == pytest.approx(ball.rho**2 * math.sqrt(hessian / 2 / 100), rel=0.3)
    assert ball.rho * float(loss.model.gradient().norm()) / 10 > 100 * result.stderr


@pytest.mark.parametrize("num", [2, 3, 10])
def test_taking_off_the_slope_leaves_no_bias(num):
    """E[exp(s)] - 1 for slopes s ~ N(0, 1), 50000 times: the coefficient for a draw must not have looked at it."""
    slopes = torch.randn(50_000, num, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    means = torch.func.vmap(lambda s: _without_slope(s.exp() - 1, s, 1.0).mean())(slopes)
    error = float(means.std()) / math.sqrt(len(means))
    assert abs(float(means.mean()) - (math.exp(0.5) - 1)) < 4 * error
    assert float(means.var()) < float((slopes.exp() - 1).mean(dim=1).var())


def test_the_average_lies_within_its_errors():
    """200 seeds against one mean of many draws: normal at one and two standard errors, none beyond five."""
    loss, ball = Loss(network(mlp), cross_entropy, batches(mlp, (5,))), Ball(0.2)
    exact = average_sharpness(loss, ball, num_samples=800, seed=9999)
    result = [average_sharpness(loss, ball, num_samples=12, seed=seed) for seed in range(200)]
    z = torch.tensor([(f.value - exact.value) / math.hypot(f.stderr, exact.stderr) for f in result])
    assert z.abs().max() < 5
    assert 0.58 < float((z.abs() < 1).double().mean()) < 0.78
    assert float((z.abs() < 2).double().mean()) > 0.89


def test_a_loss_without_a_gradient_has_an_average():
    """The share of errors is a step function of the weights."""
    model, data = network(mlp), batches(mlp)
    errors = lambda o, y: (o.argmax(1) != y).double().mean()  # noqa: E731
    result = average_sharpness(Loss(model, errors, data), Ball(0.5), num_samples=50)
    assert 0 < result.stderr < abs(result.value) + 1
    assert result.converged


def test_batches_that_are_equal_have_draws_of_their_own():
    data = batches(mlp, (5,)) * 3
    result = average_sharpness(Loss(network(mlp), cross_entropy, data), Ball(0.2), num_samples=10)
    assert len(set(result.details["batch_values"])) == 3
    assert result.details["base_losses"][0] == result.details["base_losses"][2]


def test_images_with_their_channels_last_change_only_rounding():
    for flatten in (nn.Flatten(), ViewsRows()):
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), flatten, nn.Linear(144, 3)).eval()
        x, y = torch.randn(5, 2, 8, 8, generator=torch.Generator().manual_seed(0)), torch.tensor([0, 1, 2, 0, 1])
        value, gradient = Loss(model, cross_entropy, [(x, y)]).value_and_gradient()
        expected = cross_entropy(model(x), y)
        assert float(value) == pytest.approx(float(expected.detach()), rel=1e-6)
        torch.testing.assert_close(gradient, list(torch.autograd.grad(expected, list(model.parameters()))))


class ViewsRows(nn.Module):
    """Refuses channels that come last."""

    def forward(self, x):
        return x.view(len(x), -1)


@pytest.mark.parametrize("measure", [worst_case_sharpness, average_sharpness])
def test_a_model_in_place_of_a_loss_is_told_what_to_pass(measure):
    with pytest.raises(TypeError, match=r"pass Loss\(model, criterion, batches\), got Linear"):
        measure(torch.nn.Linear(2, 2), Ball(0.1))


def test_searches_that_disagree_are_said():
    """A loss with a low hill along the gradient and a high one elsewhere, which only some random points lead to."""

    class Hills(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))

        def forward(self, x):
            low = torch.exp(-8 * (self.w - torch.tensor([0.9, 0.0])).square().sum())
            high = 3 * torch.exp(-30 * (self.w - torch.tensor([-0.7, 0.7])).square().sum())
            return (low + high).expand(len(x))

    loss = Loss(Hills(), mean, [(torch.zeros(2, 1), torch.zeros(2))])
    with torch.no_grad():
        angles = torch.linspace(0, 2 * math.pi, 2000, dtype=torch.float64)
        radii = torch.linspace(0, 1, 400, dtype=torch.float64)[:, None]
        grid = torch.stack([(radii * angles.cos()).flatten(), (radii * angles.sin()).flatten()], dim=1)
        low = torch.exp(-8 * (grid - torch.tensor([0.9, 0.0])).square().sum(1))
        high = 3 * torch.exp(-30 * (grid - torch.tensor([-0.7, 0.7])).square().sum(1))
        highest = float((low + high).max() - loss.value())
    results = [worst_case_sharpness(loss, Ball(1.0), num_steps=20, num_restarts=8, seed=seed) for seed in range(10)]
    assert max(r.value for r in results) == pytest.approx(highest, rel=1e-3)
    for r in results:
        values = sorted(r.details["restart_values"][0])
        assert len(values) == 8
        assert values[-1] == r.value
        assert r.details["spread"][0] == pytest.approx(1 - values[-2] / values[-1])
        assert r.converged == (r.details["spread"][0] <= 0.05)
        assert r.converged or "differ by" in r.reason
    single = worst_case_sharpness(loss, Ball(1.0), num_restarts=1)
    assert not single.converged
    assert "single search" in single.reason
    assert single.value < 0.5 * highest


FITTED = [(mlp, Ball(0.5)), (mlp, Ball(0.1, norm=math.inf)), (Attention, Ball(0.3)), (cnn, Ball(1.0, adaptive=True))]


@pytest.mark.parametrize(("kind", "ball"), FITTED, ids=["mlp", "mlp, sup", "attention", "cnn"])
def test_the_default_reaches_the_best_of_many_long_searches(kind, ball):
    model, data = network(kind), batches(kind, (16,))
    optimizer = torch.optim.Adam(model.parameters(), lr=0.02)
    for _ in range(100):
        optimizer.zero_grad()
        cross_entropy(model.eval()(data[0][0]), data[0][1]).backward()
        optimizer.step()
    loss = Loss(model, cross_entropy, data)
    best = worst_case_sharpness(loss, ball, num_steps=60, num_restarts=12, seed=7).value
    assert worst_case_sharpness(loss, ball).value >= 0.95 * best


LANDSCAPES = {
    "waves": lambda w: torch.sin(2 * w[0] + 0.5) * torch.cos(2 * w[1] - 1) + 0.3 * w[0] - 0.2 * w[1],
    "kinks": lambda w: sum(b * torch.relu(b * w[0] - w[1] + 0.5) for b in (1.5, -0.7, 0.4, -1.2)),
    "two layers": lambda w: sum((torch.tanh(a * w[0]) * w[1] - a) ** 2 for a in (0.6, -1.4, 2.0)),
}
PLANES = [Ball(1.5), Ball(1.0, norm=math.inf), Ball(1.0, norm=math.inf, adaptive=True, eta=0), Ball(2.0, adaptive=True)]


@pytest.mark.parametrize("ball", PLANES, ids=str)
@pytest.mark.parametrize("name", LANDSCAPES)
def test_two_weights_against_a_grid_of_the_whole_ball(name, ball):
    class Landscape(nn.Module):
        def __init__(self, start):
            super().__init__()
            self.w = nn.Parameter(torch.tensor(start, dtype=torch.float64))

        def forward(self, x):
            return LANDSCAPES[name](self.w).expand(len(x))

    line = torch.linspace(-1, 1, 401, dtype=torch.float64)
    u = torch.cartesian_prod(line, line).T
    if ball.norm == 2:
        u = torch.cat([u[:, u.norm(dim=0) <= 1], u / u.norm(dim=0).clamp(min=1)], dim=1)
    for start in ([0.3, -0.4], [-0.9, 0.8], [1.2, 0.1], [-0.2, -1.5]):
        loss = Loss(Landscape(start), mean, [(torch.zeros(2, 1), torch.zeros(2))])
        scale = ball.rho * ball.scales(loss.params)[0].expand(2)[:, None]
        highest = float((LANDSCAPES[name](loss.params[0].detach()[:, None] + scale * u) - loss.value()).max())
        result = worst_case_sharpness(loss, ball)
        assert result.value <= highest * (1 + 1e-3), start
        assert result.value >= 0.95 * highest, start


@pytest.mark.parametrize("norm", [2, math.inf])
def test_noise_as_long_as_the_radius(norm):
    """E ||d||^2 = rho^2: for a quadratic loss S = rho^2 tr A / (2 P)."""
    a = symmetric([5.0, 2.0, 0.5, 0.1])
    loss = unshifted(Quadratic(a, None, torch.ones(4, dtype=torch.float64)), num=1)
    result = average_in_ball(loss, Ball(0.3, norm=norm), num_samples=2000)
    expected = 0.3**2 / 2 * float(a.trace()) * (1 / 4 if norm == 2 else 1 / 3)
    assert abs(result.value - expected) < 4 * result.stderr
    assert result.stderr < 0.05 * expected
    assert result.settings["measure"] == "average_in_ball"
    assert result.settings["ball"]["rho"] == 0.3
