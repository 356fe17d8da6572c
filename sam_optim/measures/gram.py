"""Gradients of single batches and their inner products, without holding more of them than a budget allows."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

import torch
from torch import Tensor

from sam_optim.loss import Loss
from sam_optim.measures.shared import Progress, Ticks, flat, scaled

BUDGET = 1 << 30  # bytes of gradients held at once
WIDENED = 1 << 24  # entries of which inner products are taken in float64 at once


class BatchGradients:
    """g_b, the gradients of the B batches of a loss, multiplied by `scales` (T, one for each parameter) if given.

    All batches are held for a range of parameters, `BUDGET` bytes of it: the memory does not grow with the number of
    batches. Where the gradients do not fit, the data are gone through once for each range.
    """

    def __init__(self, loss: Loss, scales: Sequence[Tensor] | None = None, *, budget: int | None = None):
        self._loss, self._scales = loss, scales
        num, size = sum(w.numel() for w in loss.params), max(4, loss.params[0].element_size())
        width = max(1, (BUDGET if budget is None else budget) // (size * loss.num_batches))
        self._ranges = [(start, min(start + width, num)) for start in range(0, num, width)]
        self.num_gradients = loss.num_batches * len(self._ranges)

    def parts(self, tick: Callable[[], None]) -> Iterator[list[Tensor]]:
        """The gradients of all batches, one range of entries after the other."""

        for start, stop in self._ranges:

            def part(single: Loss, start: int = start, stop: int = stop) -> Tensor:
                gradient = flat(scaled(single.gradient(), self._scales))
                tick()
                return gradient if len(self._ranges) == 1 else gradient[start:stop].clone()  # a view would keep it all

            yield self._loss.over_batches(part)


def gram_matrix(loss: Loss, *, scales: Sequence[Tensor] | None = None, progress: Progress | None = None) -> Tensor:
    """<g_i, g_j>, (B, B) float64 on the CPU."""
    gradients = BatchGradients(loss, scales)
    tick = Ticks(progress, gradients.num_gradients)
    gram = torch.zeros(loss.num_batches, loss.num_batches, dtype=torch.float64)
    for rows in gradients.parts(tick):
        gram += inner_products(rows, rows)
    return gram


def inner_products(a: Sequence[Tensor], b: Sequence[Tensor]) -> Tensor:
    """<a_i, b_j>, accumulated in float64, on the CPU."""
    products = torch.zeros(len(a), len(b), dtype=torch.float64)
    width = max(1, WIDENED // max(len(a), len(b)))
    for start in range(0, len(a[0]), width):
        left = torch.stack([x[start : start + width] for x in a]).double()
        right = left if a is b else torch.stack([x[start : start + width] for x in b]).double()
        products += (left @ right.T).cpu()
    return products


def pair_weights(p: Tensor) -> Tensor:
    """p_i p_j for two different batches, 0 on the diagonal; not normalized."""
    return (p[:, None] * p).fill_diagonal_(0)


def cosines(gram: Tensor) -> Tensor:
    """cos(g_i, g_j); 0 where one of them is 0, and nan where one is not finite."""
    norms = gram.diagonal().clamp(min=0).sqrt()
    lengths = norms[:, None] * norms
    return torch.where(lengths > 0, gram / lengths, torch.where(lengths == 0, 0.0, torch.nan))


def jackknife(statistic: Callable[[Tensor, Tensor], float], gram: Tensor, sizes: Sequence[float]) -> float:
    """Standard error of a statistic of (gram, sizes) from leaving out one batch at a time; nan for fewer than three."""
    num = len(sizes)
    if num < 3:
        return float("nan")
    all_sizes = torch.tensor(sizes, dtype=torch.float64)
    subsets = [torch.tensor([i for i in range(num) if i != b]) for b in range(num)]
    leave_one_out = torch.tensor([statistic(gram[k][:, k], all_sizes[k]) for k in subsets], dtype=torch.float64)
    return float(((num - 1) * leave_one_out.var(unbiased=False)).sqrt())
