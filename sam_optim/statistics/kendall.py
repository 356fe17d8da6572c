"""Do these numbers go with generalization? Kendall's tau over many runs, with an interval and by factor."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sam_optim.core.results import plain, provenance
from sam_optim.statistics import resampling, runs
from sam_optim.statistics.resampling import permutation_p_value, signs
from sam_optim.statistics.runs import Keys, Run


@dataclass(frozen=True)
class Correlation:
    """Kendall's tau-b between a measure and a target over n runs.

    tau: in [-1, 1]; +1 where every larger measure comes with a larger target. nan if it could not be computed
        (`reason` says why).
    low, high: the bootstrap interval of tau at `settings["level"]`, over runs, or over clusters of runs.
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
    table: Sequence[Run],
    measure: str,
    target: str,
    *,
    factors: Sequence[str] = (),
    cluster: Keys | None = None,
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Correlation:
    """Kendall's tau-b between two columns of a table of runs.

        tau_b = (C - D) / sqrt((n0 - n1) (n0 - n2))

    with C concordant and D discordant pairs of n0 = n (n - 1) / 2, n1 and n2 pairs tied in one of the columns.

        >>> runs = [{"sharpness": s, "error": e} for s, e in ((1, 0.1), (2, 0.3), (3, 0.2), (4, 0.4))]
        >>> round(correlate(runs, "sharpness", "error").tau, 2)
        0.67

    Args:
        table: one mapping for each run.
        measure, target: its keys for the two numbers, such as a sharpness and the test error; an `Estimate` counts
            as its value. Runs where one is missing, None or not finite are left out and counted.
        factors: keys for what was varied between the runs (learning rate, optimizer, seed). For each, tau is also
            taken among runs that agree in all the others, and averaged over such groups: a correlation over all runs
            may come from one factor that moves both numbers.
        cluster: keys of what runs share that are not independent of each other: seeds of one setting are alike, and
            counting each as a run of its own finds relations where there are none. The bootstrap then draws whole
            clusters, and p is that of a test in which whole clusters change places. None: every run is independent.
        level: of the interval, in (0, 1).
        num_resamples: bootstrap samples of n runs with replacement; the interval is between percentiles of their tau.
        seed: of the resampling.

    Returns:
        `tau` nan and `reason` for fewer than 4 usable runs or clusters, or a column that is constant.

    Raises:
        ValueError: a level outside (0, 1), num_resamples < 1, or a key that no run has.
        ImportError: without scipy (the extra `bench`), which computes p.

    Source: granulated Kendall's coefficient, Jiang et al. (2020), arXiv:1912.02178.
    """
    cluster_keys = runs.keys(cluster)
    runs.check(table, [measure, target, *factors, *cluster_keys], level, num_resamples)
    settings = {"measure": measure, "target": target, "factors": list(factors), "level": level}
    settings |= {"num_resamples": num_resamples, "seed": seed} | ({"cluster": cluster_keys} if cluster_keys else {})
    usable = runs.usable(table, [measure, target], cluster_keys)
    x, y = runs.column(usable, measure), runs.column(usable, target)
    clusters = runs.groups(usable, cluster_keys) if cluster_keys else None
    about: dict[str, Any] = {"n": len(usable), "num_dropped": len(table) - len(usable), "settings": settings}
    if reason := runs.why_no_tau(x, y, measure, target, clusters):
        return Correlation(math.nan, **about, provenance=provenance(), reason=reason)
    everyone = torch.zeros(len(x), dtype=torch.int64)
    units = torch.arange(len(x)) if clusters is None else clusters
    counts = resampling.bootstrap_counts(units, everyone, num_resamples, seed)
    low, high = resampling.percentiles(resampling.weighted_tau(counts, signs(x), signs(y)), level)
    p = _p_value(x, y) if clusters is None else permutation_p_value(x, y, everyone, clusters, num_resamples, seed)
    by_factor = {f: _mean_tau(x, y, runs.groups(usable, [g for g in factors if g != f])) for f in factors}
    taus = [tau for tau in by_factor.values() if math.isfinite(tau)]
    about |= {"by_factor": by_factor, "granulated": sum(taus) / len(taus) if taus else math.nan}
    return Correlation(float(kendall_tau(x, y)), low, high, p, provenance=provenance(), **about)


def kendall_tau(x: Tensor, y: Tensor) -> Tensor:
    """tau-b over the last dimension, (..., n) -> (...); nan where x or y is constant."""
    a, b = signs(x), signs(y)
    return (a * b).sum((-2, -1)) / (a.abs().sum((-2, -1)) * b.abs().sum((-2, -1))).sqrt()


def _mean_tau(x: Tensor, y: Tensor, groups: Tensor) -> float:
    """The mean tau over groups of runs; groups without a tau (one run, all ties) do not count."""
    taus = [float(kendall_tau(x[groups == g], y[groups == g])) for g in groups.unique()]
    taus = [tau for tau in taus if math.isfinite(tau)]
    return sum(taus) / len(taus) if taus else math.nan


def _p_value(x: Tensor, y: Tensor) -> float:
    try:
        from scipy.stats import kendalltau
    except ImportError as error:
        raise ImportError("the p-value of Kendall's tau needs scipy: pip install 'sam_optim[bench]'") from error
    return float(kendalltau(x.numpy(), y.numpy()).pvalue)
