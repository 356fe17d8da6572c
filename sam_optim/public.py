"""The public names, all of them importable from `sam_optim` itself."""

from sam_optim._version import __version__
from sam_optim.correlation import Correlation, correlate
from sam_optim.geometry import Ball, ProductBall
from sam_optim.graphs import GraphedStep
from sam_optim.groups import asam_param_groups, norm_only_param_groups
from sam_optim.landscape import interpolate, slice_1d, slice_2d
from sam_optim.loss import Loss
from sam_optim.measures import (
    average_sharpness,
    gradient_regret,
    hessian_eigenvalues,
    hessian_trace,
    worst_case_sharpness,
)
from sam_optim.optimizers import ASAM, SAM
from sam_optim.perturbation import Perturbation
from sam_optim.results import Estimate, Landscape, LastStep, Spectrum

__all__ = [
    "ASAM",
    "SAM",
    "Ball",
    "Correlation",
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
    "correlate",
    "gradient_regret",
    "hessian_eigenvalues",
    "hessian_trace",
    "interpolate",
    "norm_only_param_groups",
    "slice_1d",
    "slice_2d",
    "worst_case_sharpness",
]
