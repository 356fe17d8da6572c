"""The loss on lines and planes through the weights, and on the segment to other weights."""

from sam_optim.landscape.directions import (
    eigenvector_direction,
    filter_normalized,
    gradient_direction,
    random_direction,
)
from sam_optim.landscape.slices import interpolate, slice_1d, slice_2d
from sam_optim.landscape.trajectory import Trajectory, trajectory_directions

__all__ = [
    "Trajectory",
    "eigenvector_direction",
    "filter_normalized",
    "gradient_direction",
    "interpolate",
    "random_direction",
    "slice_1d",
    "slice_2d",
    "trajectory_directions",
]
