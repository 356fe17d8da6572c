"""The step written out by hand: what training with a gradient that is not finite has to be equal to."""

from __future__ import annotations

import random
from contextlib import nullcontext
from typing import Any

import numpy
import torch
from torch import nn
from torch.func import functional_call

from faults.cases import by_contexts, by_two_steps
from faults.harness import Path, Rig, batch
from sam_optim import Perturbation


class Control(Rig):
    """The same model, with a plain optimizer and no SAM around it. Where no gradient is bad, `Perturbation` moves."""

    def __init__(self, rig: Rig):
        super().__init__(rig.variant, Path(by_contexts, wrapped=False, scaler=rig.path.scaler))
        self.num_batches = rig.path.num_batches
        self.mean_at_end = rig.path.mean_at_end
        self.replays_all = rig.path.step not in (by_contexts, by_two_steps)

    def step(self, i: int, *, bad_ascent: bool = False, skip: bool = False) -> None:
        """bad_ascent: of the last batch, which then has e = 0. skip: no update."""
        total: list[Any] = [None] * len(list(self.model.parameters()))
        for k in range(self.num_batches):
            self._two_passes(self.num_batches * i + k, bad_ascent and k == self.num_batches - 1)
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

    def _two_passes(self, i: int, bad_ascent: bool) -> None:
        assert isinstance(self.sam, Perturbation)
        weight = 1.0 if self.mean_at_end else 1 / self.num_batches
        self.base.zero_grad()
        if not bad_ascent:
            with self.sam.microbatch() if self.replays_all else nullcontext():
                self.backward(1, i, weight)
                with self.sam.perturbed():
                    self.backward(2, i, weight)
            return
        start = [_generators()]
        if not self.replays_all:  # the generators' state is that of the first forward pass of the model
            hook = self.model.register_forward_pre_hook(lambda *_: start.append(_generators()))
        self.backward(1, i, weight)
        if not self.replays_all:
            hook.remove()
        buffers, drawn = [b.clone() for b in self.model.buffers()], _generators()
        self.base.zero_grad()
        if self.sam.replay_rng:
            _restore(start[-1])
        if self.sam.rounding == "float32":
            self._backward_in_float32(i, weight)
        else:
            self.backward(2, i, weight)
        if self.sam.replay_rng:
            _restore(drawn)
        for b, clean in zip(self.model.buffers(), buffers, strict=True):
            b.copy_(clean)
        self.sam.forget()

    def _backward_in_float32(self, i: int, weight: float) -> None:
        """As `backward`, of the same function with float32 weights and buffers; rounds the gradients."""
        x, y = batch(i, self.variant.dtype)
        x = x + 0.01 * (random.random() + numpy.random.rand())
        leaves = {k: p.detach().float().requires_grad_() for k, p in self.model.named_parameters()}
        buffers = {k: b.float() if b.is_floating_point() else b.clone() for k, b in self.model.named_buffers()}
        outputs = functional_call(self.model, leaves | buffers, (x.float(),))
        (nn.functional.cross_entropy(outputs, y) * weight).backward()
        for k, p in self.model.named_parameters():
            p.grad = leaves[k].grad.to(p.dtype)


def _generators() -> tuple[Any, ...]:
    return torch.get_rng_state(), random.getstate(), numpy.random.get_state()


def _restore(state: tuple[Any, ...]) -> None:
    torch.set_rng_state(state[0])
    random.setstate(state[1])
    numpy.random.set_state(state[2])
