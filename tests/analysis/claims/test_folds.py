"""Statistics and claims over folds: a value by hand, false claims under the null, and no test of independent runs."""

import dataclasses

import numpy as np
import pytest

from mmfusion import config as configs
from mmfusion.analysis.ablation.plan import Trial
from mmfusion.analysis.claims import differences, folds, probes, selection, significance
from mmfusion.analysis.claims.claims import claims
from mmfusion.analysis.claims.selection import MethodResult
from tests import tiny
from tests.analysis.claims.test_claims import make_probes, texts

FOLDS, SEEDS = 5, 2
RATIO = 1 / (FOLDS - 1)


def row(method, scores, *, unimodal_baseline=False, valid=None, ratio=RATIO):
    """Returns the result of a method with the mean score of each fold, and `SEEDS` seeds around it."""
    test = tuple(score + spread for score in scores for spread in (0.01, -0.01))
    cells = [(fold, seed) for fold in range(len(scores)) for seed in range(SEEDS)]
    return MethodResult(
        method=method,
        unimodal_baseline=unimodal_baseline,
        selected={},
        trials=tuple(f"{method} {i}" for i in range(len(cells))),
        seeds=tuple(seed for _, seed in cells),
        failed_seeds=(),
        valid=tuple(valid or test),
        test=test,
        parameters=1,
        fusion="" if unimodal_baseline else method,
        folds=tuple(fold for fold, _ in cells),
        test_over_train=ratio,
    )


def test_corrected_t_is_the_value_by_hand():
    # Mean 0.05, sample variance 0.0028 / 4, factor 1/5 + 1/4: t² = 0.0025 / (0.45 · 0.0007) = 500/63.
    t, p = folds.corrected_t([0.02, 0.04, 0.06, 0.04, 0.09], RATIO)
    assert t**2 == pytest.approx(500 / 63)
    # The distribution of Student's t with 4 degrees of freedom in closed form.
    one = 1 + t**2 / 4
    assert p == pytest.approx(1 - 2 * 3 / 8 * t / one**0.5 * (1 - t**2 / one / 12))
    assert p == pytest.approx(0.04797, abs=1e-5)
    low, high = folds.corrected_interval([0.02, 0.04, 0.06, 0.04, 0.09], RATIO)
    assert (low, high) == pytest.approx((0.05 - 2.776445 * 0.0177482, 0.05 + 2.776445 * 0.0177482), abs=1e-6)
    assert folds.corrected_t([-0.02, -0.04, -0.06, -0.04, -0.09], RATIO) == pytest.approx((-t, p))
    assert folds.corrected_t([0.0, 0.0, 0.0], RATIO) == (0.0, 1.0)


def learners_of_equal_accuracy(random, rows, count):
    """Returns in each fold the difference in accuracy of the same learner on two inputs that tell the label alike."""
    labels = np.where(np.arange(rows) % 2, 1.0, -1.0)
    inputs = 0.13 * labels[:, None, None] + random.normal(size=(rows, 2, 5))  # [n, 2, F]
    fold = random.permutation(np.arange(rows) % count)
    differences = []
    for number in range(count):
        train, test = fold != number, fold == number
        weights = (inputs[train] * labels[train, None, None]).mean(axis=0)  # [2, F], between the classes' means
        right = (inputs[test] * weights).sum(axis=-1) * labels[test, None] > 0  # [n_test, 2]
        differences.append(float(right[:, 0].mean() - right[:, 1].mean()))
    return differences


@pytest.mark.parametrize(("rows", "count"), [(60, 5), (100, 10)])
def test_corrected_t_keeps_the_false_positive_rate_where_the_plain_t_does_not(rows, count):
    random, runs = np.random.default_rng(0), 400
    found = [learners_of_equal_accuracy(random, rows, count) for _ in range(runs)]
    allowed = 0.05 + 2 * (0.05 * 0.95 / runs) ** 0.5
    assert np.mean([folds.corrected_t(values, 1 / (count - 1))[1] < 0.05 for values in found]) <= allowed
    assert np.mean([folds.corrected_t(values, 0.0)[1] < 0.05 for values in found]) > allowed


def test_claims_over_folds_keep_the_family_wise_false_positive_rate():
    """Six strategies and three baselines of equal mean; folds correlate as overlapping training rows make them."""
    random, runs, fusion_errors, strategy_errors = np.random.default_rng(7), 150, 0, 0
    for _ in range(runs):
        shared = random.normal(size=(9, 1)) * RATIO**0.5  # correlation n_test / n of the folds
        scores = 0.8 + 0.01 * (shared + random.normal(size=(9, FOLDS)))
        names = ["concat", *(f"s{i}" for i in range(5)), *(f"m{i} alone" for i in range(3))]
        rows = [row(name, own, unimodal_baseline="alone" in name) for name, own in zip(names, scores, strict=True)]
        made = claims(rows, [], {}, {}, "accuracy", higher=True)
        fusion_errors += made.statements[0].verdict in ("better", "worse")
        strategy_errors += any(one.verdict in ("better", "worse") for one in made.against_reference)
    allowed = (0.05 + 2 * (0.05 * 0.95 / runs) ** 0.5) * runs
    assert fusion_errors <= allowed and strategy_errors <= allowed


def test_comparison_over_folds_uses_means_of_folds_and_no_resampling(monkeypatch):
    for name in ("max_t", "mean_interval", "compare", "seeds_needed", "on_new_data", "selection_gain"):
        for module in (significance, selection, differences, probes):
            if hasattr(module, name):
                monkeypatch.setattr(module, name, lambda *_, name=name: pytest.fail(f"{name} needs independent runs"))
    scores = [0.02, 0.04, 0.06, 0.04, 0.09]
    other = row("concat", [0.8, 0.81, 0.79, 0.8, 0.8])
    own = row("gmu", [base + added for base, added in zip(other.units, scores, strict=True)])
    (difference,) = differences.differences([(own, other)], higher=True)
    assert difference.comparison == significance.Comparison(
        difference=pytest.approx(0.05), interval=pytest.approx(folds.corrected_interval(scores, RATIO)),
        narrow_interval=pytest.approx(folds.corrected_interval(scores, RATIO, 0.9)),
        p=pytest.approx(0.047968, abs=1e-5), better=1.0, n=FOLDS, over="folds", variance_factor=pytest.approx(0.45),
    )  # fmt: skip
    assert (difference.verdict, difference.seeds_needed) == ("better", None)
    (worse,) = differences.differences([(own, other)], higher=False)
    assert worse.verdict == "worse"
    first, second = differences.differences([(own, other), (own, other)], higher=True)
    assert first.verdict == second.verdict == "cannot tell" and first.p == pytest.approx(2 * 0.047968, abs=1e-5)
    # One of two candidates against one of three: six pairs.
    chosen = differences.selected_difference([own, other], [other, own, own], own, other, higher=True)
    assert chosen.p == pytest.approx(6 * 0.047968, abs=1e-4) and chosen.verdict == "cannot tell"
    assert own.interval == pytest.approx(folds.corrected_interval(own.units, RATIO))
    alone = row("image alone", [0.1, 0.12, 0.09, 0.1, 0.11], unimodal_baseline=True)
    found = make_probes("gmu", additive=0.5, permuted={"image": 0.4, "text": 0.0}, seeds=FOLDS * SEEDS)
    made = claims([own, other, alone], [], found, {}, "accuracy", higher=True)
    assert texts(made, "fusion")[0].startswith(
        "Fusion helps: gmu (of the 2 strategies tried) scores 0.8500, the best unimodal baseline (image alone)"
    )
    assert "over 5 folds (95 % CI " in texts(made, "fusion")[0] and "corrected resampled t" in texts(made, "fusion")[0]
    assert "Nadeau and Bengio 2003" in made.rule
    assert texts(made, "strategies") == ["Better than concat: gmu."]
    image, text = texts(made, "modality")
    assert "2048 test examples in each of 5 folds, corrected resampled t" in image
    assert "text contributes nothing" in text
    evidence = [one.evidence for one in made.statements if one.about in ("modality", "interaction")]
    assert {(one.n, one.over) for one in evidence} == {(FOLDS, "folds")}


def test_claims_over_folds_need_three_of_them():
    rows = [row("gmu", [0.9, 0.91]), row("image alone", [0.1, 0.12], unimodal_baseline=True)]
    made = claims(rows, [], {}, {}, "accuracy", higher=True)
    assert made.none == "No claims: gmu has a score in 2 folds, and a difference needs at least 3."
    (difference,) = differences.differences([(rows[0], rows[1])], higher=True)
    assert difference.comparison is None and difference.verdict == "cannot tell"
    one_seed = [
        dataclasses.replace(each, seeds=(0,) * 3, folds=(0, 1, 2), trials=each.trials[:3], test=test, valid=test)
        for each, test in zip(rows, ((0.9, 0.91, 0.89), (0.1, 0.12, 0.11)), strict=True)
    ]  # fmt: skip
    made = claims(one_seed, [], {}, {}, "accuracy", higher=True)
    assert made.statements[0].verdict == "better" and "over 3 folds" in made.statements[0].text


def test_comparison_over_folds_leaves_out_failed_runs():
    own, other = row("gmu", [0.9, 0.91, 0.92, 0.9, 0.89]), row("concat", [0.5, 0.52, 0.51, 0.53, 0.5])
    kept = [i for i in range(10) if i not in (2, 4, 5)]  # seed 0 of fold 1, and both of fold 2
    failing = dataclasses.replace(
        own,
        **{name: tuple(getattr(own, name)[i] for i in kept) for name in ("trials", "seeds", "folds", "test", "valid")},
        failed_seeds=(0, 0, 1), failed_folds=(1, 2, 2),
    )  # fmt: skip
    (difference,) = differences.differences([(failing, other)], higher=True)
    expected = np.array([0.4, 0.39, 0.37, 0.39])  # in fold 1 of seed 1 in both
    assert difference.comparison.n == 4 and difference.comparison.difference == pytest.approx(expected.mean())
    assert (difference.failed_folds, difference.failed_seeds) == ((1, 2), ())
    made = claims([failing, other], [], {}, {}, "accuracy", higher=True)
    assert texts(made, "strategies") == [
        "Better than concat: gmu (without the seeds of fold 1 and 2 where one of the two failed)."
    ]


def test_hyperparameters_are_selected_in_each_fold_by_itself():
    config, rates = configs.to_json(tiny.config()), (1e-3, 3e-4)
    trials = [
        Trial(f"{rate}-{fold}", "gmu", "gmu", "", False, {"optim.learning_rate": rate, "optim.b1": 0.9},
              {**config, "data": {**config["data"], "folds": 2, "fold": fold}})
        for fold in range(2) for rate in rates
    ]  # fmt: skip
    valid = {"0.001-0": 0.9, "0.0003-0": 0.1, "0.001-1": 0.5, "0.0003-1": 0.6}  # 0.001 is better over both folds
    results = {
        name: {"valid": {"accuracy": score}, "test": {"accuracy": score}, "parameters": 1,
               "data": {"examples": {"train": 60, "test": 30 if name.endswith("0") else 18}}}
        for name, score in valid.items()
    }  # fmt: skip
    (found,) = selection.method_results(trials, results, "accuracy")
    assert (found.trials, found.folds, found.seeds) == (("0.001-0", "0.0003-1"), (0, 1), (0, 0))
    assert found.selected == {"optim.learning_rate": "by fold", "optim.b1": 0.9}
    assert found.test_over_train == pytest.approx((30 / 60 + 18 / 60) / 2)
