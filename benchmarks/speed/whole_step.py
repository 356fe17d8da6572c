"""What a whole SAM step costs, forward, backward and update, as a multiple of the base optimizer's own step.

    python -m benchmarks.speed.whole_step [--models resnet18 vit_tiny_patch16_224] [--rounds 21] [--json FILE]

SGD with momentum on random images, on one thread. Every way of stepping has a model of its own with the same weights;
all run in one process, in a new random order in each round, each beside a step of the base. Reported are the ratios of
such pairs in thread CPU time, which hold where other processes share the machine.

    base, again             the base against itself: what the ratios are good for
    SAM                     2 passes: e from the whole batch
    SAM, 50 % / 25 % ascent e from the first half or quarter of the batch; the gradient at w + e is of all of it
    SAM, bf16 ascent        e from a pass under autocast
    SAM-ON                  e of normalization layers alone; both passes compute every gradient
    2 micro-batches         m-sharpness: each half has its own e
    late phase, every 5th   a schedule, in the mean over 10 or 5 steps; LookSAM too
    other names             the variants
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import facts, one_thread
from benchmarks.speed import timing
from benchmarks.speed.timing import Run
from sam_optim import GSAM, MSAM, SAM, FriendlySAM, LookSAM, StaleSAM, VaSSO, norm_only_param_groups, periodic
from sam_optim.core.arguments import number
from sam_optim.core.errors import run, unknown
from sam_optim.core.files import reserved
from sam_optim.vision.models import small_stem_

BATCHES = {"resnet18": 32, "vit_tiny_patch16_224": 24}  # others: 16
TARGETS = {
    "SAM": 2.02,
    "SAM, 25 % ascent": 1.35,
    "MSAM": 1.05,
    "late phase, last 30 %": 1.32,
    "LookSAM, every 5th": 1.25,
}
SETTINGS: dict[str, Any] = {"lr": 0.01, "momentum": 0.9}
RHO = 0.05


@dataclass(frozen=True)
class Setting:
    """What is trained: a timm model on `batch` random images of size x size pixels.

    small_stem: the stem that the field uses on CIFAR, in place of timm's. amp: bf16 autocast.
    """

    model: str
    batch: int
    size: int = 64
    classes: int = 10
    device: str = "cpu"
    channels_last: bool = False
    small_stem: bool = False
    amp: bool = False


def build(name: str, size: int, classes: int) -> nn.Module:
    """A timm model with its own stem, the same weights at every call."""
    import timm

    if not timm.is_model(name):
        raise unknown("model", name, timm.list_models())
    torch.manual_seed(0)
    try:
        model = timm.create_model(name, num_classes=classes, img_size=size)
    except TypeError:  # convolutions take any size, and have no argument for it
        model = timm.create_model(name, num_classes=classes)
    return model.train()


def problem(s: Setting) -> tuple[nn.Module, Tensor, Tensor]:
    """(model, images, labels), the same at every call."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(s.batch, 3, s.size, s.size, generator=generator).to(s.device)
    y = torch.randint(s.classes, (s.batch,), generator=generator).to(s.device)
    model = build(s.model, s.size, s.classes)
    if s.small_stem:
        small_stem_(model)
    model = model.to(s.device)
    if s.channels_last:
        model, x = model.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    return model, x, y


def pass_of(model: nn.Module, x: Tensor, y: Tensor, *, amp: bool = False) -> Callable[[], Tensor]:
    """A closure: clears the gradients, runs forward and backward."""

    def closure() -> Tensor:
        model.zero_grad()
        with torch.autocast(x.device.type, torch.bfloat16) if amp else nullcontext():
            loss = nn.functional.cross_entropy(model(x), y)
        loss.backward()
        return loss.detach()

    return closure


def base_step(s: Setting, **flags: Any) -> Run:
    """flags: of the base optimizer."""
    model, x, y = problem(s)
    optimizer, closure = torch.optim.SGD(model.parameters(), **SETTINGS, **flags), pass_of(model, x, y, amp=s.amp)

    def step() -> None:
        closure()
        optimizer.step()

    return step


def sam_step(
    s: Setting,
    *,
    share: float = 1.0,
    norm_only: bool = False,
    bf16: bool = False,
    parts: int = 1,
    fused: bool | None = None,
    cls: type[SAM] = SAM,
    schedule: Callable[[int], float] | None = None,
    **flags: Any,
) -> Run:
    """One step; `share` of the batch and `bf16` are of the ascent, `fused` is SAM's, flags are of the base."""
    model, x, y = problem(s)
    base = torch.optim.SGD(norm_only_param_groups(model) if norm_only else model.parameters(), **SETTINGS, **flags)
    optimizer = cls.wrap(base, rho=RHO, module=model, fused=fused, schedule=schedule)
    if parts > 1:
        chunks = zip(x.chunk(parts), y.chunk(parts), strict=True)
        closures = [pass_of(model, *chunk, amp=s.amp) for chunk in chunks]
        return lambda: optimizer.step(closures)
    descent = pass_of(model, x, y, amp=s.amp)
    if share == 1 and not bf16:
        return lambda: optimizer.step(descent)
    number = max(1, round(share * s.batch))
    ascent = pass_of(model, x[:number], y[:number], amp=s.amp or bf16)
    return lambda: optimizer.step(descent, ascent_closure=ascent)


def several(s: Setting, *, steps: int = 1, **how: Any) -> Run:
    """As many steps as a schedule needs to come round."""
    step = sam_step(s, **how)

    def run() -> None:
        for _ in range(steps):
            step()

    return run


WAYS: dict[str, dict[str, Any]] = {
    "SAM": {},
    "SAM, 50 % ascent": {"share": 0.5},
    "SAM, 25 % ascent": {"share": 0.25},
    "SAM, bf16 ascent": {"bf16": True},
    "SAM, 25 % bf16 ascent": {"share": 0.25, "bf16": True},
    "SAM-ON": {"norm_only": True},
    "SAM-ON, 25 % ascent": {"norm_only": True, "share": 0.25},
    "SAM, 2 micro-batches": {"parts": 2},
    "late phase, last 30 %": {"schedule": lambda step: float(step % 10 >= 7), "steps": 10},
    "SAM, every 5th": {"schedule": periodic(5), "steps": 5},
    "LookSAM, every 5th": {"cls": LookSAM, "steps": 5},
    "MSAM": {"cls": MSAM},
    "StaleSAM": {"cls": StaleSAM},
    "GSAM": {"cls": GSAM},
    "FriendlySAM": {"cls": FriendlySAM},
    "VaSSO": {"cls": VaSSO},
}


def compare(model: str, rounds: int, *, batch: int | None = None) -> dict[str, Any]:
    s = Setting(model, BATCHES.get(model, 16) if batch is None else batch)
    runs = {"base, again": base_step(s)} | {way: several(s, **how) for way, how in WAYS.items()}
    times = timing.paired(base_step(s), runs, rounds, model)
    for way, how in WAYS.items():
        seconds, base = times[way]
        times[way] = [t / how.get("steps", 1) for t in seconds], base
    return {
        "model": model,
        "batch": s.batch,
        "pixels": s.size,
        "milliseconds": {way: 1e3 * statistics.median(seconds) for way, (seconds, _) in times.items()},
        "step / base step": {way: timing.ratio(seconds, base) for way, (seconds, base) in times.items()},
    }


def table(results: list[dict[str, Any]]) -> str:
    head = f"{'model':24s}{'':24s}{'ms':>8s}{'times the base':>24s}{'target':>10s}"
    lines = [head, "-" * len(head)]
    for r in results:
        name = r["model"]
        for way, x in r["step / base step"].items():
            cell = f"{x['median']:.3f} [{x['q1']:.3f}, {x['q3']:.3f}]"
            target = f"{TARGETS[way]:.2f}" if way in TARGETS else ""
            lines.append(f"{name:24.24s}{way:<24s}{r['milliseconds'][way]:8.1f}{cell:>24s}{target:>10s}")
            name = ""
    return "\n".join(lines)


@one_thread()
def main(argv: list[str] | None = None) -> int:
    p = timing.parser("whole_step", __doc__, rounds=21)
    p.add_argument("--models", nargs="+", default=list(BATCHES), help="timm models")
    p.add_argument(
        "--batch-size", type=number(int, 4), help="other than that of the targets; at least 4, for a quarter"
    )
    args = p.parse_args(argv)
    with reserved(args.json, "--json"):
        results = [compare(model, args.rounds, batch=args.batch_size) for model in args.models]
        print(table(results))
        print("thread CPU time, medians of paired ratios [quartiles]")
        timing.write(args.json, {"facts": facts("timm") | {"rounds": args.rounds}, "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
