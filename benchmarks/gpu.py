"""All that needs a device, in one command: the GPU tests, then what SAM's own part and whole steps cost.

    python -m benchmarks.gpu [--minutes 8] [--json FILE] [--skip-tests]

SAM's own part is the ascent and the restore, on the shapes of models, without their forward and backward. Device time
is measured with the queue filled beforehand, so that it holds no waiting for the host, and a cache that other data has
just been through; host time is that of the calls. The roofline is the bandwidth of a copy of 1 GB in the same process.
What does not fit into the time is left out, and named. The peer is `pytorch_optimizer`'s SAM, where it is installed.
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks import command
from benchmarks.command import InputError
from benchmarks.models import build
from benchmarks.step_cost import RHO, NoStep, shapes_of
from sam_optim import SAM, Perturbation, __version__

ROOT = Path(__file__).resolve().parents[1]
MODELS = (
    "resnet50",
    "vit_base_patch16_224",
    "wide-resnet-28-10",
    "efficientnet_b0",
    "resnet18",
    "vit_giant_patch14_224",
)
COMPILED = ("resnet18",)  # torch.compile of so many tensors takes a minute for each model
FUSED_BYTES, FOREACH_BYTES, PEER_BYTES = 28, 32, 48  # moved for each float32 entry, restore by copy included
REPETITIONS = 20

Run = Callable[[], Any]


def shapes(model: str) -> list[torch.Size]:
    """Of a timm model, or of the WRN-28-10 of the SAM paper, which timm does not have."""
    if model != "wide-resnet-28-10":
        return shapes_of(model)
    found = [(16, 3, 3, 3)]
    width = 16
    for wide in (160, 320, 640):
        for _ in range(4):
            found += [(width,), (width,), (wide, width, 3, 3), (wide,), (wide,), (wide, wide, 3, 3)]
            if width != wide:
                found.append((wide, width, 1, 1))
            width = wide
    return [torch.Size(s) for s in [*found, (640,), (640,), (10, 640), (10,)]]


# time


def bandwidth() -> float:
    """Bytes a second, read and written, of a copy of 1 GB."""
    a = torch.empty(2**28, device="cuda")
    b = torch.empty_like(a)
    return 2 * a.nbytes / (device_seconds(lambda: b.copy_(a), lambda: None) or 1.0)


def device_seconds(run: Run, prepare: Run) -> float:
    """Median; the host is ahead, and the second-level cache holds something else."""
    flush = torch.empty(2**28 // 4, device="cuda")
    times = []
    for i in range(REPETITIONS + 3):
        prepare()
        flush.zero_()
        torch.cuda._sleep(20_000_000)  # about 10 ms, in which the host puts everything into the queue
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        run()
        end.record()
        torch.cuda.synchronize()
        if i >= 3:
            times.append(start.elapsed_time(end) * 1e-3)
    return statistics.median(times)


def host_seconds(run: Run, prepare: Run) -> float:
    times = []
    for i in range(REPETITIONS + 3):
        prepare()
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        if i >= 3:
            times.append(time.perf_counter() - start)
    torch.cuda.synchronize()
    return statistics.median(times)


def num_kernels(run: Run, prepare: Run) -> int:
    prepare()
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as prof:
        run()
        torch.cuda.synchronize()
    names = [e.name() for e in prof.profiler.kineto_results.events() if e.device_type().name == "CUDA"]
    return sum(not name.startswith(("Memcpy HtoD", "Memset")) for name in names)


# SAM's own part


def own_part(make: Callable[[list[nn.Parameter]], Run], found: list[torch.Size]) -> tuple[Run, Run]:
    params = [nn.Parameter(torch.randn(s, device="cuda").mul_(0.05)) for s in found]
    grads = [torch.randn_like(p) for p in params]

    def prepare() -> None:
        for p, g in zip(params, grads, strict=True):
            p.grad = g

    prepare()
    return make(params), prepare


def ours(**flags: Any) -> Callable[[list[nn.Parameter]], Run]:
    def make(params: list[nn.Parameter]) -> Run:
        sam = Perturbation(params, rho=RHO, **flags)

        def run() -> None:
            sam.enter(keep_gradients=False)
            sam.exit()

        return run

    return make


def peer(params: list[nn.Parameter]) -> Run:
    from pytorch_optimizer import SAM as Peer

    optimizer = Peer(params, NoStep, rho=RHO)

    def run() -> None:
        optimizer.first_step(zero_grad=True)
        optimizer.second_step()

    return run


def stepped(*, is_sam: bool) -> Callable[[list[nn.Parameter]], Run]:
    """A whole update without passes: SGD with momentum alone, and SAM around it, whose update restores, too."""

    def make(params: list[nn.Parameter]) -> Run:
        options: dict[str, Any] = {"lr": 1e-9, "momentum": 0.9, "fused": True}
        if not is_sam:
            return torch.optim.SGD(params, **options).step
        sam = SAM(params, torch.optim.SGD, rho=RHO, nonfinite="ignore", **options)

        def run() -> None:
            sam.first_step()
            sam.second_step()

        return run

    return make


def compiled(params: list[nn.Parameter]) -> Run:
    """foreach as plain operations, through torch.compile."""
    weights = [p.data for p in params]
    saved = [torch.empty_like(w) for w in weights]

    def step(grads: list[torch.Tensor]) -> None:
        torch._foreach_copy_(saved, weights)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        torch._foreach_add_(weights, torch._foreach_mul(grads, RHO / (norm + 1e-12)))
        torch._foreach_copy_(weights, saved)

    fast = torch.compile(step)
    return lambda: fast([p.grad for p in params])


DESIGNS: dict[str, tuple[Callable[[list[nn.Parameter]], Run], int]] = {
    "fused": (ours(fused=True), FUSED_BYTES),
    "fused ASAM": (ours(fused=True, adaptive=True), FUSED_BYTES + 4),
    "foreach": (ours(foreach=True), FOREACH_BYTES),
    "compiled": (compiled, FOREACH_BYTES),
    "peer": (peer, PEER_BYTES),
    "SGD alone": (stepped(is_sam=False), 20),
    "SGD in SAM": (stepped(is_sam=True), 40),
}


def cost(model: str, design: str, roofline: float) -> dict[str, Any]:
    found = shapes(model)
    make, per_entry = DESIGNS[design]
    run, prepare = own_part(make, found)
    moved = per_entry * sum(s.numel() for s in found)
    for _ in range(3):
        prepare()
        run()
    device = device_seconds(run, prepare)
    return {
        "model": model,
        "design": design,
        "tensors": len(found),
        "parameters": sum(s.numel() for s in found),
        "device_us": 1e6 * device,
        "host_us": 1e6 * host_seconds(run, prepare),
        "kernels": num_kernels(run, prepare),
        "bytes_per_parameter": per_entry,
        "TB/s": 1e-12 * moved / device,
        "roofline": moved / device / roofline,
    }


# whole steps

NETWORKS = {
    "resnet50": {"size": 224, "classes": 1000, "batch": 256, "channels_last": True},
    "vit_small_patch16_224": {"size": 224, "classes": 1000, "batch": 256, "channels_last": False},
    "resnet18": {"size": 32, "classes": 10, "batch": 128, "channels_last": True},
}
KINDS = ("base", "SAM", "SAM 25 %")


def whole_step(name: str, kind: str, *, graph: bool, fused: bool) -> dict[str, Any]:
    n = NETWORKS[name]
    torch.manual_seed(0)
    model = build(name, num_classes=n["classes"], image_size=(3, n["size"], n["size"])).cuda()
    x = torch.randn(n["batch"], 3, n["size"], n["size"], device="cuda")
    y = torch.randint(n["classes"], (n["batch"],), device="cuda")
    if n["channels_last"]:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    options = {"lr": 0.01, "momentum": 0.9}
    base = torch.optim.SGD(model.parameters(), **options)
    sam = SAM(model.parameters(), torch.optim.SGD, rho=RHO, module=model, fused=fused or None, **options)

    def closure(part: int = n["batch"]) -> torch.Tensor:
        for p in model.parameters():
            p.grad = None
        with torch.autocast("cuda", torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x[:part]), y[:part])
        loss.backward()
        return loss.detach()

    def run() -> None:
        if kind == "base":
            closure()
            base.step()
        else:
            quarter = (lambda: closure(n["batch"] // 4)) if kind == "SAM 25 %" else None
            sam.step(closure, ascent_closure=quarter)

    replay = captured(run) if graph else run
    times = []
    for i in range(15):
        torch.cuda.synchronize()
        start = time.perf_counter()
        replay()
        torch.cuda.synchronize()
        if i >= 5:
            times.append(time.perf_counter() - start)
    return {"model": name, "kind": kind, "graph": graph, "fused": fused, "ms": 1e3 * statistics.median(times)}


def captured(run: Run) -> Run:
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            run()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        run()
    return graph.replay


# the command


def tests(seconds: float) -> str:
    """The last line of pytest; what this machine's torch deprecates is no failure here."""
    words = ["-m", "pytest", "tests/gpu", "-q", "-o", "addopts=", "-W", "default", "-p", "no:cacheprovider"]
    try:
        out = subprocess.run([sys.executable, *words], cwd=ROOT, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"not finished in {seconds:.0f} s"
    lines = (out.stdout + out.stderr).strip().splitlines()
    if out.returncode:
        print("\n".join(lines[-60:]))
    return lines[-1] if lines else f"exit code {out.returncode}"


def attempt(what: str, run: Callable[[], dict[str, Any]], missing: list[str]) -> dict[str, Any] | None:
    """A measurement, or None with a line that says why there is none."""
    try:
        return run()
    except (ImportError, RuntimeError, ValueError) as error:
        missing.append(f"{what}: {command.one_line(error)[:200]}")
        return None
    finally:
        gc.collect()
        torch.cuda.empty_cache()


def table(results: dict[str, Any]) -> str:
    f = results["facts"]
    lines = [
        f"{f['device']}, CUDA {f['cuda']}, torch {f['torch']}, triton {f['triton']}, sam_optim {f['sam_optim']}",
        f"a copy moves {results['copy TB/s']:.2f} TB/s",
        f"tests/gpu: {results['tests']}",
        f"{'own part':24s}{'design':12s}{'device us':>10s}{'host us':>9s}{'kernels':>9s}{'TB/s':>7s}{'roofline':>10s}",
    ]
    lines += [
        f"{r['model']:24.24s}{r['design']:12s}{r['device_us']:10.0f}{r['host_us']:9.0f}{r['kernels']:9d}{r['TB/s']:7.2f}"
        f"{r['roofline']:10.0%}"
        for r in results["own part"]
    ]
    lines.append(f"{'whole step':24s}{'kind':12s}{'eager ms':>10s}{'graph ms':>10s}{'fused':>8s}")
    steps = {(r["model"], r["kind"], r["fused"], r["graph"]): r["ms"] for r in results["whole step"]}
    for model, kind, fused in dict.fromkeys(key[:3] for key in steps):
        eager, graph = (steps.get((model, kind, fused, g), float("nan")) for g in (False, True))
        lines.append(f"{model:24.24s}{kind:12s}{eager:10.2f}{graph:10.2f}{fused!s:>8s}")
    return "\n".join([*lines, *(f"missing: {line}" for line in results["missing"])])


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.gpu", description=__doc__.splitlines()[0])
    parser.add_argument("--minutes", type=float, default=8.0, help="after which nothing new is begun")
    parser.add_argument("--json", type=Path, help="also write the results to this file")
    parser.add_argument("--skip-tests", action="store_true")
    args = parser.parse_args(argv)
    if not torch.cuda.is_available():
        raise InputError("this needs a CUDA device, and torch sees none: run it on a machine with a GPU and its driver")
    deadline = time.monotonic() + 60 * args.minutes - 40  # the longest measurement ends in time, too
    missing: list[str] = []
    results: dict[str, Any] = {"tests": "left out" if args.skip_tests else tests(150), "missing": missing}
    try:
        import triton
    except ImportError:
        triton = None
    results["facts"] = {
        "device": torch.cuda.get_device_name(),
        "cuda": torch.version.cuda,
        "torch": torch.__version__,
        "triton": getattr(triton, "__version__", None),
        "sam_optim": __version__,
    }
    roofline = bandwidth()
    results |= {"copy TB/s": 1e-12 * roofline, "own part": [], "whole step": []}
    plan: list[tuple[str, str, Callable[[], dict[str, Any]]]] = []
    for model in MODELS:
        for design in DESIGNS:
            if design != "compiled" or model in COMPILED:
                plan.append(("own part", f"{model} {design}", lambda m=model, d=design: cost(m, d, roofline)))
    for name in NETWORKS:
        for kind in KINDS:
            for graph in (False, True):
                for fused in (False,) if kind == "base" else (True, False):
                    run = lambda n=name, k=kind, g=graph, f=fused: whole_step(n, k, graph=g, fused=f)  # noqa: E731
                    plan.append(("whole step", f"{name} {kind}, graph={graph}, fused={fused}", run))
    for part, what, measure in plan:
        if time.monotonic() > deadline:
            missing.append(f"{what}: no time left")
        elif (found := attempt(what, measure, missing)) is not None:
            results[part].append(found)
    if args.json:
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(results, indent=1) + "\n")
    print(table(results))
    return 0 if args.skip_tests or (" failed" not in results["tests"] and " passed" in results["tests"]) else 1


if __name__ == "__main__":
    sys.exit(command.run(main))
