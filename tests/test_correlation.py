"""Kendall's tau-b against scipy and against orders that can be counted by hand."""

import json
import math
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from sam_optim.core.results import Estimate
from sam_optim.statistics.kendall import correlate, kendall_tau


def runs(x, y, **columns):
    result = [{"sharpness": a, "error": b} for a, b in zip(x, y, strict=True)]
    for name, values in columns.items():
        for run, value in zip(result, values, strict=True):
            run[name] = value
    return result


@given(st.lists(st.tuples(st.integers(0, 5), st.integers(0, 5)), min_size=4, max_size=30))
@settings(max_examples=100, deadline=None)
def test_tau_and_p_are_those_of_scipy_with_ties(pairs):
    x, y = zip(*pairs, strict=True)
    result = correlate(runs(x, y), "sharpness", "error", num_resamples=5)
    if len(set(x)) == 1 or len(set(y)) == 1:
        assert math.isnan(result.tau)
        return
    reference = kendalltau(x, y)
    assert result.tau == pytest.approx(reference.statistic, abs=1e-12)
    assert result.p == pytest.approx(reference.pvalue, abs=1e-12)
    assert -1 <= result.low <= result.high <= 1 or math.isnan(result.low)


def test_one_swap_in_five_costs_two_tenths():
    assert correlate(runs([1, 2, 3, 4, 5], [1, 2, 3, 5, 4]), "sharpness", "error").tau == pytest.approx(0.8)


def test_the_interval_covers_the_truth_as_often_as_it_says():
    """tau of a bivariate normal is 2/pi asin(r). 200 samples of 25: 95 % has a standard error of 1.5 %, and the
    percentile bootstrap is known to be a few percent short at this n."""
    generator = torch.Generator().manual_seed(0)
    r, truth, covered = 0.5, 2 / math.pi * math.asin(0.5), 0
    for _ in range(200):
        z = torch.randn(2, 25, generator=generator, dtype=torch.float64)
        x, y = z[0], r * z[0] + math.sqrt(1 - r * r) * z[1]
        result = correlate(runs(x.tolist(), y.tolist()), "sharpness", "error", num_resamples=300)
        covered += result.low <= truth <= result.high
    assert 0.88 <= covered / 200 <= 0.99


def test_the_same_seed_gives_the_same_interval_and_the_level_widens_it():
    table = runs([3, 1, 4, 1.5, 5, 9, 2, 6], [2, 7, 1, 8, 2.8, 1.9, 8.2, 4])
    narrow, again, wide = (correlate(table, "sharpness", "error", level=level) for level in (0.8, 0.8, 0.99))
    assert (narrow.low, narrow.high) == (again.low, again.high)
    assert wide.low <= narrow.low < narrow.high <= wide.high


def test_granulated_tau_sees_through_a_factor_that_moves_both():
    """Between two learning rates both numbers jump; within each, more sharpness comes with less error."""
    table = [
        {"sharpness": 10 * lr - seed, "error": 10 * lr + seed, "lr": lr, "seed": seed}
        for lr in (1, 2)
        for seed in range(4)
    ]
    result = correlate(table, "sharpness", "error", factors=["lr", "seed"])
    assert result.by_factor == {"lr": 1.0, "seed": -1.0}
    assert result.granulated == 0.0
    assert result.tau > 0


def test_groups_without_an_order_do_not_count():
    table = runs([1, 2, 3, 4], [1, 1, 2, 3], method=["a", "b", "a", "b"], seed=[0, 0, 1, 1])
    result = correlate(table, "sharpness", "error", factors=["method", "seed"])
    assert result.by_factor["method"] == 1.0  # seed 0 is a tie of errors: only seed 1 counts
    lonely = correlate(runs([1, 2, 3, 4], [1, 2, 3, 4], seed=[0, 1, 2, 3]), "sharpness", "error", factors=["seed"])
    assert lonely.by_factor["seed"] == 1.0
    alone = correlate(
        runs([1, 2, 3, 4], [1, 2, 3, 4], a=[0, 1, 2, 3], b=[0, 1, 2, 3]), "sharpness", "error", factors=["a", "b"]
    )
    assert math.isnan(alone.granulated)


@pytest.mark.parametrize("bad", [None, math.nan, math.inf, -math.inf, Estimate(math.nan, reason="diverged")])
def test_numbers_that_are_missing_or_not_finite_are_dropped_and_counted(bad):
    table = runs([1, 2, 3, 4, bad, 6], [1, 2, 3, 4, 5, bad])
    result = correlate(table, "sharpness", "error")
    assert (result.tau, result.n, result.num_dropped) == (1.0, 4, 2)


@pytest.mark.parametrize(
    ("x", "y", "reason"),
    [
        ([], [], "0 runs"),
        ([1], [1], "1 runs"),
        ([1, 2], [1, 2], "2 runs"),
        ([1, 2, 3], [1, 2, 3], "needs at least 4"),
        ([2, 2, 2, 2], [1, 2, 3, 4], "sharpness is the same in all 4"),
        ([1, 2, 3, 4], [7, 7, 7, 7], "error is the same in all 4"),
        ([math.nan] * 6, [1, 2, 3, 4, 5, 6], "0 runs"),
    ],
)
def test_what_has_no_tau_is_null_with_a_reason(x, y, reason):
    result = correlate(runs(x, y), "sharpness", "error")
    assert reason in result.reason
    plain = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert plain["tau"] is None
    assert plain["reason"] == result.reason


def test_estimates_count_as_their_values():
    table = [{"sharpness": Estimate(float(i), 0.1), "error": i} for i in range(5)]
    assert correlate(table, "sharpness", "error").tau == 1.0


def test_kendall_tau_over_a_batch_of_samples():
    x = torch.tensor([[1.0, 2, 3], [3, 2, 1]])
    assert kendall_tau(x, torch.tensor([[1.0, 2, 3], [1, 2, 3]])).tolist() == [1.0, -1.0]


def test_errors_name_the_remedy(monkeypatch):
    table = runs([1, 2, 3, 4], [1, 2, 3, 4])
    with pytest.raises(ValueError, match="no run has 'sharp'"):
        correlate(table, "sharp", "error")
    with pytest.raises(ValueError, match="between 0 and 1"):
        correlate(table, "sharpness", "error", level=95)
    with pytest.raises(ValueError, match="num_resamples"):
        correlate(table, "sharpness", "error", num_resamples=0)
    monkeypatch.setitem(sys.modules, "scipy.stats", None)
    with pytest.raises(ImportError, match=r"sam_optim\[bench\]"):
        correlate(table, "sharpness", "error")
