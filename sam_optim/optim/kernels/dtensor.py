"""Parameters whose entries are spread over several ranks: what is here, and sums over all of them.

A rank that used the norm of its own shard would move by a radius that is too large by up to the root of their number.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

if TYPE_CHECKING:
    from sam_optim.optim.kernels import Bucket, Scalar

Groups = tuple[Any, ...]  # process groups, one after the other


def is_dtensor(x: Tensor) -> bool:
    """Without importing DTensor where nobody has."""
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


def number(x: Tensor) -> float:
    """The value of a 0-d tensor on the CPU, without an operation: there is nothing to wait for."""
    return float(x.numpy())


def own_group(optimizer: Any) -> Groups:
    """The process group of an optimizer that spreads its state over ranks: ZeroRedundancyOptimizer."""
    group = getattr(optimizer, "process_group", None)
    return (group,) if group is not None and torch.distributed.is_initialized() else ()


def sum_over(values: Sequence[float | Tensor], groups: Groups, device: torch.device) -> list[Tensor]:
    """Each value summed over the ranks of the groups, in one collective for each group: 0-d float64 tensors."""
    total = torch.stack([torch.as_tensor(x, dtype=torch.float64, device=device) for x in values])
    for group in groups:
        torch.distributed.all_reduce(total, group=group)
    return list(total.unbind())


def over_ranks(buckets: list[Bucket], values: list[Scalar]) -> list[Scalar]:
    """The values of buckets that are spread over ranks, summed over them: one collective for each process group."""
    values = list(values)
    for groups in dict.fromkeys(b.groups for b in buckets if b.groups):
        spread = [i for i, b in enumerate(buckets) if b.groups == groups]
        device = buckets[spread[0]].device
        for i, x in zip(spread, sum_over([values[i] for i in spread], groups, device), strict=True):
            values[i] = number(x) if device.type == "cpu" else x
    return values


def total(values: list[Scalar]) -> Scalar:
    """On the device of the first tensor among them, without a host sync."""
    device = next((x.device for x in values if isinstance(x, Tensor)), None)
    return sum(x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in values)


def any_over(flag: bool | Tensor, groups: Groups, device: torch.device) -> bool | Tensor:
    """Whether the flag is set on any rank of the groups: all of them then do the same."""
    if not groups:
        return flag
    found = torch.as_tensor(flag, device=device).to(torch.float32).reshape(1)
    for group in groups:
        torch.distributed.all_reduce(found, op=torch.distributed.ReduceOp.MAX, group=group)
    return found[0] > 0 if isinstance(flag, Tensor) and flag.device.type != "cpu" else bool(found)


def whole(shard: Tensor, like: Tensor) -> Tensor:
    """The entries of this rank as the DTensor that `like` is."""
    if not is_dtensor(like):
        return shard
    mesh, placements = like.device_mesh, like.placements  # type: ignore[attr-defined]
    return type(like).from_local(  # type: ignore[attr-defined]
        shard, mesh, placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def slice_norms(p: Tensor, dims: Sequence[int]) -> Tensor:
    """||.||_2 of a DTensor over `dims`, which keep size 1, in float64: of the slices that this rank has."""
    squares = local(p.detach()).double().square().sum(dim=tuple(dims), keepdim=True)
    mesh = p.device_mesh  # type: ignore[attr-defined]
    for d, placement in enumerate(p.placements):  # type: ignore[attr-defined]
        if not placement.is_replicate() and mesh.size(d) > 1 and placement.dim in dims:
            torch.distributed.all_reduce(squares, group=mesh.get_group(d))
    return squares.sqrt()
