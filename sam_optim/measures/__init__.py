"""Functions (Loss, ...) -> result: how sharp the minimum is, by every definition, with error bars."""

from sam_optim.measures.curvature import hessian_eigenvalues
from sam_optim.measures.density import spectral_density
from sam_optim.measures.gradients import gradient_regret
from sam_optim.measures.layers import by_layer
from sam_optim.measures.sharpness import average_sharpness, worst_case_sharpness
from sam_optim.measures.trace import hessian_diagonal, hessian_frobenius_norm, hessian_trace

__all__ = [
    "average_sharpness",
    "by_layer",
    "gradient_regret",
    "hessian_diagonal",
    "hessian_eigenvalues",
    "hessian_frobenius_norm",
    "hessian_trace",
    "spectral_density",
    "worst_case_sharpness",
]
