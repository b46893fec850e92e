"""Aggregates over datasets: values by hand, the tables of Demšar (2006), and the coverage of intervals."""

import numpy as np
import pytest

from mmfusion.analysis.study import aggregates, comparisons

NAN = np.nan


def test_mean_ranks_average_over_datasets_and_share_ties():
    first = np.array([[0.9, 0.7], [0.6, 0.8], [0.5, 0.9]])  # means 0.8, 0.7, 0.7
    second = np.array([[0.1, 0.1], [0.3, 0.3], [0.2, 0.2]])
    assert aggregates.mean_ranks([first]).tolist() == [1.0, 2.5, 2.5]
    assert aggregates.mean_ranks([first, second]).tolist() == [2.0, 1.75, 2.25]


def test_interquartile_mean_is_over_the_runs_of_all_datasets_without_failed_ones():
    first = np.array([[1.0, 2.0, 3.0, 100.0], [1.0, 1.0, 1.0, NAN]])
    second = np.array([[4.0, 5.0, 6.0, -100.0], [1.0, 2.0, 9.0, NAN]])
    # the first row without two of its eight runs at each end: 2, 3, 4, 5; the second without one of six: 1, 1, 1, 2
    assert aggregates.interquartile_means([first, second]).tolist() == [3.5, 1.25]


def test_profile_is_the_share_of_runs_above_a_threshold_by_dataset():
    tables = [np.array([[0.2, 0.4, 0.6, 0.8]]), np.array([[0.5, 0.7]])]
    thresholds = np.array([0.0, 0.4, 0.5, 1.0])
    assert aggregates.profiles(tables, thresholds).tolist() == [[1.0, 0.75, 0.5, 0.0]]


def test_probability_of_improvement_counts_pairs_of_runs_and_half_of_ties():
    table = np.array([[1.0, 2.0, 3.0], [2.0, 2.0, NAN], [9.0, 9.0, 9.0]])
    found = aggregates.improvements([table, table[[0, 0, 2]]], reference=1)
    # 1 loses twice, 2 ties twice, 3 wins twice: 3 of 6; and a method against itself 0.5
    assert found.tolist() == [0.5, 0.5, 1.0]
    assert aggregates.improvements([table], reference=0).tolist() == [0.5, 0.5, 1.0]
    assert aggregates.improvements([np.array([[1.0, 2.0], [1.5, 0.0]])], reference=0).tolist() == [0.5, 0.25]


def test_resampled_runs_stay_in_their_dataset_and_are_paired_by_seed():
    tables = [np.array([[1.0, 2.0, 3.0], [10.0, 20.0, 30.0]]), np.array([[5.0, 6.0], [50.0, 60.0]])]
    drawn = aggregates.resampled(tables, draws=50)
    assert [one.shape for one in drawn] == [(50, 2, 2), (50, 2, 1)]
    assert all(np.array_equal(one[:, 0] * 10, one[:, 1]) for one in drawn)
    assert set(drawn[0][:, 0].ravel()) == {1.0, 2.0, 3.0} and set(drawn[1][:, 0].ravel()) == {5.0, 6.0}


def test_estimates_have_no_interval_with_fewer_than_three_seeds_of_a_dataset():
    few, enough = np.array([[1.0, 2.0]]), np.array([[1.0, 2.0, 3.0]])
    assert aggregates.estimates([enough, few], aggregates.means)[0].interval is None
    (estimate,) = aggregates.estimates([enough], aggregates.means)
    assert estimate.interval is not None and estimate.value == 2.0
    (constant,) = aggregates.estimates([np.full((1, 5), 0.7)], aggregates.means)
    assert constant.interval == (0.7, 0.7)


def test_bootstrap_intervals_of_interquartile_means_cover():
    rng, covered, times = np.random.default_rng(0), 0, 150
    for _ in range(times):
        tables = [rng.normal(level, 0.1, size=(1, 9)) for level in (0.0, 0.0, 0.0, 0.0, 0.0, 0.0)]
        (estimate,) = aggregates.estimates(tables, aggregates.interquartile_means)
        assert estimate.interval
        covered += estimate.interval[0] <= 0.0 <= estimate.interval[1]
    assert covered / times >= 0.95 - 3 * np.sqrt(0.95 * 0.05 / times)
    assert covered < times


def test_nemenyi_quantiles_are_those_of_demsars_table():
    table = [1.960, 2.343, 2.569, 2.728, 2.850, 2.949, 3.031, 3.102, 3.164]
    assert [comparisons.nemenyi_quantile(k) for k in range(2, 11)] == pytest.approx(table, abs=1.5e-3)


def test_friedman_test_is_that_of_demsars_example():
    ranks = {"C4.5": 3.143, "C4.5+m": 2.000, "C4.5+cf": 2.893, "C4.5+m+cf": 1.964}
    found = comparisons.friedman(ranks, 14)
    assert found is not None and found.f is not None
    assert (found.chi_square, found.f) == pytest.approx((9.28, 3.69), abs=0.005)
    assert found.critical_difference == pytest.approx(1.25, abs=0.005)
    assert 0.01 < found.p < 0.05  # its F(3, 39) has the critical value 2.85
    assert found.groups == (("C4.5+m+cf", "C4.5+m", "C4.5+cf", "C4.5"),)
    assert comparisons.friedman(ranks, 1) is None and comparisons.friedman({"a": 1.0, "b": 2.0}, 9) is None


def test_friedman_test_of_perfect_agreement_has_no_finite_statistic():
    found = comparisons.friedman({"a": 1.0, "b": 2.0, "c": 3.0}, 8)
    assert found is not None and found.f is None and found.p == 0.0


def test_groups_are_the_largest_within_the_critical_difference():
    ranks = {"d": 4.0, "a": 1.0, "b": 1.9, "c": 2.5, "e": 9.0}
    assert comparisons.groups(ranks, 1.55) == (("a", "b", "c"), ("c", "d"))
    assert comparisons.groups(ranks, 0.5) == ()


def test_judge_needs_six_pairs_and_corrects_for_the_family():
    rng = np.random.default_rng(0)
    for pairs, verdict in ((5, "cannot tell"), (6, "better"), (9, "better")):
        base = rng.uniform(0.5, 0.9, pairs)
        scores = {"base": base, "up": base + 0.1 + 0.001 * rng.normal(size=pairs), "same": base + 1e-4}
        found = {d.method: d for d in comparisons.judge(scores, ["up", "base", "same"], "base", 0.01, "datasets")}
        assert set(found) == {"up", "same"}
        assert found["up"].verdict == verdict and found["up"].comparison.over == "datasets"
        assert found["same"].verdict == ("equivalent" if pairs >= 6 else "cannot tell")
    noise = {name: rng.normal(size=9) for name in ("base", *"abcdefgh")}
    p = [d.p for d in comparisons.judge(noise, list("abcdefgh"), "base", 0.0, "datasets")]
    alone = [comparisons.judge(noise, [name], "base", 0.0, "datasets")[0].p for name in "abcdefgh"]
    assert all(together >= one for together, one in zip(p, alone, strict=True)) and p != alone


def test_judge_leaves_out_pairs_that_one_lacks():
    scores = {"base": np.array([0.5] * 8), "a": np.array([0.6, 0.61, 0.6, 0.62, 0.6, 0.61, NAN, NAN])}
    (found,) = comparisons.judge(scores, ["a"], "base", 0.0, "seeds")
    assert found.comparison is not None and found.comparison.n == 6 and found.verdict == "better"
    (found,) = comparisons.judge({**scores, "a": np.array([0.6] + [NAN] * 7)}, ["a"], "base", 0.0, "seeds")
    assert found.comparison is None and found.verdict == "cannot tell"
