"""Sharpness-Aware Minimization for PyTorch, and the means to check that it worked."""

from sam_optim._version import __version__
from sam_optim.geometry import Ball, ProductBall
from sam_optim.groups import asam_param_groups
from sam_optim.optimizers import ASAM, SAM
from sam_optim.perturbation import Perturbation

__all__ = ["ASAM", "SAM", "Ball", "Perturbation", "ProductBall", "__version__", "asam_param_groups"]
