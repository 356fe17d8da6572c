"""CIFAR-10 and CIFAR-100 in torchvision's layout: as `sam-optim measure` reads them."""

from sam_optim.cli.cifar import LAYOUT, STATISTICS, official, read

__all__ = ["LAYOUT", "STATISTICS", "official", "read"]
