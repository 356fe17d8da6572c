"""Measure how flat a trained run is: the model of its config.json and newest checkpoint, on its own data.

python -m benchmarks.measure RUN_DIR --measures worst,eigenvalue
"""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from benchmarks import command
from benchmarks.command import InputError, one_line
from benchmarks.train import checkpoint, data, options, recipe
from sam_optim import Perturbation, asam_param_groups
from sam_optim.cli.options import number
from sam_optim.core import random as rng
from sam_optim.core.geometry import ProductBall
from sam_optim.core.results import plain, provenance
from sam_optim.loss import Loss
from sam_optim.measures import registry
from sam_optim.measures.registry import MEASURES, chosen
from sam_optim.report.study import cell

DEFAULT_RHO = 0.05
BRIEF = {"num_samples": 30, "num_probes": 30}  # after every training run


def main(argv: Sequence[str] | None = None) -> int:
    p = options.Parser(prog="python -m benchmarks.measure", description="Measure a run of benchmarks.train.")
    options.add_run(p)
    p.add_argument("--measures", default="worst,average,eigenvalue,trace", help=f"of {', '.join(MEASURES)}")
    p.add_argument("--split", choices=("train", "validation", "test"), default="train")
    p.add_argument(
        "--examples",
        type=int,
        default=512,
        help="so many, evenly spaced in the split (of a stream the first); 0 for all",
    )
    p.add_argument("--batch-size", type=int, default=128, help="m of m-sharpness")
    p.add_argument("--rho", type=float, help=f"radius; default: that of the run's optimizer, else {DEFAULT_RHO}")
    p.add_argument("--adaptive", choices=("no", "elementwise", "filter", "layer"), help="default: as the optimizer's")
    p.add_argument("--ema", action="store_true", help="the averaged weights of --model-ema")
    p.add_argument("--workers", type=number(int, 0), help="processes that decode images; default: as many as the run's")
    args = p.parse_args(argv)
    kept = options.of_run(args)
    names = chosen(args.measures)
    if not names:
        raise InputError(f"--measures names none; choose from {', '.join(MEASURES)}")
    choices = {k: getattr(args, k) for k in ("split", "examples", "batch_size", "rho", "adaptive", "ema")}
    return run(args.run, names, kept, **choices)


def run(
    directory: Path,
    names: Iterable[str],
    args: argparse.Namespace,
    *,
    split: str = "train",
    examples: int = 512,
    batch_size: int = 128,
    rho: float | None = None,
    adaptive: str | None = None,
    ema: bool = False,
) -> int:
    """Measures, prints a table, writes measures.json. Exit code 1 where a measure has no value."""
    state = checkpoint.newest(directory / "checkpoints")
    device = recipe.device(args)
    with rng.kept():
        splits = recipe.splits(args)
        model = recipe.model(args, splits).to(device)
    weights = state["ema"] if ema else state["model"]
    if weights is None:
        raise InputError(f"{directory} was trained without --model-ema: leave --ema out")
    model.load_state_dict(weights)
    loss = Loss(model, nn.CrossEntropyLoss(), _batches(splits, split, examples, batch_size, args), device=device)
    ball = neighborhood(args, model, rho, adaptive)
    results = {}
    for name in names:
        results[name] = _measured(name, loss, ball)
        print(f"{name:22s} {_line(results[name])}", flush=True)
    report = {
        "split": split,
        "num_examples": loss.num_examples,
        "which_examples": data.taken(getattr(splits, split), examples),
        "batch_size": batch_size,
        "weights": "ema" if ema else "model",
        "updates": state["step"],
        "loss": float(loss.value()),
        "ball": ball.to_dict(),
        "measures": results,
        "provenance": provenance(device=str(device)),
    }
    command.write_json(directory / "measures.json", plain(report))
    return 0 if all(_has_value(result) for result in results.values()) else 1


def neighborhood(args: argparse.Namespace, model: nn.Module, rho: float | None, adaptive: str | None) -> ProductBall:
    """The ball that the run's optimizer searched; for a plain one `DEFAULT_RHO` and T = 1. Options replace."""
    if rho is not None and not (math.isfinite(rho) and rho > 0):
        raise InputError(f"--rho is a radius in weight space and must be > 0, got {rho}")
    adaptive = {None: args.adaptive, "no": None}.get(adaptive, adaptive)
    groups = asam_param_groups(model, adaptive=adaptive) if adaptive else model.parameters()
    radius = rho or args.sam_rho or DEFAULT_RHO
    return Perturbation(groups, rho=radius, eta=args.sam_eta, norm=float(args.sam_norm)).neighborhood


def as_noise(ball: ProductBall, loss: Loss) -> ProductBall:
    """The ball whose Gaussian noise is as long as `ball`'s radius: E ||T^-1 d||^2 = rho^2 for d = rho / sqrt(P) T z.

    With rho itself as the standard deviation of every weight, the noise would be sqrt(P) times longer than the
    perturbation that the worst case is over, and no longer near the weights. For the sup norm rho is kept.
    """
    num = 1.0 if ball.norm == math.inf else math.sqrt(sum(p.numel() for p in loss.params))
    return ProductBall([(replace(b, rho=b.rho / num), params) for b, params in ball.groups])


def _batches(
    splits: data.Splits, split: str, examples: int, batch_size: int, args: argparse.Namespace
) -> list[tuple[Tensor, Tensor]]:
    """`examples` of them, as `data.some` takes them, without augmentation, with the labels that training saw."""
    if examples < 0 or batch_size < 1:
        raise InputError(f"--examples must be >= 0 and --batch-size >= 1, got {examples} and {batch_size}")
    dataset = getattr(splits, split)
    if dataset is None:
        raise InputError("the run has no validation split: choose --split train or test")
    dataset = data.some(dataset, examples)
    found, left = [], examples or len(dataset)
    for x, y in data.batches(dataset, min(batch_size, left), splits.image_size, workers=args.workers):
        found.append((x[:left], y[:left]))
        left -= len(y)
        if left <= 0:
            break
    return found


def _measured(name: str, loss: Loss, ball: ProductBall) -> dict[str, Any]:
    """The result as plain values; a measure that this model or data cannot have says why instead."""
    brief = BRIEF | ({"tol": 1e-3} if name.startswith("eigenvalue") else {})
    if registry.needs_ball(name):
        brief |= {"ball": as_noise(ball, loss) if name == "average" else ball}
    try:
        return registry.call(name, loss, registry.arguments(name, brief, {})).to_dict()
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return {"value": None, "reason": one_line(error)}


def _has_value(result: dict[str, Any]) -> bool:
    return bool(result.get("eigenvalues")) or result.get("value") is not None


def _line(result: dict[str, Any]) -> str:
    return cell(result) if _has_value(result) else f"no value: {result.get('reason', 'it is not finite')}"


if __name__ == "__main__":
    sys.exit(command.run(main))
