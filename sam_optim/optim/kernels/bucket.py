"""Buckets: lists of tensors with one radius, one norm and one T; and copies of their clean values."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

Scalar = float | Tensor  # a number, or a 0-d tensor on a device, which is not read
Groups = tuple[Any, ...]  # process groups, one after the other
Moved = list[tuple[list[Tensor], list[Tensor]]]  # weights that move, and the clean copies that were taken before

LOW_PRECISION = (torch.bfloat16, torch.float16)


_SHAPE = operator.attrgetter("shape")


class Norms(NamedTuple):
    """dual: ||T g||_q, q dual to p. grad: ||g||_2. step: ||T^2 g||_2 (p = 2) or ||T sign(g)||_2 (p = inf)."""

    dual: Scalar
    grad: Scalar
    step: Scalar


class Ascent(NamedTuple):
    """What was computed on the way, for each bucket: numbers, or 0-d tensors on the device, which are not read.

    orders: p. factors: rho unit / ||T g||_2, or rho where p is inf. retained: <e', e> and <e, e> of low precision.
    """

    orders: list[float]
    norms: list[Norms]
    factors: list[Scalar]
    units: list[Scalar]
    retained: list[tuple[Scalar, Scalar]]


@dataclass(slots=True, eq=False)
class Bucket:
    """Weights of one group that move together, of one dtype on one device.

    p: 2 or inf. rho: the radius, negative where the loss is maximized. T is |w| + eta where eta is given, else `t`
    (one tensor for each weight, broadcastable to it), else 1. params: as the user knows them. weights, grads, copies:
    their entries on this rank, as real tensors of equal shapes. noise: draws for stochastic rounding. groups: process
    groups over which the weights are spread. unit: what the ascent divides gradients by, so that their powers neither
    vanish nor overflow; `measure` sets it. holds_step: whether `measure` has left the step in the weights.
    storage: as in `Storage`.
    """

    p: float
    rho: Scalar
    device: torch.device
    dtype: torch.dtype
    body: ModuleType
    eta: float | None = None
    noise: Any = None
    groups: Groups = ()
    params: list[Tensor] = field(default_factory=list)
    weights: list[Tensor] = field(default_factory=list)
    grads: list[Tensor] = field(default_factory=list)
    t: list[Tensor] | None = None
    storage: Storage | None = None
    unit: Scalar = 1.0
    holds_step: bool = False

    @property
    def is_plain(self) -> bool:
        """Whether T = 1 and p = 2: then the three norms are one."""
        return self.p == 2 and self.eta is None and self.t is None


class Storage:
    """Tensors like the weights of a bucket, for their clean values; kept as long as the weights keep their layout.

    copies: one for each weight. Small ones on the CPU are parts of one tensor for each of `batches`.
    """

    def __init__(self, b: Bucket):
        self._kind = b.dtype, b.device, b.body
        self._params = b.params
        self._shapes = list(map(_SHAPE, b.weights))
        self._strides = list(map(Tensor.stride, b.weights))
        for w in b.weights:
            _check_writable(w)
        self.batches: Any = None
        self.are_apart = False  # no weight shares memory with another one, in this bucket or another
        with torch.inference_mode(False):  # else a step in inference mode would leave tensors that no other may use
            if hasattr(b.body, "batches_of"):
                self.batches, self.copies = b.body.batches_of(b.weights)
                self._addresses = addresses(b.weights)
            else:
                self.copies = [torch.empty_like(w, requires_grad=False) for w in b.weights]

    def fits(self, b: Bucket, *, same_strides: bool = False) -> bool:
        same = len(self._params) == len(b.params) and all(map(operator.is_, self._params, b.params))
        same = same and self._kind == (b.dtype, b.device, b.body) and self._shapes == list(map(_SHAPE, b.weights))
        if self.batches is not None:  # which are views of the weights
            same = same and self._addresses == addresses(b.weights)
            same_strides = True
        return same and (not same_strides or self._strides == list(map(Tensor.stride, b.weights)))


class Backups:
    """Copies of the clean weights while w is perturbed. The next step reuses their storage."""

    def __init__(self) -> None:
        self._storages: list[Storage] = []
        self._moved: Moved = []
        self._pending: tuple[Moved, Callable[[], bool]] | None = None
        self.launcher: Any = None  # what the fused body keeps for the next step

    def save(self, buckets: Sequence[Bucket]) -> Moved:
        """Copies of all weights, before any of them moves: two may share their memory."""
        for b, storage in zip(buckets, self.storages_for(buckets), strict=True):
            if b.weights:
                torch._foreach_copy_(storage.copies, b.weights)
        self._moved = [(b.weights, b.storage.copies) for b in buckets]  # type: ignore[union-attr]
        return self._moved

    def storages_for(self, buckets: Sequence[Bucket], *, same_strides: bool = False) -> list[Storage]:
        """Empty storage for copies of all weights. same_strides: laid out as the weights are now."""
        storages = [*self._storages, *[None] * len(buckets)][: len(buckets)]
        for i, (b, storage) in enumerate(zip(buckets, storages, strict=True)):
            if storage is None or not storage.fits(b, same_strides=same_strides):
                storage = Storage(b)
            b.storage = storages[i] = storage
        in_batches = [b for b in buckets if b.storage.batches is not None]  # type: ignore[union-attr]
        if any([b.storage not in self._storages for b in in_batches]):
            weights = [w for b in in_batches for w in b.weights]
            apart = are_apart(weights, addresses(weights))
            for b in in_batches:
                b.storage.are_apart = apart  # type: ignore[union-attr]
        self._storages = storages  # type: ignore[assignment]
        return self._storages

    def expect(self, moved: Moved, complete: Callable[[], bool]) -> None:
        """Before a launch that copies and moves at once. Only after an interrupt is `complete` called: it makes all
        copies whole, whether there was a launch or not, or says that nothing can have moved.
        """
        self._pending = moved, complete

    def note(self, moved: Moved) -> None:
        """After that launch."""
        self._moved = moved
        self._pending = None

    def _settle(self) -> None:
        """Where the expected launch was interrupted, or a signal handler asks in the middle of it."""
        if self._pending is not None:
            moved, complete = self._pending
            self.note(moved if complete() else [])

    def clean(self, p: Tensor) -> Tensor | None:
        """The clean weight of a perturbed parameter: the entries on this rank."""
        self._settle()
        for storage in self._storages if self._moved else ():
            for param, copy in zip(storage._params, storage.copies, strict=True):
                if param is p:
                    return torch.view_as_complex(copy) if p.is_complex() else copy
        return None

    def displacements(self) -> dict[Tensor, Tensor]:
        """(w + e) - w of every perturbed parameter: the entries on this rank."""
        self._settle()
        moved = zip(self._storages, self._moved, strict=False)
        pairs = [(p, w - c) for s, (weights, _) in moved for p, w, c in zip(s._params, weights, s.copies, strict=True)]
        return {p: torch.view_as_complex(e) if p.is_complex() else e for p, e in pairs}

    def restore_(self) -> None:
        """w <- the bits that it had, in the storage that it had. May be called again after an interrupt.

        Raises:
            RuntimeError: weights that cannot be restored; all others have been.
        """
        self._settle()
        errors = []
        for weights, copies in self._moved:
            try:
                if weights:
                    torch._foreach_copy_(weights, copies)
            except Exception:
                errors += [error for w, copy in zip(weights, copies, strict=True) if (error := _copy_back(w, copy))]
        self._moved = []
        if errors:
            raise RuntimeError(
                f"{len(errors)} weights could not be restored from w + e, because they were changed while perturbed; "
                f"all others are clean. The first error: {errors[0]}"
            )

    def differ(self) -> bool:
        """Whether any weight that was moved last is not what it was before."""
        pairs = [
            (p, copy) for storage in self._storages for p, copy in zip(storage._params, storage.copies, strict=True)
        ]
        return any(not torch.equal(_entries(p, copy), copy) for p, copy in pairs)


def wide_dtype(*dtypes: torch.dtype) -> torch.dtype:
    """The dtype of the arithmetic: float64 if any tensor has it, else float32."""
    return torch.float64 if torch.float64 in dtypes else torch.float32


def addresses(tensors: Sequence[Tensor]) -> list[int]:
    return list(map(Tensor.data_ptr, tensors))


def are_apart(tensors: Sequence[Tensor], at: Sequence[int]) -> bool:
    """Whether no two share memory, or lie within each other. at: their addresses."""
    spans = []
    for x, begin in zip(tensors, at, strict=True):
        if x.numel():
            length = 1 + sum([(n - 1) * stride for n, stride in zip(x.shape, x.stride(), strict=True)])
            spans.append((begin, begin + length * x.itemsize))
    spans.sort()
    return all(end <= start for (_, end), (start, _) in itertools.pairwise(spans))


def _entries(p: Tensor, copy: Tensor) -> Tensor:
    w = getattr(p, "_local_tensor", p).detach()
    return torch.view_as_real(w) if w.is_complex() and not copy.is_complex() else w


def _check_writable(w: Tensor) -> None:
    """Before anything has moved: what could not be written to could not be brought back either."""
    if any([stride == 0 and size > 1 for stride, size in zip(w.stride(), w.shape, strict=True)]):
        raise RuntimeError(
            f"a parameter of shape {tuple(w.shape)} is expanded, with more than one element at a single memory "
            "location: make it from a clone()"
        )


def _copy_back(w: Tensor, copy: Tensor) -> str | None:
    try:
        w.copy_(copy)
    except Exception as error:
        return str(error)
    return None
