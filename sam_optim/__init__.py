"""Sharpness-Aware Minimization for PyTorch, and the means to check that it worked."""

from sam_optim._version import __version__

__all__ = ["__version__"]
