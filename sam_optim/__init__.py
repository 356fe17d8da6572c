"""Sharpness-Aware Minimization for PyTorch, and the means to check that it worked."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from sam_optim.public import *  # noqa: F403

__all__ = [  # noqa: F405
    "ASAM",
    "SAM",
    "Audit",
    "Ball",
    "Correlation",
    "Diagonal",
    "Estimate",
    "FriendlySAM",
    "GSAM",
    "GraphedStep",
    "Landscape",
    "LastStep",
    "Loss",
    "NoSymmetry",
    "Perturbation",
    "ProductBall",
    "Spectrum",
    "Trajectory",
    "__version__",
    "asam_param_groups",
    "audit",
    "average_sharpness",
    "by_layer",
    "contrastive_sharpness",
    "correlate",
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
    "norm_only_param_groups",
    "pac_bayes_sigma",
    "permute",
    "random_direction",
    "relative_flatness",
    "rescale",
    "rescale_normalized",
    "sharpness_alpha",
    "slice_1d",
    "slice_2d",
    "spectral_density",
    "standard_measures",
    "trajectory_directions",
    "worst_case_sharpness",
]


def __getattr__(name: str) -> Any:
    """The public names, all at once with the first that is asked for: importing torch takes seconds, and
    `sam-optim --help` does without it. Modules are imported when they are asked for."""
    if name in __all__:
        public = importlib.import_module("sam_optim.public")
        globals().update({public_name: getattr(public, public_name) for public_name in __all__})
        return globals()[name]
    full = f"{__name__}.{name}"
    try:
        if not name.startswith("__"):
            return importlib.import_module(full)
    except ModuleNotFoundError as error:
        if error.name != full:
            raise
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
