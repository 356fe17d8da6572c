"""Critical sharpness: exact on quadratics, below the largest eigenvalue, and what cannot be found is said."""

import math

import pytest
import torch
from networks import NETWORKS, batches, network
from quadratic import Quadratic, symmetric, unshifted
from torch import nn

from sam_optim.loss import Loss
from sam_optim.measures import critical_sharpness

W = torch.tensor([1.0, -2.0, 0.5, 0.1, 3.0], dtype=torch.float64)
cross_entropy = nn.CrossEntropyLoss()


@pytest.mark.parametrize("size", [1e-4, 1.0, 1e4])
def test_on_a_quadratic_it_is_the_curvature_along_the_gradient(size):
    a = size * symmetric([5.0, 2.0, 0.5, 0.1, 0.01])
    loss = unshifted(Quadratic(a, None, W))
    g = a @ W
    result = critical_sharpness(loss)
    assert result.value == pytest.approx(float(g @ a @ g / (g @ g)), rel=1e-4)
    assert result.converged
    assert result.details["num_evaluations"] <= 12
    assert result.value <= 5.0 * size
    d = torch.tensor([0.3, -1.0, 2.0, 0.5, 1.0], dtype=torch.float64)
    for sign in (1, -3):
        along = critical_sharpness(loss, [sign * d], tol=1e-8)
        assert along.value == pytest.approx(float(abs(sign) * (d @ a @ d) / (g @ d).abs()), rel=1e-7)


@pytest.mark.parametrize("kind", NETWORKS)
def test_on_a_network_the_loss_falls_before_the_critical_step_and_rises_after_it(kind):
    model, data = network(kind).eval(), batches(kind)
    loss = Loss(model, cross_entropy, data)
    before = [p.detach().clone() for p in loss.params]
    assert critical_sharpness(loss, tol=0.02).details["num_evaluations"] <= 8
    result = critical_sharpness(loss, tol=1e-6)
    assert result.details["num_evaluations"] <= 12
    base, g = loss.value_and_gradient()
    t = result.details["step"]
    assert result.value == 2 / t
    for factor, rises in ((0.25, False), (0.999, False), (1.001, True)):
        with loss.displaced([-factor * t * x for x in g]):
            assert bool(loss.value() > base) == rises
    assert all(torch.equal(p, w) for p, w in zip(loss.params, before, strict=True))


def test_what_cannot_be_found_is_said():
    flat_loss = unshifted(Quadratic(symmetric([1.0, 2.0]), W[:2], W[:2]))
    result = critical_sharpness(flat_loss)
    assert math.isnan(result.value)
    assert "slope" in result.reason
    falling = Loss(nn.Linear(2, 1), lambda o, y: o.mean(), [(torch.ones(3, 2), torch.zeros(3))])
    endless = critical_sharpness(falling)
    assert endless.value == 0
    assert not endless.converged
    assert "does not rise" in endless.reason
    with pytest.raises(ValueError, match="of its shape"):
        critical_sharpness(flat_loss, [torch.ones(3)])
    with pytest.raises(ValueError, match="tol"):
        critical_sharpness(flat_loss, tol=0.0)


def test_relative_to_another_loss_of_the_same_weights():
    """lambda_c along the gradient of the other: on quadratics g2' H1 g2 / <g1, g2>."""
    model, data = network(NETWORKS[0]).eval(), batches(NETWORKS[0], (6, 6))
    first, second = (Loss(model, cross_entropy, [batch]) for batch in data)
    opposed = Loss(model, lambda o, y: -cross_entropy(o, y), [data[1]])
    inner = sum(float((a * b).sum()) for a, b in zip(first.gradient(), second.gradient(), strict=True))
    falling, rising = (second, opposed) if inner > 0 else (opposed, second)
    relative = critical_sharpness(first, falling)
    assert relative.value == critical_sharpness(first, falling.gradient()).value
    assert relative.settings["along"] == "gradient of another loss"
    at_once = critical_sharpness(first, rising)
    assert math.isnan(at_once.value)
    assert "rises at once" in at_once.reason
