"""Do these numbers go with generalization? Kendall's tau over many runs, with an interval and by factor."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sam_optim.core import random as rng
from sam_optim.core.results import plain, provenance

MIN_RUNS = 4  # with three, even a perfect order has p = 1/3: there is nothing to report


@dataclass(frozen=True)
class Correlation:
    """Kendall's tau-b between a measure and a target over n runs.

    tau: in [-1, 1]; +1 where every larger measure comes with a larger target. nan if it could not be computed
        (`reason` says why).
    low, high: the bootstrap interval of tau at `settings["level"]`, runs resampled independently.
    p: two-sided, for independence. n: runs used. num_dropped: runs left out because a value was missing or not finite.
    by_factor: for each factor, the mean tau among runs that differ in this factor only (nan if there are none).
    granulated: the mean of `by_factor`: how well the measure explains a change of one factor at a time.
    """

    tau: float
    low: float = math.nan
    high: float = math.nan
    p: float = math.nan
    n: int = 0
    num_dropped: int = 0
    by_factor: Mapping[str, float] = field(default_factory=dict)
    granulated: float = math.nan
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None

    def __float__(self) -> float:
        return self.tau

    @property
    def interval(self) -> tuple[float, float]:
        """(low, high)."""
        return self.low, self.high

    def to_dict(self) -> dict[str, Any]:
        """Plain Python for strict JSON; what is not finite is None, and `reason` says why."""
        return {"type": "Correlation"} | {name: plain(value) for name, value in vars(self).items()}


def correlate(
    table: Sequence[Mapping[str, Any]],
    measure: str,
    target: str,
    *,
    factors: Sequence[str] = (),
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Correlation:
    """Kendall's tau-b between two columns of a table of runs.

        tau_b = (C - D) / sqrt((n0 - n1) (n0 - n2))

    with C concordant and D discordant pairs of n0 = n (n - 1) / 2, n1 and n2 pairs tied in one of the columns.

    Args:
        table: one mapping for each run.
        measure, target: its keys for the two numbers, such as a sharpness and the test error; an `Estimate` counts
            as its value. Runs where one is missing, None or not finite are left out and counted.
        factors: keys for what was varied between the runs (learning rate, optimizer, seed). For each, tau is also
            taken among runs that agree in all the others, and averaged over such groups: a correlation over all runs
            may come from one factor that moves both numbers.
        level: of the interval, in (0, 1).
        num_resamples: bootstrap samples of n runs with replacement; the interval is between percentiles of their tau.
        seed: of the resampling.

    Returns:
        `tau` nan and `reason` for fewer than 4 usable runs or a column that is constant.

    Raises:
        ValueError: a level outside (0, 1), num_resamples < 1, or a key that no run has.
        ImportError: without scipy (the extra `bench`), which computes p.

    Source: granulated Kendall's coefficient, Jiang et al. (2020), arXiv:1912.02178.
    """
    _check(table, [measure, target, *factors], level, num_resamples)
    settings = {"measure": measure, "target": target, "factors": list(factors), "level": level}
    settings |= {"num_resamples": num_resamples, "seed": seed}
    usable = [run for run in table if math.isfinite(_number(run, measure)) and math.isfinite(_number(run, target))]
    x, y = (torch.tensor([_number(run, key) for run in usable], dtype=torch.float64) for key in (measure, target))
    about: dict[str, Any] = {"n": len(usable), "num_dropped": len(table) - len(usable), "settings": settings}
    if reason := _reason(x, y, measure, target):
        return Correlation(math.nan, **about, provenance=provenance(), reason=reason)
    by_factor = {f: _within(usable, x, y, [other for other in factors if other != f]) for f in factors}
    known = [tau for tau in by_factor.values() if math.isfinite(tau)]
    low, high = _interval(x, y, level, num_resamples, seed)
    return Correlation(
        tau=float(kendall_tau(x, y)),
        low=low,
        high=high,
        p=_p_value(x, y),
        by_factor=by_factor,
        granulated=sum(known) / len(known) if known else math.nan,
        provenance=provenance(),
        **about,
    )


def kendall_tau(x: Tensor, y: Tensor) -> Tensor:
    """tau-b over the last dimension, (..., n) -> (...); nan where x or y is constant."""
    a, b = ((v[..., :, None] - v[..., None, :]).sign() for v in (x, y))
    agreement = (a * b).sum((-2, -1))
    return agreement / (a.abs().sum((-2, -1)) * b.abs().sum((-2, -1))).sqrt()


def _check(table: Sequence[Mapping[str, Any]], keys: Sequence[str], level: float, num_resamples: int) -> None:
    if not 0 < level < 1:
        raise ValueError(f"level is the coverage of the interval, between 0 and 1, got {level}")
    if num_resamples < 1:
        raise ValueError(f"num_resamples must be >= 1, got {num_resamples}")
    for key in keys:
        if table and not any(key in run for run in table):
            raise ValueError(f"no run has {key!r}; the first has {sorted(map(str, table[0]))}")


def _number(run: Mapping[str, Any], key: str) -> float:
    value = run.get(key)
    return math.nan if value is None else float(value)


def _reason(x: Tensor, y: Tensor, measure: str, target: str) -> str | None:
    if len(x) < MIN_RUNS:
        return f"{len(x)} runs with finite numbers; tau needs at least {MIN_RUNS}"
    for values, name in ((x, measure), (y, target)):
        if bool((values == values[0]).all()):
            return f"{name} is the same in all {len(values)} runs"
    return None


def _interval(x: Tensor, y: Tensor, level: float, num_resamples: int, seed: int) -> tuple[float, float]:
    """Percentiles of tau over resampled runs; a sample in which a column is constant has none."""
    n = len(x)
    counts = times_drawn(rng.Stream(seed).integers(n, (num_resamples, n)), n)
    return percentiles(weighted_tau(counts, signs(x), signs(y)), level)


def signs(values: Tensor) -> Tensor:
    """(n,) -> (n, n): sign(v_i - v_j)."""
    return (values[:, None] - values[None, :]).sign()


def times_drawn(picks: Tensor, n: int) -> Tensor:
    """(m, k) indices below n -> (m, n): how often each of them was drawn in each of m samples."""
    ones = torch.ones(picks.shape, dtype=torch.float64)
    return torch.zeros(len(picks), n, dtype=torch.float64).scatter_add_(1, picks, ones)


def weighted_tau(counts: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """(m,): tau-b of m samples that have run i `counts[:, i]` times, from the signs a and b of all pairs, (n, n).

    sum_ij c_i c_j s_ij is what the sample's own pairs sum to: exactly, as these are whole numbers.
    """
    agreement, in_a, in_b = (((counts @ pairs) * counts).sum(1) for pairs in (a * b, a.abs(), b.abs()))
    return agreement / (in_a * in_b).sqrt()


def percentiles(taus: Tensor, level: float) -> tuple[float, float]:
    """The interval that leaves out (1 - level) / 2 on both sides; samples without a tau do not count."""
    taus = taus[taus.isfinite()]
    if not len(taus):
        return math.nan, math.nan
    tail = (1 - level) / 2
    low, high = torch.quantile(taus, torch.tensor([tail, 1 - tail], dtype=taus.dtype)).tolist()
    return low, high


def _within(runs: Sequence[Mapping[str, Any]], x: Tensor, y: Tensor, fixed: Sequence[str]) -> float:
    """The mean tau over groups of runs that agree in `fixed`; groups without a tau (one run, all ties) do not count."""
    groups: dict[tuple[str, ...], list[int]] = defaultdict(list)
    for i, run in enumerate(runs):
        groups[tuple(repr(run.get(key)) for key in fixed)].append(i)
    taus = [float(kendall_tau(x[i], y[i])) for i in groups.values()]
    taus = [tau for tau in taus if math.isfinite(tau)]
    return sum(taus) / len(taus) if taus else math.nan


def _p_value(x: Tensor, y: Tensor) -> float:
    try:
        from scipy.stats import kendalltau
    except ImportError as error:
        raise ImportError("the p-value of Kendall's tau needs scipy: pip install 'sam_optim[bench]'") from error
    return float(kendalltau(x.numpy(), y.numpy()).pvalue)
