"""Whether Triton's kernels can be had, said where they are asked for."""

from __future__ import annotations

import os
from types import ModuleType

from torch import Tensor


def may_be_fused(params: list[Tensor]) -> bool:
    """Whether there is anything that the fused body could move: on CUDA, or in Triton's interpreter."""
    return any(p.is_cuda for p in params) or (bool(params) and os.environ.get("TRITON_INTERPRET") == "1")


def check_fused(params: list[Tensor], fused: bool | None, foreach_flag: bool | None) -> None:
    """Raises for fused=True where it cannot be."""
    if not fused:
        return
    if foreach_flag:
        raise ValueError("fused=True and foreach=True are two ways of moving the weights: pass one of them")
    if not may_be_fused(params):
        kinds = sorted({p.device.type for p in params})
        raise ValueError(f"fused=True needs parameters on CUDA, got {kinds}: move the model there first, or pass None")
    fused_body()


def fused_body() -> ModuleType:
    """Only for those who ask for it: Triton takes a second to import, and need not be there."""
    try:
        from sam_optim.optim.kernels import triton
    except ImportError as error:
        raise ImportError(
            f"fused=True moves weights with Triton, which cannot be imported ({error}): install triton, or pass "
            "fused=None"
        ) from error
    return triton
