"""The ResNets for CIFAR of He et al. (2016), arXiv:1512.03385, section 4.2: shortcuts without parameters."""

from __future__ import annotations

import re

from torch import Tensor, nn
from torch.nn import functional as F

from sam_optim.core.errors import InputError


class Block(nn.Module):
    """Two 3x3 convolutions; the shortcut takes every second pixel and pads the channels with zeros where it must."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outputs)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outputs)
        self.stride, self.padding = stride, (outputs - inputs) // 2

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        short = x[:, :, :: self.stride, :: self.stride]
        return F.relu(y + F.pad(short, (0, 0, 0, 0, self.padding, self.padding)))


class ResNet(nn.Module):
    """(n, C, 32, 32) -> (n, classes): 3 stages of `blocks`, 6 blocks + 2 layers. With 20 it has 269,722 parameters."""

    def __init__(self, blocks: int = 3, num_classes: int = 10, channels: int = 3) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        width = 16
        for stage, (outputs, stride) in enumerate([(16, 1), (32, 2), (64, 2)], start=1):
            stack = [Block(width if i == 0 else outputs, outputs, stride if i == 0 else 1) for i in range(blocks)]
            self.add_module(f"layer{stage}", nn.Sequential(*stack))
            width = outputs
        self.linear = nn.Linear(64, num_classes)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        for stage in ("layer1", "layer2", "layer3"):
            x = self.get_submodule(stage)(x)
        return self.linear(x.mean(dim=(2, 3)))


def named(name: str) -> int | None:
    """Blocks in a stage of a name like "cifar_resnet20"; None for the name of another model."""
    parts = re.fullmatch(r"cifar_resnet(\d{1,4})", name)  # a file may name it: no endless ones
    if parts is None:
        return None
    if (depth := int(parts[1])) < 8 or (depth - 2) % 6:
        raise InputError(f"{name} does not exist: the depth is 6 n + 2 (20, 32, 44, 56)")
    return (depth - 2) // 6
