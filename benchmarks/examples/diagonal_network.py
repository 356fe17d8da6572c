"""Which sharpness goes with generalization? On a diagonal linear network it depends on the data, and one can see why.

    python -m benchmarks.examples.diagonal_network [--json FILE] [--out picture.png]

    f(x) = <x, b>,  b = u * v,   L = 1/2n sum_i (f(x_i) - y_i)^2,   more features than examples

Gradient flow from u = scale, v = 0 keeps u + v = scale e^s, u - v = scale e^-s with s in the row space of the data, so
its minimum has b = scale^2 sinh(2 s) / 2 and is found by Newton's method instead of training. A small scale leads to
sparse b (least l1 norm), a large one to b of least l2 norm. At these minima of loss 0, with isotropic features,

    tr H             = sum_i u_i^2 + v_i^2  =  sum_i (scale^4 + 4 b_i^2)^1/2      T = 1: small where b is sparse
    tr |w| H |w|     = sum_i 2 b_i^2                                              T = |w|: small where b is short

(times the mean square of each feature). If the true coefficients are sparse, small scales generalize and plain
sharpness tells; if they are dense, large scales do, plain sharpness points the wrong way, and the adaptive one tells.
Both measures are right about the minimum, and neither about generalization without the data. The minima of all scales
are a path with one parameter: whatever moves along it goes with all else that does. So the same is also done from
random weights u_i = scale exp(z_i), z normal, with its own z for each minimum; the formulas hold with a scale for each
weight. That the right sharpness depends on the data, also on a simple model, was observed by Andriushchenko et al.
(2023), arXiv:2302.07011; this experiment is our own.
"""

from __future__ import annotations

import argparse
import itertools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import machine
from sam_optim import Ball, Loss, hessian_eigenvalues, hessian_trace, worst_case_sharpness
from sam_optim.core.errors import run
from sam_optim.core.files import reserved, write_json
from sam_optim.core.random import Stream
from sam_optim.core.text import mean_and_std
from sam_optim.statistics.kendall import kendall_tau

FEATURES, EXAMPLES, NONZERO, PROBES = 40, 20, 3, 300
STARTS = ("equal", "random")  # weights that the flow begins at
SCALES = tuple(0.05 * 2.0**k for k in range(8))  # 0.05 ... 6.4
TARGETS = ("sparse", "dense")
ADAPTIVE = Ball(0.05, adaptive=True, eta=0.0)
SEARCH = {"num_steps": 40, "num_restarts": 2}  # at a minimum the first steps only follow the rounding of the gradient
MEASURES = {
    "trace, T = 1": lambda loss: hessian_trace(loss, num_probes=PROBES).value,
    "lambda_max, T = 1": lambda loss: float(hessian_eigenvalues(loss).eigenvalues[0]),
    "worst case, T = 1": lambda loss: worst_case_sharpness(loss, Ball(0.05), **SEARCH).value,
    "trace, T = |w|": lambda loss: hessian_trace(loss, ball=ADAPTIVE, num_probes=PROBES).value,
    "lambda_max, T = |w|": lambda loss: float(hessian_eigenvalues(loss, ball=ADAPTIVE).eigenvalues[0]),
    "worst case, T = |w|": lambda loss: worst_case_sharpness(loss, ADAPTIVE, **SEARCH).value,
}


class DiagonalNetwork(nn.Module):
    """x -> <x, u * v>, (n, d) -> (n,)."""

    def __init__(self, u: Tensor, v: Tensor):
        super().__init__()
        self.u, self.v = nn.Parameter(u), nn.Parameter(v)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.u * self.v)


def half_squared_error(outputs: Tensor, y: Tensor) -> Tensor:
    return (outputs - y).square().mean() / 2


def data(target: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Isotropic x (EXAMPLES, FEATURES), y without noise, and the true coefficients, of unit length."""
    stream, like = Stream(seed), torch.empty(0, dtype=torch.float64)
    x = stream.normal_like(like.new_empty(EXAMPLES, FEATURES))
    true = stream.normal_like(like.new_empty(FEATURES))
    if target == "sparse":
        true[NONZERO:] = 0
    true = true / torch.linalg.vector_norm(true)
    return x, x @ true, true


def minimum(x: Tensor, y: Tensor, scale: float | Tensor) -> DiagonalNetwork:
    """Where gradient flow from u = scale (one for all, or each weight's), v = 0 ends: s = x^T nu with x b(s) = y, by a
    damped Newton's method."""
    nu = torch.zeros(len(x), dtype=x.dtype)

    def residual(nu: Tensor) -> Tensor:
        return x @ (scale**2 / 2 * torch.sinh(2 * (x.T @ nu))) - y

    for _ in range(500):
        r = residual(nu)
        if float(r.norm()) <= 1e-12 * float(y.norm()):
            break
        jacobian = (x * (scale**2 * torch.cosh(2 * (x.T @ nu)))) @ x.T
        step = torch.linalg.solve(jacobian, r)
        size = min(1.0, 1.0 / float((x.T @ step).abs().max()))  # beyond, sinh is another function
        while float(residual(nu - size * step).norm()) > float(r.norm()) and size > 1e-9:
            size /= 2
        nu = nu - size * step
    s = x.T @ nu
    return DiagonalNetwork(scale * torch.cosh(s), scale * torch.sinh(s))


def runs(num_sets: int = 40, scales: Sequence[float] = SCALES) -> list[dict[str, Any]]:
    """One row for each start, target, data set and scale: the error on new data, and what the measures say."""
    rows = []
    for start, target, seed in itertools.product(STARTS, TARGETS, range(num_sets)):
        x, y, true = data(target, seed)
        stream = Stream(1000 + seed)
        for scale in scales:
            factors = stream.normal_like(x[0]).exp() if start == "random" else torch.ones_like(x[0])
            model = minimum(x, y, scale * factors)
            b = (model.u * model.v).detach()
            loss = Loss(model, half_squared_error, [(x, y)])
            row = {"start": start, "target": target, "seed": seed, "scale": scale, "loss": float(loss.value())}
            row["test_error"] = float((b - true).square().sum()) / 2  # E (f(x) - y)^2 / 2 for isotropic x
            rows.append(row | {name: measure(loss) for name, measure in MEASURES.items()})
    return rows


def correlations(rows: Sequence[Mapping[str, Any]]) -> dict[str, dict[str, tuple[float, float]]]:
    """measure -> "start, target" -> Kendall's tau with the error among the minima of one data set: its mean over data
    sets, and the standard error of that."""
    means: dict[str, dict[str, tuple[float, float]]] = {}
    for name, start, target in itertools.product(MEASURES, STARTS, TARGETS):
        taus = []
        for seed in sorted({row["seed"] for row in rows}):
            same = [r for r in rows if (r["start"], r["target"], r["seed"]) == (start, target, seed)]
            a, b = (torch.tensor([row[key] for row in same], dtype=torch.float64) for key in (name, "test_error"))
            taus.append(float(kendall_tau(a, b)))
        mean, std = mean_and_std(taus)
        means.setdefault(name, {})[f"{start}, {target}"] = (mean, std / len(taus) ** 0.5)
    return means


def table(correlations: Mapping[str, Mapping[str, tuple[float, float]]], num_sets: int) -> str:
    """The table in Markdown."""
    columns = [f"{start}, {target}" for start, target in itertools.product(STARTS, TARGETS)]
    lines = [
        f"Kendall's tau with the error on new data among {len(SCALES)} minima of one data set, mean over {num_sets}",
        "data sets ± standard error; equal or random weights at the start, sparse or dense target.",
        "",
        f"| measure | {' | '.join(columns)} |",
        "|---" * (len(columns) + 1) + "|",
    ]
    for name in MEASURES:
        taus = correlations[name]
        cells = [f"{taus[c][0]:+.2f} ± {taus[c][1]:.2f}" for c in columns]
        lines.append(f"| {name.replace('|', chr(92) + '|')} | {' | '.join(cells)} |")
    return "\n".join(lines)


def picture(rows: Sequence[Mapping[str, Any]], names: Sequence[str] = ("trace, T = 1", "trace, T = |w|")) -> Any:
    """The test error against two measures, a panel for each target: lines join the minima of one data set, of up to 6,
    from equal weights."""
    from sam_optim.report.canvas import COLOURS, styled

    rows = [row for row in rows if row["start"] == "equal" and row["seed"] < 6]

    with styled((8.0, 6.0)) as figure:
        panels = figure.subplots(len(names), len(TARGETS), squeeze=False)
        for i, name in enumerate(names):
            for j, target in enumerate(TARGETS):
                axes = panels[i][j]
                for seed in sorted({row["seed"] for row in rows}):
                    same = [row for row in rows if (row["target"], row["seed"]) == (target, seed)]
                    errors = [row["test_error"] for row in same]
                    axes.plot([row[name] for row in same], errors, color=COLOURS[5], linewidth=0.8, alpha=0.6)
                    drawn = axes.scatter(
                        [row[name] for row in same],
                        errors,
                        c=[row["scale"] for row in same],
                        norm="log",
                        s=34,
                        zorder=3,
                    )
                values = [row[name] for row in rows if row["target"] == target]
                wide = max(values) > 10 * min(values)
                axes.set_xscale("log" if wide else "linear")
                axes.set(
                    xlabel=name + (" (logarithmic)" if wide else ""),
                    ylabel="error on new data",
                    title=f"{target} target",
                )
        bar = figure.colorbar(drawn, ax=panels, pad=0.02, aspect=36)
        bar.set_label("scale of the initial weights")
        bar.outline.set_visible(False)
    return figure


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="where to write the picture (png, pdf or svg)")
    parser.add_argument("--json", type=Path, help="where to write the taus")
    parser.add_argument("--num-sets", type=int, default=40, help="data sets for each target")
    options = parser.parse_args(argv)
    with reserved(options.json, "--json"), reserved(options.out):
        rows = runs(options.num_sets)
        taus = correlations(rows)
        print(table(taus, options.num_sets))
        if options.json:
            about = {"num_sets": options.num_sets, "scales": SCALES, "num_probes": PROBES, "facts": machine.facts()}
            write_json(options.json, {"taus": taus, "about": about})
        if options.out:
            from sam_optim.report.canvas import save

            save(picture(rows), options.out, dpi=160)
            print(f"\n{options.out} has the errors against both traces")
    return 0


if __name__ == "__main__":
    raise SystemExit(run(main))
