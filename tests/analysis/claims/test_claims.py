"""What an ablation says in words: no more than its seeds carry, and the right way round."""

import dataclasses

import numpy as np
import pytest

from mmfusion.analysis.claims import significance
from mmfusion.analysis.claims.claims import claims
from mmfusion.analysis.claims.selection import Row

SEEDS = 8


def row(method, scores, *, floor=False, valid=None):
    return Row(
        method=method,
        floor=floor,
        chosen={},
        runs=tuple(f"{method} {i}" for i in range(len(scores))),
        seeds=tuple(range(len(scores))),
        lost=(),
        valid=tuple(valid or scores),
        test=tuple(scores),
        parameters=1,
        fusion="" if floor else method.partition(" ")[0],
        variation=method.partition(" ")[2] if not floor else "",
    )


def around(mean, spread=0.004, seeds=SEEDS):
    return [mean + spread * (i - (seeds - 1) / 2) / seeds for i in range(seeds)]


def examined(method, *, additive, permuted, seeds=SEEDS):
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


def texts(said, about):
    return [statement.text for statement in said.statements if statement.about == about]


def test_fusion_helps_where_every_seed_says_so():
    rows = [row("gmu", around(0.9)), row("image alone", around(0.7), floor=True)]
    said = claims(rows, [], {}, {}, "accuracy", higher=True)
    assert texts(said, "fusion")[0].startswith("Fusion helps: gmu 0.9000, and 0.7000 of image alone")
    assert said.best == "gmu" and not said.none


def test_fusion_hurts_and_is_open():
    floor = row("image alone", around(0.7), floor=True)
    worse = claims([row("gmu", around(0.5)), floor], [], {}, {}, "accuracy", higher=True)
    assert texts(worse, "fusion")[0].startswith("Fusion hurts")
    noisy = row("gmu", [0.7 + (0.01 if i % 2 else -0.009) for i in range(SEEDS)])
    opened = claims([noisy, floor], [], {}, {}, "accuracy", higher=True)
    assert texts(opened, "fusion")[0].startswith("Whether fusion helps is open")


def test_less_may_be_better():
    rows = [row("gmu", around(0.2)), row("image alone", around(0.5), floor=True)]
    said = claims(rows, [], {}, {}, "mae", higher=False)
    assert texts(said, "fusion")[0].startswith("Fusion helps")
    assert "less is better" in texts(said, "fusion")[0]


def test_validation_names_the_best_not_the_test():
    rows = [row("gmu", around(0.8), valid=around(0.9)), row("film", around(0.95), valid=around(0.6))]
    assert claims(rows, [], {}, {}, "accuracy", higher=True).best == "gmu"


def test_a_classical_baseline_of_one_modality_may_be_the_floor():
    rows = [row("gmu", around(0.9)), row("image alone", around(0.7), floor=True)]
    classical = [row("linear_svm, text", [0.8] * SEEDS, floor=True), row("linear_svm, image+text", [0.95] * SEEDS)]
    said = claims(rows, classical, {}, {}, "accuracy", higher=True)
    assert "0.8000 of linear_svm, text" in texts(said, "fusion")[0]
    assert (
        "gmu is worse than the best classical baseline on all modalities, linear_svm, image+text"
        in (texts(said, "classical")[0])
    )
    assert said.best == "gmu"


def test_strategies_are_grouped_by_what_can_be_told_of_them():
    noise = np.random.default_rng(0).normal(scale=0.01, size=SEEDS)
    rows = [
        row("concat", around(0.8)),
        row("gmu", around(0.9)),
        row("mean", around(0.6)),
        row("max", [a + b for a, b in zip(around(0.801), noise - noise.mean(), strict=True)]),
    ]
    groups = texts(claims(rows, [], {}, {}, "accuracy", higher=True), "strategies")
    assert groups[0] == "Better than concat: gmu."
    assert groups[1] == "Worse than concat: mean."
    assert groups[2].startswith("Not to be told from concat: max; about ")


def test_many_strategies_need_more_seeds_than_the_best_one_alone():
    floor = row("image alone", around(0.7, seeds=6), floor=True)
    rows = [row("concat", around(0.8, seeds=6)), *(row(f"s{i}", around(0.9 + i / 100, seeds=6)) for i in range(4))]
    said = claims([*rows, floor], [], {}, {}, "accuracy", higher=True)
    assert texts(said, "fusion")[0].startswith("Fusion helps: s3")
    first, others = texts(said, "strategies")
    assert first == "6 seeds cannot tell any strategy from concat: 4 comparisons need at least 8 (--seeds=8)."
    assert others == "Not to be told from concat: s0, s1, s2 and s3; about 8 seeds would tell s0, s1, s2 and s3."
    assert {one.verdict for one in said.against_floor} == {"cannot tell"}  # in a table of five


@pytest.mark.parametrize(
    ("additive", "words"), [(0.5, "uses the interaction"), (0.899, "does not need the interaction")]
)
def test_the_interaction(additive, words):
    found = examined("gmu", additive=additive, permuted={"image": 0.3, "text": 0.3})
    said = claims([row("gmu", around(0.9))], [], found, {}, "accuracy", higher=True)
    assert words in texts(said, "interaction")[0]


def test_a_modality_that_contributes_nothing_is_named():
    found = examined("gmu", additive=0.9, permuted={"image": 0.4, "text": -0.0005})
    said = claims([row("gmu", around(0.9))], [], found, {}, "accuracy", higher=True)
    image, text = texts(said, "modality")
    assert image.startswith(
        "image counts: giving each of 2048 test examples another one's image costs gmu 40.1 % of its accuracy"
    )
    assert text.startswith("text contributes nothing: ") and "(less than 1 %), " in text
    assert "0.7000 without image and 0.6000 without text" in texts(said, "missing")[0]


def test_what_is_not_measured_well_is_not_nothing():
    found = examined("gmu", additive=0.9, permuted={"image": 0.4, "text": 0.0})
    for i in range(SEEDS):
        found[f"gmu {i}"]["perceptual"]["text"] = 0.05 * (-1) ** i
        found[f"gmu {i}"]["interaction"]["image"]["additive"] = [0.9 + 0.03 * (-1) ** i]
    said = claims([row("gmu", around(0.9))], [], found, {}, "accuracy", higher=True)
    assert texts(said, "modality")[1].startswith("text may or may not count")
    assert "may or may not use the interaction" in texts(said, "interaction")[0]


def test_no_claims_where_there_are_none():
    one = claims([row("gmu", [0.9]), row("image alone", [0.1], floor=True)], [], {}, {}, "accuracy", higher=True)
    assert "one seed" in one.none and not one.statements
    nothing = claims([row("gmu", [])], [], {}, {}, "accuracy", higher=True)
    assert "no run" in nothing.none
    lost = claims([row("gmu", around(0.9)), row("film", [])], [], {}, {}, "accuracy", higher=True)
    assert texts(lost, "lost") == ["No seed of film ended in a number."]


def test_undefined_numbers_of_an_examination_are_named():
    found = examined("gmu", additive=0.5, permuted={"image": 0.3, "text": 0.3})
    found["gmu 0"]["subsets"]["image"] = None
    found["gmu 1"]["perceptual"] = {}  # its score is not above 0
    del found["gmu 2"]
    said = claims([row("gmu", around(0.9))], [], found, {}, "accuracy", higher=True)
    assert texts(said, "examined") == ["7 of 8 runs of gmu were examined; the others failed."]
    assert texts(said, "subsets") == ["What is left without a modality is not defined on 1 of 7 runs of gmu."]
    assert texts(said, "perceptual") == ["What each modality is worth is not defined on 1 of 7 runs of gmu."]
    assert "over 7 seeds" in texts(said, "interaction")[0]
    assert len(texts(said, "modality")) == 2 and len(texts(said, "missing")) == 1

    for run in found.values():
        run["perceptual"] = {}
    said = claims([row("gmu", around(0.9))], [], found, {}, "accuracy", higher=True)
    assert texts(said, "perceptual") == ["What each modality is worth is not defined on 7 of 7 runs of gmu."]
    assert not texts(said, "modality")


def test_what_is_better_without_a_part_is_said():
    found = examined("gmu", additive=0.95, permuted={"image": 0.3, "text": -0.05})
    said = claims([row("gmu", around(0.9))], [], found, {}, "accuracy", higher=True)
    assert texts(said, "interaction")[0].startswith("gmu does better without the interaction of its modalities: 0.9000")
    assert texts(said, "modality")[1].startswith("text is better mixed up than right: ")


def test_a_modality_that_failed_on_a_seed_is_still_the_floor():
    image = row("image alone", around(0.95), floor=True)
    image = dataclasses.replace(
        image, runs=image.runs[1:], seeds=image.seeds[1:], lost=(0,), valid=image.valid[1:], test=image.test[1:]
    )
    rows = [row("gmu", around(0.9)), image, row("text alone", around(0.6), floor=True)]
    text = texts(claims(rows, [], {}, {}, "accuracy", higher=True), "fusion")[0]
    assert text.startswith("Fusion hurts: gmu 0.9000, and 0.95")
    assert "of image alone" in text and "(without seed 0, where one failed)" in text


def test_a_strategy_is_held_against_concat_of_the_same_variation():
    rows = [
        row("concat rate=0", around(0.8)), row("gmu rate=0", around(0.9)),
        row("concat rate=1", around(0.5)), row("gmu rate=1", around(0.7)),
    ]  # fmt: skip
    said = claims(rows, [], {}, {}, "accuracy", higher=True)
    assert texts(said, "strategies") == ["Better than concat: gmu rate=0 and gmu rate=1."]
    assert [(one.method, one.other) for one in said.against_reference] == [
        ("gmu rate=0", "concat rate=0"), ("gmu rate=1", "concat rate=1"),
    ]  # fmt: skip


def test_forms_of_one_strategy_are_held_against_the_first():
    rows = [
        row("gmu objectives=none", around(0.8)),
        row("gmu objectives=mvae", around(0.9)),
        row("gmu objectives=gan", around(0.8, 0.1)),
        row("image alone", around(0.7), floor=True),
    ]
    said = claims(rows, [], {}, {}, "accuracy", higher=True)
    assert {(one.method, one.other) for one in said.against_reference} == {
        ("gmu objectives=mvae", "gmu objectives=none"),
        ("gmu objectives=gan", "gmu objectives=none"),
    }
    assert "Better than gmu objectives=none: gmu objectives=mvae." in texts(said, "strategies")
    assert "held against gmu objectives=none or" in said.rule
    lost = [dataclasses.replace(rows[0], test=(), valid=(), seeds=(), runs=()), *rows[1:]]
    assert not claims(lost, [], {}, {}, "accuracy", higher=True).against_reference


@pytest.mark.thorough
def test_a_part_as_large_as_the_bound_is_seldom_called_nothing():
    random = np.random.default_rng(3)
    called = 0
    for _ in range(200):
        found = examined("gmu", additive=0.9, permuted={"image": 0.4, "text": 0.0}, seeds=6)
        for run in found.values():
            run["perceptual"]["text"] = 0.01 + 0.004 * random.normal()
        said = claims([row("gmu", around(0.9, seeds=6))], [], found, {}, "accuracy", higher=True)
        called += texts(said, "modality")[1].startswith("text contributes nothing")
    assert called <= 0.05 * 200


@pytest.mark.thorough
def test_null_experiments_give_at_most_the_nominal_rate_of_claims(monkeypatch):
    """Seven strategies and a modality alone, all alike; a run's validation and test scores go together."""
    monkeypatch.setattr(significance, "RESAMPLES", 499)  # intervals a little rougher, in a tenth of the time
    random, helps, told = np.random.default_rng(7), 0, 0
    for number in range(200):
        rows, spread = [], 0.01 * (number % 2)  # of the floor: a classical baseline has none
        for method in ["concat", *(f"s{i}" for i in range(6)), "image alone"]:
            floor = method == "image alone"
            runs = 0.9 + (spread if floor else 0.01) * random.normal(size=8)
            valid, test = (runs + 0.003 * random.normal(size=8) for _ in range(2))
            rows.append(row(method, test, floor=floor, valid=tuple(valid)))
        said = claims(rows, [], {}, {}, "accuracy", higher=True)
        helps += said.statements[0].verdict != "cannot tell"
        told += any(one.verdict != "cannot tell" for one in said.against_reference)
    allowed = 0.05 * 200 + 2 * (200 * 0.05 * 0.95) ** 0.5
    assert helps <= allowed
    assert told <= allowed


def test_five_seeds_claim_nothing():
    rows = [row("gmu", around(0.9, seeds=5)), row("image alone", around(0.1, seeds=5), floor=True)]
    said = claims(rows, [], {}, {}, "accuracy", higher=True)
    assert texts(said, "fusion")[0].startswith("Whether fusion helps is open")
    assert said.statements[0].text.startswith("5 seeds cannot show a difference")
    few = examined("gmu", additive=0.9, permuted={"image": 0.4, "text": 0.0}, seeds=5)
    said = claims(rows, [], few, {}, "accuracy", higher=True)
    assert texts(said, "modality")[1].startswith("text may or may not count")
