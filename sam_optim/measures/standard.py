"""The measures that an audit compares by default: those in wide use, and two that reparametrization cannot fake."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from sam_optim.core.geometry import Ball
from sam_optim.core.results import Estimate, Spectrum
from sam_optim.loss import Loss
from sam_optim.measures import gradient_regret, hessian_eigenvalues, hessian_trace, worst_case_sharpness


def standard_measures(
    *, rho: float = 0.05, adaptive_rho: float = 0.1, num_steps: int = 20, num_probes: int = 100, seed: int = 0
) -> dict[str, Callable[[Loss], Estimate | Spectrum]]:
    """name -> function of a `Loss`, for `audit`.

    Plain ones, with T = 1, change with the scale of the weights: worst case, largest eigenvalue and trace of the
    Hessian, Euclidean regret. With T = |w| (eta = 0) the same numbers are those of relative changes of the weights, and
    do not change under rescaling; nor does the regret in the Fisher metric, which is damped with that T.

    Args:
        rho: radius of the ball with T = 1, in units of w. adaptive_rho: of that with T = |w|.
        num_steps, num_probes, seed: as in the measures.
    """
    plain, adaptive = Ball(rho), Ball(adaptive_rho, adaptive=True, eta=0.0)
    return {
        "worst case": partial(worst_case_sharpness, ball=plain, num_steps=num_steps, seed=seed),
        "worst case, T = |w|": partial(worst_case_sharpness, ball=adaptive, num_steps=num_steps, seed=seed),
        "lambda_max": partial(hessian_eigenvalues, seed=seed),
        "lambda_max, T = |w|": partial(hessian_eigenvalues, ball=adaptive, seed=seed),
        "trace": partial(hessian_trace, num_probes=num_probes, seed=seed),
        "trace, T = |w|": partial(hessian_trace, ball=adaptive, num_probes=num_probes, seed=seed),
        "regret": partial(gradient_regret, seed=seed),
        "regret, Fisher metric": partial(gradient_regret, metric="fisher", num_probes=0, seed=seed),
    }
