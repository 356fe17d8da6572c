"""The base optimizer: which optimizers can be one, and its update with the gradients of a perturbed pass."""

from __future__ import annotations

import inspect
import operator
import warnings
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from sam_optim.optim import kernels
from sam_optim.optim.kernels import dtensor
from sam_optim.optim.kernels.bucket import Groups

_IS_CPU = operator.attrgetter("is_cpu")
NONFINITE = (None, "skip", "raise", "ignore")


def accepted(factory: Callable[..., Any], flags: dict[str, Any]) -> dict[str, Any]:
    """Those of SAM's flags (foreach, fused) that the base takes, too."""
    try:
        parameters = inspect.signature(factory).parameters
    except (TypeError, ValueError):
        return flags
    if any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        return flags
    if flags.get("fused") and "fused" not in parameters:
        name = getattr(factory, "__name__", repr(factory))
        raise ValueError(f"fused=True: {name} has no fused implementation: use fused=None or another base")
    return {k: v for k, v in flags.items() if k in parameters}


def check_base(base: Any, keys: tuple[str, ...]) -> None:
    """Raises if `base` cannot be the base of SAM. keys: SAM's own hyperparameters."""
    if not isinstance(base, Optimizer):
        raise TypeError(f"the base must be a torch.optim.Optimizer, got {type(base).__name__}")
    closure = inspect.signature(type(base).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(f"{type(base).__name__} needs a closure for its own step, and cannot be the base of SAM")
    if getattr(base, "is_second_order", False):
        raise ValueError(
            f"{type(base).__name__} differentiates its gradients (create_graph=True), and the weights move in between: "
            "it cannot be the base of SAM"
        )
    parameters = inspect.signature(type(base).__init__).parameters
    if clash := [k for k in keys if k in parameters and k in base.defaults]:
        raise ValueError(
            f"{type(base).__name__} has a hyperparameter {clash[0]!r} of its own, which means something else: use "
            "sam_optim.Perturbation around it, which keeps its own groups"
        )
    if any(g.get("differentiable") for g in base.param_groups):
        raise ValueError("differentiable=True is not supported: the perturbed weights are not part of a graph")


def takes_found_inf(base: Optimizer) -> bool:
    """Whether the base can skip a step by a flag on the device, as fused ones can."""
    return bool(getattr(base, "_step_supports_amp_scaling", False))


class BaseUpdate:
    """The base's own update, or none where a gradient is not finite.

    Args:
        nonfinite: "skip", "raise", "ignore", or None: "skip" where that needs no host sync.
    """

    def __init__(self, base: Optimizer, nonfinite: str | None):
        if nonfinite not in NONFINITE:
            raise ValueError(f"nonfinite must be None, 'skip', 'raise' or 'ignore', got {nonfinite!r}")
        self.base = base
        self.nonfinite = nonfinite
        self.num_skipped: int | Tensor = 0

    def __call__(self, together: Groups) -> bool:
        """Whether there was an update, as far as that is known here.

        together: process groups whose ranks must all update, or none of them.
        """
        params = [p for group in self.base.param_groups for p in group["params"]]
        grads = [g for p in params if (g := p.grad) is not None]
        on_device = not all(map(_IS_CPU, grads)) and any([not (g.is_cpu or g.is_meta) for g in grads])
        cannot_skip = self.nonfinite is None and on_device and not takes_found_inf(self.base)
        if self.nonfinite == "ignore" or cannot_skip:
            return self._run()
        is_finite = kernels.all_finite(grads)
        is_bad = not is_finite if isinstance(is_finite, bool) else ~is_finite
        if hasattr(self.base, "process_group"):
            together = together + dtensor.own_group(self.base)
        if together:  # also a rank that has no gradient: others wait for it
            is_bad = dtensor.any_over(is_bad, together, dtensor.local(params[0]).device)
        if isinstance(is_bad, Tensor) and takes_found_inf(self.base) and self.nonfinite != "raise":
            self._count(is_bad)
            return self._run(is_bad.float())
        if not is_bad:
            return self._run()
        if self.nonfinite == "raise":
            raise FloatingPointError("a gradient at w or w + e has an inf or NaN, and nonfinite='raise'")
        self._count(True)
        self.base._opt_called = True  # type: ignore[attr-defined]
        return False

    def scaled(self, found_inf: Tensor, grad_scale: Tensor | None) -> bool:
        """As GradScaler has set it up: gradients still scaled where grad_scale is given, and checked by it."""
        if takes_found_inf(self.base) and found_inf.device.type != "cpu":
            return self._run(found_inf, grad_scale)
        if bool(found_inf):  # the sync that GradScaler makes for such bases itself
            return False
        for group in self.base.param_groups:
            for p in group["params"]:
                if p.grad is not None and grad_scale is not None:
                    p.grad.div_(grad_scale.to(p.grad.device))
        return self._run()

    def _count(self, is_bad: bool | Tensor) -> None:
        if isinstance(is_bad, Tensor) and isinstance(self.num_skipped, Tensor):
            self.num_skipped.add_(is_bad)  # in place: a CUDA graph counts, too
            return
        self.num_skipped = self.num_skipped + (is_bad.long() if isinstance(is_bad, Tensor) else is_bad)
        if is_bad is True and str(self.num_skipped).strip("0") == "1":  # 1, 10, 100, ...
            warnings.warn(
                f"a gradient at w or w + e has an inf or NaN, and the step was skipped ({self.num_skipped} so far): "
                "if this happens often, lower lr or rho, or find the operation with torch.autograd.detect_anomaly(); "
                "nonfinite='raise' stops at once",
                stacklevel=6,
            )

    def _run(self, found_inf: Tensor | None = None, grad_scale: Tensor | None = None) -> bool:
        """Runs the base's step without its hooks and profiler range: those belong to the step of SAM."""
        step = type(self.base).step
        unhooked = step.__wrapped__ if getattr(step, "hooked", None) else step  # type: ignore[attr-defined]
        if found_inf is None:
            unhooked(self.base)
        else:
            self.base.found_inf, self.base.grad_scale = found_inf, grad_scale  # type: ignore[attr-defined]
            try:
                unhooked(self.base)
            finally:
                del self.base.found_inf, self.base.grad_scale  # type: ignore[attr-defined]
        self.base._opt_called = True  # type: ignore[attr-defined]  # for schedulers made on the base
        return True
