"""Which framework has called; looked up only where a step ends in an error, and when an optimizer is created."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType

from torch.amp import GradScaler

_ADVICE = {
    "timm": "timm's train.py steps like this: use sam_optim.Perturbation in its loop, see docs/integrations/timm.md",
    "transformers": "for the Trainer of transformers there is sam_optim.integrations.transformers.SAMTrainer",
    "lightning": "for Lightning there is sam_optim.integrations.lightning.SAMCallback around a plain optimizer",
    "pytorch_lightning": "for Lightning there is sam_optim.integrations.lightning.SAMCallback around a plain optimizer",
    "ignite": "in Ignite, write the update function with step(closure)",
    "monai": "in MONAI, write iteration_update of the trainer with step(closure)",
    "mmengine": "in MMEngine, override train_step of the model with the two passes",
    "fastai": "in fastai, use a callback that runs the second pass in after_backward",
    "stable_baselines3": "stable-baselines3 steps inside train(): override it with the two passes",
    "deepspeed": "DeepSpeed's ZeRO stages 1 to 3 own the gradients, and SAM has no place there: use stage 0 or FSDP2",
    "opacus": "Opacus clips and counts every backward: SAM would spend the privacy budget twice, and is not supported",
}


def advice_for_caller() -> str:
    """What to do in the framework that has called, to append to an error; empty if none is known."""
    for frame in _callers():
        package = str(frame.f_globals.get("__name__", "")).split(".")[0]
        if package in _ADVICE:
            return f". {_ADVICE[package]}"
    return ""


def refuse_inside_zero() -> None:
    """Raises ValueError where ZeroRedundancyOptimizer makes a SAM of each rank's share of the parameters."""
    for frame in _callers(8):
        if type(frame.f_locals.get("self")).__name__ == "ZeroRedundancyOptimizer":
            raise ValueError(
                "ZeroRedundancyOptimizer(optimizer_class=SAM) would perturb on each rank only the parameters that it "
                "steps. The other way round works: SAM(params, functools.partial(ZeroRedundancyOptimizer, "
                "optimizer_class=torch.optim.SGD), lr=...)"
            )


def refuse_to_lose_micro_batches() -> None:
    """Accelerate passes on one closure in `gradient_accumulation_steps`, and leaves no trace of the others but its own
    frame: looked for only where it accumulates."""
    accelerate = sys.modules.get("accelerate.optimizer")
    num = 1 if accelerate is None else accelerate.GradientState().num_steps
    frame = sys._getframe() if num > 1 else None
    while frame is not None:
        if frame.f_code is accelerate.AcceleratedOptimizer.step.__code__:  # type: ignore[union-attr]
            raise RuntimeError(
                f"gradient_accumulation_steps={num}: Accelerate runs the closure of one micro-batch in {num}, and the "
                "data of the others would never be used: run the two backwards of each in `with "
                "optimizer.optimizer.microbatch():` and `with optimizer.optimizer.perturbed():`, and step() without"
            )
        frame = frame.f_back


def calling_scaler() -> GradScaler | None:
    """The GradScaler that steps this optimizer now."""
    for frame in _callers(24):
        if frame.f_code is GradScaler.step.__code__:
            return frame.f_locals["self"]  # type: ignore[no-any-return]
    return None


def _callers(limit: int = 60) -> Iterator[FrameType]:
    frame: FrameType | None = sys._getframe(2)
    for _ in range(limit):
        if frame is None:
            return
        yield frame
        frame = frame.f_back
