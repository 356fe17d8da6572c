"""The columns of the table: which measures, with which options, at which radii."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from sam_optim.core.errors import InputError
from sam_optim.core.geometry import Ball
from sam_optim.core.results import plain, provenance
from sam_optim.measures import registry

OPTIONS = {"num_steps": "--num-steps", "num_restarts": "--restarts", "num_samples": "--num-samples"}
OPTIONS |= {"num_probes": "--num-probes"}


@dataclass(frozen=True)
class Measures:
    """Which measures, and in which geometry.

    Args:
        names: of `sam_optim.measures.registry.MEASURES`.
        rho: radii, a column for each, of the measures that have a ball. noise_rho: sigma, the standard deviations of
            "average", if they differ.
        adaptive, eta, norm: of the ball (see `Ball`); of the curvature, T H T.
        matrices: of the measures of curvature, a column for each; none: the Hessian.
        num_steps, num_restarts, num_samples, num_probes: for every measure that takes them; None: its default.
        options_of: measure -> option -> value, for all other options.
        seed: of all random draws.
    """

    names: Sequence[str]
    rho: Sequence[float] = (0.05,)
    noise_rho: Sequence[float] = ()
    adaptive: str | None = None
    eta: float = 0.01
    norm: float = 2.0
    matrices: Sequence[str] = ()
    num_steps: int | None = None
    num_restarts: int | None = None
    num_samples: int | None = None
    num_probes: int | None = None
    options_of: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    seed: int = 0

    def columns(self) -> list[Column]:
        """The columns in the order of the names; one for each radius and each matrix.

        Raises:
            InputError: an unknown measure, or an option that none of the measures has.
        """
        if not self.names:
            raise InputError(f"--measures names none; choose from {', '.join(registry.MEASURES)}")
        names = registry.chosen(",".join(self.names))
        self._check_useful()
        return [column for name in names for column in self._columns_of(name)]

    def _columns_of(self, name: str) -> Iterator[Column]:
        common = {option: getattr(self, option) for option in OPTIONS} | {"seed": self.seed, "adaptive": self.adaptive}
        radii: Sequence[float | None] = (None,)
        if registry.needs_ball(name):
            radii = self.noise_rho if name == "average" and self.noise_rho else self.rho
        for matrix in self.matrices or (None,) if registry.takes(name, "matrix") else (None,):
            for rho in radii:
                given = common | {"matrix": matrix, "ball": self._ball(rho)}
                options = registry.arguments(name, given, self.options_of.get(name, {}))
                words = [name, matrix if matrix != "hessian" else None, self._geometry(options)]
                unit = "sigma" if name == "average" else "rho"  # a standard deviation is no radius
                words.append(f"{unit}={rho:g}" if rho is not None else None)
                yield Column(" ".join(filter(None, words)), name, rho, options)

    def _geometry(self, options: Mapping[str, Any]) -> str | None:
        """The word for T in the label of a measure that has one: radii in different T cannot be compared."""
        if not self.adaptive or not (options.get("ball") or options.get("adaptive")):
            return None
        return "adaptive" if self.adaptive == "elementwise" else f"adaptive={self.adaptive}"

    def _ball(self, rho: float | None) -> Ball | None:
        """The ball of this radius; without a radius, T alone, or None where T = 1."""
        if rho is None:
            return Ball(1.0, adaptive=self.adaptive, eta=self.eta) if self.adaptive else None
        return Ball(rho, norm=self.norm, adaptive=self.adaptive or False, eta=self.eta)

    def _check_useful(self) -> None:
        given = [option for option in OPTIONS if getattr(self, option) is not None]
        for option in [*given, *(["matrix"] if self.matrices else [])]:
            if not any(registry.takes(name, option) for name in self.names):
                shown = OPTIONS.get(option, f"--{option}")
                raise InputError(f"{shown} does nothing for {', '.join(self.names)}: leave it out")
        if self.noise_rho and "average" not in self.names:
            raise InputError("--noise-rho is for the measure average: add it to --measures, or leave it out")
        for measure in self.options_of:
            if measure not in self.names:
                raise InputError(f"--set {measure} is of a measure that is not among --measures")


@dataclass(frozen=True)
class Column:
    """label: its name in tables. measure: in the registry. rho: of its ball, None where the measure has none."""

    label: str
    measure: str
    rho: float | None
    options: Mapping[str, Any]

    def identity(self) -> dict[str, Any]:
        """All that the number depends on but the loss: function, every option, versions."""
        about = provenance()
        versions = {"sam_optim": about["sam_optim"], "torch": about["torch"]}
        function = registry.MEASURES[self.measure].function.__name__
        return {"measure": self.measure, "function": function, "options": plain(self.options), "versions": versions}
