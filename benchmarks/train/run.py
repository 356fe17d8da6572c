"""A training run as a whole: its epochs, what a checkpoint holds, stopping and resuming."""

from __future__ import annotations

import inspect
import itertools
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

from benchmarks.command import Interrupted, Signals, read_jsonl
from benchmarks.train import checkpoint, epoch, ranks, recipe
from benchmarks.train.batches import batches
from benchmarks.train.data import Examples, Splits, some
from benchmarks.train.epoch import Batch, NonFiniteLoss, Totals
from benchmarks.train.options import Options
from benchmarks.train.order import Loading, derive, seed_all, seed_here
from benchmarks.train.ranks import ALONE, Agreed, World
from benchmarks.train.streams import Streamed
from sam_optim.core.errors import InputError, one_line
from sam_optim.core.files import write_atomic
from sam_optim.loss import Loss
from sam_optim.monitor import SharpnessMonitor

EVERY_LINE, EVERY_DRAWING = 60.0, 0.5  # seconds between two lines of a log, and between two states of a bar
PROBES, EVERY_PROBE = 256, 10  # training examples of --monitor, and the least steps between two of its rows


@dataclass
class Position:
    """Progress of a run: `batch` batches of epoch `epoch` (both from 0) are done, after `updates` updates in all."""

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
        options: Options,
        splits: Splits,
        device: torch.device,
        *,
        world: World = ALONE,
        initial: bool = True,
    ):
        self.options, self.splits, self.device, self.world = options, splits, device, world
        self.position, self.totals = Position(), Totals(device)
        self._is_recorded = False  # whether --out has had the config.json of a command
        self.signals = Agreed(Signals(), ALONE)
        self.train_batches = self._batches(splits.train, train=True)
        self.held_out = {"test": splits.test} | ({"validation": splits.validation} if splits.validation else {})
        self.model = recipe.model(options, splits, initial=initial).to(device)
        self.ema = self._ema()
        self.network = self._network()
        updates = -(-len(self.train_batches) // options.accumulate)
        self.optimizer = recipe.optimizer(
            options, self.model, self.network if self.ddp else None, num_updates=updates * options.epochs
        )
        self.scaler = torch.amp.GradScaler(device.type) if options.amp == "fp16" else None
        self.mixup = recipe.mixup(options, splits.num_classes)
        self._set_rates = recipe.scheduler(options, self.optimizer, updates)
        self._check_mixup()
        self.monitor = self._monitor() if options.monitor else None

    def _monitor(self) -> SharpnessMonitor:
        """The monitor, on training examples without augmentation; each rank has its share."""
        probes = self._batches(some(self.splits.train, PROBES), batch_size=64)
        fixed = list(itertools.islice(probes, max(1, PROBES // (64 * self.world.size))))
        measures = ["critical_sharpness"] if self.options.fsdp else ["lambda_max", "critical_sharpness", "worst_case"]
        return SharpnessMonitor(
            Loss(self.model, nn.CrossEntropyLoss(label_smoothing=self.options.smoothing), fixed),
            every=EVERY_PROBE,
            budget=self.options.monitor,
            measures=measures,
            log=self.options.out / "sharpness.jsonl",
        )

    def _network(self) -> nn.Module:
        """The model as a batch is given to it."""
        if self.options.fsdp:
            if not torch.distributed.is_initialized():
                raise InputError("--fsdp spreads the model over processes: start them with torchrun")
            for model in self._models().values():
                ranks.shard_(model, self.device)
        network = torch.compile(self.model) if self.options.compile else self.model
        self.ddp = self.world.size > 1 and not self.options.fsdp
        if not self.ddp:
            return network
        ddp, ids = nn.parallel.DistributedDataParallel, [self.device.index] if self.device.type == "cuda" else None
        arguments = inspect.signature(ddp).parameters
        buffers = "forward_sync_buffers" if "forward_sync_buffers" in arguments else "broadcast_buffers"
        return ddp(network, device_ids=ids, **{buffers: False})

    def _batches(self, split: Examples | Streamed, *, train: bool = False, batch_size: int | None = None) -> Any:
        options = self.options
        size = batch_size or (options.batch_size if train else max(options.batch_size, 256))
        loading = Loading(options.seed, options.workers, self.device.type == "cuda", self.world)
        augment = recipe.augmentation(options)
        return batches(split, size, self.splits.preprocessing, train=train, augment=augment, loading=loading)

    def _ema(self) -> nn.Module | None:
        if self.options.model_ema is None:
            return None
        from timm.utils import ModelEmaV3

        # with --fsdp one by one: torch does not mix sharded weights and whole BatchNorm statistics in one call
        return ModelEmaV3(self.model, decay=self.options.model_ema, foreach=not self.options.fsdp)

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
        model, optimizer = ranks.full_state(self.model, self.optimizer)
        return {
            "step": self.position.updates,
            "position": asdict(self.position),
            "totals": self.world.sum_(self.totals.sums.clone()).cpu(),
            "model": model,
            "optimizer": optimizer,
            "ema": ranks.full_state(self.ema.module)[0] if self.ema else None,
            "scaler": self.scaler.state_dict() if self.scaler else None,
            "schedule": self._set_rates.state_dict() if isinstance(self._set_rates, recipe.Plateau) else None,
            "monitor": self._monitor_state(),
        }

    def _monitor_state(self) -> dict[str, Any] | None:
        if self.monitor is None:
            return None
        return self.monitor.state_dict() | ({"before": None} if self.options.fsdp else {})  # parts of other ranks

    def load(self, state: dict[str, Any]) -> None:
        try:
            ranks.load_full_state(self.model, state["model"], self.optimizer, state["optimizer"])
            if self.ema:
                ranks.load_full_state(self.ema.module, state["ema"])
            if self.scaler:
                self.scaler.load_state_dict(state["scaler"])
            if isinstance(self._set_rates, recipe.Plateau):
                self._set_rates.load_state_dict(state["schedule"])
            if self.monitor and state.get("monitor"):
                self.monitor.load_state_dict(state["monitor"])
            self.position = Position(**state["position"])
            if self.world.main:  # the sums of all ranks
                self.totals.sums[: len(state["totals"])].copy_(state["totals"])  # older ones do not count passes
        except (KeyError, RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"the checkpoint does not fit this run's options: {one_line(error)}") from None

    def save(self) -> None:
        """Never overwrites a good checkpoint with weights that are not finite. Every rank must call it."""
        state = self.state()
        if not self.world.main:
            return
        for name, tensor in state["model"].items():
            if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all()):
                raise NonFiniteLoss(f"{name} is not finite: training diverged; lower --lr or set --clip-grad 1")
        self._check_out()
        checkpoint.save(self.options.out / "checkpoints", state)

    def _check_out(self) -> None:
        """A folder that was created again would hold weights without their options."""
        out = self.options.out
        if (out / "config.json").is_file():
            self._is_recorded = True
        elif self._is_recorded:
            raise InputError(f"{out} was deleted while the run wrote to it; start again with another --out")
        else:  # a training without a command
            out.mkdir(parents=True, exist_ok=True)

    # running

    def run(self, signals: Signals) -> None:
        """Trains from the position to the last epoch; every exit leaves a valid checkpoint.

        Raises:
            Interrupted: a signal came; everything done so far is saved.
            NonFiniteLoss: the message names the last good checkpoint.
        """
        self.signals = Agreed(signals, self.world)
        try:
            while self.position.epoch < self.options.epochs:
                self._epoch()
                self.signals.check()
            self.signals.settle()
            if self.monitor and self.world.main:
                print(f"sharpness.jsonl: {self.monitor}", flush=True)
        except Interrupted:
            self.save()
            raise
        except NonFiniteLoss as error:
            last = checkpoint.newest_first(self.options.out / "checkpoints")
            where = f"the last good checkpoint is {last[0]}" if last else "there is no checkpoint yet"
            raise NonFiniteLoss(f"{error}; {where}") from None

    def train_epoch(self) -> dict[str, float]:
        """The rest of the epoch in which the run is, without evaluation; what `epoch.train_epoch` returns."""
        number, first = self.position.epoch, self.position.batch
        self.train_batches.set_epoch(number, first)
        self._set_rates(self.position.updates)
        title, size = f"epoch {number + 1}/{self.options.epochs}", self.options.batch_size * self.world.size
        with _Bar(title, len(self.train_batches), first, size, self.world.main, self.options.sam_rho > 0) as bar:
            return epoch.train_epoch(
                self.network,
                self.optimizer,
                _seeded(self.train_batches, self.options.seed, number, first, self.world.rank, self.device),
                nn.CrossEntropyLoss(label_smoothing=0.0 if self.mixup else self.options.smoothing),
                device=self.device,
                amp=self.options.amp,
                clip_grad=self.options.clip_grad,
                accumulate=self.options.accumulate,
                scaler=self.scaler,
                mixup=self.mixup,
                progress=bar,
                after_step=lambda done, totals: self._after_update(first + done),
                totals=self.totals,
                memory_format=torch.channels_last if self.options.channels_last else torch.preserve_format,
                reduce=self.world.sum_,
            )

    def _epoch(self) -> None:
        number, start = self.position.epoch + 1, time.perf_counter()
        trained = self.train_epoch()
        record = {"epoch": number, "step": self.position.updates, "lr": self.optimizer.param_groups[0]["lr"]}
        record |= {f"train_{k}": trained[k] for k in ("loss", "accuracy", "perturbed_loss", "sharpness", "passes")}
        if number == self.options.epochs:
            self._estimate_statistics()
        every = self.options.eval_every
        if every and (number % every == 0 or number == self.options.epochs):
            record |= self.evaluate()
        record |= {"images_per_s": trained["images_per_s"], "seconds": time.perf_counter() - start}
        followed = "validation_loss" if "validation" in self.held_out else "train_loss"
        if isinstance(self._set_rates, recipe.Plateau) and followed in record:  # never one loss against the other
            self._set_rates.epoch(record[followed])
        if self.world.main:
            self._log(record)
        self.next_epoch()
        self.save()

    def _estimate_statistics(self) -> None:
        """BatchNorm's statistics at w, from the training batches; always where all passes of training were at w + e."""
        if self.options.update_bn or getattr(self.optimizer, "one_pass", False):
            batches = self._batches(self.splits.train, train=True)
            torch.optim.swa_utils.update_bn(batches, self.model, device=self.device)

    def next_epoch(self) -> None:
        self.position.epoch, self.position.batch, self.totals = self.position.epoch + 1, 0, Totals(self.device)

    def _after_update(self, batch: int) -> None:
        self.position.batch = batch
        self.position.updates += 1
        if self.monitor:
            self.monitor.step(self.optimizer, scaler=self.scaler)
        self._set_rates(self.position.updates)
        if self.ema:
            self.ema.update(self.model, step=self.position.updates)
        self.signals.check()
        every = self.options.checkpoint_steps
        if every and self.position.updates % every == 0 and batch < len(self.train_batches):
            self.save()

    def evaluate(self, *splits: str) -> dict[str, float]:
        """Loss and accuracy of the splits (none: of all that are held out), such as `test_accuracy`."""
        self._mean_statistics()
        record = {}
        for prefix, model in self._models().items():
            for name in splits or self.held_out:
                split = self.held_out[name]
                evaluated = epoch.evaluate(
                    model,
                    _checking(self._batches(split), self.signals),
                    nn.CrossEntropyLoss(),
                    device=self.device,
                    reduce=self.world.sum_,
                )
                epoch.check_finite(evaluated["loss"])
                record |= {f"{prefix}{name}_{key}": value for key, value in evaluated.items()}
        return record

    def _log(self, record: dict[str, Any]) -> None:
        """One line for each epoch; those of a run that was stopped later than its checkpoint are replaced."""
        path = self.options.out / "metrics.jsonl"
        self._check_out()
        earlier = [r for r in read_jsonl(path) if r.get("epoch") in range(record["epoch"])]
        lines = [json.dumps(r, allow_nan=False) + "\n" for r in [*earlier, record]]
        write_atomic(path, "".join(lines).encode(), folder=False)
        print(line(record, sharpness=self.options.sam_rho > 0), flush=True)


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


def _seeded(
    batches: Iterable[Batch], seed: int, epoch: int, first: int, rank: int, device: torch.device
) -> Iterator[Batch]:
    """Mixup, dropout and stochastic depth of a batch draw from the global generators, seeded for each batch."""
    which, seed_ = (rank,) if rank else (), seed_here if device.type == "cpu" else seed_all
    for i, batch in enumerate(batches, start=first):
        seed_(derive(seed, "step", epoch, i, *which))
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
