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
    result = float(within_tau(*tensors(*zip(*triples, strict=True))))
    if a * b:
        assert result == pytest.approx(score / math.sqrt(a * b), abs=1e-12)
    else:
        assert math.isnan(result)


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
    result = conditional(runs(x, y, z), "sharpness", "error", "lr", num_resamples=20)
    assert result.within == pytest.approx((3 + 1) / 6)
    assert (result.n, result.num_groups) == (6, 2)
    assert float(kendall_tau(*tensors(x, y))) < 0
    # S = 3 + 1, variance n (n - 1) (2 n + 5) / 18 = 11 / 3 for each group of 3
    assert result.within_p == pytest.approx(math.erfc(4 / math.sqrt(2 * 22 / 3)))


def test_the_partial_tau_is_the_formula():
    assert float(partial_tau(taus(0.5, 0.6, 0.3))) == pytest.approx((0.5 - 0.18) / math.sqrt(0.64 * 0.91))
    assert math.isnan(float(partial_tau(taus(0.3, 1.0, 0.3))))
    assert math.isnan(float(partial_tau(taus(math.nan, 0.5, 0.3))))
    x, y, z = [3, 1, 4, 1, 5, 9, 2, 6], [2, 7, 1, 8, 2, 8, 1, 8], [1, 1, 2, 2, 3, 3, 4, 4]
    xy, xz, yz = (kendalltau(a, b).statistic for a, b in ((x, y), (x, z), (y, z)))
    result = conditional(runs(x, y, z), "sharpness", "error", "lr", num_resamples=50)
    assert result.partial == pytest.approx((xy - xz * yz) / math.sqrt((1 - xz**2) * (1 - yz**2)))
    assert (result.measure_given, result.target_given) == pytest.approx((xz, yz))
    assert result.partial_low <= result.partial <= result.partial_high


def taus(xy, xz, yz):
    return torch.tensor([[1, xy, xz], [xy, 1, yz], [xz, yz, 1]], dtype=torch.float64)


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
        result = conditional(table, "sharpness", "error", "lr", num_resamples=300, seed=k)
        covered += result.within_low <= truth <= result.within_high
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
    result = conditional(table, "sharpness", "error", "lr")
    assert overall.low > 0.3
    assert result.within_low < 0 < result.within_high
    assert result.within_p > 0.05
    assert result.measure_given > 0.7


def test_the_partial_tau_is_not_0_for_normal_columns_that_are_independent_given_the_third():
    """The docstring's caveat in closed form: r_xz = r_yz = 0.7 and r_xy = 0.49 leave no partial correlation."""
    tau_xy, tau_xz = (2 / math.pi * math.asin(r) for r in (0.49, 0.7))
    assert float(partial_tau(taus(tau_xy, tau_xz, tau_xz))) == pytest.approx(0.1085, abs=1e-3)


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
    result = conditional(table, "sharpness", "error", "lr", num_resamples=20)
    assert result.within == 0.0
    assert math.isnan(result.partial)
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["partial"] is None


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
    result = conditional(runs(x, range(len(x)), z), "sharpness", "error", "lr", num_resamples=5)
    assert math.isnan(result.within)
    assert reason in result.reason
    assert result.to_dict()["within"] is None


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
    result = holm([0.01, math.nan, 0.02])
    assert math.isnan(result[1])
    assert [result[0], result[2]] == pytest.approx([0.02, 0.02])


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


class TestSeveralFactors:
    """Runs with two factors, each of which moves both columns."""

    def table(self, n=48, seed=0, relation=0.0):
        generator = torch.Generator().manual_seed(seed)
        x, y = bivariate(generator, n, relation)
        a, b = torch.arange(n) % 3, torch.arange(n) // 3 % 2
        return [
            {"sharpness": float(p + 4 * i + 3 * j), "error": float(q + 4 * i - 3 * j), "lr": 0.1 * int(i), "wd": int(j)}
            for p, q, i, j in zip(x, y, a, b, strict=True)
        ]

    def test_groups_agree_in_all_of_them(self):
        table = self.table()
        both = conditional(table, "sharpness", "error", ["lr", "wd"], num_resamples=50)
        named = [run | {"setting": f"{run['lr']} {run['wd']}"} for run in table]
        one = conditional(named, "sharpness", "error", "setting", num_resamples=50)
        assert both.num_groups == 6
        assert (both.within, both.within_p) == (one.within, one.within_p)
        assert math.isnan(both.measure_given)
        alone = conditional(table, "sharpness", "error", ["lr"], num_resamples=50)
        assert alone.to_dict() | {"settings": 0} == conditional(
            table, "sharpness", "error", "lr", num_resamples=50
        ).to_dict() | {"settings": 0}

    def test_the_partial_tau_is_that_of_residual_signs(self):
        """tau-b is the correlation of the signs of all pairs; partial correlation is that of what a least-squares fit
        of the other signs leaves."""
        table = self.table(relation=0.6)
        result = conditional(table, "sharpness", "error", ["lr", "wd"], num_resamples=50)
        columns = [torch.tensor([float(run[key]) for run in table]) for key in ("sharpness", "error", "lr", "wd")]
        pairs = torch.stack([(c[:, None] - c[None, :]).sign().flatten().double() for c in columns], 1)
        unit = pairs / pairs.norm(dim=0)
        fit = torch.linalg.lstsq(unit[:, 2:], unit[:, :2]).solution
        x, y = (unit[:, :2] - unit[:, 2:] @ fit).T
        assert result.partial == pytest.approx(float(x @ y / (x.norm() * y.norm())), abs=1e-12)
        assert result.partial_low < result.partial < result.partial_high

    def test_one_of_them_held_fixed_is_not_enough(self):
        table = self.table(n=96, seed=3)
        lr, wd, both = (conditional(table, "sharpness", "error", given) for given in ("lr", "wd", ["lr", "wd"]))
        assert lr.within_high < 0
        assert wd.within_low > 0
        assert both.within_low < 0 < both.within_high

    def test_a_factor_that_is_a_name_leaves_no_partial_tau(self):
        table = [run | {"wd": str(run["wd"])} for run in self.table()]
        assert math.isnan(conditional(table, "sharpness", "error", ["lr", "wd"], num_resamples=5).partial)
        with pytest.raises(ValueError, match="no factor to hold fixed"):
            conditional(table, "sharpness", "error", [])


def clustered(generator, sizes, icc, r=0.0):
    """Runs whose two columns have this intraclass correlation within clusters, and correlate by r in both parts."""
    ids = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes))
    a, b = bivariate(generator, len(sizes), r)
    e, f = bivariate(generator, len(ids), r)
    x, y = (math.sqrt(icc) * u[ids] + math.sqrt(1 - icc) * v for u, v in ((a, e), (b, f)))
    return [
        {"sharpness": float(p), "error": float(q), "setting": int(i), "lr": int(i) % 2}
        for p, q, i in zip(x, y, ids, strict=True)
    ]


SIZES = {"even": [4] * 12, "uneven": [1, 1, 2, 2, 3, 3, 4, 4, 6, 8, 1, 5]}


@pytest.mark.parametrize("sizes", SIZES)
def test_seeds_of_one_setting_are_not_counted_as_independent(sizes):
    """ICC 0.95, no relation: 300 tests at 5 % have a standard error of 1.3 %, and so has the coverage of 95 %."""
    generator, plain, by_cluster, covered = torch.Generator().manual_seed(5), 0, 0, 0
    for k in range(300):
        table = clustered(generator, SIZES[sizes], 0.95)
        plain += correlate(table, "sharpness", "error", num_resamples=2).p < 0.05
        result = correlate(table, "sharpness", "error", cluster="setting", num_resamples=200, seed=k)
        by_cluster += result.p < 0.05
        covered += result.low <= 0 <= result.high
    assert plain / 300 > 0.15
    assert 0.01 <= by_cluster / 300 <= 0.09
    assert 0.91 <= covered / 300 <= 0.99


def test_the_conditional_form_counts_clusters_too():
    """As above, in two groups of eight clusters."""
    generator, plain, by_cluster, covered = torch.Generator().manual_seed(6), 0, 0, 0
    for k in range(200):
        table = clustered(generator, [3] * 16, 0.95)
        plain += conditional(table, "sharpness", "error", "lr", num_resamples=2).within_p < 0.05
        result = conditional(table, "sharpness", "error", "lr", cluster="setting", num_resamples=200, seed=k)
        by_cluster += result.within_p < 0.05
        covered += result.within_low <= 0 <= result.within_high
    assert plain / 200 > 0.12
    assert 0.01 <= by_cluster / 200 <= 0.09
    assert 0.91 <= covered / 200 <= 0.99


def test_a_relation_between_clusters_is_still_found():
    generator = torch.Generator().manual_seed(7)
    tables = [clustered(generator, [4] * 12, 0.95, r=0.9) for _ in range(40)]
    reached = sum(correlate(t, "sharpness", "error", cluster="setting", num_resamples=200).p < 0.05 for t in tables)
    assert reached / 40 > 0.8


def test_the_p_value_of_clusters_is_the_share_of_all_their_orders():
    """Five clusters of two: all 120 orders, pairs counted one by one."""
    table = clustered(torch.Generator().manual_seed(8), [2] * 5, 0.5, r=0.9)
    x, y = (torch.tensor([run[key] for run in table]).view(5, 2) for key in ("sharpness", "error"))

    def score(order):
        total = 0.0
        for a, b in itertools.permutations(range(5), 2):
            in_x = sum((x[a, i] > x[b, j]) * 2 - 1.0 for i in range(2) for j in range(2)) / 4
            in_y = sum((y[order[a], i] > y[order[b], j]) * 2 - 1.0 for i in range(2) for j in range(2)) / 4
            total += float(in_x * in_y)
        return total

    scores = [score(order) for order in itertools.permutations(range(5))]
    exact = sum(abs(s) >= abs(scores[0]) - 1e-9 for s in scores) / 120
    result = correlate(table, "sharpness", "error", cluster="setting", num_resamples=4000)
    assert result.p == pytest.approx(exact, abs=4 * math.sqrt(exact * (1 - exact) / 4000) + 1 / 4000)


def test_clusters_of_one_run_are_runs():
    table = clustered(torch.Generator().manual_seed(9), [1] * 10, 0.0, r=0.5)
    plain = correlate(table, "sharpness", "error", seed=3)
    single = correlate(table, "sharpness", "error", cluster="setting", seed=3)
    assert (single.tau, single.low, single.high) == (plain.tau, plain.low, plain.high)
    assert single.p == pytest.approx(plain.p, abs=0.02)
    assert single.settings["cluster"] == ["setting"]
    named = [run | {"a": run["setting"] // 3, "b": run["setting"] % 3} for run in table]
    assert correlate(named, "sharpness", "error", cluster=["a", "b"], seed=3).p == single.p


def test_a_cluster_that_crosses_the_groups_moves_as_a_whole():
    """Seeds as clusters, each with a run at every learning rate: the seed's effect is in all of them."""
    generator, wrong = torch.Generator().manual_seed(10), 0
    for k in range(200):
        effects = torch.randn(2, 10, generator=generator, dtype=torch.float64)
        noise = 0.2 * torch.randn(2, 3, 10, generator=generator, dtype=torch.float64)
        table = [
            {"sharpness": float(effects[0, s] + noise[0, i, s]), "error": float(effects[1, s] + noise[1, i, s]),
             "lr": i, "seed": s}
            for i in range(3) for s in range(10)
        ]  # fmt: skip
        wrong += (
            conditional(table, "sharpness", "error", "lr", cluster="seed", num_resamples=200, seed=k).within_p < 0.05
        )
    assert wrong / 200 <= 0.10


def test_too_few_clusters_have_a_reason():
    table = clustered(torch.Generator().manual_seed(11), [5, 5, 5], 0.5)
    result = correlate(table, "sharpness", "error", cluster="setting")
    assert "3 clusters of runs; tau needs at least 4" in result.reason
    lost = [run | {"setting": None} for run in table[:2]] + table[2:]
    assert correlate(lost, "sharpness", "error", cluster="setting").num_dropped == 2
    with pytest.raises(ValueError, match="no run has 'cluster'"):
        correlate(table, "sharpness", "error", cluster="cluster")
