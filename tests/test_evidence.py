"""Measured numbers in tables are those of the committed results. Nothing is measured again: it was one machine."""

import json
import math
import re
from pathlib import Path

import pytest

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
