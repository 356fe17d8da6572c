"""Any results of this package on one page: a table, the landscapes on one colour scale, settings and versions."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from sam_optim.core.results import plain
from sam_optim.report.charts import Curves, Interval, curves, figure, intervals, panels
from sam_optim.report.heatmap import Levels, contour_map
from sam_optim.report.markup import Child, Markup, tag
from sam_optim.report.page import html_page, paragraph, section
from sam_optim.report.tables import html_table, number

Result = Mapping[str, Any]


def results_page(results: Mapping[str, Any], *, title: str = "Sharpness report") -> Markup:
    """A page of named results.

    Args:
        results: name -> what a measure returned, or its `to_dict()` read back from JSON.
        title: the heading.

    Returns:
        HTML for `write_page`; the results travel in it as JSON.

    Raises:
        ValueError: a result without a "type" this page knows.
    """
    found = {name: plain(result) for name, result in results.items()}
    return html_page(title, tag("header", tag("h1", title)), *sections(found), data=found)


def sections(found: Mapping[str, Result]) -> list[Child]:
    """The results by kind, and their settings; `found` as `to_dict()` gives it."""
    for name, result in found.items():
        if not isinstance(result, Mapping) or result.get("type") not in _KNOWN:
            raise ValueError(f"{name!r} is no result of a measure: its type must be one of {', '.join(_KNOWN)}")
    by_type = {kind: {n: r for n, r in found.items() if r["type"] == kind} for kind in _KNOWN}
    parts: list[Child] = [draw(by_type[kind]) for kind, draw in _KNOWN.items() if by_type[kind]]
    return [*parts, _settings(found)]


def _estimates(results: Mapping[str, Result]) -> Markup:
    rows = [
        [name, number(r.get("value"), 4), number(r.get("stderr"), 2), r.get("num_samples"), _state(r)]
        for name, r in results.items()
    ]
    caption = "The standard error is over batches or draws; a dash stands where there is none."
    return section("Measures", html_table(["measure", "value", "standard error", "samples", "state"], rows, caption))


def _spectra(results: Mapping[str, Result]) -> Markup:
    rows = [[name, _eigenvalues(r), _largest(r.get("residuals")), _state(r)] for name, r in results.items()]
    table = html_table(
        ["spectrum", "eigenvalues", "largest residual", "state"], rows, "Eigenvalues in descending order."
    )
    densities = [
        curves(
            name,
            [Curves(name, r["grid"], [_floored(r["density"])], 3)],
            x_label="eigenvalue",
            y_label="density",
            log=True,
        )
        for name, r in results.items()
        if r.get("density")
    ]
    drawn = figure(panels(*densities), "Spectral density, logarithmic.") if densities else None
    return section("Curvature", table, drawn)


def _landscapes(results: Mapping[str, Result]) -> Markup:
    lines = {n: r for n, r in results.items() if len(r["coordinates"]) == 1}
    planes = {n: r for n, r in results.items() if len(r["coordinates"]) == 2}
    drawn = [
        curves(
            n,
            [Curves(n, r["coordinates"][0], [_known(r["losses"])], 3)],
            x_label="step along the direction",
            y_label="loss",
        )
        for n, r in lines.items()
    ]
    heights = [v for r in planes.values() for row in r["losses"] for v in row if v is not None]
    if heights:
        levels = Levels.geometric(min(heights), max(heights))
        maps = {n: (r["coordinates"], [_known(row) for row in r["losses"]]) for n, r in planes.items()}
        drawn += [contour_map(n, a, b, losses, levels) for n, ((a, b), losses) in maps.items()]
    caption = "All maps share one colour scale, from dark (low) to light (high)." if planes else "The weights are at 0."
    return section("Loss around the weights", figure(panels(*drawn), caption))


def _correlations(results: Mapping[str, Result]) -> Markup:
    rows = [
        Interval(n, _float(r.get("tau")), _float(r.get("low")), _float(r.get("high")), 3) for n, r in results.items()
    ]
    drawn = intervals("Kendall's tau", rows, x_label="tau, with its bootstrap interval", span=(-1.0, 1.0))
    notes = [paragraph(f"{n}: {r['reason']}.") for n, r in results.items() if r.get("reason")]
    return section(
        "Does it go with generalization?",
        figure(panels(drawn), "+1: larger with larger, in every pair of runs."),
        *notes,
    )


def _audits(results: Mapping[str, Result]) -> Markup:
    """One table for each: a row for each measure, a column for each change of the weights."""
    return section("Can a reparametrization fake it?", *(_audit_table(n, r) for n, r in results.items()))


def _audit_table(name: str, result: Result) -> Markup:
    differences: Mapping[str, float] = result["differences"]
    cells = {(row["measure"], row["transform"]): row for row in result["rows"]}
    rows: list[list[Child]] = []
    for measure in dict.fromkeys(row["measure"] for row in result["rows"]):
        found = [cells[measure, change] for change in differences]
        words = {True: ", moved", False: "", None: "not known"}
        ratios = [f"{number(r['ratio'], 4)} times" if r.get("ratio") is not None else "" for r in found]
        rows.append([measure, number(found[0].get("before"), 4)])
        rows[-1] += [ratio + words[r.get("moved")] for ratio, r in zip(ratios, found, strict=True)]
    rows.append(["outputs, largest relative change", "", *(number(d, 2) for d in differences.values())])
    caption = f"{name}: each measure after a change of the weights that leaves the function as it is."
    return html_table(["measure", "value", *differences], rows, caption)


_KNOWN = {
    "Estimate": _estimates,
    "Spectrum": _spectra,
    "Landscape": _landscapes,
    "Audit": _audits,
    "Correlation": _correlations,
}


def _settings(results: Mapping[str, Result]) -> Markup:
    rows = [[name, _words(r.get("settings")), _words(r.get("provenance"))] for name, r in results.items()]
    return section("Settings", html_table(["result", "settings", "made with"], rows, "As the results carry them."))


def _state(result: Result) -> str:
    if reason := result.get("reason"):
        return str(reason)
    return "converged" if result.get("converged", True) else "not converged"


def _eigenvalues(result: Result) -> str:
    values: Sequence[float] = result.get("eigenvalues") or []
    return ", ".join(number(v, 4) for v in values[:5]) + (f" and {len(values) - 5} more" if len(values) > 5 else "")


def _largest(values: Sequence[float] | None) -> str:
    return number(max(values), 2) if values else "–"


def _floored(density: Sequence[float]) -> list[float]:
    floor = max(density) * 1e-8
    return [max(v, floor) for v in density]


def _known(values: Sequence[float | None]) -> list[float]:
    return [_float(v) for v in values]


def _float(value: float | None) -> float:
    return math.nan if value is None else value


def _words(settings: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{key}={value}" for key, value in (settings or {}).items())
