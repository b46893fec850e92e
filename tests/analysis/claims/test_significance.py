"""Statistics of paired runs: exact values, reference implementations, coverage and false-positive rates."""

import itertools

import numpy as np
import pytest
from scipy import stats

from mmfusion.analysis.claims import significance


def test_sign_flip_enumerates_every_flip():
    differences = np.array([0.3, 0.1, -0.05, 0.2, 0.4])
    flips = np.array(list(itertools.product((1, -1), repeat=5))) * differences
    expected = (abs(flips.mean(axis=1)) >= abs(differences.mean()) - 1e-12).mean()
    assert significance.sign_flip(differences) == pytest.approx(expected)
    assert significance.sign_flip(np.full(6, 0.1)) == 2 / 2**6  # six pairs are the fewest that can be below 0.05
    assert significance.sign_flip(np.zeros(4)) == 1.0


def test_holm_is_a_step_down_correction():
    assert significance.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert significance.holm([0.9, 0.8]) == [1.0, 1.0]
    assert significance.holm([]) == []


def test_verdict_of_a_clear_difference_in_both_directions():
    random = np.random.default_rng(0)
    b = 0.9 + 0.01 * random.normal(size=8)
    a = b + 0.05 + 0.005 * random.normal(size=8)
    for first, second, sign, expected in ((a, b, 1, "better"), (b, a, -1, "worse")):
        found = significance.compare(first, second)
        assert sign * found.difference == pytest.approx(0.05, abs=0.01)
        assert found.interval[0] < found.difference < found.interval[1]
        assert found.better == (sign > 0)
        assert found.p == 2 / 2**8
        assert significance.verdict(found, found.p) == expected
        assert significance.verdict(found, 0.06) == "inconclusive"  # not after correction


def test_compare_is_inconclusive_for_equal_or_few_runs():
    same = significance.compare([0.5] * 6, [0.5] * 6)
    assert (same.difference, same.interval, same.p, same.better) == (0.0, (0.0, 0.0), 1.0, 0.5)
    rounded = significance.mean_interval(np.array([0.499, 0.5, 0.501]) - np.array([0.699, 0.7, 0.701]))
    assert rounded == pytest.approx((-0.2, -0.2))  # BCa would divide by a spread of rounding errors
    few = significance.compare([0.9] * 5, [0.5] * 5)
    assert significance.verdict(few, few.p) == "inconclusive"  # 2 / 2^5 is above 0.05
    for a, b in (([0.5], [0.4]), ([0.5, 0.6], [0.4]), ([0.5, np.nan], [0.4, 0.5])):
        with pytest.raises(ValueError, match="finite pairs"):
            significance.compare(a, b)


def test_mean_interval_matches_scipy_and_is_deterministic():
    values = np.random.default_rng(3).exponential(size=20)
    reference = stats.bootstrap(
        (values,), np.mean, n_resamples=50_000, method="BCa", rng=np.random.default_rng(1)
    ).confidence_interval
    found = significance.mean_interval(values)
    assert found == pytest.approx(tuple(reference), abs=0.02)
    assert found == significance.mean_interval(values)


def test_sign_flip_of_selected_equals_sign_flip_for_one_candidate():
    random = np.random.default_rng(2)
    for _ in range(10):
        differences = 0.3 + random.normal(size=7)
        assert significance.sign_flip_of_selected(differences[None], 0) == pytest.approx(
            significance.sign_flip(differences)
        )
    assert significance.sign_flip_of_selected(np.zeros((2, 6)), 0) == 1.0
    assert significance.sign_flip_of_selected(np.full((3, 6), 0.1), 1) == 2 / 2**6
    candidates = np.vstack([np.full(6, 0.1), [0.1, np.nan, 0.2, -0.1, 0.3, np.nan]])
    assert significance.sign_flip_of_selected(candidates, 0) == 2 / 2**6
    assert 0.25 < significance.sign_flip_of_selected(candidates, 1) <= 1


def test_sign_flip_of_selected_is_robust_to_candidates_with_few_pairs():
    clear = np.array([0.10, 0.12, 0.09, 0.11, 0.13, 0.10, 0.12, 0.08, 0.11])
    failing = np.full(9, np.nan)
    failing[:2] = 0.20, 0.21  # two pairs, farther from 0 than any other candidate
    noise = 0.05 * np.random.default_rng(0).normal(size=(5, 9))
    assert significance.sign_flip_of_selected(np.vstack([failing, noise, clear]), 6) < 0.02
    assert significance.sign_flip_of_selected(np.vstack([failing, clear]), 0) > 0.4


@pytest.mark.parametrize("n", [6, pytest.param(18, marks=pytest.mark.thorough)])
def test_sign_flip_of_selected_keeps_the_nominal_false_positive_rate(n):
    random, rejected = np.random.default_rng(5), 0
    for _ in range(200):
        differences = random.normal(size=(12, n)) + random.normal(size=n)  # one shared baseline
        rejected += significance.sign_flip_of_selected(differences, int(differences.mean(axis=1).argmax())) < 0.05
    assert rejected <= 0.05 * 200 + 2 * (200 * 0.05 * 0.95) ** 0.5


@pytest.mark.parametrize(("n", "least"), [(6, 0.80), (20, 0.90)])
def test_mean_interval_reaches_its_coverage(n, least):
    random = np.random.default_rng(11)
    covered = 0
    for trial in range(300):
        low, high = significance.mean_interval(1.0 + random.normal(size=n), trial)
        covered += low <= 1.0 <= high
    assert covered / 300 >= least


def test_seeds_needed_matches_the_paired_t_test():
    differences = 0.5 + stats.norm.ppf((np.arange(20) + 0.5) / 20)  # mean: half a standard deviation
    needed = significance.seeds_needed(differences)
    assert 30 <= needed <= 36  # 34 by tables of the paired t-test
    assert significance.seeds_needed(differences, comparisons=11) > needed
    assert significance.seeds_needed([0.1, 0.101, 0.099]) == 6  # the minimum of the exact test
    assert significance.seeds_needed([0.1, 0.101, 0.099] * 3) == 10
    assert significance.seeds_needed([0.1, -0.1]) is None
    assert significance.seeds_needed([1e-6, -1.0, 1.0]) is None
