"""What is asked of a criterion, and what can be seen of it: a mean over examples, of softmax outputs, or neither."""

from __future__ import annotations

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
        raise ValueError("normalize_logits=True needs a criterion of the logits: `outputs.loss` is made of raw ones")
    if criterion is not None and not callable(criterion):
        raise ValueError(f"criterion must be a callable (outputs, target) -> mean loss, or None, got {criterion!r}")
    reduction = getattr(criterion, "reduction", getattr(criterion, "keywords", {}).get("reduction", "mean"))
    if reduction in ("sum", "none"):
        raise ValueError(f"criterion must return the mean over the batch, got reduction={reduction!r}; {A_MEAN}")


def value(criterion: Criterion | None, outputs: Any, target: Any) -> Tensor:
    """The loss of a batch, 0-d; without a criterion that of the model, `outputs.loss`."""
    loss = outputs.loss if criterion is None else criterion(outputs, target)
    if not isinstance(loss, Tensor) or loss.ndim:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"criterion must return the mean over the batch, a 0-d tensor, got {got}; {A_MEAN}")
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise ValueError("the loss does not depend on the trainable parameters: is there a detach() or no_grad()?")
    return loss


def default_forward(model: nn.Module, batch: Any) -> tuple[Any, Any]:
    """(outputs, target) of a batch (inputs..., target), or of a mapping with "labels"."""
    if isinstance(batch, Mapping) and "labels" in batch:
        return model(**batch), batch["labels"]
    if isinstance(batch, (tuple, list)) and len(batch) > 1:
        *inputs, target = batch
        return model(*inputs), target
    got = f"a mapping of {list(batch)}" if isinstance(batch, Mapping) else type(batch).__name__
    raise ValueError(f"a batch is (inputs..., target) or a mapping with 'labels', got {got}: pass forward=")


def normalized(outputs: Any) -> Tensor:
    """(o - mean o) / ||o - mean o||_2 of each example (arXiv:2302.07011)."""
    if not isinstance(outputs, Tensor) or outputs.ndim != 2 or outputs.shape[1] < 2:
        got = tuple(outputs.shape) if isinstance(outputs, Tensor) else type(outputs).__name__
        raise ValueError(f"normalize_logits=True needs outputs of shape (n, K), K >= 2, got {got}")
    centred = outputs - outputs.mean(dim=1, keepdim=True)
    return centred / torch.linalg.vector_norm(centred, dim=1, keepdim=True).clamp(min=1e-10)


def check_matrix(criterion: Criterion | None, outputs: Any, matrix: str) -> None:
    """Raises ValueError where the criterion and the outputs have no such matrix."""
    if criterion is None or not isinstance(outputs, Tensor):
        got = "no criterion" if criterion is None else f"outputs of type {type(outputs).__name__}"
        remedy = "pass one, such as nn.CrossEntropyLoss(), or use matrix='hessian'"
        raise ValueError(f"matrix={matrix!r} needs a criterion of outputs that are one tensor, got {got}: {remedy}")
    if matrix in ("fisher", "fisher_mc"):
        other_loss = isinstance(criterion, nn.modules.loss._Loss) and not isinstance(criterion, nn.CrossEntropyLoss)
        if other_loss or outputs.ndim != 2:
            got = f"{type(criterion).__name__} of outputs of shape {tuple(outputs.shape)}"
            raise ValueError(f"matrix={matrix!r} is that of softmax(outputs), (n, K), got {got}; use matrix='ggn'")


def same_outputs(few: Any, many: Any) -> bool:
    """Of the same examples in a small and in a large piece: different values mean that examples act on each other."""
    if not (isinstance(few, Tensor) and isinstance(many, Tensor) and len(few) <= len(many)):
        return False
    many = many[: len(few)]
    if few.shape != many.shape:
        return False
    return bool(torch.isclose(few, many, rtol=0, atol=1e-3 * float(many.abs().max()), equal_nan=True).all())


def is_mean_over_examples(criterion: Criterion, pieces: Sequence[tuple[int, Tensor, Any]]) -> bool:
    """Whether the criterion of the whole batch is the mean of those of its pieces, (examples, outputs, target): not so
    with weights of classes, labels that are ignored, or losses of pairs. Compared are gradients with respect to the
    outputs, so that an example with another weight shows wherever it is."""
    if not all(isinstance(x, Tensor) and x.ndim and len(x) == n for n, *both in pieces for x in both):
        return False
    total = sum(n for n, _, _ in pieces)
    outputs = torch.cat([outputs for _, outputs, _ in pieces])
    whole = _gradient(criterion, outputs, torch.cat([target for _, _, target in pieces]))
    parts = torch.cat([n / total * _gradient(criterion, outputs, target) for n, outputs, target in pieces])
    return bool(torch.isclose(whole, parts, rtol=1e-4, atol=1e-5 * float(whole.abs().max()), equal_nan=True).all())


def _gradient(criterion: Criterion, outputs: Tensor, target: Any) -> Tensor:
    with torch.enable_grad():
        o = outputs.detach().requires_grad_()
        return torch.autograd.grad(criterion(o, target), o, materialize_grads=True)[0]
