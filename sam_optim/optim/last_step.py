"""Diagnostics of the last step, computed on request from what the passes had anyway."""

from __future__ import annotations

import math
import numbers
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from sam_optim.optim.kernels import Ascent, Scalar, hypot


@dataclass(frozen=True)
class LastStep:
    """Diagnostics of one step: 0-d tensors on the device; None for what it could not know.

    loss, perturbed_loss: what the closure returned at w and at w + e, in units of L. sharpness: their difference.
    dual_norm: ||T g||_q of the ascent gradient, q dual to p: rho * dual_norm is the rise of L to first order.
    grad_norm: ||g||_2; equal to dual_norm where T = 1 and p = 2.
    radius: ||T^-1 e||_p, which is rho, or 0 for a gradient of 0. perturbation_norm: ||e||_2, in units of w.
    realized: <e', e> / ||e||^2, the share of e that the rounding of bf16 and fp16 weights has left; 1 for wider ones.
    """

    loss: Tensor | None = None
    perturbed_loss: Tensor | None = None
    sharpness: Tensor | None = None
    dual_norm: Tensor | None = None
    grad_norm: Tensor | None = None
    radius: Tensor | None = None
    perturbation_norm: Tensor | None = None
    realized: Tensor | None = None


@dataclass(slots=True)
class Record:
    """What a step leaves behind. same_loss: both losses are of one function, so that they can be compared."""

    ascent: Ascent | None = None
    loss: Any = None
    perturbed_loss: Any = None
    same_loss: bool = True

    @property
    def dual_norm(self) -> Scalar:
        return math.nan if self.ascent is None else _dual_norm(self.ascent)

    def last_step(self, params: Sequence[Tensor]) -> LastStep:
        dtype = torch.float64 if any(p.dtype in (torch.float64, torch.complex128) for p in params) else torch.float32
        loss, perturbed = _tensor(self.loss, dtype), _tensor(self.perturbed_loss, dtype)
        sharpness = None if loss is None or perturbed is None or not self.same_loss else perturbed - loss
        if self.ascent is None:  # a step without an ascent has moved nothing
            none = None if loss is None else torch.zeros_like(loss)
            return LastStep(loss, perturbed, sharpness, radius=none, perturbation_norm=none)
        radius, length = _lengths(self.ascent)
        return LastStep(
            loss,
            perturbed,
            sharpness,
            dual_norm=_tensor(_dual_norm(self.ascent), dtype),
            grad_norm=_tensor(hypot([n.grad for n in self.ascent.norms]), dtype),
            radius=_tensor(radius, dtype),
            perturbation_norm=_tensor(length, dtype),
            realized=_tensor(retained(self.ascent), dtype),
        )


def mean_loss(losses: Sequence[Any]) -> Any:
    losses = [_loss(x) for x in losses]
    return None if any(x is None for x in losses) else sum(losses) / len(losses)


def retained(ascent: Ascent) -> Scalar:
    """<e', e> / ||e||^2 over all bf16 and fp16 weights; 1 where there are none."""
    square = _sum([square for _, square in ascent.retained])
    dot = _sum([dot for dot, _ in ascent.retained])
    if isinstance(square, Tensor):
        return torch.where(square > 0, dot / square, 1.0)
    return dot / square if square else 1.0


def _dual_norm(ascent: Ascent) -> Scalar:
    """Groups of p = 2 have one norm together, and add to the rise of those of p = inf."""
    euclidean = [n.dual for p, n in zip(ascent.orders, ascent.norms, strict=True) if p == 2]
    of_max_norm = [n.dual for p, n in zip(ascent.orders, ascent.norms, strict=True) if p != 2]
    return _sum([hypot(euclidean), *of_max_norm] if euclidean else of_max_norm)


def _lengths(ascent: Ascent) -> tuple[Scalar, Scalar]:
    """||T^-1 e||_p and ||e||_2."""
    parts = list(zip(ascent.orders, ascent.norms, ascent.factors, ascent.units, strict=True))
    radii: list[Any] = [hypot([f * (n.dual / unit) for p, n, f, unit in parts if p == 2])]
    radii += [abs(f) for p, _, f, _ in parts if p != 2]
    if not any(isinstance(r, Tensor) for r in radii):
        radius: Any = math.nan if any(math.isnan(r) for r in radii) else max(radii)
    else:
        device = next(r.device for r in radii if isinstance(r, Tensor))
        radius = torch.stack([torch.as_tensor(r, dtype=torch.float64).to(device) for r in radii]).max()
    return abs(radius), hypot([f * (n.step / unit if p == 2 else n.step) for p, n, f, unit in parts])


def _sum(values: Sequence[Scalar]) -> Scalar:
    tensors = [x for x in values if isinstance(x, Tensor)]
    return sum(x.to(tensors[0].device) if isinstance(x, Tensor) else x for x in values)


def _loss(x: Any) -> Any:
    """The loss without its graph; None for what is no number."""
    if isinstance(x, Tensor):
        return x.detach()
    return x if isinstance(x, numbers.Real) else None


def _tensor(x: Any, dtype: torch.dtype) -> Tensor | None:
    """0-d; what is a number becomes a tensor of `dtype`, and what the next step would write to becomes a copy."""
    if x is None:
        return None
    if not isinstance(x, Tensor):
        return torch.tensor(float(x), dtype=dtype)
    return x.reshape(()).clone() if x.numel() == 1 else x.mean()
