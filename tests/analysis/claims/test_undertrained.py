"""Undertrained methods are named, and no claim rests on them."""

import dataclasses

import numpy as np
import pytest

from mmfusion.analysis.claims.claims import claims
from mmfusion.analysis.claims.crossed import NewData
from mmfusion.analysis.claims.differences import Scope, differences
from mmfusion.analysis.claims.undertrained import Training, judge, rise
from tests.analysis.claims.test_claims import SEEDS, around, make_probes, row, texts


def training(scores, every=100, steps=None, higher=True):
    """A run that is validated every 100 steps."""
    history = tuple((every * (i + 1), score) for i, score in enumerate(scores))
    best = (max if higher else min)(history, key=lambda point: point[1])[0]
    return Training(steps or history[-1][0], best, history)


FLAT = training([0.5, 0.6, 0.7, 0.8, 0.9, 0.91, 0.92, 0.92, 0.92, 0.91])
RISING = training([0.1 * (i + 1) for i in range(10)])


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.7, 0.95], 0.15),  # from the best at 8/10
        ([0.1, 0.2, 0.3, 0.4, 0.5, 0.9, 0.7, 0.8, 0.7, 0.9], 0.0),
        ([0.5, 0.6, 0.7, 0.9], 0.2),  # of four validations the last one covers a quarter
        ([0.5, 0.9], 0.4),  # and of two the half
        ([0.9], None),
        ([float("nan"), 0.6, 0.7, 0.6, 0.6], 0.0),
    ],
)
def test_rise_is_that_of_the_best_score_over_the_last_fifth(scores, expected):
    found = rise(training(scores), higher=True)
    assert found == (None if expected is None else pytest.approx(expected))
    falling = rise(training([1 - score for score in scores], higher=False), higher=False)
    assert falling == (None if expected is None else pytest.approx(expected))


def test_method_is_undertrained_if_the_best_step_is_the_last_in_more_than_a_fifth_of_its_runs():
    last = dataclasses.replace(FLAT, best_step=FLAT.steps)
    assert judge("gmu", [FLAT] * 8 + [last] * 2, True, 0.01) is None
    found = judge("gmu", [FLAT] * 7 + [last] * 2, True, 0.01)
    assert (found.runs, found.best_last, found.rise) == (9, 2, 0.0)


def test_method_is_undertrained_if_its_score_still_rises():
    slow = training([0.80, 0.81, 0.82, 0.83, 0.84, 0.85, 0.86, 0.87, 0.88, 0.87])  # best before the last step
    assert judge("gmu", [slow], True, 0.02) is None
    found = judge("gmu", [slow], True, 0.01)
    assert found.best_last == 0 and found.rise == pytest.approx(0.01) and found.margin == pytest.approx(0.0088)
    assert judge("gmu", [slow, FLAT, FLAT], True, 0.01) is None  # in the mean


def test_run_that_early_stopping_ended_is_trained_out():
    stopped = training([0.5, 0.7, 0.9, 0.89, 0.9], steps=500)  # the first of equal ones is the best
    assert stopped.best_step == 300 and judge("gmu", [stopped] * 3, True, 0.0) is None


def test_method_whose_training_is_not_seen_is_undertrained():
    assert judge("gmu", [Training(8, 4, ())], True, 0.01).rise is None
    assert judge("gmu", [training([0.9])], True, 0.01).rise is None


def scope(late, methods, **options):
    runs = {f"{method} {i}": RISING if method in late else FLAT for method in methods for i in range(SEEDS)}
    return Scope(training=runs, **options)


METHODS = ("concat", "gmu", "film", "image alone", "text alone")


def made(late, levels=None, probes=None, **options):
    levels = {"concat": 0.8, "gmu": 0.9, "film": 0.7, "image alone": 0.6, "text alone": 0.5, **(levels or {})}
    rows = [row(name, around(levels[name]), unimodal_baseline="alone" in name) for name in METHODS]
    return claims(rows, [], probes or {}, {}, "accuracy", True, scope(late, METHODS, **options))


def test_claims_without_an_undertrained_method_are_unchanged():
    found = made(())
    assert found.undertrained == () and not texts(found, "undertrained")
    assert found.statements[0].text.startswith("Fusion helps: gmu (of the 3 strategies tried) scores 0.9000")
    assert texts(found, "strategies") == ["Better than concat: gmu.", "Worse than concat: film."]


@pytest.mark.parametrize("late", ["gmu", "image alone", "text alone"])  # any floor might be the best if trained out
def test_fusion_is_not_claimed_to_help_if_the_best_or_a_baseline_is_undertrained(late):
    found = made((late,))
    assert [one.method for one in found.undertrained] == [late]
    statement, fusion = found.statements[:2]
    assert statement.about == "undertrained" and fusion.about == "fusion" and fusion.verdict == "cannot tell"
    assert statement.text.startswith(
        f"Undertrained, so that no claim rests on them: {late} (the best step is the last one in 8 of 8 runs; "
        "validation accuracy improves by 0.2000 over the last fifth of training, margin 0.0100)."
    )
    assert fusion.text.startswith(f"Fusion is not shown to help, as {late} is undertrained: gmu (of the 3 strategies")
    assert "seeds would tell" not in fusion.text
    assert "A method is undertrained if" in found.rule


def test_fusion_may_help_while_a_worse_strategy_is_undertrained_but_not_hurt():
    assert made(("film",)).statements[1].text.startswith("Fusion helps: gmu")
    hurts = made((), {"image alone": 0.95}).statements[0]
    assert hurts.text.startswith("Fusion hurts: gmu")
    late = made(("film", "concat"), {"image alone": 0.95}).statements[1]
    assert late.verdict == "cannot tell" and "as concat and film are undertrained" in late.text
    equal = made(("film",), {"image alone": 0.9}).statements[1]
    assert equal.verdict == "cannot tell" and "as film is undertrained" in equal.text


def test_strategies_are_not_compared_where_one_is_undertrained():
    found = made(("film",))
    assert texts(found, "strategies") == [
        "Better than concat: gmu.", "Not compared with concat, as one of the two is undertrained: film.",
    ]  # fmt: skip
    by_name = {one.method: one for one in found.against_reference}
    assert by_name["film"].verdict == "cannot tell" and by_name["film"].undertrained == ("film",)
    assert by_name["film"].seeds_needed is None and by_name["film"].comparison.difference == pytest.approx(-0.1)
    assert texts(made(("concat",)), "strategies") == [
        "Not compared with concat, as one of the two is undertrained: gmu and film."
    ]
    late = {one.method: one.verdict for one in made(("image alone",)).against_unimodal}
    assert set(late.values()) == {"cannot tell"}


def test_claims_on_new_data_do_not_rest_on_undertrained_methods():
    rows = [row("gmu", around(0.9)), row("concat", around(0.7))]
    examples = {f"{name} {i}": np.arange(4_000) % 10 < hits for name, hits in (("gmu", 9), ("concat", 7))
                for i in range(SEEDS)}  # fmt: skip
    examples = {name: scores.astype(float) for name, scores in examples.items()}
    for late, expected in ((frozenset(), "better"), (frozenset({"concat"}), "cannot tell")):
        (one,) = differences([(rows[0], rows[1])], True, Scope(examples=examples, undertrained=late))
        assert isinstance(one.new_data, NewData) and one.new_data.verdict == one.verdict == expected


def test_classical_baseline_and_probes_are_not_claimed_of_an_undertrained_best():
    found = make_probes("gmu", additive=0.5, permuted={"image": 0.4, "text": 0.3})
    joint = [row("svm, image+text", [0.5] * SEEDS)]
    rows = [row("gmu", around(0.9))]
    for late, start in ((("gmu",), "Not claimed, as gmu is undertrained: gmu relies"), ((), "gmu relies on")):
        result = claims(rows, joint, found, {}, "accuracy", True, scope(late, ("gmu",)))
        assert texts(result, "interaction")[0].startswith(start)
        told = {one.verdict for one in result.statements if one.about in ("interaction", "modality", "classical")}
        assert told == ({"cannot tell"} if late else {"better"})
    assert texts(claims(rows, joint, {}, {}, "accuracy", True, scope(("gmu",), ("gmu",))), "classical")[0].startswith(
        "gmu is not claimed to differ, as gmu is undertrained, from the best classical baseline"
    )


def test_collapsed_runs_are_not_judged_for_being_undertrained():
    scores = [*around(0.9)[:6], 0.51, 0.5]
    rows = [row("gmu", scores)]
    runs = {f"gmu {i}": FLAT if i < 6 else dataclasses.replace(FLAT, best_step=FLAT.steps) for i in range(SEEDS)}
    majority = [row("majority", [0.5] * SEEDS, unimodal_baseline=True)]
    found = claims(rows, majority, {}, {}, "accuracy", True, Scope(training=runs))
    assert texts(found, "collapsed") and found.undertrained == ()


def test_methods_with_failed_tuning_are_named():
    assert texts(made((), untuned=("film",)), "untuned") == [
        "Tuning failed with every setting, and the config's own values were used: film."
    ]


def test_ensembles_of_an_undertrained_modality_are_undertrained():
    rows = [row("gmu", around(0.9)), row("image alone", around(0.6), unimodal_baseline=True)]
    rows += [row("ensemble (mean)", around(0.7), unimodal_baseline=True)]
    runs = {name: FLAT for one in rows[:2] for name in one.trials}
    trained = claims(rows, [], {}, {}, "accuracy", True, Scope(training=runs))
    assert {one.verdict for one in trained.against_unimodal} == {"better"}
    runs |= dict.fromkeys(rows[1].trials, RISING)
    made = claims(rows, [], {}, {}, "accuracy", True, Scope(training=runs))
    (difference,) = made.against_unimodal
    assert (difference.verdict, difference.undertrained) == ("cannot tell", ("ensemble (mean)",))
