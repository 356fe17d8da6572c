"""The weight moves of a step: one `Bucket`, several bodies, and the only `if` on device and backend.

dual_power(b)        sum |T g|^q, q = 2 (p = 2) or 1 (p = inf): a float on the CPU, a 0-d tensor on a device
ascend_(b, factor)   w <- w + factor T^2 g  (p = 2)   or   w + factor T sign(g)  (p = inf)
restore_(b)          w <- the bits that it had, in the storage that it had
"""

from __future__ import annotations

import functools
import math
import operator
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

from sam_optim.optim.kernels import dtensor as shards
from sam_optim.optim.kernels import foreach, swap, widened
from sam_optim.optim.kernels import loop as reference
from sam_optim.optim.kernels.checks import LOW_PRECISION, finite, realized
from sam_optim.optim.kernels.fused import fused_body
from sam_optim.optim.kernels.tables import is_plain

Scalar = float | Tensor

__all__ = ["Ascent", "Bucket", "Scalar", "Store", "ascend_", "finite", "realized", "restore_", "widening"]


@dataclass(slots=True, eq=False)
class Bucket:
    """Parameters that move alike, of one dtype on one device.

    params: as the user knows them. w, g: weights and ascent gradients (real views of complex ones). saved: what holds
    the clean weights while w is perturbed; shorter than w when a move was interrupted. T is |w| + eta where eta is
    given, else t (broadcastable tensors), else 1. rho: the radius, negative where the loss is maximised. noise: draws
    for stochastic rounding. workspace, index: persistent storage, and the place of each parameter in it. shared: moved
    in place, so that whoever looks into the same storage sees the perturbed weights. choice: one object as long as
    nothing changes but values. realized: <e', e> and <e, e> in parts, (2, n), where the move has found them itself.
    """

    p: float
    rho: Scalar
    eta: float | None
    body: ModuleType
    workspace: Any
    device: torch.device
    dtype: torch.dtype
    noise: Any = None
    groups: shards.Groups = ()
    scratch: dict[Any, Any] = field(default_factory=dict)
    params: list[Tensor] = field(default_factory=list)
    w: list[Tensor] = field(default_factory=list)
    g: list[Tensor] = field(default_factory=list)
    index: list[int] = field(default_factory=list)
    t: list[Tensor] | None = None
    shared: list[bool] = field(default_factory=list)
    saved: list[Tensor] = field(default_factory=list)
    choice: Any = None
    realized: Tensor | None = None


@dataclass(slots=True, eq=False)
class _Choice:
    """What moves which parameters of a group: their indices, and their places in the workspace."""

    body: ModuleType
    workspace: Any
    device: torch.device
    dtype: torch.dtype
    groups: shards.Groups
    members: list[int] = field(default_factory=list)
    places: list[int] = field(default_factory=list)


class Store:
    """The persistent storage of one parameter group, and the choice of the body that moves each of its parameters.

    The choice is made anew only when a parameter or gradient changes its type, layout or presence.
    """

    def __init__(
        self,
        params: list[Tensor],
        foreach_flag: bool | None,
        noise: Any,
        groups_of: Callable[[Tensor], shards.Groups | None] = shards.groups_of,
        *,
        in_float32: bool = False,
        fused: bool | None = None,
    ):
        self.listed = list(params)
        self.params = params = list(dict.fromkeys(params))  # one listed twice moves once
        self._foreach = foreach_flag
        self._fused = fused_body() if fused else None
        self._noise = noise
        self._in_float32 = in_float32
        self._groups = [groups_of(p) for p in params]  # None: whole, and in storage of its own
        self._has_dtensor = any(shards.is_dtensor(p) for p in params)
        self._inplace: dict[int, Tensor] = {}
        self._scratch: dict[Any, Any] = {}
        self._chosen_for: Any = None
        self._plan: list[_Choice] = []
        may_borrow = not (foreach_flag or fused)
        fitting = [i for i, p in enumerate(params) if may_borrow and self._groups[i] is None and swap.fits(p)]
        self._place: dict[int, tuple[swap.Workspace, int]] = {}
        for dtype in {params[i].dtype for i in fitting}:
            members = [i for i in fitting if params[i].dtype == dtype]
            workspace = swap.Workspace([params[i].detach() for i in members])
            self._place |= {i: (workspace, k) for k, i in enumerate(members)}

    def matches(self, params: list[Tensor]) -> bool:
        return len(params) == len(self.listed) and all(map(operator.is_, params, self.listed))

    def buckets(self, p: float, rho: Scalar, eta: float | None, t: Callable[[Tensor], Tensor] | None) -> list[Bucket]:
        """The parameters that have a gradient now, by the body that moves them. `t` makes T of one parameter."""
        params = self.params
        if self._has_dtensor:
            weights, grads = [shards.local(w) for w in params], [shards.local_gradient(w) for w in params]
        else:
            weights, grads = params, [w.grad for w in params]
        kinds = _kinds(weights, grads)
        if self._chosen_for != kinds:
            self._plan, self._chosen_for = self._choose(weights, grads), kinds
        found = []
        for c in self._plan:
            b = Bucket(p, rho, eta, c.body, c.workspace, c.device, c.dtype, self._noise, c.groups, self._scratch)
            b.choice = c
            b.params, b.index = [params[i] for i in c.members], c.places
            b.w, b.g = [weights[i] for i in c.members], [grads[i] for i in c.members]  # type: ignore[misc]
            b.shared = c.workspace.shared() if isinstance(c.workspace, swap.Selection) else [True] * len(c.members)
            if t is not None:
                b.t = [t(w).unsqueeze(-1) if w.is_complex() else t(w) for w in b.params]
            if b.w and b.w[0].is_complex():
                b.w = [torch.view_as_real(w.detach()) for w in b.params]
                b.g = [torch.view_as_real(g) for g in b.g]
            found.append(b)
        return found

    def _choose(self, weights: list[Tensor], grads: list[Any]) -> list[_Choice]:
        found: dict[Any, _Choice] = {}
        key: tuple[Any, ...]
        workspace: Any
        for i, (w, g, groups) in enumerate(zip(weights, grads, self._groups, strict=True)):
            if groups:  # also with no gradient here: all ranks must add up the same sums
                body = reference if self._foreach is False else foreach
                key, workspace, place = (w.device, w.dtype, groups), self._inplace, i
            elif g is None or g.is_meta:
                continue
            elif i in self._place and _same_layout(w, g, self._place[i]):
                workspace, place = self._place[i]
                key, body = (id(workspace),), swap
            else:
                _check_writable(w)
                body, workspace, place = self._inplace_body(w, g), self._inplace, i
                key = (w.device, w.dtype, body)
            choice = found.setdefault(key, _Choice(body, workspace, w.device, w.dtype, groups or ()))
            if g is not None:
                choice.members.append(i)
                choice.places.append(place)
                if workspace is self._inplace and body is not widened:
                    self._make_room(i, w)
        return [self._selected(c) if c.body is swap else c for c in found.values()]

    def _make_room(self, i: int, w: Tensor) -> None:
        kept, like = self._inplace.get(i), torch.view_as_real(w.detach()) if w.is_complex() else w.detach()
        if kept is None or _form(kept) != _form(like):  # Triton's body saves storage as it lies
            self._inplace[i] = torch.empty_like(like)

    def _selected(self, c: _Choice) -> _Choice:
        order = sorted(range(len(c.places)), key=lambda k: not c.workspace.is_small[c.places[k]])
        members, places = [c.members[k] for k in order], [c.places[k] for k in order]
        selection = swap.Selection(c.workspace, places, [self.params[i] for i in members])
        return replace(c, workspace=selection, members=members, places=places)

    def _inplace_body(self, w: Tensor, g: Tensor) -> ModuleType:
        if self._in_float32 and w.dtype in LOW_PRECISION:
            return widened
        if g.is_sparse:  # also with foreach=True, as in torch.optim: lists of sparse tensors have no operations
            return reference
        if self._noise is not None and w.dtype in LOW_PRECISION:
            return reference
        if self._fused is not None and self._fused.fits(w, g):
            return self._fused
        if self._foreach or (self._foreach is None and w.device.type != "cpu"):
            return foreach
        return reference


def _form(x: Tensor) -> tuple[Any, ...]:
    return x.shape, _stride(x), x.dtype, x.device


def _check_writable(w: Tensor) -> None:
    """Before anything has moved: what could not be written to could not be brought back either."""
    if any(stride == 0 and size > 1 for stride, size in zip(w.stride(), w.shape, strict=True)):
        raise RuntimeError(
            f"a parameter of shape {tuple(w.shape)} is expanded, with more than one element at a single memory "
            "location: make it from a clone()"
        )


def _kinds(params: list[Tensor], grads: list[Any]) -> list[Any]:
    """What the choice of a body depends on. Few small objects where all gradients are there and dense: storage that is
    where it was, and as long, holds what it held, and gradients have the layout of their parameter."""
    if all(map(is_plain, params)):
        try:
            return [(w.data_ptr(), w.numel(), w.dtype, g.dtype, g.stride()) for w, g in zip(params, grads, strict=True)]
        except (AttributeError, RuntimeError):
            pass
    return [
        None if g is None else (w.device, w.dtype, w.shape, w.stride(), g.dtype, _stride(g), _address(w))
        for w, g in zip(params, grads, strict=True)
    ]


def _address(w: Tensor) -> int | None:
    """None where a tensor subclass has no storage of its own."""
    try:
        return w.data_ptr() if is_plain(w) else None
    except RuntimeError:
        return None


def _stride(g: Tensor) -> tuple[int, ...] | None:
    return g.stride() if g.layout is torch.strided else None


def _same_layout(w: Tensor, g: Tensor, place: tuple[swap.Workspace, int]) -> bool:
    """Whether w, which fitted, and this gradient have the layout and type of the storage that w may borrow."""
    out = place[0].out[place[1]]
    same = w.device == out.device and w.dtype == g.dtype == out.dtype and w.shape == out.shape
    return same and w.stride() == out.stride() == _stride(g)


class Ascent(NamedTuple):
    """norm: ||T g||_q, q dual to p, or None. length: ||T^-1 e||_p, or what computes it. moved: False where norm is 0 or
    not finite. stays: how often it has been False so far, where the device counts; stayed: not moved, where that is
    what is known.
    """

    norm: Scalar | None
    length: Scalar | Callable[[], Tensor]
    moved: bool | Tensor | None
    factors: list[Scalar]
    stays: Tensor | None = None
    stayed: Tensor | None = None


def ascend_(buckets: list[Bucket], *, agreeing: shards.Groups = ()) -> Ascent:
    """Moves all buckets to the steepest ascent in their ball; one norm runs over all of them, and over all ranks.

    Groups of p = 2 and of p = inf, where both occur, have a norm each. All ranks of the process groups `agreeing` stay
    where they are if one of them must.
    """
    if _is_fused(buckets) and not agreeing:
        return Ascent(*buckets[0].body.ascend_together_(buckets))
    if len(buckets) == 1 and buckets[0].body is foreach and not agreeing and not buckets[0].groups:
        b = buckets[0]
        if (alone := foreach.ascend_alone_(b)) is not None:
            norm, own, stayed = alone
            length = functools.partial(_radius, b.rho, stayed)  # a tensor is filled anew by schedules
            known = length() if isinstance(b.rho, Tensor) else length
            return Ascent(norm, known, None, [own], stayed=stayed)
    powers = shards.over_ranks(buckets, [_power(b) for b in buckets])
    by_order = {b.p: [x for other, x in zip(buckets, powers, strict=True) if other.p == b.p] for b in buckets}
    sums = {p: shards.total(found) for p, found in by_order.items()}
    norms = {p: power**0.5 if p == 2 else power for p, power in sums.items()}
    total = shards.total(list(norms.values()))
    moved: bool | Tensor = 0 < total < math.inf if isinstance(total, float) else (total > 0) & (total < math.inf)
    if agreeing:
        stays = not moved if isinstance(moved, bool) else ~moved
        stays = shards.any_over(stays, agreeing, buckets[0].device)
        moved = not stays if isinstance(stays, bool) else ~stays
    if moved is False:
        return Ascent(total, 0.0, False, [0.0] * len(buckets))
    factors = [_factor(b, norms.get(b.p, 1.0), moved) for b in buckets]
    for b, factor in zip(buckets, factors, strict=True):
        b.body.ascend_(b, factor)
    return Ascent(total, _length(buckets, powers, sums, moved), moved, factors)


def _power(b: Bucket) -> Scalar:
    """Of a group whose radius is 0 on the device nothing: it does not move, and stays out of the norm."""
    power = b.body.dual_power(b)
    on_device = isinstance(b.rho, Tensor) and isinstance(power, Tensor)
    return torch.where(b.rho == 0, 0.0, power) if on_device else power  # type: ignore[arg-type]


def _is_fused(buckets: list[Bucket]) -> bool:
    """Whether one body moves all of them at once. Sets another one where weights overlap."""
    fused = [b for b in buckets if hasattr(b.body, "ascend_together_")]
    together = fused == buckets and len({b.device for b in buckets}) == 1
    for found in [fused] if together else [[b] for b in fused]:
        if found and not found[0].body.is_possible(found):
            together = False
            for b in found:
                b.body = foreach
    return together and bool(buckets)


def _factor(b: Bucket, norm: Scalar, moved: bool | Tensor) -> Scalar:
    """What multiplies the direction: rho / ||T g||_2 or rho; 0 on the device where the gradient is 0 or not finite."""
    if not isinstance(moved, Tensor):
        return 0.0 if norm == 0 else float(b.rho / norm if b.p == 2 else b.rho)
    norm = torch.as_tensor(norm, dtype=torch.float64, device=b.device)
    factor = (b.rho / norm if b.p == 2 else _scalar(b.rho, b.device)).to(torch.float64)
    return torch.where(moved.to(b.device) & (norm > 0), factor, 0.0)


def _length(buckets: list[Bucket], powers: list[Scalar], sums: dict[float, Scalar], moved: bool | Tensor) -> Scalar:
    """||T^-1 e||_p: rho where all groups have the same."""
    lengths: list[Scalar] = [
        b.rho.abs() if isinstance(b.rho, Tensor) else abs(b.rho) for b in buckets if b.p == math.inf
    ]
    if any(b.p == 2 for b in buckets):
        shares: list[Scalar] = []
        for b, x in zip(buckets, powers, strict=True):
            if b.p == 2:
                shares.append(b.rho * b.rho * _share(x, sums[2]))
        lengths.append(shards.total(shares) ** 0.5)
    if not isinstance(moved, Tensor):
        return max(float(x) for x in lengths)
    largest = torch.stack([_scalar(x, moved.device) for x in lengths]).max()
    return torch.where(moved, largest, 0.0)


def _scalar(x: Scalar, device: torch.device) -> Tensor:
    """On the device; a number by a kernel that fills, not by a copy, which would wait."""
    if isinstance(x, Tensor):
        return x.to(device=device, dtype=torch.float64)
    return torch.full((), x, dtype=torch.float64, device=device)


def _radius(rho: Scalar, stayed: Tensor) -> Tensor:
    return stayed.logical_not().double() * (rho.abs() if isinstance(rho, Tensor) else abs(rho))


def _share(x: Scalar, total: Scalar) -> Scalar:
    if isinstance(x, Tensor) and isinstance(total, Tensor):
        x = x.to(total.device, non_blocking=True)  # of a model over several
    if isinstance(x, Tensor) or isinstance(total, Tensor):
        return torch.as_tensor(x / total).nan_to_num(0.0)
    return x / total if total else 0.0


def restore_(buckets: list[Bucket]) -> None:
    """Brings back the clean weights; may be called again after an interrupt."""
    for b in reversed(buckets):
        b.body.restore_(b)


def widening(buckets: list[Bucket]) -> list[Tensor]:
    """The parameters that move in float32 copies of themselves, which must be there before `ascend_`."""
    return [w for b in buckets if b.body is widened for w in b.params]
