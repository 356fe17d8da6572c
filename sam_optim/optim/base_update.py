"""The base optimizer: what can be one, and its update with the gradients that a perturbed pass has left."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sam_optim.optim import kernels
from sam_optim.optim.kernels import dtensor as shards
from sam_optim.optim.outside import inside

NONFINITE = (None, "skip", "raise", "ignore")


def accepted(factory: Callable[..., Any], flags: dict[str, Any]) -> dict[str, Any]:
    """The flags that the base knows. They also mean SAM's own moves; fused on CUDA."""
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
    """Raises for what cannot be the base of SAM, whose own hyperparameters are `keys`."""
    if not isinstance(base, Optimizer):
        raise TypeError(f"the base must be a torch.optim.Optimizer, got {type(base).__name__}")
    closure = inspect.signature(type(base).step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise ValueError(f"{type(base).__name__} needs a closure for its own step, and cannot be the base of SAM")
    own = inspect.signature(type(base).__init__).parameters
    if clash := [k for k in keys if k in own and k in base.defaults]:
        raise ValueError(
            f"{type(base).__name__} has a hyperparameter {clash[0]!r} of its own, which means something else: use "
            "sam_optim.Perturbation around it, which keeps its own groups"
        )
    if any(g.get("differentiable") for g in base.param_groups):
        raise ValueError("differentiable=True is not supported: the perturbed weights are not part of a graph")


def takes_found_inf(base: Optimizer) -> bool:
    """Whether the base can leave out a step by a flag on the device: fused ones."""
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
        self._descent: Any = None

    @property
    def may_restore(self) -> bool:
        """Whether there are kernels that update from where the clean weights are saved: exactly these bases, fused."""
        is_known = type(self.base) in (torch.optim.SGD, torch.optim.Adam, torch.optim.AdamW)
        return is_known and all(g.get("fused") for g in self.base.param_groups)

    def fused(self, buckets: list[kernels.Bucket]) -> Any:
        """An update that brings back what has moved; None where there is none: the first one makes the base's state."""
        if not buckets or not self.may_restore or not all(b.body.__name__.endswith(".triton") for b in buckets):
            return None
        if self._descent is None:
            from sam_optim.optim.kernels.triton_descent import Descent

            self._descent = Descent(self.base)
        return self._descent.update([p for b in buckets for p in b.params], [x for b in buckets for x in b.saved])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_descent": None}

    def __call__(self, together: shards.Groups, fused: Any = None) -> bool:
        """Whether the update has also brought the weights back, as a `fused` one does.

        together: process groups whose ranks must all update, or none of them.
        """
        params = self._parameters()
        on_device = any(p.device.type not in ("cpu", "meta") for p in params)
        cannot_skip = self.nonfinite is None and on_device and not takes_found_inf(self.base)
        if self.nonfinite == "ignore" or cannot_skip:
            return self._run(fused)
        together = together + shards.own_group(self.base)
        if fused is not None and not together and self.nonfinite != "raise":
            return self._run(fused, skipped=self._counter(params[0].device))
        grads = [p.grad for p in params if p.grad is not None and not p.grad.is_meta]
        is_finite = kernels.finite(grads)
        is_bad = not is_finite if isinstance(is_finite, bool) else ~is_finite
        if together:  # also a rank that has no gradient: the others wait for its answer
            is_bad = shards.any_over(is_bad, together, shards.local(params[0]).device)
        if isinstance(is_bad, Tensor):
            if takes_found_inf(self.base):
                self._count(is_bad)
                return self._run(fused, is_bad.float())
            is_bad = bool(is_bad)
        if is_bad and self.nonfinite == "raise":
            raise FloatingPointError("the gradient at w + e has an inf or NaN, and nonfinite='raise'")
        if is_bad:
            self._count(True)
            self.base._opt_called = True  # type: ignore[attr-defined]
            return False
        return self._run(fused)

    def scaled(self, found_inf: Tensor, grad_scale: Tensor | None, fused: Any = None) -> bool:
        """As GradScaler has set it up: gradients still scaled where grad_scale is given, and checked by it."""
        if fused is not None or (takes_found_inf(self.base) and found_inf.device.type != "cpu"):
            return self._run(fused, found_inf, grad_scale)
        if bool(found_inf):  # the sync that GradScaler makes for such bases itself
            return False
        for p in self._parameters():
            if p.grad is not None and grad_scale is not None:
                p.grad.div_(grad_scale.to(p.grad.device))
        return self._run()

    def _count(self, is_bad: bool | Tensor) -> None:
        if isinstance(is_bad, Tensor) and isinstance(self.num_skipped, Tensor):
            self.num_skipped.add_(is_bad)  # in place: a CUDA graph counts, too
        else:
            self.num_skipped = self.num_skipped + (is_bad.long() if isinstance(is_bad, Tensor) else is_bad)

    def _counter(self, device: torch.device) -> Tensor:
        if not isinstance(self.num_skipped, Tensor):
            self.num_skipped = torch.full((), self.num_skipped, dtype=torch.int64, device=device)
        return self.num_skipped

    def _run(
        self,
        fused: Any = None,
        found_inf: Tensor | None = None,
        grad_scale: Tensor | None = None,
        skipped: Tensor | None = None,
    ) -> bool:
        """Without the hooks and the profiler range of the base's step: those are this step's."""
        if fused is not None:
            self._descent.run(fused, found_inf, grad_scale, skipped)
            self.base._opt_called = True  # type: ignore[attr-defined]
            return True
        step = type(self.base).step
        unhooked = step.__wrapped__ if getattr(step, "hooked", None) else step  # type: ignore[attr-defined]
        if type(self.base).__module__.startswith("torch.optim."):  # of others Dynamo would drop attributes
            unhooked = inside(unhooked)
        if found_inf is None:
            unhooked(self.base)
        else:
            self.base.found_inf, self.base.grad_scale = found_inf, grad_scale  # type: ignore[attr-defined]
            try:
                unhooked(self.base)
            finally:
                del self.base.found_inf, self.base.grad_scale  # type: ignore[attr-defined]
        self.base._opt_called = True  # type: ignore[attr-defined]  # for schedulers made on the base
        return False

    def _parameters(self) -> list[Tensor]:
        return [p for group in self.base.param_groups for p in group["params"]]
