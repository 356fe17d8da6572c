"""Models: any timm name, with the stem that the field uses for small images; as `sam-optim measure` builds them."""

from sam_optim.vision.models import (
    OWN,
    SMALL,
    build,
    checkpoint_gradients_,
    cnn3,
    cnn5,
    data_config,
    default_size,
    small_stem_,
)

__all__ = [
    "OWN",
    "SMALL",
    "build",
    "checkpoint_gradients_",
    "cnn3",
    "cnn5",
    "data_config",
    "default_size",
    "small_stem_",
]
