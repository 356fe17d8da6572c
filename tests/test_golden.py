"""One small network with exact values by dense linear algebra, and what unmodified published code gives for it.

The main numbers, all in float64, in eval mode, mean cross-entropy in nats over 512 examples, 1810 parameters:

    L                                        0.06319468724771     ||dL/dw||_2                    0.03141420773182
    lambda_max(H)                            1.312006149683       tr H                           10.0589184728
    lambda_min(H)                           -0.01303098122893     lambda_max(G) = lambda_max(F)  1.236494498565
    lambda_max(empirical F)                  0.3020412022045      tr(|w| H |w|)                  1.003627906115
    regret, 4 batches of 128                 0.1028974777542      regret, 16 batches of 32       0.2030006091931
    worst case, p = inf, T = |w|, rho = .01  0.0079808657         (mean over 4 batches of 128)
"""

import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from sam_optim.core.geometry import Ball
from sam_optim.loss import Loss
from sam_optim.measures import (
    average_sharpness,
    by_layer,
    gradient_regret,
    hessian_eigenvalues,
    hessian_trace,
    worst_case_sharpness,
)

GOLDEN = Path(__file__).parents[2] / "shared" / "golden"
DIGITS = 1e-11  # relative: the values are written with 13 digits
BALLS = [
    (norm, adaptive, normalized, rho)
    for norm, adaptive, rhos in [
        ("l2", False, (0.01, 0.05, 0.1, 0.5)),
        ("l2", True, (0.05, 0.1, 0.5, 1.0)),
        ("linf", False, (0.0005, 0.001, 0.005, 0.01)),
        ("linf", True, (0.001, 0.005, 0.01, 0.05)),
    ]
    for normalized in (False, True)
    for rho in rhos
]
# In these two, the climb from the weights ends at a lower local maximum, 0.978 of the best known value.
HARD = {("linf", False, False, 0.01), ("linf", True, False, 0.05)}

pytestmark = pytest.mark.skipif(not GOLDEN.exists(), reason=f"the golden values are not at {GOLDEN}")


@pytest.fixture(scope="module")
def golden():
    return json.loads((GOLDEN / "mlp.json").read_text())


def loss_of(m=512, *, dtype=torch.float64, sizes=None, normalize_logits=False):
    import numpy as np

    data, weights = np.load(GOLDEN / "data.npz"), np.load(GOLDEN / "mlp_weights.npz")
    x, y = torch.tensor(data["x_train"]).to(dtype) / 16, torch.tensor(data["y_train"]).long()
    model = nn.Sequential()
    model.add_module("fc1", nn.Linear(64, 24))
    model.add_module("tanh", nn.Tanh())
    model.add_module("fc2", nn.Linear(24, 10))
    model.load_state_dict({name: torch.tensor(weights[name]) for name in weights.files})
    batches = list(zip(x.split(sizes or m), y.split(sizes or m), strict=True))
    return Loss(model.to(dtype), nn.CrossEntropyLoss(), batches, normalize_logits=normalize_logits)


def ball_of(norm, adaptive, rho):
    return Ball(rho, norm=2 if norm == "l2" else math.inf, adaptive=adaptive, eta=0.0)


def row(rows, norm, adaptive, normalized, rho, **more):
    key = {"norm": norm, "adaptive": adaptive, "logit_normalised": normalized, "rho": rho} | more
    (result,) = [r for r in rows if r | key == r]
    return result


@pytest.mark.parametrize("sizes", [[512], [128] * 4, [200, 200, 112]], ids=str)
def test_value_and_gradient(golden, sizes):
    loss, basic = loss_of(sizes=sizes), golden["exact"]["basic"]
    value, gradient = loss.value_and_gradient()
    assert float(value) == pytest.approx(basic["train_loss"], rel=DIGITS)
    assert float(torch.cat([g.flatten() for g in gradient]).norm()) == pytest.approx(basic["grad_norm"], rel=DIGITS)
    normalized = loss_of(sizes=sizes, normalize_logits=True)
    assert float(normalized.value()) == pytest.approx(basic["train_loss_logit_normalised"], rel=DIGITS)


@pytest.mark.parametrize("sizes", [[512], [200, 200, 112]], ids=["graph kept", "uneven batches"])
def test_eigenvalues(golden, sizes):
    """tol = 1e-4 on the residual leaves errors of its square over the gap; 1e-6 relative is far more than that."""
    exact, loss, relative = golden["exact"], loss_of(sizes=sizes), Ball(0.0, adaptive=True, eta=0.0)
    for expected, arguments in [
        (exact["hessian_exact"]["top5"], {}),
        (exact["hessian_exact"]["bottom5"], {"which": "smallest"}),
        (exact["adaptive_hessian_exact"]["top5"], {"ball": relative}),
        (exact["ggn_exact"]["top5"], {"matrix": "ggn"}),
        (exact["ggn_exact"]["top5"], {"matrix": "fisher"}),
        (exact["ggn_exact"]["adaptive_top5"], {"matrix": "ggn", "ball": relative}),
        (exact["empirical_fisher_exact"]["top5"], {"matrix": "empirical_fisher"}),
    ]:
        result = hessian_eigenvalues(loss, num=5, **arguments)
        assert result.eigenvalues.tolist() == pytest.approx(sorted(expected, reverse=True), rel=1e-6)
        assert result.converged
    top = hessian_eigenvalues(loss_of(sizes=sizes, normalize_logits=True), num=5)
    assert top.eigenvalues.tolist() == pytest.approx(exact["hessian_logit_normalised"]["top5"], rel=1e-6)


@pytest.mark.slow
def test_the_whole_spectrum():
    import numpy as np

    exact = np.load(GOLDEN / "mlp_exact.npz")["hessian_eigenvalues"]
    result = hessian_eigenvalues(loss_of(), num=len(exact))
    expected = torch.tensor(exact).flip(0)
    torch.testing.assert_close(result.eigenvalues, expected, rtol=1e-4, atol=1e-13)


def test_traces(golden):
    exact, loss = golden["exact"], loss_of()
    for name, matrix in (("hessian_exact", "hessian"), ("ggn_exact", "ggn")):
        result = hessian_trace(loss, matrix=matrix, method="hutchinson")
        one = exact[name]["hutchinson_rademacher_one_probe_std"]
        assert abs(result.value - exact[name]["trace"]) < 4 * one / 10
        assert result.stderr == pytest.approx(one / 10, rel=0.3)  # of 100 probes, it is known to 7 to 10 %
        deflated = hessian_trace(loss, matrix=matrix)
        assert abs(deflated.value - exact[name]["trace"]) < 4 * deflated.stderr
        assert deflated.stderr < one / 10 / 10**0.5  # as much as Hutchinson's estimator has from 10 times the products
    relative = hessian_trace(loss, ball=Ball(0.0, adaptive=True, eta=0.0))
    assert abs(relative.value - exact["adaptive_hessian_exact"]["trace"]) < 4 * relative.stderr
    empirical = hessian_trace(loss, matrix="empirical_fisher")
    assert abs(empirical.value - exact["empirical_fisher_exact"]["trace"]) < 4 * empirical.stderr


def test_blocks_of_single_tensors(golden):
    expected, loss, relative = golden["exact"]["per_tensor_blocks"], loss_of(), Ball(0.0, adaptive=True, eta=0.0)
    largest = by_layer(hessian_eigenvalues, loss, by="tensor", num=1)
    traces = by_layer(hessian_trace, loss, by="tensor")
    adaptive = by_layer(hessian_trace, loss, by="tensor", ball=relative)
    assert list(largest) == list(expected)
    for name, exact in expected.items():
        assert float(largest[name].eigenvalues[0]) == pytest.approx(exact["lambda_max"], rel=1e-6)
        for result, value in ((traces[name], exact["trace"]), (adaptive[name], exact["adaptive_trace"])):
            assert abs(result.value - value) <= max(
                4 * result.stderr, 1e-9 * value
            )  # exact where all products are taken
            assert result.stderr < 0.05 * value
    smallest = by_layer(hessian_eigenvalues, loss, by="tensor", num=1, which="smallest")
    for name in ("fc1.weight", "fc1.bias"):  # those of the last layer are 0
        assert float(smallest[name].eigenvalues[0]) == pytest.approx(expected[name]["lambda_min"], rel=1e-6)


@pytest.mark.parametrize(("name", "m"), [("even_4x128", 128), ("sixteen_16x32", 32)])
def test_regret(golden, name, m):
    expected, loss = golden["exact"]["regret"][name], loss_of(m)
    result = gradient_regret(loss)
    assert result.value == pytest.approx(expected["mean_offdiag"], rel=DIGITS)
    assert result.details["mean_norm"] == pytest.approx(expected["mean_norm"], rel=DIGITS)
    assert result.details["mean_cosine"] == pytest.approx(expected["mean_cos_offdiag"], rel=1e-9)
    for damping in (0.1, 0.01, 0.001) if m == 128 else (0.1,):
        kl = expected["kl_ball"]["by_damping"][str(damping)]
        result = gradient_regret(loss, metric="fisher", damping=damping)
        assert result.value == pytest.approx(kl["mean_offdiag"], rel=1e-4)
        assert result.converged


@pytest.mark.parametrize("case", BALLS, ids=str)
def test_worst_case_finds_what_the_published_code_finds_and_the_maximum(golden, case):
    """`reference_max` is the best of long searches, a lower bound of the maximum."""
    norm, adaptive, normalized, rho = case
    result = worst_case_sharpness(loss_of(128, normalize_logits=normalized), ball_of(norm, adaptive, rho)).value
    peer = row(golden["tml_epfl"]["worst"], *case, dtype="float64")["value_mean_over_4x128"]
    best = row(golden["reference_max"]["rows"], *case)["best_known_mean_4x128"]
    assert result >= peer * (1 - DIGITS)
    assert result >= 0.999 * best
    if adaptive and norm == "l2":
        assert result > 1.05 * peer  # which does not ascend in the metric of its ball


@pytest.mark.parametrize("case", sorted(HARD), ids=str)
def test_restarts_leave_local_maxima_whatever_the_seed(golden, case):
    """Which random points the search looks at depends on the seed; with seed 3 one is not enough."""
    norm, adaptive, _, rho = case
    result = worst_case_sharpness(loss_of(128), ball_of(norm, adaptive, rho), num_restarts=3, seed=3).value
    assert result >= 0.99 * row(golden["reference_max"]["rows"], *case)["best_known_mean_4x128"]


def test_worst_case_in_float32(golden):
    case = ("linf", True, False, 0.01)
    result = worst_case_sharpness(loss_of(128, dtype=torch.float32), ball_of("linf", True, 0.01)).value
    assert result == pytest.approx(row(golden["reference_max"]["rows"], *case)["best_known_mean_4x128"], rel=1e-3)


def test_a_zero_weight_does_not_move(golden):
    """The published code gives 10.73 here, after a division of 0 by 0."""
    loss = loss_of(128)
    before = worst_case_sharpness(loss, ball_of("l2", True, 0.5)).value
    with torch.no_grad():
        loss.params[-1][0] = 0
    assert golden["tml_epfl"]["zero_weight_case"]["value"] > 10
    assert worst_case_sharpness(loss, ball_of("l2", True, 0.5)).value == pytest.approx(before, rel=0.05)


@pytest.mark.parametrize("norm", ["l2", "linf"])
@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("normalized", [False, True])
def test_average_agrees_with_the_published_code(golden, norm, adaptive, normalized):
    """Their mean over 20 repetitions, each of which has 20 draws for each of 4 batches."""
    rows = [r for r in golden["tml_epfl"]["average"] if r["dtype"] == "float64"]
    rows = [r for r in rows if (r["norm"], r["adaptive"], r["logit_normalised"]) == (norm, adaptive, normalized)]
    assert len(rows) == 4
    loss = loss_of(128, normalize_logits=normalized)
    for r in rows:
        result = average_sharpness(loss, ball_of(norm, adaptive, r["rho"]))
        error = math.hypot(result.details["stderr_draws"], r["std"] / math.sqrt(20))
        assert abs(result.value - r["mean"]) < 4 * error
