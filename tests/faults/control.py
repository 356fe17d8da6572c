"""Training with gradients that are not finite, written out by hand: the same steps, but for those that are left out."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import torch

from faults.cases import by_contexts, by_two_steps
from faults.harness import Path, Rig, seed
from sam_optim import Perturbation


class Control(Rig):
    """The same model, with a plain optimizer and no SAM around it; `Perturbation` moves."""

    def __init__(self, rig: Rig):
        super().__init__(rig.variant, Path(by_contexts, wrapped=False, scaler=rig.path.scaler))
        self.num_batches = rig.path.num_batches
        self.mean_at_end = rig.path.mean_at_end
        self.replays_all = rig.path.step not in (by_contexts, by_two_steps)

    def step(self, i: int, *, skip: bool = False) -> None:
        """skip: no update, but both passes, for the first changes buffers."""
        seed(i)
        total: list[Any] = [None] * len(list(self.model.parameters()))
        for k in range(self.num_batches):
            self._two_passes(self.num_batches * i + k)
            grads = [p.grad for p in self.model.parameters()]
            total = [g if t is None else t + g for t, g in zip(total, grads, strict=True)]
        for p, g in zip(self.model.parameters(), total, strict=True):
            p.grad = g / self.num_batches if self.mean_at_end and self.num_batches > 1 else g
        if self.scaler is not None:
            if skip:
                next(self.model.parameters()).grad.view(-1)[0] = torch.inf
            self.scaler.step(self.base)
            self.scaler.update()
        elif not skip:
            self.base.step()

    def _two_passes(self, i: int) -> None:
        assert isinstance(self.sam, Perturbation)
        weight = 1.0 if self.mean_at_end else 1 / self.num_batches
        self.base.zero_grad()
        with self.sam.microbatch() if self.replays_all else nullcontext():
            self.backward(1, i, weight)
            with self.sam.perturbed():
                self.backward(2, i, weight)
