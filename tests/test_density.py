"""Spectral density by stochastic Lanczos quadrature: mass, moments and errors, against known spectra."""

import math

import pytest
import torch
from networks import NETWORKS, Dense, OfMatrix, batches, mlp, network
from quadratic import Quadratic, symmetric, unshifted
from torch import nn

from sam_optim.loss import MATRICES, Loss
from sam_optim.measures import spectral_density

cross_entropy = nn.CrossEntropyLoss()
VALUES = [20.0, 5.0] + [math.cos(math.pi * i / 198) for i in range(198)]


def loss_of(values):
    return unshifted(Quadratic(symmetric(values)), num=1)


def true_density(grid, values, width):
    x = (grid[:, None] - torch.as_tensor(values, dtype=torch.float64)) / width
    return torch.exp(-0.5 * x.square()).mean(dim=1) / (width * math.sqrt(2 * math.pi))


def test_it_integrates_to_1_and_covers_the_spectrum():
    result = spectral_density(loss_of(VALUES))
    assert float(torch.trapezoid(result.density, result.grid)) == pytest.approx(1, abs=1e-5)
    assert result.eigenvalues.tolist() == pytest.approx([20.0, -1.0], rel=1e-3)
    assert float(result.grid[0]) < -1
    assert float(result.grid[-1]) > 20
    assert result.converged
    assert result.num_products == 10 * 80
    assert result.details["width"] == pytest.approx(0.01 * 21, rel=1e-3)


def test_density_and_moments_lie_within_their_errors_over_seeds():
    loss = OfMatrix(symmetric(VALUES))
    values = torch.tensor(VALUES, dtype=torch.float64)
    result = [spectral_density(loss, num_lanczos=30, seed=seed, width=0.3, num_points=200) for seed in range(60)]
    moments = torch.stack([(values**m).mean() for m in range(1, 5)])
    got, stderr = (torch.tensor([f.details[k] for f in result]).double() for k in ("moments", "moment_stderr"))
    z = (got - moments) / stderr
    assert 0.6 < float(z[:, :2].square().mean()) < 2.2  # Student's t of 9 degrees of freedom: 1.29, and skewed
    assert ((got.mean(dim=0) - moments).abs() < 4 * got.std(dim=0) / 60**0.5).all()
    inside = [i for i in range(200) if -0.8 < float(result[0].grid[i]) < 0.8]
    errors = torch.stack([(f.density - true_density(f.grid, VALUES, 0.3))[inside] / f.stderr[inside] for f in result])
    assert 0.6 < float(errors.square().mean()) < 2.2


@pytest.mark.parametrize(("kind", "matrix"), [*((k, "hessian") for k in NETWORKS), *((mlp, m) for m in MATRICES[1:])])
def test_moments_are_trace_and_frobenius_norm(kind, matrix):
    model, data = network(kind).eval(), batches(kind, (12,))
    a = Dense(model, cross_entropy, data[0]).matrix(matrix)
    result = spectral_density(Loss(model, cross_entropy, data), matrix=matrix, num_probes=20, num_lanczos=20)
    expected = torch.stack([a.trace(), a.square().sum()]) / len(a)
    moments, stderr = (torch.tensor(result.details[name])[:2] for name in ("moments", "moment_stderr"))
    assert ((moments - expected).abs() < 4 * stderr).all()
    assert float(result.eigenvalues[0]) == pytest.approx(float(torch.linalg.eigvalsh(a)[-1]), rel=1e-4)


def test_too_few_steps_are_said_and_one_probe_has_no_error():
    result = spectral_density(loss_of(torch.linspace(-1, 1, 200).tolist()), num_lanczos=3, num_probes=1)
    assert not result.converged
    assert "num_lanczos" in result.reason
    assert torch.isnan(result.stderr).all()
    assert torch.isfinite(result.density).all()
    enough = spectral_density(loss_of(torch.linspace(-1, 1, 20).tolist()), num_lanczos=20, num_probes=1)
    assert enough.converged
    assert "num_probes" in enough.reason


def test_a_space_that_ends_is_not_continued():
    """Two different eigenvalues: two products for each probe are all."""
    result = spectral_density(loss_of([1.0] * 5 + [3.0] * 5), num_probes=3, num_lanczos=8)
    assert result.num_products == 6
    assert result.eigenvalues.tolist() == pytest.approx([3.0, 1.0])
    for values in ([2.0] * 6, [2.0] * 5 + [2.0 + 2e-15], [0.0] * 6):  # but for the rounding of products
        same = spectral_density(loss_of(values), num_probes=2)
        assert float(torch.trapezoid(same.density, same.grid)) == pytest.approx(1, abs=1e-5)


def test_wrong_arguments_are_refused():
    for wrong in ({"num_probes": 0}, {"num_lanczos": 0}, {"num_points": 1}, {"width": 0.0}, {"matrix": "kfac"}):
        with pytest.raises(ValueError, match=next(iter(wrong))):
            spectral_density(loss_of([1.0, 2.0]), **wrong)
