"""The host time of a SAM step itself: everything but its two passes and the update of the base.

    python -m benchmarks.speed.host [--tensors 6 62 161] [--rounds 100] [--json FILE]

The tensors have 8 numbers each, so that arithmetic costs nothing: what is left is Python and the calls into torch. The
closure sets gradients that are there already. In one process, on one thread, in a new random order in each round:

    base      two calls of the closure and the update of SGD with momentum, which every other row does, too
    foreach   the shortest program that does the same as SAM: norm, copy, add, copy back, with torch._foreach_*
    davda54   the algorithm of github.com/davda54/sam, written from its description: a norm for each tensor, a clone of
              each, an addition, and `p.data = clone` to go back
    SAM, ASAM of this package, with and without `module=`, by `step(closure)` and by `with perturbed()` and `step()`
    plain step  of a schedule whose ascents have not begun, against one call of the closure and the base's update

A row is the thread CPU time of a whole step minus that of the base in the same round. The bar: at most 1.6 times
foreach plus 0.1 ms, and less than davda54; of a plain step 0.1 ms.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import facts, one_thread
from benchmarks.speed import timing
from sam_optim import SAM, late_phase
from sam_optim.core.errors import run
from sam_optim.core.files import reserved

RESULTS = Path(__file__).resolve().parents[1] / "results" / "host_cpu.json"
TENSORS = (6, 62, 161)  # a small network, a ResNet-18, a ResNet-50
ENTRIES = 8
STEPS = 5  # timed together, after one that is not, so that a row does not depend on what ran before it
FACTOR, EXTRA_MS = 1.6, 0.1  # of the bar
PLAIN = {"plain step": False, "plain step, module": True}
RHO, ETA = 0.05, 0.01
BASE = {"lr": 1e-9, "momentum": 0.9}

Step = Callable[[], Any]


class Problem:
    """`num_tensors` parameters, a base optimizer for them, and a closure that sets the same gradients at every call."""

    def __init__(self, num_tensors: int):
        generator = torch.Generator().manual_seed(0)
        weights, self.grads = (
            [torch.randn(ENTRIES, generator=generator) for _ in range(num_tensors)] for _ in range(2)
        )
        self.module = nn.ParameterList(nn.Parameter(w) for w in weights)
        self.params = list(self.module)
        self.loss = torch.zeros(())

    def backward(self) -> None:
        for p, g in zip(self.params, self.grads, strict=True):
            p.grad = g

    def closure(self) -> Tensor:
        for p in self.params:
            p.grad = None
        self.backward()
        return self.loss

    def base(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.params, **BASE)


def base_step(problem: Problem, *, passes: int = 2) -> Step:
    base = problem.base()

    def step() -> None:
        for _ in range(passes):
            problem.closure()
        base.step()

    return step


def plain_step(problem: Problem, *, module: bool) -> Step:
    """A step of a schedule before its ascents begin: one pass."""
    sam = SAM.wrap(problem.base(), rho=RHO, schedule=late_phase(2**40), module=problem.module if module else None)
    return lambda: sam.step(problem.closure)


def sam_step(problem: Problem, *, adaptive: bool, module: bool, two_phases: bool) -> Step:
    sam = SAM.wrap(problem.base(), rho=RHO, adaptive=adaptive, eta=ETA, module=problem.module if module else None)
    if not two_phases:
        return lambda: sam.step(problem.closure)

    def step() -> None:
        problem.closure()
        with sam.perturbed():
            problem.backward()
        sam.step()

    return step


@torch.no_grad()
def foreach_ascend_(weights: list[Tensor], saved: list[Tensor], grads: list[Tensor], *, adaptive: bool) -> None:
    """saved <- w;  w <- w + rho T^2 g / ||T g||_2, T = 1 or |w| + eta."""
    direction = grads
    if adaptive:
        scale = torch._foreach_abs(weights)
        torch._foreach_add_(scale, ETA)
        scaled = torch._foreach_mul(scale, grads)
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(scaled)))
        torch._foreach_mul_(scaled, scale)
        direction = scaled
    else:
        norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(grads)))
    torch._foreach_copy_(saved, weights)
    torch._foreach_add_(weights, torch._foreach_mul(direction, RHO / (norm + 1e-12)))


def foreach_step(problem: Problem, *, adaptive: bool) -> Step:
    base, weights = problem.base(), [p.data for p in problem.params]
    saved = [torch.empty_like(w) for w in weights]

    def step() -> None:
        problem.closure()
        foreach_ascend_(weights, saved, [p.grad for p in problem.params], adaptive=adaptive)
        problem.closure()
        torch._foreach_copy_(weights, saved)
        base.step()

    return step


class Davda54:
    """w <- w + rho T^2 g / ||T g||_2 and back, tensor by tensor, T = 1 or |w|."""

    def __init__(self, base: torch.optim.Optimizer, adaptive: bool):
        self.base, self.adaptive, self.state = base, adaptive, {p: {} for g in base.param_groups for p in g["params"]}

    @torch.no_grad()
    def first_step(self) -> None:
        norms = [((p.abs() if self.adaptive else 1.0) * p.grad).norm(p=2) for p in self.state if p.grad is not None]
        norm = torch.norm(torch.stack(norms), p=2)
        for group in self.base.param_groups:
            scale = RHO / (norm + 1e-12)
            for p in group["params"]:
                if p.grad is None:
                    continue
                self.state[p]["old_p"] = p.data.clone()
                p.add_((p.square() if self.adaptive else 1.0) * p.grad * scale.to(p))

    @torch.no_grad()
    def second_step(self) -> None:
        for group in self.base.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.data = self.state[p]["old_p"]
        self.base.step()


def davda54_step(problem: Problem, *, adaptive: bool) -> Step:
    optimizer = Davda54(problem.base(), adaptive)

    def step() -> None:
        problem.closure()
        optimizer.first_step()
        problem.closure()
        optimizer.second_step()

    return step


def ways() -> dict[str, tuple[bool, Callable[[Problem], Step]]]:
    """Name of a row -> (whether it is adaptive, what makes its step for a problem)."""
    makers: dict[str, tuple[bool, Callable[[Problem], Step]]] = {}
    for adaptive, name in ((False, "SAM"), (True, "ASAM")):
        makers[f"foreach {name}"] = adaptive, lambda p, a=adaptive: foreach_step(p, adaptive=a)
        makers[f"davda54 {name}"] = adaptive, lambda p, a=adaptive: davda54_step(p, adaptive=a)
        for module in (False, True):
            for two_phases in (False, True):
                row = f"{name}, {'two phases' if two_phases else 'closure'}{', module' if module else ''}"
                options = {"adaptive": adaptive, "module": module, "two_phases": two_phases}
                makers[row] = adaptive, lambda p, o=options: sam_step(p, **o)
    return makers


def measure(num_tensors: int, rounds: int) -> dict[str, Any]:
    """The rows of one number of tensors. Times in milliseconds: median and quartiles over the rounds."""

    def burst(step: Step) -> tuple[Step, Step]:
        return step, lambda: [step() for _ in range(STEPS)]

    kinds = ways()
    runs = {"base": burst(base_step(Problem(num_tensors)))}
    runs |= {name: burst(make(Problem(num_tensors))) for name, (_, make) in kinds.items()}
    runs["base, one pass"] = burst(base_step(Problem(num_tensors), passes=1))
    runs |= {name: burst(plain_step(Problem(num_tensors), module=module)) for name, module in PLAIN.items()}
    times = timing.interleaved(runs, rounds, f"{num_tensors} tensors")
    rows = {name: _spread(times[name], times["base"]) for name in kinds}
    for name, (adaptive, _) in kinds.items():
        if not name.startswith(("foreach", "davda54")):
            peers = (rows[f"{peer} {'ASAM' if adaptive else 'SAM'}"]["median"] for peer in ("foreach", "davda54"))
            rows[name] |= judged(rows[name]["median"], *peers)
    for name in PLAIN:
        rows[name] = _spread(times[name], times["base, one pass"])
        rows[name] |= {"bar": EXTRA_MS, "meets_bar": rows[name]["median"] <= EXTRA_MS}
    base_ms = 1e3 * statistics.median(times["base"]) / STEPS
    return {"tensors": num_tensors, "base_ms": base_ms, "rows": rows}


def _spread(whole: Sequence[float], base: Sequence[float]) -> dict[str, Any]:
    host_ms = [1e3 * (a - b) / STEPS for a, b in zip(whole, base, strict=True)]
    low, mid, high = statistics.quantiles(host_ms, n=4)
    return {"median": mid, "q1": low, "q3": high, "n": len(host_ms)}


def judged(host_ms: float, foreach: float, davda54: float) -> dict[str, Any]:
    """The bar in milliseconds, and whether it is met."""
    bar = FACTOR * foreach + EXTRA_MS
    return {"bar": bar, "meets_bar": host_ms <= bar, "below_davda54": host_ms < davda54}


def table(results: list[dict[str, Any]]) -> str:
    head = f"{'tensors':>7s}  {'':28s}{'own ms':>8s}{'quartiles':>20s}{'bar':>8s}  "
    lines = [head, "-" * (len(head) + 24)]
    for result in results:
        for name, row in result["rows"].items():
            line = f"{result['tensors']:7d}  {name:28s}{row['median']:8.3f}{row['q1']:12.3f} {row['q3']:7.3f}"
            if "bar" in row:
                met = "met" if row["meets_bar"] else "MISSED"
                line += f"{row['bar']:8.3f}  {met}{'' if row.get('below_davda54', True) else ', NOT below davda54'}"
            lines.append(line)
    return "\n".join(lines)


@one_thread()
def main(argv: Sequence[str] | None = None) -> int:
    p = timing.parser("host", __doc__, rounds=100, json=RESULTS)
    p.add_argument(
        "--tensors", type=int, nargs="+", default=list(TENSORS), help="numbers of tensors to try, of 8 entries each"
    )
    args = p.parse_args(argv)
    with reserved(args.json, "--json"):
        results = [measure(n, args.rounds) for n in args.tensors]
        print(table(results))
        print(f"thread CPU time of a step minus that of the base, median [quartiles] of {args.rounds} rounds")
        timing.write(args.json, {"facts": facts() | {"rounds": args.rounds}, "results": results})
    return 0


if __name__ == "__main__":
    sys.exit(run(main))
