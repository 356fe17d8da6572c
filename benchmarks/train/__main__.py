"""Train an image classifier with or without SAM, and measure how flat the result is.

    python -m benchmarks.train --model resnet18 --data cifar10 --data-dir DIR --opt sgd --lr 0.1 --sam-rho 0.1

The run directory holds config.json, metrics.jsonl (one line for each epoch), checkpoints/ and measures.json; with
--monitor sharpness.jsonl.
"""

from __future__ import annotations

import hashlib
import platform
import shutil
import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks import measure
from benchmarks.command import Interrupted, Signals
from benchmarks.machine import commit, processor
from benchmarks.train import checkpoint, data, ranks, recipe, trained
from benchmarks.train.options import Options, parse
from benchmarks.train.ranks import ALONE, World
from benchmarks.train.run import Training
from sam_optim.core import random as rng
from sam_optim.core.errors import EXIT_INTERRUPTED, InputError, run
from sam_optim.core.files import locked, write_json
from sam_optim.core.results import provenance
from sam_optim.sweep.processes import is_first_process
from sam_optim.vision.tensor_files import check_pickles

PARTS = ("config.json", "metrics.jsonl", "sharpness.jsonl", "measures.json", "checkpoints")


def main(argv: Sequence[str] | None = None) -> int:
    options = parse(argv)
    with locked(options.out.resolve()) if is_first_process() else nullcontext():
        return train(parse(argv) if options.resume else options)  # the run may have been replaced in between


def train(options: Options) -> int:
    """Trains, from the newest checkpoint if there is one to resume, then measures. The exit code."""
    check_pickles(f"a checkpoint in {options.out}")  # before hours of training, not after
    measures = measure.chosen(options.measures)
    with ranks.joined(options.device) as world:
        resumed = _check_out(options, world)
        with rng.preserved():
            device, splits = recipe.device(options, world), data.load(options)
            weights = None if resumed else _sha256(options.initial_checkpoint)
            training = Training(options, splits, device, world=world, initial=resumed is None)
            world.barrier()  # every rank has read --out and accepted its options
            if resumed:
                training.load(resumed)
                if world.main:
                    print(_resumed(training), flush=True)
            elif world.main:
                _start(training, weights)
            if world.main and training.position.epoch < options.epochs:
                processes = f"{world.size} process{'es' if world.size > 1 else ''}"
                print(f"training on {device} ({_hardware(device)}), {processes}", flush=True)
            code = _run(training)
            world.barrier()
    if code or not measures or not world.main:
        return code
    try:
        return measure.measure(trained.load(options), measure.Measuring(names=measures))
    except KeyboardInterrupt:
        print(f"measuring was stopped; to do it again: python -m benchmarks.measure {options.out}", file=sys.stderr)
        return EXIT_INTERRUPTED


def _resumed(training: Training) -> str:
    options, updates = training.options, training.position.updates
    if training.position.epoch < options.epochs:
        return f"going on in {options.out} after {updates} updates"
    return (
        f"the run in {options.out} is complete: epoch {options.epochs} of {options.epochs}, {updates} updates; "
        f"to measure it: python -m benchmarks.measure {options.out}; to train anew: --force, or another --out"
    )


def _run(training: Training) -> int:
    with Signals() as signals:
        try:
            training.run(signals)
        except Interrupted as stop:
            if training.world.main:
                print(
                    f"stopped by {stop.name} after {training.position.updates} updates; all are saved\n"
                    f"to continue: python -m benchmarks.train --out {training.options.out} --resume",
                    file=sys.stderr,
                )
            return 128 + stop.signum
    return 0


def _check_out(options: Options, world: World = ALONE) -> dict[str, Any] | None:
    """The state to resume from, or None to start; refuses to mix with what is already there."""
    out = options.out
    if out.exists() and not out.is_dir():
        raise InputError(f"--out {out} is a file; choose a directory")
    if not out.exists() or not any(out.iterdir()) or options.force:
        if options.resume and world.main:
            print(f"{out} holds no run to resume: starting a new one", flush=True)
        return None
    if not options.resume:
        raise InputError(
            f"--out {out} is not empty; continue its run with --resume, replace it with --force, or choose another"
        )
    if not (out / "config.json").exists():
        raise InputError(f"--out {out} holds no run to resume: it has no config.json")
    return checkpoint.newest(out / "checkpoints", missing_ok=True)


def _start(training: Training, weights: str | None) -> None:
    """Changes the disk only now, when data, model and options have been checked.

    weights: the SHA-256 of --initial-checkpoint before it was read.
    """
    out, source = training.options.out, training.options.initial_checkpoint
    if _sha256(source) != weights:
        raise InputError(f"--initial-checkpoint {source} has changed while it was read; wait until it is written")
    for part in PARTS:
        path = out / part
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)
    out.mkdir(parents=True, exist_ok=True)
    write_json(out / "config.json", _facts(training) | {"initial_checkpoint_sha256": weights})


def _facts(training: Training) -> dict[str, Any]:
    import timm
    import torchvision

    options, splits = training.options, training.splits
    return {
        "options": options.recorded(),
        "data": {
            "num_train": len(splits.train),
            "num_validation": len(splits.validation) if splits.validation else 0,
            "num_test": len(splits.test),
            "num_classes": splits.num_classes,
            "image_size": list(splits.image_size),
            "preprocessing": splits.shown_as(),
            "source": data.source(options),
        },
        "label_noise": _noise(data.labels_of(splits.train), splits.clean_train_labels, options),
        "num_parameters": sum(p.numel() for p in training.model.parameters()),
        "device": str(training.device),
        "num_processes": training.world.size,
        "provenance": provenance(
            timm=timm.__version__,
            torchvision=torchvision.__version__,
            python=platform.python_version(),
            hardware=_hardware(training.device),
            threads=torch.get_num_threads(),
            commit=commit(),
        ),
    }


def _sha256(path: str | None) -> str | None:
    if path is None or not Path(path).is_file():
        return None
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _noise(labels: Tensor, clean: Tensor, options: Options) -> dict[str, Any]:
    """How many labels were redrawn, how many of those differ, and a digest of the labels that training sees."""
    digest = hashlib.sha256(labels.numpy().tobytes()).hexdigest()
    drawn, wrong = round(options.label_noise * len(clean)), int((labels != clean).sum())
    return {"fraction": options.label_noise, "num_drawn": drawn, "num_wrong": wrong, "labels_sha256": digest}


def _hardware(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else processor()


if __name__ == "__main__":
    sys.exit(run(main))
