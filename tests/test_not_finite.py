"""Losses that are not finite, and weights of batches that make no mean: every error says which, with the value."""

import math
import re
from functools import partial

import numpy as np
import pytest
import torch
from command_line import run
from torch import nn

from sam_optim import ASAM, SAM, Ball, Loss, SharpnessMonitor, measures

DATA = [(torch.randn(4, 3, generator=torch.Generator().manual_seed(i)), torch.tensor([0, 1, 0, 1])) for i in range(3)]
BALL = Ball(0.1)


class Limited(nn.Module):
    """(w - 1)^2 / 2 for |w| <= limit, beyond it `beyond`."""

    def __init__(self, w, limit, beyond):
        super().__init__()
        self.w = nn.Parameter(torch.tensor([w], dtype=torch.float64))
        self.limit, self.beyond = limit, beyond

    def forward(self, x):
        inside = (self.w - 1).square().sum() / 2
        return inside + (self.beyond if float(self.w.detach().abs()) > self.limit else 0.0) + 0 * x.sum()


def limited(w, limit, beyond):
    return Loss(Limited(w, limit, beyond), lambda o, t: o, [(torch.zeros(2, 1), torch.zeros(2))])


class Faulty(nn.Module):
    """Logits; `value` where the first input is above 0.9 in size, as in a batch that has `marked` in it."""

    def __init__(self, value):
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.value = nn.Linear(3, 2), value

    def forward(self, x):
        return self.layer(x) + torch.where(x[:, :1] == 100, self.value, 0.0)


def faulty(value):
    x = DATA[1][0].clone()
    x[2, 0] = 100
    return Loss(Faulty(value), nn.CrossEntropyLoss(), [DATA[0], (x, DATA[1][1]), DATA[2]])


MEASURES = {
    "worst": lambda loss: measures.worst_case_sharpness(loss, BALL, num_steps=3, num_restarts=2),
    "worst, one step": lambda loss: measures.worst_case_sharpness(loss, BALL, num_steps=1),
    "average": lambda loss: measures.average_sharpness(loss, BALL, num_samples=3),
    "average_in_ball": lambda loss: measures.average_in_ball(loss, BALL, num_samples=3),
    "critical": measures.critical_sharpness,
    "critical along": lambda loss: measures.critical_sharpness(loss, [torch.ones_like(w) for w in loss.params]),
    "eigenvalues": measures.hessian_eigenvalues,
    "ggn": lambda loss: measures.hessian_eigenvalues(loss, matrix="ggn"),
    "trace": lambda loss: measures.hessian_trace(loss, num_probes=3),
    "exact trace": measures.hessian_trace,
    "diagonal": measures.hessian_diagonal,
    "frobenius": lambda loss: measures.hessian_frobenius_norm(loss, num_probes=3),
    "density": lambda loss: measures.spectral_density(loss, num_probes=2),
    "regret": measures.gradient_regret,
    "regret, Fisher": lambda loss: measures.gradient_regret(loss, metric="fisher"),
    "coherence": measures.gradient_coherence,
    "noise scale": measures.gradient_noise_scale,
    "fisher_rao": measures.fisher_rao_norm,
    "relative_flatness": lambda loss: measures.relative_flatness(loss, layer="layer"),
    "sigma": lambda loss: measures.pac_bayes_sigma(loss, target=0.1),
    "alpha": lambda loss: measures.sharpness_alpha(loss, target=0.1),
    "bounds": lambda loss: measures.flatness_bounds(loss, of="loss")["pacbayes_orig"],
    "contrast": lambda loss: measures.contrastive_sharpness(measures.hessian_eigenvalues, loss),
    "rho_range": lambda loss: measures.rho_range(loss, SAM(loss.params, torch.optim.SGD, lr=0.1, rho=0.05)),
}


@pytest.mark.filterwarnings("ignore:converting to float:UserWarning")
@pytest.mark.parametrize("value", [math.nan, math.inf])
@pytest.mark.parametrize("name", MEASURES)
def test_every_measure_names_the_batch_and_its_loss(name, value):
    loss = faulty(value)  # a logit of inf: the loss is nan, too
    result = MEASURES[name](loss)
    assert "the loss" in result.reason
    assert "is nan at the weights" in result.reason
    assert "of batch 1" in result.reason or name == "contrast"  # of all as one unit
    assert name == "rho_range" or not result.converged


def test_an_infinite_loss_is_said_to_be_infinite():
    loss = limited(-3.0, 2.0, math.inf)
    for name in ("worst", "average", "critical", "critical along", "eigenvalues", "trace", "sigma"):
        assert MEASURES[name](loss).reason == "the loss is inf at the weights" or name in ("worst", "average")
    for name in ("worst", "average"):
        assert MEASURES[name](loss).reason == "the loss of batch 0 is inf at the weights"


def test_a_derivative_that_is_not_finite_is_told_from_a_loss_that_is_not():
    class Root(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2))

        def forward(self, x):
            return self.w.abs().sum().sqrt() + 0 * x.sum() + 0.25

    loss = Loss(Root(), lambda o, t: o, DATA[:1])
    reason = measures.critical_sharpness(loss).reason
    assert reason == "the loss is 0.25 at the weights, and a derivative of it is not finite"
    reason = measures.hessian_eigenvalues(loss).reason
    assert reason == "the loss is 0.25 at the weights, and a product with its curvature is not finite"


def test_a_loss_that_is_not_finite_on_the_way():
    """From w = 0 the loss (w - 1)^2 / 2 falls until w = 1 and is back at w = 2, so t_c = 2 and lambda_c = 1; with a
    limit at 1.5 it is never seen to rise."""
    assert measures.critical_sharpness(limited(0.0, 3.0, math.nan)).value == pytest.approx(1.0, rel=1e-4)
    for beyond in (math.nan, math.inf):
        result = measures.critical_sharpness(limited(0.0, 1.5, beyond))
        assert result.reason == f"the loss is {beyond} from t = 1.5 on: it is not seen to rise before"
        assert result.value == pytest.approx(2 / 1.5, rel=1e-4)
        assert result.converged == (beyond == math.inf)
        along = measures.critical_sharpness(limited(0.0, 1.5, beyond), [torch.ones(1)], first_step=2.0)
        assert along.reason == f"the loss is {beyond} at w - t d for t = 2"
        assert math.isnan(along.value)
        worst = measures.worst_case_sharpness(limited(0.0, 1.5, beyond), Ball(2.0), num_steps=4, num_restarts=1)
        assert f"the loss of batch 0 is {beyond} at step " in worst.reason
        average = measures.average_sharpness(limited(0.0, 1.5, beyond), Ball(2.0), num_samples=20)
        assert average.reason == f"the loss of batch 0 is {beyond} at displaced weights"


def test_a_direction_that_is_not_finite_is_not_a_slope_of_0():
    loss = limited(0.0, 3.0, math.nan)
    with pytest.raises(ValueError, match="direction has entries that are not finite"):
        measures.critical_sharpness(loss, [torch.tensor([math.nan])])
    other = Loss(
        loss.model, lambda o, t: o * math.nan, [(torch.zeros(2, 1), torch.full((2,), math.nan))], forward=_forward
    )
    result = measures.critical_sharpness(loss, other)
    assert result.reason == "of the other loss: the loss is nan at the weights"


def _forward(model, batch):
    return model(batch[0]) + batch[1].sum(), batch[1]


def test_the_radii_at_which_the_loss_is_not_finite():
    loss = limited(0.0, 1.5, math.nan)
    optimizer = SAM(loss.params, torch.optim.SGD, lr=0.1, rho=0.5)
    result = measures.rho_range(loss, optimizer, radii=[0.5, 1.0, 2.0])
    torch.testing.assert_close(result.rises[:2], torch.tensor([0.625, 1.5], dtype=torch.float64))
    assert result.reason == "the loss is nan at the perturbed weights for rho = 2"
    assert str(measures.rho_range(faulty(math.nan), ASAM(faulty(0.0).params, torch.optim.SGD, lr=0.1)))


def test_rows_of_the_monitor_say_it():
    loss = faulty(math.nan)
    optimizer = SAM(loss.params, torch.optim.SGD, lr=0.1)

    def plain(loss):
        return float(loss.value())

    monitor = SharpnessMonitor(loss, every=1, measures=["lambda_max", plain])
    row = monitor.step(optimizer)
    assert row["reason"] == "lambda_max: the loss of batch 1 of 3 is nan at the weights; plain: it is nan"


def test_the_command_says_how_many_losses_of_a_landscape_are_not_finite(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "beyond.py").write_text(
        "import torch\nfrom torch import nn\n"
        "class M(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n        self.w = nn.Parameter(torch.ones(1))\n"
        "    def forward(self, x):\n        return self.w.log().sum() + 0 * x.sum()\n"
        "def f():\n    return M(), lambda o, t: o, [(torch.zeros(2, 1), torch.zeros(2))]\n"
    )
    options = ["--range", 2, "--points", 3, "--directions", "gradient", "--out", "l.json"]
    code, _, err = run("landscape", "--target", "beyond:f", *options)
    assert code == 1
    assert "1 of 3 losses are not finite, the first is nan" in err


class TestWeights:
    """Weights that make no mean: errors name the value, whose it is, and what to do."""

    def loss(self, criterion=None, labels=None, **options):
        data = [(x, y if labels is None else labels[i]) for i, (x, y) in enumerate(DATA)]
        return Loss(Faulty(0.0), criterion or nn.CrossEntropyLoss(), data, **options)

    @pytest.mark.parametrize("wrong", [-1.0, 0, math.nan, math.inf, "2", None, torch.ones(2), 1j])
    def test_given_ones(self, wrong):
        shown = r"tensor\(\[1\., 1\.\]\)" if isinstance(wrong, torch.Tensor) else re.escape(repr(wrong))
        said = rf"batch_weights: batch 1 is given {shown}, and a weight must be a finite number > 0; leave out a batch"
        with pytest.raises(ValueError, match=said):
            self.loss(batch_weights=[1.0, wrong, 2.0])
        first = DATA[1][0]
        with pytest.raises(ValueError, match=said):
            self.loss(batch_weights=lambda batch: wrong if torch.equal(batch[0], first) else 1.0).value()

    def test_what_is_no_sequence_of_numbers(self):
        for wrong in ("123", 3.0):
            with pytest.raises(
                ValueError, match=r"batch_weights must be numbers > 0, one for each batch, or a function"
            ):
                self.loss(batch_weights=wrong)
        with pytest.raises(ValueError, match="one number for each batch, got 2 for 3"):
            self.loss(batch_weights=[1.0, 2.0]).value()

    def test_arrays_tensors_and_iterators_of_weights(self):
        values = self.loss().batch_values()
        expected = float((values * torch.tensor([1.0, 2.0, 5.0], dtype=torch.float64)).sum() / 8)
        numbers = [1.0, 2.0, 5.0]
        for given in (
            numbers,
            tuple(numbers),
            np.array(numbers),
            torch.tensor(numbers),
            iter(numbers),
            [*np.array(numbers)],
        ):
            assert float(self.loss(batch_weights=given).value()) == pytest.approx(expected, rel=1e-7)

    def test_those_of_classes(self):
        for weights, said in (
            ([1.0, -2.0], "class 1 has the weight -2 in"),
            ([math.nan, 1.0], "class 0 has the weight nan in"),
        ):
            criterion = nn.CrossEntropyLoss(weight=torch.tensor(weights))
            for make in (criterion, partial(nn.functional.cross_entropy, weight=torch.tensor(weights))):
                with pytest.raises(ValueError, match=f"{said} the criterion: weights must be finite and >= 0"):
                    self.loss(make).value()
        ones = torch.ones(4, dtype=torch.int64)
        criterion = nn.CrossEntropyLoss(weight=torch.tensor([1.0, 0.0]))
        with pytest.raises(
            ValueError, match="batch 2 has the weight 0, as all of its labels are ignored or of classes that weigh 0"
        ):
            self.loss(criterion, [DATA[0][1], DATA[1][1], ones]).value()
        with pytest.raises(
            ValueError, match="batch 2 has the weight 0, as all of its labels are ignored: leave it out"
        ):
            self.loss(labels=[DATA[0][1], DATA[1][1], -100 * ones]).value()

    def test_those_of_a_criterion_of_ones_own(self):
        def masked(outputs, target):
            losses = nn.functional.cross_entropy(outputs, target.clamp(min=0), reduction="none")
            return (losses * (target >= 0)).sum() / (target >= 0).sum().clamp(min=1)

        ignored = torch.full((4,), -1)
        with pytest.raises(
            ValueError, match=r"batch 2 has the weight 0, by what the criterion makes of its labels: leave it"
        ):
            self.loss(masked, [DATA[0][1], torch.tensor([0, 1, 1, -1]), ignored]).value()
