"""What a SAM step costs beside its two backward passes: ascent and restore, on the shapes of timm models.

    python -m benchmarks.speed.step [--device cpu] [--models resnet50 ...] [--rounds 21] [--json FILE]
    python -m benchmarks.speed.step --device cuda [--models ...] [--rounds 20] [--minutes 6] [--json FILE]

On CUDA: see `benchmarks/speed/cuda.py`. On the CPU everything runs in one process on one thread, in a new random order
in each round, on clones of the same weights and gradients. Compared are paired ratios of thread CPU time, which hold
where other processes share the machine. The peer is davda54/sam's algorithm, whose adaptive variant has T = |w|; ours
is measured in that form (eta = 0) and with the eta of the ASAM paper.

The floor is one norm (in rows that keep it exact) and one out-of-place add for each tensor, no bookkeeping; for ASAM
the same two of T g and T^2 g, T = |w|, which is one multiplication more.

Rows but "SAM, checked" are without the check of the descent gradient for infinities (`nonfinite="ignore"`), which reads
it once more, and which neither the peer nor the floor has.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import facts, one_thread
from benchmarks.speed import timing
from benchmarks.speed.host import Davda54
from benchmarks.speed.shapes import RHO, NoStep, shapes_of
from benchmarks.speed.timing import Run
from sam_optim import SAM
from sam_optim.core.errors import run
from sam_optim.core.files import reserved

MODELS = ("resnet50", "efficientnet_b0", "vit_base_patch16_224")
ROW = 65536  # entries of one float32 sum: a longer one is off by up to 1e-3


def problem(shapes: list[torch.Size]) -> tuple[list[nn.Parameter], list[Tensor]]:
    """The same weights and gradients at every call."""
    generator = torch.Generator().manual_seed(0)
    weights, grads = ([torch.randn(s, generator=generator).mul_(0.05) for s in shapes] for _ in range(2))
    return [nn.Parameter(w) for w in weights], grads


def step_of(optimizer_of: Callable[[list[nn.Parameter]], Any], shapes: list[torch.Size]) -> tuple[Run, Run]:
    """(what comes before the clock, what is timed): `first_step` and `second_step`, which the peer has, too."""
    params, grads = problem(shapes)
    optimizer = optimizer_of(params)

    def prepare() -> None:
        for p, g in zip(params, grads, strict=True):
            p.grad = g

    def step() -> None:
        optimizer.first_step()
        prepare()  # the gradients of the second pass
        optimizer.second_step()

    return prepare, step


def floor(shapes: list[torch.Size], *, adaptive: bool = False) -> tuple[Run, Run]:
    params, grads = problem(shapes)
    triples = [(p.data.view(-1), g.view(-1), torch.empty_like(g.view(-1))) for p, g in zip(params, grads, strict=True)]
    norm, result = torch.linalg.vector_norm, torch.empty(())
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


WAYS: dict[str, dict[str, Any]] = {
    "SAM": {"nonfinite": "ignore"},
    "SAM, checked": {},
    "ASAM": {"adaptive": True, "eta": 0.0, "nonfinite": "ignore"},
    "ASAM eta=0.01": {"adaptive": True, "nonfinite": "ignore"},
}


def compare(model: str, rounds: int) -> dict[str, Any]:
    shapes = shapes_of(model)
    runs = {way: step_of(lambda p, o=options: SAM(p, NoStep, rho=RHO, **o), shapes) for way, options in WAYS.items()}
    for kind, adaptive in (("SAM", False), ("ASAM", True)):
        runs[f"peer {kind}"] = step_of(lambda p, a=adaptive: Davda54(NoStep(p), a), shapes)
        runs[f"floor {kind}"] = floor(shapes, adaptive=adaptive)
    times = timing.interleaved(runs, rounds, model)
    kinds = {way: "ASAM" if options.get("adaptive") else "SAM" for way, options in WAYS.items()}
    return {
        "model": model,
        "parameters": sum(s.numel() for s in shapes),
        "tensors": len(shapes),
        "milliseconds": {name: 1e3 * statistics.median(t) for name, t in times.items()},
        "peer / ours": {way: timing.ratio(times[f"peer {kind}"], times[way]) for way, kind in kinds.items()},
        "ours / floor": {way: timing.ratio(times[way], times[f"floor {kind}"]) for way, kind in kinds.items()},
    }


def table(results: list[dict[str, Any]]) -> str:
    head = f"{'shapes':22s}{'':15s}{'ms':>7s}{'peer ms':>9s}{'peer / ours':>22s}{'ours / floor':>22s}"
    lines = [head, "-" * len(head)]
    for r in results:
        name, ms = f"{r['model']} ({r['parameters'] / 1e6:.1f} M)", r["milliseconds"]
        for way in r["peer / ours"]:
            ratios = (r["peer / ours"][way], r["ours / floor"][way])
            cells = "".join(f"{x['median']:10.2f} [{x['q1']:.2f}, {x['q3']:.2f}]" for x in ratios)
            peer = ms["peer ASAM" if way.startswith("ASAM") else "peer SAM"]
            lines.append(f"{name:22.22s}{way:>15s}{ms[way]:7.2f}{peer:9.2f}{cells}")
            name = ""
    return "\n".join(lines)


def main(argv: Sequence[str] | None = None) -> int:
    p = timing.parser("step", __doc__, rounds=21)
    p.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    p.add_argument("--models", nargs="+", help="timm models whose shapes to use, or wide-resnet-28-10")
    p.add_argument("--minutes", type=float, default=6.0, help="on CUDA: skip what would take longer (default: 6)")
    args = p.parse_args(argv)
    if args.device == "cuda":
        from benchmarks.speed import cuda

        with reserved(args.json, "--json"):
            return cuda.measure_all(args.models, args.rounds, args.minutes, args.json)
    with one_thread(), reserved(args.json, "--json"):
        results = [compare(model, args.rounds) for model in args.models or MODELS]
        print(table(results))
        print("thread CPU time, medians of paired ratios [quartiles]; the peer is davda54/sam's algorithm")
        timing.write(args.json, {"facts": facts("timm") | {"rounds": args.rounds}, "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
