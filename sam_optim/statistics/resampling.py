"""Intervals and p-values by drawing runs, or whole clusters of runs, again and again."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from sam_optim.core.random import Stream

CHUNK = 1 << 22  # numbers that the permutations of one chunk hold


def signs(values: Tensor) -> Tensor:
    """(..., n) -> (..., n, n): sign(v_i - v_j)."""
    return (values[..., :, None] - values[..., None, :]).sign()


def bootstrap_counts(units: Tensor, strata: Tensor, num_resamples: int, seed: int) -> Tensor:
    """(num_resamples, n): how often each of n runs is drawn, with replacement.

    Args:
        units: (n,), what is drawn: runs of one unit come together.
        strata: (n,), within which units are drawn, each as often as it has units.
    """
    stream, num_units = Stream(seed), int(units.max()) + 1
    stratum = torch.zeros(num_units, dtype=torch.int64).scatter_(0, units, strata)
    picks = []
    for s in stratum.unique():
        members = (stratum == s).nonzero().flatten()
        picks.append(members[stream.integers(len(members), (num_resamples, len(members)))])
    drawn = torch.cat(picks, 1)
    counts = torch.zeros(num_resamples, num_units, dtype=torch.float64)
    return counts.scatter_add_(1, drawn, torch.ones_like(drawn, dtype=torch.float64))[:, units]


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


def cluster_strata(clusters: Tensor, groups: Tensor) -> Tensor:
    """(n,): equal for runs whose clusters cover the same groups, so that the clusters may change places."""
    table = torch.zeros(int(clusters.max()) + 1, int(groups.max()) + 1, dtype=torch.int64)
    table[clusters, groups] = 1
    return table.unique(dim=0, return_inverse=True)[1][clusters]


def permutation_p_value(x: Tensor, y: Tensor, groups: Tensor, clusters: Tensor, num_resamples: int, seed: int) -> float:
    """Two-sided, for independence of x and y within every group: the values of y change places, whole clusters at once.

        S = sum_g sum_{A != B} a^g_AB b^g_AB       a^g_AB: the mean of sign(x_i - x_j), i in A, j in B, both in group g
        p = (1 + #{|S*| >= |S|}) / (1 + num_resamples)     S*: clusters that cover the same groups have changed places

    Pairs of runs within one cluster do not count: they are not independent evidence.
    """
    in_group = groups.unique()[:, None] == groups  # (K, n)
    members = torch.nn.functional.one_hot(clusters).T.double() * in_group[:, None, :]  # (K, G, n)
    members = members / members.sum(-1, keepdim=True).clamp(min=1)
    a, b = (members @ signs(v) @ members.mT for v in (x, y))  # (K, G, G)
    strata = torch.zeros(a.shape[-1], dtype=torch.int64).scatter_(0, clusters, cluster_strata(clusters, groups))
    observed, stream, reached = abs(float((a * b).sum())), Stream(seed), 0
    for chunk in torch.arange(num_resamples).split(max(1, CHUNK // a.numel())):
        order = torch.stack([_permuted(strata, stream) for _ in chunk])
        scores = (a[:, None] * b[:, order[:, :, None], order[:, None, :]]).sum((0, 2, 3))
        reached += int((scores.abs() >= observed * (1 - 1e-12)).sum())
    return (1 + reached) / (1 + num_resamples)


def _permuted(strata: Tensor, stream: Stream) -> Tensor:
    """A permutation of the clusters within their strata."""
    order = torch.arange(len(strata))
    for s in strata.unique():
        at = (strata == s).nonzero().flatten()
        order[at] = at[stream.permutation(len(at))]
    return order
