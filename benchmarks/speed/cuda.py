"""What SAM's own part and whole SAM steps cost on a CUDA device: `python -m benchmarks.speed.step --device cuda`.

SAM's own part: to the perturbed weights and back, on the shapes of a model, without passes and update. The roofline is
the bandwidth of a copy in the same process; a row's share of it is that of the bytes which this part has to move,
whatever more its kernels do.

Whole steps: forward, backward and update under bf16 autocast, eager steps in turn with those of the base, and as CUDA
graphs. What does not fit into the time is left out, and named; so is what fails.
"""

from __future__ import annotations

import contextlib
import signal
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import nn

from benchmarks.speed import device, timing
from benchmarks.speed.device import Run
from benchmarks.speed.host import Davda54, foreach_ascend_
from benchmarks.speed.shapes import RHO, NoStep, shapes_of
from benchmarks.speed.whole_step import Setting, base_step, sam_step
from sam_optim import Perturbation
from sam_optim.core.errors import one_line

MODELS = ("resnet50", "vit_base_patch16_224", "wide-resnet-28-10", "efficientnet_b0", "resnet18")
MODELS += ("vit_giant_patch14_224",)
COMPILED = (
    "resnet18",
    "efficientnet_b0",
    "resnet50",
)  # torch.compile takes up to a minute for models with many tensors
# Bytes for each float32 entry: the norm reads g (and w where adaptive), the ascent reads w and g and writes w and its
# copy, the restore reads the copy and writes w.
BYTES, BYTES_ADAPTIVE = 4 + 16 + 8, 8 + 16 + 8

Rows = list[dict[str, Any]]


# SAM's own part


def sam(params: list[nn.Parameter], **flags: Any) -> Run:
    perturbation = Perturbation(params, rho=RHO, **flags)

    def step() -> None:
        with perturbation.perturbed():
            pass

    return step


def davda54(params: list[nn.Parameter]) -> Run:
    optimizer = Davda54(NoStep(params), adaptive=False)

    def step() -> None:
        optimizer.first_step()
        optimizer.second_step()

    return step


def compiled(params: list[nn.Parameter]) -> Run:
    """The shortest foreach program, through torch.compile."""
    weights = [p.data for p in params]
    saved = [torch.empty_like(w) for w in weights]
    ascend = torch.compile(lambda grads: foreach_ascend_(weights, saved, grads, adaptive=False))

    def step() -> None:
        ascend([p.grad for p in params])
        torch._foreach_copy_(weights, saved)

    return step


DESIGNS: dict[str, Callable[[list[nn.Parameter]], Run]] = {
    "fused SAM": lambda params: sam(params, fused=True),
    "fused ASAM": lambda params: sam(params, fused=True, adaptive=True),
    "foreach SAM": lambda params: sam(params, foreach=True),
    "foreach ASAM": lambda params: sam(params, foreach=True, adaptive=True),
    "davda54 SAM": davda54,
    "compiled SAM": compiled,
}


def own_part(model: str, name: str, roofline: float, rounds: int) -> Rows:
    """One row."""
    shapes = shapes_of(model)
    params = [nn.Parameter(torch.randn(s, device=device.DEVICE).mul_(0.05)) for s in shapes]
    grads = [torch.randn_like(p) for p in params]

    def prepare() -> None:
        for p, g in zip(params, grads, strict=True):
            p.grad = g

    prepare()
    step = DESIGNS[name](params)
    for _ in range(device.WARM_UP):
        prepare()
        step()
    host = device.host_seconds(step, prepare, rounds)
    on_device = device.device_seconds(step, prepare, rounds, ahead=0.001 + 2 * host)
    number = sum(s.numel() for s in shapes)
    needed = BYTES_ADAPTIVE if "ASAM" in name else BYTES
    rate = needed * number / max(on_device, 1e-9)
    row = {
        "model": model,
        "design": name,
        "tensors": len(shapes),
        "parameters": number,
        "bytes_per_parameter": needed,
        "device_us": 1e6 * on_device,
        "host_us": 1e6 * host,
        "whole_us": 1e6 * device.whole_seconds(step, prepare, rounds),
        "launches": device.num_launches(step, prepare),
        "bytes_per_second": rate,
        "roofline": rate / roofline,
    }
    return [row]


# whole steps


NETWORKS = {
    "resnet50": Setting("resnet50", 256, 224, 1000, channels_last=True, amp=True),
    "vit_small_patch16_224": Setting("vit_small_patch16_224", 256, 224, 1000, amp=True),
    "resnet18": Setting("resnet18", 128, 32, channels_last=True, small_stem=True, amp=True),
}
SECONDS = 60.0  # for the eager steps of a network
# (kind, whether SAM's part is fused)
WAYS = (("base", False), ("SAM", True), ("SAM", False), ("SAM 25 %", True), ("SAM 25 %", False))


def step_of(name: str, kind: str, *, fused: bool) -> Run:
    setting = replace(NETWORKS[name], device=device.DEVICE)
    if kind == "base":
        return base_step(setting, fused=True)
    return sam_step(setting, share=0.25 if kind == "SAM 25 %" else 1.0, fused=fused or None)


def eager_steps(name: str, rounds: int) -> Rows:
    """Every way in turn; the multiple of the base is the median of pairs."""
    steps = {f"{kind}, {fused}": step_of(name, kind, fused=fused) for kind, fused in WAYS}
    times = device.interleaved(steps, rounds)
    base = times[f"base, {False}"]
    return [_step_row(name, kind, fused, False, times[f"{kind}, {fused}"], base) for kind, fused in WAYS]


def graphed_step(name: str, kind: str, rounds: int, base_ms: float | None, *, fused: bool) -> Rows:
    """base_ms: of an eager step of the base."""
    replay = device.captured(step_of(name, kind, fused=fused))
    times = device.interleaved({"graph": replay}, rounds)["graph"]
    return [_step_row(name, kind, fused, True, times, None if base_ms is None else [1e-3 * base_ms] * len(times))]


def _step_row(
    name: str, kind: str, fused: bool, graph: bool, times: list[float], base: list[float] | None
) -> dict[str, Any]:
    ratio = None if base is None else statistics.median(a / b for a, b in zip(times, base, strict=True))
    row = {"model": name, "kind": kind, "fused": fused, "graph": graph}
    return row | {"ms": 1e3 * statistics.median(times), "times_eager_base": ratio}


# targets


def targets(parts: Rows, steps: Rows) -> Rows:
    """The targets for an H200, each with its measured value, None if there is none. parts: rows of SAM's own part."""
    rows = {(r["model"], r["design"]): r for r in parts}
    compared: Rows = []

    def add(what: str, measured: float | None, bound: float, *, at_least: bool) -> None:
        met = None if measured is None else bool(measured >= bound if at_least else measured <= bound)
        compared.append({"what": what, "measured": measured, "bound": bound, "at_least": at_least, "met": met})

    large = {r["model"] for r in parts if r["parameters"] >= 25e6}
    for model in [m for m in MODELS if m in large] or ["from 25 M parameters up"]:
        row = rows.get((model, "fused SAM"))
        add(f"{model}: share of the roofline, fused SAM", row and row["roofline"], 0.85, at_least=True)
    row = rows.get(("resnet50", "fused SAM"))
    add("resnet50: device us, fused SAM", row and row["device_us"], 210.0, at_least=False)
    theirs, ours = (rows.get(("efficientnet_b0", design)) for design in ("davda54 SAM", "fused SAM"))
    ratio = theirs["whole_us"] / max(ours["whole_us"], 1e-3) if theirs and ours else None
    add("efficientnet_b0: davda54 / fused SAM", ratio, 3.0, at_least=True)
    by_kind = {(r["model"], r["kind"], r["graph"]): r["times_eager_base"] for r in steps if r["fused"]}
    for what, key, bound in (
        ("resnet50: SAM / base", ("resnet50", "SAM", False), 2.02),
        ("resnet50: SAM with 25 % ascent / base", ("resnet50", "SAM 25 %", False), 1.35),
        ("resnet18, CIFAR: SAM as a graph / eager base", ("resnet18", "SAM", True), 1.3),
    ):
        add(what, by_kind.get(key), bound, at_least=False)
    return compared


# all of it


@dataclass
class Plan:
    """Measures one thing after another; what would not end before the deadline is left out and reported."""

    deadline: float
    missing: list[str]

    def attempt(self, what: str, run: Callable[[], Any], seconds: float) -> Any:
        """What `run` returns, or None with a line that says why there is nothing."""
        if time.monotonic() + seconds > self.deadline:
            self.missing.append(f"{what}: no time left")
            return None
        try:
            with until(self.deadline):
                return run()
        except Exception as error:  # Triton's errors are not RuntimeErrors; the other rows continue
            self.missing.append(f"{what}: {type(error).__name__}: {one_line(error)[:200]}")
            return None
        finally:
            with contextlib.suppress(RuntimeError):  # the device may have failed
                device.forget()


@contextlib.contextmanager
def until(deadline: float) -> Iterator[None]:
    """Raises TimeoutError at the deadline: torch.compile may take minutes."""

    def late(*_: Any) -> None:
        raise TimeoutError("the time was over before it had ended")

    start = time.monotonic()
    handler = signal.signal(signal.SIGALRM, late)
    earlier, _ = signal.setitimer(signal.ITIMER_REAL, max(0.001, deadline - start))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, handler)
        if earlier:  # an alarm that was set before
            signal.setitimer(signal.ITIMER_REAL, max(0.001, earlier - (time.monotonic() - start)))


def measure(
    models: Sequence[str], rounds: int, seconds: float, save: Callable[[dict[str, Any]], None] = lambda results: None
) -> dict[str, Any]:
    """save: gets the results after every row, so that a crash of the process costs no more than one."""
    plan = Plan(time.monotonic() + seconds, [])
    parts: Rows = []
    steps: Rows = []
    results = {"facts": device.facts(rounds), "own part": parts, "whole step": steps, "missing": plan.missing}
    results["copy_bytes_per_second"] = roofline = device.bandwidth(rounds)
    device.forget()

    def attempt(rows: Rows, what: str, needed: float, run: Callable[..., Rows], *args: Any, **kwargs: Any) -> None:
        rows += plan.attempt(what, partial(run, *args, **kwargs), needed) or []
        save(results | {"targets": targets(parts, steps)})

    for model in models:
        for name in [name for name in DESIGNS if name != "compiled SAM"]:
            attempt(parts, f"{model}, {name}", 4.0, own_part, model, name, roofline, rounds)
    for network in NETWORKS:
        attempt(steps, f"{network}, whole steps", SECONDS, eager_steps, network, rounds)
    for network in NETWORKS:
        base = next((r["ms"] for r in steps if (r["model"], r["kind"]) == (network, "base")), None)
        for kind, fused in WAYS:
            what = f"{network}, {kind}, fused={fused}, as a graph"
            attempt(steps, what, SECONDS / 3, graphed_step, network, kind, rounds, base, fused=fused)
    for model in [m for m in COMPILED if m in models]:
        attempt(parts, f"{model}, compiled SAM", 100.0, own_part, model, "compiled SAM", roofline, rounds)
    return results | {"targets": targets(parts, steps)}


def table(results: dict[str, Any]) -> str:
    f = results["facts"]
    lines = [
        f"{f['device']}, driver {f['driver']}, CUDA {f['cuda']}, torch {f['torch']}, triton {f['triton']}, "
        f"sam_optim {f['sam_optim']} {f['commit']}",
        f"a copy moves {1e-12 * results['copy_bytes_per_second']:.2f} TB/s",
        "",
        f"{'own part':36s}{'device us':>10s}{'host us':>9s}{'launches':>9s}{'B/param':>8s}{'TB/s':>7s}{'roofline':>9s}",
    ]
    for r in results["own part"]:
        launches = "?" if r["launches"] is None else r["launches"]
        lines.append(
            f"{r['model']:23.23s}{r['design']:13s}{r['device_us']:10.0f}{r['host_us']:9.0f}{launches:>9}"
            f"{r['bytes_per_parameter']:8d}{1e-12 * r['bytes_per_second']:7.2f}{r['roofline']:9.0%}"
        )
    lines += [
        "",
        f"{'whole step':36s}{'fused':>6s}{'eager ms':>10s}{'/ base':>8s}{'graph ms':>10s}{'/ base':>8s}",
    ]
    rows = {(r["model"], r["kind"], r["fused"], r["graph"]): r for r in results["whole step"]}
    for model, kind, fused in dict.fromkeys(key[:3] for key in rows):
        cells = ""
        for graph in (False, True):
            r = rows.get((model, kind, fused, graph))
            ratio = "" if r is None or r["times_eager_base"] is None else f"{r['times_eager_base']:.2f}"
            cells += f"{'' if r is None else format(r['ms'], '.2f'):>10s}{ratio:>8s}"
        lines.append(f"{model:23.23s}{kind:13s}{'yes' if fused else 'no':>6s}{cells}")
    lines += ["", f"{'target':50s}{'measured':>10s}{'':4s}{'bound':>8s}"]
    for t in results["targets"]:
        measured = "-" if t["measured"] is None else f"{t['measured']:.2f}"
        verdict = {None: "not measured", True: "met", False: "MISSED"}[t["met"]]
        lines.append(f"{t['what']:50s}{measured:>10s}{'>=' if t['at_least'] else '<=':>4s}{t['bound']:8.2f}  {verdict}")
    return "\n".join([*lines, *(f"missing: {line}" for line in results["missing"])])


def measure_all(models: Sequence[str] | None, rounds: int, minutes: float, path: Path | None) -> int:
    device.check_device()
    results = measure(models or MODELS, rounds, 60 * minutes, lambda results: timing.write(path, results))
    timing.write(path, results)
    print(table(results))
    return 0
