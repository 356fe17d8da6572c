"""Committed results of comparisons -> the tables, the advice and the picture of docs/which_sam.md."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from benchmarks.frontier import analysis, runs
from benchmarks.frontier.analysis import Row, Task
from benchmarks.frontier.plan import Plan
from sam_optim.core.errors import InputError
from sam_optim.core.files import PATIENCE, intact, locked, read_bytes, read_json, write_atomic, write_json
from sam_optim.core.results import plain
from sam_optim.core.text import printable
from sam_optim.report.canvas import COLOURS, label, save, styled

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results" / "frontier"
BEGIN, END = "<!-- written by python -m benchmarks.frontier report -->", "<!-- end -->"
TWO_PASSES, CHEAPER, CONTROL = 0, 1, 5  # colours


def collect(plan: Plan, out: Path) -> Path:
    """The records of a plan in one file, without those of other settings in the same folder."""
    expected = {run.name for condition in plan.conditions for run in runs.expected(plan, condition, out)}
    records = [runs.read_record(path) for path in sorted((out / "records").glob("*.json")) if path.stem in expected]
    facts: dict[str, list[str]] = {}
    for record in records:
        for key, value in record.pop("provenance").items():
            values = value if isinstance(value, list) else [str(value)]  # a list: of committed runs together
            facts[key] = sorted({*facts.get(key, []), *values})
    write_json(_results(plan), {"plan": asdict(plan), "facts": facts, "num_runs": plan.total, "runs": records})
    return _results(plan)


def restore(plan: Plan, out: Path) -> None:
    """Writes the records of committed runs that `out` does not have.

    Raises:
        InputError: the committed runs are those of another plan. FileNotFoundError: there are none.
    """
    path = _results(plan)
    with intact(path):
        results = read_json(path)
        if results["plan"] != plain(asdict(plan)):
            raise InputError(f"{path} holds runs of another plan than this one: leave --committed out")
        for record in results["runs"]:
            chosen = (record[key] for key in ("method", "condition", "candidate", "seed"))
            target = out / "records" / f"{plan.run(*chosen, tuning=record['tuning']).name}.json"
            if not target.exists():
                write_json(target, record | {"provenance": results["facts"]})


def _results(plan: Plan) -> Path:
    return RESULTS / f"{plan.name.removeprefix('frontier-')}.json"


def committed() -> list[Task]:
    results = []
    for path in sorted(RESULTS.glob("*.json")):
        results.append(read_json(path))
        with intact(path):  # each by itself, so that an error names it
            text(analysis.tasks(results[-1:]))
    return analysis.tasks(results)


def text(tasks: Sequence[Task]) -> str:
    """The generated part of the page."""
    parts = ["## What to use", *(f"- {analysis.advice(task)}" for task in tasks)]
    parts += [line for task in tasks for line in (f"### {task.title}", analysis.table(task))]
    return printable("\n\n".join(parts).replace("\n\n- ", "\n- ").replace("<!--", "&lt;!--"), one_line=False)


def write(page: Path) -> str:
    """The part between the marks of the page, which is returned, and the picture beside it."""
    with locked(page, patience=PATIENCE):
        head, _, rest = read_bytes(page).decode().partition(BEGIN)
        _, end, tail = rest.partition(END)
        if not end:
            raise InputError(f"{page} has not the marks of its tables: {BEGIN} and {END}")
        with intact(RESULTS):
            tasks = committed()
            tables = text(tasks)
            save(picture(tasks), page.with_suffix(".png"), dpi=130)
        write_atomic(page, f"{head}{BEGIN}\n\n{tables}\n\n{END}{tail}".encode())
    return tables


def picture(tasks: Sequence[Task]) -> Figure:
    """Accuracy against cost, a panel for each task whose control has been run: the mean of each method with Student's
    95 % interval over seeds."""
    tasks = [task for task in tasks if task.row(task.control)] or tasks
    with styled((11.0, 4.4 * len(tasks))) as figure:
        for axes, task in zip(figure.subplots(len(tasks), 1, squeeze=False)[:, 0], tasks, strict=True):
            _panel(axes, task)
    return figure


def _panel(axes: Axes, task: Task) -> None:
    """Costs are categories: methods of one cost stand side by side, with their names beside them; those of which all
    runs diverged are left out."""
    drawn = [row for row in task.rows if row.accuracies]
    costs = sorted({round(row.cost, 2) for row in drawn})
    ends = [end for row in drawn for end in (row.mean, *row.interval) if not math.isnan(end)]
    low, high = min(ends, default=0.0), max(ends, default=100.0)
    for i, cost in enumerate(costs):
        rows = sorted((row for row in drawn if round(row.cost, 2) == cost), key=lambda row: row.mean)
        heights = _apart([row.mean for row in rows], 0.055 * (high - low))
        for j, (row, height) in enumerate(zip(rows, heights, strict=True)):
            x, colour = i + 0.045 * j, COLOURS[_colour(task, row)]
            lengths = [[row.mean - row.interval[0]], [row.interval[1] - row.mean]]
            axes.errorbar([x], [row.mean], yerr=lengths, fmt="o", color=colour, capsize=2.5, markersize=5)
            start = i + 0.045 * len(rows) + 0.03
            axes.plot([x, start], [row.mean, height], color=colour, linewidth=0.5, alpha=0.6)
            box = {"facecolor": "white", "edgecolor": "none", "pad": 0.5}  # no line strikes a name through
            axes.text(start + 0.01, height, label(row.method), color=colour, va="center", fontsize=8, bbox=box)
    if (control := task.row(task.control)) and control.accuracies:
        axes.axhline(control.mean, color=COLOURS[CONTROL], linewidth=0.8, linestyle="--")
    if not drawn:
        axes.text(0.5, 0.5, "all runs diverged", ha="center", transform=axes.transAxes)
    axes.set_xticks(range(len(costs)), [f"{cost:g}" for cost in costs])
    axes.set_xlim(-0.15, max(len(costs), 1) - 0.1)
    axes.set(title=label(task.title), ylabel="test accuracy, %", xlabel="forward and backward passes, over the base's")


def _colour(task: Task, row: Row) -> int:
    if row.method.startswith(task.baseline):
        return CONTROL
    return TWO_PASSES if row.cost > 1.9 else CHEAPER


def _apart(values: Sequence[float], gap: float) -> list[float]:
    """Ascending values, moved so that neighbors are `gap` apart at least, around the same mean."""
    moved = list(values)
    for i in range(1, len(moved)):
        moved[i] = max(moved[i], moved[i - 1] + gap)
    shift = (sum(moved) - sum(values)) / max(len(moved), 1)
    return [value - shift for value in moved]
