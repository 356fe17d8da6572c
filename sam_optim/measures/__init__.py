"""Functions (Loss, ...) -> result: how sharp the minimum is, by every definition, with error bars."""

from sam_optim.measures.curvature import hessian_eigenvalues, hessian_trace
from sam_optim.measures.gradients import gradient_regret
from sam_optim.measures.sharpness import average_sharpness, worst_case_sharpness

__all__ = [
    "average_sharpness",
    "gradient_regret",
    "hessian_eigenvalues",
    "hessian_trace",
    "worst_case_sharpness",
]
