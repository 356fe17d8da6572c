"""rho_range: the rise along SAM's perturbation against closed forms and against SAM's own steps."""

import math

import pytest
import torch
from quadratic import Quadratic, symmetric, unshifted
from torch import nn

from sam_optim import ASAM, SAM, Loss, asam_param_groups, rho_range

W = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)


def test_on_a_quadratic_it_is_a_parabola():
    """rise = rho ||g|| + rho^2/2 u'Au with u = g / ||g||; half where both terms are equal."""
    a = symmetric([5.0, 2.0, 0.5])
    loss = unshifted(Quadratic(a, None, W))
    g = a @ W
    norm, curvature = float(g.norm()), float(g @ a @ g / (g @ g))
    optimizer = SAM(loss.params, torch.optim.SGD, rho=0.1, lr=0.1)
    result = rho_range(loss, optimizer)
    rho = result.radii
    assert rho.tolist() == pytest.approx([0.1 * 2.0**k for k in range(-5, 6)])
    expected = rho * norm + rho**2 / 2 * curvature
    torch.testing.assert_close(result.rises, expected, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(result.linear_share, rho * norm / expected, rtol=1e-10, atol=1e-12)
    wide = rho_range(loss, optimizer, radii=[2 * norm / curvature * 1.01**k for k in range(-2, 3)])
    assert wide.half == pytest.approx(2 * norm / curvature, rel=1e-3)
    assert rho_range(loss, optimizer, radii=[1e-4]).half is None
    assert f"{float(result.rises[5]):+.4f}" in str(result)


@pytest.mark.parametrize("kind", ["sam", "asam", "groups", "radii", "inf", "sgd"])
def test_it_is_the_rise_of_the_optimizer_s_own_step(kind):
    """Batch by batch: each has its own perturbation, as in training; the weights come back."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.LayerNorm(8), nn.Tanh(), nn.Linear(8, 3)).double()
    data = [(torch.randn(n, 6, dtype=torch.float64), torch.randint(3, (n,))) for n in (5, 9)]
    criterion, base = nn.CrossEntropyLoss(), torch.optim.SGD
    optimizer = {
        "sam": lambda: SAM(model.parameters(), base, rho=0.2, lr=0.1),
        "asam": lambda: ASAM(model.parameters(), base, rho=0.5, lr=0.1),
        "groups": lambda: ASAM(asam_param_groups(model), base, rho=0.5, lr=0.1),
        "radii": lambda: SAM(
            [{"params": model[0].parameters(), "rho": 0.3}, {"params": model[3].parameters(), "rho": 0.1}], base, lr=0.1
        ),
        "inf": lambda: SAM(model.parameters(), base, rho=0.01, norm=math.inf, lr=0.1),
        "sgd": lambda: base(model.parameters(), lr=0.1),
    }[kind]()
    before = [p.detach().clone() for p in model.parameters()]
    rho = 0.05 if kind == "sgd" else optimizer.ball.rho
    result = rho_range(Loss(model, criterion, data), optimizer, radii=[rho])
    assert all(map(torch.equal, model.parameters(), before))
    steps = SAM(model.parameters(), base, rho=0.05, lr=0.0) if kind == "sgd" else optimizer
    for group in steps.param_groups:
        group["lr"] = 0.0
    rises, slopes = [], []
    for x, y in data:
        passes = []

        def closure(x=x, y=y, passes=passes):
            steps.zero_grad()
            loss = criterion(model(x), y)
            loss.backward()
            passes.append([(p.detach().clone(), p.grad.clone()) for p in model.parameters()])
            return loss

        steps.step(closure)
        rises.append(float(steps.last_step.sharpness))
        slopes.append(sum(float((g * (moved - w)).sum()) for (w, g), (moved, _) in zip(*passes, strict=True)))
    assert float(result.rises) == pytest.approx((5 * rises[0] + 9 * rises[1]) / 14, rel=1e-8)
    assert float(result.linear_share * result.rises) == pytest.approx((5 * slopes[0] + 9 * slopes[1]) / 14, rel=1e-8)


def test_what_makes_no_sense_is_named():
    loss = unshifted(Quadratic(symmetric([1.0, 2.0]), None, W[:2]))
    with pytest.raises(ValueError, match="all radii of the optimizer are 0"):
        rho_range(loss, SAM(loss.params, torch.optim.SGD, rho=0.0, lr=0.1))
    for radii in ([0.0, 1.0], [], [math.inf], [-1.0]):
        with pytest.raises(ValueError, match="radii"):
            rho_range(loss, SAM(loss.params, torch.optim.SGD, lr=0.1), radii=radii)
