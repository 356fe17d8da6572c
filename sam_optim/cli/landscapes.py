"""`sam-optim landscape`: the loss on a line or a plane through a checkpoint, or on the way to another one."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from torch import Tensor

from sam_optim.core.errors import EXIT_FAILED, InputError
from sam_optim.core.files import write_json
from sam_optim.core.geometry import p_norm
from sam_optim.core.results import Landscape
from sam_optim.landscape import interpolate, slice_1d, slice_2d
from sam_optim.loss import Loss
from sam_optim.measures import hessian_eigenvalues
from sam_optim.report import results_page, save_picture, write_page
from sam_optim.sweep.problems import problem
from sam_optim.sweep.processes import started
from sam_optim.vision.checkpoints import Checkpoint, find


def landscape(args: argparse.Namespace) -> int:
    """Writes the picture; 1 where the loss is not finite at a point of it."""
    with started(args.device) as here:
        found = find(args.checkpoints)
        if len(found) > 1:
            raise InputError(f"one CHECKPOINT has one landscape, got {len(found)}; give one, and another with --other")
        (other,) = find([args.other]) if args.other else (None,)
        both = [c for c in (*found, other) if c is not None]
        made = problem(args, here, both)
        checkpoint = found[0] if found else None
        loss = made.loss(checkpoint)
        if other is None:
            result = _slice(loss, args)
        else:
            result = interpolate(loss, made.state(other, loss.model), coordinates=torch.linspace(0, 1, args.points))
        if here.is_first:
            _write(args.out, _name(checkpoint, other, args), result)
            print(args.out)
    return 0 if bool(result.losses.isfinite().all()) else EXIT_FAILED


def _slice(loss: Loss, args: argparse.Namespace) -> Landscape:
    axis = torch.linspace(-args.range, args.range, args.points, dtype=torch.float64)
    given = _directions(loss, args)
    if args.two:
        pair = None if given is None else (given[0], given[1])
        return slice_2d(loss, pair, coordinates=(axis, axis), seed=args.seed)
    return slice_1d(loss, None if given is None else given[0], coordinates=axis, seed=args.seed)


def _directions(loss: Loss, args: argparse.Namespace) -> list[list[Tensor]] | None:
    """Unit vectors, so that coordinates are distances between weights; None for random ones, which are in units of the
    norm of each filter.

    "eigen": the leading eigenvectors of the Hessian. "gradient": the gradient, and for a plane the leading eigenvector
    without its part along the gradient.
    """
    if args.directions == "random":
        return None
    num = 2 if args.two and args.directions == "eigen" else 1
    if args.directions == "eigen" or args.two:
        spectrum = hessian_eigenvalues(loss, num=num, which="magnitude", tol=1e-2, seed=args.seed)
        if not spectrum.eigenvectors or len(spectrum.eigenvectors) < num:
            raise InputError(f"no eigenvector was found: {spectrum.reason}; use --directions random")
        vectors = spectrum.eigenvectors
    if args.directions == "eigen":
        return vectors
    gradient = _unit(loss.gradient())
    if not args.two:
        return [gradient]
    overlap = sum(float((a.double() * b.double()).sum()) for a, b in zip(vectors[0], gradient, strict=True))
    return [gradient, _unit([a - overlap * b for a, b in zip(vectors[0], gradient, strict=True)])]


def _unit(v: list[Tensor]) -> list[Tensor]:
    length = float(p_norm(v, 2))
    if not length > 0:
        raise InputError(f"the gradient has the norm {length} and no direction; use --directions random")
    return [x / length for x in v]


def _name(checkpoint: Checkpoint | None, other: Checkpoint | None, args: argparse.Namespace) -> str:
    name = checkpoint.name if checkpoint else args.target
    return f"{name} to {other.name}" if other else f"{name}, {args.directions}"


def _write(path: Path, name: str, result: Landscape) -> None:
    if path.suffix == ".json":
        write_json(path, result.to_dict())
    elif path.suffix == ".html":
        write_page(path, results_page({name: result}, title="Loss around the weights"))
    else:
        save_picture(result, path, title=name)
