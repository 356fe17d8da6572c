"""Variants of SAM: one paper, one file, two methods. See `SAM.ascent_gradient` and `SAM.descent_gradient`."""

from sam_optim.optim.variants.friendly import FriendlySAM
from sam_optim.optim.variants.gsam import GSAM

__all__ = ["GSAM", "FriendlySAM"]
