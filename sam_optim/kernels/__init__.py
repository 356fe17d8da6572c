"""The weight moves of a step: one `Bucket`, several bodies, and the only `if` on device and backend.

    dual_power(b)        sum |T g|^q, q = 2 (p = 2) or 1 (p = inf): a float on the CPU, a 0-d tensor on a device
    ascend_(b, factor)   w <- w + factor T^2 g  (p = 2)   or   w + factor T sign(g)  (p = inf)
    restore_(b)          w <- the bits that it had, in the storage that it had
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sam_optim.kernels import foreach, reference, swap

Scalar = float | Tensor
LOW_PRECISION = (torch.bfloat16, torch.float16)


@dataclass(slots=True, eq=False)
class Bucket:
    """Parameters that move alike, of one dtype on one device.

    params: as the user knows them. w, g: weights and ascent gradients (real views of complex ones). buffer: persistent storage like w. saved: what holds the clean weights while w
    is perturbed; shorter than w when a move was interrupted. T is |w| + eta where eta is given, else t (broadcastable
    tensors), else 1. rho: the radius, negative where the loss is maximised. noise: draws for stochastic rounding.
    """

    p: float
    rho: Scalar
    eta: float | None
    body: ModuleType
    noise: Any = None
    params: list[Tensor] = field(default_factory=list)
    w: list[Tensor] = field(default_factory=list)
    g: list[Tensor] = field(default_factory=list)
    buffer: list[Tensor] = field(default_factory=list)
    t: list[Tensor] | None = None
    saved: list[Tensor] = field(default_factory=list)


class Ascent(NamedTuple):
    """norm: ||T g||_q, dual to p, over all buckets. length: ||T^-1 e||_p. moved: False where norm is 0 or not finite."""

    norm: Scalar
    length: Scalar
    moved: bool | Tensor
    factors: list[Scalar]


def choose(w: Tensor, g: Tensor, foreach_flag: bool | None, stochastic: bool) -> ModuleType:
    """The body that moves this parameter: the fastest that is right for it."""
    if g.is_sparse:
        if foreach_flag:
            raise ValueError("foreach=True cannot move a parameter with sparse gradients: use foreach=None or False")
        return reference
    if stochastic and w.dtype in LOW_PRECISION:
        return reference
    if foreach_flag or (foreach_flag is None and w.device.type != "cpu"):
        return foreach
    return swap if swap.is_safe(w, g) else reference


def ascend_(buckets: list[Bucket]) -> Ascent:
    """Moves all buckets to the steepest ascent in their ball; one norm runs over all of them.

    Groups of p = 2 and of p = inf, where both occur, have a norm each.
    """
    powers = [b.body.dual_power(b) for b in buckets]
    sums = {p: _sum([x for b, x in zip(buckets, powers, strict=True) if b.p == p]) for p in {b.p for b in buckets}}
    norms = {p: power**0.5 if p == 2 else power for p, power in sums.items()}
    total = _sum(list(norms.values()))
    if isinstance(total, Tensor):
        moved: bool | Tensor = (total > 0) & (total < math.inf)
    else:
        moved = 0 < total < math.inf
    if moved is False:
        return Ascent(total, 0.0, False, [0.0] * len(buckets))
    factors, square, largest = [], 0.0, 0.0
    for b, power in zip(buckets, powers, strict=True):
        factor, radius = b.rho, abs(b.rho)
        if b.p == 2:
            norm, square_norm = _to(norms[2], b), _to(sums[2], b)
            factor = b.rho / norm
            square = _sum([square, radius**2 * power / square_norm])
        else:
            largest = radius if isinstance(largest, float) and largest == 0 else _larger(largest, radius)
        if isinstance(moved, Tensor):
            factor = torch.where(_to(moved, b), torch.as_tensor(factor, device=b.w[0].device), 0.0)
        elif isinstance(factor, Tensor):
            factor = factor.item()
        b.body.ascend_(b, factor)
        factors.append(factor)
    length = _larger(square**0.5, largest)
    return Ascent(total, torch.where(moved, length, 0.0) if isinstance(moved, Tensor) else length, moved, factors)


def restore_(buckets: list[Bucket]) -> None:
    """Brings back the clean weights; may be called again after an interrupt."""
    for b in reversed(buckets):
        b.body.restore_(b)


def realized(buckets: list[Bucket], factors: list[Scalar]) -> Scalar | None:
    """<e', e> / ||e||^2 over bf16 and fp16 weights, e the perturbation asked for and e' the one that their rounding left.

    None where there are none: float32 keeps it to better than 1e-3. Needs the ascent gradients.
    """
    dots, squares = [], []
    for b, factor in zip(buckets, factors, strict=True):
        if b.w[0].dtype in LOW_PRECISION:
            for i, (w, clean) in enumerate(zip(b.w, b.saved, strict=False)):
                e = reference.step(b, i, clean, factor)
                dots.append(((w.detach().float() - clean.float()) * e).sum(dtype=torch.float64))
                squares.append(e.square().sum(dtype=torch.float64))
    return _sum(dots) / _sum(squares) if dots else None


def _sum(values: list[Scalar]) -> Scalar:
    total = values[0]
    for x in values[1:]:
        total = total + (x.to(total.device) if isinstance(x, Tensor) and isinstance(total, Tensor) else x)
    return total


def _to(x: Any, b: Bucket) -> Any:
    return x.to(b.w[0].device, non_blocking=True) if isinstance(x, Tensor) else x


def _larger(x: Scalar, y: Scalar) -> Scalar:
    if isinstance(x, Tensor) or isinstance(y, Tensor):
        x, y = torch.as_tensor(x), torch.as_tensor(y)
        device = x.device if x.device.type != "cpu" else y.device
        return torch.maximum(x.to(device), y.to(device))
    return max(x, y)
