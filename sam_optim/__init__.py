"""Sharpness-Aware Minimization for PyTorch, and the means to check that it worked."""

from sam_optim._version import __version__
from sam_optim.core.geometry import Ball, ProductBall
from sam_optim.core.results import Diagonal, Estimate, Landscape, Spectrum
from sam_optim.landscape import (
    Trajectory,
    eigenvector_direction,
    gradient_direction,
    interpolate,
    random_direction,
    slice_1d,
    slice_2d,
    trajectory_directions,
)
from sam_optim.loss import Loss
from sam_optim.measures import (
    RhoRange,
    average_in_ball,
    average_sharpness,
    by_layer,
    contrastive_sharpness,
    critical_sharpness,
    fisher_rao_norm,
    flatness_bounds,
    gradient_coherence,
    gradient_noise_scale,
    gradient_regret,
    hessian_diagonal,
    hessian_eigenvalues,
    hessian_frobenius_norm,
    hessian_trace,
    pac_bayes_sigma,
    relative_flatness,
    rho_range,
    sharpness_alpha,
    spectral_density,
    standard_measures,
    worst_case_sharpness,
)
from sam_optim.monitor import SharpnessMonitor
from sam_optim.optim.cuda_graph import GraphedStep
from sam_optim.optim.last_step import LastStep
from sam_optim.optim.param_groups import asam_param_groups, norm_only_param_groups
from sam_optim.optim.perturbation import Perturbation
from sam_optim.optim.sam import ASAM, SAM
from sam_optim.optim.schedules import late_phase, periodic, proportional_to_lr, warmup
from sam_optim.optim.variants import GSAM, MSAM, FriendlySAM, LookSAM, StaleSAM, VaSSO
from sam_optim.statistics.kendall import Correlation, correlate
from sam_optim.symmetries import Audit, NoSymmetry, audit, permute, rescale, rescale_normalized

__all__ = [
    "ASAM",
    "GSAM",
    "MSAM",
    "SAM",
    "Audit",
    "Ball",
    "Correlation",
    "Diagonal",
    "Estimate",
    "FriendlySAM",
    "GraphedStep",
    "Landscape",
    "LastStep",
    "LookSAM",
    "Loss",
    "NoSymmetry",
    "Perturbation",
    "ProductBall",
    "RhoRange",
    "SharpnessMonitor",
    "Spectrum",
    "StaleSAM",
    "Trajectory",
    "VaSSO",
    "__version__",
    "asam_param_groups",
    "audit",
    "average_in_ball",
    "average_sharpness",
    "by_layer",
    "contrastive_sharpness",
    "correlate",
    "critical_sharpness",
    "eigenvector_direction",
    "fisher_rao_norm",
    "flatness_bounds",
    "gradient_coherence",
    "gradient_direction",
    "gradient_noise_scale",
    "gradient_regret",
    "hessian_diagonal",
    "hessian_eigenvalues",
    "hessian_frobenius_norm",
    "hessian_trace",
    "interpolate",
    "late_phase",
    "norm_only_param_groups",
    "pac_bayes_sigma",
    "periodic",
    "permute",
    "proportional_to_lr",
    "random_direction",
    "relative_flatness",
    "rescale",
    "rescale_normalized",
    "rho_range",
    "sharpness_alpha",
    "slice_1d",
    "slice_2d",
    "spectral_density",
    "standard_measures",
    "trajectory_directions",
    "warmup",
    "worst_case_sharpness",
]
