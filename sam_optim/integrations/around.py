"""A perturbation for an optimizer that a framework has created and steps itself."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from sam_optim.optim.perturbation import Perturbation
from sam_optim.optim.sam import SAM
from sam_optim.optim.schedules import factor_at

ParamGroups = Callable[[nn.Module], Iterable[dict[str, Any]]]


def missing(framework: str, error: ImportError) -> ImportError:
    """The error to raise if the framework cannot be imported."""
    return ImportError(f"{framework} cannot be imported ({error}): pip install 'sam_optim[integrations]'")


def perturbation_around(
    model: nn.Module, optimizer: Optimizer, *, param_groups: ParamGroups | None, **settings: Any
) -> Perturbation:
    """Perturbs the parameters that `optimizer` trains, in one group or in those of `param_groups(model)`.

    Raises:
        ValueError: the optimizer is a SAM, so both would perturb; or the groups hold none of its parameters.
    """
    if isinstance(optimizer, SAM):
        raise ValueError(
            f"the optimizer is {type(optimizer).__name__}, which perturbs the weights itself: give the framework its "
            f"base, {type(optimizer.base_optimizer).__name__}, or leave the integration out"
        )
    settings["maximize"] = any(group.get("maximize") for group in optimizer.param_groups)
    trained = {id(p): p for p in parameters_of(optimizer)}
    if param_groups is None:  # in the model's order: the optimizer's groups are about its own settings
        in_order = [trained.pop(id(p)) for p in model.parameters() if id(p) in trained]
        return Perturbation([*in_order, *trained.values()], module=model, **settings)
    groups = [g | {"params": [p for p in g["params"] if id(p) in trained]} for g in param_groups(model)]
    groups = [g for g in groups if g["params"]]
    if not groups:
        raise ValueError("param_groups(model) has none of the parameters that the optimizer trains")
    return Perturbation(groups, module=model, **settings)


def check_schedule(schedule: Callable[[int], float] | None) -> None:
    """Raises ValueError for one that needs the optimizer's groups, which the perturbation does not have."""
    if hasattr(schedule, "radius"):
        raise ValueError(
            "proportional_to_lr reads the learning rate of the optimizer's groups: give the framework SAM(..., "
            "schedule=proportional_to_lr(...)) as its optimizer instead"
        )


def follow_schedule(perturbation: Perturbation, schedule: Callable[[int], float] | None, step: int) -> bool:
    """Sets the radii of a step. Whether it has a second pass."""
    if schedule is not None:
        perturbation.scale_radii(factor_at(schedule, step))
    return perturbation.ascends


def parameters_of(optimizer: Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
