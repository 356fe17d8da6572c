"""Functions (Loss, ...) -> result: how sharp the minimum is, by every definition, with error bars."""

from sam_optim.measures.contrast import contrastive_sharpness
from sam_optim.measures.curvature import hessian_eigenvalues, hessian_trace
from sam_optim.measures.gradients import gradient_coherence, gradient_noise_scale, gradient_regret
from sam_optim.measures.norms import fisher_rao_norm, relative_flatness
from sam_optim.measures.pac_bayes import flatness_bounds, pac_bayes_sigma, sharpness_alpha
from sam_optim.measures.sharpness import average_sharpness, worst_case_sharpness

__all__ = [
    "average_sharpness",
    "contrastive_sharpness",
    "fisher_rao_norm",
    "flatness_bounds",
    "gradient_coherence",
    "gradient_noise_scale",
    "gradient_regret",
    "hessian_eigenvalues",
    "hessian_trace",
    "pac_bayes_sigma",
    "relative_flatness",
    "sharpness_alpha",
    "worst_case_sharpness",
]
