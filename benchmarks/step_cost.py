"""What a SAM step costs beside its two backward passes: ascent and restore, on the shapes of timm models.

    python -m benchmarks.step_cost [--models resnet50 ...] [--rounds 21] [--json FILE]

Everything runs in one process on one thread, interleaved in random order, on clones of the same weights and gradients;
compared are paired ratios of thread CPU time: robust where other processes share the machine. The peer is
`pytorch_optimizer`'s SAM. The floor is what no exact SAM on torch operations can go below: one norm of the gradient and
one out-of-place add of the size of the weights, as few and as large calls as possible.
"""

from __future__ import annotations

import argparse
import gc
import json
import platform
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from sam_optim import ASAM, SAM, __version__

MODELS = ("resnet50", "efficientnet_b0", "vit_base_patch16_224")
RHO = 0.05


class NoStep(torch.optim.Optimizer):
    """A base whose update is nothing: what remains of a step is SAM's own part."""

    def __init__(self, params, lr: float = 0.1):
        super().__init__(params, {"lr": lr})

    def step(self, closure=None):
        return None


def shapes_of(model: str) -> list[torch.Size]:
    import timm

    with torch.device("meta"):
        return [p.shape for p in timm.create_model(model).parameters()]


def make(shapes: list[torch.Size], seed: int = 0) -> tuple[list[Tensor], list[Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: [torch.randn(s, generator=generator).mul_(0.05) for s in shapes]  # noqa: E731
    return [torch.nn.Parameter(w) for w in draw()], draw()


def ours(cls: type[SAM], shapes: list[torch.Size], **kwargs) -> tuple[Callable[[], None], Callable[[], None]]:
    params, grads = make(shapes)
    optimizer = cls(params, NoStep, rho=RHO, **kwargs)

    def prepare() -> None:
        for p, g in zip(params, grads, strict=True):
            p.grad = g

    def run() -> None:
        optimizer.first_step()
        optimizer.second_step()

    return prepare, run


def peer(adaptive: bool, shapes: list[torch.Size]) -> tuple[Callable[[], None], Callable[[], None]]:
    from pytorch_optimizer import SAM as Peer

    params, grads = make(shapes)
    optimizer = Peer(params, NoStep, rho=RHO, adaptive=adaptive)

    def prepare() -> None:
        for p, g in zip(params, grads, strict=True):
            p.grad = g

    def run() -> None:
        optimizer.first_step()
        optimizer.second_step()

    return prepare, run


def floor(shapes: list[torch.Size]) -> tuple[Callable[[], None], Callable[[], None]]:
    """One norm and one out-of-place add for each tensor into persistent storage, and nothing else."""
    params, grads = make(shapes)
    weights = [p.data for p in params]
    out = [torch.empty_like(w) for w in weights]
    norms = torch.empty(len(weights)).unbind()

    def run() -> None:
        for g, n in zip(grads, norms, strict=True):
            torch.linalg.vector_norm(g, out=n)
        for w, g, o in zip(weights, grads, out, strict=True):
            torch.add(w, g, alpha=1e-3, out=o)

    return lambda: None, run


def measure(runs: dict[str, tuple[Callable[[], None], Callable[[], None]]], rounds: int) -> dict[str, list[float]]:
    """Thread CPU seconds of every run in every round, the order shuffled in each."""
    shuffle = random.Random(0).shuffle
    times: dict[str, list[float]] = {name: [] for name in runs}
    names = list(runs)
    gc.disable()
    try:
        for i in range(rounds + 3):
            shuffle(names)
            for name in names:
                prepare, run = runs[name]
                prepare()
                start = time.thread_time()
                run()
                if i >= 3:  # warm-up
                    times[name].append(time.thread_time() - start)
            gc.collect()
    finally:
        gc.enable()
    return times


def ratio(a: list[float], b: list[float]) -> dict[str, float]:
    """Median and quartiles of the paired ratios a / b."""
    paired = sorted(x / y for x, y in zip(a, b, strict=True))
    low, mid, high = statistics.quantiles(paired, n=4)
    return {"median": mid, "q1": low, "q3": high, "n": len(paired)}


def allocated_bytes(prepare: Callable[[], None], run: Callable[[], None]) -> int:
    """Bytes that one step in the steady state asks the allocator for."""
    for _ in range(3):
        prepare()
        run()
    prepare()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    events = prof.profiler.kineto_results.events() if prof.profiler is not None else []
    return sum(e.nbytes() for e in events if e.name() == "[memory]" and e.nbytes() > 0)


def compare(model: str, rounds: int) -> dict[str, object]:
    shapes = shapes_of(model)
    runs = {
        "sam": ours(SAM, shapes),
        "asam": ours(ASAM, shapes),
        "rho=0": ours(SAM, shapes, **{}),
        "peer sam": peer(False, shapes),
        "peer asam": peer(True, shapes),
        "floor": floor(shapes),
    }
    del runs["rho=0"]
    times = measure(runs, rounds)
    return {
        "model": model,
        "parameters": sum(s.numel() for s in shapes),
        "tensors": len(shapes),
        "milliseconds": {name: 1e3 * statistics.median(t) for name, t in times.items()},
        "peer / ours, SAM": ratio(times["peer sam"], times["sam"]),
        "peer / ours, ASAM": ratio(times["peer asam"], times["asam"]),
        "ours / floor, SAM": ratio(times["sam"], times["floor"]),
        "ours / floor, ASAM": ratio(times["asam"], times["floor"]),
        "bytes allocated": {name: allocated_bytes(*runs[name]) for name in ("sam", "asam")},
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.step_cost", description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), help="timm models whose shapes to use")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args(argv)
    torch.set_num_threads(1)
    results = []
    print(f"{'':24s}{'ms (thread CPU, median)':^34s}{'peer / ours':^28s}{'ours / floor':^16s}{'allocated':>10s}")
    print(f"{'shapes':24s}{'SAM':>8s}{'ASAM':>8s}{'peer':>9s}{'floor':>8s}{'SAM':>14s}{'ASAM':>14s}{'SAM':>9s}{'ASAM':>7s}")
    for model in args.models:
        r = compare(model, args.rounds)
        results.append(r)
        ms = r["milliseconds"]
        cells = [f"{r[f'peer / ours, {k}']['median']:.2f} [{r[f'peer / ours, {k}']['q1']:.2f}, {r[f'peer / ours, {k}']['q3']:.2f}]" for k in ("SAM", "ASAM")]
        print(
            f"{model:24s}{ms['sam']:8.1f}{ms['asam']:8.1f}{ms['peer sam']:9.1f}{ms['floor']:8.1f}"
            f"  {cells[0]:18s}{cells[1]:18s}"
            f"{r['ours / floor, SAM']['median']:6.2f}{r['ours / floor, ASAM']['median']:7.2f}"
            f"{max(r['bytes allocated'].values()):8d} B"
        )
    if args.json:
        facts = {"sam_optim": __version__, "torch": torch.__version__, "machine": platform.processor() or platform.machine()}
        args.json.write_text(json.dumps({"facts": facts, "threads": 1, "rounds": args.rounds, "results": results}, indent=1))
    return 0


if __name__ == "__main__":
    sys.exit(main())
