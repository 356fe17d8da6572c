"""Is it the measure, or the learning rate behind it? Kendall's tau given another column, and many taus at once."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from sam_optim.core import random as rng
from sam_optim.core.results import plain, provenance
from sam_optim.statistics.kendall import (
    _check,
    _number,
    _reason,
    kendall_tau,
    percentiles,
    signs,
    times_drawn,
    weighted_tau,
)


@dataclass(frozen=True)
class Conditional:
    """Kendall's tau between a measure and a target given a third column, in two ways.

    within: tau-b over the pairs of runs that agree in `given`: the factor held fixed. nan if there are none or a
        column is constant within every group (`reason` says why). within_low, within_high: its bootstrap interval,
        runs resampled within their groups. within_p: two-sided, for independence in every group.
    partial: Kendall's partial tau, from the three pairwise ones; nan where `given` is no number or is perfectly
        ordered with a column. partial_low, partial_high: its bootstrap interval.
    measure_given, target_given: tau-b of the measure and of the target with `given`.
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
    table: Sequence[Mapping[str, Any]],
    measure: str,
    target: str,
    given: str,
    *,
    level: float = 0.95,
    num_resamples: int = 2000,
    seed: int = 0,
) -> Conditional:
    """Kendall's tau-b between two columns of a table of runs, with a third one held fixed.

        within  = sum_k S_k / sqrt(sum_k A_k  sum_k B_k)                       k: the groups with one value of `given`
        partial = (t_xy - t_xz t_yz) / sqrt((1 - t_xz^2) (1 - t_yz^2))         z = `given`, t: tau-b

    S_k is concordant minus discordant pairs of group k, A_k and B_k its pairs that are not tied in x and in y. The
    p-value of `within` is normal for sum S_k with the variances of the groups, ties counted, added (the seasonal
    Kendall test). The partial tau is a formula on three numbers and need not be 0 where x and y are independent given
    z; `within` is.

    Args:
        table, measure, target, level, num_resamples, seed: as for `correlate`.
        given: key of the factor to hold fixed, e.g. the learning rate; runs without it are left out.

    Raises:
        ValueError: a level outside (0, 1), num_resamples < 1, or a key that no run has.

    Sources: Kendall (1942), "Partial rank correlation", Biometrika 32; Hirsch, Slack and Smith (1982), "Techniques of
    trend analysis for monthly water quality data", Water Resources Research 18.
    """
    _check(table, [measure, target, given], level, num_resamples)
    settings = {"measure": measure, "target": target, "given": given, "level": level}
    settings |= {"num_resamples": num_resamples, "seed": seed}
    usable = [run for run in table if run.get(given) is not None and _finite(run, measure) and _finite(run, target)]
    x, y = (torch.tensor([_number(run, key) for run in usable], dtype=torch.float64) for key in (measure, target))
    names = [repr(run[given]) for run in usable]
    groups = torch.tensor([sorted(set(names)).index(name) for name in names], dtype=torch.int64)
    about: dict[str, Any] = {"n": len(usable), "num_dropped": len(table) - len(usable), "settings": settings}
    about["num_groups"] = len(set(names))
    if reason := _reason(x, y, measure, target):
        return Conditional(math.nan, **about, provenance=provenance(), reason=reason)
    z = _numbers([run[given] for run in usable])
    found = about | _partials(x, y, z, level, num_resamples, seed)
    within = float(within_tau(x, y, groups))
    if not math.isfinite(within):
        reason = f"no two runs with the same {given} differ in both {measure} and {target}"
        return Conditional(within, **found, provenance=provenance(), reason=reason)
    low, high = percentiles(_resampled(x, y, groups, num_resamples, seed), level)
    return Conditional(
        within,
        within_low=low,
        within_high=high,
        within_p=within_p_value(x, y, groups),
        **found,
        provenance=provenance(),
    )


def within_tau(x: Tensor, y: Tensor, groups: Tensor) -> Tensor:
    """tau-b over pairs of one group; all (..., n) -> (...); nan where no such pair differs in x, or none in y."""
    same = groups[..., :, None] == groups[..., None, :]
    a, b = ((v[..., :, None] - v[..., None, :]).sign() * same for v in (x, y))
    return (a * b).sum((-2, -1)) / (a.abs().sum((-2, -1)) * b.abs().sum((-2, -1))).sqrt()


def partial_tau(xy: Tensor | float, xz: Tensor | float, yz: Tensor | float) -> Tensor:
    """Kendall's partial tau of x and y given z from the three taus; nan where one of the others is +-1."""
    xy, xz, yz = (torch.as_tensor(t, dtype=torch.float64) for t in (xy, xz, yz))
    found = (xy - xz * yz) / ((1 - xz**2) * (1 - yz**2)).sqrt()
    return torch.where(found.isfinite(), found, math.nan)


def within_p_value(x: Tensor, y: Tensor, groups: Tensor) -> float:
    """Two-sided, for independence of x and y in every group: sum S_k is normal with the sum of the groups' variances;
    nan where no group has a variance."""
    score, variance = 0.0, 0.0
    for group in groups.unique():
        a, b = x[groups == group], y[groups == group]
        signs = ((v[:, None] - v[None, :]).sign() for v in (a, b))
        score += float(torch.stack(list(signs)).prod(0).sum()) / 2
        variance += _variance(a.tolist(), b.tolist())
    return math.erfc(abs(score) / math.sqrt(2 * variance)) if variance > 0 else math.nan


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for making all these comparisons: the chance of even one false finding stays below the level.

        p'_(i) = max_{j <= i} min(1, (m - j + 1) p_(j))          p_(1) <= ... <= p_(m)

    What is nan stays so, and is no comparison. Source: Holm (1979), "A simple sequentially rejective multiple test
    procedure", Scandinavian Journal of Statistics 6.
    """
    order = sorted((i for i, p in enumerate(p_values) if math.isfinite(p)), key=lambda i: p_values[i])
    found, largest = [math.nan] * len(p_values), 0.0
    for rank, i in enumerate(order):
        largest = max(largest, min(1.0, (len(order) - rank) * p_values[i]))
        found[i] = largest
    return found


def _variance(a: Sequence[float], b: Sequence[float]) -> float:
    """Of concordant minus discordant pairs under independence, ties in both counted."""
    n = len(a)
    if n < 2:
        return 0.0
    ties = [[count for count in Counter(v).values() if count > 1] for v in (a, b)]
    five = [math.fsum(t * (t - 1) * (2 * t + 5) for t in found) for found in ties]
    three = [math.fsum(t * (t - 1) * (t - 2) for t in found) for found in ties]
    two = [math.fsum(t * (t - 1) for t in found) for found in ties]
    found = (n * (n - 1) * (2 * n + 5) - five[0] - five[1]) / 18 + two[0] * two[1] / (2 * n * (n - 1))
    return found + (three[0] * three[1] / (9 * n * (n - 1) * (n - 2)) if n > 2 else 0.0)


def _partials(x: Tensor, y: Tensor, z: Tensor | None, level: float, num_resamples: int, seed: int) -> dict[str, float]:
    if z is None:
        return {}
    counts = times_drawn(rng.Stream(seed).integers(len(x), (num_resamples, len(x))), len(x))
    a, b, c = signs(x), signs(y), signs(z)
    taus = partial_tau(weighted_tau(counts, a, b), weighted_tau(counts, a, c), weighted_tau(counts, b, c))
    low, high = percentiles(taus, level)
    xz, yz = float(kendall_tau(x, z)), float(kendall_tau(y, z))
    partial = float(partial_tau(kendall_tau(x, y), xz, yz))
    return {"partial": partial, "partial_low": low, "partial_high": high, "measure_given": xz, "target_given": yz}


def _resampled(x: Tensor, y: Tensor, groups: Tensor, num_resamples: int, seed: int) -> Tensor:
    """`within_tau` of resampled runs; each group keeps its size."""
    stream, columns = rng.Stream(seed), []
    for group in groups.unique():
        rows = (groups == group).nonzero().flatten()
        columns.append(rows[stream.integers(len(rows), (num_resamples, len(rows)))])
    counts = times_drawn(torch.cat(columns, 1), len(x))
    same = groups[:, None] == groups[None, :]
    return weighted_tau(counts, signs(x) * same, signs(y) * same)


def _finite(run: Mapping[str, Any], key: str) -> bool:
    return math.isfinite(_number(run, key))


def _numbers(values: Sequence[Any]) -> Tensor | None:
    """As float64; None where one is no finite number (a name has no order), or all are the same."""
    if not all(isinstance(v, (int, float)) and math.isfinite(v) for v in values) or len(set(values)) < 2:
        return None
    return torch.tensor([float(v) for v in values], dtype=torch.float64)
