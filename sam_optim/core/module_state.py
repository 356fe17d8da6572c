"""Saves and restores buffers (normalization statistics) and modes of a model."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from sam_optim.core.contexts import undone

NORM_LAYERS: tuple[type[nn.Module], ...] = (
    nn.modules.batchnorm._NormBase,  # BatchNorm, SyncBatchNorm, InstanceNorm, and timm's BatchNormAct2d
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
    nn.CrossMapLRN2d,
)


_PLAIN = {Tensor, nn.Parameter, nn.Buffer}


def modules_of(*models: nn.Module) -> list[nn.Module]:
    """As `model.modules()`, in a third of its time, which is part of every step."""
    modules = list(dict.fromkeys(models))
    visited = set(modules)
    for m in modules:  # the list grows in the loop
        for child in m._modules.values():
            if child is not None and child not in visited:
                visited.add(child)
                modules.append(child)
    return modules


class Buffers:
    """A snapshot of every buffer of some modules: BatchNorm statistics and counters, spectral norm, quantizer ranges.

    `restore` brings back the values bit for bit in the same storage, and the same tensor object where the model has
    assigned another one in between. What has changed its shape stays: a cache that has grown, whose length the model
    keeps elsewhere. (Setting BatchNorm's momentum to 0 instead is wrong for momentum=None, still counts the batch, and
    knows only BatchNorm.) Copies are kept for the next `save`, which then allocates nothing.
    """

    def __init__(self) -> None:
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}
        self._slots: list[tuple[dict[str, Tensor | None], str, Tensor | None]] = []
        self._tensors: list[Tensor] = []
        self._layout: list[tuple[torch.Size, int]] = []  # of plain tensors, else empty
        self._versions: list[int] = []

    @torch.no_grad()
    def save(self, model: nn.Module | Sequence[nn.Module], extra: Sequence[Tensor] = ()) -> None:
        """Saves the buffers of a model, or of the listed modules without their children; `extra`: other tensors."""
        modules = modules_of(model) if isinstance(model, nn.Module) else model
        self._slots = [(m._buffers, name, b) for m in modules if m._buffers for name, b in m._buffers.items()]
        if not self._slots and not extra:
            self._copies = {}
            return
        tensors = [b for _, _, b in self._slots if b is not None] + list(extra)
        is_plain = {*map(type, tensors)} <= _PLAIN
        layout = [(b.shape, b.data_ptr()) for b in tensors] if is_plain else []
        copies, self._copies = self._copies, {}
        same = len(tensors) == len(self._tensors) and all(map(operator.is_, tensors, self._tensors))
        if not (copies and same and is_plain and layout == self._layout):
            stale, copies = copies, {}
            with torch.inference_mode(False):  # in which a step may fail: the next one writes to these, too
                for b in filter(_writable, tensors):
                    owner, copy = stale.get(id(b), (None, b))
                    copies[id(b)] = (b, copy if owner is b and _alike(copy, b) else torch.empty_like(b.detach()))
        _copy([c for _, c in copies.values()], [b for b, _ in copies.values()])
        self._tensors, self._layout = tensors, layout
        self._versions = [b._version if is_plain else -1 for b, _ in copies.values()]
        self._copies = copies  # whole, or not at all: an interrupt may come in between

    @torch.no_grad()
    def restore(self) -> None:
        if not self._slots and not self._copies:
            return
        for owner, name, buffer in self._slots:
            now = owner.get(name) if isinstance(owner, dict) else None  # a ScriptModule's can only be written to
            if now is not buffer and now is not None and buffer is not None and now.shape == buffer.shape:
                owner[name] = buffer
        pairs = [  # `.data` where the version is the same, so that graphs made before, as of a GAN's G, stay valid
            (b.data if b._version == version else b, copy)
            for (b, copy), version in zip(self._copies.values(), self._versions, strict=False)
            if b.shape == copy.shape
        ]
        _copy([b for b, _ in pairs], [copy for _, copy in pairs])

    def clean_copy(self, buffer: Tensor) -> Tensor | None:
        """The saved value of `buffer`, or None if it is not one of those saved."""
        saved = self._copies.get(id(buffer))
        return None if saved is None else saved[1]


def _copy(targets: list[Tensor], sources: list[Tensor]) -> None:
    """Few launches for many small buffers; tensor subclasses, such as DTensor, know no copies of lists."""
    if {*map(type, targets), *map(type, sources)} <= _PLAIN:
        if targets:
            torch._foreach_copy_(targets, sources)
        return
    for t, s in zip(targets, sources, strict=True):
        t.copy_(s)


def _alike(a: Tensor, b: Tensor) -> bool:
    return (a.shape, a.dtype, a.device) == (b.shape, b.dtype, b.device)


def _writable(buffer: Tensor) -> bool:
    """False for buffers that a forward pass cannot change in place either (expanded, meta, created in inference mode),
    and for lazy ones, which have no values before the first pass."""
    if nn.parameter.is_lazy(buffer):
        return False
    expanded = any([size > 1 and stride == 0 for size, stride in zip(buffer.shape, buffer.stride(), strict=True)])
    return not (expanded or buffer.is_meta or buffer.is_inference())


@contextmanager
def measured(model: nn.Module, *, batch_statistics: bool = False) -> Iterator[None]:
    """The model in eval mode; with `batch_statistics` its normalization layers use those of the batch instead of the
    running ones. Training flags and buffers come back as they were, also after an exception."""
    flags = [(m, m.training) for m in model.modules()]
    buffers = Buffers()
    buffers.save(model)

    def restore() -> None:
        for m, training in flags:
            m.training = training
        buffers.restore()

    with undone(restore):
        model.eval()
        if batch_statistics:
            for m in model.modules():
                if isinstance(m, nn.modules.batchnorm._NormBase):
                    m.training = True
        yield


@contextmanager
def widened(module: nn.Module, dtype: torch.dtype | None) -> Iterator[None]:
    """Parameters and buffers of fewer bits as copies in `dtype`, and no hooks on the gradients of parameters, which may
    change them or do more than that. All come back in their storage, bit for bit, with their hooks.

    Data of another dtype parts a parameter from its accumulator of gradients, and so from hooks on that node (not those
    of `register_hook` and `register_post_accumulate_grad_hook`).
    """
    tensors = {id(x): x for x in (*module.parameters(), *module.buffers())}.values()
    narrow = [x for x in tensors if dtype is not None and x.is_floating_point() and x.itemsize < dtype.itemsize]
    replaced = [(x, x.data) for x in narrow]
    hooked = [(x, x._backward_hooks) for x in tensors if x._backward_hooks]

    def restore() -> None:
        for x, data in replaced:
            x.data = data
        for x, hooks in hooked:
            x._backward_hooks = hooks

    with undone(restore):
        for x, _ in hooked:
            x._backward_hooks = None
        for x, data in replaced:
            x.data = data.to(dtype)
        yield


def statistics_in_use(model: nn.Module, *, batch_statistics: bool) -> str | None:
    """What the layers with running statistics normalize by, in words; None for a model without such layers."""
    layers = (m for m in model.modules() if isinstance(m, nn.modules.batchnorm._NormBase))
    if not any(m.track_running_stats for m in layers):
        return None
    return "batch statistics" if batch_statistics else "running statistics"
