"""Many checkpoints on one page: their measures with error bars, and whether these go with a target."""

from __future__ import annotations

import json
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from sam_optim.report.charts import Group, Interval, figure, intervals, panels, scatter, strip
from sam_optim.report.markup import Child, Markup, tag
from sam_optim.report.overview import sections
from sam_optim.report.page import bullets, html_page, paragraph, section
from sam_optim.report.tables import html_table, number, signed, with_error
from sam_optim.statistics.kendall import Correlation, correlate

Entry = Mapping[str, Any]
Row = Mapping[str, Any]

# what belongs to a checkpoint rather than to the way of measuring it
OF_CHECKPOINT = {"model", "model_kwargs", "num_classes", "small_stem", "ema", "target", "source", "num_parameters"}
FEW = 30  # checkpoints up to which each has a line of its own in a figure


@dataclass(frozen=True)
class Table:
    """rows: names of checkpoints. columns: of measures. cells: (row, column) -> entry. settings: of each column."""

    rows: list[str]
    columns: list[str]
    cells: Mapping[tuple[str, str], Entry]
    settings: Mapping[str, Any]
    failures: Mapping[str, str]

    def numbers(self) -> list[dict[str, Any]]:
        """One mapping for each checkpoint, with its value under the name of each column, as `correlate` takes it."""
        found = []
        for row in self.rows:
            values = {c: headline(self.cells.get((row, c), {}).get("result") or {})[0] for c in self.columns}
            found.append({"checkpoint": row, **values})
        return found


def headline(result: Mapping[str, Any]) -> tuple[float | None, float | None]:
    """The number of a result and its error: a standard error, or the residual of an eigenvalue, or
    the bound of its error that comes with it."""
    if "density" in result:
        return None, None
    if "eigenvalues" in result:
        values = result["eigenvalues"]
        errors = result.get("errors") or result.get("residuals") or [None]
        return (values[0], errors[0]) if values else (None, None)
    return result.get("value"), result.get("stderr")


def cell(result: Mapping[str, Any]) -> str:
    """A result in a few characters."""
    if result.get("density"):
        return f"density at {len(result['density'])} points"
    if not is_finite(result):
        return "no number"
    if len(result.get("eigenvalues") or []) > 1:
        text = ", ".join(number(value, 4) for value in result["eigenvalues"])
    else:
        text = with_error(*headline(result))
    return text if result.get("converged", True) else f"{text} (not converged)"


def is_finite(result: Mapping[str, Any]) -> bool:
    values = result.get("density") or result.get("eigenvalues") or [result.get("value")]
    return all(value is not None and math.isfinite(value) for value in values)


def table(entries: Iterable[Entry]) -> Table:
    """Entries of `sam-optim measure`: what was measured in another way is another column, and a file whose content has
    changed another row; their names say how they differ."""
    found = list(entries)
    done = [e for e in found if e.get("identity")]
    rows = _names([(e["checkpoint"], _of_checkpoint(e)) for e in done])
    columns = _names([(e["column"], _of_column(e)) for e in done])
    cells: dict[tuple[str, str], Entry] = {}
    settings: dict[str, Any] = {}
    for e in done:
        row, column = (rows[e["checkpoint"], _key(_of_checkpoint(e))], columns[e["column"], _key(_of_column(e))])
        cells[row, column] = e
        settings.setdefault(column, _of_column(e))
    failures = {e["checkpoint"]: str(e["error"]) for e in found if not e.get("identity") and e.get("error")}
    return Table(list(dict.fromkeys(rows.values())), list(settings), cells, settings, failures)


def study_page(
    found: Table,
    *,
    targets: Mapping[str, Mapping[str, float]] | None = None,
    factors: Mapping[str, Mapping[str, Any]] | None = None,
    others: Mapping[str, Mapping[str, Any]] | None = None,
    title: str = "Sharpness of checkpoints",
) -> Markup:
    """A page of a table of measures.

    Args:
        found: what `table` made.
        targets: name -> row -> number: what the measures are compared with by `correlate`.
        factors: name -> row -> value: what was varied between the checkpoints.
        others: results of other kinds by name, as their `to_dict()` gives them.

    Returns:
        HTML for `write_page`; entries, targets and correlations travel in it as JSON.
    """
    correlations = _correlations(found, targets or {}, factors or {})
    counted = f"{_many(len(found.rows), 'checkpoint')}, {_many(len(found.columns), 'measure')}."
    parts: list[Child] = [tag("header", tag("h1", title), paragraph(counted, class_="lead"))]
    if found.rows:
        parts += [_values(found), _figures(found)]
    if found.failures:
        rows: list[Child] = [f"{name}: {reason}" for name, reason in found.failures.items()]
        parts.append(section("Checkpoints that failed", bullets(rows)))
    if correlations:
        parts.append(_compared(found, correlations, targets or {}))
    if found.rows:
        parts.append(_settings(found))
    parts += sections(others) if others else []
    data = {"entries": list(found.cells.values()), "correlations": [c.to_dict() for c in correlations.values()]}
    return html_page(title, *parts, data=data | {"targets": targets or {}, "others": others or {}})


def _values(found: Table) -> Markup:
    rows: list[Sequence[Child]] = [
        [row, *(_cell(found.cells.get((row, c))) for c in found.columns)] for row in found.rows
    ]
    caption = "± is the standard error over batches or draws; of an eigenvalue it is a bound of the error."
    reasons: list[Child] = [
        f"{row}, {column}: {reason}"
        for (row, column), e in found.cells.items()
        if (reason := e.get("error") or e["result"].get("reason"))
    ]
    notes = bullets(reasons) if reasons else None
    return section("Measures", html_table(["checkpoint", *found.columns], rows, caption), notes)


def _figures(found: Table) -> Markup:
    drawn = []
    for column in found.columns:
        numbers = [(row, *headline(found.cells.get((row, column), {}).get("result") or {})) for row in found.rows]
        known = [(row, value, error or 0.0) for row, value, error in numbers if value is not None]
        if not known:
            continue
        lowest = min(value - error for _, value, error in known)
        log = lowest > 0 and max(value for _, value, _ in known) > 20 * lowest
        label = "logarithmic" if log else "one mark for each checkpoint"
        if len(known) <= FEW:
            lines = [Interval(_short(row), value, value - error, value + error, 3) for row, value, error in known]
            drawn.append(intervals(column, lines, x_label=label, log=log))
        else:
            drawn.append(strip(column, [Group("all", [v for _, v, _ in known], 3)], x_label=label, log=log))
    caption = "Each mark is one checkpoint, the line one error to both sides."
    return section("The same in pictures", figure(panels(*drawn), caption))


def _correlations(
    found: Table, targets: Mapping[str, Mapping[str, float]], factors: Mapping[str, Mapping[str, Any]]
) -> dict[tuple[str, str], Correlation]:
    rows = [
        run
        | {f"target {name}": values.get(run["checkpoint"]) for name, values in targets.items()}
        | {f"factor {name}": values.get(run["checkpoint"]) for name, values in factors.items()}
        for run in found.numbers()
    ]
    varied = [f"factor {name}" for name in factors]
    return {
        (column, name): correlate(rows, column, f"target {name}", factors=varied)
        for column in found.columns
        for name in targets
    }


def _compared(
    found: Table, correlations: Mapping[tuple[str, str], Correlation], targets: Mapping[str, Mapping[str, float]]
) -> Markup:
    head: list[Child] = ["measure", "with", "tau", "95 % interval", "p", "checkpoints", "one factor at a time"]
    rows: list[Sequence[Child]] = [
        [
            column,
            name,
            signed(c.tau),
            f"{signed(c.low)} to {signed(c.high)}",
            number(c.p, 2),
            c.n,
            signed(c.granulated),
        ]
        for (column, name), c in correlations.items()
    ]
    lines = [Interval(f"{column} / {name}", c.tau, c.low, c.high, 3) for (column, name), c in correlations.items()]
    drawn = [intervals("Kendall's tau", lines, x_label="tau, with its bootstrap interval", span=(-1.0, 1.0))]
    numbers = found.numbers()
    for (column, name), c in correlations.items():
        pairs = [(run[column], targets[name].get(run["checkpoint"])) for run in numbers]
        known = [(x, y) for x, y in pairs if x is not None and y is not None]
        if math.isfinite(c.tau):
            group = Group("all", [x for x, _ in known], 3)
            note = f"tau = {signed(c.tau)}"
            log = min(x for x, _ in known) > 0
            drawn.append(
                scatter(column, [(group, [y for _, y in known])], x_label=column, y_label=name, note=note, log=log)
            )
    reasons: list[Child] = [f"{column} / {name}: {c.reason}" for (column, name), c in correlations.items() if c.reason]
    return section(
        "Does it go with the target?",
        paragraph(
            "Kendall's tau is +1 where every larger measure comes with a larger target, −1 where with a smaller."
        ),
        html_table(head, rows, "The interval resamples checkpoints; p is two-sided, for independence."),
        bullets(reasons) if reasons else None,
        figure(panels(*drawn), "An interval that holds 0 says that the order may be chance."),
    )


def _settings(found: Table) -> Markup:
    rows: list[Sequence[Child]] = [
        [column, _sentence(", ".join(f"{k}={_word(v)}" for k, v in _flat(found.settings[column]).items()))]
        for column in found.columns
    ]
    made = sorted({json.dumps(e["result"].get("provenance", {})) for e in found.cells.values() if "result" in e})
    data = sorted({json.dumps(e.get("data", {})) for e in found.cells.values()})
    checkpoints: list[Sequence[Child]] = []
    seen = {row: e for (row, _), e in found.cells.items()}
    for row in found.rows:
        about = _flat(_of_checkpoint(seen[row]))
        checkpoints.append([row, ", ".join(f"{k}={_word(v)}" for k, v in about.items() if v not in (None, False, {}))])
    return section(
        "Settings",
        html_table(["measure", _sentence("settings")], rows, "All that a number depends on but the checkpoint."),
        html_table(["checkpoint", "SHA-256 of its content, and model"], checkpoints, "The checkpoints."),
        html_table(
            ["", _sentence("data")],
            [[i + 1, _sentence(text)] for i, text in enumerate(data)],
            "Where the data come from.",
        ),
        html_table(["", "made with"], [[i + 1, text] for i, text in enumerate(made)], "Versions."),
    )


def _sentence(text: str) -> Markup:
    """A cell that is read, not compared: it begins at the left and takes as many lines as it needs."""
    return tag("div", text, class_="sentence")


def _cell(entry: Entry | None) -> str:
    if entry is None:
        return "–"
    return cell(entry["result"]) if "result" in entry else "failed"


def _of_checkpoint(entry: Entry) -> dict[str, Any]:
    identity = entry["identity"]
    own = {k: v for k, v in identity.get("loss", {}).items() if k in OF_CHECKPOINT}
    return {"checkpoint": identity.get("checkpoint")} | own


def _of_column(entry: Entry) -> dict[str, Any]:
    identity = entry["identity"]
    shared = {k: v for k, v in identity.get("loss", {}).items() if k not in OF_CHECKPOINT}
    return {k: v for k, v in identity.items() if k not in ("checkpoint", "loss")} | {"loss": shared}


def _names(found: Sequence[tuple[str, dict[str, Any]]]) -> dict[tuple[str, str], str]:
    """(name, key of what it stands for) -> a name of its own, which says what differs where a name stands for two."""
    variants: dict[str, dict[str, dict[str, Any]]] = defaultdict(dict)
    for name, about in found:
        variants[name].setdefault(_key(about), about)
    names = {}
    for name, of_name in variants.items():
        flat = {key: _flat(about) for key, about in of_name.items()}
        keys = {k for about in flat.values() for k in about}
        differs = sorted(k for k in keys if len({_word(about.get(k)) for about in flat.values()}) > 1)
        for key, about in flat.items():
            # a ball's eta is nothing where adaptive=false
            has = [k for k in differs if about.get(k) is not None or not k.startswith("ball.")] or differs
            said = ", ".join(f"{k.removeprefix('ball.')}={_word(about.get(k))}" for k in has)
            names[name, key] = f"{name} [{said}]" if said else name
    return names


def _flat(value: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one, with dots in its keys."""
    if not isinstance(value, Mapping):
        return {prefix: value}
    inner = [
        _flat(v, f"{prefix}.{k}" if prefix and prefix not in ("loss", "options") else str(k)) for k, v in value.items()
    ]
    return {k: v for part in inner for k, v in part.items()}


def _key(about: Mapping[str, Any]) -> str:
    return json.dumps(about, sort_keys=True)


def _word(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _short(name: str, limit: int = 44) -> str:
    """The end of a long path: its beginning is the same in all."""
    return name if len(name) <= limit else "…" + name[1 - limit :]


def _many(count: int, what: str) -> str:
    return f"{count} {what}" + ("" if count == 1 else "s")
