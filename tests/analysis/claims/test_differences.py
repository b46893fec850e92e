"""Paired differences on test, corrected for the family and for selection."""

from dataclasses import replace

import numpy as np
import pytest

from mmfusion.analysis.claims.differences import Scope, differences, selected_difference, selection_gain
from mmfusion.analysis.claims.selection import MethodResult


def rows(**scores):
    return {
        name: MethodResult(name, name == "alone", {}, (), tuple(range(len(x))), (), tuple(x), tuple(x), 1)
        for name, x in scores.items()
    }


def test_differences_are_paired_corrected_and_signed():
    noise = [0.01, -0.01, 0.02, 0.0, -0.02, 0.01, 0.015, -0.015]
    found = rows(
        concat=[0.8 + e for e in noise],
        clear=[0.9 + e + 0.001 * i for i, e in enumerate(noise)],
        same=[0.8 + e + 0.03 * (-1) ** i for i, e in enumerate(noise)],
    )
    others = [(found[name], found["concat"]) for name in ("clear", "same")]
    clear, same = differences(others, higher=True)
    assert (clear.verdict, clear.p, clear.seeds_needed) == ("better", 4 / 2**8, None)  # in two flips `same` is as far
    assert same.verdict == "cannot tell" and same.p >= 0.05
    clear, _ = differences(others, higher=False)
    assert clear.verdict == "worse"  # as a loss


def test_differences_use_seeds_finished_by_both_methods():
    found = rows(concat=[0.8] * 8, gmu=[0.9] * 8)
    short = MethodResult("short", False, {}, (), (6, 7), (0, 1, 2, 3, 4, 5), (0.9, 0.9), (0.9, 0.9), 1)
    single_seed = MethodResult("one", False, {}, (), (7,), (), (0.9,), (0.9,), 1)
    pairs = [(row, found["concat"]) for row in (found["gmu"], short, single_seed)]
    gmu, two, single = differences(pairs, higher=True)
    assert (gmu.verdict, gmu.comparison.n, gmu.p) == ("better", 8, 2 / 2**8)
    assert (two.comparison.n, two.verdict, two.failed_seeds) == (2, "cannot tell", (0, 1, 2, 3, 4, 5))
    assert two.seeds_needed == 7  # the fewest with which two comparisons pass Bonferroni
    assert (single.comparison, single.p, single.verdict) == (None, None, "cannot tell")


def test_selected_difference_corrects_for_the_selection():
    noise = [0.01, -0.01, 0.02, 0.0, -0.02, 0.01, 0.015, -0.015]
    found = rows(
        alone=[0.8] * 8,
        a=[0.8 + e for e in noise],
        b=[0.9 + e for e in noise],
        c=[0.5 + e for e in noise[::-1]],
    )
    candidates = [found[name] for name in "abc"]
    clear = selected_difference(candidates, [found["alone"]], found["b"], found["alone"], higher=True)
    assert (clear.verdict, clear.p) == ("better", 2 / 2**8)
    by_chance = rows(alone=[0.8] * 8, **{f"s{i}": [0.8 + e for e in noise[i:] + noise[:i]] for i in range(8)})
    one = selected_difference([by_chance["s0"]], [by_chance["alone"]], by_chance["s0"], by_chance["alone"], higher=True)
    strategies = [row for name, row in by_chance.items() if name != "alone"]
    many = selected_difference(strategies, [by_chance["alone"]], by_chance["s0"], by_chance["alone"], higher=True)
    assert one.p < many.p
    assert many.verdict == "cannot tell"


def equal_strategies(random, strategies=12, seeds=9):
    """Returns strategies of equal mean, and a baseline; the luck of a seed is in validation and test."""
    found = []
    for name in [*(f"s{i}" for i in range(strategies)), "alone"]:
        luck = 0.9 + 0.01 * random.normal(size=seeds)
        valid, test = (tuple(luck + 0.003 * random.normal(size=seeds)) for _ in range(2))
        found.append(MethodResult(name, name == "alone", {}, (), tuple(range(seeds)), (), valid, test, 1))
    return found[:-1], found[-1]


def test_selected_difference_is_corrected_for_the_selection():
    random, count = np.random.default_rng(4), 120
    covered, uncorrected, gained = 0, 0, []
    for _ in range(count):
        strategies, alone = equal_strategies(random)
        best = max(strategies, key=lambda row: np.mean(row.valid))
        found = selected_difference(strategies, [alone], best, alone, higher=True)
        low, high = found.comparison.interval
        covered += low <= 0 <= high
        uncorrected += low + found.selection <= 0 <= high + found.selection
        gained.append(found.selection)
    assert 0.5 < np.mean(gained) / (1.63 * 0.01 / 3) < 1  # of the largest of 12 normal values
    assert covered / count >= 0.95 - 2 * (0.95 * 0.05 / count) ** 0.5
    assert uncorrected / count < 0.9


def test_p_of_a_selected_difference_is_corrected_for_the_candidates_of_either_side():
    random = np.random.default_rng(2)
    found = rows(
        **{name: 0.9 + 0.01 * random.normal(size=8) for name in "abcdef"}, z=0.91 + 0.01 * random.normal(size=8)
    )
    one, other, rest = found["z"], found["a"], [found[name] for name in "bcdef"]
    p = {
        sides: selected_difference([one, *sides[0] * rest], [other, *sides[1] * rest], one, other, higher=True).p
        for sides in ((0, 0), (1, 0), (0, 1), (1, 1))
    }
    assert p[0, 0] < min(p[1, 0], p[0, 1]) and max(p[1, 0], p[0, 1]) < p[1, 1] <= 1


def test_selected_difference_on_new_data_is_corrected_for_the_selection():
    random = np.random.default_rng(6)
    strategies, alone = equal_strategies(random)
    named = [replace(row, trials=tuple(f"{row.method} {seed}" for seed in row.seeds)) for row in (*strategies, alone)]
    examples = {}
    for row in named:
        for name, score in zip(row.trials, row.test, strict=True):
            noise = random.normal(size=50)
            examples[name] = score + noise - noise.mean()
    *strategies, alone = named
    best = max(strategies, key=lambda row: np.mean(row.valid))
    found = selected_difference(strategies, [alone], best, alone, True, Scope(examples=examples))
    assert found.selection > 0.001
    assert found.new_data.difference == pytest.approx(best.mean - alone.mean - found.selection)
    assert sum(found.new_data.interval) / 2 == pytest.approx(found.new_data.difference)


def test_selection_gain_is_zero_without_a_choice():
    strategies, alone = equal_strategies(np.random.default_rng(5))
    assert selection_gain(strategies[:1], [alone], higher=True) == 0
    assert selection_gain(strategies, [alone], higher=True) > 0 > selection_gain([alone], strategies, higher=True)
    worst_first = selection_gain(strategies, [alone], higher=False)
    assert worst_first > 0  # the lowest score is selected, and flatters itself as well


def test_differences_on_new_data_need_the_examples_of_both():
    found = rows(concat=[0.5] * 6, gmu=[0.75] * 6)
    found = {name: replace(row, trials=tuple(f"{name} {i}" for i in range(6))) for name, row in found.items()}
    examples = {f"concat {i}": np.array([1.0, 0, 1, 0] * 50) for i in range(6)}
    (alone,) = differences([(found["gmu"], found["concat"])], True, Scope(examples=examples))
    assert alone.new_data is None
    examples |= {f"gmu {i}": np.array([1.0, 1, 1, 0] * 50) for i in range(6)}
    (both,) = differences([(found["gmu"], found["concat"])], True, Scope(examples=examples))
    assert (both.new_data.verdict, both.new_data.examples) == ("better", 200)
    assert both.new_data.difference == pytest.approx(0.25)
    (lower,) = differences([(found["gmu"], found["concat"])], False, Scope(examples=examples))
    assert lower.new_data.verdict == "worse"
