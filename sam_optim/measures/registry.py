"""The measures by name: what the command line and studies can choose, with their defaults, and what audits compare.

One row makes a measure available everywhere.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from torch import nn

from sam_optim.core.errors import InputError, unknown
from sam_optim.core.geometry import Ball
from sam_optim.core.results import Estimate, Spectrum
from sam_optim.loss import Loss
from sam_optim.measures.contrast import contrastive_sharpness
from sam_optim.measures.critical import critical_sharpness
from sam_optim.measures.curvature import hessian_eigenvalues
from sam_optim.measures.density import spectral_density
from sam_optim.measures.gradients import gradient_coherence, gradient_noise_scale, gradient_regret
from sam_optim.measures.norms import fisher_rao_norm, relative_flatness
from sam_optim.measures.pac_bayes import pac_bayes_sigma
from sam_optim.measures.shared import checked
from sam_optim.measures.sharpness import average_in_ball, average_sharpness, worst_case_sharpness
from sam_optim.measures.trace import hessian_frobenius_norm, hessian_trace

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Row:
    """about: for --help. defaults: where they differ from the function's own; --set may replace them, other options
    may not; an `OfLoss` is evaluated for each loss. of: the measure that a function of measures takes before the loss.
    """

    function: Callable[..., Any]
    about: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    of: Callable[..., Any] | None = None


@dataclass(frozen=True)
class OfLoss:
    """An option that depends on the model. text: its placeholder in the settings."""

    text: str
    evaluate: Callable[[Loss], Any]

    def to_dict(self) -> str:
        return self.text


def last_layer(loss: Loss) -> str:
    """The name of the model's last linear layer."""
    names = [name for name, module in loss.model.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise InputError("the model has no linear layer: name one with --set MEASURE.layer=NAME")
    return names[-1]


LAST_LAYER = OfLoss("the last linear layer", last_layer)

MEASURES: dict[str, Row] = {
    "worst": Row(worst_case_sharpness, "highest rise of the loss within rho"),
    "average": Row(average_sharpness, "mean rise of the loss under noise of standard deviation sigma on each weight"),
    "average_in_ball": Row(average_in_ball, "the same for noise whose length is rho on average"),
    "critical": Row(critical_sharpness, "2 / the step along the gradient at which the loss begins to rise"),
    "eigenvalue": Row(hessian_eigenvalues, "largest eigenvalue of the curvature", {"num": 1}),
    "eigenvalues": Row(hessian_eigenvalues, "the five largest eigenvalues of the curvature", {"num": 5}),
    "trace": Row(hessian_trace, "trace of the curvature"),
    "density": Row(spectral_density, "how many eigenvalues of the curvature are where", {"num_probes": 10}),
    "frobenius": Row(hessian_frobenius_norm, "root of the sum of the squared eigenvalues"),
    "gradient_regret": Row(gradient_regret, "what the best step for one batch forgoes on another", {"num_probes": 4}),
    "regret_fisher": Row(gradient_regret, "the same where steps are KL balls", {"metric": "fisher", "num_probes": 4}),
    "coherence": Row(gradient_coherence, "mean cosine between the gradients of two batches"),
    "noise_scale": Row(gradient_noise_scale, "batch size at which noise and gradient are equal"),
    "contrastive_eigenvalue": Row(
        contrastive_sharpness,
        "largest eigenvalue of single batches over that of all",
        {"num": 1},
        of=hessian_eigenvalues,
    ),
    "fisher_rao": Row(fisher_rao_norm, "w^T F w", {"matrix": "fisher"}),
    "relative_flatness": Row(relative_flatness, "curvature of the last layer times its size", {"layer": LAST_LAYER}),
    "pac_bayes_sigma": Row(pac_bayes_sigma, "noise at which the loss has risen by target", {"target": 0.1}),
}


def chosen(text: str) -> list[str]:
    """Names of measures, separated by commas, each once; "none" for no measures."""
    names = list(dict.fromkeys(name.strip() for name in text.split(",") if name.strip()))
    if names in ([], ["none"]):
        return []
    for name in names:
        if name not in MEASURES:
            raise unknown("measure", name, MEASURES, limit=40)
    return names


def options_of(name: str) -> dict[str, Any]:
    """The keyword options of a measure with their defaults; `inspect.Parameter.empty` where it has none.

    A function of a measure (**kwargs) has the options of that measure, too.
    """
    row = MEASURES[name]
    options = _keywords(row.function, skipped=1 if row.of is None else 2)
    if row.of is not None:
        options = _keywords(row.of, skipped=1) | options
    return {k: v for k, v in (options | dict(row.defaults)).items() if k not in ("progress", "direction")}


def needs_ball(name: str) -> bool:
    """Whether the measure is that of a ball with a radius; others take only T from a ball, if any."""
    return options_of(name).get("ball", None) is inspect.Parameter.empty


def takes(name: str, option: str) -> bool:
    """Whether the measure has this option, and its row does not fix it."""
    return option in options_of(name) and option not in MEASURES[name].defaults


def arguments(name: str, given: Mapping[str, Any], required: Mapping[str, Any]) -> dict[str, Any]:
    """What the measure is called with: its defaults, then what it takes of `given`, then all that is `required`.

    Every option is there, so that a result is not taken for one that was computed with other defaults.
    """
    options = options_of(name)
    if wrong := [key for key in required if key not in options]:
        raise InputError(f"{name} has no option {wrong[0]!r}; it has {', '.join(sorted(options))}")
    options |= {k: v for k, v in given.items() if v is not None and takes(name, k)} | dict(required)
    if missing := [k for k, v in options.items() if v is inspect.Parameter.empty]:
        raise InputError(f"{name} needs {missing[0]}: give --set {name}.{missing[0]}=VALUE")
    return options


def call(name: str, loss: Loss, options: Mapping[str, Any], progress: Progress | None = None) -> Any:
    """The measure of the loss with the options that `arguments` returned."""
    row = MEASURES[name]
    evaluated = {key: value.evaluate(loss) if isinstance(value, OfLoss) else value for key, value in options.items()}
    if progress is not None and "progress" in inspect.signature(row.function).parameters:
        evaluated["progress"] = progress
    return row.function(*([] if row.of is None else [row.of]), loss, **evaluated)


def _keywords(function: Callable[..., Any], *, skipped: int) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {p.name: p.default for p in named[skipped:]}


@checked
def standard_measures(
    *, rho: float = 0.05, adaptive_rho: float = 0.1, num_steps: int = 20, num_probes: int = 100, seed: int = 0
) -> dict[str, Callable[[Loss], Estimate | Spectrum]]:
    """name -> function of a `Loss`, for `audit`: measures in wide use, and two that reparametrization cannot change.

    Those with T = 1 change with the scale of the weights: worst case, largest eigenvalue and trace of the Hessian,
    Euclidean regret. With T = |w| (eta = 0) they measure relative changes of the weights, and do not change under
    rescaling; nor does the regret in the Fisher metric, which is damped with that T.

    Args:
        rho: radius of the ball with T = 1, in units of w. adaptive_rho: of that with T = |w|.
        num_steps, num_probes, seed: as in the measures.
    """
    plain, adaptive = Ball(rho), Ball(adaptive_rho, adaptive=True, eta=0.0)
    return {
        "worst case": partial(worst_case_sharpness, ball=plain, num_steps=num_steps, seed=seed),
        "worst case, T = |w|": partial(worst_case_sharpness, ball=adaptive, num_steps=num_steps, seed=seed),
        "lambda_max": partial(hessian_eigenvalues, seed=seed),
        "lambda_max, T = |w|": partial(hessian_eigenvalues, ball=adaptive, seed=seed),
        "trace": partial(hessian_trace, num_probes=num_probes, seed=seed),
        "trace, T = |w|": partial(hessian_trace, ball=adaptive, num_probes=num_probes, seed=seed),
        "regret": partial(gradient_regret, seed=seed),
        "regret, Fisher metric": partial(gradient_regret, metric="fisher", num_probes=0, seed=seed),
    }
