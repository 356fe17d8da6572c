"""The ResNet-20 for CIFAR of He et al. (2016), arXiv:1512.03385, section 4.2: shortcuts without parameters."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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


class ResNet20(nn.Module):
    """272,474 parameters; (n, 3, 32, 32) -> (n, 10)."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 16, 3, 1, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        width = 16
        for stage, (outputs, stride) in enumerate([(16, 1), (32, 2), (64, 2)], start=1):
            blocks = [Block(width if i == 0 else outputs, outputs, stride if i == 0 else 1) for i in range(3)]
            self.add_module(f"layer{stage}", nn.Sequential(*blocks))
            width = outputs
        self.linear = nn.Linear(64, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean(dim=(2, 3)))


def pretrained(path: Path) -> ResNet20:
    """With the weights of a state dict or a checkpoint that holds one, also one of a DataParallel model."""
    found = torch.load(path, map_location="cpu", weights_only=True)
    state = found.get("state_dict", found)
    model = ResNet20()
    model.load_state_dict({name.removeprefix("module."): w for name, w in state.items()})
    return model


def trained(x: Tensor, y: Tensor, *, num_steps: int, batch_size: int = 64, seed: int = 0) -> ResNet20:
    """After a few steps of SGD: at random weights the Hessian is not that of any minimum."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResNet20()
        order = torch.randint(len(x), (num_steps, batch_size))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for rows in order:
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model
