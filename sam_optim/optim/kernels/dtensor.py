"""Parameters sharded over ranks: their local entries, and sums over all ranks.

A rank that used the norm of its own shard would move by a radius that is too large by up to the root of their number.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sam_optim.core import geometry
from sam_optim.optim.kernels.bucket import Bucket, Groups, Norms, Scalar, wide_dtype

PIECE = 2**15  # entries of a float32 sum
SAFE = 1e-24, 1e36  # no float32 product that counts has vanished or overflowed


def is_dtensor(x: Tensor) -> bool:
    """Whether x is a DTensor; does not import DTensor for it."""
    if type(x) in (torch.nn.Parameter, Tensor):
        return False
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and isinstance(x, module.DTensor)


def local(x: Tensor) -> Tensor:
    """The entries on this rank, in the same storage."""
    if not is_dtensor(x):
        return x
    shard = x._local_tensor.detach()  # type: ignore[attr-defined]  # to_local() makes a view and asks for its type, 20 us for each parameter
    return shard.wait() if hasattr(shard, "wait") else shard  # a gradient may still be on its way


def local_gradient(p: Tensor) -> Tensor | None:
    """The gradient of the entries on this rank."""
    grad = p.grad
    if grad is None or not is_dtensor(p):
        return grad
    if grad.placements != p.placements:  # type: ignore[attr-defined]
        grad = grad.redistribute(p.device_mesh, p.placements)  # type: ignore[attr-defined]
    return local(grad)


def groups_of(p: Tensor) -> Groups | None:
    """The process groups over which the entries of a DTensor are spread, () if it is whole on each rank; None for what
    is no DTensor."""
    if not is_dtensor(p):
        return None
    mesh = p.device_mesh  # type: ignore[attr-defined]
    spread = [d for d, placement in enumerate(p.placements) if not placement.is_replicate()]  # type: ignore[attr-defined]
    return tuple(mesh.get_group(d) for d in spread if mesh.size(d) > 1)


def own_group(optimizer: Any) -> Groups:
    """The process group of an optimizer that spreads its state over ranks: ZeroRedundancyOptimizer."""
    group = getattr(optimizer, "process_group", None)
    return (group,) if group is not None and torch.distributed.is_initialized() else ()


def over_ranks(buckets: Sequence[Bucket], norms: Sequence[Norms]) -> list[Norms]:
    """The norms of buckets that are spread over ranks, over all of their entries."""
    norms = list(norms)
    sums = summed(buckets, [_powers(b, n) for b, n in zip(buckets, norms, strict=True)])
    for i, (b, (dual, grad, step)) in enumerate(zip(buckets, sums, strict=True)):
        if b.groups:
            norms[i] = Norms(dual**0.5 if b.p == 2 else dual, grad**0.5, step**0.5)
    return norms


def summed(buckets: Sequence[Bucket], values: Sequence[tuple[Scalar, ...]]) -> list[tuple[Scalar, ...]]:
    """Sums over ranks for the buckets that are spread over them: one collective for each mesh."""
    values = list(values)
    for groups in dict.fromkeys(b.groups for b in buckets if b.groups):
        spread = [i for i, b in enumerate(buckets) if b.groups == groups and values[i]]
        if not spread:
            continue
        device = buckets[spread[0]].device
        flat = [torch.as_tensor(x, dtype=torch.float64, device=device) for i in spread for x in values[i]]
        total = torch.stack(flat)
        for group in groups:
            torch.distributed.all_reduce(total, group=group)
        sums = iter(total.tolist() if device.type == "cpu" else total.unbind())
        for i in spread:
            values[i] = tuple(next(sums) for _ in values[i])
    return values


def _powers(b: Bucket, norms: Norms) -> tuple[Scalar, Scalar, Scalar]:
    """What adds up over ranks."""
    return norms.dual**2 if b.p == 2 else norms.dual, norms.grad**2, norms.step**2


def dot(params: Sequence[Tensor], xs: Sequence[Tensor], ys: Sequence[Tensor]) -> Tensor:
    """<x, y> over all entries of the parameters, on all ranks: 0-d float64. xs, ys: the entries on this rank."""
    device = xs[0].device
    sums: dict[Groups, list[Tensor]] = {}
    for p, x, y in zip(params, xs, ys, strict=True):
        sums.setdefault(groups_of(p) or (), []).append(_dot(x, y).to(device))
    totals = []
    for groups, values in sums.items():
        total = torch.stack(values).sum()
        for group in groups:
            torch.distributed.all_reduce(total, group=group)
        totals.append(total)
    return torch.stack(totals).sum()


def _dot(x: Tensor, y: Tensor) -> Tensor:
    x, y = (torch.view_as_real(v).reshape(-1) if v.is_complex() else v.reshape(-1) for v in (x, y))
    if x.is_cpu:  # in short float32 sums, unless products may have vanished
        wide = wide_dtype(x.dtype, y.dtype)
        parts = zip(x.split(PIECE), y.split(PIECE), strict=True)
        product = torch.stack([torch.dot(a.to(wide), b.to(wide)) for a, b in parts]).sum(dtype=torch.float64)
        if SAFE[0] < abs(product.item()) < SAFE[1]:
            return product
    return torch.linalg.vecdot(x.double(), y.double())


def any_over(flag: bool | Tensor, groups: Groups, device: torch.device) -> bool | Tensor:
    """Whether the flag is set on any rank of the groups: all of them then do the same."""
    if not groups:
        return flag
    total = torch.as_tensor(flag, device=device).to(torch.float32).reshape(1)
    for group in groups:
        torch.distributed.all_reduce(total, op=torch.distributed.ReduceOp.MAX, group=group)
    return total[0] > 0 if isinstance(flag, Tensor) and flag.device.type != "cpu" else bool(total)


def whole(shard: Tensor, like: Tensor) -> Tensor:
    """The entries of this rank as the DTensor that `like` is."""
    if not is_dtensor(like):
        return shard
    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return type(like).from_local(  # type: ignore[attr-defined]
        shard, mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def scale(p: Tensor, adaptive: str, eta: float) -> Tensor:
    """T of one parameter in float32 or float64, of its entries on this rank; as `geometry.scale`."""
    if getattr(p, "_fsdp_flattened", False) or type(p).__name__ == "FlatParameter":
        raise ValueError(
            f"adaptive={adaptive!r} needs the shapes that FSDP1 has flattened away: use FSDP2 (fully_shard)"
        )
    if not is_dtensor(p):
        return geometry.scale(p, adaptive, eta)
    if adaptive == "filter" and p.ndim < 2:
        return geometry.scale(local(p), adaptive, eta)
    dims = tuple(range(1, p.ndim) if adaptive == "filter" else range(p.ndim))
    squares = local(p.detach()).double().square().sum(dim=dims, keepdim=True)
    for d, placement in enumerate(p.placements):  # type: ignore[attr-defined]
        if not placement.is_replicate() and p.device_mesh.size(d) > 1 and placement.dim in dims:  # type: ignore[attr-defined]
            torch.distributed.all_reduce(squares, group=p.device_mesh.get_group(d))  # type: ignore[attr-defined]
    return squares.sqrt().to(torch.float64 if p.dtype == torch.float64 else torch.float32) + eta
