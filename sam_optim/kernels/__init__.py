"""The weight moves of a step: one `Bucket`, several bodies, and the only `if` on device and backend.

dual_power(b)        sum |T g|^q, q = 2 (p = 2) or 1 (p = inf): a float on the CPU, a 0-d tensor on a device
ascend_(b, factor)   w <- w + factor T^2 g  (p = 2)   or   w + factor T sign(g)  (p = inf)
restore_(b)          w <- the bits that it had, in the storage that it had
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable
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

    params: as the user knows them. w, g: weights and ascent gradients (real views of complex ones). saved: what holds
    the clean weights while w is perturbed; shorter than w when a move was interrupted. T is |w| + eta where eta is
    given, else t (broadcastable tensors), else 1. rho: the radius, negative where the loss is maximised. noise: draws
    for stochastic rounding. workspace, index: persistent storage, and the place of each parameter in it. shared: moved
    in place, so that whoever looks into the same storage sees the perturbed weights.
    """

    p: float
    rho: Scalar
    eta: float | None
    body: ModuleType
    workspace: Any
    noise: Any = None
    params: list[Tensor] = field(default_factory=list)
    w: list[Tensor] = field(default_factory=list)
    g: list[Tensor] = field(default_factory=list)
    index: list[int] = field(default_factory=list)
    t: list[Tensor] | None = None
    shared: list[bool] = field(default_factory=list)
    saved: list[Tensor] = field(default_factory=list)


class Store:
    """The persistent storage of one parameter group, and the choice of the body that moves each of its parameters.

    The choice is made anew only when a parameter or gradient changes its type, layout or presence.
    """

    def __init__(self, params: list[Tensor], foreach_flag: bool | None, noise: Any):
        self.params = list(params)
        self._foreach = foreach_flag
        self._noise = noise
        self._inplace: dict[int, Tensor] = {}
        self._chosen_for: Any = None
        self._plan: list[tuple[ModuleType, Any, list[int], list[int]]] = []  # body, workspace, parameters, places
        fitting = [] if foreach_flag else [i for i, p in enumerate(params) if swap.fits(p)]
        self._place: dict[int, tuple[swap.Workspace, int]] = {}
        for dtype in {params[i].dtype for i in fitting}:
            members = [i for i in fitting if params[i].dtype == dtype]
            workspace = swap.Workspace([params[i].detach() for i in members])
            self._place |= {i: (workspace, k) for k, i in enumerate(members)}

    def matches(self, params: list[Tensor]) -> bool:
        return len(params) == len(self.params) and all(map(operator.is_, params, self.params))

    def buckets(self, p: float, rho: Scalar, eta: float | None, t: Callable[[Tensor], Tensor] | None) -> list[Bucket]:
        """The parameters that have a gradient now, by the body that moves them. `t` makes T of one parameter."""
        params = self.params
        grads = [w.grad for w in params]
        kinds = _kinds(params, grads)
        if self._chosen_for != kinds:
            self._plan, self._chosen_for = self._choose(grads), kinds
        found = []
        for body, workspace, members, places in self._plan:
            b = Bucket(p, rho, eta, body, workspace, self._noise)
            b.params, b.index = [params[i] for i in members], places
            b.w, b.g = b.params, [grads[i] for i in members]  # type: ignore[misc]
            b.shared = workspace.shared() if isinstance(workspace, swap.Selection) else [True] * len(members)
            if t is not None:
                b.t = [t(w).unsqueeze(-1) if w.is_complex() else t(w) for w in b.params]
            if b.params[0].is_complex():
                b.w = [torch.view_as_real(w.detach()) for w in b.params]
                b.g = [torch.view_as_real(g) for g in b.g]
            found.append(b)
        return found

    def _choose(self, grads: list[Any]) -> list[tuple[ModuleType, Any, list[int], list[int]]]:
        found: dict[Any, tuple[ModuleType, Any, list[int], list[int]]] = {}
        for i, (w, g) in enumerate(zip(self.params, grads, strict=True)):
            if g is None:
                continue
            if i in self._place and _same_layout(w, g, self._place[i]):
                workspace, place = self._place[i]
                entry = found.setdefault(id(workspace), (swap, workspace, [], []))
            else:
                body, place = self._inplace_body(w, g), i
                kept, like = self._inplace.get(i), torch.view_as_real(w.detach()) if w.is_complex() else w.detach()
                if kept is None or (kept.shape, kept.dtype, kept.device) != (like.shape, like.dtype, like.device):
                    self._inplace[i] = torch.empty_like(like)
                entry = found.setdefault((w.device, w.dtype, body), (body, self._inplace, [], []))
            entry[2].append(i)
            entry[3].append(place)
        return [self._selected(*entry) if entry[0] is swap else entry for entry in found.values()]

    def _selected(
        self, body: ModuleType, workspace: swap.Workspace, members: list[int], places: list[int]
    ) -> tuple[ModuleType, Any, list[int], list[int]]:
        order = sorted(range(len(places)), key=lambda k: not workspace.is_small[places[k]])
        members, places = [members[k] for k in order], [places[k] for k in order]
        return body, swap.Selection(workspace, places, [self.params[i] for i in members]), members, places

    def _inplace_body(self, w: Tensor, g: Tensor) -> ModuleType:
        if g.is_sparse:
            if self._foreach:
                raise ValueError(
                    "foreach=True cannot move a parameter with sparse gradients: use foreach=None or False"
                )
            return reference
        if self._noise is not None and w.dtype in LOW_PRECISION:
            return reference
        if self._foreach or (self._foreach is None and w.device.type != "cpu"):
            return foreach
        return reference


def _kinds(params: list[Tensor], grads: list[Any]) -> list[Any]:
    """What the choice of a body depends on. Few small objects where all gradients are there and dense: storage that is
    where it was, and as long, holds what it held, and gradients have the layout of their parameter."""
    try:
        return [(w.data_ptr(), w.numel(), w.dtype, g.dtype, g.stride()) for w, g in zip(params, grads, strict=True)]
    except (AttributeError, RuntimeError):
        return [
            None if g is None else (w.device, w.dtype, w.shape, w.stride(), g.dtype, _stride(g), _address(w))
            for w, g in zip(params, grads, strict=True)
        ]


def _address(w: Tensor) -> int | None:
    """None where a tensor subclass has no storage of its own."""
    try:
        return w.data_ptr()
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
    """norm: ||T g||_q, q dual to p, or None. length: ||T^-1 e||_p. moved: False where norm is 0 or not finite."""

    norm: Scalar | None
    length: Scalar
    moved: bool | Tensor
    factors: list[Scalar]


def ascend_(buckets: list[Bucket]) -> Ascent:
    """Moves all buckets to the steepest ascent in their ball; one norm runs over all of them.

    Groups of p = 2 and of p = inf, where both occur, have a norm each.
    """
    powers = [b.body.dual_power(b) for b in buckets]
    sums = {p: _sum([x for b, x in zip(buckets, powers, strict=True) if b.p == p]) for p in {b.p for b in buckets}}
    norms = {p: power**0.5 if p == 2 else power for p, power in sums.items()}
    total = _sum(list(norms.values()))
    moved: bool | Tensor = 0 < total < math.inf if isinstance(total, float) else (total > 0) & (total < math.inf)
    if moved is False:
        return Ascent(total, 0.0, False, [0.0] * len(buckets))
    factors = [_factor(b, norms.get(b.p, 1.0), moved) for b in buckets]
    for b, factor in zip(buckets, factors, strict=True):
        b.body.ascend_(b, factor)
    return Ascent(total, _length(buckets, powers, sums, moved), moved, factors)


def _factor(b: Bucket, norm: Scalar, moved: bool | Tensor) -> Scalar:
    """What multiplies the direction: rho / ||T g||_2 or rho; 0 on the device where the gradient is 0 or not finite."""
    device = b.w[0].device
    if not isinstance(moved, Tensor):
        return 0.0 if norm == 0 else float(b.rho / norm if b.p == 2 else b.rho)
    norm = torch.as_tensor(norm, dtype=torch.float64, device=device)
    factor = torch.as_tensor(b.rho / norm if b.p == 2 else b.rho, dtype=torch.float64, device=device)
    return torch.where(moved.to(device) & (norm > 0), factor, 0.0)


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
        lengths.append(_sum(shares) ** 0.5)
    if not isinstance(moved, Tensor):
        return max(float(x) for x in lengths)
    largest = torch.stack([torch.as_tensor(x, dtype=torch.float64).to(moved.device) for x in lengths]).max()
    return torch.where(moved, largest, 0.0)


def _share(x: Scalar, total: Scalar) -> Scalar:
    if isinstance(x, Tensor) or isinstance(total, Tensor):
        return torch.as_tensor(x / total).nan_to_num(0.0)
    return x / total if total else 0.0


def restore_(buckets: list[Bucket]) -> None:
    """Brings back the clean weights; may be called again after an interrupt."""
    for b in reversed(buckets):
        b.body.restore_(b)


def realized(buckets: list[Bucket], factors: list[Scalar]) -> Scalar | None:
    """<e', e> / ||e||^2 over bf16 and fp16 weights, e the perturbation asked for, e' what their rounding left of it.

    None where there are none: float32 keeps it to better than 1e-3. Needs the ascent gradients.
    """
    dots: list[Scalar] = []
    squares: list[Scalar] = []
    for b, factor in zip(buckets, factors, strict=True):
        if b.w[0].dtype in LOW_PRECISION:
            for i, (w, clean) in enumerate(zip(b.w, b.saved, strict=False)):
                e = reference.step(b, i, clean, factor)
                dots.append(((w.detach().float() - clean.float()) * e).sum(dtype=torch.float64))
                squares.append(e.square().sum(dtype=torch.float64))
    if not dots:
        return None
    square = torch.as_tensor(_sum(squares))
    return torch.where(square > 0, _sum(dots) / square, 1.0)


def _sum(values: list[Scalar]) -> Scalar:
    """On the device of the first tensor among them, without a host sync."""
    device = next((x.device for x in values if isinstance(x, Tensor)), None)
    return sum(x.to(device, non_blocking=True) if isinstance(x, Tensor) else x for x in values)
