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


def value(criterion: Criterion | None, outputs: Any, target: Any, *, needs_gradient: bool = True) -> Tensor:
    """The loss of a batch, 0-d; without a criterion that of the model, `outputs.loss`."""
    loss = outputs.loss if criterion is None else criterion(outputs, target)
    if not isinstance(loss, Tensor) or loss.ndim:
        got = f"shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
        raise ValueError(f"criterion must return the mean over the batch, a 0-d tensor, got {got}; {A_MEAN}")
    if needs_gradient and torch.is_grad_enabled() and not loss.requires_grad:
        raise ValueError("the loss does not depend on the trainable parameters: is there a detach() or no_grad()?")
    return loss


def equal_to_rounding(a: float, b: float, dtype: torch.dtype) -> bool:
    """Whether two passes of one function may give a and b; also where both are not finite."""
    return not abs(a - b) > min(1e3 * torch.finfo(dtype).eps, 0.05) * max(abs(a), abs(b), 1e-3)


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
    whole = _gradient(criterion, torch.cat([o for o, _ in pieces]), torch.cat([t for _, t in pieces])).double()
    if not whole.any():  # a step function of the outputs, such as the share of errors
        return None
    tolerance = 1e-5 * float(whole.abs().max())
    result = []
    for (o, t), part in zip(pieces, whole.split([len(o) for o, _ in pieces]), strict=True):
        g = _gradient(criterion, o, t).double().nan_to_num()  # nan: all labels of the piece are ignored
        square = float(g.square().sum())
        share = float((part * g).sum()) / square if square else 0.0
        if not torch.isclose(part, share * g, rtol=1e-4, atol=tolerance, equal_nan=True).all():
            return None
        result.append(share)
    return result


class Weigher:
    """What the means of batches were taken over: how much each batch weighs in the mean over all of them.

    `rule` says it in words. "examples": their number. "counted labels": the labels that are not ignored (also of
    Hugging Face models: those that are not -100, shifted by one in causal language models). "weights of classes": the
    weights of the labels. "elements": the entries of the targets. "criterion": what the criterion itself gives to a
    batch when it is joined with a few examples of the first one.

    Args:
        criterion: of the loss. outputs, target: of the first batch, for what only examples can show.
    """

    def __init__(self, criterion: Criterion | None, outputs: Any, target: Any):
        self.rule = "examples"
        self._criterion, self._shift = criterion, 0
        self._reference: tuple[Tensor, Tensor] | None = None
        keywords = getattr(criterion, "keywords", {})  # of a functools.partial
        function = getattr(criterion, "func", criterion)
        is_function = function in (nn.functional.cross_entropy, nn.functional.nll_loss)
        if is_function or isinstance(criterion, (nn.CrossEntropyLoss, nn.NLLLoss)):
            weight = keywords.get("weight", getattr(criterion, "weight", None))
            self._class_weights: Tensor | None = weight
            self._ignored = keywords.get("ignore_index", getattr(criterion, "ignore_index", -100))
            self.rule = "counted labels" if weight is None else "weights of classes"
        elif criterion is None:
            self._class_weights, self._ignored = None, -100
            if (shift := _shift_of_labels(outputs, target)) is not None:
                self.rule, self._shift = "counted labels", shift
        elif isinstance(criterion, nn.modules.loss._Loss):
            self.rule = "elements" if isinstance(criterion, _OVER_ELEMENTS) else "examples"
        elif isinstance(outputs, Tensor) and isinstance(target, Tensor) and len(outputs) == len(target) > 1:
            half = len(outputs) // 2
            halves = [(outputs[:half], target[:half]), (outputs[half:], target[half:])]
            parts = shares(criterion, halves)
            if parts is not None and all(abs(share - 1) < 1e-3 for share in parts):
                raise ValueError(
                    f"the criterion is a sum over the batch, not a mean: on half a batch it is half as large; {A_MEAN}"
                )
            if parts is not None and not target.is_floating_point():
                self.rule, self._reference = "criterion", (outputs[:FEW].detach(), target[:FEW])

    def __call__(self, target: Any, n: int) -> float:
        if not isinstance(target, Tensor):
            return n
        if self.rule == "elements":
            return target.numel()
        if self._reference is not None:
            return self._joined(target, n, *self._reference)
        if self.rule == "examples" or target.is_floating_point():
            return n
        total = float(self._weights_of(target[:, self._shift :] if self._shift else target).sum())
        return int(total) if self._class_weights is None else total

    def _weights_of(self, labels: Tensor) -> Tensor:
        """Of each label, float64: 0 where it is ignored."""
        counted = labels != self._ignored
        if self._class_weights is None:
            return counted.double()
        return self._class_weights.to(labels.device, torch.float64)[torch.where(counted, labels, 0)] * counted

    def of_examples(self, outputs: Tensor, target: Any) -> Tensor:
        """The part of each example in the mean of a batch, (n,); they add up to 1."""
        n = len(outputs)
        if isinstance(target, Tensor) and target.ndim == 1 and not target.is_floating_point():
            if self.rule in ("counted labels", "weights of classes"):
                parts = self._weights_of(target).to(outputs)
                return parts / parts.sum()
            if self.rule == "criterion" and self._criterion is not None:
                pieces = list(zip(outputs.detach().split(1), target.split(1), strict=True))
                if (parts_of_mean := shares(self._criterion, pieces)) is not None:
                    return outputs.new_tensor(parts_of_mean)
        return outputs.new_full((n,), 1 / n)

    def _joined(self, target: Tensor, n: int, outputs: Tensor, labels: Tensor) -> float:
        """With stand-ins for its outputs, which have no part in what a mean is taken over."""
        assert self._criterion is not None
        stand_in = outputs[torch.arange(n, device=outputs.device) % len(outputs)]
        parts = shares(self._criterion, [(outputs, labels), (stand_in, target)])
        return n if parts is None or not parts[0] else len(outputs) * parts[1] / parts[0]


FEW = 16  # examples of the first batch with which others are compared
_OVER_ELEMENTS = (
    nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss, nn.PoissonNLLLoss,
    nn.GaussianNLLLoss, nn.SoftMarginLoss,
)  # fmt: skip


def _shift_of_labels(outputs: Any, labels: Any) -> int | None:
    """0 or 1 where `outputs.loss` is the mean cross-entropy of labels, or of those of the next token, that are not
    -100; None where it is neither."""
    logits: Any = getattr(outputs, "logits", None)
    loss: Any = getattr(outputs, "loss", None)
    if not all(isinstance(x, Tensor) for x in (logits, labels, loss)) or labels.is_floating_point():
        return None
    if logits.shape[:-1] != labels.shape:
        return None
    for shift in (0, 1) if labels.ndim > 1 else (0,):
        kept = logits[:, : logits.shape[1] - shift] if shift else logits
        wanted = labels[:, shift:] if shift else labels
        value = nn.functional.cross_entropy(kept.flatten(0, -2).float(), wanted.flatten(), ignore_index=-100)
        if torch.isclose(value, loss.float(), rtol=1e-3):
            return shift
    return None


def _gradient(criterion: Criterion, outputs: Tensor, target: Any) -> Tensor:
    with torch.enable_grad():
        o = outputs.detach().requires_grad_()
        loss = criterion(o, target)
        return torch.autograd.grad(loss, o, materialize_grads=True)[0] if loss.requires_grad else torch.zeros_like(o)
