"""One run of the demo: train, then measure the weights of the last epoch on three data sets."""

from __future__ import annotations

import signal
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.demo.plan import CLEAN, NOISY, TEST, fingerprint
from benchmarks.machine import one_thread
from benchmarks.train.batches import MemoryBatches
from benchmarks.train.data import Examples, Splits, load
from benchmarks.train.epoch import NonFiniteLoss, evaluate, train_epoch
from benchmarks.train.options import Options
from benchmarks.train.order import Loading, Order, derive
from sam_optim import ASAM, SAM
from sam_optim.core.geometry import Ball
from sam_optim.core.random import Stream
from sam_optim.core.results import plain
from sam_optim.landscape import slice_1d, slice_2d
from sam_optim.loss import Loss
from sam_optim.measures import gradient_regret, hessian_eigenvalues, hessian_trace, worst_case_sharpness
from sam_optim.monitor import SharpnessMonitor
from sam_optim.vision.models import build

CRITERION = nn.CrossEntropyLoss()
CURVES = ("train_loss", "train_accuracy", "validation_accuracy", "test_accuracy", "test_loss")
NAN = float("nan")


@one_thread()
def execute(job: Mapping[str, Any]) -> dict[str, Any]:
    """The result of one job of the plan as strict JSON; deterministic up to its CPU time."""
    start = time.thread_time()
    splits = load(Options(**{key: job[key] for key in ("label_noise", "seed", "validation_fraction")}))
    model = initialized(splits, job["seed"])
    watch = monitor(model, splits, job) if job.get("plane") else None
    curves, failed = train(model, optimizer_for(model, job), splits, job, watch)
    result: dict[str, Any] = {"job": dict(job), "fingerprint": fingerprint(job), "curves": curves, "failed": failed}
    result |= {"last": _at(curves, job["epochs"]), "best": _at(curves, _best_epoch(curves))}
    if watch:
        result["sharpness"] = [{k: v for k, v in row.items() if k not in ("seconds", "share")} for row in watch.history]
    if job["kind"] == "final" and not failed:
        result |= labels_learned(model, splits) | measure(model, splits, job)
    return plain(result | {"cpu_s": time.thread_time() - start})


def ignore_interrupts() -> None:
    """Ctrl-C reaches every process of the terminal; the parent decides what it means."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def initialized(splits: Splits, seed: int) -> nn.Module:
    """The same weights for every method with this seed."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive(seed, "weights"))
        return build("cnn3", num_classes=splits.num_classes, image_size=splits.image_size)


def optimizer_for(model: nn.Module, job: Mapping[str, Any]) -> torch.optim.Optimizer:
    settings = {name: job[name] for name in ("lr", "momentum", "weight_decay")}
    if job["rho"] is None:
        return torch.optim.SGD(model.parameters(), **settings)
    kind = {"sam": SAM, "asam": ASAM}[job["method"]]
    return kind(model.parameters(), torch.optim.SGD, rho=job["rho"], module=model, **settings)


def monitor(model: nn.Module, splits: Splits, job: Mapping[str, Any]) -> SharpnessMonitor:
    """Every third epoch, on two batches of noisy training data."""
    probes = measured_batches(splits.train, splits.train.labels, job, job["batch_size"])[:2]
    every = max(1, 3 * job["epochs"] // 30) * -(-len(splits.train) // job["batch_size"])
    measures = ("lambda_max", "critical_sharpness")
    return SharpnessMonitor(Loss(model, CRITERION, probes), every=every, budget=None, measures=measures)


def train(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    splits: Splits,
    job: Mapping[str, Any],
    watch: SharpnessMonitor | None = None,
) -> tuple[dict[str, list[float]], str | None]:
    """One number per epoch and curve, nan from the epoch in which training diverged; and why it did."""
    order = Order(len(splits.train), job["batch_size"], shuffle=True, loading=Loading(job["seed"]))
    batches = MemoryBatches(splits.train, order, splits.preprocessing)
    curves: dict[str, list[float]] = {name: [] for name in CURVES}
    for epoch in range(job["epochs"]):
        batches.set_epoch(epoch)
        try:
            after = (lambda done, totals: watch.step(optimizer)) if watch else None
            trained = train_epoch(model, optimizer, batches, CRITERION, after_step=after)
        except NonFiniteLoss:
            missing = [NAN] * (job["epochs"] - epoch)
            return {name: c + missing for name, c in curves.items()}, f"diverged in epoch {epoch + 1}"
        validation, test = (
            evaluate(model, MemoryBatches(examples, Order(len(examples), 256), splits.preprocessing), CRITERION)
            for examples in (splits.validation, splits.test)
        )
        values = (trained["loss"], trained["accuracy"], validation["accuracy"], test["accuracy"], test["loss"])
        for name, value in zip(CURVES, values, strict=True):
            curves[name].append(value)
    return curves, None


def measured_batches(examples: Examples, labels: Tensor, job: Mapping[str, Any], size: int) -> list[Any]:
    """The same examples for every method: `num_measured` drawn once, in batches of `size`."""
    rows = Stream(derive(job["seed"], "measured")).permutation(len(labels))[: job["measuring"]["num_measured"]]
    return [(examples.x[part], labels[part]) for part in rows.split(size)]


def measure(model: nn.Module, splits: Splits, job: Mapping[str, Any]) -> dict[str, Any]:
    data = {
        NOISY: (splits.train, splits.train.labels),
        CLEAN: (splits.train, splits.clean_train_labels),
        TEST: (splits.test, splits.test.labels),
    }
    result: dict[str, Any] = {"measures": {}, "slices": {}, "planes": {}}
    for name, (examples, labels) in data.items():
        mini = Loss(model, CRITERION, measured_batches(examples, labels, job, job["batch_size"]))
        whole = Loss(model, CRITERION, measured_batches(examples, labels, job, len(labels)))
        result["measures"][name] = _numbers(mini, whole, job["measuring"])
        result["slices"][name], result["planes"][name] = _landscapes(whole, job, plane=job["plane"] and name != CLEAN)
    return result


def _numbers(mini: Loss, whole: Loss, settings: Mapping[str, Any]) -> dict[str, Any]:
    """Sharpness and regret are over batches of the training's size (m-sharpness), curvature over all examples."""
    sharpness = {
        name: _short(worst_case_sharpness(mini, as_ball(ball), num_steps=settings["num_steps"], num_restarts=1))
        for name, ball in settings["balls"].items()
    }
    spectrum = hessian_eigenvalues(whole, num=1, tol=1e-3)
    return {
        "loss": {"value": float(whole.value())},
        **sharpness,
        "lambda_max": {"value": float(spectrum.eigenvalues[0]), "converged": spectrum.converged},
        "trace": _short(hessian_trace(whole, num_probes=settings["num_probes"])),
        "regret": _short(gradient_regret(mini)),
    }


def _landscapes(whole: Loss, job: Mapping[str, Any], *, plane: bool) -> tuple[dict[str, Any], dict[str, Any] | None]:
    """A line in a random direction of this seed, and for one seed a plane: the same draws for every method."""
    settings = job["measuring"]
    seed = 2 * job["seed"]
    line = slice_1d(whole, coordinates=torch.linspace(-1, 1, settings["points_1d"]), seed=seed)
    if not plane:
        return line.to_dict(), None
    axis = torch.linspace(-1, 1, settings["points_2d"])
    return line.to_dict(), slice_2d(whole, coordinates=(axis, axis), seed=seed).to_dict()


@torch.no_grad()
def labels_learned(model: nn.Module, splits: Splits) -> dict[str, float]:
    """Among training examples with a wrong label, how often the model predicts that label or the true one."""
    images, given = splits.train.x, splits.train.labels
    wrong = given != splits.clean_train_labels
    said = model.eval()(images[wrong]).argmax(1)
    return {
        "memorized": float((said == given[wrong]).double().mean()),
        "corrected": float((said == splits.clean_train_labels[wrong]).double().mean()),
    }


def as_ball(settings: Mapping[str, Any]) -> Ball:
    """The ball of `Ball.to_dict()`."""
    return Ball(**{name: value for name, value in settings.items() if value is not None})


def _short(estimate: Any) -> dict[str, Any]:
    result = estimate.to_dict()
    return {key: result[key] for key in ("value", "stderr", "reason", "converged") if key in result}


def _best_epoch(curves: Mapping[str, list[float]]) -> int:
    """The first epoch with the highest validation accuracy, counted from 1: the one that early stopping chooses."""
    validation = [v if v == v else -1.0 for v in curves["validation_accuracy"]]
    return validation.index(max(validation)) + 1


def _at(curves: Mapping[str, list[float]], epoch: int) -> dict[str, float]:
    return {"epoch": epoch} | {name: curves[name][epoch - 1] for name in ("validation_accuracy", "test_accuracy")}
