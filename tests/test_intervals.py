"""Intervals of 95 %: Student's, over batches or draws; how often they hold the true value."""

import math

import pytest
import torch
from networks import OfMatrix
from quadratic import symmetric
from torch import nn

from sam_optim import (
    Ball,
    average_sharpness,
    fisher_rao_norm,
    gradient_coherence,
    gradient_regret,
    hessian_frobenius_norm,
    hessian_trace,
    worst_case_sharpness,
)
from sam_optim.core.results import student_quantile
from sam_optim.loss import Loss

cross_entropy = nn.CrossEntropyLoss()
MEASURES = {
    "average": lambda loss, seed: average_sharpness(loss, Ball(0.3), num_samples=6, seed=seed),
    "worst": lambda loss, seed: worst_case_sharpness(loss, Ball(0.3), num_steps=2, num_restarts=1, seed=seed),
    "fisher_rao": lambda loss, seed: fisher_rao_norm(loss),
    "coherence": lambda loss, seed: gradient_coherence(loss),
    "regret": lambda loss, seed: gradient_regret(loss),
}


def test_students_quantiles():
    scipy = pytest.importorskip("scipy.stats")
    for degrees in (1, 2, 3, 4, 14, 99, 1000):
        assert student_quantile(degrees) == pytest.approx(scipy.t.ppf(0.975, degrees), abs=1e-6)
    assert student_quantile(10**6) == pytest.approx(1.96, abs=1e-3)


def loss_of(num_batches, seed):
    """Batches of a distribution of which the model has learned a part."""
    torch.manual_seed(0)
    model, teacher = (nn.Linear(3, 3).double() for _ in range(2))
    with torch.no_grad():
        model.weight.add_(teacher.weight)
    generator = torch.Generator().manual_seed(seed)
    data = []
    for _ in range(num_batches):
        x = torch.randn(8, 3, generator=generator, dtype=torch.float64)
        data.append((x, torch.multinomial(teacher(x).softmax(1).detach(), 1, generator=generator)[:, 0]))
    return Loss(model, cross_entropy, data)


@pytest.mark.parametrize("name", MEASURES)
def test_the_interval_is_students(name):
    result = MEASURES[name](loss_of(4, 1), 0)
    low, high = result.interval
    assert (low + high) / 2 == pytest.approx(result.value)
    batches = result.details.get("stderr_batches", result.stderr)
    assert high - low >= 2 * 3.182446 * batches * (1 - 1e-6)
    assert result.to_dict()["interval"] == [low, high]
    alone = MEASURES[name](loss_of(2, 1), 0)
    if name in ("coherence", "regret"):  # two batches make one pair, which has no spread
        assert alone.interval is None
        assert math.isnan(alone.stderr)
    else:
        assert alone.interval[1] - alone.interval[0] >= 2 * 12.7062 * alone.details.get(
            "stderr_batches", alone.stderr
        ) * (1 - 1e-6)


@pytest.mark.slow
@pytest.mark.parametrize("name", MEASURES)
@pytest.mark.parametrize("num_batches", [2, 4, 15])
def test_of_200_intervals_over_batches_92_to_98_percent_hold_the_value(name, num_batches):
    if num_batches == 2 and name in ("coherence", "regret"):
        pytest.skip("two batches make one pair, which has no spread")
    truth = MEASURES[name](loss_of(600, 10**6), 0).value
    intervals = [MEASURES[name](loss_of(num_batches, seed), seed).interval for seed in range(200)]
    assert 0.92 <= sum(low <= truth <= high for low, high in intervals) / 200 <= 0.985


@pytest.mark.slow
@pytest.mark.parametrize("measure", [hessian_trace, hessian_frobenius_norm])
@pytest.mark.parametrize("name", ["outliers", "flat", "decay"])
def test_of_200_intervals_over_draws_92_to_98_percent_hold_the_value(measure, name):
    bulk = [math.cos(i) * 0.1 for i in range(195)]
    spectra = {"outliers": [50.0, 20, 10, 5, -3, *bulk], "flat": [1 + i / 200 for i in range(200)]}
    spectra["decay"] = [1 / (i + 1) for i in range(200)]
    a = symmetric(spectra[name])
    truth = float(a.trace() if measure is hessian_trace else a.norm())
    intervals = [measure(OfMatrix(a), num_probes=60, seed=seed).interval for seed in range(200)]
    assert 0.92 <= sum(low <= truth <= high for low, high in intervals) / 200 <= 0.985
