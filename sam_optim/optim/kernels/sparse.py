"""As `loop`, for sparse gradients: only the rows that they name move, and the others are not made dense."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from sam_optim.optim.kernels import loop
from sam_optim.optim.kernels.bucket import LOW_PRECISION, Bucket, Norms, Scalar


def measure(b: Bucket) -> Norms:
    q = 2 if b.p == 2 else 1
    rows = list(_rows(b))
    largest = [g.abs().max().double() for _, _, g, _ in rows if g.numel()]
    unit = torch.stack(largest).max() if largest else torch.ones((), dtype=torch.float64, device=b.device)
    b.unit = torch.where(unit == 0, 1.0, unit)
    grads = [loop.scaled(g, b) for _, _, g, _ in rows]
    scales = [loop.scale(b, clean, t) for _, clean, _, t in rows]
    duals = [torch.linalg.vector_norm(g if t is None else g * t, q) for g, t in zip(grads, scales, strict=True)]
    steps = [torch.linalg.vector_norm(loop.step(g, t, b.p)) for g, t in zip(grads, scales, strict=True)]
    step_unit = b.unit if b.p == 2 else 1.0
    norms = (
        loop.total(duals, q) * b.unit,
        loop.total([torch.linalg.vector_norm(g) for g in grads], 2) * b.unit,
        loop.total(steps, 2) * step_unit,
    )
    return Norms(*(x.item() for x in norms)) if b.device.type == "cpu" else Norms(*norms)


def ascend_(b: Bucket, factor: Scalar) -> tuple[Scalar, Scalar] | None:
    retained = []
    for (rows, clean, g, t), w in zip(_rows(b), b.weights, strict=True):
        e = loop.step(loop.scaled(g, b), loop.scale(b, clean, t), b.p).mul_(factor)
        moved = loop.round_to(clean.to(e.dtype) + e, w.dtype, b.noise)
        w[rows] = moved
        retained.append(loop.dots(moved, clean, e) if w.dtype in LOW_PRECISION else None)
    return loop.retained_of(retained)


def _rows(b: Bucket) -> Iterator[tuple[tuple[Tensor, ...], Tensor, Tensor, Tensor | None]]:
    """Of each weight: which rows, their clean values, their gradients, and T there."""
    for i, (g, copy) in enumerate(zip(b.grads, b.storage.copies, strict=True)):  # type: ignore[union-attr]
        g = g.coalesce()
        rows = tuple(g.indices())
        yield rows, copy[rows], g.values(), None if b.t is None else b.t[i].expand_as(copy)[rows]
