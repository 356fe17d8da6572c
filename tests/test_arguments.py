"""Settings of measures: numbers of NumPy and torch count as Python's; what makes no sense is an error of one line."""

import inspect
import math
import re

import numpy as np
import pytest
import torch
from torch import nn

from sam_optim import SAM, Ball, Loss, measures
from sam_optim.core.scalars import real, whole

X = torch.tensor([[1.0, 2.0], [0.5, -1.0]], dtype=torch.float64)
NO_NUMBERS = [math.nan, math.inf, -math.inf, "3", True, None, [1], 1j, np.bool_(True), torch.tensor([1, 2])]
BASE = {
    "worst_case_sharpness": {"ball": Ball(0.1), "num_steps": 2, "num_restarts": 2},
    "average_sharpness": {"ball": Ball(0.1), "num_samples": 4},
    "average_in_ball": {"ball": Ball(0.1), "num_samples": 4},
    "critical_sharpness": {"tol": 0.25, "max_evaluations": 20},
    "hessian_eigenvalues": {"num": 2, "tol": 0.25, "max_products": 3},
    "hessian_trace": {"num_probes": 3, "tol": 0.25},
    "hessian_diagonal": {"num_probes": 3},
    "hessian_frobenius_norm": {"num_probes": 3},
    "spectral_density": {"num_probes": 2, "num_lanczos": 2, "num_points": 4, "width": 0.5},
    "gradient_regret": {"metric": "fisher", "damping": 0.5, "tol": 0.25, "max_products": 4, "num_probes": 2},
    "relative_flatness": {"layer": "0", "num_probes": 4},
    "pac_bayes_sigma": {"target": 0.5, "eps": 0.0, "num_samples": 4, "tol": 0.25},
    "sharpness_alpha": {"target": 0.5, "eps": 0.0, "num_steps": 2, "tol": 0.25},
    "flatness_bounds": {"of": "loss", "target": 0.5, "delta": 0.5, "num_samples": 4, "num_steps": 2},
}
CASES = [
    (name, option)
    for name, options in BASE.items()
    for option, p in inspect.signature(getattr(measures, name)).parameters.items()
    if p.annotation.split(" | ")[0] in ("int", "float") and (option in options or option == "seed")
]


def loss():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 2)).double()
    return Loss(model, nn.CrossEntropyLoss(), [(X, torch.tensor([0, 1])), (X.flip(0), torch.tensor([0, 0]))])


def number(result):
    if isinstance(result, dict):
        result = result["sharpness_orig"]
    return result.to_dict() | {"provenance": None}


@pytest.mark.parametrize(("name", "option"), CASES)
def test_numbers_of_numpy_and_torch_are_those_of_python_and_the_rest_is_refused(name, option):
    measure, options = getattr(measures, name), BASE[name] | {"seed": 3}
    if "seed" not in inspect.signature(measure).parameters:
        del options["seed"]
    value = options[option]
    expected = number(measure(loss(), **options))
    kinds = [np.int64, np.array, torch.tensor] if isinstance(value, int) else [np.float32, np.array, torch.tensor]
    for kind in kinds:
        assert number(measure(loss(), **options | {option: kind(value)})) == expected
    optional = "None" in inspect.signature(measure).parameters[option].annotation
    for wrong in NO_NUMBERS:
        if wrong is None and optional:
            continue
        with pytest.raises(ValueError, match=rf"{option} must be a (whole|finite) number, got ") as caught:
            measure(loss(), **options | {option: wrong})
        assert "\n" not in str(caught.value)
    if isinstance(value, int):
        for wrong in (1.5, 10**30):
            with pytest.raises(ValueError, match=f"{option} must be a whole number, got "):
                measure(loss(), **options | {option: wrong})
    if not (name == "sharpness_alpha" and option == "eps") and option != "num_probes":
        with pytest.raises(ValueError, match=option):
            measure(loss(), **options | {option: -1})


@pytest.mark.parametrize("name", [n for n in BASE if "tol" in BASE[n]])
def test_a_relative_tolerance_is_below_one(name):
    """1e30 gave an eigenvalue of 0.12 for 0.44, converged."""
    for wrong in (0, 1, 1e30):
        with pytest.raises(ValueError, match=re.escape(f"tol is relative and must be > 0 and < 1, got {float(wrong)}")):
            getattr(measures, name)(loss(), **BASE[name] | {"tol": wrong})


def test_what_is_no_loss_ball_word_or_choice():
    model, one = loss().model, loss()
    for name in BASE:
        with pytest.raises(TypeError, match=r"a measure is of a Loss: pass Loss\(model, criterion, batches\), got Seq"):
            getattr(measures, name)(model, **BASE[name])
    for name in ("worst_case_sharpness", "hessian_trace", "gradient_coherence"):
        with pytest.raises(TypeError, match=r"ball must be a Ball: pass Ball\(rho\) or optimizer.ball, got float"):
            getattr(measures, name)(one, ball=0.1)
    with pytest.raises(ValueError, match="which must be a word, got 3"):
        measures.hessian_eigenvalues(one, which=3)
    with pytest.raises(ValueError, match="sampled must be True or False, got 'yes'"):
        measures.gradient_noise_scale(one, sampled="yes")
    with pytest.raises(ValueError, match="max_products must be >= 1 or None, got 0"):
        measures.hessian_eigenvalues(one, max_products=0)
    with pytest.raises(TypeError, match=r"average_sharpness\(\) missing 1 required positional argument: 'ball'"):
        measures.average_sharpness(one)


def test_vectors_that_do_not_fit():
    one = loss()
    said = r"needs one tensor for each parameter, of its shape \(see `params`\), got "
    for wrong, got in ((3, "int"), ("x", "str"), ([1, 2], r"\['int', 'int'\]"), (X, "Tensor"), ([X], r"\[\(2, 2\)\]")):
        for measure, option in (
            (measures.critical_sharpness, "direction"),
            (measures.hessian_eigenvalues, "start"),
            (measures.flatness_bounds, "initial_weights"),
        ):
            with pytest.raises(ValueError, match=option + " " + said + got):
                measure(one, **{option: wrong})


def test_radii():
    one = loss()
    optimizer = SAM(one.params, torch.optim.SGD, lr=0.1, rho=0.05)
    expected = measures.rho_range(one, optimizer, radii=[0.5, 1.0]).rises
    for radii in (np.array([1.0, 0.5]), torch.tensor([0.5, 1.0]), (1, np.float32(0.5)), iter([1.0, 0.5])):
        assert torch.equal(measures.rho_range(one, optimizer, radii=radii).rises, expected)
    for wrong in (1.0, "3", torch.tensor(3.0)):
        with pytest.raises(ValueError, match="radii must be a sequence of numbers > 0, got "):
            measures.rho_range(one, optimizer, radii=wrong)
    with pytest.raises(ValueError, match="each of radii must be a finite number, got nan"):
        measures.rho_range(one, optimizer, radii=[1.0, math.nan])


def test_eta_and_norm_of_a_ball():
    assert Ball(np.float32(0.5), adaptive=True, eta=np.float32(0.25)) == Ball(0.5, adaptive=True, eta=0.25)
    for wrong in ([2], torch.tensor([1, 2]), None):
        with pytest.raises(ValueError, match="norm must be 2 or inf"):
            Ball(0.1, norm=wrong)
    with pytest.raises(ValueError, match="adaptive must be"):
        Ball(0.1, adaptive=torch.tensor([1, 2]))


def test_few_probes_are_not_blamed_on_the_standard_error():
    reason = measures.hessian_trace(loss(), num_probes=3, tol=0.9).reason
    assert reason == "with 3 probes, fewer than 10, the standard error is too uncertain for tol"


def test_numbers():
    assert (whole("n", 3.0), whole("n", np.uint8(3)), whole("n", torch.tensor([3]))) == (3, 3, 3)
    assert (real("x", 3), real("x", torch.tensor(0.5))) == (3.0, 0.5)
    with pytest.raises(ValueError, match=r"got tensor\(\[ 0, 1, 2.*\.\.\.$"):
        whole("n", torch.arange(1000))
