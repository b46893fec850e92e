"""Corruptions: what each does at a known severity, what none may touch, and the areas of known curves."""

import difflib

import numpy as np
import pytest
from tokenizers import decoders

from mmfusion.analysis import corruption
from mmfusion.analysis.corruption import CORRUPTIONS, corrupt, effective_robustness, relative_robustness
from mmfusion.data import rows, text
from mmfusion.data.batch import Batch
from mmfusion.errors import UserError

EVERY = [(kind, name) for kind, names in CORRUPTIONS.items() for name in names]
ROWS, LENGTH, SAMPLES = 40, 24, 400
ABSENT, PADDING = 3, 38  # the absent row and the first of the padding rows; both hold values that show a touch
WORDS = ["melon", "a", "harbour", "it's", "window,", "naïve", "quickly", "café!", "two", "1999", "zebra"]
TOKENIZERS = {
    # "zebra" has no id of its own in the word vocabulary; "[OOV]" is what it becomes.
    "word": text.train_tokenizer([" ".join(WORDS[:-1])], "word", 100),
    "bpe": text.train_tokenizer([" ".join(WORDS)] * 3, "bpe", 300),
}


def make_batch(tokenizer="word", size=(16, 16, 3)):
    random = np.random.default_rng(0)
    sentences = [" ".join(random.choice(WORDS, random.integers(1, 14))) for _ in range(ROWS)]
    ids, mask = text.encode(TOKENIZERS[tokenizer], sentences, LENGTH)
    heard = np.arange(SAMPLES) < random.integers(SAMPLES // 2, SAMPLES + 1, ROWS)[:, None]  # [B, S]
    coarse = random.integers(0, 256, (ROWS, size[0] // 4, size[1] // 4, size[2]), np.uint8)
    number = 1000 - 7 * np.arange(ROWS, dtype=np.int32)
    present = np.ones(ROWS, bool)
    present[ABSENT] = False
    number[PADDING:] = -1
    batch = Batch(
        inputs={
            "image": coarse.repeat(4, 1).repeat(4, 2),  # smooth enough for blur to be gradual
            "text": ids,
            "audio": np.where(heard, random.normal(0, 0.1, (ROWS, SAMPLES)), 0).astype(np.float32),
        },
        mask={"image": np.ones((ROWS, 1), bool), "text": mask, "audio": heard},
        present={"image": present, "text": present, "audio": present},
        targets={"label": np.zeros(ROWS, np.int32)},
        weight=(number >= 0).astype(np.float32),
        id=number,
    )
    for array in (*batch.inputs.values(), *batch.mask.values()):
        array.flags.writeable = False  # a write in place raises
    return batch


def spoil(batch, kind, name, severity, seed=0, tokenizer="word"):
    return corrupt(batch, kind, kind, name, severity, seed, TOKENIZERS[tokenizer])


def real(batch, kind, row):
    values = batch.inputs[kind][row]
    return values if kind == "image" else values[batch.mask[kind][row]]


def touched():
    return [row for row in range(PADDING) if row != ABSENT]


def take(batch, places):
    fields = {f: {k: v[places] for k, v in getattr(batch, f).items()} for f in ("inputs", "mask", "present", "targets")}
    return Batch(**fields, weight=batch.weight[places], id=batch.id[places])


def test_every_kind_of_modality_has_corruptions():
    assert set(CORRUPTIONS) == set(rows.KINDS)


@pytest.mark.parametrize(("kind", "name"), EVERY)
@pytest.mark.parametrize("severity", [0.0, 0.01, 0.5, 1.0])
def test_only_rows_that_have_the_modality_change(kind, name, severity):
    batch = make_batch()
    before = batch.inputs[kind].copy(), batch.mask[kind].copy()
    after = spoil(batch, kind, name, severity)
    for old, new in ((batch.inputs, after.inputs), (batch.mask, after.mask)):
        assert new[kind].shape == old[kind].shape
        assert new[kind].dtype == old[kind].dtype
        for row in range(ROWS) if severity == 0 else (ABSENT, *range(PADDING, ROWS)):
            assert new[kind][row].tobytes() == old[kind][row].tobytes()
        assert all(new[other] is old[other] for other in old if other != kind)
    assert (after.present, after.targets) == (batch.present, batch.targets)
    assert after.weight is batch.weight
    assert after.id is batch.id
    assert batch.inputs[kind].tobytes() == before[0].tobytes()
    assert batch.mask[kind].tobytes() == before[1].tobytes()
    if severity == 1:
        changed = [not np.array_equal(real(after, kind, row), real(batch, kind, row)) for row in touched()]
        assert np.mean(changed) > 0.8  # a text of one token has nothing to drop or swap


def test_a_row_without_one_real_position_is_left():
    batch = make_batch()
    mask = batch.mask["text"].copy()
    mask[0] = False
    for name in CORRUPTIONS["text"]:
        after = spoil(batch.replace(mask={**batch.mask, "text": mask}), "text", name, 1.0)
        np.testing.assert_array_equal(after.inputs["text"][0], batch.inputs["text"][0])


def distance(old, new, kind):
    if kind == "text":
        return 1 - difflib.SequenceMatcher(None, old.tolist(), new.tolist(), autojunk=False).ratio()
    return float(np.mean(np.square(old.astype(float) - new)))


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_more_severity_is_more_distance(kind, name):
    batch = make_batch()
    means = []
    for severity in (0.0, 0.25, 0.5, 0.75, 1.0):
        after = spoil(batch, kind, name, severity)
        means.append(np.mean([distance(real(batch, kind, r), real(after, kind, r), kind) for r in touched()]))
    assert means[0] == 0
    assert (np.diff(means) > 0).all(), means


@pytest.mark.parametrize(("kind", "name"), EVERY)
def test_a_row_depends_on_its_id_and_the_seed_alone(kind, name):
    batch = make_batch()
    after = spoil(batch, kind, name, 0.7)
    for places in (np.arange(ROWS)[::-1], np.array([11]), np.array([5, 0, 30])):
        part = spoil(take(batch, places), kind, name, 0.7)
        np.testing.assert_array_equal(part.inputs[kind], after.inputs[kind][places])
        np.testing.assert_array_equal(part.mask[kind], after.mask[kind][places])
    again = take(batch, np.full(20, 5))
    same, own = spoil(again, kind, name, 0.7), spoil(again.replace(id=np.arange(20)), kind, name, 0.7)
    assert (same.inputs[kind] == same.inputs[kind][0]).all()
    drawn = name not in ("blur", "compression")  # these two draw nothing
    assert (own.inputs[kind] != own.inputs[kind][0]).any() == drawn
    assert (spoil(batch, kind, name, 0.7, seed=1).inputs[kind] != after.inputs[kind]).any() == drawn


def test_two_corruptions_of_a_row_draw_apart(monkeypatch):
    monkeypatch.setitem(CORRUPTIONS["image"], "other", CORRUPTIONS["image"]["gaussian"])
    one, other = (spoil(make_batch(), "image", name, 0.5).inputs["image"][0] for name in ("gaussian", "other"))
    assert np.mean(one == other) < 0.3


def test_gaussian_noise_has_its_deviation_and_one_direction():
    batch = make_batch(size=(64, 64, 3))
    gray = batch.replace(inputs={**batch.inputs, "image": np.full_like(batch.inputs["image"], 128)})
    half, full = (spoil(gray, "image", "gaussian", s).inputs["image"][0].astype(float) - 128 for s in (0.2, 0.4))
    assert half.std() == pytest.approx(0.2 * corruption.GAUSSIAN, rel=0.02)
    assert abs(half.mean()) < 1
    clear = np.abs(full) < 127  # not clipped
    np.testing.assert_allclose(full[clear], 2 * half[clear], atol=1.5)  # two roundings, one of them doubled


def test_blur_spreads_a_point_by_its_deviation():
    batch = make_batch(size=(40, 80, 3))
    point = np.zeros_like(batch.inputs["image"])
    point[:, 18:22, 38:42, 0] = 255
    after = spoil(batch.replace(inputs={**batch.inputs, "image": point}), "image", "blur", 1.0).inputs["image"][0]
    for axis, length, middle in ((0, 40, 19.5), (1, 80, 39.5)):
        profile = after[:, :, 0].sum(axis=1 - axis, dtype=float)
        variance = profile @ (np.arange(length) - middle) ** 2 / profile.sum()
        assert np.sqrt(variance) == pytest.approx(corruption.BLUR * 40, rel=0.1)  # rounding to levels cuts the tails
    assert not after[:, :, 1:].any()  # nothing spreads from channel to channel


@pytest.mark.parametrize("size", [(32, 32, 3), (16, 64, 1)])
def test_occlusion_is_a_gray_rectangle_of_its_share(size):
    batch = make_batch(size=size)
    white = batch.replace(inputs={**batch.inputs, "image": np.full_like(batch.inputs["image"], 255)})
    before = np.zeros((ROWS, *size), bool)
    for severity in (0.3, 0.6, 1.0):
        after = spoil(white, "image", "occlusion", severity).inputs["image"]
        hidden = after == corruption.GRAY
        assert (hidden | (after == 255)).all()
        assert (hidden | ~before).all()  # what was hidden stays hidden
        before = hidden
        for row in touched():
            sides = [int(hidden[row].any(axis=axis).sum()) for axis in ((1, 2), (0, 2))]
            assert hidden[row].sum() == sides[0] * sides[1] * size[2]
            assert sides[0] / size[0] == pytest.approx(np.sqrt(severity * corruption.OCCLUSION), abs=0.5 / size[0])
            assert sides[1] / size[1] == pytest.approx(np.sqrt(severity * corruption.OCCLUSION), abs=0.5 / size[1])
    corners = before[touched()].reshape(len(touched()), -1).argmax(axis=1)
    assert len(set(corners)) > 20


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_compression_keeps_means_and_loses_detail(channels):
    random = np.random.default_rng(1)
    batch = make_batch(size=(16, 16, channels))
    flat = np.arange(1, channels + 1, dtype=np.uint8) * 50  # [C], a level of its own a channel
    speckled = np.clip(flat + random.normal(0, 10, batch.inputs["image"].shape), 0, 255).astype(np.uint8)
    batch = batch.replace(inputs={**batch.inputs, "image": speckled})
    best, worst = (spoil(batch, "image", "compression", s).inputs["image"][0].astype(float) for s in (1e-6, 1.0))
    assert np.abs(best.mean(axis=(0, 1)) - flat).max() < 5
    assert np.abs(worst.mean(axis=(0, 1)) - flat).max() < 50  # one step of the coarsest table
    # At the worst quality nothing but its mean is left of a block of 8 by 8.
    fine = [found.reshape(2, 8, 2, 8, channels).std(axis=(1, 3)) for found in (best, worst)]
    assert fine[0].min() > 3
    assert fine[1].max() < 1


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_drop_keeps_the_order_and_the_mask_counts_what_is_left(tokenizer):
    batch = make_batch(tokenizer)
    left = []
    before = batch
    for severity in (0.3, 0.6, 1.0):
        after = spoil(batch, "text", "drop", severity)
        for row in touched():
            remaining = iter(real(before, "text", row))  # of the lower severity: what is dropped stays dropped
            kept = real(after, "text", row)
            assert all(any(token == other for other in remaining) for token in kept)
            assert len(kept) >= 1
            assert after.mask["text"][row, : len(kept)].all()
            assert (after.inputs["text"][row, len(kept) :] == text.PAD).all()
            assert np.array_equal(kept, after.inputs["text"][row, : len(kept)])
        left.append(after.mask["text"][touched()].sum() / batch.mask["text"][touched()].sum())
        before = after
    kept = 1 - corruption.DROP * np.array([0.3, 0.6, 1.0])
    assert np.abs(left - kept).max() < 0.15  # short texts keep one token they would lose
    assert (left[:2] > kept[:2] - 0.1).all()


def test_swap_moves_tokens_by_one_place():
    batch = make_batch()
    ids = np.tile(np.arange(2, LENGTH + 2, dtype=np.int32), (ROWS, 1))  # all different: a move is seen
    batch = batch.replace(inputs={**batch.inputs, "text": np.where(batch.mask["text"], ids, 0)})
    moved = np.zeros_like(batch.mask["text"])
    for severity in (0.3, 0.6, 1.0):
        after = spoil(batch, "text", "swap", severity)
        assert after.mask["text"].tobytes() == batch.mask["text"].tobytes()
        for row in touched():
            new, old = real(after, "text", row), real(batch, "text", row)
            assert np.array_equal(np.sort(new), old)
            assert np.abs(new - old).max() <= 1
        now = after.inputs["text"] != batch.inputs["text"]
        assert (now | ~moved).all()  # what is swapped stays swapped
        moved = now
    # At 1 no two neighbours are both in their place.
    still = ~moved[:, 1:] & ~moved[:, :-1] & batch.mask["text"][:, 1:]
    assert not still[touched()].any()


def test_a_typo_makes_a_known_word_unknown_and_leaves_the_rest():
    batch = make_batch()
    after = spoil(batch, "text", "typo", 0.5)
    vocabulary = TOKENIZERS["word"]
    shares = []
    for row in touched():
        old, new = real(batch, "text", row), real(after, "text", row)
        assert len(new) == len(old)  # a word is a token, whatever its letters
        assert set(new[new != old]) <= {text.OOV, vocabulary.token_to_id("a"), vocabulary.token_to_id("s")}
        spelled = [vocabulary.id_to_token(int(i)) for i in old]
        lettered = np.array([token.isalpha() for token in spelled]) & (old != text.OOV)
        assert (new == old)[~lettered].all()  # digits, punctuation and unknown words
        shares += [changed for changed, token in zip(new != old, spelled, strict=True) if token == "harbour"]
    # Each of seven letters is hit with chance 0.15.
    assert np.mean(shares) == pytest.approx(1 - 0.85**7, abs=0.15)


def test_a_typo_in_byte_pairs_is_text_encoded_again():
    tokenizer = TOKENIZERS["bpe"]
    batch = make_batch("bpe")
    after = spoil(batch, "text", "typo", 1.0, tokenizer="bpe")
    decode = decoders.ByteLevel().decode
    longer = 0
    for row in touched():
        old, new = real(batch, "text", row), real(after, "text", row)
        spelled, was = (decode([tokenizer.id_to_token(int(i)) for i in ids]) for ids in (new, old))
        again, mask = text.encode(tokenizer, [spelled.replace("�", "")], LENGTH + 4)
        whole = len(new) < LENGTH  # a cut text may end within a letter
        np.testing.assert_array_equal(
            new if whole else new[:-3], again[0][mask[0]] if whole else again[0][: len(new) - 3]
        )
        assert spelled.count(" ") == was.count(" ") or not whole
        longer += len(new) > len(old)
        assert after.mask["text"][row, : len(new)].all()
        assert (after.inputs["text"][row, len(new) :] == text.PAD).all()
        if whole:
            for a, b in zip(was.split(), spelled.split(), strict=True):
                assert difflib.SequenceMatcher(None, a, b).ratio() > 0 or len(a) < 4
    assert longer > 10  # misspelled words break into more pieces
    assert (after.mask["text"].sum(axis=1) == LENGTH).any()  # and some texts are cut


def test_no_typo_empties_a_word():
    random = np.random.default_rng(0)
    found = {corruption._misspell("ab", 1.0, random) for _ in range(2000)}
    assert "" not in found
    assert {"a", "b", "ab", "ba"} <= found  # left out, swapped
    assert {len(word) for word in found} == {1, 2, 3, 4}
    assert corruption._misspell("1'9", 1.0, random) == "1'9"
    assert corruption._misspell("", 1.0, random) == ""


@pytest.mark.parametrize("severity", [0.1, 0.5, 1.0])
def test_noise_has_its_signal_to_noise_ratio(severity):
    batch = make_batch()
    after = spoil(batch, "audio", "noise", severity)
    for row in touched():
        signal = real(batch, "audio", row).astype(float)
        noise = real(after, "audio", row) - signal
        ratio = 10 * np.log10((signal @ signal) / (noise @ noise))
        assert ratio == pytest.approx(40 - 50 * severity, abs=0.01)  # dB
        assert abs(np.corrcoef(noise[1:], noise[:-1])[0, 1]) < 0.3  # white
        assert (after.inputs["audio"][row][~batch.mask["audio"][row]] == 0).all()
    assert after.mask["audio"].tobytes() == batch.mask["audio"].tobytes()


def test_noise_leaves_silence():
    batch = make_batch()
    batch = batch.replace(inputs={**batch.inputs, "audio": np.zeros_like(batch.inputs["audio"])})
    assert not spoil(batch, "audio", "noise", 1.0).inputs["audio"].any()


def test_time_mask_hides_one_stretch_of_its_share():
    batch = make_batch()
    loud = batch.replace(inputs={**batch.inputs, "audio": batch.mask["audio"].astype(np.float32)})
    before = np.zeros_like(batch.mask["audio"])
    for severity in (0.3, 0.6, 1.0):
        after = spoil(loud, "audio", "time_mask", severity)
        assert after.mask["audio"].tobytes() == batch.mask["audio"].tobytes()
        hidden = loud.mask["audio"] & (after.inputs["audio"] == 0)
        assert (hidden | ~before).all()
        before = hidden
        for row in touched():
            where = np.flatnonzero(hidden[row])
            assert len(where) == round(severity * corruption.TIME_MASK * batch.mask["audio"][row].sum())
            assert where[-1] - where[0] + 1 == len(where)
    assert len({tuple(np.flatnonzero(hidden[row])[:1]) for row in touched()}) > 15


def test_areas_of_known_curves():
    x = np.linspace(0, 1, 11)
    assert relative_robustness(x, np.ones(11)) == pytest.approx(1)
    assert relative_robustness(x, 1 - x) == pytest.approx(0.5)
    assert relative_robustness([0, 0.1, 1], [1, 0, 0]) == pytest.approx(0.05)  # not all steps are equal
    reference = 0.9 - 0.5 * x**2
    assert effective_robustness(x, reference, reference) == 0
    assert effective_robustness(x, reference + 0.07, reference) == pytest.approx(0)
    assert effective_robustness(x, 0.3 - 0.1 * x, 0.9 - 0.5 * x) == pytest.approx(0.2)
    assert effective_robustness(x, 0.9 - 0.5 * x, 0.3 - 0.1 * x) == pytest.approx(-0.2)


@pytest.mark.parametrize(
    "severities", [[0], [], [0, 0.5], [0.1, 1], [0, 0.5, 0.5, 1], [0, 0.7, 0.3, 1], [0, np.nan, 1]]
)
def test_wrong_severities_of_a_curve_are_told(severities):
    with pytest.raises(ValueError, match="must increase from 0 to 1, at least two"):
        relative_robustness(severities, np.ones(len(severities)))
    with pytest.raises(ValueError, match="must increase from 0 to 1, at least two"):
        effective_robustness(severities, np.ones(len(severities)), np.ones(len(severities)))


def test_curves_of_other_lengths_are_told():
    with pytest.raises(ValueError, match=r"each of the 2 severities, got \[3\]"):
        relative_robustness([0, 1], [1, 1, 1])
    with pytest.raises(ValueError, match=r"each of the 2 severities, got \[2, 3\]"):
        effective_robustness([0, 1], [1, 1], [1, 1, 1])


def test_wrong_names_and_severities_are_told():
    batch = make_batch()
    with pytest.raises(UserError, match="kind 'imag' has no corruptions: did you mean image"):
        corrupt(batch, "image", "imag", "blur", 0.5, 0)
    with pytest.raises(UserError, match="corruption 'blurr' of image is unknown: did you mean blur"):
        corrupt(batch, "image", "image", "blurr", 0.0, 0)
    for severity in (-0.1, 1.1, np.nan):
        with pytest.raises(ValueError, match="from 0 to 1"):
            corrupt(batch, "image", "image", "blur", severity, 0)
    with pytest.raises(ValueError, match="needs the tokenizer"):
        corrupt(batch, "text", "text", "typo", 0.5, 0)
