"""Corruptions: what each does to its kind of modality at a known severity."""

import difflib

import numpy as np
import pytest
from tokenizers import decoders

from mmfusion.analysis.probing import corruption
from mmfusion.data import text
from tests.analysis.probing.spoiled import COLUMNS, LENGTH, ROWS, TOKENIZERS, make_batch, real, spoil, touched


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


def test_a_frozen_film_stands_still():
    batch = make_batch()
    film, after = real(batch, "video", 0), real(spoil(batch, "video", "freeze", 1.0), "video", 0)
    still = [t for t in range(1, len(film)) if np.array_equal(after[t], after[t - 1])]
    assert len(still) >= round(0.8 * len(film)) - 1
    assert all(np.array_equal(after[t], film[t]) for t in range(len(film)) if t not in still and t - 1 not in still)


def test_every_frame_is_spoiled_alike():
    """One draw of occlusion serves all frames."""
    batch = make_batch()
    changed = real(spoil(batch, "video", "occlusion", 1.0), "video", 0) != real(batch, "video", 0)
    hidden = (real(spoil(batch, "video", "occlusion", 1.0), "video", 0) == corruption.GRAY).all(axis=(0, 3))  # [H, W]
    assert 0.3 < hidden.mean() < 0.6
    assert not changed[:, ~hidden].any()


def test_numbers_get_noise_and_categories_become_others():
    batch = make_batch()
    after = spoil(batch, "table", "noise", 1.0)
    old, new = (np.concatenate([b.inputs["table"][touched()]]) for b in (batch, after))
    there = batch.mask["table"][touched()]
    np.testing.assert_array_equal(after.mask["table"], batch.mask["table"])
    assert np.std((new - old)[:, [0, 2, 3, 4]][there[:, [0, 2, 3, 4]]]) == pytest.approx(
        corruption.COLUMN_NOISE, rel=0.2
    )
    assert set(new[:, 1]) <= set(range(len(COLUMNS["kind"]["categories"]) + 1))
    swapped = (new != old)[:, 1][there[:, 1]].mean()
    assert swapped == pytest.approx(corruption.LOST * 4 / 5, abs=0.25)  # one draw in five is what was there
    np.testing.assert_array_equal(new[~there], 0)


def test_missing_columns_are_masked_and_one_stays():
    batch = make_batch()
    after = spoil(batch, "table", "missing", 1.0)
    left, before = after.mask["table"][touched()], batch.mask["table"][touched()]
    assert not (left & ~before).any()
    assert left.any(axis=1).all()
    assert left.sum() / before.sum() == pytest.approx(1 - corruption.LOST, abs=0.15)
    np.testing.assert_array_equal(after.inputs["table"][touched()][~left], 0)


def test_edges_are_lost_both_ways():
    batch = make_batch()
    old, new = (b.inputs["graph"][touched()] for b in (batch, spoil(batch, "graph", "edges", 1.0)))
    np.testing.assert_array_equal(new[..., :2], old[..., :2])
    edges = new[..., 2:]
    np.testing.assert_array_equal(edges, edges.swapaxes(1, 2))
    assert not (edges > old[..., 2:]).any()
    assert edges.sum() / old[..., 2:].sum() == pytest.approx(1 - corruption.LOST, abs=0.1)
