"""Wide residual networks for small images (arXiv:1605.07146), which timm does not have: "wrn28_10" and others."""

from __future__ import annotations

import re

import torch.nn.functional as F
from torch import Tensor, nn

from sam_optim.core.errors import InputError


class Block(nn.Module):
    """Batch norm, ReLU and a 3x3 convolution, twice; beside it the input, or where the shape changes a 1x1 convolution
    of what the first ReLU gave."""

    def __init__(self, inputs: int, outputs: int, stride: int):
        super().__init__()
        self.norm1, self.norm2 = nn.BatchNorm2d(inputs), nn.BatchNorm2d(outputs)
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.shortcut = nn.Conv2d(inputs, outputs, 1, stride, bias=False) if inputs != outputs else None

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm1(x))
        beside = self.shortcut(y) if self.shortcut is not None else x
        return beside + self.conv2(F.relu(self.norm2(self.conv1(y))))


class WideResNet(nn.Module):
    """Three groups of (depth - 4) / 6 blocks with 16, 32 and 64 channels, times `width`; strides 1, 2, 2."""

    def __init__(self, depth: int, width: int, num_classes: int, channels: int = 3):
        super().__init__()
        self.stem = nn.Conv2d(channels, 16, 3, 1, 1, bias=False)
        blocks, inputs = [], 16
        for outputs, stride in ((16 * width, 1), (32 * width, 2), (64 * width, 2)):
            for i in range((depth - 4) // 6):
                blocks.append(Block(inputs, outputs, stride if i == 0 else 1))
                inputs = outputs
        self.blocks = nn.Sequential(*blocks)
        self.norm, self.fc = nn.BatchNorm2d(inputs), nn.Linear(inputs, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.fc.bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(F.relu(self.norm(self.blocks(self.stem(x)))).mean(dim=(2, 3)))


def named(name: str) -> tuple[int, int] | None:
    """(depth, width) of a name like "wrn28_10"; None for the name of another model."""
    parts = re.fullmatch(r"wrn(\d{1,3})_(\d{1,2})", name)  # a file may name it: no endless ones
    if parts is None:
        return None
    depth, width = int(parts[1]), int(parts[2])
    if depth < 10 or (depth - 4) % 6 or not width:
        raise InputError(f"{name} does not exist: the depth is 6 n + 4 (16, 28, 40) and the width 1 or more")
    return depth, width
