"""Images per second of benchmarks.train beside timm's own training loop, for the base optimizer.

    OMP_NUM_THREADS=1 python -m benchmarks.speed.throughput --model resnet18

Same model, same image files, same operations on them, same optimizer and schedule. timm's train.py is not in its wheel:
the control is its loop for one process (`train_one_epoch`), written with the parts that it is made of: create_dataset,
create_loader, create_optimizer_v2, create_scheduler_v2, AverageMeter, a loss that is read once for each update.
Runs are interleaved in random order; the ratio is that of thread CPU times side by side, with its quartiles.
"""

from __future__ import annotations

import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import nn

from benchmarks.machine import facts
from benchmarks.speed import timing
from benchmarks.train import data
from benchmarks.train.options import Options, parse
from benchmarks.train.order import derive, seed_all
from benchmarks.train.run import Training
from sam_optim.core import random as rng
from sam_optim.core.errors import run
from sam_optim.core.files import reserved
from sam_optim.vision import models


def timm_epoch(options: Options, *, prefetcher: bool) -> Callable[[], float]:
    """One epoch of timm's loop at a call; returns the mean loss."""
    from timm.data import create_dataset, create_loader
    from timm.optim import create_optimizer_v2
    from timm.scheduler import create_scheduler_v2
    from timm.utils import AverageMeter

    seed_all(derive(options.seed, "model"))
    size = (3, options.img_size, options.img_size)
    dataset = create_dataset("", str(Path(options.data_dir) / "train"), search_split=False)
    model = models.build(options.model, num_classes=len(dataset.reader.class_to_idx), image_size=size)
    device = torch.device("cpu")
    loader = create_loader(
        dataset,
        size,
        options.batch_size,
        is_training=True,
        no_aug=True,
        num_workers=0,
        use_prefetcher=prefetcher,
        crop_pct=1.0,
        pin_memory=False,
        device=device,
        persistent_workers=False,
    )
    optimizer = create_optimizer_v2(
        model, options.opt, lr=options.lr, weight_decay=options.weight_decay, momentum=options.momentum
    )
    scheduler, _ = create_scheduler_v2(
        optimizer, "cosine", options.epochs, step_on_epochs=False, updates_per_epoch=len(loader)
    )
    criterion = nn.CrossEntropyLoss()
    updates = 0

    def epoch() -> float:
        nonlocal updates
        model.train()
        losses, data_time, update_time = AverageMeter(), AverageMeter(), AverageMeter()
        end = time.perf_counter()
        optimizer.zero_grad()
        for x, y in loader:
            if not prefetcher:
                x, y = x.to(device), y.to(device)
            data_time.update(time.perf_counter() - end)
            loss = criterion(model(x), y)
            loss.backward()
            optimizer.step()
            losses.update(loss.item(), len(y))
            optimizer.zero_grad()
            update_time.update(time.perf_counter() - end)
            updates += 1
            scheduler.step_update(num_updates=updates, metric=losses.avg)
            end = time.perf_counter()
        return losses.avg

    return epoch


def our_epoch(options: Options) -> Callable[[], float]:
    """One epoch of `Training` at a call, as `benchmarks.train` runs it; returns the mean loss."""
    training = Training(options, data.load(options), torch.device("cpu"))  # as timm's side

    def epoch() -> float:
        training.position.batch = 0
        training.totals.sums.zero_()
        loss = training.train_epoch()["loss"]
        training.position.epoch += 1
        return loss

    return epoch


def picture_tree(root: Path, images: int, size: int, classes: int = 10) -> None:
    """Random pictures, for a machine without any: train/CLASS/N.jpg and val/CLASS/N.jpg."""
    draw = np.random.default_rng(0)
    for split, n in (("train", images), ("val", classes)):
        for i in range(n):
            folder = root / split / f"class{i % classes}"
            folder.mkdir(parents=True, exist_ok=True)
            coarse = Image.fromarray(draw.integers(0, 256, (8, 8, 3), dtype=np.uint8))
            coarse.resize((size, size), Image.Resampling.BICUBIC).save(folder / f"{i}.jpg", quality=90)


def compared(options: Options, rounds: int) -> dict[str, Any]:
    """Ratios of thread CPU time, ours to timm's, and images per second of CPU time."""
    with rng.preserved():
        ours = our_epoch(options)
        controls = {"timm, prefetcher": timm_epoch(options, prefetcher=True)}
        controls["timm, no prefetcher"] = timm_epoch(options, prefetcher=False)
        images = len(data.load(options).train) // options.batch_size * options.batch_size
        times = timing.paired(ours, controls, rounds, "throughput")
    return {
        name: {
            "ratio": timing.ratio(ours, theirs),
            "images_per_cpu_s": {
                "timm": images / sorted(theirs)[rounds // 2],
                "ours": images / sorted(ours)[rounds // 2],
            },
        }
        for name, (theirs, ours) in times.items()
    }


def main(argv: Sequence[str] | None = None) -> int:
    p = timing.parser("throughput", __doc__, rounds=15)
    p.add_argument("--model", nargs="+", default=["resnet18", "vit_tiny_patch16_224"])
    p.add_argument("--data-dir", help="a tree DIR/train/CLASS/*; default: random pictures")
    p.add_argument("--img-size", type=int, default=32)
    p.add_argument("--images", type=int, default=256, help="of the random pictures")
    p.add_argument("--batch-size", type=int, default=64)
    args = p.parse_args(argv)
    report: dict[str, Any] = {"facts": facts("timm", "torchvision") | {"rounds": args.rounds}, "models": {}}
    with reserved(args.json, "--json"):
        with tempfile.TemporaryDirectory() as folder:
            directory = args.data_dir or folder
            if not args.data_dir:
                picture_tree(Path(folder), args.images, args.img_size)
            for model in args.model:
                fixed = ["--data", "folder", "--no-aug", "--sched", "cosine", "--epochs", "1000"]
                sizes = ["--img-size", str(args.img_size), "--batch-size", str(args.batch_size)]
                options = parse([*fixed, *sizes, "--data-dir", str(directory), "--model", model])
                report["models"][model] = results = compared(options, args.rounds)
                for name, values in results.items():
                    r, speed = values["ratio"], values["images_per_cpu_s"]
                    print(
                        f"{model:24s} {name:20s} CPU time ours / timm {r['median']:.3f} "
                        f"({r['q1']:.3f} to {r['q3']:.3f}, n = {r['n']})  images/s ours {speed['ours']:.0f} "
                        f"timm {speed['timm']:.0f}",
                        flush=True,
                    )
        timing.write(args.json, report)
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
