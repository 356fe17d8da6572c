"""The columns of the table: which measures, with which options, at which radii."""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from typing import Any

from sam_optim.core.errors import InputError
from sam_optim.core.geometry import Ball
from sam_optim.core.results import plain, provenance
from sam_optim.measures import registry


@dataclass(frozen=True)
class Column:
    """label: its name in tables. measure: in the registry. rho: of its ball, None where the measure has none."""

    label: str
    measure: str
    rho: float | None
    options: dict[str, Any]

    def identity(self) -> dict[str, Any]:
        """All that the number depends on but the loss: function, every option, versions."""
        about = provenance()
        versions = {"sam_optim": about["sam_optim"], "torch": about["torch"]}
        function = registry.MEASURES[self.measure].function
        return {"measure": self.measure, "function": function, "options": plain(self.options), "versions": versions}


def columns(args: argparse.Namespace) -> list[Column]:
    """In the order of --measures; one for each radius, and for each matrix.

    Raises:
        InputError: an option that none of the measures has.
    """
    given = {
        "num_steps": args.num_steps,
        "num_restarts": args.restarts,
        "num_samples": args.num_samples,
        "num_probes": args.num_probes,
        "seed": args.seed,
    }
    _check_useful(args, given)
    found = []
    for name in args.measures:
        own = {option: value for measure, option, value in args.set if measure == name}
        radii: list[float | None] = [None]
        if registry.needs_ball(name):
            radii = list(args.noise_rho if name == "average" and args.noise_rho else args.rho)
        for matrix in args.matrix or [None] if registry.takes(name, "matrix") else [None]:
            for rho in radii:
                where = {"matrix": matrix, "ball": _ball(args, rho), "adaptive": args.adaptive}
                options = registry.arguments(name, given | where, own)
                shown = [name, matrix if matrix != "hessian" else None, _geometry(args.adaptive, options)]
                shown.append(f"rho={rho:g}" if rho is not None else None)
                found.append(Column(" ".join(filter(None, shown)), name, rho, options))
    return found


def _geometry(adaptive: str | None, options: dict[str, Any]) -> str | None:
    """The word for T in a label, of a measure that has one: radii of another T are not to be compared."""
    if not adaptive or not (options.get("ball") or options.get("adaptive")):
        return None
    return "adaptive" if adaptive == "elementwise" else f"adaptive={adaptive}"


def _ball(args: argparse.Namespace, rho: float | None) -> Ball | None:
    """The ball of a radius; without one that of T alone, where T is not 1."""
    if rho is None:
        return Ball(1.0, adaptive=args.adaptive, eta=args.eta) if args.adaptive else None
    return Ball(rho, norm=float(args.norm), adaptive=args.adaptive or False, eta=args.eta)


def _check_useful(args: argparse.Namespace, given: dict[str, Any]) -> None:
    names = {"num_restarts": "--restarts"}
    wanted = [k for k, v in given.items() if v is not None and k != "seed"] + (["matrix"] if args.matrix else [])
    for option in wanted:
        if not any(registry.takes(name, option) for name in args.measures):
            shown = names.get(option, "--" + option.replace("_", "-"))
            raise InputError(f"{shown} means nothing to {', '.join(args.measures)}: leave it out")
    if args.noise_rho and "average" not in args.measures:
        raise InputError("--noise-rho is for the measure average: add it to --measures, or leave it out")
    for measure, option, _ in args.set:
        if measure not in args.measures:
            raise InputError(f"--set {measure}.{option} is of a measure that is not among --measures")
