"""Curvature-vector products of one batch: built once, applied to any number of vectors, with reverse mode only.

Reverse over reverse is as fast as forward over reverse, needs less memory, and every layer that trains supports it.
(`torch.func.hessian` is silently wrong for affine LayerNorm, and `linearize` for models with in-place operations.)
`keep` keeps the graph for further products; without it a product frees the graph as it goes. `push` computes v -> J v
in another way, where there is no double backward.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

Product = Callable[[Sequence[Tensor]], list[Tensor]]

ROWS = 64  # of logits of which softmax is computed at once


def hessian(params: Sequence[Tensor], loss: Tensor, *, keep: bool) -> Product:
    """v -> H v = d/dw <dL/dw, v>, for the 0-d `loss` L."""
    grads = torch.autograd.grad(loss, params, create_graph=True, materialize_grads=True)
    return _pullback(grads, params, keep=keep)


def gauss_newton(
    params: Sequence[Tensor], outputs: Tensor, criterion: Callable[[Tensor], Tensor], **how: Any
) -> Product:
    """v -> J^T H_o J v, with J = d outputs / dw and H_o the Hessian of `criterion` with respect to the outputs."""
    o = outputs.detach().requires_grad_()
    gradient = torch.autograd.grad(criterion(o), o, create_graph=True, materialize_grads=True)
    output_hessian = _pullback(gradient, [o], keep=True)
    return _sandwich(params, outputs, lambda x: output_hessian([x])[0], **how)


def fisher(params: Sequence[Tensor], logits: Tensor, shares: Tensor, **how: Any) -> Product:
    """v -> sum_i s_i J_i^T (diag p_i - p_i p_i^T) J_i v, p = softmax(logits), (n, K), s: (n,): the Fisher matrix."""
    z = logits.detach()

    def covariance(x: Tensor) -> Tensor:  # of a large vocabulary neither p nor p x is held for more than a few rows
        result = torch.empty_like(x)
        for rows, s, tangent, out in zip(*(t.split(ROWS) for t in (z, shares, x, result)), strict=True):
            p = rows.softmax(dim=1)
            torch.mul(p, tangent, out=out)
            out.sub_(p.mul_(out.sum(dim=1, keepdim=True))).mul_(s[:, None])
        return result

    return _sandwich(params, logits, covariance, **how)


def fisher_mc(params: Sequence[Tensor], logits: Tensor, shares: Tensor, uniforms: Tensor, **how: Any) -> Product:
    """v -> sum_i s_i mean_k g_ik g_ik^T v, g_ik = J_i^T (p_i - e_y), with labels y ~ p_i = softmax(logits_i): those at
    which the cumulative probabilities pass uniforms_ik, (n, draws), on [0, 1)."""
    p = logits.detach().softmax(dim=1)
    cumulative = p.double().cumsum(dim=1)
    draw = uniforms.to(p.device) * cumulative[:, -1:]  # the last sum is 1 only to rounding
    labels = torch.searchsorted(cumulative, draw, right=True).clamp(max=p.shape[1] - 1)

    def covariance(x: Tensor) -> Tensor:
        along = ((p * x).sum(dim=1, keepdim=True) - x.gather(1, labels)) / labels.shape[1]  # (p - e_y) x
        return (p * along.sum(dim=1, keepdim=True)).scatter_add(1, labels, -along) * shares[:, None]

    return _sandwich(params, logits, covariance, **how)


def empirical_fisher(params: Sequence[Tensor], losses: Tensor, shares: Tensor, **how: Any) -> Product:
    """v -> sum_i s_i g_i g_i^T v, g_i = d losses_i / dw, losses, s: (n,), one for each example."""
    return _sandwich(params, losses, lambda x: x * shares, **how)


def _sandwich(
    params: Sequence[Tensor],
    f: Tensor,
    middle: Callable[[Tensor], Tensor],
    *,
    keep: bool,
    push: Callable[[Sequence[Tensor]], Tensor] | None = None,
) -> Product:
    """v -> J^T M J v, J = df/dw. J v is `push`(v), or the derivative of J^T u, which is linear in u: u = 0 will do."""
    pull = _pullback([f], params, keep=keep)
    if push is not None:
        return lambda v: pull([middle(push(v))])
    u = f.detach().new_zeros(()).expand_as(f).requires_grad_()
    pulled = torch.autograd.grad(f, params, u, create_graph=True, materialize_grads=True)
    derivative = _pullback(pulled, [u], keep=True)
    return lambda v: pull([middle(derivative(v)[0])])


def _pullback(outputs: Sequence[Tensor], inputs: Sequence[Tensor], *, keep: bool) -> Product:
    """v -> d/d inputs <outputs, v>; zero where the outputs do not depend on an input."""
    live = [i for i, o in enumerate(outputs) if o.requires_grad]

    def product(v: Sequence[Tensor]) -> list[Tensor]:
        if not live:
            return [torch.zeros_like(w) for w in inputs]
        tangents = [v[i].to(outputs[i].dtype) for i in live]
        used = [outputs[i] for i in live]
        return list(torch.autograd.grad(used, inputs, tangents, retain_graph=keep, materialize_grads=True))

    return product
