"""Measured numbers in tables are those of the committed results. Nothing is measured again: it was one machine."""

import json
import math
import re
from pathlib import Path

import pytest

from benchmarks.examples import diagonal_network
from benchmarks.frontier import report

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
INTERVAL = re.compile(r"(-?\d+\.\d+) \[(-?\d+\.\d+), (-?\d+\.\d+)\]")
ENDS = (("q1", "q3"), ("low", "high"))


def summaries(value):
    """(median, lower, upper) of every summary in what a JSON file holds."""
    if isinstance(value, dict):
        for lower, upper in ENDS:
            if {"median", lower, upper} <= value.keys():
                yield value["median"], value[lower], value[upper]
    for part in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        yield from summaries(part)


def is_rounded(shown, number):
    """Either way where it lies in the middle."""
    half = 0.5 * 10.0 ** -len(shown.partition(".")[2])
    return math.isfinite(number) and abs(float(shown) - number) <= half * (1 + 1e-9)


PAGES = [ROOT / "README.md", ROOT / "docs" / "performance.md", RESULTS / "README.md"]


@pytest.mark.parametrize("page", PAGES, ids=lambda p: str(p.relative_to(ROOT)))
def test_every_interval_of_a_table_is_in_a_committed_file(page):
    committed = [s for path in sorted(RESULTS.glob("*.json")) for s in summaries(json.loads(path.read_text()))]
    rows = [line for line in page.read_text().splitlines() if line.startswith("|")]
    shown = [cell for row in rows for cell in INTERVAL.findall(row)]
    assert shown
    absent = [cell for cell in shown if not any(all(map(is_rounded, cell, numbers)) for numbers in committed)]
    assert not absent


def test_the_page_on_which_sam_is_that_of_the_committed_runs():
    page = (ROOT / "docs" / "which_sam.md").read_text()
    between = page[page.index(report.BEGIN) + len(report.BEGIN) : page.index(report.END)]
    assert between.strip() == report.text(report.committed()).strip()
    gains = re.findall(r"(\d+\.\d)(?: points)? \((\d+\.\d) to (\d+\.\d)\)", (ROOT / "README.md").read_text())
    assert len(gains) == 2
    assert all(f"+{mean} (+{low} to +{high})" in between for mean, low, high in gains)


def test_the_table_of_the_diagonal_network_is_that_of_the_committed_taus():
    results = json.loads((RESULTS / "diagonal_network.json").read_text())
    page = (ROOT / "docs" / "measures" / "reparametrization.md").read_text()
    _, _, rows = diagonal_network.table(results["taus"], results["about"]["num_sets"]).partition("\n\n")
    assert rows in page
    assert f"{results['about']['num_sets']} data sets" in page


def test_the_taus_of_the_findings_are_those_of_the_committed_study():
    """Each statement of the page with its numbers, from the comparisons themselves."""
    results = json.loads((RESULTS / "study_cifar10" / "results.json").read_text())
    fitted = json.loads((RESULTS / "study_cifar10" / "results_fitted.json").read_text())
    page = " ".join((ROOT / "docs" / "findings.md").read_text().split())
    by = {(c["measure"], c["target"]): c for c in results["comparisons"]}
    measures = list(dict.fromkeys(m for m, _ in by))
    five = [m for m in measures if not m.startswith("adaptive")]

    def span(values):
        return f"{min(values):+.2f} to {max(values):+.2f}"

    def of(target, key="within", which=measures):
        return [by[m, target]["fixed"][key] if key != "tau" else by[m, target]["tau"] for m in which]

    assert results["num_resamples"] == 10000
    assert set(results["cluster"]) == {"sam_rho", "lr", "augmentation"}
    assert results["given"] == "lr,augmentation"
    assert f"tau {span(of('test_error', 'tau', five))} with the test error" in page
    ends = [by[m, "test_error"][key] for m in five for key in ("low", "high")]
    assert f"from {min(ends):+.2f} to {max(ends):+.2f}" in page
    follows = [row["tau"] for row in results["follows"] if row["measure"] in five]
    assert f"({max(follows):+.2f} to {min(follows):+.2f})" in page
    average, worst = by["adaptive average", "test_error"], by["adaptive worst", "test_error"]
    for row in (average, worst):
        assert f"{row['tau']:+.2f} ({row['low']:+.2f} to {row['high']:+.2f})" in page
    assert f"p {average['p_adjusted']:.3f} after correction" in page
    assert f"(p {worst['p_adjusted']:.2f})" in page
    fixed = of("test_error")
    assert f"tau {max(fixed):+.2f} to {min(fixed):+.2f} with the test error" in page
    adjusted = of("test_error", "within_p_adjusted")
    assert f"(p {min(adjusted):.3f} to {max(adjusted):.3f} after correction)" in page
    assert f"is {max(of('train_loss')):+.2f} to {min(of('train_loss')):+.2f}" in page
    assert f"{span(of('ood_error', 'tau'))} over all models" in page
    assert f"{max(of('ood_error')):+.2f} to {min(of('ood_error')):+.2f} at one learning rate" in page
    assert f"({span(of('gap'))}, all significant)" in page
    assert max(of("gap", "within_p_adjusted")) < 0.05
    at_best = [by[m, "test_error"]["groups"]["taus"]["0.2"]["tau"] for m in measures if m != "gradient_regret"]
    assert f"{span(at_best)}" in page
    three = [by[m, "test_error"]["groups"]["heterogeneity_p"] for m in ("average", "eigenvalue", "trace")]
    assert f"(p {min(three):.2f} to {max(three):.2f}, one at a time" in page
    part = [c for c in fitted["comparisons"] if c["target"] == "test_error"]
    assert fitted["num_models"] == 17
    assert f"positive, {span([c['tau'] for c in part])}" in page
    assert all(c["low"] < 0 < c["high"] for c in part)
