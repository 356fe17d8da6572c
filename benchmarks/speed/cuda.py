"""What SAM's own part and whole SAM steps cost on a CUDA device: `python -m benchmarks.speed.step --device cuda`.

SAM's own part: on the shapes of a model, without its passes. Every way is measured as a whole update, `first_step` and
`second_step` over SGD with momentum and fused=True, less that update alone; bytes are those that this part has to
move. (torch.compile and the peer, which have no part in the update, around a base that does nothing.) The roofline is
the bandwidth of a copy in the same process.

Whole steps: forward, backward and update under bf16 autocast, eager steps in turn with those of the base, and as CUDA
graphs. What does not fit into the time is left out, and named; so is what fails.
"""

from __future__ import annotations

import contextlib
import signal
import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import command
from benchmarks.speed import device
from benchmarks.speed.device import Run
from benchmarks.speed.step import RHO, NoStep, shapes_of
from benchmarks.train.models import build
from sam_optim import SAM, Perturbation

MODELS = (
    "resnet50",
    "vit_base_patch16_224",
    "wide-resnet-28-10",
    "efficientnet_b0",
    "resnet18",
    "vit_giant_patch14_224",
)
COMPILED = ("resnet18", "efficientnet_b0", "resnet50")  # torch.compile takes up to a minute for so many tensors
BASE: dict[str, Any] = {"lr": 1e-9, "momentum": 0.9, "fused": True}

Make = Callable[[list[nn.Parameter]], Run]


# SAM's own part


def base_alone(params: list[nn.Parameter]) -> Run:
    return torch.optim.SGD(params, **BASE).step


def around_base(**flags: Any) -> Make:
    def make(params: list[nn.Parameter]) -> Run:
        sam = SAM.wrap(torch.optim.SGD(params, **BASE), rho=RHO, nonfinite="ignore", **flags)

        def run() -> None:
            sam.first_step()
            sam.second_step()

        return run

    return make


def peer(params: list[nn.Parameter]) -> Run:
    from pytorch_optimizer import SAM as Peer

    optimizer = Peer(params, NoStep, rho=RHO)

    def run() -> None:
        optimizer.first_step()
        optimizer.second_step()

    return run


def compiled(params: list[nn.Parameter]) -> Run:
    """foreach as plain operations, through torch.compile."""
    weights = [p.data for p in params]
    saved = [torch.empty_like(w) for w in weights]

    def move(grads: list[Tensor]) -> None:
        torch._foreach_copy_(saved, weights)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
        torch._foreach_add_(weights, torch._foreach_mul(grads, RHO / (norm + 1e-12)))

    fast = torch.compile(move)

    def run() -> None:
        fast([p.grad for p in params])
        torch._foreach_copy_(weights, saved)

    return run


def restored_by_copy(params: list[nn.Parameter]) -> Run:
    """Three launches and a copy: over any base, and in contexts."""
    sam = Perturbation(params, rho=RHO, fused=True)

    def run() -> None:
        sam.enter(keep_gradients=False)
        sam.exit()

    return run


@dataclass(frozen=True)
class Design:
    """bytes: that it moves for each float32 entry, beyond what the base does. beside_base: measured as a difference."""

    make: Make
    bytes: int
    beside_base: bool = True
    seconds: float = 4.0


DESIGNS = {
    "SGD alone": Design(base_alone, 20, beside_base=False),
    "fused SAM": Design(around_base(fused=True), 20),
    "fused ASAM": Design(around_base(fused=True, adaptive=True), 24),
    "fused, copy": Design(restored_by_copy, 28, beside_base=False),
    "foreach SAM": Design(around_base(foreach=True), 32),
    "foreach ASAM": Design(around_base(foreach=True, adaptive=True), 88),
    "peer SAM": Design(peer, 48, beside_base=False),
    "compiled SAM": Design(compiled, 32, beside_base=False, seconds=100.0),
}


def own_part(model: str, name: str, roofline: float, rounds: int, base: dict[str, Any] | None) -> dict[str, Any]:
    """One row. base: that of "SGD alone" on the same model."""
    design, found = DESIGNS[name], shapes_of(model)
    if design.beside_base and base is None:
        raise RuntimeError("the base alone has not been measured")
    params = [nn.Parameter(torch.randn(s, device=device.DEVICE).mul_(0.05)) for s in found]
    grads = [torch.randn_like(p) for p in params]

    def prepare() -> None:
        for p, g in zip(params, grads, strict=True):
            p.grad = g

    prepare()
    run = design.make(params)
    for _ in range(device.WARM_UP):
        prepare()
        run()
    host = device.host_seconds(run, prepare, rounds)
    row: dict[str, Any] = {
        "device_us": 1e6 * device.device_seconds(run, prepare, rounds, ahead=0.001 + 2 * host),
        "host_us": 1e6 * host,
        "whole_us": 1e6 * device.whole_seconds(run, prepare, rounds),
        "launches": device.num_launches(run, prepare),
    }
    if design.beside_base and base is not None:
        row = {k: None if x is None or base[k] is None else x - base[k] for k, x in row.items()}
    number = sum(s.numel() for s in found)
    rate = design.bytes * number / max(1e-6 * row["device_us"], 1e-9)  # noise may leave a difference of nothing
    row |= {"bytes_per_second": rate, "roofline": rate / roofline}
    about = {"model": model, "design": name, "tensors": len(found), "parameters": number}
    return about | {"bytes_per_parameter": design.bytes} | row


# whole steps


@dataclass(frozen=True)
class Network:
    size: int
    classes: int
    batch: int
    channels_last: bool = False
    seconds: float = 60.0


NETWORKS = {
    "resnet50": Network(224, 1000, 256, channels_last=True, seconds=60),
    "vit_small_patch16_224": Network(224, 1000, 256, seconds=60),
    "resnet18": Network(32, 10, 128, channels_last=True, seconds=30),
}
KINDS = ("base", "SAM", "SAM 25 %")


def step_of(name: str, kind: str, *, fused: bool) -> Run:
    n = NETWORKS[name]
    torch.manual_seed(0)
    model = build(name, num_classes=n.classes, image_size=(3, n.size, n.size)).to(device.DEVICE)
    x = torch.randn(n.batch, 3, n.size, n.size, device=device.DEVICE)
    y = torch.randint(n.classes, (n.batch,), device=device.DEVICE)
    if n.channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    settings = {"lr": 0.01, "momentum": 0.9, "fused": True}
    base = torch.optim.SGD(model.parameters(), **settings)

    def closure(part: int = n.batch) -> Tensor:
        for p in model.parameters():
            p.grad = None
        with torch.autocast(device.DEVICE, torch.bfloat16):
            loss = nn.functional.cross_entropy(model(x[:part]), y[:part])
        loss.backward()
        return loss.detach()

    if kind == "base":

        def run() -> None:
            closure()
            base.step()

        return run
    sam = SAM.wrap(base, rho=RHO, module=model, fused=fused or None)
    quarter = (lambda: closure(max(1, n.batch // 4))) if kind == "SAM 25 %" else None
    return lambda: sam.step(closure, ascent_closure=quarter)


def eager_steps(name: str, rounds: int) -> list[dict[str, Any]]:
    """Every kind in turn; the multiple of the base is the median of pairs."""
    ways = {(kind, fused): step_of(name, kind, fused=fused) for kind in KINDS for fused in _flags(kind)}
    times = device.interleaved({f"{kind}, {fused}": run for (kind, fused), run in ways.items()}, rounds)
    base = times[f"base, {False}"]
    return [_step_row(name, kind, fused, False, times[f"{kind}, {fused}"], base) for kind, fused in ways]


def graphed_step(name: str, kind: str, rounds: int, base_ms: float | None, *, fused: bool) -> list[dict[str, Any]]:
    """base_ms: of an eager step of the base."""
    replay = device.captured(step_of(name, kind, fused=fused))
    times = device.interleaved({"graph": replay}, rounds)["graph"]
    return [_step_row(name, kind, fused, True, times, None if base_ms is None else [1e-3 * base_ms] * len(times))]


def _flags(kind: str) -> tuple[bool, ...]:
    return (False,) if kind == "base" else (True, False)


def _step_row(
    name: str, kind: str, fused: bool, graph: bool, times: list[float], base: list[float] | None
) -> dict[str, Any]:
    ratio = None if base is None else statistics.median(a / b for a, b in zip(times, base, strict=True))
    row = {"model": name, "kind": kind, "fused": fused, "graph": graph}
    return row | {"ms": 1e3 * statistics.median(times), "times_eager_base": ratio}


# targets


def targets(own: list[dict[str, Any]], steps: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Those of an H200, each with what was measured, None where it was not."""
    rows = {(r["model"], r["design"]): r for r in own}
    found: list[dict[str, Any]] = []

    def say(what: str, measured: float | None, bound: float, *, at_least: bool) -> None:
        met = None if measured is None else bool(measured >= bound if at_least else measured <= bound)
        found.append({"what": what, "measured": measured, "bound": bound, "at_least": at_least, "met": met})

    large = {r["model"] for r in own if r["parameters"] >= 25e6}
    for model in [m for m in MODELS if m in large] or ["from 25 M parameters up"]:
        row = rows.get((model, "fused SAM"))
        say(f"{model}: share of the roofline, fused SAM", row and row["roofline"], 0.85, at_least=True)
    row = rows.get(("resnet50", "fused SAM"))
    say("resnet50: device us, fused SAM", row and row["device_us"], 150.0, at_least=False)
    pair = [rows.get(("efficientnet_b0", d)) for d in ("peer SAM", "fused SAM")]
    ratio = None if None in pair else pair[0]["whole_us"] / max(pair[1]["whole_us"], 1e-3)  # type: ignore[index]
    say("efficientnet_b0: peer / fused SAM", ratio, 10.0, at_least=True)
    by_kind = {(r["model"], r["kind"], r["graph"]): r["times_eager_base"] for r in steps if r["fused"]}
    for what, key, bound in (
        ("resnet50: SAM / base", ("resnet50", "SAM", False), 2.02),
        ("resnet50: SAM with 25 % ascent / base", ("resnet50", "SAM 25 %", False), 1.35),
        ("resnet18, CIFAR: SAM as a graph / eager base", ("resnet18", "SAM", True), 1.3),
    ):
        say(what, by_kind.get(key), bound, at_least=False)
    return found


# all of it


@dataclass
class Plan:
    """What is measured, in order; what would not end before the deadline is left out, and said to be."""

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
        except Exception as error:  # also Triton's own, which are no RuntimeErrors: the other rows count
            self.missing.append(f"{what}: {type(error).__name__}: {command.one_line(error)[:200]}")
            return None
        finally:
            with contextlib.suppress(RuntimeError):  # of a device on which nothing runs any more
                device.forget()


@contextlib.contextmanager
def until(deadline: float) -> Iterator[None]:
    """TimeoutError at the deadline: torch.compile may take minutes where it was given one."""

    def late(*_: Any) -> None:
        raise TimeoutError("the time was over before it had ended")

    begun = time.monotonic()
    before = signal.signal(signal.SIGALRM, late)
    others, _ = signal.setitimer(signal.ITIMER_REAL, max(0.001, deadline - begun))
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
        if others:
            signal.setitimer(signal.ITIMER_REAL, max(0.001, others - (time.monotonic() - begun)))


def measure(
    models: list[str], rounds: int, seconds: float, save: Callable[[dict[str, Any]], None] = lambda results: None
) -> dict[str, Any]:
    """save: gets the results after every row, so that a crash of the process costs no more than one."""
    plan = Plan(time.monotonic() + seconds, [])
    own: list[dict[str, Any]] = []
    steps: list[dict[str, Any]] = []
    results = {"facts": device.facts(rounds), "own part": own, "whole step": steps, "missing": plan.missing}
    results["copy_bytes_per_second"] = roofline = device.bandwidth(rounds)
    device.forget()

    def note() -> None:
        save(results | {"targets": targets(own, steps)})

    def one(model: str, name: str) -> None:
        base = next((r for r in own if (r["model"], r["design"]) == (model, "SGD alone")), None)
        run = lambda: own_part(model, name, roofline, rounds, base)  # noqa: E731
        if (row := plan.attempt(f"{model}, {name}", run, DESIGNS[name].seconds)) is not None:
            own.append(row)
        note()

    for model in models:
        for name in DESIGNS:
            if name != "compiled SAM":
                one(model, name)
    for network, n in NETWORKS.items():
        steps += plan.attempt(f"{network}, whole steps", lambda m=network: eager_steps(m, rounds), n.seconds) or []
        note()
    for network, n in NETWORKS.items():
        base = next((r["ms"] for r in steps if (r["model"], r["kind"]) == (network, "base")), None)
        for kind, fused in ((k, f) for k in KINDS for f in _flags(k)):
            run = lambda m=network, k=kind, f=fused, b=base: graphed_step(m, k, rounds, b, fused=f)  # noqa: E731
            steps += plan.attempt(f"{network}, {kind}, fused={fused}, as a graph", run, n.seconds / 3) or []
            note()
    for model in [m for m in COMPILED if m in models]:
        one(model, "compiled SAM")
    return results | {"targets": targets(own, steps)}


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
        launches = "?" if r["launches"] is None else f"{r['launches']:d}"
        lines.append(
            f"{r['model']:23.23s}{r['design']:13s}{r['device_us']:10.0f}{r['host_us']:9.0f}{launches:>9s}"
            f"{r['bytes_per_parameter']:8d}{1e-12 * r['bytes_per_second']:7.2f}{r['roofline']:9.0%}"
        )
    lines += [
        "",
        f"{'whole step':36s}{'fused':>6s}{'eager ms':>10s}{'/ base':>8s}{'graph ms':>10s}{'/ base':>8s}",
    ]
    known = {(r["model"], r["kind"], r["fused"], r["graph"]): r for r in results["whole step"]}
    for model, kind, fused in dict.fromkeys(key[:3] for key in known):
        cells = ""
        for graph in (False, True):
            r = known.get((model, kind, fused, graph))
            ratio = "" if r is None or r["times_eager_base"] is None else f"{r['times_eager_base']:.2f}"
            cells += f"{'' if r is None else format(r['ms'], '.2f'):>10s}{ratio:>8s}"
        lines.append(f"{model:23.23s}{kind:13s}{'yes' if fused else 'no':>6s}{cells}")
    lines += ["", f"{'target':50s}{'measured':>10s}{'':4s}{'bound':>8s}"]
    for t in results["targets"]:
        measured = "-" if t["measured"] is None else f"{t['measured']:.2f}"
        verdict = {None: "not measured", True: "met", False: "MISSED"}[t["met"]]
        lines.append(f"{t['what']:50s}{measured:>10s}{'>=' if t['at_least'] else '<=':>4s}{t['bound']:8.2f}  {verdict}")
    return "\n".join([*lines, *(f"missing: {line}" for line in results["missing"])])


def main(models: list[str] | None, rounds: int, minutes: float, path: Path | None) -> int:
    device.check_device()

    def save(results: dict[str, Any]) -> None:
        if path is not None:
            command.write_json(path, results)

    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
    results = measure(list(MODELS) if models is None else models, rounds, 60 * minutes, save)
    save(results)
    print(table(results))
    return 0
