"""Checks of criteria: whether one is a mean over examples, takes softmax outputs, can be evaluated in pieces."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

Criterion = Callable[[Any, Any], Tensor]
Forward = Callable[[nn.Module, Any], tuple[Any, Any]]

A_MEAN = "use reduction='mean' (batches are weighted by their size), or add .mean()"


def check(criterion: Any, normalize_logits: bool) -> None:
    """Raises ValueError for what can be refused before the first batch."""
    if criterion is None and normalize_logits:
        raise ValueError(
            "normalize_logits=True needs a criterion of the logits: the model computes `outputs.loss` from raw ones"
        )
    if criterion is not None and not callable(criterion):
        raise ValueError(f"criterion must be a callable (outputs, target) -> mean loss, or None, got {criterion!r}")
    reduction = getattr(criterion, "reduction", getattr(criterion, "keywords", {}).get("reduction", "mean"))
    if reduction in ("sum", "none"):
        raise ValueError(f"criterion must return the mean over the batch, got reduction={reduction!r}; {A_MEAN}")


def value(criterion: Criterion | None, outputs: Any, target: Any, *, needs_gradient: bool = True) -> Tensor:
    """The loss of a batch, 0-d; without a criterion that of the model, `outputs.loss`."""
    if criterion is None and not hasattr(outputs, "loss"):
        raise ValueError(f"criterion=None takes outputs.loss, and the model returns {type(outputs).__name__}: pass one")
    check_shapes(criterion, outputs, target)
    loss = outputs.loss if criterion is None else criterion(outputs, target)
    if not isinstance(loss, Tensor) or loss.ndim:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"criterion must return the mean over the batch, a 0-d tensor, got {got}; {A_MEAN}")
    if needs_gradient and torch.is_grad_enabled() and not loss.requires_grad:
        raise ValueError("the loss does not depend on the trainable parameters: is there a detach() or no_grad()?")
    if loss.requires_grad:  # a loss that is not finite has no derivatives, though autograd may give some
        constant = loss.detach()
        loss.register_hook(lambda g: g + 0 * constant)
    return loss


def equal_to_rounding(a: float, b: float, dtype: torch.dtype) -> bool:
    """Whether two passes of one function may give a and b; also where both are not finite."""
    if not (math.isfinite(a) and math.isfinite(b)):
        return math.isfinite(a) == math.isfinite(b)
    return abs(a - b) <= min(1e3 * torch.finfo(dtype).eps, 0.05) * max(abs(a), abs(b), 1e-3)


def default_forward(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    """(outputs, target) of a batch (inputs..., target), of a mapping with "labels", or of an object with `y`."""
    if isinstance(batch, Mapping) and "labels" in batch:
        return model(**batch), batch["labels"]
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        *inputs, target = batch
        if isinstance(target, (list, tuple)) and target and isinstance(target[0], Mapping):
            raise ValueError(DETECTION)
        return model(*inputs), target
    if not isinstance(batch, (Tensor, Mapping, tuple, list)) and isinstance(getattr(batch, "y", None), Tensor):
        return model(batch), batch.y
    got = f"a mapping of {list(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
    raise ValueError(f"a batch is (inputs..., target) or a mapping with 'labels', got {got}: pass forward=")


DETECTION = (
    "targets are mappings, as of detection models, which give their losses in train mode alone: pass "
    "forward=lambda model, batch: (model.train()(*batch), None) and criterion=lambda losses, _: sum(losses.values())"
)


def check_shapes(criterion: Criterion | None, outputs: Any, target: Any) -> None:
    """Raises ValueError for logits of tokens, which cross-entropy takes in another order."""
    kind = isinstance(criterion, (nn.CrossEntropyLoss, nn.NLLLoss))
    if not kind or not (isinstance(outputs, Tensor) and isinstance(target, Tensor)) or outputs.ndim < 3:
        return
    if outputs.shape[:-1] == target.shape and outputs.shape[:1] + outputs.shape[2:] != target.shape:
        raise ValueError(
            f"logits have the shape {tuple(outputs.shape)} and labels {tuple(target.shape)}: criterion=None takes the "
            "loss of the model itself; of the next token it is forward=lambda model, batch: "
            "(model(**batch).logits[:, :-1].flatten(0, 1), batch['labels'][:, 1:].flatten())"
        )


def normalized(outputs: Any) -> Tensor:
    """(o - mean o) / ||o - mean o||_2 of each example (arXiv:2302.07011)."""
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.shape[1] < 2:
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(f"normalize_logits=True needs outputs of shape (n, K), K >= 2, got {got}")
    centered = outputs - outputs.mean(dim=1, keepdim=True)
    return centered / torch.linalg.vector_norm(centered, dim=1, keepdim=True).clamp(min=1e-10)


def check_matrix(criterion: Criterion | None, outputs: Any, matrix: str) -> None:
    """Raises ValueError where the criterion and the outputs have no such matrix."""
    if criterion is None or not isinstance(outputs, Tensor) or not outputs.ndim:
        got = "no criterion" if criterion is None else f"outputs of type {type(outputs).__name__}"
        got = "outputs that are the loss itself" if isinstance(outputs, Tensor) and criterion is not None else got
        remedy = "pass one, such as nn.CrossEntropyLoss(), or use matrix='hessian'"
        raise ValueError(f"matrix={matrix!r} needs a criterion of outputs that are one tensor, got {got}: {remedy}")
    if matrix in ("fisher", "fisher_mc"):
        other_loss = isinstance(criterion, nn.modules.loss._Loss) and not isinstance(criterion, nn.CrossEntropyLoss)
        if other_loss or outputs.ndim != 2:
            got = f"{type(criterion).__name__} of outputs of shape {tuple(outputs.shape)}"
            raise ValueError(f"matrix={matrix!r} is that of softmax(outputs), (n, K), got {got}; use matrix='ggn'")


def same_outputs(few: Any, many: Any) -> bool:
    """Whether examples have the same outputs in a small and in a large piece; if not, they act on each other."""
    if not all(isinstance(x, Tensor) and x.ndim for x in (few, many)) or len(few) > len(many):
        return False
    many = many[: len(few)]
    if few.shape != many.shape:
        return False
    tolerance = 1e-3 * float(many.nan_to_num(0, 0, 0).abs().max())
    return bool(torch.isclose(few, many, rtol=0, atol=tolerance, equal_nan=True).all())


def shares(criterion: Criterion, pieces: Sequence[tuple[Any, Any]]) -> list[float] | None:
    """s_k with c(whole) = sum_k s_k c(piece_k), for pieces (outputs, target) of the examples of a batch.

    For a mean over examples s_k is the piece's part of them; with weights of classes or ignored labels it is its part
    of the weights; for a sum it is 1. They are read off the gradients with respect to the outputs, so that an example
    with another weight shows wherever it is. None where the criterion is no such mean (losses of pairs), or the pieces
    cannot be joined.
    """
    if not all(isinstance(x, Tensor) and x.ndim for piece in pieces for x in piece):
        return None
    if len({(o.shape[1:], t.shape[1:]) for o, t in pieces}) > 1 or any(len(o) != len(t) for o, t in pieces):
        return None
    whole = gradient_of(criterion, torch.cat([o for o, _ in pieces]), torch.cat([t for _, t in pieces])).double()
    if not (whole.any() and whole.isfinite().all()):  # a step function, such as the share of errors; a diverged model
        return None
    tolerance = 1e-5 * float(whole.abs().max())
    result = []
    for (o, t), part in zip(pieces, whole.split([len(o) for o, _ in pieces]), strict=True):
        g = gradient_of(criterion, o, t).double().nan_to_num()  # nan: all labels of the piece are ignored
        square = float(g.square().sum())
        share = float((part * g).sum()) / square if square else 0.0
        if not torch.isclose(part, share * g, rtol=1e-4, atol=tolerance, equal_nan=True).all():
            return None
        result.append(share)
    return result


def gradient_of(criterion: Criterion, outputs: Tensor, target: Any) -> Tensor:
    """The gradient of the criterion with respect to the outputs."""
    with torch.enable_grad():
        o = outputs.detach().requires_grad_()
        loss = criterion(o, target)
        return torch.autograd.grad(loss, o, materialize_grads=True)[0] if loss.requires_grad else torch.zeros_like(o)
