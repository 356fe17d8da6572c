"""Is it the measure, or the learning rate behind it? Kendall's tau given other columns, and many taus at once."""

from __future__ import annotations

import math
from collections import Counter
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
class Conditional:
    """Kendall's tau between a measure and a target given other columns, in two ways.

    within: tau-b over the pairs of runs that agree in `given`: the factors held fixed. nan if there are none or a
        column is constant within every group (`reason` says why). within_low, within_high: its bootstrap interval,
        runs, or clusters of runs, resampled within their groups. within_p: two-sided, for independence in every group.
    partial: Kendall's partial tau, from the pairwise ones; nan where a column of `given` is no number or is perfectly
        ordered by the others. partial_low, partial_high: its bootstrap interval.
    measure_given, target_given: tau-b of the measure and of the target with `given`; nan for several factors.
    n: runs used. num_dropped: left out because a value was missing or not finite. num_groups: values of `given`.
    """

    within: float
    within_low: float = math.nan
    within_high: float = math.nan
    within_p: float = math.nan
    partial: float = math.nan
    partial_low: float = math.nan
    partial_high: float = math.nan
    measure_given: float = math.nan
    target_given: float = math.nan
    n: int = 0
    num_dropped: int = 0
    num_groups: int = 0
    settings: Mapping[str, Any] = field(default_factory=dict)
    provenance: Mapping[str, Any] = field(default_factory=dict)
    reason: str | None = None

    def __float__(self) -> float:
        return self.within

    def to_dict(self) -> dict[str, Any]:
        """Plain Python for strict JSON; what is not finite is None, and `reason` says why."""
        return {"type": "Conditional"} | {name: plain(value) for name, value in vars(self).items()}


def conditional(
    table: Sequence[Run],
    measure: str,
    target: str,
    given: Keys,
    *,
    cluster: Keys | None = None,
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Conditional:
    """Kendall's tau-b between two columns of a table of runs, with others held fixed.

        within  = sum_k S_k / sqrt(sum_k A_k  sum_k B_k)              k: the groups of runs that agree in `given`
        partial = -P_xy / sqrt(P_xx P_yy),   P = T^-1                 T: tau-b between x, y and the columns of `given`
                = (t_xy - t_xz t_yz) / sqrt((1 - t_xz^2) (1 - t_yz^2))              for one column z

    S_k is concordant minus discordant pairs of group k, A_k and B_k its pairs that are not tied in x and in y. The
    p-value of `within` is normal for sum S_k with the variances of the groups, ties counted, added (the seasonal
    Kendall test). The partial tau is a formula on pairwise numbers and need not be 0 where x and y are independent
    given z; `within` is.

    Args:
        table, measure, target, level, num_resamples, seed: as for `correlate`.
        given: key of the factor to hold fixed, e.g. the learning rate, or several keys; runs without them are left out.
        cluster: as for `correlate`. Clusters that cover the same groups are drawn, and change places, among themselves.

    Raises:
        ValueError: a level outside (0, 1), num_resamples < 1, no key to hold fixed, or a key that no run has.

    Sources: Kendall (1942), "Partial rank correlation", Biometrika 32; Hirsch, Slack and Smith (1982), "Techniques of
    trend analysis for monthly water quality data", Water Resources Research 18.
    """
    given_keys, cluster_keys = runs.keys(given), runs.keys(cluster)
    if not given_keys:
        raise ValueError("given names no factor to hold fixed: pass a key of the runs, or use correlate")
    runs.check(table, [measure, target, *given_keys, *cluster_keys], level, num_resamples)
    settings = {"measure": measure, "target": target, "given": given, "level": level}
    settings |= {"num_resamples": num_resamples, "seed": seed} | ({"cluster": cluster_keys} if cluster_keys else {})
    usable = runs.usable(table, [measure, target], [*given_keys, *cluster_keys])
    x, y, groups = runs.column(usable, measure), runs.column(usable, target), runs.groups(usable, given_keys)
    clusters = runs.groups(usable, cluster_keys) if cluster_keys else None
    about: dict[str, Any] = {"n": len(usable), "num_dropped": len(table) - len(usable), "settings": settings}
    about["num_groups"] = len(groups.unique())
    if reason := runs.why_no_tau(x, y, measure, target, clusters):
        return Conditional(math.nan, **about, provenance=provenance(), reason=reason)
    units = torch.arange(len(x)) if clusters is None else clusters
    z = [_numbers([run[key] for run in usable]) for key in given_keys]
    if all(column is not None for column in z):
        counts = resampling.bootstrap_counts(units, torch.zeros_like(units), num_resamples, seed)
        about |= _partials([x, y, *z], counts, level)  # type: ignore[list-item]
    within = float(within_tau(x, y, groups))
    if not math.isfinite(within):
        reason = f"no two runs with the same {' and '.join(given_keys)} differ in both {measure} and {target}"
        return Conditional(within, **about, provenance=provenance(), reason=reason)
    strata = groups if clusters is None else resampling.cluster_strata(clusters, groups)
    counts = resampling.bootstrap_counts(units, strata, num_resamples, seed)
    same = groups[:, None] == groups
    low, high = resampling.percentiles(resampling.weighted_tau(counts, signs(x) * same, signs(y) * same), level)
    if clusters is None:
        p = within_p_value(x, y, groups)
    else:
        p = permutation_p_value(x, y, groups, clusters, num_resamples, seed)
    return Conditional(within, low, high, p, provenance=provenance(), **about)


def within_tau(x: Tensor, y: Tensor, groups: Tensor) -> Tensor:
    """tau-b over pairs of one group; all (..., n) -> (...); nan where no such pair differs in x, or none in y."""
    same = groups[..., :, None] == groups[..., None, :]
    a, b = signs(x) * same, signs(y) * same
    return (a * b).sum((-2, -1)) / (a.abs().sum((-2, -1)) * b.abs().sum((-2, -1))).sqrt()


def partial_tau(taus: Tensor) -> Tensor:
    """Kendall's partial tau of columns 0 and 1 given the others, from tau-b between all columns, (..., k, k) -> (...);
    nan where a column is perfectly ordered by others."""
    defined = taus.isfinite().all(-1).all(-1)
    regular = torch.where(defined[..., None, None], taus, torch.eye(taus.shape[-1], dtype=taus.dtype))
    inverse, info = torch.linalg.inv_ex(regular)
    partial = -inverse[..., 0, 1] / (inverse[..., 0, 0] * inverse[..., 1, 1]).sqrt()
    singular = (info != 0) | ~(inverse.abs().amax((-2, -1)) < 1e10)
    return torch.where(defined & ~singular & partial.isfinite(), partial, math.nan)


def within_p_value(x: Tensor, y: Tensor, groups: Tensor) -> float:
    """Two-sided, for independence of x and y in every group: sum S_k is normal with the sum of the groups' variances;
    nan where no group has a variance."""
    score = float((signs(x) * signs(y) * (groups[:, None] == groups)).sum()) / 2
    variance = math.fsum(_variance(x[groups == g].tolist(), y[groups == g].tolist()) for g in groups.unique())
    return math.erfc(abs(score) / math.sqrt(2 * variance)) if variance > 0 else math.nan


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for making all these comparisons: the chance of even one false finding stays below the level.

        p'_(i) = max_{j <= i} min(1, (m - j + 1) p_(j))          p_(1) <= ... <= p_(m)

    What is nan stays so, and is no comparison. Source: Holm (1979), "A simple sequentially rejective multiple test
    procedure", Scandinavian Journal of Statistics 6.
    """
    order = sorted((i for i, p in enumerate(p_values) if math.isfinite(p)), key=lambda i: p_values[i])
    adjusted, largest = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        adjusted[i] = largest
    return adjusted


def _variance(a: Sequence[float], b: Sequence[float]) -> float:
    """Variance of concordant minus discordant pairs under independence, with ties in both."""
    n = len(a)
    if n < 2:
        return 0.0
    ties = [[count for count in Counter(v).values() if count > 1] for v in (a, b)]
    five = [math.fsum(t * (t - 1) * (2 * t + 5) for t in of_one) for of_one in ties]
    three = [math.fsum(t * (t - 1) * (t - 2) for t in of_one) for of_one in ties]
    two = [math.fsum(t * (t - 1) for t in of_one) for of_one in ties]
    variance = (n * (n - 1) * (2 * n + 5) - five[0] - five[1]) / 18 + two[0] * two[1] / (2 * n * (n - 1))
    return variance + (three[0] * three[1] / (9 * n * (n - 1) * (n - 2)) if n > 2 else 0.0)


def _partials(columns: Sequence[Tensor], counts: Tensor, level: float) -> dict[str, float]:
    def matrix(weights: Tensor) -> Tensor:
        """(m, k, k): tau-b between all columns, in samples that have run i `weights[:, i]` times."""
        pairs = [signs(column) for column in columns]
        rows = [[resampling.weighted_tau(weights, a, b) for b in pairs] for a in pairs]
        return torch.stack([torch.stack(row, -1) for row in rows], -2)

    low, high = resampling.percentiles(partial_tau(matrix(counts)), level)
    taus = matrix(torch.ones(1, len(columns[0]), dtype=torch.float64))[0]
    of_one = {"measure_given": float(taus[0, 2]), "target_given": float(taus[1, 2])} if len(columns) == 3 else {}
    return {"partial": float(partial_tau(taus)), "partial_low": low, "partial_high": high} | of_one


def _numbers(values: Sequence[Any]) -> Tensor | None:
    """As float64; None where one is no finite number (a name has no order), or all are the same."""
    if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values) or len(set(values)) < 2:
        return None
    return torch.tensor([float(v) for v in values], dtype=torch.float64)
