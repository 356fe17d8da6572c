"""Measures layer by layer: of the loss as a function of the parameters of one layer, the others fixed."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from sam_optim.loss import Loss
from sam_optim.measures.shared import checked

BY = ("module", "tensor")


@checked
def by_layer(measure: Callable[..., Any], loss: Loss, *, by: str = "module", **kwargs: Any) -> dict[str, Any]:
    """A measure of each block of parameters: for curvature, of the diagonal blocks of the matrix.

    Args:
        measure: (loss, **kwargs) -> result, such as `hessian_trace`. Traces of the blocks add up to that of the whole,
            and no eigenvalue of a block is above the largest of the whole.
        loss: L; a parameter that is in two modules counts in the first.
        by: "module", a block for each module that has parameters of its own; "tensor", one for each parameter.
        kwargs: for the measure, such as `ball`, whose T is that of the parameters of the block.

    Returns:
        Results by name, in the order of `model.named_parameters()`. Each result's settings name its block.

    Raises:
        ValueError: by is unknown.
    """
    if by not in BY:
        raise ValueError(f"by must be one of {', '.join(BY)}, got {by!r}")
    blocks: dict[str, list[str]] = {}
    for name in loss.parameter_names():
        module = name.rpartition(".")[0]
        blocks.setdefault(name if by == "tensor" else module or name, []).append(name)
    return {key: measure(loss.block(*names), **kwargs) for key, names in blocks.items()}
