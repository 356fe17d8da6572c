"""Any results of this package on one page: tables, spectra, landscapes on one colour scale, settings and versions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from sam_optim.core.results import Landscape, Spectrum, plain
from sam_optim.core.text import MISSING, number, signed
from sam_optim.report import page
from sam_optim.report.figures import Interval, intervals
from sam_optim.report.page import Child, Markup, html_table, panels, paragraph, section
from sam_optim.report.pictures import contour_picture, slices_picture, spectrum_picture

Result = Mapping[str, Any]
SIZE = (3.9, 3.0)  # inches: a landscape or a spectrum on a page


def results_page(results: Mapping[str, Any], *, title: str = "Sharpness report") -> Markup:
    """A page of named results.

    Args:
        results: name -> what a measure returned, or its `to_dict()` read back from JSON.
        title: the heading.

    Returns:
        HTML for `write_page`; the results travel in it as JSON.

    Raises:
        ValueError: a result whose "type" this page does not draw. ImportError: without matplotlib.
    """
    plain_results = {name: plain(result) for name, result in results.items()}
    return page.html_page(
        title, page.element("header", page.element("h1", title)), *sections(plain_results), data=plain_results
    )


def sections(results: Mapping[str, Result]) -> list[Child]:
    """The results by kind, and their settings; each as `to_dict()` gives it."""
    for name, result in results.items():
        if not isinstance(result, Mapping) or result.get("type") not in _SECTIONS:
            raise ValueError(f"{name!r} is not a result of a measure: its type must be one of {', '.join(_SECTIONS)}")
    by_type = {kind: {n: r for n, r in results.items() if r["type"] == kind} for kind in _SECTIONS}
    parts: list[Child] = [draw(by_type[kind]) for kind, draw in _SECTIONS.items() if by_type[kind]]
    return [*parts, _settings(results)]


def _estimates(results: Mapping[str, Result]) -> Markup:
    rows = [
        [name, number(r.get("value"), 4), number(r.get("stderr"), 2), r.get("num_samples"), _state(r)]
        for name, r in results.items()
    ]
    caption = "The standard error is over batches or draws; a dash means that there is none."
    return section("Measures", html_table(["measure", "value", "standard error", "samples", "state"], rows, caption))


def _spectra(results: Mapping[str, Result]) -> Markup:
    rows = [[name, _eigenvalues(r), _largest(r.get("residuals")), _state(r)] for name, r in results.items()]
    head = ["spectrum", "eigenvalues", "largest residual", "state"]
    table = html_table(head, rows, "Eigenvalues in descending order.")
    densities = [
        spectrum_picture(_spectrum(r), title=name, size=SIZE) for name, r in results.items() if r.get("density")
    ]
    caption = "Density of the eigenvalues, on a logarithmic scale."
    return section("Curvature", table, page.figure(panels(*densities), caption) if densities else None)


def _landscapes(results: Mapping[str, Result]) -> Markup:
    landscapes = {name: _landscape(r) for name, r in results.items()}
    planes = [s.losses[s.losses.isfinite()] for s in landscapes.values() if s.losses.ndim == 2]
    heights = torch.cat(planes) if planes else torch.zeros(0)
    limits = (float(heights.min()), float(heights.max())) if len(heights) else None
    pictures, notes = [], []
    for name, landscape in landscapes.items():
        if not bool(landscape.losses.isfinite().any()):
            notes.append(paragraph(f"{name}: no loss is finite."))
        elif landscape.losses.ndim == 1:
            pictures.append(slices_picture(landscape, title=name, size=SIZE))
        else:
            pictures.append(contour_picture(landscape, title=name, limits=limits, size=SIZE))
    caption = "The weights are at 0 on every axis." + (" All planes share one colour scale." if len(planes) > 1 else "")
    return section("Loss around the weights", page.figure(panels(*pictures), caption) if pictures else None, *notes)


def _correlations(results: Mapping[str, Result]) -> Markup:
    rows: list[list[Child]] = [
        [n, signed(r.get("tau")), _interval(r), number(r.get("p"), 2), r.get("n"), signed(r.get("granulated"))]
        for n, r in results.items()
    ]
    head = ["", "tau", "95 % interval", "p", "runs", "one factor at a time"]
    taus = {n: _tensor([r.get("tau"), r.get("low"), r.get("high")]).tolist() for n, r in results.items()}
    lines = [Interval(n, tau, low, high) for n, (tau, low, high) in taus.items()]
    drawn = intervals("Kendall's tau", lines, x_label="tau, with its bootstrap interval", span=(-1.0, 1.0))
    reasons = [f"{n}: {r['reason']}" for n, r in results.items() if r.get("reason")]
    return section(
        "Does it go with generalization?",
        paragraph(
            "Kendall's tau is +1 if larger comes with larger in every pair of runs, −1 if larger comes with smaller."
        ),
        html_table(
            head, rows, "The interval is from resampled runs; p is two-sided, for the hypothesis of independence."
        ),
        page.bullets(reasons) if reasons else None,
        page.figure(panels(drawn), "An interval that includes 0 is compatible with chance."),
    )


def _audits(results: Mapping[str, Result]) -> Markup:
    """One table for each: a row for each measure, a column for each change of the weights."""
    return section("Can a reparametrization fake it?", *(_audit_table(n, r) for n, r in results.items()))


def _audit_table(name: str, result: Result) -> Markup:
    differences: Mapping[str, float] = result["differences"]
    cells = {(row["measure"], row["transform"]): row for row in result["rows"]}
    words = {True: ", moved", False: "", None: "not known"}
    rows: list[list[Child]] = []
    for measure in dict.fromkeys(row["measure"] for row in result["rows"]):
        changes = [cells[measure, change] for change in differences]
        ratios = [f"{number(c['ratio'], 4)} times" if c.get("ratio") is not None else "" for c in changes]
        moved = [ratio + words[c.get("moved")] for ratio, c in zip(ratios, changes, strict=True)]
        rows.append([measure, number(changes[0].get("before"), 4), *moved])
    rows.append(["outputs, largest relative change", "", *(number(d, 2) for d in differences.values())])
    caption = f"{name}: each measure after a change of the weights that leaves the function as it is."
    return html_table(["measure", "value", *differences], rows, caption)


_SECTIONS = {
    "Estimate": _estimates,
    "Spectrum": _spectra,
    "Landscape": _landscapes,
    "Audit": _audits,
    "Correlation": _correlations,
}


def _settings(results: Mapping[str, Result]) -> Markup:
    rows = [[name, _words(r.get("settings")), _words(r.get("provenance"))] for name, r in results.items()]
    return section("Settings", html_table(["result", "settings", "made with"], rows, "As recorded in the results."))


def _state(result: Result) -> str:
    if reason := result.get("reason"):
        return str(reason)
    return "converged" if result.get("converged", True) else "not converged"


def _eigenvalues(result: Result) -> str:
    values: Sequence[float] = result.get("eigenvalues") or []
    return ", ".join(number(v, 4) for v in values[:5]) + (f" and {len(values) - 5} more" if len(values) > 5 else "")


def _largest(values: Sequence[float | None] | None) -> str:
    return number(float(_tensor(values).max()), 2) if values else MISSING


def _interval(result: Result) -> str:
    return MISSING if result.get("low") is None else f"{signed(result['low'])} to {signed(result['high'])}"


def _words(settings: Mapping[str, Any] | None) -> str:
    return ", ".join(f"{key}={value}" for key, value in (settings or {}).items())


def _spectrum(result: Result) -> Spectrum:
    grid, density, stderr = (_tensor(result[k]) if result.get(k) else None for k in ("grid", "density", "stderr"))
    return Spectrum(_tensor(result.get("eigenvalues") or []), grid=grid, density=density, stderr=stderr)


def _landscape(result: Result) -> Landscape:
    directions = dict(result.get("directions") or {})
    if "losses" in directions:
        directions["losses"] = _tensor(directions["losses"])
    return Landscape(tuple(map(_tensor, result["coordinates"])), _tensor(result["losses"]), directions)


def _tensor(values: Sequence[Any]) -> Tensor:
    """float64; None, which JSON has for values that are not finite, becomes nan."""
    import numpy

    return torch.from_numpy(numpy.array(values, dtype=numpy.float64))
