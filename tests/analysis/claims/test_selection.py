"""What runs say: validation chooses, test decides, and no more is claimed than there is evidence for."""

import math

import pytest

from mmfusion import config as configs
from mmfusion.analysis.ablation.plan import Cell
from mmfusion.analysis.claims import selection
from mmfusion.errors import UserError
from tests import tiny

CONFIG = configs.to_json(tiny.config())


def cells(method, seeds, tried=({},), floor=False):
    return [
        Cell(f"{method}-{i}-{seed}", method, method, "", floor, one, {**CONFIG, "seed": seed})
        for i, one in enumerate(tried) for seed in range(seeds)
    ]  # fmt: skip


def result(valid, test):
    return {"valid": {"accuracy": valid, "loss": 1.0}, "test": {"accuracy": test, "loss": 1.0}, "parameters": 10}


RATES = ({"optim.learning_rate": 1e-3}, {"optim.learning_rate": 3e-4})


def test_validation_chooses_and_test_is_not_asked():
    plan = cells("gmu", 3, RATES)
    results = {f"gmu-0-{s}": result(0.8, 0.99) for s in range(3)} | {f"gmu-1-{s}": result(0.9, 0.5) for s in range(3)}
    (row,) = selection.rows(plan, results, "accuracy")
    assert row.chosen == RATES[1]
    assert (row.mean, row.seeds, row.lost, row.parameters) == (0.5, (0, 1, 2), (), 10)


def test_a_value_that_lost_a_seed_is_not_chosen_before_one_that_lost_none():
    plan = cells("gmu", 2, RATES)
    results = {"gmu-0-0": result(0.99, 0.99), "gmu-0-1": result(None, None)}
    results |= {"gmu-1-0": result(0.6, 0.6), "gmu-1-1": result(0.6, 0.6)}
    (row,) = selection.rows(plan, results, "accuracy")
    assert row.chosen == RATES[1] and not row.lost


def test_what_diverged_on_every_seed_is_a_row_without_numbers():
    plan = cells("gmu", 3)
    (row,) = selection.rows(plan, {"gmu-0-0": result(math.nan, 0.9), "gmu-0-1": result(None, None)}, "accuracy")
    assert (row.seeds, row.lost, row.test, row.parameters) == ((), (0, 1, 2), (), None)
    assert math.isnan(row.mean)
    assert selection.best([row], higher=True) is None
    with pytest.raises(UserError, match="--metric=rmse: choose"):
        selection.rows(plan, {}, "rmse")


def rows(**scores):
    return {
        name: selection.Row(name, name == "alone", {}, (), tuple(range(len(x))), (), tuple(x), tuple(x), 1)
        for name, x in scores.items()
    }


def test_differences_are_paired_corrected_and_directed():
    noise = [0.01, -0.01, 0.02, 0.0, -0.02, 0.01, 0.015, -0.015]
    found = rows(
        concat=[0.8 + e for e in noise],
        clear=[0.9 + e + 0.001 * i for i, e in enumerate(noise)],
        same=[0.8 + e + 0.01 * (-1) ** i for i, e in enumerate(noise)],
    )
    others = [(found[name], found["concat"]) for name in ("clear", "same")]
    clear, same = selection.differences(others, higher=True)
    assert (clear.verdict, clear.p, clear.seeds_needed) == ("better", pytest.approx(2 * 2 / 2**8), None)
    assert same.verdict == "cannot tell" and same.p >= 0.05
    clear, _ = selection.differences(others, higher=False)
    assert clear.verdict == "worse"  # as a loss


def test_only_seeds_that_both_ended_are_compared():
    found = rows(concat=[0.8] * 8, gmu=[0.9] * 8)
    short = selection.Row("short", False, {}, (), (6, 7), (0, 1, 2, 3, 4, 5), (0.9, 0.9), (0.9, 0.9), 1)
    one = selection.Row("one", False, {}, (), (7,), (), (0.9,), (0.9,), 1)
    pairs = [(row, found["concat"]) for row in (found["gmu"], short, one)]
    gmu, two, single = selection.differences(pairs, higher=True)
    assert (gmu.verdict, gmu.comparison.n, gmu.p) == ("better", 8, pytest.approx(2 * 2 / 2**8))
    assert (two.comparison.n, two.verdict, two.lost) == (2, "cannot tell", (0, 1, 2, 3, 4, 5))
    assert two.seeds_needed == 7  # the exact test asks for at least that, of two comparisons
    assert (single.comparison, single.p, single.verdict) == (None, None, "cannot tell")


def test_the_best_is_by_validation_and_loses_no_seed():
    a = selection.Row("a", False, {}, (), (0, 1), (), (0.9, 0.9), (0.5, 0.5), 1)
    b = selection.Row("b", False, {}, (), (0, 1), (), (0.8, 0.8), (0.9, 0.9), 1)
    lost = selection.Row("lost", False, {}, (), (0,), (1,), (0.99,), (0.99,), 1)
    assert selection.best([lost, b, a], higher=True) is a
    assert selection.best([lost, b, a], higher=False) is b
    assert selection.best([lost, b, a], higher=True, failing_last=False) is lost  # a floor is what it reaches


def test_what_was_chosen_of_many_is_held_against_the_best_of_them():
    noise = [0.01, -0.01, 0.02, 0.0, -0.02, 0.01, 0.015, -0.015]
    found = rows(
        alone=[0.8] * 8,
        a=[0.8 + e for e in noise],
        b=[0.9 + e for e in noise],
        c=[0.5 + e for e in noise[::-1]],
    )
    several = [found[name] for name in "abc"]
    clear = selection.chosen_difference(several, [found["alone"]], found["b"], found["alone"], higher=True)
    assert (clear.verdict, clear.p) == ("better", 2 / 2**8)
    luck = rows(alone=[0.8] * 8, **{f"s{i}": [0.8 + e for e in noise[i:] + noise[:i]] for i in range(8)})
    one = selection.chosen_difference([luck["s0"]], [luck["alone"]], luck["s0"], luck["alone"], higher=True)
    every = [row for name, row in luck.items() if name != "alone"]
    many = selection.chosen_difference(every, [luck["alone"]], luck["s0"], luck["alone"], higher=True)
    assert one.p < many.p
    assert many.verdict == "cannot tell"
