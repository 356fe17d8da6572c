"""Channels that must change together: numbers for the channels of all tensors, and classes of tied channels."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

FIXED = 0  # the class of what may not change: inputs, outputs, operands of unknown operations


@dataclass(frozen=True)
class Occurrence:
    """Where channels occur in a parameter or buffer: rescaling multiplies its entry e by alpha[ids[e]] ** power.

    ids: channel numbers, broadcastable to the shape of the tensor.
    """

    name: str
    ids: Tensor
    power: int


class Channels:
    """Channel numbers 1, 2, ... in classes (union-find); class 0 is that of `FIXED`.

    A tensor's channels are an int64 tensor that broadcasts to its shape: the number of the channel that each entry
    belongs to. An axis along which it does not vary has size 1.
    """

    def __init__(self) -> None:
        self._parent = [FIXED]

    def __len__(self) -> int:
        return len(self._parent)

    def new(self, *shape: int) -> Tensor:
        """As many new channels as the shape has entries."""
        start, count = len(self), int(torch.Size(shape).numel())
        self._parent.extend(range(start, start + count))
        return torch.arange(start, start + count).view(shape)

    def root(self, channel: int) -> int:
        """The number of a channel's class."""
        parent = self._parent
        while parent[channel] != channel:
            parent[channel] = parent[parent[channel]]
            channel = parent[channel]
        return channel

    def roots(self, ids: Tensor) -> Tensor:
        unique, inverse = torch.unique(ids, return_inverse=True)
        return torch.tensor([self.root(i) for i in unique.tolist()], dtype=torch.int64)[inverse]

    def tie(self, a: Tensor, b: Tensor) -> None:
        """Merges the classes of channels at equal places of both."""
        pairs = torch.stack([x.flatten() for x in torch.broadcast_tensors(a, b)])
        for x, y in torch.unique(pairs, dim=1).T.tolist():
            x, y = self.root(x), self.root(y)
            self._parent[max(x, y)] = min(x, y)  # so that FIXED stays the root of its class

    def fix(self, ids: Tensor) -> None:
        self.tie(ids, torch.tensor(FIXED))

    def merge(self, ids: Tensor) -> Tensor:
        """Merges all of them into one class; returns its number, 0-d."""
        self.tie(ids, ids.flatten()[:1])
        return ids.flatten()[0]

    def along(self, ids: Tensor, ndim: int, axis: int) -> Tensor:
        """The channel at each place of one axis, (n,) or (1,); what differs along the other axes becomes one class."""
        ids = ids.view([1] * (ndim - ids.ndim) + list(ids.shape)).movedim(axis, 0).flatten(1)
        self.tie(ids, ids[:, :1])
        return ids[:, 0]


@dataclass
class Trace:
    """What one forward pass showed: the channels, where they occur, and the normalization layers that see a class.

    norms: module name -> the class whose scale the layer divides out; its eps has to follow.
    """

    channels: Channels = field(default_factory=Channels)
    occurrences: list[Occurrence] = field(default_factory=list)
    norms: dict[str, Tensor] = field(default_factory=dict)


def compressed(ids: Tensor, shape: Sequence[int]) -> Tensor:
    """The numbers with as many axes as the shape, of size 1 along every axis on which they do not vary."""
    ids = ids.view([1] * (len(shape) - ids.ndim) + list(ids.shape))
    for axis in range(ids.ndim):
        first = ids.narrow(axis, 0, 1)
        if ids.shape[axis] > 1 and bool((ids == first).all()):
            ids = first
    return ids
