"""Channels that must change together: numbers for the channels of all tensors, and classes of them that are tied."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

FIXED = 0  # the number of what may not change: inputs, outputs, and what an unknown operation has seen


@dataclass(frozen=True)
class Touch:
    """Where channels show in a parameter or buffer: scaled by alpha, entry e of it takes alpha[ids[e]] ** power.

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

    def new(self, shape: Sequence[int]) -> Tensor:
        """As many new channels as the shape has entries."""
        start, count = len(self._parent), int(torch.Size(shape).numel())
        self._parent.extend(range(start, start + count))
        return torch.arange(start, start + count).view(*shape)

    @property
    def count(self) -> int:
        return len(self._parent)

    def find(self, channel: int) -> int:
        parent = self._parent
        while parent[channel] != channel:
            parent[channel] = parent[parent[channel]]
            channel = parent[channel]
        return channel

    def tie(self, a: Tensor, b: Tensor) -> None:
        """The channels at equal places of both become one class."""
        a, b = torch.broadcast_tensors(a, b)
        for x, y in torch.unique(torch.stack([a.flatten(), b.flatten()]), dim=1).T.tolist():
            x, y = self.find(x), self.find(y)
            self._parent[max(x, y)] = min(x, y)  # so that FIXED stays the root of its class

    def fix(self, ids: Tensor) -> None:
        self.tie(ids, torch.tensor(FIXED))

    def one(self, ids: Tensor) -> Tensor:
        """All of them become one class; its number, 0-d."""
        self.tie(ids, ids.flatten()[:1])
        return ids.flatten()[0]

    def along(self, ids: Tensor, ndim: int, axis: int) -> Tensor:
        """The channel at each place of one axis, (n,) or (1,); what differs along the other axes becomes one class."""
        ids = ids.view([1] * (ndim - ids.ndim) + list(ids.shape)).movedim(axis, 0).flatten(1)
        self.tie(ids, ids[:, :1])
        return ids[:, 0]

    def roots(self, ids: Tensor) -> Tensor:
        """The class of each channel."""
        unique, inverse = torch.unique(ids, return_inverse=True)
        return torch.tensor([self.find(i) for i in unique.tolist()], dtype=torch.int64)[inverse]


def compressed(ids: Tensor) -> Tensor:
    """Size 1 along every axis on which the numbers do not vary."""
    for axis in range(ids.ndim):
        first = ids.narrow(axis, 0, 1)
        if ids.shape[axis] > 1 and bool((ids == first).all()):
            ids = first
    return ids
