"""Claims state no more than the seeds support, with the correct sign."""

import dataclasses

import numpy as np
import pytest

from mmfusion.analysis.claims.claims import claims
from mmfusion.analysis.claims.differences import Scope
from mmfusion.analysis.claims.selection import MethodResult

SEEDS = 8


def row(method, scores, *, unimodal_baseline=False, valid=None):
    return MethodResult(
        method=method,
        unimodal_baseline=unimodal_baseline,
        selected={},
        trials=tuple(f"{method} {i}" for i in range(len(scores))),
        seeds=tuple(range(len(scores))),
        failed_seeds=(),
        valid=tuple(valid or scores),
        test=tuple(scores),
        parameters=1,
        fusion="" if unimodal_baseline else method.partition(" ")[0],
        variation=method.partition(" ")[2] if not unimodal_baseline else "",
    )


def around(mean, spread=0.004, seeds=SEEDS):
    return [mean + spread * (i - (seeds - 1) / 2) / seeds for i in range(seeds)]


def make_probes(method, *, additive, permuted, seeds=SEEDS):
    return {
        f"{method} {i}": {
            "metric": "accuracy",
            "sign": 1,
            "rows": 2048,
            "paired": 256,
            "subsets": {"": 0.5, "image": 0.6, "text": 0.7, "image+text": 0.9},
            "perceptual": {m: share + 0.001 * (i % 2) for m, share in permuted.items()},
            "interaction": {"image": {"whole": [0.9, 0.9], "additive": [additive + 0.001 * (i % 3)] * 2}},
        }
        for i in range(seeds)
    }


def texts(made, about):
    return [statement.text for statement in made.statements if statement.about == about]


def test_fusion_claim_helps_when_every_seed_agrees():
    rows = [row("gmu", around(0.9)), row("image alone", around(0.7), unimodal_baseline=True)]
    made = claims(rows, [], {}, {}, "accuracy", higher=True)
    assert texts(made, "fusion")[0].startswith(
        "Fusion helps: gmu scores 0.9000, the best unimodal baseline (image alone) 0.7000; +0.2000"
    )
    assert made.best == "gmu" and not made.none


def test_fusion_claim_hurts_or_cannot_tell():
    baseline = row("image alone", around(0.7), unimodal_baseline=True)
    worse = claims([row("gmu", around(0.5)), baseline], [], {}, {}, "accuracy", higher=True)
    assert texts(worse, "fusion")[0].startswith("Fusion hurts")
    noisy = row("gmu", [0.7 + (0.01 if i % 2 else -0.009) for i in range(SEEDS)])
    unclear = claims([noisy, baseline], [], {}, {}, "accuracy", higher=True)
    assert texts(unclear, "fusion")[0].startswith("Fusion is not shown to help: ")


def test_fusion_claim_handles_metrics_where_lower_is_better():
    rows = [row("gmu", around(0.2)), row("image alone", around(0.5), unimodal_baseline=True)]
    made = claims(rows, [], {}, {}, "mae", higher=False)
    assert texts(made, "fusion")[0].startswith("Fusion helps")
    assert "lower is better" in texts(made, "fusion")[0]


def test_best_method_is_selected_on_validation():
    rows = [row("gmu", around(0.8), valid=around(0.9)), row("film", around(0.95), valid=around(0.6))]
    assert claims(rows, [], {}, {}, "accuracy", higher=True).best == "gmu"


def test_unimodal_baseline_may_be_classical():
    rows = [row("gmu", around(0.9)), row("image alone", around(0.7), unimodal_baseline=True)]
    classical = [
        row("linear_svm, text", [0.8] * SEEDS, unimodal_baseline=True),
        row("linear_svm, image+text", [0.95] * SEEDS),
    ]
    made = claims(rows, classical, {}, {}, "accuracy", higher=True)
    assert "the best unimodal baseline (linear_svm, text) 0.8000" in texts(made, "fusion")[0]
    assert (
        "gmu underperforms the best classical baseline on all modalities (linear_svm, image+text: 0.9500)"
        in (texts(made, "classical")[0])
    )
    assert made.best == "gmu"


@pytest.mark.parametrize(
    ("other", "claim"),
    [(0.93, "outperforms"), (0.85, "underperforms"), (0.9005, "is equivalent to")],
)
def test_best_other_strategy_is_compared_with_late_transformer(other, claim):
    rows = [row("late_transformer", around(0.9)), row("gmu", around(other)), row("concat", around(0.6))]
    made = claims(rows, [], {}, {}, "accuracy", higher=True, scope=Scope(tuned=8))
    (text,) = texts(made, "strong baseline")
    assert text.startswith(
        f"gmu (of the 2 other strategies tried, each with 8 settings) {claim} the strong baseline late_transformer "
        "(tuned with 8 settings: 0.9000); "
    )
    untuned = texts(claims(rows, [], {}, {}, "accuracy", higher=True), "strong baseline")[0]
    assert untuned.startswith(
        f"gmu (of the 2 other strategies tried) {claim} the strong baseline late_transformer (not "
    )
    alone = claims(rows[:1], [], {}, {}, "accuracy", higher=True)
    assert not texts(alone, "strong baseline") + texts(
        claims(rows[1:], [], {}, {}, "accuracy", True), "strong baseline"
    )


def test_comparison_with_late_transformer_is_corrected_for_the_selection_of_the_other():
    random = np.random.default_rng(1)
    luck = [0.9 + 0.02 * random.normal(size=SEEDS) for _ in range(9)]
    rows = [row("late_transformer", luck[0].tolist()), *(row(f"s{i}", x.tolist()) for i, x in enumerate(luck[1:]))]
    text = texts(claims(rows, [], {}, {}, "accuracy", higher=True), "strong baseline")[0]
    assert "is not distinguishable from the strong baseline" in text
    assert "for the selection. About " in text and " seeds would tell." in text


def test_ensembles_of_single_modalities_are_unimodal_baselines():
    rows = [
        row("gmu", around(0.9)),
        row("image alone", around(0.7), unimodal_baseline=True),
        row("ensemble (mean)", around(0.92), unimodal_baseline=True),
        row("ensemble (stacked)", around(0.8), unimodal_baseline=True),
    ]
    made = claims(rows, [], {}, {}, "accuracy", higher=True)
    assert texts(made, "fusion")[0].startswith(
        "Fusion hurts: gmu scores 0.9000, the best unimodal baseline (ensemble (mean)) 0.9200; -0.0200"
    )
    assert {one.other for one in made.against_unimodal} == {"ensemble (mean)"}
    assert "the ensembles of these runs" in made.rule


def test_strategy_claims_are_grouped_by_verdict():
    noise = np.random.default_rng(0).normal(scale=0.03, size=SEEDS)
    rows = [
        row("concat", around(0.8)),
        row("gmu", around(0.9)),
        row("mean", around(0.6)),
        row("max", [a + b for a, b in zip(around(0.801), noise - noise.mean(), strict=True)]),
    ]
    groups = texts(claims(rows, [], {}, {}, "accuracy", higher=True), "strategies")
    assert groups[0] == "Better than concat: gmu."
    assert groups[1] == "Worse than concat: mean."
    assert groups[2].startswith("Not distinguishable from concat: max. Seeds that would tell: about ")


def test_six_seeds_can_tell_every_strategy_and_modality():
    baseline = row("image alone", around(0.7, seeds=6), unimodal_baseline=True)
    rows = [row("concat", around(0.8, seeds=6)), *(row(f"s{i}", around(0.85 + i / 100, seeds=6)) for i in range(12))]
    found = make_probes("s11", additive=0.5, permuted={"image": 0.4, "text": 0.3}, seeds=6)
    made = claims([*rows, baseline], [], found, {}, "accuracy", higher=True)
    assert texts(made, "fusion")[0].startswith("Fusion helps: s11 (of the 13 strategies tried) scores ")
    assert {one.verdict for one in made.against_reference} == {"better"}
    assert {one.verdict for one in made.against_unimodal} == {"better"}
    assert {one.verdict for one in made.statements if one.about in ("modality", "interaction")} == {"better"}


def test_fusion_claim_speaks_of_new_data_as_well():
    rows = [row("gmu", [0.9] * SEEDS), row("image alone", [0.8] * SEEDS, unimodal_baseline=True)]
    for examples, expected in ((100, "cannot tell"), (4_000, "better")):
        position = np.arange(examples) % 10
        scores = {"image alone": position < 8, "gmu": position != 4}  # each is right on examples that the other is not
        of_runs = {name: scores[name.rpartition(" ")[0]].astype(float) for each in rows for name in each.trials}
        made = claims(
            rows, [], {}, {}, "accuracy", higher=True, scope=Scope(examples=of_runs, trials=8, test_examples=examples)
        )
        text = texts(made, "fusion")[0]
        assert made.statements[0].verdict == "better"  # on this test set
        assert f"On new data: {expected} (" in text and f"over runs and {examples:,} test examples)" in text
        assert f"gmu (tuned with 8 trials, on {examples:,} test examples) scores" in text
        assert made.scope == {"strategies": 1, "trials": 8, "settings": 1, "test_examples": examples}


def test_collapsed_runs_are_counted_and_left_out_of_means():
    scores = around(0.9)
    broken = [*scores[:6], 0.51, 0.5]
    rows = [row("concat", scores), row("gmu", broken), row("image alone", around(0.7), unimodal_baseline=True)]
    classical = [row("majority", [0.5] * SEEDS, unimodal_baseline=True)]
    made = claims(rows, classical, {}, {}, "accuracy", higher=True)
    (text,) = texts(made, "collapsed")
    assert text.startswith(
        "Runs at chance while other seeds of their method learned, left out of all means: 2 of 8 of gmu."
    )
    assert "no strategy is shown to differ from concat" in text
    (strategies,) = texts(made, "strategies")
    assert strategies.startswith("Equivalent to concat within 0.01 of its score: gmu (without seed 6 and 7, where one ")
    assert not texts(claims(rows, [], {}, {}, "accuracy", higher=True), "collapsed")  # chance is unknown


def test_equal_methods_are_equivalent_within_the_margin():
    rows = [
        row("concat", around(0.8)),
        row("gmu", around(0.801)),
        row("image alone", around(0.8), unimodal_baseline=True),
    ]
    made = claims(rows, [], {}, {}, "accuracy", higher=True)
    assert texts(made, "fusion")[0].startswith("Fusion changes less than 0.01 of the score: gmu ")
    assert texts(made, "strategies") == ["Equivalent to concat within 0.01 of its score: gmu."]
    strict = claims(rows, [], {}, {}, "accuracy", higher=True, scope=Scope(equivalence=0.0001))
    assert "Better than concat: gmu." in texts(strict, "strategies")


@pytest.mark.parametrize(
    ("additive", "text"),
    [(0.5, "gmu relies on cross-modal interaction: "), (0.899, "gmu does not rely on cross-modal interaction: ")],
)
def test_interaction_claim_compares_with_the_additive_projection(additive, text):
    found = make_probes("gmu", additive=additive, permuted={"image": 0.3, "text": 0.3})
    made = claims([row("gmu", around(0.9))], [], found, {}, "accuracy", higher=True)
    assert text in texts(made, "interaction")[0]


def test_modality_claims_cover_permuted_and_missing_modalities():
    found = make_probes("gmu", additive=0.9, permuted={"image": 0.4, "text": -0.0005})
    made = claims([row("gmu", around(0.9))], [], found, {}, "accuracy", higher=True)
    image, text = texts(made, "modality")
    assert image.startswith("Permuting image costs gmu 40.1 % of its accuracy (95 % CI 40.0 to 40.1 %, ")
    assert "text contributes nothing: the 90 % interval lies within ±1 %." in text
    assert (
        "gmu scores 0.7000 without image and 0.6000 without text (accuracy; with all 0.9000, with none 0.5000)"
        in texts(made, "missing")[0]
    )


def test_noisy_effects_are_not_equivalent_to_none():
    found = make_probes("gmu", additive=0.9, permuted={"image": 0.4, "text": 0.0})
    for i in range(SEEDS):
        found[f"gmu {i}"]["perceptual"]["text"] = 0.05 * (-1) ** i
        found[f"gmu {i}"]["interaction"]["image"]["additive"] = [0.9 + 0.03 * (-1) ** i]
    made = claims([row("gmu", around(0.9))], [], found, {}, "accuracy", higher=True)
    assert texts(made, "modality")[1].endswith("The runs cannot tell whether gmu uses text.")
    assert "is not shown to rely on cross-modal interaction" in texts(made, "interaction")[0]


def test_claims_are_empty_without_scores_or_with_one_seed():
    single = claims(
        [row("gmu", [0.9]), row("image alone", [0.1], unimodal_baseline=True)], [], {}, {}, "accuracy", higher=True
    )
    assert "one seed" in single.none and not single.statements
    no_scores = claims([row("gmu", [])], [], {}, {}, "accuracy", higher=True)
    assert "no run of a fusion strategy has a score" in no_scores.none
    failed = claims([row("gmu", around(0.9)), row("film", [])], [], {}, {}, "accuracy", higher=True)
    assert texts(failed, "failed") == ["Failed on every seed: film."]


def test_probe_claims_report_undefined_scores():
    found = make_probes("gmu", additive=0.5, permuted={"image": 0.3, "text": 0.3})
    found["gmu 0"]["subsets"]["image"] = None
    found["gmu 1"]["perceptual"] = {}  # its score is not above 0
    del found["gmu 2"]
    made = claims([row("gmu", around(0.9))], [], found, {}, "accuracy", higher=True)
    assert texts(made, "probes") == ["7 of 8 runs of gmu were probed; the others failed."]
    assert texts(made, "subsets") == ["The score without a modality is undefined for 1 of 7 runs of gmu."]
    assert texts(made, "perceptual") == ["The cost of permuting a modality is undefined for 1 of 7 runs of gmu."]
    assert "over 7 seeds" in texts(made, "interaction")[0]
    assert len(texts(made, "modality")) == 2 and len(texts(made, "missing")) == 1

    for run in found.values():
        run["perceptual"] = {}
    made = claims([row("gmu", around(0.9))], [], found, {}, "accuracy", higher=True)
    assert texts(made, "perceptual") == ["The cost of permuting a modality is undefined for 7 of 7 runs of gmu."]
    assert not texts(made, "modality")


def test_probe_claims_report_harmful_interaction_and_modality():
    found = make_probes("gmu", additive=0.95, permuted={"image": 0.3, "text": -0.05})
    made = claims([row("gmu", around(0.9))], [], found, {}, "accuracy", higher=True)
    assert texts(made, "interaction")[0].startswith(
        "gmu scores better without cross-modal interaction: its additive projection (EMAP) scores 0.95"
    )
    assert texts(made, "modality")[1].endswith("gmu scores better with text permuted.")


def test_unimodal_baseline_is_used_despite_a_failed_seed():
    image = row("image alone", around(0.95), unimodal_baseline=True)
    image = dataclasses.replace(
        image,
        trials=image.trials[1:],
        seeds=image.seeds[1:],
        failed_seeds=(0,),
        valid=image.valid[1:],
        test=image.test[1:],
    )
    rows = [row("gmu", around(0.9)), image, row("text alone", around(0.6), unimodal_baseline=True)]
    text = texts(claims(rows, [], {}, {}, "accuracy", higher=True), "fusion")[0]
    assert text.startswith("Fusion hurts: gmu scores 0.9000, the best unimodal baseline (image alone) 0.95")
    assert "(without seed 0, where one of the two failed or collapsed)" in text


def test_reference_is_concat_of_the_same_variation():
    rows = [
        row("concat rate=0", around(0.8)), row("gmu rate=0", around(0.9)),
        row("concat rate=1", around(0.5)), row("gmu rate=1", around(0.7)),
    ]  # fmt: skip
    made = claims(rows, [], {}, {}, "accuracy", higher=True)
    assert texts(made, "strategies") == ["Better than concat: gmu rate=0 and gmu rate=1."]
    assert [(one.method, one.other) for one in made.against_reference] == [
        ("gmu rate=0", "concat rate=0"), ("gmu rate=1", "concat rate=1"),
    ]  # fmt: skip


def test_reference_is_the_first_variation_of_a_single_strategy():
    rows = [
        row("gmu objectives=none", around(0.8)),
        row("gmu objectives=mvae", around(0.9)),
        row("gmu objectives=gan", around(0.8, 0.1)),
        row("image alone", around(0.7), unimodal_baseline=True),
    ]
    made = claims(rows, [], {}, {}, "accuracy", higher=True)
    assert {(one.method, one.other) for one in made.against_reference} == {
        ("gmu objectives=mvae", "gmu objectives=none"),
        ("gmu objectives=gan", "gmu objectives=none"),
    }
    assert "Better than gmu objectives=none: gmu objectives=mvae." in texts(made, "strategies")
    assert "each strategy against gmu objectives=none, " in made.rule
    without_reference = [dataclasses.replace(rows[0], test=(), valid=(), seeds=(), trials=()), *rows[1:]]
    assert not claims(without_reference, [], {}, {}, "accuracy", higher=True).against_reference


@pytest.mark.thorough
def test_claim_of_no_effect_is_rare_for_an_effect_at_the_bound():
    random = np.random.default_rng(3)
    negligible = 0
    for _ in range(200):
        found = make_probes("gmu", additive=0.9, permuted={"image": 0.4, "text": 0.0}, seeds=6)
        for run in found.values():
            run["perceptual"]["text"] = 0.01 + 0.004 * random.normal()
        made = claims([row("gmu", around(0.9, seeds=6))], [], found, {}, "accuracy", higher=True)
        negligible += "text contributes nothing" in texts(made, "modality")[1]
    assert negligible <= 0.05 * 200


@pytest.mark.thorough
def test_claims_keep_the_nominal_false_positive_rate():
    """Seven strategies and a unimodal baseline of equal mean; validation and test scores are correlated."""
    random, fusion_errors, strategy_errors = np.random.default_rng(7), 0, 0
    for number in range(200):
        rows, spread = [], 0.01 * (number % 2)  # of the unimodal baseline; a classical baseline has no spread
        for method in ["concat", *(f"s{i}" for i in range(6)), "image alone"]:
            unimodal_baseline = method == "image alone"
            runs = 0.9 + (spread if unimodal_baseline else 0.01) * random.normal(size=8)
            valid, test = (runs + 0.003 * random.normal(size=8) for _ in range(2))
            rows.append(row(method, test, unimodal_baseline=unimodal_baseline, valid=tuple(valid)))
        made = claims(rows, [], {}, {}, "accuracy", higher=True)
        fusion_errors += made.statements[0].verdict in ("better", "worse")
        strategy_errors += any(one.verdict in ("better", "worse") for one in made.against_reference)
    allowed = 0.05 * 200 + 2 * (200 * 0.05 * 0.95) ** 0.5
    assert fusion_errors <= allowed
    assert strategy_errors <= allowed


def test_claims_of_five_seeds_cannot_tell():
    rows = [row("gmu", around(0.9, seeds=5)), row("image alone", around(0.1, seeds=5), unimodal_baseline=True)]
    made = claims(rows, [], {}, {}, "accuracy", higher=True)
    assert texts(made, "fusion")[0].startswith("Fusion is not shown to help: ")
    assert made.statements[0].text.startswith("5 seeds cannot show a difference")
    few = make_probes("gmu", additive=0.9, permuted={"image": 0.4, "text": 0.0}, seeds=5)
    made = claims(rows, [], few, {}, "accuracy", higher=True)
    assert "The runs cannot tell" in texts(made, "modality")[1]


def test_monotonicity_statement_names_the_most_harmful_addition():
    probes = make_probes("gmu", additive=0.9, permuted={"image": 0.3, "text": 0.3})
    made = claims([row("gmu", around(0.9))], [], probes, {}, "accuracy", higher=True)
    assert texts(made, "monotonicity") == [
        "No addition of a modality lowers gmu's score on average (4 additions); the least gain is 0.1000 accuracy, "
        "from adding image to nothing."
    ]
    for i in range(SEEDS):
        probes[f"gmu {i}"]["subsets"]["image+text"] = 0.65 + 0.001 * i  # the image harms the text
    made = claims([row("gmu", around(0.9))], [], probes, {}, "accuracy", higher=True)
    (statement,) = [each for each in made.statements if each.about == "monotonicity"]
    assert statement.verdict == "worse"
    assert statement.text.startswith(
        "1 of 4 additions of a modality lower gmu's score on average, most adding image to"
    )
    probes["gmu 0"]["subsets"]["image+text"] = 0.9  # not on every seed
    made = claims([row("gmu", around(0.9))], [], probes, {}, "accuracy", higher=True)
    (statement,) = [each for each in made.statements if each.about == "monotonicity"]
    assert statement.verdict == "cannot tell" and "which may be chance" in statement.text


def test_information_statement_has_every_part_and_its_chance():
    train = {"redundant": 0.4, "unique a": 0.01, "unique b": 0.2, "unique c": 0.0, "synergistic": 1.25}
    information = {"estimator": "Gaussian features", "train": train, "chance": dict.fromkeys(train, 0.02)}
    made = claims([row("gmu", around(0.9))], [], {}, information, "accuracy", higher=True)
    assert texts(made, "information") == [
        "Partial information decomposition of the training labels (bits; Gaussian features, permutation baseline in "
        "brackets): redundant 0.40 (0.02), unique a 0.01 (0.02), unique b 0.20 (0.02), unique c 0.00 (0.02), "
        "synergistic 1.25 (0.02)."
    ]
