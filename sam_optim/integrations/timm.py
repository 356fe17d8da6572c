"""SAM and ASAM by name in timm's optimizer factory."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable
from typing import Any

import torch

from sam_optim.integrations.around import missing
from sam_optim.optim.sam import ASAM, SAM
from sam_optim.optim.variants import GSAM, MSAM, FriendlySAM, LookSAM, StaleSAM, VaSSO


def _over(cls: type[SAM], base: type[torch.optim.Optimizer]) -> type[SAM]:
    def __init__(self: SAM, params: Iterable[Any], **kwargs: Any) -> None:
        super(subclass, self).__init__(params, base, **kwargs)  # type: ignore[arg-type]

    name = cls.__name__ + base.__name__
    doc = f"{cls.__name__} over torch.optim.{base.__name__}; {name.lower()!r} in timm."
    subclass = type(name, (cls,), {"__init__": __init__, "__doc__": doc, "__module__": __name__})
    return subclass


_VARIANTS = (SAM, ASAM, GSAM, MSAM, FriendlySAM, LookSAM, StaleSAM, VaSSO)
NAMES: dict[str, tuple[type[SAM], str]] = {}
for _cls in _VARIANTS:
    for _base in (torch.optim.SGD, torch.optim.AdamW):
        _named = globals()[_cls.__name__ + _base.__name__] = _over(_cls, _base)  # pickles look for it here
        NAMES[_named.__name__.lower()] = _named, _base.__name__.lower()


def register() -> None:
    """Adds "samsgd", "asamadamw", "msamsgd", "looksamadamw", ... to timm's optimizers; may be called again.

    The names are those of SAM, ASAM and the variants, in small letters, before "sgd" or "adamw".

        register()
        optimizer = timm.optim.create_optimizer_v2(model, "samsgd", lr=0.1, weight_decay=5e-4, rho=0.05)

    Weight decay and layer decay groups, and the defaults of the base ("sgd" has Nesterov momentum), are timm's;
    other keyword arguments reach `SAM` and its base. Pass `module=model` to keep BatchNorm statistics to one update a
    step.

    "asamsgd" and "asamadamw" are `ASAM` over timm's groups: T = |w| + eta for all parameters. The groups of its paper,
    with T = 1 for biases and normalization parameters, are `param_group_fn=sam_optim.asam_param_groups`, in place of
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
            what = f"{cls.__mro__[1].__name__} (sharpness-aware minimization) over timm's {base}"
            default_registry.register(dataclasses.replace(info, name=name, opt_class=cls, description=what))
