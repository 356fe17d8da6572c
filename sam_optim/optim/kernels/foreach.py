"""Whole lists at once with torch._foreach_*, in place; for devices, and the shards of DTensor. No host sync.

As `reference`, in few launches and persistent storage: nothing of the size of a weight is allocated after the first
step, but where weights and gradients differ in dtype or layout, or are float64.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sam_optim.optim.kernels import Bucket, Scalar


def dual_power(b: Bucket) -> Scalar:
    norm = _dual_norm(b)
    return 0.0 if norm is None else norm.square() if b.p == 2 else norm


def ascend_alone_(b: Bucket) -> tuple[Tensor, Tensor, Tensor] | None:
    """Norm, factor, and whether all stays, for the only bucket that there is: fewer launches than for several."""
    norm = _dual_norm(b)
    if norm is None:
        return None
    inverse = norm.reciprocal().nan_to_num_(nan=0.0, posinf=0.0, neginf=0.0)
    stays = inverse == 0
    if b.p == 2:
        wide = torch.float64 if b.dtype == torch.float64 else torch.float32
        factor = torch.mul(inverse, b.rho, out=torch.empty((), dtype=wide, device=norm.device))
    else:
        factor = inverse.fill_(b.rho).masked_fill_(stays, 0.0)
    ascend_(b, factor, stays)
    return norm, factor, stays


def ascend_(b: Bucket, factor: Scalar, stays: Tensor | None = None) -> None:
    if not b.w:
        return
    kept = [b.workspace[i] for i in b.index]
    torch._foreach_copy_(kept, b.w)
    b.saved = kept
    pairs = [(w, d) for w, d in zip(b.w, _direction(b), strict=True) if w.numel()]
    weights, direction = [w for w, _ in pairs], [d for _, d in pairs]
    if not pairs:
        return
    if isinstance(factor, Tensor) and _fusible(weights, direction):
        # w + lr d as one kernel that does nothing where found_inf is set: a gradient of NaN must not reach w
        torch._fused_sgd_(
            weights,
            direction,
            [],
            weight_decay=0.0,
            momentum=0.0,
            lr=factor.float(),
            dampening=0.0,
            nesterov=False,
            maximize=True,
            is_first_step=False,
            found_inf=(factor == 0 if stays is None else stays).float(),
        )
        torch.autograd.graph.increment_version(weights)  # which fused kernels do not, and a backward at w must fail now
        return
    if isinstance(factor, Tensor):
        moves = [torch.where(factor == 0, 0.0, _wide(x) * factor.to(_wide(x).dtype)) for x in direction]
    else:
        moves = list(torch._foreach_mul([_wide(x) for x in direction], factor))
    for w, e in zip(weights, moves, strict=True):
        w.copy_(w.to(e.dtype) + e)


def restore_(b: Bucket) -> None:
    if b.saved:
        torch._foreach_copy_(b.w, b.saved)


def _dual_norm(b: Bucket) -> Tensor | None:
    """||T g||_q in float64; None where there are no entries."""
    x = [v for v in _scaled_gradients(b) if v.numel()]
    if not x:
        return None
    # one long float32 sum on the CPU is off by up to 1e-3; a device sums in chunks
    wide = torch.float64 if x[0].device.type == "cpu" or x[0].dtype == torch.float64 else torch.float32
    order = 2 if b.p == 2 else 1
    norms = torch.stack(torch._foreach_norm(x, order, dtype=wide))
    return torch.linalg.vector_norm(norms, order, dtype=torch.float64)


def _scaled_gradients(b: Bucket) -> list[Tensor]:
    """T g; in persistent storage where T is not 1."""
    t = _scales(b)
    if t is None:
        return b.g
    x = _storage(b, "direction")
    torch._foreach_copy_(x, b.g)
    torch._foreach_mul_(x, t)
    return x


def _direction(b: Bucket) -> list[Tensor]:
    """T^2 g or T sign(g), of what `dual_power` left."""
    if b.p == 2 and b.eta is None and b.t is None:
        return b.g
    x = _storage(b, "direction")
    if b.p != 2:
        torch._foreach_copy_(x, b.g)
        torch._foreach_sign_(x)
    if b.eta is not None:
        torch._foreach_mul_(x, _storage(b, "scale"))
    elif b.t is not None:
        torch._foreach_mul_(x, [_wide(t) for t in b.t])
    return x


def _scales(b: Bucket) -> list[Tensor] | None:
    if b.eta is None:
        return None if b.t is None else [_wide(t) for t in b.t]
    t = _storage(b, "scale")
    if t:
        torch._foreach_copy_(t, b.w)
        torch._foreach_abs_(t)
        torch._foreach_add_(t, b.eta)
    return t


def _storage(b: Bucket, name: str) -> list[Tensor]:
    """One tensor for each parameter, of its layout, in float32 or float64; the same one for the length of a step."""
    found = []
    for i, w in zip(b.index, b.w, strict=True):
        layout = w.shape, w.stride(), w.dtype, w.device  # not that of x: what has gaps has storage without
        known = b.scratch.get((name, i))
        if known is None or known[0] != layout:
            dtype = torch.float64 if w.dtype == torch.float64 else torch.float32
            known = b.scratch[name, i] = layout, torch.empty_like(w, dtype=dtype, requires_grad=False)
        found.append(known[1])
    return found


def _fusible(weights: list[Tensor], direction: list[Tensor]) -> bool:
    """float32 is the type of a fused step's lr, too coarse for float64; on the CPU it may round bf16 in between."""
    if type(weights[0]) not in (Tensor, torch.nn.Parameter) or weights[0].is_meta:
        _teach_meta()
    dtypes = (torch.float32,) if weights[0].device.type == "cpu" else (torch.float32, torch.bfloat16, torch.float16)
    return all(
        w.dtype == d.dtype and w.dtype in dtypes and w.stride() == d.stride()
        for w, d in zip(weights, direction, strict=True)
    ) and all(w.is_contiguous() or torch.ops.aten.is_non_overlapping_and_dense(w) for w in weights)


@functools.cache
def _teach_meta() -> Any:
    """Fake and meta tensors do not know this operation, of which there is nothing to know: it returns nothing."""
    if torch._C._dispatch_has_kernel_for_dispatch_key("aten::_fused_sgd_.tensor_lr", "Meta"):
        return None
    library = torch.library.Library("aten", "IMPL")
    library.impl("_fused_sgd_.tensor_lr", lambda *args, **kwargs: None, "Meta")
    return library  # which holds its registrations as long as it is held


def _wide(x: Tensor) -> Tensor:
    return x if x.dtype == torch.float64 else x.float()
