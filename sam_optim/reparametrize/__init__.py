"""Function-preserving changes of the weights, and the audit of measures under them."""

from sam_optim.reparametrize.transforms import permute, rescale, rescale_normalized

__all__ = ["permute", "rescale", "rescale_normalized"]
