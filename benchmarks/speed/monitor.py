"""What a sharpness monitor costs, and whether its warm start gives the values of a fresh one.

python -m benchmarks.speed.monitor cost --json FILE       # share of the time against the budget, two timm models
python -m benchmarks.speed.monitor warm --json FILE       # lambda_max over 20 epochs: error and products
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import mean
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.demo.runs import initialized
from benchmarks.machine import commit, one_thread, processor
from benchmarks.train.batches import MemoryBatches
from benchmarks.train.data import load
from benchmarks.train.epoch import train_epoch
from benchmarks.train.options import Options
from benchmarks.train.order import Loading, Order
from sam_optim.core.errors import run
from sam_optim.core.files import reserved, write_json
from sam_optim.core.results import provenance
from sam_optim.loss import Loss
from sam_optim.measures import hessian_eigenvalues
from sam_optim.monitor import SharpnessMonitor
from sam_optim.optim.sam import SAM
from sam_optim.vision.models import build

MODELS = ("resnet18", "vit_tiny_patch16_224")
CROSS_ENTROPY = nn.CrossEntropyLoss()


def cost(name: str, *, steps: int, budget: float, size: int, batch: int, device: str) -> dict[str, Any]:
    """SAM on noise, a probe of one batch, a row as often as the budget allows."""
    torch.manual_seed(0)
    model = build(name, num_classes=10, image_size=(3, size, size)).to(device)
    data = [(torch.randn(batch, 3, size, size).to(device), torch.randint(10, (batch,)).to(device)) for _ in range(4)]
    optimizer = SAM(model.parameters(), torch.optim.SGD, rho=0.05, lr=0.01, momentum=0.9, module=model)
    monitor = SharpnessMonitor(Loss(model, CROSS_ENTROPY, data[:1]), every=1, budget=budget)
    start = time.perf_counter()
    for i in range(steps):
        x, y = data[i % len(data)]

        def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
            optimizer.zero_grad()
            loss = CROSS_ENTROPY(model(x), y)
            loss.backward()
            return loss

        optimizer.step(closure)
        monitor.step(optimizer)
    return {
        "model": name,
        "steps": steps,
        "budget": budget,
        "share": monitor.share,
        "rows": len(monitor.history),
        "at": [row["step"] for row in monitor.history],
        "seconds_of_rows": [round(row["seconds"], 3) for row in monitor.history],
        "seconds": time.perf_counter() - start,
        "reasons": sorted({row["reason"] for row in monitor.history if row["reason"]}),
    }


def warm(rho: float, seed: int, *, epochs: int, rows_per_epoch: int) -> dict[str, Any]:
    """Digits with 40 % wrong labels, a network of three convolutions, a cosine schedule: lambda_max of 256 examples."""
    splits = load(Options(label_noise=0.4, seed=seed, validation_fraction=0.2))
    model = initialized(splits, seed)
    base = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    optimizer = SAM.wrap(base, rho=rho, module=model) if rho else base
    batches = MemoryBatches(
        splits.train, Order(len(splits.train), 64, shuffle=True, loading=Loading(0)), splits.preprocessing
    )
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(base, epochs * len(batches.order))
    rows = splits.train.x[:256].split(128), splits.train.labels[:256].split(128)
    loss = Loss(model, CROSS_ENTROPY, list(zip(*rows, strict=True)))
    monitor = SharpnessMonitor(loss, every=len(batches.order) // rows_per_epoch, budget=None, measures=["lambda_max"])
    errors, products, fresh = [], [], []

    def after(done: int, totals: Any) -> None:
        row = monitor.step(optimizer)
        schedule.step()
        if row:
            exact = hessian_eigenvalues(loss)
            errors.append(abs(row["lambda_max"] / float(exact.eigenvalues[0]) - 1))
            products.append(row["num_products"])
            fresh.append(exact.num_products)

    for epoch in range(epochs):
        batches.set_epoch(epoch)
        train_epoch(model, optimizer, batches, CROSS_ENTROPY, after_step=after)
    ordered = sorted(errors[1:])  # the first row has nothing to start from
    return {
        "rho": rho,
        "seed": seed,
        "epochs": epochs,
        "rows": len(ordered),
        "products": mean(products[1:]),
        "products_fresh": mean(fresh[1:]),
        "share_of_products": sum(products[1:]) / sum(fresh[1:]),
        "error_median": ordered[len(ordered) // 2],
        "error_90": ordered[int(0.9 * len(ordered))],
        "error_max": ordered[-1],
        "within_1_percent": mean(e <= 0.01 for e in ordered),
        "lambda_max": [row["lambda_max"] for row in monitor.history],
    }


@one_thread()
def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.speed.monitor", description=__doc__.splitlines()[0])
    p.add_argument("what", choices=("cost", "warm"))
    p.add_argument("--steps", type=int, default=150)
    p.add_argument("--budget", type=float, default=0.05)
    p.add_argument("--size", type=int, default=64)
    p.add_argument("--batch", type=int, default=16)
    p.add_argument("--model", nargs="+", default=list(MODELS))
    p.add_argument("--rho", nargs="+", type=float, default=[0.0, 0.1])
    p.add_argument("--epochs", type=int, default=20)
    p.add_argument("--seeds", type=int, default=3, help="trainings for each --rho")
    p.add_argument("--device", default="cpu")
    p.add_argument("--json", type=Path)
    args = p.parse_args(argv)
    with reserved(args.json, "--json"):
        if args.what == "cost":
            shape = {"size": args.size, "batch": args.batch, "device": args.device}
            rows = [cost(name, steps=args.steps, budget=args.budget, **shape) for name in args.model]
        else:
            runs = [(rho, seed) for rho in args.rho for seed in range(args.seeds)]
            rows = [warm(rho, seed, epochs=args.epochs, rows_per_epoch=2) for rho, seed in runs]
        for row in rows:
            print({k: v for k, v in row.items() if not isinstance(v, list)}, flush=True)
        if args.json:
            about = provenance(hardware=processor(), threads=torch.get_num_threads(), commit=commit())
            write_json(args.json, {"rows": rows, "provenance": about})
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
