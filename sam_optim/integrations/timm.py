"""SAM and ASAM by name in timm's optimizer factory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from sam_optim.integrations.around import missing
from sam_optim.optimizers import ASAM, SAM


class SAMSGD(SAM):
    """SAM over torch.optim.SGD; "samsgd" in timm."""

    def __init__(self, params: Iterable[Any], **kwargs: Any):
        super().__init__(params, torch.optim.SGD, **kwargs)


class SAMAdamW(SAM):
    """SAM over torch.optim.AdamW; "samadamw" in timm."""

    def __init__(self, params: Iterable[Any], **kwargs: Any):
        super().__init__(params, torch.optim.AdamW, **kwargs)


class ASAMSGD(ASAM):
    """ASAM over torch.optim.SGD, with T = 1 for parameters of fewer than two dimensions; "asamsgd" in timm."""

    def __init__(self, params: Iterable[Any], **kwargs: Any):
        super().__init__(by_dimension(params), torch.optim.SGD, **kwargs)


class ASAMAdamW(ASAM):
    """ASAM over torch.optim.AdamW, with T = 1 for parameters of fewer than two dimensions; "asamadamw" in timm."""

    def __init__(self, params: Iterable[Any], **kwargs: Any):
        super().__init__(by_dimension(params), torch.optim.AdamW, **kwargs)


NAMES: dict[str, tuple[type[SAM], str]] = {
    "samsgd": (SAMSGD, "sgd"),
    "asamsgd": (ASAMSGD, "sgd"),
    "samadamw": (SAMAdamW, "adamw"),
    "asamadamw": (ASAMAdamW, "adamw"),
}


def register() -> None:
    """Adds "samsgd", "asamsgd", "samadamw" and "asamadamw" to timm's optimizers; may be called again.

        register()
        optimizer = timm.optim.create_optimizer_v2(model, "samsgd", lr=0.1, weight_decay=5e-4, rho=0.05)

    Weight decay and layer decay groups, and the defaults of the base ("sgd" has Nesterov momentum), are timm's;
    other keyword arguments reach `SAM` and its base. Pass `module=model` to keep BatchNorm statistics to one update a
    step.

    ASAM's T is |w| + eta for weights and 1 for biases and normalisation parameters, as in the paper. timm hands over
    groups and not the model, so these are told apart by dimension alone: fewer than two, T = 1. A group that has both
    becomes two, with the same settings. Groups that come with an "adaptive" of their own stay as they are.

    (timm looks up what follows the last underscore of a name: "sam_sgd" would be plain "sgd".)

    Raises:
        ImportError: without timm.
    """
    try:
        from timm.optim import OptimInfo, get_optimizer_info
        from timm.optim._optim_factory import default_registry
    except ImportError as error:
        raise missing("timm", error) from error
    known = default_registry.list_optimizers()
    for name, (cls, base) in NAMES.items():
        if name not in known:
            info: OptimInfo = get_optimizer_info(base)
            kind = "Adaptive Sharpness-Aware Minimization" if issubclass(cls, ASAM) else "Sharpness-Aware Minimization"
            default_registry.register(
                dataclasses.replace(info, name=name, opt_class=cls, description=f"{kind} over timm's {base}")
            )


def by_dimension(params: Iterable[Any]) -> Iterable[Any]:
    """Groups with T = 1 for parameters of fewer than two dimensions, and ASAM's for the others."""
    if isinstance(params, Tensor):
        return params  # torch.optim says what is wrong with one tensor
    found = list(params)
    groups = found if found and isinstance(found[0], dict) else [{"params": found}]
    split: list[dict[str, Any]] = []
    for group in groups:
        if "adaptive" in group:
            split.append(group)
            continue
        members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        tensors = [m[1] if isinstance(m, tuple) else m for m in members]
        weights = [m for m, p in zip(members, tensors, strict=True) if p.ndim >= 2]
        others = [m for m, p in zip(members, tensors, strict=True) if p.ndim < 2]
        if weights:
            split.append(group | {"params": weights})
        if others:
            split.append(group | {"params": others, "adaptive": False})
    return split
