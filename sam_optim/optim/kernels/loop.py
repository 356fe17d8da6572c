"""The specification: one parameter at a time, in place, arithmetic in float32 (float64 for float64 weights).

Also what moves whatever the fast bodies refuse: sparse gradients, aliased storage, stochastic rounding.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sam_optim.optim.kernels import Bucket, Scalar

ROWS = 65536  # one long float32 accumulation is off by 1e-3 at 25 M entries; rows of this length are not


def dual_power(b: Bucket) -> Scalar:
    total: Any = 0.0
    for i, w in enumerate(b.w):
        x = _values(b.g[i])
        if x.numel():
            t = _scale(b, i, w)
            x = x if t is None else x * t
            power = x.double().square().sum() if b.p == 2 else x.abs().sum(dtype=torch.float64)
            total = total + (power if power.device.type != "cpu" else power.item())
    return total


def ascend_(b: Bucket, factor: Scalar) -> None:
    """saved <- w;  w <- w + factor T^2 g  or  w + factor T sign(g)."""
    for w, kept in zip(
        b.w, (b.workspace[i] for i in b.index), strict=True
    ):  # all copies first: two parameters may share storage
        kept.copy_(w)
        b.saved.append(kept)
    for i, w in enumerate(b.w):
        if b.g[i].is_sparse:
            ascend_sparse_(b, i, w, factor)
        elif b.noise is not None and w.dtype in (torch.bfloat16, torch.float16):
            w.copy_(stochastic_round(w.float() + step(b, i, b.saved[i], factor), w.dtype, b.noise))
        else:
            w.copy_(_wide(w) + step(b, i, b.saved[i], factor))


def restore_(b: Bucket) -> None:
    for w, kept in zip(b.w, b.saved, strict=False):
        w.copy_(kept)


def step(b: Bucket, i: int, w: Tensor, factor: Scalar) -> Tensor:
    """factor T^2 g or factor T sign(g) of parameter i at weights w, dense; 0 where the factor is 0, also for NaN."""
    g = _wide(b.g[i].to_dense() if b.g[i].is_sparse else b.g[i])
    t = _scale(b, i, w)
    direction = g if b.p == 2 else g.sgn()
    if t is not None:
        direction = direction * (t * t if b.p == 2 else t)
    if isinstance(factor, Tensor):
        return torch.where(factor == 0, 0.0, direction * factor.to(direction.dtype))
    return direction * factor


def stochastic_round(x: Tensor, dtype: torch.dtype, noise: Any) -> Tensor:
    """x in float32 to one of its two neighbours in `dtype`, with probabilities that make the mean x."""
    near = x.to(dtype)
    rest = x - near.float()
    far = torch.nextafter(near, torch.where(rest > 0, math.inf, -math.inf).to(dtype))
    gap = far.float() - near.float()
    take = noise.uniform_like(x) < torch.where(gap != 0, rest / gap, 0.0)
    return torch.where(take & (rest != 0) & far.isfinite(), far, near)


def ascend_sparse_(b: Bucket, i: int, w: Tensor, factor: Scalar) -> None:
    """As `ascend_` on the rows that a sparse gradient names; the others do not move and are not made dense."""
    g = b.g[i].coalesce()
    index, values = g.indices(), _wide(g.values())
    t = _scale(b, i, w)
    direction = values if b.p == 2 else values.sgn()
    if t is not None:
        direction = direction * (t * t if b.p == 2 else t)
    factor_ = factor.to(values.dtype) if isinstance(factor, Tensor) else factor
    rows = tuple(index)
    w[rows] = (_wide(w[rows]) + direction * factor_).to(w.dtype)


def _values(g: Tensor) -> Tensor:
    return _wide(g.coalesce().values() if g.is_sparse else g)


def _scale(b: Bucket, i: int, w: Tensor) -> Tensor | None:
    """T at w, in the arithmetic's precision; on the rows of the gradient where that is sparse. None is 1."""
    if b.g[i].is_sparse:
        rows = tuple(b.g[i].coalesce().indices())
        if b.eta is not None:
            return _wide(w.detach()[rows]).abs() + b.eta
        return None if b.t is None else _wide(b.t[i].expand_as(w)[rows])
    if b.eta is not None:
        return _wide(w.detach()).abs() + b.eta
    return None if b.t is None else _wide(b.t[i])


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
