"""Shapes of real models, and a base that does nothing, to measure SAM's own part of a step."""

from __future__ import annotations

from typing import Any

import torch

from sam_optim.core.errors import unknown

RHO = 0.05


class NoStep(torch.optim.Optimizer):
    """A base whose update is nothing: what remains of a step is SAM's own part."""

    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        return None


def shapes_of(model: str) -> list[torch.Size]:
    """Shapes of the parameters of a timm model (created without memory), or of the SAM paper's WRN-28-10."""
    import timm

    from sam_optim.vision.wide_resnet import WideResNet

    if model != "wide-resnet-28-10" and not timm.is_model(model):
        raise unknown("model", model, timm.list_models())
    with torch.device("meta"):
        network = WideResNet(28, 10, num_classes=10) if model == "wide-resnet-28-10" else timm.create_model(model)
    return [p.shape for p in network.parameters()]
