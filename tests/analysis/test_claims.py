"""What an ablation says in words: no more than its seeds carry, and the right way round."""

import numpy as np
import pytest

from mmfusion.analysis.claims import claims
from mmfusion.analysis.judge import Row

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
    )


def around(mean, spread=0.004, seeds=SEEDS):
    return [mean + spread * (i - (seeds - 1) / 2) / seeds for i in range(seeds)]


def examined(method, *, additive, permuted, seeds=SEEDS):
    return {
        f"{method} {i}": {
            "sign": 1,
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
    assert image.startswith("image counts: giving each example another one's image costs gmu 40.1 %")
    assert text.startswith("text contributes nothing: ")
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


def test_undefined_numbers_of_an_examination_carry_nothing():
    found = examined("gmu", additive=0.5, permuted={"image": 0.3, "text": 0.3})
    found["gmu 0"]["subsets"]["image"] = None
    said = claims([row("gmu", around(0.9))], [], found, {}, "accuracy", higher=True)
    assert {statement.about for statement in said.statements} <= {"fusion", "strategies"}


def test_five_seeds_claim_nothing():
    rows = [row("gmu", around(0.9, seeds=5)), row("image alone", around(0.1, seeds=5), floor=True)]
    said = claims(rows, [], {}, {}, "accuracy", higher=True)
    assert texts(said, "fusion")[0].startswith("Whether fusion helps is open")
    assert said.statements[0].text.startswith("5 seeds cannot show a difference")
    few = examined("gmu", additive=0.9, permuted={"image": 0.4, "text": 0.0}, seeds=5)
    said = claims(rows, [], few, {}, "accuracy", higher=True)
    assert texts(said, "modality")[1].startswith("text may or may not count")
