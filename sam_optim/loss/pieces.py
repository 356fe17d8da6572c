"""Curvature products of a batch or of a piece of it, and how the pieces of a batch add up to it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from sam_optim.loss import criterion as criteria
from sam_optim.loss import differences, products
from sam_optim.loss.batches import divided, part
from sam_optim.loss.curvature import PROBE
from sam_optim.loss.passes import Passes
from sam_optim.loss.weights import Weigher, rows_of


class Pieces:
    """Of one matrix, as a function of some parameters.

    displaced: d -> a context with the parameters at w + d, for J v by a central difference of outputs; None: by double
    backward. A piece is a batch; for "fisher_mc" a pair (batch, uniform draws).
    """

    def __init__(
        self,
        matrix: str,
        passes: Passes,
        params: Sequence[Tensor],
        weigher: Weigher,
        displaced: Callable[[Sequence[Tensor]], AbstractContextManager[None]] | None,
    ):
        self._matrix, self._passes, self._params, self._weigher = matrix, passes, params, weigher
        self._displaced = displaced

    def product(self, piece: Any, keep: bool) -> products.Product:
        """v -> M v. keep: its graph for further products."""
        piece, uniforms = piece if self._matrix == "fisher_mc" else (piece, torch.empty(0))
        if self._displaced is not None:  # weights that move make a kept graph stale
            return lambda v: self._product(piece, uniforms, False, self._pushed(piece, v))(v)
        return self._product(piece, uniforms, keep, None)

    def _product(self, piece: Any, uniforms: Tensor, keep: bool, pushed: Tensor | None) -> products.Product:
        """pushed: J v for the v that the product is for, where double backward is missing."""
        outputs, target = self._passes.outputs(piece)
        matrix, params = self._matrix, self._params
        if matrix == "hessian":
            return products.hessian(params, self._passes.of_outputs(outputs, target), keep=keep)
        criteria.check_matrix(self._passes.criterion, outputs, matrix)
        how: dict[str, Any] = {"keep": keep, "push": None if pushed is None else lambda v: pushed}
        if matrix == "ggn":
            rows = self._weigher.cross_entropy_rows(target, outputs.shape[1]) if outputs.ndim > 1 else None
            if rows is None:
                return products.gauss_newton(params, outputs, lambda o: self._passes.of_outputs(o, target), **how)
            if pushed is not None:
                how["push"] = lambda v: rows_of(pushed)
            return products.fisher(params, rows_of(outputs), rows.to(outputs), **how)
        shares = self._weigher.of_examples(outputs, target)
        if matrix == "fisher":
            return products.fisher(params, outputs, shares, **how)
        if matrix == "fisher_mc":
            return products.fisher_mc(params, outputs, shares, uniforms, **how)
        counted = shares.nonzero().flatten()
        return products.empirical_fisher(params, self._of_examples(outputs, target, counted), shares[counted], **how)

    def _of_examples(self, outputs: Tensor, target: Any, counted: Tensor) -> Tensor:
        """The losses of those that count: that of a label that is ignored is nan."""
        alone = [(outputs[i : i + 1], target[i : i + 1]) for i in counted.tolist()]
        return torch.stack([self._passes.of_outputs(o, t) for o, t in alone])

    @torch.no_grad()
    def _pushed(self, piece: Any, v: Sequence[Tensor]) -> Tensor:
        """J v of the outputs, or of the losses of single examples."""
        displaced = self._displaced
        assert displaced is not None

        def at(d: Sequence[Tensor]) -> Tensor:
            with displaced(d):
                outputs, target = self._passes.outputs(piece)
            if self._matrix != "empirical_fisher":
                return outputs
            return self._of_examples(outputs, target, self._weigher.of_examples(outputs, target).nonzero()[:, 0])

        h = differences.step(self._params, v)
        return (at([h * x for x in v]) - at([-h * x for x in v])) / (2 * h)

    @torch.no_grad()
    def shares(self, batch: Any, n: int, size: int) -> list[float] | None:
        """s_k for which the matrix of a batch is the sum of s_k times those of its pieces; None where it is no sum."""
        if self._passes.criterion is None:
            return None
        if self._matrix == "fisher_mc":
            batch, _ = batch
        pieces = divided(batch, n, size)
        few, _ = self._passes.outputs(part(batch, 0, min(size, PROBE) // 2 or 1))
        first, _ = self._passes.outputs(part(batch, 0, max(size, 2)))
        if not criteria.same_outputs(few, first):
            return None
        if self._weigher.is_sure:
            weights = [self._weigher(self._passes.target(piece), k) for k, piece in pieces]
            return [w / math.fsum(weights) for w in weights]
        equal = [k / n for k, _ in pieces]
        shares = None
        if self._weigher.is_mean:
            shares = criteria.shares(self._passes.criterion, [self._passes.outputs(piece) for _, piece in pieces])
        if shares is None:
            return equal if self._matrix in ("fisher", "fisher_mc", "empirical_fisher") else None  # sums by definition
        if abs(math.fsum(shares) - 1) > 1e-3:
            return None
        return [e if abs(s - e) < 1e-4 * e else s for s, e in zip(shares, equal, strict=True)]
