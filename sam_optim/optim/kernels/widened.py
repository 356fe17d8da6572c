"""In the float32 copy that a bf16 or fp16 parameter is in pass 2, and that is made and taken back elsewhere.

As `reference`, without rounding, and in pieces, so that temporaries do not grow with the weights: w is the copy when
`ascend_` is called, and the clean weights are in storage that nothing writes to.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

from torch import Tensor

from sam_optim.optim.kernels import loop as reference

if TYPE_CHECKING:
    from sam_optim.optim.kernels import Bucket, Scalar

PIECE = 8 * reference.ROWS  # entries; a row of the first dimension is not cut


def dual_power(b: Bucket) -> Scalar:
    return reference.dual_power(_in_pieces(b))


def ascend_(b: Bucket, factor: Scalar) -> None:
    b = _in_pieces(b)
    for i, w in enumerate(b.w):
        if b.g[i].is_sparse:
            reference.ascend_sparse_(b, i, w, factor)
        else:
            w.add_(reference.step(b, i, w, factor))


def restore_(b: Bucket) -> None:
    """Nothing has been written that would have to be taken back."""


def _in_pieces(b: Bucket) -> Bucket:
    """The same weights, gradients and T as more and smaller parameters."""
    pieces = replace(b, w=[], g=[], t=None if b.t is None else [])
    for i, w in enumerate(b.w):
        rows = _rows(w, b.g[i])
        pieces.w += [w.detach()] if rows is None else w.detach().split(rows)
        pieces.g += [b.g[i]] if rows is None else b.g[i].split(rows)
        if pieces.t is not None and b.t is not None:
            pieces.t += [b.t[i]] if rows is None else b.t[i].expand_as(w).split(rows)
    return pieces


def _rows(w: Tensor, g: Tensor) -> int | None:
    """How many rows make a piece; None for one that stays whole."""
    return None if g.is_sparse or w.numel() <= PIECE else max(1, PIECE * len(w) // w.numel())
