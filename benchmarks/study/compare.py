"""Levels of one factor side by side: mean and deviation over seeds, and the difference to one level, seed by seed."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import command
from benchmarks.command import InputError, unknown
from benchmarks.study.analysis import LEVEL, Table, labelled, name
from sam_optim.conditional import holm
from sam_optim.report import write_page
from sam_optim.report.charts import Group, mean_and_std, panels, strip
from sam_optim.report.markup import Markup, tag
from sam_optim.report.page import bullets, code_block, html_page, paragraph, section
from sam_optim.report.tables import html_table, number, signed, spread, text_table

HIGHER = "_accuracy"  # columns of which more is better; of all others less is
NUM_STYLES = 6  # colours and markers that a page tells apart
Row = dict[str, Any]
NOTES = (
    "A dot is a run; the bar is the mean with one standard deviation (n - 1) to both sides. The best mean is set bold.",
    "Differences are paired, run by run with the same seed, with Student's 95 % interval.",
    "p is that of the paired t-test, by Holm's correction for all differences of this page together.",
)


def compare(table: Table, by: str, *, over: str = "seed", baseline: Any = None, level: float = LEVEL) -> list[Row]:
    """For each target and each setting of the other factors, every level of `by` with its runs over `over`.

    Differences are to `baseline` (default: the first level), paired by `over`: their mean, Student's interval, and the
    paired t-test's p-value, also corrected for all differences together (Holm). A run that diverged has no number, and
    its pair is missing: `n` and `num_failed` say so.

    Raises:
        InputError: a factor or level that the table does not have.
    """
    for factor in (by, over):
        if factor not in table.factors:
            raise unknown("factor", factor, table.factors)
    if by == over:
        raise InputError(f"--by and --over are both {by}: the runs of a level must differ in something")
    failed = [row["levels"] for row in table.failed]
    every = [*table.rows, *failed]
    every.sort(key=lambda row: [_place(table, factor, row[factor]) for factor in table.factors])
    levels = list(dict.fromkeys(row[by] for row in every))
    baseline = levels[0] if baseline is None else baseline
    if baseline not in levels:
        raise unknown(f"level of {by}", str(baseline), [str(x) for x in levels])
    others = [f for f in table.factors if f not in (by, over)]
    settings = {tuple(row[f] for f in others): {f: row[f] for f in others} for row in every}
    found = []
    for target in table.targets:
        for fixed in settings.values():
            runs = {
                a: {
                    str(row[over]): float(row[target])
                    for row in _chosen(table.rows, fixed | {by: a})
                    if row.get(target) is not None
                }
                for a in levels
            }
            rows = [
                _row(a, runs[a], None if a == baseline else runs[baseline], level)
                | {"num_failed": len(_chosen(failed, fixed | {by: a}))}
                for a in levels
            ]
            found.append({"target": target, "setting": fixed, "by": by, "rows": rows})
    differences = [row["difference"] for one in found for row in one["rows"] if row["difference"]]
    adjusted = holm([math.nan if d["p"] is None else d["p"] for d in differences])
    for difference, p in zip(differences, adjusted, strict=True):
        difference["p_adjusted"] = p if math.isfinite(p) else None
    return found


def with_accuracies(table: Table) -> list[Row]:
    """The rows, with 100 - error beside each error that is a percentage of examples."""
    errors = [c for c in ("train_error", "validation_error", "test_error", "ood_error") if c in table.rows[0]]
    return [
        {**row} | {c.replace("_error", HIGHER): 100 - row[c] for c in errors if row.get(c) is not None}
        for row in table.rows
    ]


def write(found: Sequence[Mapping[str, Any]], out: Path, table: Table) -> int:
    """compare.html and compare.json; the same tables in the terminal."""
    out.mkdir(parents=True, exist_ok=True)
    command.write_json(out / "compare.json", {"comparisons": list(found), "about": table.about})
    for one in found:
        print(f"\n{_title(one)}")
        print(text_table(_head(one), _cells(one)))
    if not table.about.get("complete", True):
        print(f"\nThe study is not complete: {table.about['tally']}.")
    path = write_page(out / "compare.html", page(found, table))
    print(f"\nOpen {path.resolve().as_uri()}")
    return 0


def page(found: Sequence[Mapping[str, Any]], table: Table) -> Markup:
    by, size = found[0]["by"], len(table.rows)
    parts = [
        tag(
            "header",
            paragraph(f"Study {table.title}", class_="overline"),
            tag("h1", f"{size} models by {name(by)}"),
            None if table.about.get("complete", True) else paragraph(f"Not complete: {table.about['tally']}."),
        )
    ]
    for target in dict.fromkeys(one["target"] for one in found):
        ones = [one for one in found if one["target"] == target]
        strips = [strip(_setting(one) or "all", _groups(one), x_label=labelled(target)) for one in ones]
        tables = [html_table(_head(one), _cells(one), _setting(one) or "all", best=[_best(one)]) for one in ones]
        parts.append(section(_cap(name(target)), panels(*strips), *tables))
    config = json.dumps(table.about.get("config"), indent=1)
    parts.append(section("How to read this", bullets(NOTES), tag("h3", "Settings"), code_block(config)))
    return html_page(f"{table.title}: {name(by)}", *parts, data={"comparisons": list(found)})


def _place(table: Table, factor: str, level: Any) -> int:
    """Of a level in the order of the settings file."""
    given = list(table.about.get("config", {}).get("grid", {}).get(factor, ()))
    return given.index(level) if level in given else len(given)


def _chosen(rows: Sequence[Mapping[str, Any]], levels: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    return [row for row in rows if all(row[factor] == value for factor, value in levels.items())]


def _row(level: Any, values: Mapping[str, float], baseline: Mapping[str, float] | None, confidence: float) -> Row:
    mean, std = mean_and_std(list(values.values()))
    found = {"level": level, "n": len(values), "values": dict(values)}
    found |= {"mean": mean if values else None, "std": std if len(values) > 1 else None}
    return found | {"difference": None if baseline is None else difference(values, baseline, confidence)}


def difference(a: Mapping[str, float], b: Mapping[str, float], level: float = LEVEL) -> dict[str, Any]:
    """a - b over their common keys: mean, interval and p of Student's paired t; None where there are too few."""
    from scipy import stats

    pairs = [a[key] - b[key] for key in a if key in b]
    mean, std = mean_and_std(pairs)
    found = {"mean": mean if pairs else None, "low": None, "high": None, "p": None, "n": len(pairs)}
    if len(pairs) < 2 or std == 0:
        return found
    error = std / math.sqrt(len(pairs))
    half = float(stats.t.ppf((1 + level) / 2, len(pairs) - 1)) * error
    return found | {
        "low": mean - half,
        "high": mean + half,
        "p": float(2 * stats.t.sf(abs(mean) / error, len(pairs) - 1)),
    }


def _best(one: Mapping[str, Any]) -> int:
    sign = -1 if one["target"].endswith(HIGHER) else 1
    return min(range(len(one["rows"])), key=lambda i: _key(one["rows"][i]["mean"], sign))


def _key(mean: float | None, sign: int) -> float:
    return math.inf if mean is None else sign * mean


def _head(one: Mapping[str, Any]) -> list[str]:
    baseline = next(row["level"] for row in one["rows"] if row["difference"] is None)
    return [name(one["by"]), "n", labelled(one["target"]), f"minus {baseline} (95 %)", "p, corrected"]


def _cells(one: Mapping[str, Any]) -> list[list[str]]:
    return [
        [
            str(row["level"]),
            f"{row['n']}, {row['num_failed']} diverged" if row["num_failed"] else str(row["n"]),
            spread(list(row["values"].values()), decimals=1 if abs(row["mean"] or 0) >= 10 else None),
            _said(row["difference"]),
            number((row["difference"] or {}).get("p_adjusted"), 2),
        ]
        for row in one["rows"]
    ]


def _groups(one: Mapping[str, Any]) -> list[Group]:
    return [Group(str(row["level"]), list(row["values"].values()), i % NUM_STYLES) for i, row in enumerate(one["rows"])]


def _said(found: Mapping[str, Any] | None) -> str:
    if not found or found["mean"] is None:
        return "–"
    if found["low"] is None:
        return signed(found["mean"])
    return f"{signed(found['mean'])} ({signed(found['low'])} to {signed(found['high'])})"


def _setting(one: Mapping[str, Any]) -> str:
    return ", ".join(f"{name(f)} {v}" for f, v in one["setting"].items())


def _title(one: Mapping[str, Any]) -> str:
    return f"{_cap(name(one['target']))}{', ' if one['setting'] else ''}{_setting(one)}"


def _cap(text: str) -> str:
    return text[:1].upper() + text[1:]
