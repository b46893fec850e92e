import dataclasses

import numpy as np
import pytest

from mmfusion.analysis.claims import collapse
from mmfusion.analysis.claims.differences import differences
from mmfusion.analysis.claims.selection import MethodResult


def row(method, scores, collapsed=()):
    seeds = tuple(range(len(scores)))
    trials = tuple(f"{method} {seed}" for seed in seeds)
    scores = tuple(scores)
    return MethodResult(method, False, {}, trials, seeds, (), scores, scores, 1, collapsed_seeds=tuple(collapsed))


@pytest.mark.parametrize(
    ("valid", "expected"),
    [
        ([0.9, 0.91, 0.1, 0.92, 0.89, 0.9], [2]),
        ([0.9, 0.12, 0.1, 0.92, 0.89, 0.11], [1, 2, 5]),
        ([0.9, 0.5, 0.91, 0.92, 0.89, 0.9], []),  # half of the way: not at chance
        ([0.11, 0.1, 0.102, 0.09, 0.108, 0.1], []),  # a modality without information
        ([0.2, 0.5, 0.1, 0.3, 0.8, 0.05], []),  # runs that do not agree
        ([0.9, 0.1], []),
    ],
)
def test_collapsed_runs_are_at_chance_while_others_learned(valid, expected):
    assert np.flatnonzero(collapse.collapsed(valid, 0.1, higher=True)).tolist() == expected
    assert np.flatnonzero(collapse.collapsed([-x for x in valid], -0.1, higher=False)).tolist() == expected


def test_set_apart_moves_collapsed_runs():
    found = collapse.set_apart(row("a", [0.9, 0.1, 0.91, 0.92, 0.9]), 0.1, True)
    assert (found.collapsed_seeds, found.seeds, found.trials[1]) == ((1,), (0, 2, 3, 4), "a 2")
    assert found.mean == pytest.approx(0.9075)
    folds = dataclasses.replace(row("a", [0.9, 0.1, 0.91, 0.92, 0.9]), folds=(0, 1, 2, 3, 4))
    assert collapse.set_apart(folds, 0.1, True) is folds


def test_rates_are_compared_by_fishers_exact_test():
    concat, bad = row("concat", [0.9] * 9), row("bad", [0.9] * 2, collapsed=range(2, 9))
    text = collapse.rate_statement([concat, bad, row("good", [0.9] * 9)], concat).text
    assert "7 of 9 of bad" in text and "good" not in text
    assert "bad (p = 0.00452) differ from concat" in text  # twice 0.00226, as there are two tests
    assert collapse.rate_statement([concat], concat) is None


def test_rare_collapses_make_no_false_difference():
    random, told, naive, count = np.random.default_rng(0), 0, 0, 150
    for _ in range(count):
        scores = 0.9 + 0.01 * random.normal(size=(2, 9))
        collapses = random.random((2, 9)) < [[0.02], [0.2]]
        pair = [row(name, np.where(low, 0.1, x)) for name, low, x in zip("ab", collapses, scores, strict=True)]
        naive += abs(pair[0].mean - pair[1].mean) > 0.05
        (found,) = differences([[collapse.set_apart(each, 0.1, True) for each in pair]], True)
        told += found.verdict in ("better", "worse")
    assert told / count <= 0.05 + 2 * (0.05 * 0.95 / count) ** 0.5
    assert naive / count > 0.5  # what a mean over all runs would say
