"""Selection on validation."""

import math

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


def test_method_results_are_not_selected_by_the_luckiest_seed():
    plan = trials("gmu", 3, RATES)
    lucky, steady = (0.99, 0.5, 0.5), (0.7, 0.7, 0.7)
    results = {f"gmu-{i}-{s}": result(x, x) for i, scores in enumerate((lucky, steady)) for s, x in enumerate(scores)}
    (row,) = selection.method_results(plan, results, "accuracy")
    assert row.selected == RATES[1] and row.valid == steady


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


def test_best_prefers_fewest_failures_then_validation():
    a = selection.MethodResult("a", False, {}, (), (0, 1), (), (0.9, 0.9), (0.5, 0.5), 1)
    b = selection.MethodResult("b", False, {}, (), (0, 1), (), (0.8, 0.8), (0.9, 0.9), 1)
    failing = selection.MethodResult("failing", False, {}, (), (0,), (1,), (0.99,), (0.99,), 1)
    assert selection.best([failing, b, a], higher=True) is a
    assert selection.best([failing, b, a], higher=False) is b
    # As for a unimodal baseline.
    assert selection.best([failing, b, a], higher=True, fewest_failures_first=False) is failing
