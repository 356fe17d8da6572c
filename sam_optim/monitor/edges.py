"""Edges of stability: how sharp a minimum can be before gradient descent, or SAM, leaves it."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch.optim import Optimizer


def learning_rate(optimizer: Optimizer) -> float:
    """The largest of all groups, which is the first to be too large."""
    return max(float(group["lr"]) for group in optimizer.param_groups)


def stability_edges(optimizer: Optimizer, rho: float = 0.0, grad_norm: float = math.nan) -> dict[str, float]:
    """The curvatures at which full-batch training on a quadratic stops to converge.

        edge = 2 / lr,    sgd_edge = E = 2 (1 + mu) / lr,   with Nesterov's momentum E / (1 + 2 mu)
        sam_edge = ||g|| / (2 rho) (sqrt(1 + 4 rho E / ||g||) - 1)

    `edge` is what critical sharpness along an update is compared with, whatever made the update. The others are for
    lambda_max: they are left out where the base is not SGD. SAM's is for T = 1 and p = 2, with the radius of the step
    and the ||g|| of its ascent.

    Source: momentum, Cohen et al. (2021), arXiv:2103.00065; SAM without it, Long and Bartlett (2023), arXiv:2309.12488.
    Momentum enters SAM's by E alone: the descent gradient sees the curvature lambda (1 + rho lambda / ||g||).
    """
    lr = learning_rate(optimizer)
    if not lr > 0:
        return {}
    edges = {"edge": 2 / lr}
    base: Any = getattr(optimizer, "base_optimizer", optimizer)
    base = getattr(base, "optimizer", base)
    if not isinstance(base, torch.optim.SGD):
        return edges
    group = max(optimizer.param_groups, key=lambda g: float(g["lr"]))
    mu = float(group.get("momentum", 0.0))
    edges["sgd_edge"] = 2 * (1 + mu) / lr / ((1 - group["dampening"]) if mu else 1)
    if group.get("nesterov"):
        edges["sgd_edge"] /= 1 + 2 * mu
    if rho > 0 and 0 < grad_norm < math.inf:
        ratio = grad_norm / (2 * rho)
        edges["sam_edge"] = ratio * (math.sqrt(1 + 2 * edges["sgd_edge"] / ratio) - 1)
    return edges
