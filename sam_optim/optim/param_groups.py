"""Parameter groups: torch.optim's forms, SAM's hyperparameters, and the groups of the ASAM and SAM-ON papers."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor, nn

from sam_optim.core.geometry import canonical_adaptive, canonical_norm, check_eta, check_rho
from sam_optim.core.module_state import NORM_LAYERS


def check_group(group: dict[str, Any]) -> None:
    """Raises ValueError for a radius, norm or T that does not exist."""
    check_rho(group["rho"])
    check_eta(group["eta"])
    canonical_adaptive(group["adaptive"])
    canonical_norm(group["norm"])


def is_zero(rho: float | Tensor) -> bool:
    """Whether rho is 0; False for a tensor on a device, which is not read because that would wait for the device."""
    return (rho.device.type == "cpu" if isinstance(rho, Tensor) else True) and bool(rho == 0)


def as_groups(params: Iterable[Any], defaults: dict[str, Any]) -> list[dict[str, Any]]:
    """Groups in the forms of torch.optim; dicts are used as they are, with missing keys set to the defaults."""
    if isinstance(params, Tensor):
        raise TypeError("params must be an iterable of tensors or groups, got one tensor: pass [tensor]")
    entries = list(params)
    if not entries:
        raise ValueError("got an empty list of parameters")
    groups = entries if isinstance(entries[0], dict) else [{"params": entries}]
    ids: list[int] = []
    for group in groups:
        members = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        group["params"] = [m[1] if isinstance(m, tuple) else m for m in members]
        ids += [id(p) for p in group["params"]]
        for p in group["params"]:
            if not isinstance(p, Tensor):
                raise TypeError(f"params must hold tensors, got {type(p).__name__}")
        for key, value in defaults.items():
            group.setdefault(key, value)
        check_group(group)
    if len(ids) != len(set(ids)):
        raise ValueError("a parameter is listed twice, and would be moved twice: pass each one once")
    return groups


def asam_param_groups(model: nn.Module, *, adaptive: bool | str = True) -> list[dict[str, Any]]:
    """The groups of the ASAM paper: T adaptive for weights, T = 1 for biases and normalization parameters.

    Decided by the type of the module and by dimension (fewer than two: T = 1), never by name. Parameters that do
    not require a gradient are left out, and so is an empty group.
    """
    normal = _of_norm_layers(model, NORM_LAYERS)
    params = [p for p in model.parameters() if p.requires_grad]
    plain = [p.ndim < 2 or id(p) in normal for p in params]
    groups: list[dict[str, Any]] = [
        {"params": [p for p, is_plain in zip(params, plain, strict=True) if not is_plain], "adaptive": adaptive},
        {"params": [p for p, is_plain in zip(params, plain, strict=True) if is_plain], "adaptive": False},
    ]
    return [g for g in groups if g["params"]]


def norm_only_param_groups(
    model: nn.Module, *, adaptive: bool | str | None = None, norm_layers: tuple[type[nn.Module], ...] = ()
) -> list[dict[str, Any]]:
    """The groups of SAM-ON: only the parameters of normalization layers are perturbed; all are trained.

    The others have rho = 0: they do not move in the second pass, and are not in the norm. Parameters that do not
    require a gradient are left out.

    Args:
        model: normalization layers are recognized by the type of the module, never by name.
        adaptive: T of the perturbed group. None: that of the optimizer.
        norm_layers: more types that count as normalization layers, such as timm's or Hugging Face's RMS norms.

    Raises:
        ValueError: no normalization layer has a parameter that is trained, so that nothing would be perturbed.

    Source: Mueller et al. (2023), arXiv:2306.04226.
    """
    normal = _of_norm_layers(model, (*NORM_LAYERS, *norm_layers))
    params = [p for p in model.parameters() if p.requires_grad]
    perturbed = [p for p in params if id(p) in normal]
    if not perturbed:
        raise ValueError(
            f"{type(model).__name__} has no normalization layer with parameters to train, so nothing would be "
            "perturbed: pass the model's own types as norm_layers=, or use SAM on all parameters"
        )
    perturbed_group: dict[str, Any] = {"params": perturbed}
    if adaptive is not None:
        perturbed_group["adaptive"] = adaptive
    rest = [p for p in params if id(p) not in normal]
    return [perturbed_group, {"params": rest, "rho": 0.0}] if rest else [perturbed_group]


def _of_norm_layers(model: nn.Module, types: tuple[type[nn.Module], ...]) -> set[int]:
    """Ids of the parameters that belong to layers of these types directly."""
    return {id(p) for m in model.modules() if isinstance(m, types) for p in m.parameters(recurse=False)}


def listed(params: Iterable[Any]) -> tuple[Any, set[int] | None]:
    """params as a list that can be read twice, and the ids in it; None where the base must judge the input itself."""
    if isinstance(params, (Tensor, dict, set)) or not isinstance(params, Iterable):
        return params, None
    entries = list(params)
    members: list[Any] = []
    for entry in entries:
        if isinstance(entry, dict) and "params" in entry:
            inner = entry["params"]
            if isinstance(inner, set):
                return entries, None  # the base says what is wrong with a set
            if not isinstance(inner, (Tensor, list)):
                inner = entry["params"] = list(inner)  # in place, as torch.optim does
            members += [inner] if isinstance(inner, Tensor) else inner
        else:
            members.append(entry)
    return entries, {id(m[1] if isinstance(m, tuple) else m) for m in members}


def setting_of_groups(name: str) -> property:
    """An attribute that an optimizer must not get: it would be ignored."""

    def refuse(self: Any, value: Any = None) -> None:
        raise AttributeError(
            f"{name} is a setting of each group, and an attribute would be ignored: "
            f"for group in optimizer.param_groups: group[{name!r}] = {value!r}"
        )

    return property(refuse, refuse)
