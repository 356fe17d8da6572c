"""Measure how flat a trained run is: the model of its config.json and newest checkpoint, on its own data.

python -m benchmarks.measure RUN_DIR --measures worst,eigenvalue
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from benchmarks.command import option, settings_of
from benchmarks.train import data, trained
from benchmarks.train.options import OfRun, Options
from benchmarks.train.trained import TrainedRun
from sam_optim import Perturbation, asam_param_groups
from sam_optim.core.arguments import number
from sam_optim.core.errors import EXIT_FAILED, InputError, one_line, run
from sam_optim.core.files import write_json
from sam_optim.core.geometry import ProductBall
from sam_optim.core.results import plain, provenance
from sam_optim.core.text import cell
from sam_optim.loss import Loss
from sam_optim.measures import registry
from sam_optim.measures.registry import MEASURES, chosen

DEFAULT_RHO = 0.05
BRIEF = {"num_samples": 30, "num_probes": 30}  # after every training run
SPLITS = ("train", "validation", "test")
GEOMETRIES = ("no", "elementwise", "filter", "layer")


@dataclass(frozen=True, kw_only=True)
class Measuring:
    """What is measured of a run, on which examples, in which ball."""

    names: list[str] = option(
        ["worst", "average_in_ball", "eigenvalue", "trace"],
        f"of {', '.join(MEASURES)}",
        type=chosen,
        flags=["--measures"],
    )
    split: str = option("train", choices=SPLITS)
    examples: int = option(
        512,
        "number of examples, evenly spaced in the split (of a stream the first); 0: all (default: 512)",
        type=number(int, 0),
    )
    batch_size: int = option(128, "the m of m-sharpness (default: 128)", type=number(int, 1))
    rho: float | None = option(
        None, f"radius of the ball; default: the optimizer's, else {DEFAULT_RHO}", type=number(float, 0, above=True)
    )
    adaptive: str | None = option(None, "T of the ball; default: the optimizer's", choices=GEOMETRIES)
    norm: str | None = option(None, "p of the ball; default: the optimizer's", choices=("2", "inf"))
    normalize_logits: bool = option(
        False, "center the logits and divide them by their norm before the loss", action="store_true"
    )


@dataclass(frozen=True, kw_only=True)
class Command(Measuring, OfRun):
    pass


def main(argv: Sequence[str] | None = None) -> int:
    command = settings_of(Command, "python -m benchmarks.measure", __doc__, argv)
    if not command.names:
        raise InputError(f"--measures names none; choose from {', '.join(MEASURES)}")
    with command.locked():
        return measure(trained.load(command.options(), ema=command.ema), command)


def measure(model_run: TrainedRun, measuring: Measuring) -> int:
    """Measures, prints a table, writes measures.json. Exit code 1 where a measure has no value."""
    options, examples = model_run.options, model_run.split(measuring.split)
    batches = list(model_run.batches(examples, measuring.batch_size, measuring.examples))
    loss = Loss(
        model_run.model,
        nn.CrossEntropyLoss(),
        batches,
        device=model_run.device,
        normalize_logits=measuring.normalize_logits,
    )
    ball = neighborhood(options, model_run.model, measuring)
    results = {}
    for name in measuring.names:
        results[name] = _measured(name, loss, ball)
        result = results[name]
        text = cell(result) if _has_value(result) else f"no value: {result.get('reason', 'it is not finite')}"
        print(f"{name:22s} {text}", flush=True)
    report = {
        "split": measuring.split,
        "num_examples": loss.num_examples,
        "which_examples": data.taken(examples, measuring.examples),
        "batch_size": measuring.batch_size,
        "weights": model_run.weights,
        "updates": model_run.updates,
        "loss": float(loss.value()),
        "ball": ball.to_dict(),
        "measures": results,
        "provenance": provenance(device=str(model_run.device)),
    }
    write_json(options.out / "measures.json", plain(report))
    return 0 if all(_has_value(result) for result in results.values()) else EXIT_FAILED


def neighborhood(options: Options, model: nn.Module, measuring: Measuring) -> ProductBall:
    """The ball that the run's optimizer searched; for a plain one `DEFAULT_RHO` and T = 1. `measuring` replaces."""
    adaptive = {None: options.adaptive, "no": None}.get(measuring.adaptive, measuring.adaptive)
    groups = asam_param_groups(model, adaptive=adaptive) if adaptive else model.parameters()
    radius = measuring.rho or options.sam_rho or DEFAULT_RHO
    return Perturbation(
        groups, rho=radius, eta=options.sam_eta, norm=float(measuring.norm or options.sam_norm)
    ).neighborhood


def _measured(name: str, loss: Loss, ball: ProductBall) -> dict[str, Any]:
    """The result as plain values, or the reason why this model or these data have none."""
    brief: dict[str, Any] = BRIEF | ({"tol": 1e-3} if name.startswith("eigenvalue") else {})
    if registry.needs_ball(name):
        brief |= {"ball": ball}
    try:
        return registry.call(name, loss, registry.arguments(name, brief, {})).to_dict()
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return {"value": None, "reason": one_line(error)}


def _has_value(result: dict[str, Any]) -> bool:
    return bool(result.get("eigenvalues")) or result.get("value") is not None


if __name__ == "__main__":
    sys.exit(run(main))
