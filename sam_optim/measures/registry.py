"""The measures by name: what `--measures` can choose, with their defaults. One row makes a measure known everywhere."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sam_optim.core.errors import InputError, unknown


@dataclass(frozen=True)
class Row:
    """function: of `sam_optim`. about: for --help. defaults: where they differ from the function's own; what --set may
    replace and the other options may not; an `OfLoss` is found for each loss. before: functions of `sam_optim` that
    come before the loss."""

    function: str
    about: str
    defaults: Mapping[str, Any] = field(default_factory=dict)
    before: tuple[str, ...] = ()


@dataclass(frozen=True)
class OfLoss:
    """An option that depends on the model. said: what stands for it in the settings."""

    said: str
    find: Callable[[Any], Any]

    def to_dict(self) -> str:
        return self.said


def last_layer(loss: Any) -> str:
    """The name of the model's last linear layer."""
    from torch import nn

    names = [name for name, module in loss.model.named_modules() if isinstance(module, nn.Linear)]
    if not names:
        raise InputError("the model has no linear layer: name one with --set MEASURE.layer=NAME")
    return names[-1]


LAST_LAYER = OfLoss("the last linear layer", last_layer)

MEASURES: dict[str, Row] = {
    "worst": Row("worst_case_sharpness", "highest rise of the loss within rho"),
    "average": Row("average_sharpness", "mean rise of the loss under noise of standard deviation rho on each weight"),
    "eigenvalue": Row("hessian_eigenvalues", "largest eigenvalue of the curvature", {"num": 1}),
    "eigenvalues": Row("hessian_eigenvalues", "the five largest eigenvalues of the curvature", {"num": 5}),
    "trace": Row("hessian_trace", "trace of the curvature"),
    "density": Row("spectral_density", "how many eigenvalues of the curvature are where", {"num_probes": 10}),
    "frobenius": Row("hessian_frobenius_norm", "root of the sum of the squared eigenvalues"),
    "gradient_regret": Row("gradient_regret", "what the best step for one batch forgoes on another", {"num_probes": 4}),
    "regret_fisher": Row("gradient_regret", "the same where steps are KL balls", {"metric": "fisher", "num_probes": 4}),
    "coherence": Row("gradient_coherence", "mean cosine between the gradients of two batches"),
    "noise_scale": Row("gradient_noise_scale", "batch size at which noise and gradient are equal"),
    "contrastive_eigenvalue": Row(
        "contrastive_sharpness",
        "largest eigenvalue of single batches over that of all",
        {"num": 1},
        before=("hessian_eigenvalues",),
    ),
    "fisher_rao": Row("fisher_rao_norm", "w^T F w", {"matrix": "fisher"}),
    "relative_flatness": Row("relative_flatness", "curvature of the last layer times its size", {"layer": LAST_LAYER}),
    "pac_bayes_sigma": Row("pac_bayes_sigma", "noise at which the loss has risen by target", {"target": 0.1}),
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

    A function that hands options on (**kwargs) has those of the function that stands before its loss, too.
    """
    import sam_optim

    row = MEASURES[name]
    function = getattr(sam_optim, row.function)
    found = _keywords(function, skipped=1 + len(row.before))
    if any(p.kind is p.VAR_KEYWORD for p in inspect.signature(function).parameters.values()):
        for before in row.before:
            found = _keywords(getattr(sam_optim, before), skipped=1) | found
    return {k: v for k, v in (found | dict(row.defaults)).items() if k != "progress"}


def needs_ball(name: str) -> bool:
    """Whether the measure is that of a ball with a radius; others take only T from a ball, if any."""
    return options_of(name).get("ball", None) is inspect.Parameter.empty


def takes(name: str, option: str) -> bool:
    """Whether the measure has this option, and its row does not fix it."""
    return option in options_of(name) and option not in MEASURES[name].defaults


def arguments(name: str, given: Mapping[str, Any], own: Mapping[str, Any]) -> dict[str, Any]:
    """What the measure is called with: its defaults, then of `given` what it takes, then `own`, all of which it must
    take. Every option is there, so that a result is not taken for one that was made with other defaults."""
    known = options_of(name)
    if wrong := [key for key in own if key not in known]:
        raise InputError(f"{name} has no option {wrong[0]!r}; it has {', '.join(sorted(known))}")
    found = known | {k: v for k, v in given.items() if v is not None and takes(name, k)} | dict(own)
    if lacking := [k for k, v in found.items() if v is inspect.Parameter.empty]:
        raise InputError(f"{name} needs {lacking[0]}: give --set {name}.{lacking[0]}=VALUE")
    return found


def call(name: str, loss: Any, options: Mapping[str, Any], progress: Callable[[int, int], None] | None = None) -> Any:
    """The measure of the loss with the options that `arguments` found."""
    import sam_optim

    row = MEASURES[name]
    function = getattr(sam_optim, row.function)
    before = [getattr(sam_optim, other) for other in row.before]
    told = progress is not None and "progress" in inspect.signature(function).parameters
    found = {key: value.find(loss) if isinstance(value, OfLoss) else value for key, value in options.items()}
    return function(*before, loss, **found, **({"progress": progress} if told else {}))


def _keywords(function: Callable[..., Any], *, skipped: int) -> dict[str, Any]:
    parameters = inspect.signature(function).parameters.values()
    named = [p for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    return {p.name: p.default for p in named[skipped:]}
