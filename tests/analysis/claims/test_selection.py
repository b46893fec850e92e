"""Selection on validation, and paired differences on test."""

import math

import pytest

from mmfusion import config as configs
from mmfusion.analysis.ablation.plan import Trial
from mmfusion.analysis.claims import selection
from tests import tiny
from tests.errors import rejects

CONFIG = configs.to_json(tiny.config())


def trials(method, seeds, search_space=({},), unimodal_baseline=False):
    return [
        Trial(f"{method}-{i}-{seed}", method, method, "", unimodal_baseline, values, {**CONFIG, "seed": seed})
        for i, values in enumerate(search_space) for seed in range(seeds)
    ]  # fmt: skip


def result(valid, test):
    return {"valid": {"accuracy": valid, "loss": 1.0}, "test": {"accuracy": test, "loss": 1.0}, "parameters": 10}


RATES = ({"optim.learning_rate": 1e-3}, {"optim.learning_rate": 3e-4})


def test_method_results_select_on_validation_only():
    plan = trials("gmu", 3, RATES)
    results = {f"gmu-0-{s}": result(0.8, 0.99) for s in range(3)} | {f"gmu-1-{s}": result(0.9, 0.5) for s in range(3)}
    (row,) = selection.method_results(plan, results, "accuracy")
    assert row.selected == RATES[1]
    assert (row.mean, row.seeds, row.failed_seeds, row.parameters) == (0.5, (0, 1, 2), (), 10)


def test_method_results_rank_failed_seeds_last():
    plan = trials("gmu", 2, RATES)
    results = {"gmu-0-0": result(0.99, 0.99), "gmu-0-1": result(None, None)}
    results |= {"gmu-1-0": result(0.6, 0.6), "gmu-1-1": result(0.6, 0.6)}
    (row,) = selection.method_results(plan, results, "accuracy")
    assert row.selected == RATES[1] and not row.failed_seeds


def test_method_results_of_a_diverged_method_are_empty():
    plan = trials("gmu", 3)
    (row,) = selection.method_results(
        plan, {"gmu-0-0": result(math.nan, 0.9), "gmu-0-1": result(None, None)}, "accuracy"
    )
    assert (row.seeds, row.failed_seeds, row.test, row.parameters) == ((), (0, 1, 2), (), None)
    assert math.isnan(row.mean)
    assert selection.best([row], higher=True) is None
    with rejects("--metric", "rmse", "accuracy"):
        selection.method_results(plan, {}, "rmse")


def rows(**scores):
    return {
        name: selection.MethodResult(name, name == "alone", {}, (), tuple(range(len(x))), (), tuple(x), tuple(x), 1)
        for name, x in scores.items()
    }


def test_differences_are_paired_corrected_and_signed():
    noise = [0.01, -0.01, 0.02, 0.0, -0.02, 0.01, 0.015, -0.015]
    found = rows(
        concat=[0.8 + e for e in noise],
        clear=[0.9 + e + 0.001 * i for i, e in enumerate(noise)],
        same=[0.8 + e + 0.01 * (-1) ** i for i, e in enumerate(noise)],
    )
    others = [(found[name], found["concat"]) for name in ("clear", "same")]
    clear, same = selection.differences(others, higher=True)
    assert (clear.verdict, clear.p, clear.seeds_needed) == ("better", pytest.approx(2 * 2 / 2**8), None)
    assert same.verdict == "inconclusive" and same.p >= 0.05
    clear, _ = selection.differences(others, higher=False)
    assert clear.verdict == "worse"  # as a loss


def test_differences_use_seeds_finished_by_both_methods():
    found = rows(concat=[0.8] * 8, gmu=[0.9] * 8)
    short = selection.MethodResult("short", False, {}, (), (6, 7), (0, 1, 2, 3, 4, 5), (0.9, 0.9), (0.9, 0.9), 1)
    single_seed = selection.MethodResult("one", False, {}, (), (7,), (), (0.9,), (0.9,), 1)
    pairs = [(row, found["concat"]) for row in (found["gmu"], short, single_seed)]
    gmu, two, single = selection.differences(pairs, higher=True)
    assert (gmu.verdict, gmu.comparison.n, gmu.p) == ("better", 8, pytest.approx(2 * 2 / 2**8))
    assert (two.comparison.n, two.verdict, two.failed_seeds) == (2, "inconclusive", (0, 1, 2, 3, 4, 5))
    assert two.seeds_needed == 7  # the minimum of the exact test for two comparisons
    assert (single.comparison, single.p, single.verdict) == (None, None, "inconclusive")


def test_best_prefers_fewest_failures_then_validation():
    a = selection.MethodResult("a", False, {}, (), (0, 1), (), (0.9, 0.9), (0.5, 0.5), 1)
    b = selection.MethodResult("b", False, {}, (), (0, 1), (), (0.8, 0.8), (0.9, 0.9), 1)
    failing = selection.MethodResult("failing", False, {}, (), (0,), (1,), (0.99,), (0.99,), 1)
    assert selection.best([failing, b, a], higher=True) is a
    assert selection.best([failing, b, a], higher=False) is b
    # As for a unimodal baseline.
    assert selection.best([failing, b, a], higher=True, fewest_failures_first=False) is failing


def test_selected_difference_corrects_for_the_selection():
    noise = [0.01, -0.01, 0.02, 0.0, -0.02, 0.01, 0.015, -0.015]
    found = rows(
        alone=[0.8] * 8,
        a=[0.8 + e for e in noise],
        b=[0.9 + e for e in noise],
        c=[0.5 + e for e in noise[::-1]],
    )
    candidates = [found[name] for name in "abc"]
    clear = selection.selected_difference(candidates, [found["alone"]], found["b"], found["alone"], higher=True)
    assert (clear.verdict, clear.p) == ("better", 2 / 2**8)
    by_chance = rows(alone=[0.8] * 8, **{f"s{i}": [0.8 + e for e in noise[i:] + noise[:i]] for i in range(8)})
    one = selection.selected_difference(
        [by_chance["s0"]], [by_chance["alone"]], by_chance["s0"], by_chance["alone"], higher=True
    )
    strategies = [row for name, row in by_chance.items() if name != "alone"]
    many = selection.selected_difference(
        strategies, [by_chance["alone"]], by_chance["s0"], by_chance["alone"], higher=True
    )
    assert one.p < many.p
    assert many.verdict == "inconclusive"
