"""Variants of SAM: one paper, one file. `SAM` has the methods to override below "What a variant changes"."""

from sam_optim.optim.variants.friendly import FriendlySAM
from sam_optim.optim.variants.gsam import GSAM
from sam_optim.optim.variants.looksam import LookSAM
from sam_optim.optim.variants.msam import MSAM
from sam_optim.optim.variants.stale import StaleSAM
from sam_optim.optim.variants.vasso import VaSSO

__all__ = ["GSAM", "MSAM", "FriendlySAM", "LookSAM", "StaleSAM", "VaSSO"]
