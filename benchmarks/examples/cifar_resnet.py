r"""Trained ResNets for CIFAR (`sam_optim.vision.cifar_resnet`), and the images to measure them on.

    SAM_OPTIM_CIFAR10=DIR sam-optim measure resnet*.th \
        --target benchmarks.examples.cifar_resnet:problem --measures worst,trace

measures trained ones on CIFAR-10; DIR holds cifar-10-batches-py.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from sam_optim.vision.checkpoints import find, read
from sam_optim.vision.cifar_resnet import ResNet

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of the pretrained ones


def pretrained(path: Path | str) -> ResNet:
    """The network with the weights of a state dict, or of a checkpoint that holds one, also of a DataParallel model."""
    state = {name.removeprefix("module."): w for name, w in read(find([path])[0]).state.items()}
    model = ResNet(sum(name.startswith("layer1.") and name.endswith(".conv1.weight") for name in state))
    model.load_state_dict(state)
    return model


def problem(checkpoint: str) -> tuple[nn.Module, nn.Module, list[tuple[Tensor, Tensor]]]:
    """A pretrained one and training images, evenly spread over the training set, in batches of 128. The environment
    says where they are (SAM_OPTIM_CIFAR10, in torchvision's layout) and how many (SAM_OPTIM_IMAGES, 512)."""
    from sam_optim.vision.data import open_split

    train = open_split("cifar10", os.environ["SAM_OPTIM_CIFAR10"], "train")
    x, y = train.x, train.labels
    num = int(os.environ.get("SAM_OPTIM_IMAGES", "512"))
    rows = torch.arange(num) * len(x) // num
    mean, std = (torch.tensor(t)[:, None, None] for t in (MEAN, STD))
    images = (x[rows].float() / 255 - mean) / std
    return pretrained(checkpoint), nn.CrossEntropyLoss(), list(zip(images.split(128), y[rows].split(128), strict=True))


def trained(x: Tensor, y: Tensor, *, num_steps: int, batch_size: int = 64, seed: int = 0) -> ResNet:
    """After a few steps of SGD: at random weights the Hessian is not that of any minimum."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = ResNet()
        order = torch.randint(len(x), (num_steps, batch_size))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for rows in order:
        optimizer.zero_grad()
        F.cross_entropy(model(x[rows]), y[rows]).backward()
        optimizer.step()
    return model
