"""Eigenvalues against dense matrices from double backward, in float64; what measures of curvature have in common."""

import json
from functools import partial

import pytest
import torch
from networks import NETWORKS, Dense, batches, cnn, flat, mlp, network
from quadratic import Quadratic, symmetric, unshifted
from torch import nn

from sam_optim.core.geometry import Ball, ProductBall
from sam_optim.loss import MATRICES, Loss
from sam_optim.measures import (
    hessian_diagonal,
    hessian_eigenvalues,
    hessian_frobenius_norm,
    hessian_trace,
    spectral_density,
)

EPS = torch.finfo(torch.float64).eps
cross_entropy = nn.CrossEntropyLoss()
MEASURES = [hessian_eigenvalues, hessian_trace, hessian_diagonal, hessian_frobenius_norm, spectral_density]
MEASURES += [partial(hessian_trace, method="hutchinson", num_probes=30), partial(hessian_trace, num_probes=30)]
MEASURES += [partial(hessian_trace, matrix="fisher_mc")]


def whole(data):
    return torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])


def of_diagonal(*values):
    return unshifted(Quadratic(torch.diag(torch.tensor(values, dtype=torch.float64)), None, None))


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("matrix", MATRICES)
def test_all_eigenvalues_of_a_network(kind, matrix):
    """1e-4 relative is asked for; a complete basis gives them to rounding of the largest."""
    model, data = network(kind).eval(), batches(kind)
    expected = torch.linalg.eigvalsh(Dense(model, cross_entropy, whole(data)).matrix(matrix)).flip(0)
    result = hessian_eigenvalues(Loss(model, cross_entropy, data), num=len(expected), matrix=matrix)
    torch.testing.assert_close(result.eigenvalues, expected, rtol=1e-4, atol=1e3 * EPS * float(expected[0]))
    assert result.converged


@pytest.mark.parametrize("kind", NETWORKS)
@pytest.mark.parametrize("adaptive", [False, True, "filter", "layer"])
@pytest.mark.parametrize("which", ["largest", "smallest", "magnitude"])
def test_extreme_eigenvalues_in_the_geometry_of_a_ball(kind, adaptive, which):
    model, data = network(kind).eval(), batches(kind)
    loss, ball = Loss(model, cross_entropy, data), Ball(0.0, adaptive=adaptive)
    t = flat([s.expand_as(p) for s, p in zip(ball.scales(loss.params), loss.params, strict=True)])
    a = t[:, None] * Dense(model, cross_entropy, whole(data)).matrix("hessian") * t
    values = torch.linalg.eigvalsh(a)
    key = {"largest": -values, "smallest": values, "magnitude": -values.abs()}[which]
    expected = values[key.argsort()[:3]].sort(descending=True).values
    result = hessian_eigenvalues(loss, num=3, ball=ball, which=which)
    torch.testing.assert_close(result.eigenvalues, expected, rtol=1e-4, atol=1e3 * EPS * float(values.abs().max()))
    for value, residual, vector in zip(result.eigenvalues, result.residuals, result.eigenvectors, strict=True):
        assert [x.shape for x in vector] == [p.shape for p in loss.params]
        x = flat(vector)
        assert float(x.norm()) == pytest.approx(1, rel=100 * EPS)
        true = float((a @ x - value * x).norm())
        assert float(residual) == pytest.approx(true, abs=1e3 * EPS * float(values.abs().max()))
    assert result.converged


def test_the_largest_is_algebraic():
    """PyHessian calls -5 the top eigenvalue here."""
    loss = of_diagonal(-5.0, 2.0, 1.0)
    for which, expected in {"largest": 2.0, "smallest": -5.0, "magnitude": -5.0}.items():
        assert hessian_eigenvalues(loss, which=which).eigenvalues.tolist() == pytest.approx([expected], rel=100 * EPS)
    assert hessian_eigenvalues(loss, num=3).eigenvalues.tolist() == pytest.approx([2.0, 1.0, -5.0], rel=100 * EPS)


@pytest.mark.parametrize(
    "values",
    [(3.0, 3.0, 1.0, 0.5), (0.0,) * 6, (1.0,) * 6, (5.0, 5.0, 5.0, 1.0, 1.0, 0.0, 0.0), (-1.0, -1.0, -2.0, -2.0)],
    ids=str,
)
@pytest.mark.parametrize("num", [1, 2, 4])
def test_equal_eigenvalues_are_all_found(values, num):
    loss = unshifted(Quadratic(symmetric(values)))
    result = hessian_eigenvalues(loss, num=num)
    assert result.eigenvalues.tolist() == pytest.approx(sorted(values, reverse=True)[:num], rel=1e-12, abs=1e-12)
    assert result.converged
    vectors = torch.stack([flat(v) for v in result.eigenvectors])
    torch.testing.assert_close(vectors @ vectors.T, torch.eye(num, dtype=torch.float64), rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    ("values", "num"),
    [((10.0, 10.0, *range(9, 0, -1)), 2), ((5.0, 5.0, 5.0, *torch.linspace(0, 4, 40).tolist()), 3)],
    ids=["10 values", "41 values"],
)
def test_equal_eigenvalues_of_a_small_matrix_with_a_rich_spectrum(values, num):
    """The first Krylov space holds one vector of each eigenspace, and converges before it ends."""
    result = hessian_eigenvalues(unshifted(Quadratic(symmetric(values))), num=num)
    assert result.eigenvalues.tolist() == pytest.approx([values[0]] * num, rel=1e-12)
    assert result.converged
    assert result.num_products == len(values)
    early = hessian_eigenvalues(unshifted(Quadratic(symmetric(values))), num=num, max_products=len(values) - 1)
    assert early.converged  # to `tol`, which is all that so few products can tell


def test_no_more_products_than_parameters_and_few_for_one_eigenvalue():
    spectrum = torch.linspace(0, 1, 400, dtype=torch.float64).pow(8).tolist()
    loss = unshifted(Quadratic(symmetric([*spectrum, 2.0])), num=1)
    result = hessian_eigenvalues(loss)
    assert result.eigenvalues.tolist() == pytest.approx([2.0], rel=1e-7)  # the square of tol, times the gap
    assert result.num_products <= 25
    assert hessian_eigenvalues(of_diagonal(1.0, 2.0), num=2).num_products == 2


@pytest.mark.parametrize("seed", range(5))
def test_stop_on_the_value(seed):
    """About the root of the products' accuracy is enough; `errors` bounds what is left."""
    spectrum = torch.linspace(0, 1, 400, dtype=torch.float64).pow(8).tolist()
    loss = unshifted(Quadratic(symmetric([*spectrum, 2.0, 1.5])), num=1)
    early = hessian_eigenvalues(loss, num=2, tol=1e-3, stop="value", seed=seed)
    late = hessian_eigenvalues(loss, num=2, tol=1e-3, seed=seed)
    error = (early.eigenvalues - torch.tensor([2.0, 1.5], dtype=torch.float64)).abs()
    assert early.converged
    assert (error <= early.errors + 100 * EPS).all()
    assert (early.errors <= 1e-3 * early.eigenvalues).all()
    assert (early.residuals > 1e-3 * early.eigenvalues).any()
    assert early.num_products < late.num_products
    assert (late.residuals <= 1e-3 * late.eigenvalues).all()


@pytest.mark.parametrize("kind", NETWORKS)
def test_both_ends_from_one_space(kind):
    model, data = network(kind).eval(), batches(kind)
    values = torch.linalg.eigvalsh(Dense(model, cross_entropy, whole(data)).matrix("hessian")).flip(0)
    loss = Loss(model, cross_entropy, data)
    result = hessian_eigenvalues(loss, num=2, which="both")
    expected = values[[0, 1, -2, -1]]
    torch.testing.assert_close(result.eigenvalues, expected, rtol=1e-4, atol=1e3 * EPS * float(values.abs().max()))
    assert result.converged
    assert len(result.eigenvectors) == 4
    ends = [hessian_eigenvalues(loss, num=2, which=which).num_products for which in ("largest", "smallest")]
    assert result.num_products < sum(ends)


def test_not_converged_is_said():
    loss = unshifted(Quadratic(symmetric(torch.linspace(0, 1, 50).tolist())))
    result = hessian_eigenvalues(loss, max_products=5)
    assert not result.converged
    assert "max_products" in result.reason
    assert float(result.residuals) > 1e-4
    assert abs(float(result.eigenvalues) - 1) <= float(result.residuals) + 100 * EPS or float(result.eigenvalues) < 1


@pytest.mark.parametrize("matrix", MATRICES)
def test_float32_is_as_good_as_its_rounding(matrix):
    model, data = network(cnn).eval(), batches(cnn)
    expected = torch.linalg.eigvalsh(Dense(model, cross_entropy, whole(data)).matrix(matrix))[-2:].flip(0)
    result = hessian_eigenvalues(
        Loss(model.float(), cross_entropy, [(x.float(), y) for x, y in data]), num=2, matrix=matrix
    )
    torch.testing.assert_close(result.eigenvalues, expected, rtol=100 * torch.finfo(torch.float32).eps, atol=0)
    assert result.converged


def test_groups_of_a_product_ball_and_parameters_outside_it():
    a = symmetric([3.0, 2.0, 1.0, 0.5, 4.0])
    w = torch.linspace(1, 2, 5, dtype=torch.float64)
    loss = unshifted(Quadratic(a, None, w, sizes=[2, 1, 2]))
    first, _, last = loss.params
    ball = ProductBall([(Ball(0.1), [first]), (Ball(0.5, adaptive=True, eta=0.0), [last])])
    t = torch.cat([torch.ones(2), torch.zeros(1), w[3:]])
    expected = t[:, None] * a * t
    result = hessian_eigenvalues(loss, num=5, ball=ball)
    torch.testing.assert_close(result.eigenvalues, torch.linalg.eigvalsh(expected).flip(0), rtol=1e-12, atol=1e-12)
    trace = hessian_trace(loss, ball=ball, num_probes=200)
    assert trace.value == pytest.approx(float(expected.trace()), rel=1e-12)


@pytest.mark.parametrize("measure", MEASURES)
@pytest.mark.parametrize("num_batches", [1, 3])
def test_the_same_seed_gives_the_same_bits(measure, num_batches):
    data = batches(mlp, (4,) * num_batches)
    result = []
    for seed in (0, 0, 1):
        torch.rand(seed + 1)  # the global generator is somewhere else each time
        state = torch.get_rng_state()
        result.append(measure(Loss(network(mlp), cross_entropy, data), seed=seed).to_dict())
        assert torch.equal(torch.get_rng_state(), state)
    assert result[0] == result[1]
    assert result[0] != result[2]


def numbers(value):
    return [x for v in value for x in numbers(v)] if isinstance(value, list) else [value]


@pytest.mark.parametrize("measure", MEASURES)
def test_what_is_not_finite_is_not_a_number(measure):
    data = [(x * torch.nan, y) for x, y in batches(mlp)]
    result = measure(Loss(network(mlp), cross_entropy, data))
    assert not result.converged
    assert "is nan at the weights" in result.reason
    written = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    for name in ("eigenvalues", "residuals", "density", "value", "stderr", "values"):
        assert all(x is None for x in numbers(written.get(name)))


def test_results_say_how_they_were_made():
    seen = []
    loss = Loss(network(cnn), cross_entropy, batches(cnn))
    hessian_trace(loss, num_probes=3, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(1, 3), (2, 3), (3, 3)]
    seen.clear()
    result = hessian_eigenvalues(
        loss, ball=Ball(0.1, adaptive=True), progress=lambda done, total: seen.append((done, total))
    )
    assert len(seen) == result.num_products
    assert seen[0] == (1, min(210, loss.settings()["num_parameters"]))
    written = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert written["settings"] | {"which": "largest", "matrix": "hessian", "tol": 1e-4, "m": 5} == written["settings"]
    assert written["settings"]["ball"]["adaptive"] == "elementwise"
    assert "eigenvectors" not in written
    assert len(result.eigenvectors) == 1


def test_wrong_arguments_are_refused():
    loss = of_diagonal(1.0, 2.0)
    for wrong in (
        {"num": 0},
        {"num": 3},
        {"which": "top"},
        {"stop": "gap"},
        {"tol": 0.0},
        {"matrix": "kfac"},
        {"seed": -1},
    ):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            hessian_eigenvalues(loss, **wrong)
    for wrong in ({"num_probes": 1}, {"tol": -1.0}, {"matrix": "kfac"}, {"method": "xtrace"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            hessian_trace(loss, **wrong)
