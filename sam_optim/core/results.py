"""Results of the measures: frozen values with their settings and provenance."""

from __future__ import annotations

import math
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor


def provenance(**extra: Any) -> dict[str, Any]:
    """Versions and platform, and whatever else a result was made from."""
    from sam_optim._version import __version__

    return {"sam_optim": __version__, "torch": torch.__version__, "platform": platform.machine()} | extra


def plain(value: Any) -> Any:
    """`value` as what strict JSON can hold: tensors become lists, numbers that are not finite become None."""
    if isinstance(value, Tensor):
        return plain(value.detach().cpu().tolist())
    if isinstance(value, Mapping):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    if hasattr(value, "to_dict"):
        return value.to_dict()
    if isinstance(value, bool) or value is None or isinstance(value, (int, str)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value).removeprefix("torch.")
    raise TypeError(f"a result can hold numbers, strings, tensors, lists and mappings, got {type(value).__name__}")


class _Result:
    def to_dict(self) -> dict[str, Any]:
        """Plain Python for `json.dumps(..., allow_nan=False)`; what is not finite is None, and `reason` says why."""
        values = {f.name: plain(getattr(self, f.name)) for f in fields(self) if f.repr}  # type: ignore[arg-type]
        return {"type": type(self).__name__} | {name: value for name, value in values.items() if value is not None}


@dataclass(frozen=True)
class Estimate(_Result):
    """One measured number.

        >>> str(Estimate(0.25, stderr=0.01, num_samples=8))
        '0.25 ± 0.01 (n = 8)'

    value: in the units that the measure's docstring names; nan if it could not be computed (`reason` says why).
    stderr: the standard error of `value` over batches or draws; nan where there is only one, 0 where it is exact.
    interval: of 95 %, by Student's t for that many batches or draws; None where stderr is nan.
    num_samples: how many draws, batches or pairs `stderr` is over.
    converged: False where an iteration stopped at its limit, or a value is not finite.
    """

    value: float
    stderr: float = math.nan
    num_samples: int = 1
    converged: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None
    interval: tuple[float, float] | None = None

    def __float__(self) -> float:
        return self.value

    def __str__(self) -> str:
        text = f"{self.value:.4g}"
        if math.isfinite(self.stderr) and self.stderr > 0:
            text += f" ± {self.stderr:.2g} (n = {self.num_samples})"
        return text + ("" if self.converged else f" (not converged: {self.reason or 'see details'})")

    def to_dict(self) -> dict[str, Any]:
        return {"value": None, "stderr": None} | super().to_dict()


@dataclass(frozen=True, eq=False)
class Diagonal(_Result):
    """The diagonal of a curvature matrix.

    values: tensors in the shapes of the parameters. stderr: the standard error of each entry over probes, in the same
    shapes; 0 where they are exact. num_samples: how many probes.
    """

    values: list[Tensor]
    stderr: list[Tensor]
    num_samples: int = 1
    converged: bool = True
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    details: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None


@dataclass(frozen=True, eq=False)
class Spectrum(_Result):
    """Eigenvalues of a curvature matrix, or its spectral density.

    eigenvalues: (k,), descending, float64. residuals: (k,), ||A v - lambda v||_2 for unit v. eigenvectors: k lists of
    tensors in the shapes of the parameters (left out of `to_dict`). errors: (k,), bounds of the errors of the values.
    grid, density: (n,), for spectral densities, with the stderr of the density.
    """

    eigenvalues: Tensor
    residuals: Tensor | None = None
    eigenvectors: list[list[Tensor]] | None = field(default=None, repr=False)
    converged: bool = True
    num_products: int = 0
    grid: Tensor | None = None
    density: Tensor | None = None
    stderr: Tensor | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None
    errors: Tensor | None = None
    details: Mapping[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        text = ", ".join(f"{x:.4g}" for x in self.eigenvalues.tolist())
        return text + ("" if self.converged else f" (not converged: {self.reason or 'see residuals'})")


@dataclass(frozen=True, eq=False)
class Landscape(_Result):
    """Losses on a grid around the weights.

    coordinates: one (n,) tensor for each axis, in units of the directions. losses: (n,) or (n, m), in units of L, first
    axis along the first direction. directions: how they were chosen, and their norms.
    """

    coordinates: tuple[Tensor, ...]
    losses: Tensor
    directions: Mapping[str, Any] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)


def student_quantile(degrees: int) -> float:
    """t with P(|T| <= t) = 0.95 for Student's T with so many degrees of freedom.

    P is a finite sum of powers of cos^2 for whole degrees: Abramowitz and Stegun (1964), 26.7.3 and 26.7.4.
    """
    if degrees > 10_000:
        return 1.96

    def inside(t: float) -> float:
        angle = math.atan(t / math.sqrt(degrees))
        odd = degrees % 2
        term = total = math.cos(angle) if odd else 1.0
        for k in range(2 + odd, degrees - 1, 2):
            term *= math.cos(angle) ** 2 * (k - 1) / k
            total += term
        total *= math.sin(angle)
        return 2 / math.pi * (angle + (total if degrees > 1 else 0.0)) if odd else total

    low, high = 1.9, 13.0
    while high - low > 1e-9:
        middle = (low + high) / 2
        low, high = (middle, high) if inside(middle) < 0.95 else (low, middle)
    return high


def mean_over_batches(values: Sequence[float], sizes: Sequence[int]) -> tuple[float, float]:
    """m = sum_b p_b x_b with p_b = n_b / N, and its standard error over batches, nan where there is only one:

        stderr^2 = B / (B - 1) sum_b p_b^2 (x_b - m)^2          (equal sizes: the sample variance divided by B)

    Sums are exact, so the order of the batches does not change a bit.
    """
    total = sum(sizes)
    mean = math.fsum(n / total * x for n, x in zip(sizes, values, strict=True))
    if len(values) < 2:
        return mean, math.nan
    spread = math.fsum((n / total * (x - mean)) ** 2 for n, x in zip(sizes, values, strict=True))
    return mean, math.sqrt(len(values) / (len(values) - 1) * spread)
