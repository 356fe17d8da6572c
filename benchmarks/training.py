"""A training run as a whole: what a checkpoint holds, epoch after epoch, stopping and going on."""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from benchmarks import checkpoint, command, data, engine, recipe
from benchmarks.command import InputError, Interrupted, Signals
from benchmarks.engine import Batch, NonFiniteLoss, Totals
from benchmarks.order import derive, seed_all


@dataclass
class Position:
    """Where a run is: `batch` batches of epoch `epoch` (both from 0) are done, after `updates` updates in all."""

    epoch: int = 0
    batch: int = 0
    updates: int = 0


class Training:
    """Model, optimizer, schedule and position, made from the options of a run.

    Nothing that is random has a state: the order of the examples, their augmentation, mixup and dropout are functions
    of (--seed, epoch, batch), so weights, optimizer and position are all that a checkpoint needs to go on bitwise.
    """

    def __init__(self, args: argparse.Namespace, splits: data.Splits, device: torch.device):
        self.args, self.splits, self.device = args, splits, device
        self.position, self.totals = Position(), Totals(device)
        self.train_batches = self._batches(splits.train, train=True)
        self.held_out = {"test": splits.test} | ({"validation": splits.validation} if splits.validation else {})
        self.model = recipe.model(args, splits).to(device)
        self.ema = self._ema()
        self.optimizer = recipe.optimizer(args, self.model)
        self.scaler = torch.amp.GradScaler(device.type) if args.amp == "fp16" else None
        self.mixup = recipe.mixup(args, splits.num_classes)
        self._set_rates = recipe.scheduler(args, self.optimizer, -(-len(self.train_batches) // args.accumulate))
        self.network = torch.compile(self.model) if args.compile else self.model
        self._check_mixup()

    def _batches(self, split: Any, *, train: bool = False) -> Any:
        return data.batches(
            split,
            self.args.batch_size if train else max(self.args.batch_size, 256),
            self.splits.image_size,
            train=train,
            augment=recipe.augmentation(self.args),
            seed=self.args.seed,
            workers=self.args.workers,
            pin_memory=self.device.type == "cuda",
        )

    def _ema(self) -> nn.Module | None:
        if self.args.model_ema is None:
            return None
        from timm.utils import ModelEmaV3

        return ModelEmaV3(self.model, decay=self.args.model_ema)

    def _check_mixup(self) -> None:
        if self.mixup and len(self.splits.train) < self.args.batch_size and len(self.splits.train) % 2:
            n = len(self.splits.train)
            raise InputError(f"--mixup pairs the images of a batch, and there are only {n}: set --batch-size {n - 1}")

    # state

    def state(self) -> dict[str, Any]:
        """Tensors and plain values only, so that it loads with weights_only."""
        return {
            "step": self.position.updates,
            "position": asdict(self.position),
            "totals": self.totals.sums.cpu(),
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "ema": self.ema.module.state_dict() if self.ema else None,
            "scaler": self.scaler.state_dict() if self.scaler else None,
        }

    def load(self, state: dict[str, Any]) -> None:
        try:
            self.model.load_state_dict(state["model"])
            self.optimizer.load_state_dict(state["optimizer"])
            if self.ema:
                self.ema.module.load_state_dict(state["ema"])
            if self.scaler:
                self.scaler.load_state_dict(state["scaler"])
            self.position = Position(**state["position"])
            self.totals.sums.copy_(state["totals"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"the checkpoint does not fit this run's options: {command.one_line(error)}") from None

    def save(self) -> None:
        """Never overwrites a good checkpoint with weights that are not finite."""
        for name, tensor in self.model.state_dict().items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise NonFiniteLoss(f"{name} is not finite: training diverged; lower --lr or set --clip-grad 1")
        checkpoint.save(self.args.out / "checkpoints", self.state())

    # running

    def run(self, signals: Signals) -> None:
        """From the position to the last epoch; every way out leaves a valid checkpoint.

        Raises:
            Interrupted: a signal came; everything done so far is saved.
            NonFiniteLoss: the message names the last good checkpoint.
        """
        self.signals = signals
        try:
            while self.position.epoch < self.args.epochs:
                self._epoch()
                signals.check()
        except Interrupted:
            self.save()
            raise
        except NonFiniteLoss as error:
            last = checkpoint.found(self.args.out / "checkpoints")
            kept = f"the last good checkpoint is {last[0]}" if last else "there is no checkpoint yet"
            raise NonFiniteLoss(f"{error}; {kept}") from None

    def _epoch(self) -> None:
        epoch, first = self.position.epoch, self.position.batch
        start = time.perf_counter()
        self.train_batches.set_epoch(epoch, first)
        self._set_rates(self.position.updates)
        with _Bar(f"epoch {epoch + 1}/{self.args.epochs}", len(self.train_batches), first, self.args.batch_size) as bar:
            found = engine.train_epoch(
                self.network,
                self.optimizer,
                _seeded(self.train_batches, self.args.seed, epoch, first),
                nn.CrossEntropyLoss(label_smoothing=0.0 if self.mixup else self.args.smoothing),
                device=self.device,
                amp=self.args.amp,
                clip_grad=self.args.clip_grad,
                accumulate=self.args.accumulate,
                scaler=self.scaler,
                mixup=self.mixup,
                progress=bar,
                after_step=lambda done, totals: self._after_update(first + done),
                totals=self.totals,
                memory_format=torch.channels_last if self.args.channels_last else torch.preserve_format,
            )
        record = {"epoch": epoch + 1, "step": self.position.updates, "lr": self.optimizer.param_groups[0]["lr"]}
        record |= {f"train_{k}": found[k] for k in ("loss", "accuracy", "perturbed_loss", "sharpness")}
        if (epoch + 1) % self.args.eval_every == 0 or epoch + 1 == self.args.epochs:
            record |= self._evaluate()
        record |= {"images_per_s": found["images_per_s"], "seconds": time.perf_counter() - start}
        self._log(record)
        self.position.epoch, self.position.batch, self.totals = epoch + 1, 0, Totals(self.device)
        self.save()

    def _after_update(self, batch: int) -> None:
        self.position.batch = batch
        self.position.updates += 1
        self._set_rates(self.position.updates)
        if self.ema:
            self.ema.update(self.model, step=self.position.updates)
        self.signals.check()
        every = self.args.checkpoint_steps
        if every and self.position.updates % every == 0 and batch < len(self.train_batches):
            self.save()

    def _evaluate(self) -> dict[str, float]:
        models = {"": self.model} | ({"ema_": self.ema.module} if self.ema else {})
        record = {}
        for prefix, model in models.items():
            for name, split in self.held_out.items():
                batches = _checking(self._batches(split), self.signals)
                found = engine.evaluate(model, batches, nn.CrossEntropyLoss(), device=self.device)
                engine.check_finite(found["loss"])
                record |= {f"{prefix}{name}_{key}": value for key, value in found.items()}
        return record

    def _log(self, record: dict[str, Any]) -> None:
        """One line for each epoch; those of a run that was stopped later than its checkpoint are replaced."""
        path = self.args.out / "metrics.jsonl"
        earlier = [r for r in command.read_jsonl(path) if r["epoch"] < record["epoch"]]
        lines = [json.dumps(r, allow_nan=False) + "\n" for r in [*earlier, record]]
        command.write_atomic(path, "".join(lines).encode())
        shown = [
            k for k in ("train_loss", "train_accuracy", "train_sharpness", "test_loss", "test_accuracy") if k in record
        ]
        numbers = "  ".join(f"{k.replace('_', ' ').removeprefix('train ')} {record[k]:.4f}" for k in shown)
        print(f"epoch {record['epoch']:3d}  {numbers}  {record['images_per_s']:.0f} images/s", flush=True)


def _seeded(batches: Iterable[Batch], seed: int, epoch: int, first: int) -> Iterator[Batch]:
    """Mixup, dropout and stochastic depth of a batch draw from the global generators, set anew for each."""
    for i, batch in enumerate(batches, start=first):
        seed_all(derive(seed, "step", epoch, i))
        yield batch


def _checking(batches: Iterable[Batch], signals: Signals) -> Iterator[Batch]:
    for batch in batches:
        signals.check()
        yield batch


class _Bar:
    """A progress bar on a terminal, nothing elsewhere; numbers are read from the device only when it is redrawn."""

    def __init__(self, title: str, total: int, first: int, batch_size: int):
        self.bar = tqdm(
            total=total, initial=first, desc=title, leave=False, disable=None, file=sys.stderr, unit="batch"
        )
        self.batch_size, self.start, self.shown = batch_size, time.perf_counter(), 0.0

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def __call__(self, done: int, totals: Totals) -> None:
        if self.bar.disable:
            return
        self.bar.update(1)
        now = time.perf_counter()
        if now - self.shown < 0.5:
            return
        self.shown = now
        means, last = totals.means(), totals.last()
        self.bar.set_postfix_str(
            f"loss {means['loss']:.3f} accuracy {means['accuracy']:.3f} sharpness {last['sharpness']:.4f} "
            f"{done * self.batch_size / (now - self.start):.0f} images/s"
        )
