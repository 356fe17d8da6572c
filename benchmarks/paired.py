"""Two ways of training on the same seeds: the mean difference, with its interval and how often it is positive."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from sam_optim.core.text import mean_and_std

LEVEL = 0.95
ROUNDING = 1e-9  # relative: differences that are equal up to rounding have no spread


class Difference(NamedTuple):
    """Mean of a - b over n pairs, Student's interval and two-sided p for it, and in how many pairs it is positive.

    nan where there are too few pairs, or no spread.
    """

    mean: float
    low: float
    high: float
    p: float
    wins: int
    n: int


def difference(a: Sequence[float], b: Sequence[float], level: float = LEVEL) -> Difference:
    """The difference over the pairs in which both numbers are finite."""
    pairs = [(x, y) for x, y in zip(a, b, strict=True) if math.isfinite(x) and math.isfinite(y)]
    mean, std = mean_and_std([x - y for x, y in pairs])
    wins, n = sum(x > y for x, y in pairs), len(pairs)
    if n < 2 or std <= ROUNDING * max(abs(x) for pair in pairs for x in pair):
        return Difference(mean, math.nan, math.nan, math.nan, wins, n)
    from scipy.stats import ttest_rel

    test = ttest_rel(*zip(*pairs, strict=True))
    low, high = test.confidence_interval(level)
    return Difference(mean, float(low), float(high), float(test.pvalue), wins, n)
