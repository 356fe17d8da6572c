"""Trace, diagonal and Frobenius norm: free of bias, with honest errors, against dense matrices and known spectra."""

import math

import pytest
import torch
from networks import NETWORKS, Dense, OfMatrix, batches, flat, mlp, network
from quadratic import Quadratic, symmetric, unshifted
from torch import nn

from sam_optim.core.geometry import Ball
from sam_optim.loss import MATRICES, Loss
from sam_optim.measures import deflation as deflation_module
from sam_optim.measures import (
    hessian_diagonal,
    hessian_eigenvalues,
    hessian_frobenius_norm,
    hessian_trace,
    relative_flatness,
    spectral_density,
)

EPS = torch.finfo(torch.float64).eps
cross_entropy = nn.CrossEntropyLoss()
DIMENSION = 200
# every network with the Hessian, every matrix with one network; the products of all pairs are tests of the loss
CASES = [(kind, "hessian") for kind in NETWORKS] + [(mlp, matrix) for matrix in MATRICES if matrix != "hessian"]
SPECTRA = {
    "outliers": [50.0, 20, 10, 5, -3] + [math.cos(i) * 0.1 for i in range(DIMENSION - 5)],
    "power": [1 / (i + 1) for i in range(DIMENSION)],
    "flat": [1 + i / DIMENSION for i in range(DIMENSION)],
    "both signs": [math.cos(math.pi * i / DIMENSION) for i in range(DIMENSION)],
}


def whole(data):
    return torch.cat([x for x, _ in data]), torch.cat([y for _, y in data])


def of_spectrum(name):
    a = symmetric(SPECTRA[name])
    return a, OfMatrix(a)


def of_diagonal(*values):
    return unshifted(Quadratic(torch.diag(torch.tensor(values, dtype=torch.float64))), num=1)


def one_probe(a):
    """Standard deviation of Hutchinson's estimator with one probe."""
    return math.sqrt(2 * float(a.square().sum() - a.diagonal().square().sum()))


@pytest.mark.parametrize(("kind", "matrix"), CASES)
def test_hutchinson_and_its_standard_error(kind, matrix):
    """Var of one probe is 2 (||A||_F^2 - sum_i A_ii^2)."""
    model, data = network(kind).eval(), batches(kind)
    a = Dense(model, cross_entropy, whole(data)).matrix(matrix)
    budget = min(150, len(a) - 1)  # with as many as there are parameters it would be exact
    result = hessian_trace(Loss(model, cross_entropy, data), matrix=matrix, num_probes=budget, method="hutchinson")
    assert abs(result.value - float(a.trace())) < 4 * result.stderr
    assert result.stderr == pytest.approx(one_probe(a) / budget**0.5, rel=0.4)  # known to 7 to 15 %
    assert result.num_samples == len(result.details["probes"]) == result.details["num_products"] == budget


@pytest.mark.parametrize(("kind", "matrix"), CASES)
@pytest.mark.parametrize("adaptive", [False, True])
def test_exact_with_as_many_probes_as_parameters(kind, matrix, adaptive):
    model, data = network(kind).eval(), batches(kind)
    loss, ball = Loss(model, cross_entropy, data), Ball(0.0, adaptive=adaptive)
    t = flat([s.expand_as(p) for s, p in zip(ball.scales(loss.params), loss.params, strict=True)])
    a = t[:, None] * Dense(model, cross_entropy, whole(data)).matrix(matrix) * t
    arguments = {"ball": ball, "matrix": matrix, "num_probes": len(a)}
    trace, norm = hessian_trace(loss, **arguments), hessian_frobenius_norm(loss, **arguments)
    assert trace.value == pytest.approx(float(a.trace()), rel=1e-12)
    assert norm.value == pytest.approx(float(a.norm()), rel=1e-12)
    assert trace.stderr < 1e-14 * float(a.diagonal().abs().sum())
    assert norm.stderr < 1e-14 * norm.value
    diagonal = hessian_diagonal(loss, **arguments)
    torch.testing.assert_close(flat(diagonal.values), a.diagonal(), rtol=1e-12, atol=1e-14)
    assert [x.shape for x in diagonal.values] == [p.shape for p in loss.params]
    assert not flat(diagonal.stderr).any()


@pytest.mark.parametrize(
    ("kind", "num_seeds"), [(mlp, 40), *(pytest.param(kind, 200, marks=pytest.mark.slow) for kind in NETWORKS)]
)
def test_errors_over_seeds_of_a_network(kind, num_seeds):
    """Errors in units of the standard error: mean square about 1, none beyond 4, no bias."""
    model, data = network(kind).eval(), batches(kind, (12,))
    loss = Loss(model, cross_entropy, data)
    exact = float(Dense(model, cross_entropy, whole(data)).matrix("hessian").trace())
    check_calibration([hessian_trace(loss, num_probes=36, seed=seed) for seed in range(num_seeds)], exact)


@pytest.mark.parametrize("measure", [hessian_trace, hessian_frobenius_norm])
@pytest.mark.parametrize(
    "name", ["outliers", "flat", *(pytest.param(n, marks=pytest.mark.slow) for n in ("power", "both signs"))]
)
def test_200_seeds_of_known_spectra(name, measure):
    a, loss = of_spectrum(name)
    exact = float(a.trace() if measure is hessian_trace else a.norm())
    check_calibration([measure(loss, num_probes=60, seed=seed) for seed in range(200)], exact)


def check_calibration(found, exact):
    z = torch.tensor([(f.value - exact) / f.stderr for f in found], dtype=torch.float64)
    errors = torch.tensor([f.value - exact for f in found], dtype=torch.float64)
    # 15 to 30 probes: |z| > 4 has a probability of 1e-3 to 4e-4 under Student's t
    assert int((z.abs() > 4).sum()) <= 2
    assert 0.6 < float(z.square().mean()) < 1.15 + 5 * (2 / len(z)) ** 0.5  # of a t distribution of 15: 1.15
    assert abs(float(errors.mean())) < 4 * float(errors.std()) / len(found) ** 0.5


@pytest.mark.parametrize("name", SPECTRA)
def test_products_at_equal_standard_error(name):
    """A tenth of Hutchinson's where few eigenvalues stand out; where none does, a basis of a few vectors is lost."""
    a, loss = of_spectrum(name)
    result = [hessian_trace(loss, seed=seed) for seed in range(100)]
    if name in ("flat", "both signs"):
        assert sum(f.details["num_deflated"] for f in result) / 100 < 10
    errors = [f.value - float(a.trace()) for f in result]
    ratio = one_probe(a) ** 2 / 100 / (sum(e * e for e in errors) / 100)
    # a tenth of the products is lost at most, and 100 seeds know the ratio to 14 %: 0.9 (1 - 2 * 0.14) = 0.65
    assert ratio > {"outliers": 100, "power": 10}.get(name, 0.65)


def middling(num, *, low=10.0, step=1.0):
    """So few eigenvalues that a basis may pay, so many that it may not."""
    return [low + step * i for i in range(num)] + [low * math.cos(i) / 20 for i in range(DIMENSION - num)]


def with_a_useless_basis(budget):
    """The squared error in units of Hutchinson's where half of the products are lost, and a coefficient is fitted to
    the n others, which costs 1 / (n - 2); with two standard errors of 200 seeds."""
    n = budget - budget // 2
    return 2 * (1 + 1 / (n - 2)) * (1 + 2 * (2 / 200) ** 0.5)


DOUBTFUL = {  # a spectrum, and by budget the bound of the squared error, which is never above `with_a_useless_basis`
    "6": (middling(6), {22: 0.3, 30: 0.2, 60: 0.1, 100: 0.1}),
    "20": (middling(20), {22: 1.8, 30: 1.8, 60: 0.05, 100: 0.05}),
    "30": (middling(30, low=1.0, step=0.02), {22: 2.5, 30: 2.5, 60: 1.6, 100: 0.1}),
    "one beside a bulk": (
        [2.2] + [math.cos(math.pi * i / 199) * 0.5 for i in range(199)],
        dict.fromkeys((22, 30), 1.5),
    ),
}


@pytest.mark.parametrize(
    ("name", "num_probes"),
    [
        pytest.param(name, n, marks=pytest.mark.slow if n == 100 else ())
        for name, (_, bounds) in DOUBTFUL.items()
        for n in bounds
    ],
)
def test_where_it_is_doubtful_whether_anything_stands_out_there_is_no_bias(name, num_probes):
    """A basis of no use takes half of the products at most; one that is of use gains far more."""
    spectrum, bounds = DOUBTFUL[name]
    assert bounds[num_probes] <= with_a_useless_basis(num_probes)
    a = symmetric(spectrum)
    loss, exact = OfMatrix(a), float(a.trace())
    result = [hessian_trace(loss, num_probes=num_probes, seed=seed) for seed in range(200)]
    check_calibration(result, exact)
    one_product = one_probe(a) ** 2
    assert sum((f.value - exact) ** 2 for f in result) / 200 < bounds[num_probes] * one_product / num_probes
    for one in result:
        assert one.value == pytest.approx(math.fsum(one.details["probes"]) / one.num_samples, rel=1e-12)


def test_the_trace_of_a_diagonal_matrix_is_exact():
    """Hutchinson's estimator has no variance there, and deflation must not bring one."""
    result = hessian_trace(of_diagonal(1.0, 2.0, -4.0), num_probes=2)
    assert result.value == pytest.approx(-1, rel=10 * EPS)
    assert result.stderr <= 10 * EPS
    values = [90.0, -60, 40, *torch.linspace(-1, 3, 300, dtype=torch.float64).tolist()]
    many = hessian_trace(of_diagonal(*values), num_probes=60)
    assert many.details["num_deflated"] > 0
    assert many.value == pytest.approx(sum(values), rel=1e-12)


def test_of_low_rank_the_trace_is_exact_to_rounding():
    loss = unshifted(Quadratic(symmetric([5.0, 4, 3, 2, 1] + [0.0] * 195)), num=1)
    for seed in range(20):
        result = hessian_trace(loss, num_probes=40, seed=seed)
        assert result.value == pytest.approx(15, rel=1e-12)
        assert abs(result.value - 15) <= 4 * result.stderr
        assert result.stderr < 1e-12


@pytest.mark.parametrize("bad", [1, 4, 10, 13, 30])
def test_what_is_not_finite_ends_the_trace_at_once(bad):
    a, _ = of_spectrum("outliers")
    count = 0

    def product(v):
        nonlocal count
        count += 1
        return a @ v * (math.nan if count == bad else 1.0)

    loss = OfMatrix(product, dimension=DIMENSION)
    for tol in (None, 1e-9):
        count = 0
        result = hessian_trace(loss, tol=tol)
        assert math.isnan(result.value)
        assert not result.converged
        assert "at the weights" in result.reason
        assert count == result.details["num_products"] == bad


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_a_multiple_of_the_identity_needs_one_vector(value):
    result = hessian_trace(OfMatrix(value * torch.eye(DIMENSION, dtype=torch.float64)))
    assert result.value == value * DIMENSION
    assert result.details["num_deflated"] <= 1


def test_trace_stops_on_the_standard_error():
    a, loss = of_spectrum("power")
    result = hessian_trace(loss, num_probes=199, tol=0.05)
    assert result.converged
    assert result.stderr <= 0.05 * result.value
    assert result.num_samples >= 10
    assert result.details["num_products"] < 0.6 * (one_probe(a) / (0.05 * float(a.trace()))) ** 2
    short = hessian_trace(loss, num_probes=12, tol=1e-6)
    assert not short.converged
    assert "12 probes" in short.reason
    assert math.isfinite(short.value)


def test_the_basis_stays_within_its_memory(monkeypatch):
    a, loss = of_spectrum("power")
    monkeypatch.setattr(deflation_module, "BASIS_BYTES", 6 * 8 * DIMENSION)
    result = hessian_trace(loss)
    assert result.details["num_deflated"] == 6
    assert abs(result.value - float(a.trace())) < 4 * result.stderr
    monkeypatch.setattr(deflation_module, "BASIS_BYTES", 8 * DIMENSION)
    assert hessian_trace(loss).details["num_deflated"] == 0


@pytest.mark.parametrize("name", SPECTRA)
def test_every_entry_of_the_diagonal_has_an_honest_error(name):
    a, loss = of_spectrum(name)
    result = [hessian_diagonal(loss, num_probes=60, seed=seed) for seed in range(20)]
    z = torch.stack([(flat(f.values) - a.diagonal()) / flat(f.stderr) for f in result])
    assert 0.8 < float(z.square().mean()) < 1.4
    assert float(z.mean(dim=0).abs().max()) < 5 * 1.1 / 20**0.5  # the largest of 200
    if name in ("outliers", "power"):
        plain = (a.square().sum(dim=1) - a.diagonal().square()).sum() / 60  # of Hutchinson's, all entries together
        assert float(flat(result[0].stderr).square().sum()) < 0.1 * float(plain)


def test_frobenius_norm_of_a_network_agrees_with_its_eigenvalues():
    model, data = network(mlp).eval(), batches(mlp)
    loss = Loss(model, cross_entropy, data)
    every = hessian_eigenvalues(loss, num=51).eigenvalues
    result = hessian_frobenius_norm(loss, num_probes=40)
    assert abs(result.value - float(every.norm())) < 4 * result.stderr
    assert result.stderr < 0.01 * result.value


@pytest.mark.parametrize("measure", [hessian_trace, hessian_diagonal, hessian_frobenius_norm])
@pytest.mark.parametrize("num_probes", [40, 51])
def test_progress_counts_products(measure, num_probes):
    seen = []
    loss = Loss(network(mlp), cross_entropy, batches(mlp))
    result = measure(loss, num_probes=num_probes, progress=lambda done, total: seen.append((done, total)))
    assert seen == [(i + 1, num_probes) for i in range(num_probes)]
    assert result.details["num_products"] == num_probes


@pytest.mark.parametrize("measure", [hessian_trace, hessian_frobenius_norm, relative_flatness])
def test_errors_of_drawn_labels_hold_their_draw(measure):
    """With one draw of labels for all probes, 0 of 60 seeds were within two errors of the Fisher matrix."""
    model, data = network(mlp).eval(), batches(mlp, (12,))
    loss, f = Loss(model, cross_entropy, data), Dense(model, cross_entropy, whole(data)).matrix("fisher")
    if measure is relative_flatness:
        exact = measure(loss, "3", matrix="fisher").value
        results = [measure(loss, "3", matrix="fisher_mc", num_probes=30, seed=seed) for seed in range(50)]
    else:
        exact = float(f.trace() if measure is hessian_trace else f.norm())
        results = [measure(loss, matrix="fisher_mc", num_probes=60, seed=seed) for seed in range(50)]
    check_calibration(results, exact)
    assert sum(low <= exact <= high for low, high in (x.interval for x in results)) >= 43  # 47.5 +- 1.5


def test_drawn_labels_in_eigenvalues_and_densities():
    model, data = network(mlp).eval(), batches(mlp, (12,))
    loss, f = Loss(model, cross_entropy, data), Dense(model, cross_entropy, whole(data)).matrix("fisher")
    exact = torch.linalg.eigvalsh(f)[-2:].flip(0)
    results = [hessian_eigenvalues(loss, matrix="fisher_mc", num=2, seed=seed) for seed in range(50)]
    within = torch.stack([(x.eigenvalues - exact).abs() <= 2 * x.errors for x in results]).sum(0)
    assert (within >= 43).all()
    assert float(torch.stack([x.errors for x in results]).mean(0)[0]) < 0.2 * float(exact[0])
    densities = [spectral_density(loss, matrix="fisher_mc", num_lanczos=5, seed=seed) for seed in range(50)]
    means = [(x.details["moments"][0], x.details["moment_stderr"][0]) for x in densities]
    assert sum(abs(mean - float(f.trace()) / len(f)) <= 2.26 * stderr for mean, stderr in means) >= 43


def test_drawn_labels_in_the_diagonal():
    model, data = network(mlp).eval(), batches(mlp, (12,))
    loss, f = Loss(model, cross_entropy, data), Dense(model, cross_entropy, whole(data)).matrix("fisher")
    results = [hessian_diagonal(loss, matrix="fisher_mc", num_probes=60, seed=seed) for seed in range(5)]
    z = torch.stack([(flat(x.values) - f.diagonal()) / flat(x.stderr) for x in results])
    assert 0.5 < float(z.square().mean()) < 2.0
