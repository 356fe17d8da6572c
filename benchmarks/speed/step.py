"""What a SAM step costs beside its two backward passes: ascent and restore, on the shapes of timm models.

    python -m benchmarks.speed.step [--device cpu] [--models resnet50 ...] [--rounds 21] [--json FILE]
    python -m benchmarks.speed.step --device cuda [--models ...] [--rounds 20] [--minutes 6] [--json FILE]

On CUDA: see `benchmarks/cuda_cost.py`. On the CPU everything runs in one process on one thread, in a new random order
in each round, on clones of the same weights and gradients. Compared are paired ratios of thread CPU time, which hold
where other processes share the machine. The peer is `pytorch_optimizer`'s SAM, whose adaptive variant has T = |w|; ours
is measured in that form (eta = 0) and with the eta of the ASAM paper.

The floor is one norm (in rows that keep it exact) and one out-of-place add for each tensor, no bookkeeping; for ASAM
the same two of T g and T^2 g, T = |w|, which is one multiplication more.

Rows but "SAM, checked" are without the check of the descent gradient for infinities (`nonfinite="ignore"`), which reads
it once more, and which neither the peer nor the floor has.
"""

from __future__ import annotations

import argparse
import statistics
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile

from benchmarks import command
from benchmarks.command import unknown
from benchmarks.speed import timing
from benchmarks.speed.timing import Run
from sam_optim import ASAM, SAM

MODELS = ("resnet50", "efficientnet_b0", "vit_base_patch16_224")
RHO = 0.05

ROW = 65536  # entries of one float32 sum: a longer one is off by up to 1e-3


class NoStep(torch.optim.Optimizer):
    """A base whose update is nothing: what remains of a step is SAM's own part."""

    def __init__(self, params: Any, lr: float = 0.1):
        super().__init__(params, {"lr": lr})

    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        return None


def shapes_of(model: str) -> list[torch.Size]:
    """Those of the parameters of a timm model, made without memory, or of the WRN-28-10 of the SAM paper."""
    if model == "wide-resnet-28-10":
        return wide_resnet()
    import timm

    if not timm.is_model(model):
        raise unknown("model", model, timm.list_models())
    with torch.device("meta"):
        return [p.shape for p in timm.create_model(model).parameters()]


def wide_resnet() -> list[torch.Size]:
    """WRN-28-10, arXiv:1605.07146, which timm does not have."""
    found: list[tuple[int, ...]] = [(16, 3, 3, 3)]
    width = 16
    for wide in (160, 320, 640):
        for _ in range(4):
            found += [(width,), (width,), (wide, width, 3, 3), (wide,), (wide,), (wide, wide, 3, 3)]
            if width != wide:
                found.append((wide, width, 1, 1))
            width = wide
    return [torch.Size(s) for s in [*found, (640,), (640,), (10, 640), (10,)]]


def make(shapes: list[torch.Size]) -> tuple[list[Tensor], list[Tensor]]:
    """The same weights and gradients at every call."""
    generator = torch.Generator().manual_seed(0)
    weights, grads = ([torch.randn(s, generator=generator).mul_(0.05) for s in shapes] for _ in range(2))
    return [torch.nn.Parameter(w) for w in weights], grads


def step_of(make_optimizer: Callable[[list[Tensor]], Any], shapes: list[torch.Size]) -> tuple[Run, Run]:
    """(what comes before the clock, what is timed): `first_step` and `second_step`, which the peer has, too."""
    params, grads = make(shapes)
    optimizer = make_optimizer(params)

    def prepare() -> None:
        for p, g in zip(params, grads, strict=True):
            p.grad = g

    def run() -> None:
        optimizer.first_step()
        optimizer.second_step()

    return prepare, run


def rho_zero(shapes: list[torch.Size]) -> tuple[Run, Run]:
    """A whole step(closure) with rho = 0, over a base and a closure that do nothing: what is left is bookkeeping."""
    params, grads = make(shapes)
    optimizer = SAM(params, NoStep, rho=0.0, nonfinite="ignore")
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    return lambda: None, lambda: optimizer.step(lambda: None)


def floor(shapes: list[torch.Size], *, adaptive: bool = False) -> tuple[Run, Run]:
    params, grads = make(shapes)
    triples = [(p.data.view(-1), g.view(-1), torch.empty_like(g.view(-1))) for p, g in zip(params, grads, strict=True)]
    norm = torch.linalg.vector_norm
    result = torch.empty(())

    rows = [g[: len(g) // ROW * ROW].view(-1, ROW) for _, g, _ in triples]
    tails = [g[len(g) // ROW * ROW :] for _, g, _ in triples]
    norms = [torch.empty(len(r)) for r in rows]

    def plain() -> None:
        for r, tail, out in zip(rows, tails, norms, strict=True):
            if len(r):
                norm(r, 2, 1, out=out)
            if len(tail):
                norm(tail, out=result)
        for w, g, out in triples:
            torch.add(w, g, alpha=1e-3, out=out)

    def with_t() -> None:
        for w, g, out in triples:
            norm(torch.mul(w, g, out=out), out=result)
        for w, _, out in triples:
            torch.addcmul(w, w, out, value=1e-3, out=out)

    return lambda: None, with_t if adaptive else plain


def allocated(prepare: Run, run: Run) -> dict[str, int]:
    """What one step in the steady state asks the allocator for: bytes in all, and the largest piece."""
    for _ in range(3):
        prepare()
        run()
    prepare()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as prof:
        run()
    sizes = [e.nbytes() for e in prof.profiler.kineto_results.events() if e.name() == "[memory]" and e.nbytes() > 0]
    return {"bytes": sum(sizes), "largest": max(sizes, default=0)}


def compare(model: str, rounds: int) -> dict[str, Any]:
    from pytorch_optimizer import SAM as Peer

    shapes = shapes_of(model)
    runs = {
        "SAM": step_of(lambda p: SAM(p, NoStep, rho=RHO, nonfinite="ignore"), shapes),
        "SAM, checked": step_of(lambda p: SAM(p, NoStep, rho=RHO), shapes),
        "ASAM": step_of(lambda p: ASAM(p, NoStep, rho=RHO, eta=0.0, nonfinite="ignore"), shapes),
        "ASAM eta=0.01": step_of(lambda p: ASAM(p, NoStep, rho=RHO, nonfinite="ignore"), shapes),
        "peer SAM": step_of(lambda p: Peer(p, NoStep, rho=RHO), shapes),
        "peer ASAM": step_of(lambda p: Peer(p, NoStep, rho=RHO, adaptive=True), shapes),
        "floor SAM": floor(shapes),
        "floor ASAM": floor(shapes, adaptive=True),
        "rho=0": rho_zero(shapes),
    }
    times = timing.interleaved(runs, rounds, model)
    kind = {"SAM": "SAM", "SAM, checked": "SAM", "ASAM": "ASAM", "ASAM eta=0.01": "ASAM"}
    return {
        "model": model,
        "parameters": sum(s.numel() for s in shapes),
        "tensors": len(shapes),
        "milliseconds": {name: 1e3 * statistics.median(t) for name, t in times.items()},
        "peer / ours": {k: timing.ratio(times[f"peer {base}"], times[k]) for k, base in kind.items()},
        "ours / floor": {k: timing.ratio(times[k], times[f"floor {base}"]) for k, base in kind.items()},
        "allocated": {k: allocated(*runs[k]) for k in kind},
    }


def table(results: list[dict[str, Any]]) -> str:
    head = f"{'shapes':22s}{'':15s}{'ms':>7s}{'peer ms':>9s}{'peer / ours':>22s}{'ours / floor':>22s}{'largest':>10s}"
    lines = [head, "-" * len(head)]
    for r in results:
        name, ms = f"{r['model']} ({r['parameters'] / 1e6:.1f} M)", r["milliseconds"]
        for k in r["peer / ours"]:
            cells = [
                f"{x['median']:.2f} [{x['q1']:.2f}, {x['q3']:.2f}]" for x in (r["peer / ours"][k], r["ours / floor"][k])
            ]
            peer = ms["peer ASAM" if k.startswith("ASAM") else "peer SAM"]
            lines.append(
                f"{name:22.22s}{k:>15s}{ms[k]:7.2f}{peer:9.2f}{cells[0]:>22s}{cells[1]:>22s}"
                f"{r['allocated'][k]['largest']:>8d} B"
            )
            name = ""
        lines.append(
            f"{'':22s}{'rho=0':>15s}{r['milliseconds']['rho=0']:7.2f}   a step without ascent, bookkeeping alone"
        )
    return "\n".join(lines)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.step", description=__doc__.splitlines()[0])
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--models", nargs="+", help="timm models whose shapes to use, or wide-resnet-28-10")
    parser.add_argument("--rounds", type=int, default=21)
    parser.add_argument("--minutes", type=float, default=6.0, help="on CUDA: what would take longer is left out")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    args = parser.parse_args(argv)
    timing.check_rounds(args.rounds)
    if args.device == "cuda":
        from benchmarks.speed import cuda as cuda_cost

        return cuda_cost.main(args.models, args.rounds, args.minutes, args.json)
    torch.set_num_threads(1)
    results = [compare(model, args.rounds) for model in args.models or MODELS]
    print(table(results))
    print("thread CPU time, medians of paired ratios [quartiles]; the peer is pytorch_optimizer's SAM")
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        command.write_json(args.json, {"facts": timing.facts(args.rounds, "pytorch_optimizer"), "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(command.run(main))
