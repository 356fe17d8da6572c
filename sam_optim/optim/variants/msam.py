"""Momentum-SAM."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from sam_optim.optim.kernels import Backups, dtensor
from sam_optim.optim.sam import SAM


class MSAM(SAM):
    """w <- base(w, grad L(w + e)),   e = -rho T^2 v / ||T v||_2,   v the momentum of the base: one pass a step.

    v is SGD's momentum buffer (the last gradient where momentum = 0), or the first moment of Adam and AdamW. e is 0 in
    the first step. Weights rest at w: e is there only while the pass runs, so that checkpoints, evaluation and averages
    see w, and there is no mode to switch.

        loss = optimizer.step(closure)       # runs once, at w + e, and returns the loss there

        with optimizer.perturbed():          # or around forward and backward in a loop of your own
            criterion(model(x), y).backward()
        optimizer.step()

    BatchNorm's running statistics are those at w + e: after training, `torch.optim.swa_utils.update_bn(loader, model)`
    estimates them at w. Weight decay that is part of the gradient (of SGD and Adam) is taken at w + e, as in the
    authors' code; AdamW's acts at w.

    Args:
        params, base_optimizer, kwargs: as for `SAM`. replay_rng has nothing to do.
        rho: the radius; the authors use larger ones than for SAM (3 where SAM has 0.2, on CIFAR-100).

    Raises:
        ValueError: a base other than torch's SGD, Adam and AdamW, whose momentum is not known.

    Source: Becker et al. (2024), arXiv:2401.12033.
    """

    one_pass = True
    reverses = True

    def __init__(
        self,
        params: Iterable[Any],
        base_optimizer: Callable[..., Optimizer] = torch.optim.SGD,
        *,
        rho: float | Tensor = 0.3,
        **kwargs: Any,
    ):
        super().__init__(params, base_optimizer, rho=rho, **kwargs)

    def check_variant(self, base: Optimizer) -> None:
        if not isinstance(base, torch.optim.SGD | torch.optim.Adam):
            raise ValueError(
                f"MSAM perturbs along the momentum of its base, and it is not known where {type(base).__name__} "
                "keeps that: use torch.optim.SGD with momentum, Adam or AdamW"
            )
        self._momenta = ("momentum_buffer", "last_gradient") if isinstance(base, torch.optim.SGD) else ("exp_avg",)

    def ascent_gradient(self, params: Sequence[Tensor], grads: Sequence[Tensor] | None) -> list[Tensor | None]:
        """The momentum, as the base has it."""
        return [
            next((v for v in (self.recall(p, name) for name in self._momenta) if v is not None), None) for p in params
        ]

    def has_moved(self, backups: Backups) -> None:
        if any(map(_is_coupled, self.param_groups)):
            for p, e in backups.displacements().items():
                self.remember(p, "displacement", e)

    def update_gradient(
        self, params: Sequence[Tensor], grads: Sequence[Tensor], scale: Tensor | None
    ) -> Sequence[Tensor]:
        moved = {p: e for (p, name), e in self._pending.items() if name == "displacement"}
        self._pending.clear()
        group_of = {p: group for group in self.param_groups for p in group["params"]}
        new = []
        for p, g in zip(params, grads, strict=True):
            group = group_of[p]
            sign, decay = (-1 if group.get("maximize") else 1), group["weight_decay"]
            if p in moved and _is_coupled(group):
                e = moved[p] if scale is None else moved[p] * scale.to(moved[p].device)
                g = g + (sign * decay * e).to(g.dtype)
            if group.get("momentum") == 0:  # then SGD keeps none
                unscaled = g if scale is None else g / scale.to(g.device)
                self.remember(p, "last_gradient", sign * unscaled + decay * dtensor.local(p.detach()))
            new.append(g)
        return new


def _is_coupled(group: dict[str, Any]) -> bool:
    """Whether weight decay is part of the gradient."""
    return bool(group["weight_decay"]) and not group.get("decoupled_weight_decay", False)
