"""Train an image classifier with or without SAM, and measure how flat the result is.

    python -m benchmarks.train --model resnet18 --data cifar10 --data-dir DIR --opt sgd --lr 0.1 --sam-rho 0.1

The run directory holds config.json, metrics.jsonl (one line for each epoch), checkpoints/ and measures.json.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import platform
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import command, measure
from benchmarks.command import InputError, Interrupted, Signals
from benchmarks.train import checkpoint, data, options, ranks, recipe
from benchmarks.train.ranks import ALONE, World
from benchmarks.train.run import Training
from sam_optim.core import random as rng
from sam_optim.core.results import provenance

PARTS = ("config.json", "metrics.jsonl", "measures.json", "checkpoints")


def main(argv: Sequence[str] | None = None) -> int:
    args = options.parse(argv)
    measures = measure.chosen(args.measures)
    with ranks.joined(args.device) as world:
        resumed = _check_out(args, world)
        with rng.kept():
            device, splits = recipe.device(args, world), recipe.splits(args)
            training = Training(args, splits, device, world=world, initial=resumed is None)
            world.barrier()  # all have seen what is in --out, and found their options good
            if resumed:
                training.load(resumed)
                if world.main:
                    print(_resumed(args, training), flush=True)
            elif world.main:
                _start(args, training)
            if world.main and training.position.epoch < args.epochs:
                processes = f"{world.size} process{'es' if world.size > 1 else ''}"
                print(f"training on {device} ({_hardware(device)}), {processes}", flush=True)
            code = _run(training)
            world.barrier()
    if code or not measures or not world.main:
        return code
    try:
        return measure.run(args.out, measures, args)
    except KeyboardInterrupt:
        print(f"measuring was stopped; to do it again: python -m benchmarks.measure {args.out}", file=sys.stderr)
        return 130


def _resumed(args: argparse.Namespace, training: Training) -> str:
    updates = training.position.updates
    if training.position.epoch < args.epochs:
        return f"going on in {args.out} after {updates} updates"
    return (
        f"the run in {args.out} is complete: epoch {args.epochs} of {args.epochs}, {updates} updates; "
        f"to measure it: python -m benchmarks.measure {args.out}; to train anew: --force, or another --out"
    )


def _run(training: Training) -> int:
    out = training.args.out
    with Signals() as signals:
        try:
            training.run(signals)
        except Interrupted as stop:
            if not training.world.main:
                return 128 + stop.signum
            print(f"stopped by {stop.name} after {training.position.updates} updates; all are saved", file=sys.stderr)
            print(f"to go on: python -m benchmarks.train --out {out} --resume", file=sys.stderr)
            return 128 + stop.signum
    return 0


def _check_out(args: argparse.Namespace, world: World = ALONE) -> dict[str, Any] | None:
    """The state to resume from, or None to start; refuses to mix with what is already there."""
    out: Path = args.out
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; choose a directory")
    if not out.exists() or not any(out.iterdir()) or args.force:
        if args.resume and world.main:
            print(f"{out} holds no run to resume: a new one starts", flush=True)
        return None
    if not args.resume:
        raise InputError(
            f"--out {out} is not empty; go on with --resume, replace the run with --force, or choose another"
        )
    if not (out / "config.json").exists():
        raise InputError(f"--out {out} holds no run to resume: it has no config.json")
    return checkpoint.newest(out / "checkpoints", missing_ok=True)


def _start(args: argparse.Namespace, training: Training) -> None:
    """Only now, with data, model and options all found good, does anything on the disk change."""
    for part in PARTS:
        path = args.out / part
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    command.write_json(args.out / "config.json", _facts(args, training))


def _facts(args: argparse.Namespace, training: Training) -> dict[str, Any]:
    import timm
    import torchvision

    splits = training.splits
    return {
        "options": options.plain(args),
        "data": {
            "num_train": len(splits.train),
            "num_validation": len(splits.validation) if splits.validation else 0,
            "num_test": len(splits.test),
            "num_classes": splits.num_classes,
            "image_size": list(splits.image_size),
            "preprocessing": data.shown_as(splits),
            "source": data.source(args.data, args.data_dir),
        },
        "label_noise": _noise(data.labels(splits.train), splits.clean_train_labels, args),
        "num_parameters": sum(p.numel() for p in training.model.parameters()),
        "device": str(training.device),
        "num_processes": training.world.size,
        "initial_checkpoint_sha256": _sha256(args.initial_checkpoint),
        "provenance": provenance(
            timm=timm.__version__,
            torchvision=torchvision.__version__,
            python=platform.python_version(),
            hardware=_hardware(training.device),
            threads=torch.get_num_threads(),
            commit=_commit(),
        ),
    }


def _sha256(path: str | None) -> str | None:
    if path is None:
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _noise(labels: Tensor, clean: Tensor, args: argparse.Namespace) -> dict[str, Any]:
    """How many labels were drawn anew, how many of those differ, and a digest of the labels that training sees."""
    digest = hashlib.sha256(labels.numpy().tobytes()).hexdigest()
    drawn, wrong = round(args.label_noise * len(clean)), int((labels != clean).sum())
    return {"fraction": args.label_noise, "num_drawn": drawn, "num_wrong": wrong, "labels_sha256": digest}


def _hardware(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {os.cpu_count()} cores"


def _commit() -> str | None:
    """The commit of this checkout, "-dirty" added where tracked files differ; None without git."""
    folder = Path(__file__).resolve().parent
    try:
        run = subprocess.run(
            ["git", "describe", "--always", "--abbrev=12", "--dirty", "--exclude=*"],
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=10,
            check=True,
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return run.stdout.strip()


if __name__ == "__main__":
    sys.exit(command.run(main))
