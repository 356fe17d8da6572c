"""The edge of stability: where the largest eigenvalue of the Hessian settles under plain descent, SAM and its variants.

    python -m benchmarks.examples.edge [--steps 6000] [--out picture.png] [--json FILE]

400 digits in every step (full batch), standardized pixels, a 64-40-10 tanh network, mean squared error, lr 1.25, no
momentum. The largest eigenvalue rises in training until steps overshoot along its eigenvector: on a quadratic at

    2 / lr                                                 gradient descent
    ||g|| / (2 rho) (sqrt(1 + 8 rho / (lr ||g||)) - 1)     SAM, g the gradient at w

The second is the root c of lr c (1 + rho c / ||g||) = 2. It is shown beside each variant, though it is derived for SAM.

Source: SAM's edge, Long and Bartlett (2023), arXiv:2309.12488; that of gradient descent, Cohen et al. (2021),
arXiv:2103.00065.
"""

from __future__ import annotations

import argparse
import math
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.machine import facts
from sam_optim import GSAM, MSAM, SAM, FriendlySAM, LookSAM, Loss, StaleSAM, VaSSO, hessian_eigenvalues
from sam_optim.core.arguments import number
from sam_optim.core.errors import run
from sam_optim.core.files import reserved, write_json

LR, EXAMPLES, WIDTH, FIRST = 1.25, 400, 40, 500
RUNS: list[tuple[str, type[SAM], float]] = [
    ("gradient descent", SAM, 0.0),
    ("SAM", SAM, 0.02),
    ("SAM", SAM, 0.1),
    ("GSAM", GSAM, 0.1),
    ("VaSSO", VaSSO, 0.1),
    ("FriendlySAM", FriendlySAM, 0.1),
    ("LookSAM", LookSAM, 0.1),
    ("MSAM", MSAM, 0.1),
    ("StaleSAM", StaleSAM, 0.1),
]


@dataclass(frozen=True)
class Point:
    step: int
    eigenvalue: float
    sam_edge: float  # 2 / lr where rho = 0


def edge_of_sam(grad_norm: float, rho: float, lr: float = LR) -> float:
    return 2 / lr if rho == 0 else grad_norm / (2 * rho) * (math.sqrt(1 + 8 * rho / (lr * grad_norm)) - 1)


def digits() -> tuple[Tensor, Tensor]:
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    x = torch.tensor(images[:EXAMPLES], dtype=torch.float32)
    x = (x - x.mean(dim=0)) / (x.std(dim=0) + 1e-6)
    return x, nn.functional.one_hot(torch.tensor(labels[:EXAMPLES]), 10).float()


def train(cls: type[SAM], rho: float, steps: int, every: int = 101) -> Iterator[Point]:
    x, y = digits()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(64, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 10))
    optimizer = cls(model.parameters(), torch.optim.SGD, rho=rho, lr=LR)
    loss = Loss(model, nn.functional.mse_loss, [(x, y)])

    def closure() -> Tensor:
        optimizer.zero_grad()
        value = nn.functional.mse_loss(model(x), y)
        value.backward()
        return value

    for step in range(steps + 1):
        if step >= FIRST and step % every == 0:  # odd: at the edge every second step is alike
            norm = float(torch.cat([g.flatten() for g in loss.gradient()]).norm())
            top = float(hessian_eigenvalues(loss, tol=1e-3).eigenvalues[0])
            yield Point(step, top, edge_of_sam(norm, rho))
        optimizer.step(closure)


def over_edge(points: Sequence[Point]) -> float:
    """Median of the eigenvalue over its predicted edge, in the second half of the run."""
    return statistics.median(p.eigenvalue / p.sam_edge for p in points[len(points) // 2 :])


def draw(runs: dict[str, list[Point]], path: Path) -> None:
    import matplotlib.pyplot as plt

    from sam_optim.report.canvas import save

    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 4), layout="constrained")
    for i, (name, points) in enumerate(runs.items()):
        steps, style = [p.step for p in points], {"color": f"C{i}", "linewidth": 1.2}
        left.plot(steps, [p.eigenvalue for p in points], label=name, **style)
        right.plot(steps, [p.eigenvalue / p.sam_edge for p in points], **style)
    left.axhline(2 / LR, color="black", linestyle="--", linewidth=0.8, label="2 / lr")
    right.axhline(1, color="black", linestyle="--", linewidth=0.8)
    left.set(
        xlabel="step", ylabel="largest eigenvalue of the Hessian", title=f"{EXAMPLES} digits, full batch, lr {LR:g}"
    )
    right.set(xlabel="step", ylabel="eigenvalue / edge", title="over SAM's edge (rho = 0: 2 / lr)")
    figure.legend(loc="outside right center", frameon=False)
    save(figure, path, dpi=110)
    plt.close(figure)


def main(argv: Sequence[str] | None = None) -> int:
    p = argparse.ArgumentParser(prog="python -m benchmarks.examples.edge", description=__doc__.split("\n")[0])
    p.add_argument("--steps", type=number(int, 2 * FIRST), default=6000, help=f"of each run, at least {2 * FIRST}")
    p.add_argument("--out", type=Path, help="file for the picture (png, pdf or svg)")
    p.add_argument("--json", type=Path, help="file for the points of all curves")
    args = p.parse_args(argv)
    with reserved(args.json, "--json"), reserved(args.out):
        print(f"{'':24s}{'eigenvalue':>12s}{'over 2 / lr':>14s}{'over its edge':>15s}", flush=True)
        runs: dict[str, list[Point]] = {}
        for label, cls, rho in RUNS:
            name = f"{label}, rho {rho:g}" if rho else label
            points = runs[name] = list(train(cls, rho, args.steps))
            late = statistics.median(p.eigenvalue for p in points[len(points) // 2 :])
            print(f"{name:24s}{late:12.2f}{late * LR / 2:14.3f}{over_edge(points):15.3f}", flush=True)
        print("medians of the second half of each run")
        if args.json:
            curves: dict[str, Any] = {name: [asdict(point) for point in points] for name, points in runs.items()}
            write_json(args.json, {"facts": facts() | {"steps": args.steps, "lr": LR}, "runs": curves})
        if args.out:
            draw(runs, args.out)
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
