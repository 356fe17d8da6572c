"""How good a checkpoint is on the measured examples: a check that model and data belong together."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from sam_optim.loss import Loss

QUALITY = ("loss", "accuracy")  # columns of the table


class _NoClasses(ValueError):
    """The outputs are no scores of classes."""


def quality(loss: Loss) -> dict[str, Any]:
    """{"loss": L(w)}, and for classes "accuracy", and "chance", the accuracy that guessing may reach.

    With K classes and N examples, chance is 1/K plus two standard errors of a guess.
    """
    value = float(loss.value())
    values: dict[str, Any] = {"loss": value if math.isfinite(value) else None}
    num_classes = 0

    def error_rate(outputs: Any, target: Any) -> Tensor:
        nonlocal num_classes
        is_classes = isinstance(outputs, Tensor) and isinstance(target, Tensor) and not target.is_floating_point()
        if not is_classes or outputs.ndim != 2 or target.shape != outputs.shape[:1] or outputs.shape[1] < 2:
            raise _NoClasses
        num_classes = outputs.shape[1]
        return (outputs.argmax(1) != target).double().mean()

    try:
        accuracy = 1 - float(loss.with_criterion(error_rate).value())
    except _NoClasses:
        return values
    p = 1 / num_classes
    return values | {"accuracy": accuracy, "chance": p + 2 * math.sqrt(p * (1 - p) / loss.num_examples)}
