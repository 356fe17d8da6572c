"""Functions (Loss, ...) -> result: how sharp the minimum is, by every definition, with error bars."""

from sam_optim.measures.contrast import contrastive_sharpness
from sam_optim.measures.critical import critical_sharpness
from sam_optim.measures.curvature import hessian_eigenvalues
from sam_optim.measures.density import spectral_density
from sam_optim.measures.gradients import gradient_coherence, gradient_noise_scale, gradient_regret
from sam_optim.measures.layers import by_layer
from sam_optim.measures.norms import fisher_rao_norm, relative_flatness
from sam_optim.measures.pac_bayes import flatness_bounds, pac_bayes_sigma, sharpness_alpha
from sam_optim.measures.registry import standard_measures
from sam_optim.measures.rho import RhoRange, rho_range
from sam_optim.measures.sharpness import average_in_ball, average_sharpness, worst_case_sharpness
from sam_optim.measures.trace import hessian_diagonal, hessian_frobenius_norm, hessian_trace

__all__ = [
    "RhoRange",
    "average_in_ball",
    "average_sharpness",
    "by_layer",
    "contrastive_sharpness",
    "critical_sharpness",
    "fisher_rao_norm",
    "flatness_bounds",
    "gradient_coherence",
    "gradient_noise_scale",
    "gradient_regret",
    "hessian_diagonal",
    "hessian_eigenvalues",
    "hessian_frobenius_norm",
    "hessian_trace",
    "pac_bayes_sigma",
    "relative_flatness",
    "rho_range",
    "sharpness_alpha",
    "spectral_density",
    "standard_measures",
    "worst_case_sharpness",
]
