"""Norms of the weights in the metric of the curvature: the Fisher-Rao norm, and relative flatness of a layer."""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from sam_optim.core.random import Stream
from sam_optim.core.results import Estimate
from sam_optim.loss import SAMPLED, Loss
from sam_optim.measures.shared import Progress, Ticks, batch_mean, batch_weights, checked, estimate, redrawn, settings

EXACT = 2048  # products up to which relative flatness is computed without drawing


@checked
def fisher_rao_norm(loss: Loss, *, matrix: str = "fisher", progress: Progress | None = None) -> Estimate:
    """The squared length of the weights in the Fisher metric.

        ||w||_fr^2 = w^T F w,   F = E_x E_{y ~ softmax(outputs)} grad log p(y|x) grad log p(y|x)^T

    How strongly the predictions react to a common relative change of all weights: to leading order, the KL divergence
    after w -> (1 + eps) w is eps^2 / 2 times this. It does not change where the weights are rescaled and the function
    is not (positive factors between ReLU layers, before normalization), because w and F change inversely.

    Args:
        loss: L with a criterion of logits (n, K), for the exact Fisher matrix. w are its trainable parameters.
        matrix: "fisher"; "ggn", the same for cross-entropy, and for other criteria defined as well; or
            "empirical_fisher", with the labels of the data instead of those of the model: another number.
        progress: called with (batches done, number of batches).

    Returns:
        `value` in units of L (nats). `stderr` over batches; nan for one. `details`: `norm`, its square root;
        `batch_values`. One product with F in all.

    Raises:
        ValueError: an unknown matrix, or one that the criterion does not have.

    Source: arXiv:1711.01530.
    """
    if matrix not in ("fisher", "ggn", "empirical_fisher"):
        raise ValueError(f"matrix must be 'fisher', 'ggn' or 'empirical_fisher', got {matrix!r}")
    tick = Ticks(progress, loss.num_batches)

    def form(single: Loss) -> float:
        w = [p.detach() for p in single.params]
        with single.curvature(matrix) as product:
            value = _inner(w, product(w))
        tick()
        return value

    values = loss.over_batches(form)
    value, stderr = batch_mean(loss, values)
    return estimate(
        loss,
        value,
        stderr,
        num_samples=loss.num_batches,
        details={"norm": math.sqrt(max(value, 0.0)) if math.isfinite(value) else math.nan, "batch_values": values},
        settings=settings("fisher_rao_norm", loss, matrix=matrix),
    )


@checked
def relative_flatness(
    loss: Loss,
    layer: str | nn.Module | Tensor,
    *,
    matrix: str = "hessian",
    num_probes: int = 100,
    exact: bool | None = None,
    seed: int = 0,
    progress: Progress | None = None,
) -> Estimate:
    """The curvature of a layer, weighted with the products of its neurons' weights.

        kappa(W) = sum_{s,s'} <W_s, W_s'> tr H_{s,s'}
                 = tr (C^(1/2) ⊗ I) H (C^(1/2) ⊗ I),   C = W W^T

    W_s: the weights into neuron s (row s; for a convolution, of filter s, flattened), H_{s,s'}: the block of the
    Hessian with respect to W_s and W_s'. Small is flat. Rescaling the whole layer by a positive factor, and the next
    one by its inverse, does not change it; rescaling single neurons does, as far as their rows are not orthogonal.

    Args:
        loss: L at the weights w.
        layer: the name of a parameter ("fc.weight") or of a module with a `weight`, or the module or parameter itself.
        matrix: "hessian", or another of `hessian_eigenvalues`.
        num_probes: random vectors of the estimate, with entries +1 or -1: one product each.
        exact: no draws, but rank(W) times the inputs of a neuron products; None: where these are at most 2048. Never of
            "fisher_mc", whose labels are drawn.
        seed: of the draws.
        progress: called with (products done, total), over all batches.

    Returns:
        `value` in units of L. `stderr` over probes, on these data; 0 where exact. `details`: `exact`, `num_products`,
        `batch_values`, `stderr_batches` (how far it would move with other batches; nan for one batch) and `rank` of W.

    Raises:
        ValueError: a layer that the model does not have, or whose weight has fewer than two dimensions or is frozen;
            num_probes < 2.

    Only the layer is differentiated twice, and each batch keeps its graph for all vectors: a product of a late layer
    costs a small part of one with the whole Hessian. Source: arXiv:2001.00939.
    """
    if num_probes < 2:
        raise ValueError(f"num_probes must be >= 2 (one probe has no standard error), got {num_probes}")
    name, weight = _weight(loss, layer)
    rows = weight.detach().flatten(1).double().cpu()
    root = _root(rows, torch.finfo(weight.dtype).eps)
    rank = root.shape[1]
    total = rank * rows.shape[1]
    exact = matrix not in SAMPLED and (total <= EXACT if exact is None else exact)
    num = total if exact else num_probes
    tick = Ticks(progress, num * loss.num_batches)

    def vectors() -> Iterator[Tensor]:
        stream = Stream(seed)
        for i in range(num):
            if exact:
                v = torch.zeros_like(rows)
                v[:, i % rows.shape[1]] = root[:, i // rows.shape[1]]
            else:
                v = root @ stream.rademacher_like(root.new_empty(rank, rows.shape[1]))
            yield v.view(weight.shape).to(weight)

    def forms(single: Loss) -> list[float]:
        values = []
        with redrawn(single.block(name), matrix, seed) as product:
            for v in vectors():
                values.append(_inner([v], product([v])))
                tick()
        return values

    values = loss.over_batches(forms)
    table = torch.tensor(values, dtype=torch.float64).view(len(values), num)
    batch_values = (table.sum(dim=1) if exact else table.mean(dim=1)).tolist()
    value, stderr_batches = batch_mean(loss, batch_values)
    over_probes = table.T @ batch_weights(loss)
    stderr = 0.0 if exact else float(over_probes.std()) / math.sqrt(num)
    return estimate(
        loss,
        value,
        stderr,
        num_samples=num,
        details={
            "exact": exact,
            "num_products": num,
            "rank": rank,
            "batch_values": batch_values,
            "stderr_batches": stderr_batches,
        },
        settings=settings(
            "relative_flatness", loss, layer=name, matrix=matrix, num_probes=num_probes, exact=exact, seed=seed
        ),
    )


def _root(rows: Tensor, eps: float) -> Tensor:
    """R with R R^T = rows rows^T, and as many columns as the rank; nan, as one column, where a weight is not finite."""
    if not rows.isfinite().all():
        return torch.full_like(rows[:, :1], math.nan)
    u, s, _ = torch.linalg.svd(rows, full_matrices=False)
    rank = int((s > s[0] * max(rows.shape) * eps).sum())
    return u[:, :rank] * s[:rank]


def _weight(loss: Loss, layer: str | nn.Module | Tensor) -> tuple[str, Tensor]:
    """The name and the weight of the layer, which is one of `loss.params`."""
    named = {name: p for name, p in loss.model.named_parameters() if any(p is q for q in loss.params)}
    fitting = [name for name, p in named.items() if p.ndim >= 2]
    if isinstance(layer, nn.Module):
        layer = getattr(layer, "weight", layer)
    if isinstance(layer, str):
        name_of_weight = layer if layer in named else f"{layer}.weight"
    else:
        name_of_weight = next((name for name, p in named.items() if p is layer), "")
    if name_of_weight not in named:
        got = repr(layer) if isinstance(layer, str) else type(layer).__name__
        raise ValueError(f"layer must be a trainable weight of the model, one of {', '.join(fitting)}; got {got}")
    if named[name_of_weight].ndim < 2:
        raise ValueError(
            f"relative flatness needs a weight of two dimensions or more, one of {', '.join(fitting)}; "
            f"{name_of_weight} has shape {tuple(named[name_of_weight].shape)}"
        )
    return name_of_weight, named[name_of_weight]


def _inner(a: list[Tensor], b: list[Tensor]) -> float:
    return math.fsum(float((x.double() * y.double()).sum()) for x, y in zip(a, b, strict=True))
