"""Levels of one factor side by side: mean and deviation over seeds, and the difference to one level, seed by seed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from benchmarks import paired
from benchmarks.paired import LEVEL
from benchmarks.study.analysis import UNITS, capitalized, labelled, name
from benchmarks.study.config import Config, Range
from sam_optim.core.errors import InputError, show, unknown
from sam_optim.core.files import PATIENCE, locked, write_json
from sam_optim.core.text import MISSING, mean_and_std, number, signed, spread, text_table
from sam_optim.report.figures import Group, strip
from sam_optim.report.page import (
    Markup,
    bullets,
    code_block,
    element,
    html_page,
    html_table,
    panels,
    paragraph,
    section,
    write_page,
)
from sam_optim.statistics.partial import holm

HIGHER = "_accuracy"  # columns of which more is better; of all others less is
Row = dict[str, Any]


@dataclass(frozen=True)
class Runs:
    """Runs, one row each: a level of every factor, as text, and numbers; `failed` where training diverged.

    levels: those of each factor, in the order of the settings. about: of the study: settings, how far it is.
    """

    title: str
    rows: Sequence[Row]
    levels: Mapping[str, Sequence[str]]
    about: Mapping[str, Any] = field(default_factory=dict)

    @property
    def numbers(self) -> list[str]:
        """The columns that can be compared."""
        columns = dict.fromkeys(key for row in self.rows for key, value in row.items() if _is_number(value))
        return [key for key in columns if key not in (*self.levels, "failed")]


def runs_of(config: Config, url: str) -> Runs:
    """The runs of a study that ended, and beside each error in percent the accuracy."""
    from benchmarks.study.queue import Queue

    queue = Queue(config, url)
    records = queue.records()
    if not records:
        raise InputError(f"study {config.name!r} has no finished model yet")
    rows = []
    for record in records:
        row: Row = {factor: text(level) for factor, level in record["levels"].items()}
        row |= {"failed": bool(record["failed"])} | record["targets"] | record["measures"]
        errors = [key for key in record["targets"] if key.endswith("_error")]
        rows.append(row | {key.replace("_error", HIGHER): 100 - row[key] for key in errors})
    levels = {
        # those that a sampler drew from a range in the order of their values, others in that of the settings
        factor: sorted({row[factor] for row in rows}, key=float) if isinstance(given, Range) else [*map(text, given)]
        for factor, given in config.factors.items()
    }
    tally = queue.tally()
    about = {"config": config.to_dict(), "tally": str(tally), "complete": tally.left == 0}
    return Runs(config.name, rows, levels, about)


def compare(
    runs: Runs,
    by: str,
    *,
    targets: Sequence[str],
    over: str = "seed",
    baseline: str | None = None,
    level: float = LEVEL,
) -> list[Row]:
    """For each target and each setting of the other factors, every level of `by` with its runs over `over`.

    Differences are to `baseline` (default: the first level), paired by `over`: their mean, Student's interval, and the
    paired t-test's p-value, also corrected for all differences together (Holm). A run that diverged has no number, and
    its pair is missing: `n` and `num_failed` say so.

    Raises:
        InputError: a factor, level or target that the study does not have.
    """
    for factor in (by, over):
        if factor not in runs.levels:
            raise unknown("factor", factor, runs.levels)
    if by == over:
        raise InputError(f"--by and --over are both {by}: the runs of a level must differ in something")
    if not targets:
        raise InputError("--targets names no column")
    for target in targets:
        if target not in runs.numbers:
            raise unknown("target", target, runs.numbers)
    reference = _baseline(runs.levels[by], baseline, by)
    fixed_factors = [f for f in runs.levels if f not in (by, over)]
    ordered = sorted(runs.rows, key=lambda row: [list(levels).index(row[f]) for f, levels in runs.levels.items()])
    settings = {tuple(row[f] for f in fixed_factors): {f: row[f] for f in fixed_factors} for row in ordered}
    comparisons = []
    for target in targets:
        for fixed in settings.values():
            cells = {a: _cell(runs.rows, fixed | {by: a}, over, target) for a in runs.levels[by]}
            for a, cell in cells.items():
                same = a == reference
                cell["difference"] = None if same else difference(cell["values"], cells[reference]["values"], level)
            rows = [{"level": a} | cell for a, cell in cells.items()]
            about = {"target": target, "setting": fixed, "by": by, "over": over, "baseline": reference}
            comparisons.append(about | {"rows": rows})
    differences = [row["difference"] for one in comparisons for row in one["rows"] if row["difference"]]
    adjusted = holm([math.nan if d["p"] is None else d["p"] for d in differences])
    for d, p in zip(differences, adjusted, strict=True):
        d["p_adjusted"] = p if math.isfinite(p) else None
    return comparisons


def difference(a: Mapping[str, float], b: Mapping[str, float], level: float = LEVEL) -> Row:
    """`paired.difference` over their common keys; None where there are too few."""
    keys = [key for key in a if key in b]
    numbers = paired.difference([a[key] for key in keys], [b[key] for key in keys], level)._asdict()
    return {key: None if math.isnan(value) else value for key, value in numbers.items() if key != "wins"}


def write(comparisons: Sequence[Row], out: Path, runs: Runs) -> int:
    """compare.html and compare.json; the same tables in the terminal."""
    content = page(comparisons, runs)
    with locked(out / "compare.json", patience=PATIENCE):  # both are of one call
        write_json(out / "compare.json", {"comparisons": list(comparisons), "about": runs.about})
        path = write_page(out / "compare.html", content)
    for one in comparisons:
        title = ", ".join(filter(None, [capitalized(name(one["target"])), _setting(one)]))
        show(f"\n{title}\n{text_table(_head(one), _body(one))}")
    if not runs.about.get("complete", True):
        print(f"\nThe study is not complete: {runs.about['tally']}.")
    print(f"\nOpen {path.resolve().as_uri()}")
    return 0


def page(comparisons: Sequence[Row], runs: Runs) -> Markup:
    by, over = (comparisons[0][key] for key in ("by", "over"))
    finished = sum(not row["failed"] for row in runs.rows)
    complete = runs.about.get("complete", True)
    parts = [
        element(
            "header",
            paragraph(f"Study {runs.title}", kind="overline"),
            element("h1", f"{finished} models by {name(by)}"),
            None if complete else paragraph(f"Not complete: {runs.about['tally']}."),
        )
    ]
    for target in dict.fromkeys(one["target"] for one in comparisons):
        ones = [one for one in comparisons if one["target"] == target]
        strips = [strip(_setting(one) or "all", _groups(one), x_label=labelled(target)) for one in ones]
        tables = [html_table(_head(one), _body(one), _setting(one) or "all", best=_best(one)) for one in ones]
        parts.append(section(capitalized(name(target)), panels(*strips), *tables))
    notes = (
        "A marker is a run; the bar is the mean with one standard deviation (n - 1) to both sides. "
        "The best mean is set bold.",
        f"Differences are paired by {name(over)}, with Student's 95 % interval.",
        "p is that of the paired t-test, by Holm's correction for all differences of this page together.",
    )
    config = json.dumps(runs.about.get("config"), indent=1)
    parts.append(section("How to read this", bullets(notes), element("h3", "Settings"), code_block(config)))
    return html_page(f"{runs.title}: {name(by)}", *parts, data={"comparisons": list(comparisons)})


def text(level: Any) -> str:
    """The name of a level: itself, or its JSON. So True and 1 differ, and a list can be one."""
    return level if isinstance(level, str) else json.dumps(level)


def _baseline(levels: Sequence[str], given: str | None, by: str) -> str:
    if given is None:
        return levels[0]
    for level in levels:
        if level == given or (_as_number(level) is not None and _as_number(level) == _as_number(given)):
            return level
    raise unknown(f"level of {by}", given, levels)


def _as_number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _cell(rows: Sequence[Row], levels: Mapping[str, str], over: str, target: str) -> Row:
    chosen = [row for row in rows if all(row[factor] == value for factor, value in levels.items())]
    values = {row[over]: float(row[target]) for row in chosen if _is_number(row.get(target))}
    mean, std = mean_and_std(list(values.values()))
    cell: Row = {"n": len(values), "num_failed": sum(row["failed"] for row in chosen), "values": values}
    return cell | {"mean": mean if values else None, "std": std if len(values) > 1 else None}


def _best(one: Row) -> list[int]:
    """The row with the best mean, if any has one."""
    sign = -1 if one["target"].endswith(HIGHER) else 1
    means = [(sign * row["mean"], i) for i, row in enumerate(one["rows"]) if row["mean"] is not None]
    return [min(means)[1]] if means else []


def _head(one: Row) -> list[str]:
    return [name(one["by"]), "n", labelled(one["target"]), f"minus {one['baseline']} (95 %)", "p, corrected"]


def _body(one: Row) -> list[list[str]]:
    percent = UNITS.get(one["target"]) in ("%", "points")
    return [
        [
            row["level"],
            f"{row['n']}, {row['num_failed']} diverged" if row["num_failed"] else str(row["n"]),
            spread(list(row["values"].values()), decimals=2 if percent else None),
            _with_interval(row["difference"], percent),
            number((row["difference"] or {}).get("p_adjusted"), 2),
        ]
        for row in one["rows"]
    ]


def _with_interval(difference: Row | None, percent: bool) -> str:
    if not difference or difference["mean"] is None:
        return MISSING
    mean, low, high = (difference[key] for key in ("mean", "low", "high"))
    size = abs(mean) if low is None else high - low
    decimals = 2 if percent or not size else max(0, 2 - math.floor(math.log10(size)))
    if low is None:
        return signed(mean, decimals)
    return f"{signed(mean, decimals)} ({signed(low, decimals)} to {signed(high, decimals)})"


def _groups(one: Row) -> list[Group]:
    return [Group(row["level"], list(row["values"].values()), i) for i, row in enumerate(one["rows"])]


def _setting(one: Row) -> str:
    return ", ".join(f"{name(f)} {v}" for f, v in one["setting"].items())
