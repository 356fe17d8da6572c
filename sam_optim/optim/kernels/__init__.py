"""The moves of the weights: w -> w + e and back. Kernels move tensors; they know no module, optimizer or group.

This is the only place that chooses a body: `loop` is the specification, `foreach` the fast one on every device,
`triton` the fused one on CUDA. Each has

    measure(bucket)            the norms of the bucket's ascent gradient
    ascend_(bucket, factor)    w <- w + factor T^2 g / unit  (p = 2)   or   w + factor T sign(g)  (p = inf)
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from types import ModuleType
from typing import Any

import torch
from torch import Tensor

from sam_optim.optim.kernels import dtensor, foreach, loop
from sam_optim.optim.kernels.bucket import LOW_PRECISION, Ascent, Backups, Bucket, Scalar


def ascend_(buckets: list[Bucket], backups: Backups, *, fused: ModuleType | None = None) -> Ascent:
    """Moves all buckets to the steepest ascent in their balls: one norm over all of them, and over all ranks.

    Where p is 2 in some and inf in others, the former have one norm, and the latter need none. A gradient of 0 moves
    nothing; one with an inf or NaN makes all weights NaN, so that the gradient there is not finite either.

    backups: where the clean weights go. fused: the body that moves all of them in one go, if it can.
    """
    buckets = [b for b in buckets if b.device.type != "meta"]  # without data there is nothing to move
    if fused is not None and fused.fits(buckets):
        return fused.ascend_(buckets, backups)
    backups.save(buckets)
    norms, duals, is_spread = [], [], False
    for b in buckets:
        norms.append(b.body.measure(b))
        is_spread = is_spread or bool(b.groups)
    if is_spread:
        norms = dtensor.over_ranks(buckets, norms)
    for b, n in zip(buckets, norms, strict=True):
        if b.p == 2:
            duals.append(n.dual if isinstance(b.rho, float | int) else _counted(n.dual, b.rho))
    together = duals[0] if len(duals) == 1 else hypot(duals)
    ascent = Ascent([], norms, [], [], [])
    retained = []
    is_shared = len(buckets) == 1 or all([b.p == 2 for b in buckets])  # then the one norm tells all of them
    for b, n in zip(buckets, norms, strict=True):
        factor = _factor(b, together if b.p == 2 else n.dual)
        for other in () if is_shared else norms:
            factor = factor + 0.0 * (other.dual.to(b.device) if isinstance(other.dual, Tensor) else other.dual)
        retained.append(b.body.ascend_(b, factor))
        ascent.orders.append(b.p)
        ascent.factors.append(factor)
        ascent.units.append(b.unit)
    if is_spread and any([b.dtype in LOW_PRECISION for b in buckets]):  # also of ranks that have nothing to round
        parts = [x or (0.0, 0.0) if b.dtype in LOW_PRECISION else () for b, x in zip(buckets, retained, strict=True)]
        retained = dtensor.summed(buckets, parts)
    ascent.retained.extend([x for x in retained if x])
    return ascent


def choose(g: Tensor | None, device: torch.device, dtype: torch.dtype, foreach_flag: bool | None) -> ModuleType:
    """The body for weights with such gradients: lists of sparse tensors have no operations, and those of bf16 and fp16
    would take several float32 copies of all weights, of which a CPU needs none."""
    if g is not None and g.is_sparse:
        return loop
    return foreach if device.type != "cpu" or (foreach_flag and dtype not in LOW_PRECISION) else loop


def fused_body(params: Sequence[Tensor], fused: bool | None, foreach_flag: bool | None) -> ModuleType | None:
    """Triton's, for those who ask for it: it takes a second to import, and need not be there."""
    if not fused:
        return None
    if foreach_flag:
        raise ValueError("fused=True and foreach=True are two ways of moving the weights: pass one of them")
    if not may_be_fused(params):
        devices = sorted({p.device.type for p in params})
        raise ValueError(
            f"fused=True needs parameters on CUDA, got {devices}: move the model there first, or pass None"
        )
    try:
        from sam_optim.optim.kernels import triton
    except ImportError as error:
        raise ImportError(
            f"fused=True moves weights with Triton, which cannot be imported ({error}): install triton, or pass "
            "fused=None"
        ) from error
    return triton


def may_be_fused(params: Sequence[Tensor]) -> bool:
    """Whether Triton could move any of these: they are on CUDA, or Triton runs in its interpreter."""
    return any(p.is_cuda for p in params) or (bool(params) and os.environ.get("TRITON_INTERPRET") == "1")


def hypot(values: Sequence[Scalar]) -> Scalar:
    """The root of the sum of squares: a number if all are, else a 0-d float64 tensor on the device of the first one."""
    if len(values) == 1:
        return abs(values[0])  # type: ignore[return-value]
    if not any([isinstance(x, Tensor) for x in values]):
        return math.hypot(*values)  # type: ignore[arg-type]
    device = next(x.device for x in values if isinstance(x, Tensor))
    return torch.linalg.vector_norm(torch.stack([_scalar(x, device) for x in values]))


def all_finite(grads: Sequence[Tensor]) -> bool | Tensor:
    """Whether every entry is finite: a bool on the CPU, a 0-d tensor on a device, which is not read."""
    if set(map(type, grads)) == {Tensor} and grads[0].is_cpu:
        try:
            if math.isfinite(loop.norm_of(grads).item()):
                return True
        except RuntimeError:
            pass  # sparse, or of several devices
    by_kind: dict[Any, list[Tensor]] = {}
    for g in map(dtensor.local, grads):
        g = g.coalesce().values() if g.is_sparse else g
        g = torch.view_as_real(g) if g.is_complex() else g
        if g.numel() and not g.is_meta:
            by_kind.setdefault((g.device, g.dtype), []).append(g)
    answers = [_all_finite(same) for same in by_kind.values()]
    on_device = [x for x in answers if isinstance(x, Tensor)]
    if not on_device:
        return all(answers)
    return torch.stack([_scalar(x, on_device[0].device) for x in answers]).all()


def _all_finite(grads: Sequence[Tensor]) -> bool | Tensor:
    if grads[0].device.type != "cpu":  # a sum of magnitudes overflows only beyond all gradients that make sense
        return torch.stack(torch._foreach_norm(list(grads), 1, dtype=torch.float32)).sum().isfinite()
    return all([bool(g.isfinite().all()) for g in grads])


_LARGEST = 1e30  # of a factor that float32 can hold: only that of a bucket of zeros beside tiny gradients is larger


def _factor(b: Bucket, norm: Scalar) -> Scalar:
    """What multiplies the direction; 0 for a gradient of 0, NaN for one that is not finite."""
    if not isinstance(norm, Tensor):
        rho = float(b.rho)
        if norm == 0 or not math.isfinite(norm):
            return 0.0 if norm == 0 else math.nan
        return min(rho / (norm / float(b.unit)), _LARGEST) if b.p == 2 else rho
    norm = norm.to(b.device, non_blocking=True)
    factor = _scalar(b.rho, b.device)
    if b.p == 2:
        factor = (factor / (norm / b.unit)).clamp(max=_LARGEST)
    return torch.add(factor, norm, alpha=0).masked_fill(norm == 0, 0.0)  # + 0 norm: NaN if it is not finite


def _counted(dual: Scalar, rho: Scalar) -> Scalar:
    """A bucket whose radius is 0 on the device stays out of the norm."""
    return dual.masked_fill(rho == 0, 0.0) if isinstance(rho, Tensor) and isinstance(dual, Tensor) else dual


def _scalar(x: Scalar | bool, device: torch.device) -> Tensor:
    """On the device; a number by a kernel that fills, not by a copy, which would wait."""
    if isinstance(x, Tensor):
        return x.to(device=device, non_blocking=True).reshape(())
    return torch.full((), x, dtype=torch.bool if isinstance(x, bool) else torch.float64, device=device)
