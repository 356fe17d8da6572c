"""Functions (Loss, ...) -> result: how sharp the minimum is, by every definition, with error bars."""

from sam_optim.measures.sharpness import average_sharpness, worst_case_sharpness

__all__ = ["average_sharpness", "worst_case_sharpness"]
