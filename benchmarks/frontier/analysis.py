"""What the runs of a comparison say: means, paired differences with corrected tests, and the advice that follows."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from benchmarks.paired import LEVEL, Difference, difference
from sam_optim.core.text import mean_and_std, signed
from sam_optim.statistics.partial import holm

SAM = "SAM"


@dataclass
class Row:
    """A method on one task. cost: passes over the baseline's. accuracies: seed -> percent, without diverged runs.

    to_control, to_sam: paired differences in points; their p by Holm's correction over all tasks of a report.
    at_end: the tuned value is the first or last of its grid.
    """

    method: str
    cost: float
    accuracies: dict[int, float]
    chosen: Mapping[str, Any]
    at_end: bool
    to_control: Difference | None = None
    to_sam: Difference | None = None
    p_control: float = math.nan
    p_sam: float = math.nan

    @property
    def mean(self) -> float:
        return mean_and_std(list(self.accuracies.values()))[0]

    @property
    def interval(self) -> tuple[float, float]:
        """Student's, of the mean over seeds."""
        values = list(self.accuracies.values())
        d = difference(values, [0.0] * len(values))
        return d.low, d.high


@dataclass
class Task:
    """One condition of one plan; a row for each method all of whose reported runs are there."""

    title: str
    control: str
    baseline: str
    rows: list[Row]

    def row(self, method: str) -> Row | None:
        return next((row for row in self.rows if row.method == method), None)


def tasks(results: Sequence[Mapping[str, Any]]) -> list[Task]:
    """Of what `collect` has written, with both families of tests corrected: to the control, and to SAM for all methods
    that cost less than it."""
    compared = [_task(result, condition) for result in results for condition in result["plan"]["conditions"]]
    for attribute, p in (("to_control", "p_control"), ("to_sam", "p_sam")):
        rows = [row for task in compared for row in task.rows if getattr(row, attribute)]
        adjusted = holm([getattr(row, attribute).p for row in rows])
        for row, value in zip(rows, adjusted, strict=True):
            setattr(row, p, value)
    return [task for task in compared if task.rows]


def _task(result: Mapping[str, Any], condition: str) -> Task:
    plan = result["plan"]
    runs = [r for r in result["runs"] if r["condition"] == condition]
    final = [r for r in runs if not r["tuning"]]
    passes = {m: [r["passes"] for r in final if r["method"] == m] for m in plan["methods"]}
    base = mean_and_std(passes[plan["baseline"]])[0]
    rows = []
    for method in plan["methods"]:
        of_method = [r for r in final if r["method"] == method]
        if len(of_method) < len(plan["seeds"]):
            continue
        accuracies = {r["seed"]: r["test_accuracy"] for r in of_method if r["test_accuracy"] is not None}
        cost = mean_and_std(passes[method])[0] / base
        rows.append(Row(method, cost, accuracies, of_method[0]["candidate"], _at_end(plan, of_method[0])))
    title = plan["task"] + (f", {condition}" if len(plan["conditions"]) > 1 else "")
    task = Task(title, plan["control"], plan["baseline"], rows)
    control, sam = task.row(task.control), task.row(SAM)
    for row in rows:
        if control and row is not control:
            row.to_control = _paired(row, control)
        if sam and row.cost < sam.cost - 0.05:
            row.to_sam = _paired(row, sam)
    return task


def _paired(a: Row, b: Row) -> Difference:
    seeds = sorted(set(a.accuracies) & set(b.accuracies))
    return difference([a.accuracies[s] for s in seeds], [b.accuracies[s] for s in seeds])


def _at_end(plan: Mapping[str, Any], run: Mapping[str, Any]) -> bool:
    """Whether the best value is at an end of the grid; False for grids of several options."""
    values = [list(c.values()) for c in plan["methods"][run["method"]]["candidates"]]
    chosen = list(run["candidate"].values())
    return len(values) > 1 and len(chosen) == 1 and chosen in (min(values), max(values))


def advice(task: Task) -> str:
    """What to use on one task, from the corrected tests alone: what beats the tuned control, and what SAM."""
    better = [row for row in task.rows if _sign(row.to_control, row.p_control) > 0]
    sam, control = task.row(SAM), task.control.replace(", ", " with ")
    if sam is None or sam.to_control is None:
        return f"**{task.title}**: SAM and the tuned control have not both been run."
    text = f"**{task.title}**: SAM minus {control}, in points: {shown(sam.to_control)}, {_p(sam.p_control)}."
    if better:
        cheapest = min(better, key=lambda row: (round(row.cost, 2), -row.mean))
        text += f" The cheapest method that beats {control} is {cheapest.method}, at {cheapest.cost:.2f} times "
        text += f"the passes of {task.baseline}: {shown(cheapest.to_control)}, {_p(cheapest.p_control)}."
    else:
        text += f" No method beats {control} after correction: tune the decay first, it costs nothing. These "
        text += "seeds do not show whether anything improves on it."
    words = {-1: "but worse", 0: "without a significant difference", 1: "and better"}
    compared = [row for row in task.rows if row.to_sam and row.to_sam.n]
    for sign, relation in words.items():
        rows = [row for row in compared if _sign(row.to_sam, row.p_sam) == sign]
        if rows:
            listed = "; ".join(f"{row.method} {shown(row.to_sam)}" for row in rows)
            text += f" Cheaper than SAM {relation}: {listed}."
    return text


def _sign(d: Difference | None, p: float) -> int:
    return 0 if d is None or not p < 1 - LEVEL else 1 if d.mean > 0 else -1


def shown(d: Difference | None) -> str:
    if d is None:
        return ""
    if math.isnan(d.mean):
        return "no pair of runs"
    if math.isnan(d.low):
        return signed(d.mean, 1)
    return f"{signed(d.mean, 1)} ({signed(d.low, 1)} to {signed(d.high, 1)})"


def _p(p: float) -> str:
    return "no test" if math.isnan(p) else "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def table(task: Task) -> str:
    """The table in Markdown, methods ordered by cost."""
    lines = [
        f"| method | passes / base | chosen | accuracy, % | minus {task.control} | p | minus SAM | p |",
        "|---|---:|---|---|---|---|---|---|",
    ]
    for row in sorted(task.rows, key=lambda row: round(row.cost, 2)):
        mean, std = mean_and_std(list(row.accuracies.values()))
        chosen = ", ".join(f"{k.removeprefix('sam_').replace('weight_', '')} {v:g}" for k, v in row.chosen.items())
        accuracy = f"{mean:.1f} ± {std:.1f}" if row.accuracies else "diverged"
        cells = [row.method, f"{row.cost:.2f}", chosen + (" (end)" if row.at_end else ""), accuracy]
        for d, p in ((row.to_control, row.p_control), (row.to_sam, row.p_sam)):
            cells += [shown(d) or "–", "–" if math.isnan(p) else _p(p).removeprefix("p ").removeprefix("= ")]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)
