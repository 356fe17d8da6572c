"""One epoch of training, with or without SAM, and evaluation."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from sam_optim.core.errors import InputError

Batch = tuple[Tensor, Tensor]
Reduce = Callable[[Tensor], Tensor]
AMP = {"bf16": torch.bfloat16, "fp16": torch.float16}


class NonFiniteLoss(InputError):
    """Training has diverged."""


class Totals:
    """Sums over the examples of an epoch, on the device, so that no step waits for a number."""

    NAMES = ("loss", "perturbed_loss", "correct", "count", "passes")

    def __init__(self, device: torch.device | str = "cpu"):
        self.sums = torch.zeros(len(self.NAMES), dtype=torch.float64, device=device)
        self.newest = self.sums

    def add(self, loss: Tensor, perturbed: Tensor, correct: Tensor, n: int, passes: int = 0) -> None:
        counts = correct.new_tensor([n, n * passes]).double()
        self.newest = torch.cat([torch.stack([loss.double() * n, perturbed.double() * n, correct.double()]), counts])
        self.sums += self.newest

    def means(self) -> dict[str, float]:
        """loss, perturbed_loss and sharpness in units of the loss, accuracy in [0, 1], passes for each example."""
        return self._means(self.sums)

    def last(self) -> dict[str, float]:
        """The same of the last batch alone."""
        return self._means(self.newest)

    @staticmethod
    def _means(sums: Tensor) -> dict[str, float]:
        loss, perturbed, correct, count, passes = sums.tolist()
        count = max(count, 1.0)
        loss, perturbed = loss / count, perturbed / count
        return {
            "loss": loss,
            "accuracy": correct / count,
            "perturbed_loss": perturbed,
            "sharpness": perturbed - loss,
            "passes": passes / count,
        }


def train_epoch(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    batches: Iterable[Batch],
    criterion: Callable[[Tensor, Tensor], Tensor],
    *,
    device: torch.device | str = "cpu",
    amp: str | None = None,
    clip_grad: float | None = None,
    accumulate: int = 1,
    progress: Callable[[int, Totals], None] | None = None,
    scaler: torch.amp.GradScaler | None = None,
    mixup: Callable[[Tensor, Tensor], Batch] | None = None,
    after_step: Callable[[int, Totals], None] | None = None,
    totals: Totals | None = None,
    memory_format: torch.memory_format = torch.preserve_format,
    reduce: Reduce | None = None,
) -> dict[str, float]:
    """One pass over `batches`; with SAM two forward and backward passes for each.

    Args:
        optimizer: SAM and ASAM are recognized by their `perturbed` context; any other one takes a plain step.
        criterion: (outputs, targets) -> the mean loss of the batch.
        amp: None, "bf16" or "fp16" (give the run's GradScaler as `scaler` then).
        clip_grad: largest 2-norm of the gradient of one update (the one at the perturbed weights).
        accumulate: batches for one update; each has its own perturbation. A last incomplete group counts as one.
        progress: called after every batch with (batches done, totals).
        mixup: (images, labels) -> (images, soft targets), before both passes.
        after_step: called after every update with (batches done, totals); may raise to stop.
        totals: continue these sums (a resumed epoch).
        reduce: sums a tensor over all ranks, in place; what is returned is then of all of them.

    Returns:
        loss, perturbed_loss and sharpness (their difference; 0 for a plain optimizer) in units of the loss, accuracy
        against the largest entry of the targets, passes (forward and backward) for each example, images_per_s,
        num_updates.

    Raises:
        NonFiniteLoss: the mean loss of the epoch, or of a batch on the CPU, is nan or inf.
    """
    device = torch.device(device)
    totals = totals or Totals(device)
    step = _Step(model, optimizer, criterion, device, amp, scaler, memory_format)
    model.train()
    optimizer.zero_grad(set_to_none=True)
    start, images, num_updates, done = time.perf_counter(), 0, 0, 0
    for group in _groups(batches, accumulate):
        for i, (x, y) in enumerate(group):
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            x, y = mixup(x, y) if mixup else (x, y)
            step.backward(x, y, 1 / len(group), totals, last=i + 1 == len(group))
            images, done = images + len(y), done + 1
            if progress:
                progress(done, totals)
        step.update(clip_grad)
        num_updates += 1
        if after_step:
            after_step(done, totals)
    num_seen = totals.sums.new_tensor(images)
    if reduce:
        reduce(totals.sums)
        reduce(num_seen)
    means = totals.means()
    check_finite(means["loss"])
    seconds = max(time.perf_counter() - start, 1e-9)
    return means | {"images_per_s": float(num_seen) / seconds, "num_updates": num_updates}


class _Step:
    """The gradients of one batch, at the weights or (SAM) at the perturbed ones, and the update with them."""

    def __init__(self, model, optimizer, criterion, device, amp, scaler, memory_format):
        self.model, self.optimizer, self.criterion, self.scaler = model, optimizer, criterion, scaler
        self.device, self.dtype, self.memory_format = device, AMP[amp] if amp else None, memory_format
        self.sharpness_aware = hasattr(optimizer, "perturbed")

    def backward(self, x: Tensor, y: Tensor, weight: float, totals: Totals, *, last: bool = True) -> None:
        """Adds the gradient of a batch; ranks exchange theirs with the `last` batch of an update."""
        if x.ndim == 4:
            x = x.contiguous(memory_format=self.memory_format)
        with nullcontext() if last or not hasattr(self.model, "no_sync") else self.model.no_sync():
            self.passes = 0
            outputs, loss, perturbed = self._gradient(x, y, weight)
        if self.device.type == "cpu":
            check_finite(loss.item())
        labels = y.argmax(1) if y.ndim == 2 else y
        totals.add(loss, perturbed, (outputs.argmax(1) == labels).sum(), len(y), self.passes)

    def _gradient(self, x: Tensor, y: Tensor, weight: float) -> tuple[Tensor, Tensor, Tensor]:
        if not self.sharpness_aware:
            outputs, loss = self._pass(x, y, weight)
            return outputs, loss, loss
        with self.optimizer.microbatch():
            if getattr(self.optimizer, "one_pass", False):  # e is known before the pass
                with self.optimizer.perturbed() if self.optimizer.ascends else nullcontext():
                    outputs, loss = self._pass(x, y, weight)
                return outputs, loss, loss
            outputs, loss = perturbed = self._pass(x, y, weight)
            if getattr(self.optimizer, "ascends", True):  # not where a schedule says 0
                with self.optimizer.perturbed():
                    perturbed = self._pass(x, y, weight)
        return outputs, loss, perturbed[1]

    def _pass(self, x: Tensor, y: Tensor, weight: float) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, self.dtype) if self.dtype else nullcontext():
            outputs = self.model(x)
            loss = self.criterion(outputs, y)
        self.passes += 1
        scaled = loss if weight == 1 else loss * weight
        (self.scaler.scale(scaled) if self.scaler else scaled).backward()
        return outputs.detach(), loss.detach()

    def update(self, clip_grad: float | None) -> None:
        if clip_grad is not None:
            if self.scaler:
                self.scaler.unscale_(self.optimizer)
            nn.utils.clip_grad_norm_((p for g in self.optimizer.param_groups for p in g["params"]), clip_grad)
        if self.scaler:
            self.scaler.step(self.optimizer)
            self.scaler.update()
        else:
            self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)


def _groups(batches: Iterable[Batch], size: int) -> Iterable[list[Batch]]:
    group: list[Batch] = []
    for batch in batches:
        group.append(batch)
        if len(group) == size:
            yield group
            group = []
    if group:
        yield group


def check_finite(loss: float) -> None:
    if not math.isfinite(loss):
        raise NonFiniteLoss(f"the loss is {loss}: training diverged; lower --lr or --sam-rho, or set --clip-grad 1")


@torch.no_grad()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    criterion: Callable[[Tensor, Tensor], Tensor],
    *,
    device: torch.device | str = "cpu",
    reduce: Reduce | None = None,
) -> dict[str, Any]:
    """Mean loss (in units of the criterion) and accuracy in [0, 1] in eval mode; the model's mode comes back.

    reduce: sums a tensor over all ranks, each of which has its own batches.
    """
    device = torch.device(device)
    totals = Totals(device)
    flags = [(m, m.training) for m in model.modules()]
    try:
        model.eval()
        for x, y in batches:
            x, y = x.to(device, non_blocking=True), y.to(device, non_blocking=True)
            outputs = model(x)
            loss = criterion(outputs, y)
            totals.add(loss, loss, (outputs.argmax(1) == y).sum(), len(y))
    finally:
        for m, training in flags:
            m.training = training
    if reduce:
        reduce(totals.sums)
    means = totals.means()
    return {"loss": means["loss"], "accuracy": means["accuracy"]}
