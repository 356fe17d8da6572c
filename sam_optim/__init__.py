"""Sharpness-Aware Minimization for PyTorch, and the means to check that it worked."""

from sam_optim._version import __version__
from sam_optim.correlation import Correlation, correlate
from sam_optim.geometry import Ball, ProductBall
from sam_optim.graphs import GraphedStep
from sam_optim.groups import asam_param_groups, norm_only_param_groups
from sam_optim.landscape import interpolate, slice_1d, slice_2d
from sam_optim.loss import Loss
from sam_optim.measures import (
    average_sharpness,
    by_layer,
    gradient_regret,
    hessian_diagonal,
    hessian_eigenvalues,
    hessian_frobenius_norm,
    hessian_trace,
    spectral_density,
    worst_case_sharpness,
)
from sam_optim.optimizers import ASAM, SAM
from sam_optim.perturbation import Perturbation
from sam_optim.results import Diagonal, Estimate, Landscape, LastStep, Spectrum

__all__ = [
    "ASAM",
    "SAM",
    "Ball",
    "Correlation",
    "Diagonal",
    "Estimate",
    "GraphedStep",
    "Landscape",
    "LastStep",
    "Loss",
    "Perturbation",
    "ProductBall",
    "Spectrum",
    "__version__",
    "asam_param_groups",
    "average_sharpness",
    "by_layer",
    "correlate",
    "gradient_regret",
    "hessian_diagonal",
    "hessian_eigenvalues",
    "hessian_frobenius_norm",
    "hessian_trace",
    "interpolate",
    "norm_only_param_groups",
    "slice_1d",
    "slice_2d",
    "spectral_density",
    "worst_case_sharpness",
]
