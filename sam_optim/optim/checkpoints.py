"""Checkpoints of other SAM implementations: loads hyperparameters and base state, drops scratch tensors."""

from __future__ import annotations

import warnings
from typing import Any

# Scratch in the state of each parameter: clean weights, perturbations and gradients of the last step.
SCRATCH = frozenset({"old_p", "e_w", "old_g", "old_grad_p"})  # davda54/sam, Composer, GSAM, pytorch_optimizer
SETTINGS = frozenset({"epsilon", "use_gc", "perturb_eps"})  # of groups; they mean nothing here


def adapted(state_dict: dict[str, Any], groups: list[dict[str, Any]]) -> dict[str, Any]:
    """Converts a state_dict of another SAM; returns any other as it is. The argument is not changed.

    davda54/sam and Composer save scratch tensors and not the state of their base optimizer; pytorch_optimizer saves it
    in an entry of its own, or among the scratch. Hyperparameters that the file lacks stay as they are, eta among them:
    where the file says adaptive=True, its T was |w|, which here is eta=0.

    Args:
        state_dict: what is about to be loaded.
        groups: those of the optimizer that it is loaded into.
    """
    states = state_dict.get("state", {})
    base: Any = state_dict.get("base_optimizer")
    has_base = isinstance(base, dict) and "state" in base
    has_scratch = any(isinstance(s, dict) and not SCRATCH.isdisjoint(s) for s in states.values())
    if not has_scratch and not has_base:
        return state_dict
    base_state = {i: _without(s, SCRATCH) for i, s in (base["state"] if has_base else states).items()}
    base_state = {i: s for i, s in base_state.items() if s != {}}
    if has_scratch and not base_state:
        warnings.warn(
            "this checkpoint is of another SAM, which saved weights or perturbations of its last step and nothing of "
            "its base optimizer: the momentum (moments, step counts) was never in that file and is lost; training "
            "starts without it. The hyperparameters are loaded",
            stacklevel=3,
        )
    unknown = SETTINGS.difference(*groups)
    loadable = [_without(g, unknown) for g in state_dict["param_groups"]]
    return {"state": base_state, "param_groups": loadable}


def _without(entries: Any, names: frozenset[str]) -> Any:
    return {k: v for k, v in entries.items() if k not in names} if isinstance(entries, dict) else entries
