"""SAM and ASAM by name in timm's optimizer factory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from sam_optim.integrations.around import missing
from sam_optim.optim.sam import ASAM, SAM


class SAMSGD(SAM):
    """SAM over torch.optim.SGD; "samsgd" in timm."""

    def __init__(self, params: Iterable[Any], **kwargs: Any):
        super().__init__(params, torch.optim.SGD, **kwargs)


class SAMAdamW(SAM):
    """SAM over torch.optim.AdamW; "samadamw" in timm."""

    def __init__(self, params: Iterable[Any], **kwargs: Any):
        super().__init__(params, torch.optim.AdamW, **kwargs)


class ASAMSGD(ASAM):
    """ASAM over torch.optim.SGD; "asamsgd" in timm."""

    def __init__(self, params: Iterable[Any], **kwargs: Any):
        super().__init__(params, torch.optim.SGD, **kwargs)


class ASAMAdamW(ASAM):
    """ASAM over torch.optim.AdamW; "asamadamw" in timm."""

    def __init__(self, params: Iterable[Any], **kwargs: Any):
        super().__init__(params, torch.optim.AdamW, **kwargs)


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

    "asamsgd" and "asamadamw" are `ASAM` over timm's groups: T = |w| + eta for all parameters. The groups of its paper,
    with T = 1 for biases and normalisation parameters, are `param_group_fn=sam_optim.asam_param_groups`, in place of
    timm's for weight decay.

    (timm looks up what follows the last underscore of a name: "sam_sgd" would be plain "sgd".)

    Raises:
        ImportError: without timm.
    """
    try:
        from timm.optim import OptimInfo, get_optimizer_info
        from timm.optim._optim_factory import default_registry
    except ImportError as error:
        raise missing("timm", error) from error
    registered = default_registry.list_optimizers()
    for name, (cls, base) in NAMES.items():
        if name not in registered:
            info: OptimInfo = get_optimizer_info(base)
            kind = "Adaptive Sharpness-Aware Minimization" if issubclass(cls, ASAM) else "Sharpness-Aware Minimization"
            default_registry.register(
                dataclasses.replace(info, name=name, opt_class=cls, description=f"{kind} over timm's {base}")
            )
