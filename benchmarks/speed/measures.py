"""What the measures cost, against the packages that offer them: time, peak memory, products.

    python -m benchmarks.speed.measures [--pretrained FILE] [--rows NAME ...] [--rounds 3] [--quick] [--json FILE]
    python -m benchmarks.speed.measures --device cuda --model resnet50

On a CPU: ResNet-20 (270 k parameters), 512 images, one thread, thread CPU time, which holds where other processes share
the machine. In each round ours and the peer of a row follow each other in random order; the ratio is that of the
medians, with the smallest and largest ratio of a round. Peak memory is that of a process for each contender, above what
the process had before. With `--pretrained` the weights are those of a file and the images are noise with random labels;
without it the network is trained for some seconds on digits that come with scikit-learn, and measured on these.

On a device: a timm model on noise images of 224 pixels, wall time of synchronized runs, peak of its own allocator.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from benchmarks.command import option, settings_of
from benchmarks.examples import cifar_resnet
from benchmarks.machine import ROOT, facts, one_thread
from benchmarks.speed import curvature, sharpness, timing
from benchmarks.speed.rows import Problem, Row
from sam_optim.core.arguments import number
from sam_optim.core.errors import one_line, run, unknown
from sam_optim.core.files import reserved

SOURCES = (curvature, sharpness)  # modules with `rows(problem)`


def digits(n: int, num_steps: int) -> tuple[nn.Module, torch.Tensor, torch.Tensor]:
    """(ResNet-20 trained on them, the first n digits as (n, 3, 32, 32), labels)."""
    from sklearn.datasets import load_digits

    data = load_digits()
    x = torch.tensor(data.images, dtype=torch.float32) / 8 - 1
    x = x.repeat_interleave(4, 1).repeat_interleave(4, 2)[:, None].expand(-1, 3, -1, -1).contiguous()
    y = torch.tensor(data.target)
    return cifar_resnet.trained(x, y, num_steps=num_steps), x[:n], y[:n]


def noise(n: int, size: int, classes: int) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(n, 3, size, size, generator=generator)
    return x, torch.randint(classes, (n,), generator=generator)


@dataclass(frozen=True)
class Settings:
    rows: list[str] | None = option(None, "only these", nargs="+")
    rounds: int = option(3, type=number(int, 1))
    quick: bool = option(False, "64 images, one round, no processes for memory: a check", action="store_true")
    pretrained: Path | None = option(None, "weights of ResNet-20, a state dict", type=Path)
    device: str = option("cpu")
    model: str = option("resnet20", "resnet20, or a timm model such as vit_base_patch16_224")
    images: int = option(512, type=int)
    batch_size: int = option(128, type=int)
    json: Path | None = option(None, "also write the results to this file", type=Path)
    contender: list[str] | None = option(None, argparse.SUPPRESS, nargs=2, metavar=("ROW", "SIDE"))

    @property
    def num_images(self) -> int:
        return min(self.images, 64) if self.quick else self.images


def problem_of(settings: Settings) -> Problem:
    n = settings.num_images
    if settings.model != "resnet20":
        import timm

        if not timm.is_model(settings.model):
            raise unknown("model", settings.model, timm.list_models())
        torch.manual_seed(0)
        model = timm.create_model(settings.model)
        x, y = noise(n, model.pretrained_cfg["input_size"][-1], 1000)
    elif settings.pretrained:
        model = cifar_resnet.pretrained(settings.pretrained)
        x, y = noise(n, 32, 10)
    else:
        model, x, y = digits(n, 5 if settings.quick else 100)
    model, x, y = model.eval().to(settings.device), x.to(settings.device), y.to(settings.device)
    batches = list(zip(x.split(settings.batch_size), y.split(settings.batch_size), strict=True))
    return Problem(lambda: model, nn.CrossEntropyLoss(), batches)


def rows_of(problem: Problem, names: list[str] | None) -> list[Row]:
    rows: list[Row] = []
    for source in SOURCES:
        if names and set(names) <= {row.name for row in rows}:
            break  # making the rows of the other source takes time: it measures
        rows += source.rows(problem)
    if missing := set(names or ()) - {row.name for row in rows}:
        raise unknown("row", missing.pop(), [row.name for row in rows])
    return [row for row in rows if names is None or row.name in names]


def seconds(run: Callable[[], Any], device: str) -> tuple[float, Any]:
    """(thread CPU time, or wall time of a device, what it returned)."""
    if device == "cpu":
        start = time.thread_time()
        result = run()
        return time.thread_time() - start, result
    torch.cuda.synchronize()
    start = time.perf_counter()
    result = run()
    torch.cuda.synchronize()
    return time.perf_counter() - start, result


def compare(rows: list[Row], rounds: int, device: str) -> list[dict[str, Any]]:
    """Seconds of each side in each round, and the values of the last run."""
    shuffle = random.Random(0).shuffle
    times: dict[str, dict[str, list[float]]] = {row.name: {"ours": [], "peer": []} for row in rows}
    outcomes: dict[str, dict[str, Any]] = {row.name: {} for row in rows}
    jobs = [(row, side) for row in rows for side in ("ours", "peer") if side == "ours" or row.peer]
    with tqdm(total=rounds * len(jobs), desc="rounds", disable=None) as bar:
        for _ in range(rounds):
            for row in rows:
                sides = [(side, run) for side, run in (("ours", row.ours), ("peer", row.peer)) if run]
                shuffle(sides)
                for side, run in sides:
                    bar.set_postfix_str(f"{row.name}, {side}")
                    took, result = seconds(run, device)
                    times[row.name][side].append(took)
                    outcomes[row.name][side] = dict(result) if isinstance(result, Mapping) else str(result)
                    bar.update()
    return [{"row": r.name, "bar": r.bar, "seconds": times[r.name], "found": outcomes[r.name]} for r in rows]


def summarize(result: dict[str, Any]) -> None:
    """Adds ratios of times and memory, and of the products that equal standard errors would take."""
    ours, peer = result["seconds"]["ours"], result["seconds"]["peer"]
    if not peer:
        return
    ratios = [a / b for a, b in zip(ours, peer, strict=True)]
    median = statistics.median(ours) / statistics.median(peer)
    result["ours / peer"] = {"median": median, "low": min(ratios), "high": max(ratios), "rounds": len(ratios)}
    a, b = (result["found"][side] for side in ("ours", "peer"))
    if isinstance(a, dict) and isinstance(b, dict) and {"stderr", "products"} <= a.keys() & b.keys():
        result["products at equal stderr, peer / ours"] = (
            b["products"] / a["products"] * (b["stderr"] / a["stderr"]) ** 2
        )


def peak_memory(settings: Settings, name: str, side: str) -> float | None:
    """MB above what the process had before the run, in a process of its own."""
    argv = ["--contender", name, side]
    for key in ("device", "model", "images", "batch_size", "pretrained"):
        if (value := getattr(settings, key)) is not None:
            argv += [f"--{key.replace('_', '-')}", str(value)]
    done = subprocess.run(
        [sys.executable, "-m", "benchmarks.speed.measures", *argv], capture_output=True, text=True, cwd=ROOT
    )
    if done.returncode:
        raise RuntimeError(f"{name}, {side}: {one_line(RuntimeError(done.stderr))}")
    return float(json.loads(done.stdout.splitlines()[-1])["megabytes"])


def contender(settings: Settings) -> int:
    """One run alone, in this process: prints its peak memory."""
    assert settings.contender is not None
    name, side = settings.contender
    (row,) = rows_of(problem_of(settings), [name])
    contestant = row.ours if side == "ours" else row.peer
    assert contestant is not None
    before = _peak(settings.device)
    contestant()
    print(json.dumps({"megabytes": _peak(settings.device) - before}))
    return 0


def _peak(device: str) -> float:
    if device != "cpu":
        return torch.cuda.max_memory_allocated() / 2**20
    # not ru_maxrss: a child process begins with the peak of its parent
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(float(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024


def table(results: list[dict[str, Any]]) -> str:
    head = f"{'row':28s}{'ours s':>9s}{'peer s':>9s}{'ours / peer':>22s}{'bar':>7s}{'MB':>13s}{'products':>12s}"
    lines = [head, "-" * len(head)]
    for r in results:
        ours, peer = (statistics.median(t) if t else float("nan") for t in r["seconds"].values())
        ratio = r.get("ours / peer")
        cell = f"{ratio['median']:.2f} [{ratio['low']:.2f}, {ratio['high']:.2f}]" if ratio else ""
        memory = "/".join(f"{x:.0f}" for x in r.get("megabytes", {}).values())
        products = "/".join(str(f.get("products", "")) for f in r["found"].values() if isinstance(f, dict))
        bar = f"{r['bar']:.2f}" if r["bar"] else ""
        lines.append(f"{r['row']:28.28s}{ours:9.2f}{peer:9.2f}{cell:>22s}{bar:>7s}{memory:>13s}{products:>12s}")
        if (key := "products at equal stderr, peer / ours") in r:
            lines.append(f"{'':28s}  {key}: {r[key]:.1f}")
    return "\n".join(lines)


@one_thread()
def main(argv: Sequence[str] | None = None) -> int:
    settings = settings_of(Settings, "python -m benchmarks.speed.measures", __doc__, argv)
    if settings.contender:
        return contender(settings)
    with reserved(settings.json, "--json"):
        rows = rows_of(problem_of(settings), settings.rows)
        results = compare(rows, 1 if settings.quick else settings.rounds, settings.device)
        for row, result in zip(rows, results, strict=True):
            summarize(result)
            if not settings.quick:
                sides = ["ours", "peer"] if row.peer else ["ours"]
                result["megabytes"] = {side: peak_memory(settings, row.name, side) for side in sides}
        print(table(results))
        about = {key: getattr(settings, key) for key in ("model", "quick", "device", "rounds")}
        about |= {"images": settings.num_images, "pretrained": bool(settings.pretrained)}
        timing.write(settings.json, {"facts": facts("PyHessian") | about, "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
