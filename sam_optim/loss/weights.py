"""The weight of each batch, and of each row of outputs, in the mean over all data."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor, nn

from sam_optim.core.scalars import shown
from sam_optim.loss.batches import tensors
from sam_optim.loss.criterion import A_MEAN, Criterion, equal_to_rounding, gradient_of, shares

FEW = 16  # examples of the first batch with which others are compared
_OVER_ELEMENTS = (
    nn.MSELoss, nn.L1Loss, nn.SmoothL1Loss, nn.HuberLoss, nn.BCELoss, nn.BCEWithLogitsLoss, nn.PoissonNLLLoss,
    nn.GaussianNLLLoss, nn.SoftMarginLoss,
)  # fmt: skip


class Weigher:
    """W_b of a batch, from its labels.

    `rule` says what it is. "examples": their number. "counted labels": the labels that are not ignored (also of
    Hugging Face models: those that are not -100, shifted by one in causal language models). "weights of classes": the
    weights of the labels. "elements": the entries of the targets. "criterion": what the criterion itself gives to a
    batch when it is joined with a few examples of the first one.

    Args:
        criterion: of the loss. outputs, target: of the first examples, for what only they can show.

    Attributes:
        is_sure: whether the mean over joined batches is the mean of theirs with these weights.
        is_mean: whether it can be a mean at all. A function of one, its exponential say, gives no batch a weight.
        is_blind: whether ignored labels would go unseen: the loss is none that is known, or of outputs of another form.
        output_bytes: of the outputs of an example.
    """

    def __init__(self, criterion: Criterion | None, outputs: Any, target: Any):
        self.rule, self.is_sure, self.is_mean, self.is_blind = "examples", True, True, False
        self._criterion, self._shift = criterion, 0
        logits = getattr(outputs, "logits", outputs)
        self.output_bytes = logits.nbytes // max(len(logits), 1) if isinstance(logits, Tensor) and logits.ndim else 0
        self._reference: tuple[Tensor, Tensor] | None = None
        keywords = getattr(criterion, "keywords", {})  # of a functools.partial
        function = getattr(criterion, "func", criterion)
        kind = (
            type(criterion) if type(criterion).__module__ == "torch.nn.modules.loss" else None
        )  # a subclass may differ
        cross_entropy = function is nn.functional.cross_entropy or kind is nn.CrossEntropyLoss
        self._class_weights: Tensor | None = keywords.get("weight", getattr(criterion, "weight", None))
        if isinstance(w := self._class_weights, Tensor) and not (allowed := (w >= 0) & w.isfinite()).all():
            i = int(allowed.to(torch.int8).argmin())
            raise ValueError(
                f"class {i} has the weight {float(w[i]):.8g} in the criterion: weights must be finite and >= 0"
            )
        self._ignored: int = keywords.get("ignore_index", getattr(criterion, "ignore_index", -100))
        self._smoothing: float = keywords.get("label_smoothing", getattr(criterion, "label_smoothing", 0.0))
        self._is_cross_entropy = cross_entropy
        if cross_entropy or function is nn.functional.nll_loss or kind is nn.NLLLoss:
            self.rule = "counted labels" if self._class_weights is None else "weights of classes"
        elif criterion is None:
            if (shift := _shift_of_labels(outputs, target)) is not None:
                self.rule, self._shift = "counted labels", shift
            else:
                self.is_sure, self.is_blind = False, True
        elif kind is not None:
            self.rule = "elements" if kind in _OVER_ELEMENTS else "examples"
        else:
            self._look_at(criterion, outputs, target)

    def _look_at(self, criterion: Criterion, outputs: Any, target: Any) -> None:
        self.is_sure, self.is_blind = False, True
        if not all(isinstance(x, Tensor) and x.ndim for x in (outputs, target)) or not len(outputs) == len(target) > 1:
            return
        half = len(outputs) // 2
        # halves that differ as much as they can: the examples with the smallest gradients, and those with the largest
        rows = gradient_of(criterion, outputs, target).reshape(len(outputs), -1).norm(dim=1).argsort()
        halves = [(outputs[i], target[i]) for i in (rows[:half], rows[half:])]
        parts = shares(criterion, halves)
        if parts is None:
            return
        twice = shares(criterion, [halves[0 if parts[0] else 1]] * 2)  # a half whose labels are all ignored has no part
        if twice and all(abs(share - 1) < 1e-3 for share in twice):
            raise ValueError(A_SUM)
        self.is_mean = _is_mean(criterion, (outputs, target), halves, parts)
        if not self.is_mean:
            return
        self.is_blind = False
        by_number = [half / len(outputs), 1 - half / len(outputs)]
        self.is_sure = not target.is_floating_point() or all(
            abs(a - b) < 1e-3 for a, b in zip(parts, by_number, strict=True)
        )
        self._reference = outputs[:FEW].detach(), target[:FEW]
        if not target.is_floating_point():
            self.rule = "criterion"

    def __call__(self, target: Any, n: int) -> float:
        if self.is_blind and any(bool((x == -100).any()) for x in tensors(target) if not x.is_floating_point()):
            raise ValueError(
                "some labels are -100, and the loss is no mean over the others that can be seen: say with "
                "batch_weights= what the loss of each batch is a mean over"
            )
        if not isinstance(target, Tensor):
            return n
        if self.rule == "elements":
            return target.numel()
        if self._reference is not None:
            if not target.is_floating_point() or target.shape[1:] != self._reference[1].shape[1:]:
                self.rule = "criterion"
                return self._joined(target, n, *self._reference)
            return n
        if self.rule == "examples":
            return n
        if target.is_floating_point():  # probabilities of classes
            return target.numel() // target.shape[1]
        total = float(self._weights_of(target[:, self._shift :] if self._shift else target).sum())
        return int(total) if self._class_weights is None else total

    def _weights_of(self, labels: Tensor) -> Tensor:
        """The weight of each label, float64: 0 where it is ignored."""
        counted = labels != self._ignored
        if self._class_weights is None:
            return counted.double()
        return self._class_weights.to(labels.device, torch.float64)[torch.where(counted, labels, 0)] * counted

    @property
    def reads_labels(self) -> bool:
        """Whether the labels alone say what a batch weighs."""
        return self.rule in ("counted labels", "weights of classes")

    @property
    def may_differ(self) -> bool:
        """Whether a batch may weigh something else than the number of its examples."""
        return self.rule != "examples" or self.is_blind or self._reference is not None

    def of_examples(self, outputs: Tensor, target: Any) -> Tensor:
        """The part of each example in the mean of a batch, (n,); they add up to 1."""
        n = len(outputs)
        if isinstance(target, Tensor) and target.ndim == 1 and not target.is_floating_point():
            if self.reads_labels:
                parts = self._weights_of(target).to(outputs)
                return parts / parts.sum()
            if self.rule == "criterion" and self._criterion is not None:
                pieces = list(zip(outputs.detach().split(1), target.split(1), strict=True))
                if (parts_of_mean := shares(self._criterion, pieces)) is not None:
                    return outputs.new_tensor(parts_of_mean)
        return outputs.new_full((n,), 1 / n)

    def cross_entropy_rows(self, target: Any, num_classes: int) -> Tensor | None:
        """s, (N,), with criterion = sum_i s_i logsumexp(o_i) + a linear function, over the N rows of logits o_i; so the
        Hessian of row i is s_i (diag p_i - p_i p_i^T). None: no cross-entropy."""
        if not self._is_cross_entropy or not isinstance(target, Tensor):
            return None
        weights = target.new_ones(num_classes, dtype=torch.float64)
        if self._class_weights is not None:
            weights = self._class_weights.to(weights)
        if target.is_floating_point():  # probabilities
            rows = (rows_of(target).double() @ weights) * (1 - self._smoothing)
            return (rows + self._smoothing * weights.mean()) / len(rows)
        of_labels = self._weights_of(target).flatten()
        smoothed = (1 - self._smoothing) * of_labels + self._smoothing * weights.mean() * (
            target.flatten() != self._ignored
        )
        return smoothed / of_labels.sum()

    def _joined(self, target: Tensor, n: int, outputs: Tensor, labels: Tensor) -> float:
        """The weight of a batch, from the criterion on it and the first one joined, with stand-ins for its outputs."""
        assert self._criterion is not None
        unit = float(len(outputs))
        if target.ndim > 1 and target.shape[1] != labels.shape[1]:  # sequences of another length
            (outputs, labels), factor = self._of_length(outputs, labels, target.shape[1])
            unit *= factor
        stand_in = outputs[torch.arange(n, device=outputs.device) % len(outputs)]
        parts = shares(self._criterion, [(outputs, labels), (stand_in, target)])
        if parts is None or not parts[0]:
            raise ValueError(
                f"what the mean of a batch is over cannot be seen from the criterion, for labels of shape "
                f"{tuple(target.shape)}: say it with batch_weights="
            )
        return unit * parts[1] / parts[0]

    def _of_length(self, outputs: Tensor, labels: Tensor, length: int) -> tuple[tuple[Tensor, Tensor], float]:
        """The reference cut or repeated along its second dimension, and W of the result over W of the reference: how
        much less the outputs matter that both have."""
        assert self._criterion is not None
        both = max(min(length, labels.shape[1]) - 1, 1)  # the last one may be left out, as of the next token
        index = torch.arange(length, device=labels.device) % labels.shape[1]
        other = outputs[:, index], labels[:, index]
        before, after = (gradient_of(self._criterion, o, t)[:, :both] for o, t in ((outputs, labels), other))
        return other, float(before.double().norm() / after.double().norm())


def _is_mean(criterion: Criterion, whole: Any, halves: Sequence[Any], parts: Sequence[float]) -> bool:
    """Whether the loss of the whole is the mean of its halves, which have these parts in its gradient. Of the root of a
    mean the losses add up as well, but the parts do not add up to 1."""
    with torch.no_grad():
        value = float(criterion(*whole))
        mean = math.fsum(part * float(criterion(*half)) for part, half in zip(parts, halves, strict=True) if part)
    return abs(math.fsum(parts) - 1) <= 1e-4 and equal_to_rounding(mean, value, whole[0].dtype)


WHY_NONE = {
    "examples": "as it has no examples: leave it out",
    "elements": "as its targets have no entries: leave it out",
    "counted labels": "as all of its labels are ignored: leave it out",
    "weights of classes": "as all of its labels are ignored or of classes that weigh 0: leave it out",
    "criterion": "by what the criterion makes of its labels: leave it out where none of them counts, or say with "
    "batch_weights= what its mean was taken over",
}  # by the rule of a `Weigher`


def weights_of(given: Any) -> list[float]:
    """A sequence of weights that the user gives, one for each batch."""
    if isinstance(given, (str, bytes)) or not isinstance(given, Iterable):
        raise ValueError(
            f"batch_weights must be numbers > 0, one for each batch, or a function of a batch, got {given!r}"
        )
    return [weight_of(x, i) for i, x in enumerate(given)]


def weight_of(given: Any, batch: int) -> float:
    """The weight that the user gives to the batch of this number."""
    weight = math.nan
    if not isinstance(given, (str, bytes)):
        with suppress(TypeError, ValueError, RuntimeError):
            weight = float(given)
    if not 0 < weight < math.inf:
        raise ValueError(
            f"batch_weights: batch {batch} is given {shown(given)}, and a weight must be a finite number > 0; leave "
            "out a batch that does not count"
        )
    return weight


A_SUM = f"the criterion is a sum over the batch, or has one in it, not a mean: on more examples it is larger; {A_MEAN}"


def rows_of(x: Tensor) -> Tensor:
    """(n, K, ...) -> (N, K), as cross-entropy reads logits and probabilities."""
    return x if x.ndim == 2 else x.movedim(1, -1).flatten(0, -2)


def _shift_of_labels(outputs: Any, labels: Any) -> int | None:
    """0 or 1 where `outputs.loss` is the mean cross-entropy of labels, or of those of the next token, that are not
    -100; None where it is neither."""
    logits: Any = getattr(outputs, "logits", None)
    loss: Any = getattr(outputs, "loss", None)
    if not all(isinstance(x, Tensor) for x in (logits, labels, loss)) or labels.is_floating_point():
        return None
    if logits.shape[:-1] != labels.shape:
        return None
    distances = []
    for shift in (0, 1) if labels.ndim > 1 else (0,):
        scores, classes = (logits[:, :-1], labels[:, 1:]) if shift else (logits, labels)
        value = nn.functional.cross_entropy(scores.flatten(0, -2).float(), classes.flatten(), ignore_index=-100)
        distances.append(abs(float(value - loss)))
    nearest = min(distances)  # before training both are nearly the logarithm of the number of classes
    return distances.index(nearest) if nearest <= 1e-3 * abs(float(loss)) else None
