"""L(w) over fixed data: its value, its gradient, and products with its curvature matrices."""

from sam_optim.loss.loss import MATRICES, Criterion, Loss

__all__ = ["MATRICES", "Criterion", "Loss"]
