"""Kendall's tau given another column: against pairs counted one by one, scipy, formulas by hand, and simulation."""

import itertools
import json
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import kendalltau

from sam_optim.statistics.kendall import correlate, kendall_tau
from sam_optim.statistics.partial import conditional, holm, partial_tau, within_p_value, within_tau


def runs(x, y, z):
    return [{"sharpness": a, "error": b, "lr": c} for a, b, c in zip(x, y, z, strict=True)]


def tensors(*columns):
    return [torch.tensor(c, dtype=torch.float64) for c in columns]


TRIPLES = st.lists(st.tuples(st.integers(0, 4), st.integers(0, 4), st.integers(0, 2)), min_size=4, max_size=25)


@given(TRIPLES)
@settings(max_examples=80, deadline=None)
def test_within_counts_the_pairs_of_one_group_only(triples):
    score = a = b = 0
    for (x0, y0, z0), (x1, y1, z1) in itertools.combinations(triples, 2):
        if z0 == z1:
            score += (x0 > x1) * (y0 > y1) + (x0 < x1) * (y0 < y1) - (x0 > x1) * (y0 < y1) - (x0 < x1) * (y0 > y1)
            a, b = a + (x0 != x1), b + (y0 != y1)
    found = float(within_tau(*tensors(*zip(*triples, strict=True))))
    if a * b:
        assert found == pytest.approx(score / math.sqrt(a * b), abs=1e-12)
    else:
        assert math.isnan(found)


@given(TRIPLES)
@settings(max_examples=80, deadline=None)
def test_with_one_group_it_is_scipys_tau_and_p_with_ties(triples):
    x, y, _ = tensors(*zip(*triples, strict=True))
    if len(x.unique()) == 1 or len(y.unique()) == 1:
        return
    reference = kendalltau(x.numpy(), y.numpy(), method="asymptotic")
    same = torch.zeros(len(x))
    assert float(within_tau(x, y, same)) == pytest.approx(reference.statistic, abs=1e-12)
    assert within_p_value(x, y, same) == pytest.approx(reference.pvalue, abs=1e-12)


def test_two_groups_by_hand():
    """Between the groups everything falls, within each it rises: 3 + 3 pairs, one of them discordant."""
    x, y, z = [1, 2, 3, 4, 5, 6], [10, 11, 12, 1, 3, 2], [0.1, 0.1, 0.1, 0.2, 0.2, 0.2]
    found = conditional(runs(x, y, z), "sharpness", "error", "lr", num_resamples=20)
    assert found.within == pytest.approx((3 + 1) / 6)
    assert (found.n, found.num_groups) == (6, 2)
    assert float(kendall_tau(*tensors(x, y))) < 0
    # S = 3 + 1, variance n (n - 1) (2 n + 5) / 18 = 11 / 3 for each group of 3
    assert found.within_p == pytest.approx(math.erfc(4 / math.sqrt(2 * 22 / 3)))


def test_the_partial_tau_is_the_formula():
    assert float(partial_tau(0.5, 0.6, 0.3)) == pytest.approx((0.5 - 0.18) / math.sqrt(0.64 * 0.91))
    assert math.isnan(float(partial_tau(0.5, 1.0, 0.3)))
    x, y, z = [3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8], [1, 1, 2, 2, 3, 3, 4, 4]
    xy, xz, yz = (kendalltau(a, b).statistic for a, b in ((x, y), (x, z), (y, z)))
    found = conditional(runs(x, y, z), "sharpness", "error", "lr", num_resamples=50)
    assert found.partial == pytest.approx((xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2)))
    assert (found.measure_given, found.target_given) == pytest.approx((xz, yz))
    assert found.partial_low <= found.partial <= found.partial_high


def bivariate(generator, n, r):
    z = torch.randn(2, n, generator=generator, dtype=torch.float64)
    return z[0], r * z[0] + math.sqrt(1 - r * r) * z[1]


@pytest.mark.parametrize("r", [0.0, 0.5])
def test_the_intervals_cover_the_truth_as_often_as_they_say(r):
    """tau of a bivariate normal is 2/pi asin(r), and it stays so in every group when the groups are shifted apart.
    300 samples: 95 % has a standard error of 1.3 %."""
    generator, truth, covered, over_all = torch.Generator().manual_seed(1), 2 / math.pi * math.asin(r), 0, 0
    for k in range(300):
        x, y = bivariate(generator, 48, r)
        z = torch.arange(48) % 3
        table = runs((x + 3 * z).tolist(), (y - 2 * z).tolist(), z.tolist())
        found = conditional(table, "sharpness", "error", "lr", num_resamples=300, seed=k)
        covered += found.within_low <= truth <= found.within_high
        plain = correlate(runs(x.tolist(), y.tolist(), z.tolist()), "sharpness", "error", num_resamples=300, seed=k)
        over_all += plain.low <= truth <= plain.high
    assert abs(covered / 300 - 0.95) <= 0.03
    assert abs(over_all / 300 - 0.95) <= 0.03


def test_the_test_is_wrong_as_often_as_it_says():
    """1,000 samples without a relation: 5 % has a standard error of 0.7 %."""
    generator, groups = torch.Generator().manual_seed(2), torch.arange(30) % 3
    wrong = 0
    for _ in range(1000):
        x, y = bivariate(generator, 30, 0.0)
        wrong += within_p_value(x + 3 * groups, y + 3 * groups, groups) < 0.05
    assert 0.03 <= wrong / 1000 <= 0.07


def test_a_factor_that_moves_both_is_found_out():
    """The learning rate orders both columns; at a fixed one they have nothing to do with each other."""
    generator = torch.Generator().manual_seed(4)
    x, y = bivariate(generator, 48, 0.0)
    z = torch.arange(48) % 3
    table = runs((x + 4 * z).tolist(), (y + 4 * z).tolist(), (0.1 * z).tolist())
    overall = correlate(table, "sharpness", "error")
    found = conditional(table, "sharpness", "error", "lr")
    assert overall.low > 0.3
    assert found.within_low < 0 < found.within_high
    assert found.within_p > 0.05
    assert found.measure_given > 0.7


def test_the_partial_tau_is_not_0_for_normal_columns_that_are_independent_given_the_third():
    """The docstring's caveat in closed form: r_xz = r_yz = 0.7 and r_xy = 0.49 leave no partial correlation."""
    tau_xy, tau_xz = (2 / math.pi * math.asin(r) for r in (0.49, 0.7))
    assert float(partial_tau(tau_xy, tau_xz, tau_xz)) == pytest.approx(0.1085, abs=1e-3)


def test_the_same_seed_gives_the_same_numbers_and_no_global_generator_moves():
    table = runs([3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8], [1, 1, 2, 2, 1, 1, 2, 2])
    before = torch.get_rng_state()
    first, second, other = (
        conditional(table, "sharpness", "error", "lr", num_resamples=40, seed=s).to_dict() for s in (0, 0, 1)
    )
    assert first == second
    assert (first["within_low"], first["within_high"]) != (other["within_low"], other["within_high"])
    assert torch.equal(before, torch.get_rng_state())


def test_names_have_groups_but_no_partial_tau():
    table = runs([1, 2, 3, 4], [1, 2, 4, 3], ["none", "none", "flip", "flip"])
    found = conditional(table, "sharpness", "error", "lr", num_resamples=20)
    assert found.within == 0.0
    assert math.isnan(found.partial)
    assert json.loads(json.dumps(found.to_dict(), allow_nan=False))["partial"] is None


@pytest.mark.parametrize(
    ("x", "z", "reason"),
    [
        ([1, 2, 3], [0, 0, 0], "at least 4"),
        ([1, 1, 1, 1], [0, 0, 1, 1], "the same in all"),
        ([1, 2, 3, 4], [0, 1, 2, 3], "no two runs with the same lr"),
        ([1, 1, 2, 2], [0, 0, 1, 1], "no two runs with the same lr"),
        ([1, math.nan, 3, 4], [0, 0, 1, 1], "3 runs"),
        ([1, 2, 3, 4], [0, 0, 1, None], "3 runs"),
    ],
)
def test_what_cannot_be_computed_has_a_reason(x, z, reason):
    found = conditional(runs(x, range(len(x)), z), "sharpness", "error", "lr", num_resamples=5)
    assert math.isnan(found.within)
    assert reason in found.reason
    assert found.to_dict()["within"] is None


def test_errors_name_the_remedy():
    table = runs([1, 2, 3, 4], [1, 2, 3, 4], [0, 0, 1, 1])
    with pytest.raises(ValueError, match="no run has 'rho'"):
        conditional(table, "sharpness", "error", "rho")
    with pytest.raises(ValueError, match="level"):
        conditional(table, "sharpness", "error", "lr", level=95)


def test_holm_by_hand():
    """Sorted 0.005, 0.01, 0.03, 0.04 times 4, 3, 2, 1 are 0.02, 0.03, 0.06, 0.04; the last may not be below 0.06."""
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.5, 0.9]) == [1.0, 1.0]
    assert holm([]) == []
    found = holm([0.01, math.nan, 0.02])
    assert math.isnan(found[1])
    assert [found[0], found[2]] == pytest.approx([0.02, 0.02])


@given(st.lists(st.floats(0, 1), min_size=1, max_size=20))
@settings(max_examples=50, deadline=None)
def test_holm_rejects_what_the_step_down_rule_rejects(p_values):
    """Reject the smallest while p_(j) <= 0.05 / (m - j + 1), stop at the first that is larger."""
    order, rejected = sorted(range(len(p_values)), key=lambda i: p_values[i]), set()
    for rank, i in enumerate(order):
        if (len(p_values) - rank) * p_values[i] > 0.05:
            break
        rejected.add(i)
    adjusted = holm(p_values)
    assert {i for i, p in enumerate(adjusted) if p <= 0.05} == rejected
    assert all(q >= p for p, q in zip(p_values, adjusted, strict=True))
