"""Balls around the weights w:  {w + d : ||T^-1 d||_p <= rho},  T = 1, |w| + eta, or a norm per filter or layer.

The optimizers move along the steepest ascent in a ball, the measures search it. Both use coordinates u = d / (rho T),
in which every ball is the unit ball of the p-norm: a projection is a rescaling (p = 2) or a clamp (p = inf).
"""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

ADAPTIVE = ("elementwise", "filter", "layer")
NORMS = (2, math.inf)

Tensors = Sequence[Tensor]


def check_rho(rho: Any) -> None:
    """A radius is a number >= 0; on a device (0-d tensor, for schedules inside CUDA graphs) it is not read."""
    if isinstance(rho, Tensor):
        if rho.numel() != 1:
            raise ValueError(f"rho is one radius for each group, got a tensor of shape {tuple(rho.shape)}")
        if rho.is_cuda:
            return
    elif isinstance(rho, bool) or not isinstance(rho, numbers.Real):
        raise ValueError(f"rho is a radius in weight space and must be a number, got {rho!r}")
    if not (math.isfinite(rho) and rho >= 0):
        raise ValueError(f"rho is a radius in weight space and must be finite and >= 0, got {rho}")


def check_eta(eta: Any) -> None:
    if isinstance(eta, bool) or not isinstance(eta, numbers.Real) or not 0 <= float(eta) < math.inf:
        raise ValueError(f"eta is added to |w| (ASAM) and must be a finite number >= 0, got {eta!r}")


def canonical_adaptive(adaptive: bool | str | None) -> str | None:
    """None for T = 1, else one of `ADAPTIVE`; True means "elementwise"."""
    if adaptive is None or adaptive is False:
        return None
    if adaptive is True:
        return "elementwise"
    if isinstance(adaptive, str) and adaptive in ADAPTIVE:
        return str(adaptive)
    raise ValueError(f"adaptive must be False, True (elementwise), 'filter' or 'layer', got {adaptive!r}")


def canonical_norm(norm: Any) -> float:
    if isinstance(norm, str) and norm in ("2", "inf"):
        norm = float(norm)
    if isinstance(norm, bool) or not isinstance(norm, numbers.Real) or norm not in NORMS:
        raise ValueError(f"norm must be 2 or inf (math.inf), got {norm!r}")
    return math.inf if norm == math.inf else 2


def scale(w: Tensor, adaptive: str | None, eta: float) -> Tensor:
    """T of one parameter, in units of w, broadcastable to its shape.

    None           1
    "elementwise"  |w| + eta                                 (arXiv:2102.11600)
    "filter"       ||w_f||_2 + eta for each slice f of the first dimension; elementwise for biases and other
                   tensors with fewer than two dimensions, as in the same paper
    "layer"        ||w||_2 + eta for the whole tensor
    """
    w = w.detach()
    if w.dtype in (torch.bfloat16, torch.float16):
        w = w.float()  # a T that is rounded to 8 bits is another T
    if adaptive is None:
        return torch.ones((), dtype=w.dtype, device=w.device)
    if adaptive == "layer":
        real = torch.view_as_real(w) if w.is_complex() else w
        return torch.linalg.vector_norm(real, dtype=torch.float64).to(real.dtype) + eta
    if adaptive == "filter" and w.ndim >= 2:
        return torch.linalg.vector_norm(w, dim=tuple(range(1, w.ndim)), keepdim=True) + eta
    return w.abs() + eta


@dataclass(frozen=True)
class Ball:
    """{w + d : ||T^-1 d||_p <= rho}: what SAM minimizes over, and what the sharpness measures search.

        >>> w, g = torch.tensor([6.0, 8.0]), torch.tensor([3.0, 4.0])
        >>> Ball(0.5).ascent([g], [w])
        [tensor([0.3000, 0.4000])]

    Args:
        rho: the radius, in units of T (of w itself where T = 1), not relative to ||w||. 0 is the point w.
        norm: p, 2 or inf; over all parameters together.
        adaptive: T. False: 1. True or "elementwise": |w| + eta. "filter", "layer": their norm + eta (see `scale`).
        eta: keeps T away from 0; matters only where adaptive. With eta = 0 a weight that is 0 never moves.

    Raises:
        ValueError: rho or eta negative or not finite, an unknown norm or adaptive.

    Source: SAM, arXiv:2010.01412 (T = 1); ASAM, arXiv:2102.11600 (T adaptive).
    """

    rho: float
    norm: float = 2
    adaptive: bool | str | None = False
    eta: float = 0.01

    def __post_init__(self) -> None:
        check_rho(self.rho)
        check_eta(self.eta)
        object.__setattr__(self, "rho", float(self.rho))
        object.__setattr__(self, "eta", float(self.eta))
        object.__setattr__(self, "norm", canonical_norm(self.norm))
        object.__setattr__(self, "adaptive", canonical_adaptive(self.adaptive) or False)

    def scales(self, params: Tensors) -> list[Tensor]:
        """T at w = `params`: one tensor for each parameter, broadcastable to it, in units of w."""
        return [scale(w, canonical_adaptive(self.adaptive), self.eta) for w in params]

    def radii(self, params: Tensors) -> list[float]:
        return [self.rho] * len(params)

    def ascent(self, grads: Tensors, params: Tensors) -> list[Tensor]:
        """The d in the ball that maximizes <g, d>: rho T^2 g / ||T g||_2, or rho T sign(g); 0 where g = 0."""
        chart = Chart(self, params)
        return chart.displacement(chart.steepest(chart.pull_back(grads)))

    def project(self, displacement: Tensors, params: Tensors) -> list[Tensor]:
        """The point of the ball that is nearest in the coordinates u = d / (rho T); exact, without a search."""
        chart = Chart(self, params)
        return chart.displacement(chart.project(chart.coordinates(displacement)))

    def noise(self, params: Tensors, normal: Callable[[Tensor], Tensor]) -> list[Tensor]:
        """rho T z, z = `normal(w)` for each parameter (standard normal, of its shape)."""
        return Chart(self, params).displacement([normal(w) for w in params])

    def length(self, displacement: Tensors, params: Tensors) -> Tensor:
        """||T^-1 d||_p, 0-d, in units of rho; inf where d moves a weight that has T = 0."""
        pairs = zip(displacement, self.scales(params), strict=True)
        return p_norm([torch.where(d == 0, torch.zeros_like(d), d / t) for d, t in pairs], self.norm)

    def to_dict(self) -> dict[str, Any]:
        norm = "inf" if self.norm == math.inf else 2
        return {"rho": self.rho, "norm": norm, "adaptive": self.adaptive, "eta": self.eta if self.adaptive else None}


class ProductBall:
    """One ball over parameter groups that differ in rho or T: ||(rho_k T_k)^-1 d_k||_p <= 1 over all groups k together.

    What `SAM` searches when its groups differ, as with `asam_param_groups`; its e has length 1. Parameters that no
    group holds, and groups with rho = 0, do not move.
    """

    def __init__(self, groups: Sequence[tuple[Ball, Sequence[Tensor]]]):
        norms = {ball.norm for ball, _ in groups}
        if len(norms) != 1:
            raise ValueError(f"a product ball needs one norm in all its groups, got {sorted(norms)}")
        self.groups = [(ball, tuple(params)) for ball, params in groups]
        self.norm = norms.pop()
        self._ball_of: Mapping[int, Ball] = {id(p): ball for ball, params in self.groups for p in params}

    def scales(self, params: Tensors) -> list[Tensor]:
        balls = [self._ball_of.get(id(w)) for w in params]
        return [w.new_zeros(()) if b is None else b.scales([w])[0] for w, b in zip(params, balls, strict=True)]

    def radii(self, params: Tensors) -> list[float]:
        return [ball.rho if (ball := self._ball_of.get(id(w))) else 0.0 for w in params]

    @property
    def rho(self) -> float:
        """The largest radius of a group."""
        return max(ball.rho for ball, _ in self.groups)

    def ascent(self, grads: Tensors, params: Tensors) -> list[Tensor]:
        """The e of a SAM step: rho_k T_k^2 g_k / ||T g||_2, the norm over all k that move, or rho_k T_k sign(g_k)."""
        units = ProductBall([(replace(ball, rho=float(ball.rho > 0)), ps) for ball, ps in self.groups])
        chart = Chart(units, params)
        e = chart.displacement(chart.steepest(chart.pull_back(grads)))
        return [rho * x for rho, x in zip(self.radii(params), e, strict=True)]

    def to_dict(self) -> dict[str, Any]:
        return {"groups": [ball.to_dict() | {"num_tensors": len(params)} for ball, params in self.groups]}


class Chart:
    """Coordinates u = S^-1 d, S = rho T, at fixed weights: the ball is the unit ball of the p-norm of u.

    Lists hold one tensor for each parameter; S is frozen at the weights that the chart was made at.
    """

    def __init__(self, ball: Ball | ProductBall, params: Tensors):
        self.norm = ball.norm
        radii = ball.radii(params)
        self.scales = [t * rho for t, rho in zip(ball.scales(params), radii, strict=True)]

    def displacement(self, u: Tensors) -> list[Tensor]:
        """d = S u, in units of w."""
        return [s * x for s, x in zip(self.scales, u, strict=True)]

    def coordinates(self, d: Tensors) -> list[Tensor]:
        """u = S^-1 d; 0 where S = 0, so that a weight with T = 0 stays where it is."""
        return [torch.where(s == 0, torch.zeros_like(x), x / s) for s, x in zip(self.scales, d, strict=True)]

    def pull_back(self, grads: Tensors) -> list[Tensor]:
        """The gradient with respect to u: S g."""
        return [s * g for s, g in zip(self.scales, grads, strict=True)]

    def steepest(self, gradient: Tensors) -> list[Tensor]:
        """The u of the unit ball along the gradient with respect to u: v / ||v||_2, or sign(v); 0 where v = 0."""
        if self.norm == math.inf:
            return [v.sign() for v in gradient]
        length = p_norm(gradient, 2)
        factor = torch.where(length > 0, 1 / length, torch.zeros_like(length))
        return [(v * factor).to(v.dtype) for v in gradient]

    def project(self, u: Tensors) -> list[Tensor]:
        """The nearest point of the unit ball: a clamp (p = inf) or a rescaling (p = 2)."""
        if self.norm == math.inf:
            return [x.clamp(-1, 1) for x in u]
        factor = 1 / p_norm(u, 2).clamp(min=1)
        return [(x * factor).to(x.dtype) for x in u]

    def length(self, u: Tensors) -> Tensor:
        return p_norm(u, self.norm)


def p_norm(tensors: Tensors, p: float) -> Tensor:
    """||.||_p over all entries of all tensors, 0-d, accumulated in float64."""
    norms = [torch.linalg.vector_norm(x, p, dtype=torch.float64) for x in tensors if x.numel()]
    if not norms:
        return torch.zeros((), dtype=torch.float64)
    return torch.linalg.vector_norm(torch.stack([n.to(norms[0].device) for n in norms]), p)
