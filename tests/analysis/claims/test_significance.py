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
    assert significance.max_t(differences[None]) == pytest.approx(expected)
    assert significance.max_t(np.full((1, 6), 0.1)) == 2 / 2**6  # six pairs are the fewest that can be below 0.05
    assert significance.max_t(np.zeros((1, 4))) == 1.0


def test_sign_flip_counts_ties_exactly():
    differences = np.array([0.2, 0.2, 0.2, -0.2, 0.2, 0.0])  # sums of 64 flips: ±5, ±3, ±1 fifths, times two
    sums = np.abs(np.array(list(itertools.product((1, -1), repeat=6))) @ np.round(5 * differences))
    assert significance.max_t(differences[None]) == (sums >= 3).mean() == 0.375


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
        assert significance.verdict(found, 0.06) == "cannot tell"  # not after correction


@pytest.mark.parametrize(
    ("p", "low", "expected"),
    [
        (0.049, 0.001, "better"),
        (0.051, 0.001, "cannot tell"),
        (0.25, 0.001, "cannot tell"),
        (0.049, -0.001, "cannot tell"),
        (0.001, -0.001, "cannot tell"),
    ],
)
def test_verdict_needs_both_a_low_p_and_an_interval_off_zero(p, low, expected):
    found = significance.Comparison(0.02, (low, 0.04), (low, 0.04), p, 0.9, 8)
    assert significance.verdict(found, p) == expected
    mirrored = significance.Comparison(-0.02, (-0.04, -low), (-0.04, -low), p, 0.1, 8)
    assert significance.verdict(mirrored, p) == {"better": "worse"}.get(expected, expected)


def test_intervals_are_those_of_student_at_95_and_90_percent():
    found = significance.compare([0.1, 0.2, 0.3, 0.4, 0.5, 0.6], [0.0] * 6)
    error = np.std([1, 2, 3, 4, 5, 6], ddof=1) / 10 / 6**0.5
    assert np.subtract(found.interval, 0.35) == pytest.approx([-2.5706 * error, 2.5706 * error], rel=1e-4)
    assert np.subtract(found.narrow_interval, 0.35) == pytest.approx([-2.0150 * error, 2.0150 * error], rel=1e-4)


def test_compare_cannot_tell_for_equal_or_few_runs():
    same = significance.compare([0.5] * 6, [0.5] * 6)
    assert (same.difference, same.interval, same.p, same.better) == (0.0, (0.0, 0.0), 1.0, 0.5)
    rounded = significance.mean_interval(np.array([0.499, 0.5, 0.501]) - np.array([0.699, 0.7, 0.701]))
    assert rounded == pytest.approx((-0.2, -0.2))
    few = significance.compare([0.9] * 5, [0.5] * 5)
    assert significance.verdict(few, few.p) == "cannot tell"  # 2 / 2^5 is above 0.05
    for a, b in (([0.5], [0.4]), ([0.5, 0.6], [0.4]), ([0.5, np.nan], [0.4, 0.5])):
        with pytest.raises(ValueError, match="finite pairs"):
            significance.compare(a, b)


def test_mean_interval_matches_scipy():
    values = np.random.default_rng(3).exponential(size=20)
    for level in (0.9, 0.95):
        reference = stats.ttest_1samp(values, 0).confidence_interval(level)
        assert significance.mean_interval(values, level) == pytest.approx(tuple(reference))


def test_interquartile_mean_ignores_the_outer_quarters():
    assert significance.interquartile_mean([-100.0, 1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 1e6]) == 3.5


def test_max_t_of_a_family_is_at_least_that_of_each():
    random = np.random.default_rng(2)
    for _ in range(10):
        differences = 0.3 + random.normal(size=(4, 7))
        alone = np.concatenate([significance.max_t(one[None]) for one in differences])
        assert (significance.max_t(differences) >= alone).all()
    assert significance.max_t(np.zeros((2, 6))).tolist() == [1.0, 1.0]
    assert significance.max_t(np.full((12, 6), 0.1)).tolist() == [2 / 2**6] * 12  # a family costs no seeds
    candidates = np.vstack([np.full(6, 0.1), [0.1, np.nan, 0.2, -0.1, 0.3, np.nan]])
    first, second = significance.max_t(candidates)
    assert first == 2 / 2**6 and 0.25 < second <= 1


def test_max_t_is_robust_to_candidates_with_few_pairs():
    clear = np.array([0.10, 0.12, 0.09, 0.11, 0.13, 0.10, 0.12, 0.08, 0.11])
    failing = np.full(9, np.nan)
    failing[:2] = 0.20, 0.21  # two pairs, farther from 0 than any other candidate
    noise = 0.05 * np.random.default_rng(0).normal(size=(5, 9))
    assert significance.max_t(np.vstack([failing, noise, clear]))[6] < 0.02
    assert significance.max_t(np.vstack([failing, clear]))[0] > 0.4


@pytest.mark.thorough(but=("6",))
@pytest.mark.parametrize("n", [6, 18])
def test_max_t_keeps_the_nominal_false_positive_rate(n):
    random, rejected = np.random.default_rng(5), 0
    for _ in range(200):
        differences = random.normal(size=(12, n)) + random.normal(size=n)  # one shared baseline
        rejected += significance.max_t(differences).min() < 0.05
    assert rejected <= 0.05 * 200 + 2 * (200 * 0.05 * 0.95) ** 0.5


@pytest.mark.parametrize("n", [6, 9, 12])
@pytest.mark.parametrize("distribution", [stats.norm(), stats.t(3)], ids=["normal", "t3"])
def test_mean_interval_reaches_its_coverage(n, distribution):
    values = distribution.rvs(size=(2_000, n), random_state=11)
    covered = [low <= 0 <= high for low, high in map(significance.mean_interval, values)]
    assert np.mean(covered) >= 0.93


@pytest.mark.parametrize(
    ("mean", "spread", "expected"),
    [(0.002, 0.002, "equivalent"), (0.03, 0.002, "better"), (-0.03, 0.002, "worse"), (0.004, 0.02, "cannot tell")],
)
def test_verdict_by_difference_and_margin(mean, spread, expected):
    noise = spread * np.array([1, -1, 0.5, -0.5, 0.2, -0.2, 0.8, -0.8])
    found = significance.compare(0.8 + mean + noise, np.full(8, 0.8))
    assert significance.verdict(found, found.p, 0.01) == expected
    assert significance.verdict(found, found.p) == ("better" if mean == 0.002 else expected)  # without a margin


def test_equivalent_is_rare_for_a_difference_at_the_margin():
    values = 0.01 + 0.004 * np.random.default_rng(3).normal(size=(1_000, 6))
    found = [significance.verdict(significance.compare(x, np.zeros(6)), 1.0, 0.01) for x in values]
    assert 0.02 < np.mean([each == "equivalent" for each in found]) < 0.05 + 2 * (0.05 * 0.95 / 1_000) ** 0.5


@pytest.mark.parametrize("mean", [0.0, 0.3, 0.8])
def test_power_rises_with_the_number_of_seeds(mean):
    powers = [significance.power(mean, 1.0, n, margin=0.5) for n in (6, 12, 13, 25, 50, 100, 200)]
    assert all(after > before - 0.04 for before, after in itertools.pairwise(powers)) and powers[-1] > 0.8


@pytest.mark.thorough(but=("1.5-1",))
@pytest.mark.parametrize(("effect", "comparisons"), [(0.4, 1), (0.8, 1), (1.5, 1), (0.8, 11)])
def test_seeds_needed_keeps_the_promised_power(effect, comparisons):
    seen = [effect - 1, effect + 1] * 3
    needed, deviation = significance.seeds_needed(seen, comparisons), np.std(seen, ddof=1)
    assert needed is not None
    random, told = np.random.default_rng(1), 0
    for _ in range(300):
        family = effect + deviation * random.normal(size=(comparisons, needed))  # the least power: independent
        p = significance.max_t(family)[0]
        told += significance.verdict(significance.compare(family[0], np.zeros(needed)), p) == "better"
    assert told / 300 >= 0.8 - 2 * (0.8 * 0.2 / 300) ** 0.5


def test_seeds_needed_matches_the_paired_t_test():
    differences = 0.5 + stats.norm.ppf((np.arange(20) + 0.5) / 20)  # mean: half a standard deviation
    needed = significance.seeds_needed(differences)
    assert 30 <= needed <= 36  # 34 by tables of the paired t-test
    assert significance.seeds_needed(differences, comparisons=11) > needed
    assert significance.seeds_needed([0.1, 0.101, 0.099]) == 6  # the minimum of the exact test
    assert significance.seeds_needed([0.1, 0.101, 0.099] * 3) == 10
    assert significance.seeds_needed([0.1, -0.1]) is None
    assert significance.seeds_needed([0.1, -0.1], margin=0.2) < 20  # equal within the margin
    assert significance.seeds_needed([1e-6, -1.0, 1.0]) is None
