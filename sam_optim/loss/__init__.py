"""L(w) over fixed data: its value, its gradient, and products with its curvature matrices."""

from sam_optim.loss.criterion import Criterion
from sam_optim.loss.loss import MATRICES, SAMPLED, Loss

__all__ = ["MATRICES", "SAMPLED", "Criterion", "Loss"]
