"""A training run as a whole: what a checkpoint holds, epoch after epoch, stopping and going on."""

from __future__ import annotations

import argparse
import inspect
import json
import math
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from benchmarks import command
from benchmarks.command import InputError, Interrupted, Signals
from benchmarks.train import checkpoint, data, ranks, recipe
from benchmarks.train import epoch as engine
from benchmarks.train.epoch import Batch, NonFiniteLoss, Totals
from benchmarks.train.order import derive, seed_all
from benchmarks.train.ranks import ALONE, Agreed, World

EVERY_LINE, EVERY_DRAWING = 60.0, 0.5  # seconds between two lines of a log, and between two states of a bar


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

    Args:
        world: the processes that train together; each must make the same calls. One of them writes.
        initial: start from --initial-checkpoint; False where a checkpoint of the run is loaded anyway.
    """

    def __init__(
        self,
        args: argparse.Namespace,
        splits: data.Splits,
        device: torch.device,
        *,
        world: World = ALONE,
        initial: bool = True,
    ):
        self.args, self.splits, self.device, self.world = args, splits, device, world
        self.position, self.totals = Position(), Totals(device)
        self.signals = Agreed(Signals(), ALONE)
        self.train_batches = self._batches(splits.train, train=True)
        self.held_out = {"test": splits.test} | ({"validation": splits.validation} if splits.validation else {})
        self.model = recipe.model(args, splits, initial=initial).to(device)
        self.ema = self._ema()
        self.network = self._network()
        self.optimizer = recipe.optimizer(args, self.model, self.network if self.ddp else None)
        self.scaler = torch.amp.GradScaler(device.type) if args.amp == "fp16" else None
        self.mixup = recipe.mixup(args, splits.num_classes)
        self._set_rates = recipe.scheduler(args, self.optimizer, -(-len(self.train_batches) // args.accumulate))
        self._check_mixup()

    def _network(self) -> nn.Module:
        """The model as a batch is given to it."""
        if self.args.fsdp:
            if not torch.distributed.is_initialized():
                raise InputError("--fsdp spreads the model over processes: start them with torchrun")
            for model in self._models().values():
                ranks.shard_(model, self.device)
        network = torch.compile(self.model) if self.args.compile else self.model
        self.ddp = self.world.size > 1 and not self.args.fsdp
        if not self.ddp:
            return network
        ddp, ids = nn.parallel.DistributedDataParallel, [self.device.index] if self.device.type == "cuda" else None
        known = inspect.signature(ddp).parameters
        own_buffers = {"forward_sync_buffers" if "forward_sync_buffers" in known else "broadcast_buffers": False}
        return ddp(network, device_ids=ids, **own_buffers)

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
            world=self.world,
        )

    def _ema(self) -> nn.Module | None:
        if self.args.model_ema is None:
            return None
        from timm.utils import ModelEmaV3

        # with --fsdp one by one: torch does not mix sharded weights and whole BatchNorm statistics in one call
        return ModelEmaV3(self.model, decay=self.args.model_ema, foreach=not self.args.fsdp)

    def _models(self) -> dict[str, nn.Module]:
        """What is saved and evaluated, by the prefix of its numbers."""
        return {"": self.model} | ({"ema_": self.ema.module} if self.ema else {})

    def _mean_statistics(self) -> None:
        """Before saving and evaluating: the average of --model-ema has followed this rank's own BatchNorm statistics,
        as the model has. Every rank must call it."""
        for model in self._models().values():
            self.world.mean_buffers_(model)

    def _check_mixup(self) -> None:
        """timm's pairs the images of a batch: all are whole, and --batch-size is even, unless there are too few
        examples for one. They are one batch then, and each process has its share. (A stream's are always whole.)"""
        order = getattr(self.train_batches, "order", None)
        if not self.mixup or order is None:
            return
        odd = [n for part in order.shares(0) if (n := part.stop - part.start) % 2]
        if odd:
            even = order.n // order.size // 2 * 2
            raise InputError(
                f"--mixup and --cutmix pair the images of a batch, and {order.n} examples make one of {odd[0]}"
                + (" in a process: " if order.size > 1 else ": ")
                + (f"set --batch-size {even}" if even else "leave --mixup and --cutmix out")
            )

    # state

    def state(self) -> dict[str, Any]:
        """Tensors and plain values only, so that it loads with weights_only. Every rank must call it."""
        self._mean_statistics()
        if self.args.fsdp:
            model, optimizer = ranks.full_state(self.model, self.optimizer)
            ema = ranks.full_model_state(self.ema.module) if self.ema else None
        else:
            model, optimizer = self.model.state_dict(), self.optimizer.state_dict()
            ema = self.ema.module.state_dict() if self.ema else None
        return {
            "step": self.position.updates,
            "position": asdict(self.position),
            "totals": self.world.sum_(self.totals.sums.clone()).cpu(),
            "model": model,
            "optimizer": optimizer,
            "ema": ema,
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "schedule": self._set_rates.state_dict() if isinstance(self._set_rates, recipe.Plateau) else None,
        }

    def load(self, state: dict[str, Any]) -> None:
        try:
            if self.args.fsdp:
                ranks.load_full_state(self.model, self.optimizer, (state["model"], state["optimizer"]))
            else:
                self.model.load_state_dict(state["model"])
                self.optimizer.load_state_dict(state["optimizer"])
            if self.ema and self.args.fsdp:
                ranks.load_full_model_state(self.ema.module, state["ema"])
            elif self.ema:
                self.ema.module.load_state_dict(state["ema"])
            if self.scaler:
                self.scaler.load_state_dict(state["scaler"])
            if isinstance(self._set_rates, recipe.Plateau):
                self._set_rates.load_state_dict(state["schedule"])
            self.position = Position(**state["position"])
            if self.world.main:  # the sums of all ranks
                self.totals.sums.copy_(state["totals"])
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"the checkpoint does not fit this run's options: {command.one_line(error)}") from None

    def save(self) -> None:
        """Never overwrites a good checkpoint with weights that are not finite. Every rank must call it."""
        state = self.state()
        if not self.world.main:
            return
        for name, tensor in state["model"].items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise NonFiniteLoss(f"{name} is not finite: training diverged; lower --lr or set --clip-grad 1")
        checkpoint.save(self.args.out / "checkpoints", state)

    # running

    def run(self, signals: Signals) -> None:
        """From the position to the last epoch; every way out leaves a valid checkpoint.

        Raises:
            Interrupted: a signal came; everything done so far is saved.
            NonFiniteLoss: the message names the last good checkpoint.
        """
        self.signals = Agreed(signals, self.world)
        try:
            while self.position.epoch < self.args.epochs:
                self._epoch()
                self.signals.check()
            self.signals.settle()
        except Interrupted:
            self.save()
            raise
        except NonFiniteLoss as error:
            last = checkpoint.found(self.args.out / "checkpoints")
            kept = f"the last good checkpoint is {last[0]}" if last else "there is no checkpoint yet"
            raise NonFiniteLoss(f"{error}; {kept}") from None

    def train_epoch(self) -> dict[str, float]:
        """The rest of the epoch in which the run is, without evaluation; what `engine.train_epoch` returns."""
        epoch, first = self.position.epoch, self.position.batch
        self.train_batches.set_epoch(epoch, first)
        self._set_rates(self.position.updates)
        title, size = f"epoch {epoch + 1}/{self.args.epochs}", self.args.batch_size * self.world.size
        with _Bar(title, len(self.train_batches), first, size, self.world.main, self.args.sam_rho > 0) as bar:
            return engine.train_epoch(
                self.network,
                self.optimizer,
                _seeded(self.train_batches, self.args.seed, epoch, first, self.world.rank),
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
                reduce=self.world.sum_,
            )

    def _epoch(self) -> None:
        epoch, start = self.position.epoch, time.perf_counter()
        found = self.train_epoch()
        record = {"epoch": epoch + 1, "step": self.position.updates, "lr": self.optimizer.param_groups[0]["lr"]}
        record |= {f"train_{k}": found[k] for k in ("loss", "accuracy", "perturbed_loss", "sharpness")}
        if (epoch + 1) % self.args.eval_every == 0 or epoch + 1 == self.args.epochs:
            record |= self._evaluate()
        record |= {"images_per_s": found["images_per_s"], "seconds": time.perf_counter() - start}
        followed = "validation_loss" if "validation" in self.held_out else "train_loss"
        if isinstance(self._set_rates, recipe.Plateau) and followed in record:  # never one loss against the other
            self._set_rates.epoch(record[followed])
        if self.world.main:
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
        self._mean_statistics()
        record = {}
        for prefix, model in self._models().items():
            for name, split in self.held_out.items():
                batches = _checking(self._batches(split), self.signals)
                found = engine.evaluate(
                    model, batches, nn.CrossEntropyLoss(), device=self.device, reduce=self.world.sum_
                )
                engine.check_finite(found["loss"])
                record |= {f"{prefix}{name}_{key}": value for key, value in found.items()}
        return record

    def _log(self, record: dict[str, Any]) -> None:
        """One line for each epoch; those of a run that was stopped later than its checkpoint are replaced."""
        path = self.args.out / "metrics.jsonl"
        earlier = [r for r in command.read_jsonl(path) if r["epoch"] < record["epoch"]]
        lines = [json.dumps(r, allow_nan=False) + "\n" for r in [*earlier, record]]
        command.write_atomic(path, "".join(lines).encode())
        print(line(record, sharpness=self.args.sam_rho > 0), flush=True)


def line(record: dict[str, Any], *, sharpness: bool) -> str:
    """What is printed of an epoch: training, then whatever was evaluated, of the average of --model-ema too."""
    evaluated = [
        f"{average}{split}_{key}"
        for average in ("", "ema_")
        for split in ("validation", "test")
        for key in ("loss", "accuracy")
    ]
    shown = ["train_loss", "train_accuracy", *(["train_sharpness"] if sharpness else []), *evaluated]
    numbers = "  ".join(f"{k.replace('_', ' ').removeprefix('train ')} {record[k]:.4f}" for k in shown if k in record)
    return f"epoch {record['epoch']:3d}  {numbers}  {record['images_per_s']:.0f} images/s"


def _seeded(batches: Iterable[Batch], seed: int, epoch: int, first: int, rank: int = 0) -> Iterator[Batch]:
    """Mixup, dropout and stochastic depth of a batch draw from the global generators, set anew for each."""
    others = (rank,) if rank else ()
    for i, batch in enumerate(batches, start=first):
        seed_all(derive(seed, "step", epoch, i, *others))
        yield batch


def _checking(batches: Iterable[Batch], signals: Agreed) -> Iterator[Batch]:
    for batch in batches:
        signals.check_here()
        yield batch


class _Bar:
    """A progress bar on a terminal, elsewhere (a cluster's log) a line every minute; numbers are read from the device
    only when it is redrawn."""

    def __init__(self, title: str, total: int, first: int, batch_size: int, shown: bool = True, sharp: bool = True):
        disable = None if shown else True
        self.bar = tqdm(
            total=total, initial=first, desc=title, leave=False, disable=disable, file=sys.stderr, unit="batch"
        )
        self.title, self.total, self.first = title, total, first
        self.sharp = sharp  # whether there is a perturbed loss
        self.every = (EVERY_LINE if self.bar.disable else EVERY_DRAWING) if shown else math.inf  # seconds
        self.batch_size, self.start = batch_size, time.perf_counter()
        self.drawn = self.start if self.bar.disable else 0.0

    def __enter__(self) -> _Bar:
        return self

    def __exit__(self, *_: object) -> None:
        self.bar.close()

    def __call__(self, done: int, totals: Totals) -> None:
        self.bar.update(1)
        now = time.perf_counter()
        if now - self.drawn < self.every:
            return
        self.drawn = now
        means = totals.means()
        sharpness = f"sharpness {totals.last()['sharpness']:.4f} " if self.sharp else ""
        said = (
            f"loss {means['loss']:.3f} accuracy {means['accuracy']:.3f} {sharpness}"
            f"{done * self.batch_size / (now - self.start):.0f} images/s"
        )
        if self.bar.disable:
            print(f"{self.title}, batch {self.first + done} of {self.total}: {said}", flush=True)
        else:
            self.bar.set_postfix_str(said)
