"""Function-preserving changes of the weights, and the audit of measures under them."""

from sam_optim.symmetries.audit import Audit, AuditRow, audit
from sam_optim.symmetries.transforms import NoSymmetry, permute, rescale, rescale_normalized

__all__ = ["Audit", "AuditRow", "NoSymmetry", "audit", "permute", "rescale", "rescale_normalized"]
