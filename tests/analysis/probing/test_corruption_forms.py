"""Corruptions: the effect of each on its modality type at a known severity."""

import difflib

import numpy as np
import pytest
from tokenizers import decoders

from mmfusion.analysis.probing import corruption
from mmfusion.analysis.probing.attention import DISPLAY
from mmfusion.data import text
from tests.analysis.probing.spoiled import (
    COLUMNS,
    LENGTH,
    ROWS,
    TOKENIZERS,
    corrupt_batch,
    corruptible_rows,
    make_batch,
    real,
)


def test_gaussian_noise_scales_with_severity():
    batch = make_batch(size=(64, 64, 3))
    gray = batch.replace(inputs={**batch.inputs, "image": np.full_like(batch.inputs["image"], 128)})
    half, full = (
        corrupt_batch(gray, "image", "gaussian", s).inputs["image"][0].astype(float) - 128 for s in (0.2, 0.4)
    )
    assert half.std() == pytest.approx(0.2 * corruption.GAUSSIAN, rel=0.02)
    assert abs(half.mean()) < 1
    unclipped = np.abs(full) < 127
    np.testing.assert_allclose(full[unclipped], 2 * half[unclipped], atol=1.5)  # both are rounded, and one is doubled


def test_blur_has_its_standard_deviation_per_axis():
    batch = make_batch(size=(40, 80, 3))
    point = np.zeros_like(batch.inputs["image"])
    point[:, 18:22, 38:42, 0] = 255
    after = corrupt_batch(batch.replace(inputs={**batch.inputs, "image": point}), "image", "blur", 1.0).inputs["image"][
        0
    ]
    for axis, length, middle in ((0, 40, 19.5), (1, 80, 39.5)):
        profile = after[:, :, 0].sum(axis=1 - axis, dtype=float)
        variance = profile @ (np.arange(length) - middle) ** 2 / profile.sum()
        assert np.sqrt(variance) == pytest.approx(corruption.BLUR * 40, rel=0.1)  # rounding to uint8 cuts the tails
    assert not after[:, :, 1:].any()  # channels are blurred separately


@pytest.mark.parametrize("size", [(32, 32, 3), (16, 64, 1)])
def test_occlusion_is_a_gray_rectangle_of_the_expected_area(size):
    batch = make_batch(size=size)
    white = batch.replace(inputs={**batch.inputs, "image": np.full_like(batch.inputs["image"], 255)})
    before = np.zeros((ROWS, *size), bool)
    for severity in (0.3, 0.6, 1.0):
        after = corrupt_batch(white, "image", "occlusion", severity).inputs["image"]
        occluded = after == corruption.GRAY
        assert (occluded | (after == 255)).all()
        assert (occluded | ~before).all()  # occluded pixels stay occluded at higher severity
        before = occluded
        for row in corruptible_rows():
            sides = [int(occluded[row].any(axis=axis).sum()) for axis in ((1, 2), (0, 2))]
            assert occluded[row].sum() == sides[0] * sides[1] * size[2]
            assert sides[0] / size[0] == pytest.approx(np.sqrt(severity * corruption.OCCLUSION), abs=0.5 / size[0])
            assert sides[1] / size[1] == pytest.approx(np.sqrt(severity * corruption.OCCLUSION), abs=0.5 / size[1])
    corners = before[corruptible_rows()].reshape(len(corruptible_rows()), -1).argmax(axis=1)
    assert len(set(corners)) > 20


@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_compression_keeps_means_and_removes_detail(channels):
    random = np.random.default_rng(1)
    batch = make_batch(size=(16, 16, channels))
    flat = np.arange(1, channels + 1, dtype=np.uint8) * 50  # [C], a different level per channel
    speckled = np.clip(flat + random.normal(0, 10, batch.inputs["image"].shape), 0, 255).astype(np.uint8)
    batch = batch.replace(inputs={**batch.inputs, "image": speckled})
    best, worst = (
        corrupt_batch(batch, "image", "compression", s).inputs["image"][0].astype(float) for s in (1e-6, 1.0)
    )
    assert np.abs(best.mean(axis=(0, 1)) - flat).max() < 5
    assert np.abs(worst.mean(axis=(0, 1)) - flat).max() < 50  # one step of the coarsest table
    # At the worst quality only the mean of each 8 × 8 block remains.
    detail = [image.reshape(2, 8, 2, 8, channels).std(axis=(1, 3)) for image in (best, worst)]
    assert detail[0].min() > 3
    assert detail[1].max() < 1


@pytest.mark.parametrize("name", corruption.CORRUPTIONS["image"])
def test_corruption_of_float_images_is_that_of_8_bit_ones_without_rounding(name):
    batch = make_batch()
    floats = batch.replace(inputs={**batch.inputs, "image": batch.inputs["image"].astype(np.float32)})
    after = [corrupt_batch(each, "image", name, 0.5).inputs["image"] for each in (batch, floats)]
    assert after[1].dtype == np.float32
    np.testing.assert_allclose(after[1], after[0].astype(float), atol=0.51)
    assert (after[1] != np.rint(after[1])).any() == (name in ("gaussian", "blur"))


def test_display_of_float_images_has_8_bits():
    shown = DISPLAY["image"](np.float32([[[0.4, 254.6]]]), np.ones(1, bool), None)
    assert (shown.dtype, shown.tolist()) == (np.uint8, [[[0, 255]]])


@pytest.mark.parametrize("tokenizer", TOKENIZERS)
def test_drop_keeps_token_order_and_updates_the_mask(tokenizer):
    batch = make_batch(tokenizer)
    shares = []
    before = batch
    for severity in (0.3, 0.6, 1.0):
        after = corrupt_batch(batch, "text", "drop", severity)
        for row in corruptible_rows():
            remaining = iter(real(before, "text", row))  # tokens dropped at lower severity stay dropped
            kept = real(after, "text", row)
            assert all(any(token == other for other in remaining) for token in kept)
            assert len(kept) >= 1
            assert after.mask["text"][row, : len(kept)].all()
            assert (after.inputs["text"][row, len(kept) :] == text.PAD).all()
            assert np.array_equal(kept, after.inputs["text"][row, : len(kept)])
        shares.append(after.mask["text"][corruptible_rows()].sum() / batch.mask["text"][corruptible_rows()].sum())
        before = after
    kept = 1 - corruption.DROP * np.array([0.3, 0.6, 1.0])
    assert np.abs(shares - kept).max() < 0.15  # short texts always keep one token
    assert (shares[:2] > kept[:2] - 0.1).all()


def test_swap_moves_tokens_by_one_position():
    batch = make_batch()
    ids = np.tile(np.arange(2, LENGTH + 2, dtype=np.int32), (ROWS, 1))  # all distinct, so that a move is visible
    batch = batch.replace(inputs={**batch.inputs, "text": np.where(batch.mask["text"], ids, 0)})
    moved = np.zeros_like(batch.mask["text"])
    for severity in (0.3, 0.6, 1.0):
        after = corrupt_batch(batch, "text", "swap", severity)
        assert after.mask["text"].tobytes() == batch.mask["text"].tobytes()
        for row in corruptible_rows():
            new, old = real(after, "text", row), real(batch, "text", row)
            assert np.array_equal(np.sort(new), old)
            assert np.abs(new - old).max() <= 1
        moved_now = after.inputs["text"] != batch.inputs["text"]
        assert (moved_now | ~moved).all()  # tokens swapped at lower severity stay swapped
        moved = moved_now
    # At severity 1 no two neighbours both keep their position.
    unmoved = ~moved[:, 1:] & ~moved[:, :-1] & batch.mask["text"][:, 1:]
    assert not unmoved[corruptible_rows()].any()


def test_typo_makes_known_words_unknown_and_keeps_other_tokens():
    batch = make_batch()
    after = corrupt_batch(batch, "text", "typo", 0.5)
    vocabulary = TOKENIZERS["word"]
    changed_harbour = []
    for row in corruptible_rows():
        old, new = real(batch, "text", row), real(after, "text", row)
        assert len(new) == len(old)  # one token per word, whatever its letters
        assert set(new[new != old]) <= {text.OOV, vocabulary.token_to_id("a"), vocabulary.token_to_id("s")}
        words = [vocabulary.id_to_token(int(i)) for i in old]
        alphabetic = np.array([word.isalpha() for word in words]) & (old != text.OOV)
        assert (new == old)[~alphabetic].all()  # digits, punctuation and unknown words
        changed_harbour += [changed for changed, word in zip(new != old, words, strict=True) if word == "harbour"]
    # Each of the seven letters is changed with probability 0.15.
    assert np.mean(changed_harbour) == pytest.approx(1 - 0.85**7, abs=0.15)


def test_typo_in_byte_pairs_is_reencoded_text():
    tokenizer = TOKENIZERS["bpe"]
    batch = make_batch("bpe")
    after = corrupt_batch(batch, "text", "typo", 1.0, tokenizer="bpe")
    decode = decoders.ByteLevel().decode
    longer = 0
    for row in corruptible_rows():
        old, new = real(batch, "text", row), real(after, "text", row)
        misspelled, original = (decode([tokenizer.id_to_token(int(i)) for i in ids]) for ids in (new, old))
        reencoded, mask = text.encode(tokenizer, [misspelled.replace("�", "")], LENGTH + 4)
        complete = len(new) < LENGTH  # a truncated text may end within a character
        np.testing.assert_array_equal(
            new if complete else new[:-3], reencoded[0][mask[0]] if complete else reencoded[0][: len(new) - 3]
        )
        assert misspelled.count(" ") == original.count(" ") or not complete
        longer += len(new) > len(old)
        assert after.mask["text"][row, : len(new)].all()
        assert (after.inputs["text"][row, len(new) :] == text.PAD).all()
        if complete:
            for a, b in zip(original.split(), misspelled.split(), strict=True):
                assert difflib.SequenceMatcher(None, a, b).ratio() > 0 or len(a) < 4
    assert longer > 10  # misspelled words break into more pieces
    assert (after.mask["text"].sum(axis=1) == LENGTH).any()  # some texts are truncated


def test_misspell_never_empties_a_word():
    random = np.random.default_rng(0)
    found = {corruption._misspell("ab", 1.0, random) for _ in range(2000)}
    assert "" not in found
    assert {"a", "b", "ab", "ba"} <= found  # deleted and swapped letters
    assert {len(word) for word in found} == {1, 2, 3, 4}
    assert corruption._misspell("1'9", 1.0, random) == "1'9"
    assert corruption._misspell("", 1.0, random) == ""


@pytest.mark.parametrize("severity", [0.1, 0.5, 1.0])
def test_audio_noise_has_its_signal_to_noise_ratio(severity):
    batch = make_batch()
    after = corrupt_batch(batch, "audio", "noise", severity)
    for row in corruptible_rows():
        signal = real(batch, "audio", row).astype(float)
        noise = real(after, "audio", row) - signal
        ratio = 10 * np.log10((signal @ signal) / (noise @ noise))
        assert ratio == pytest.approx(40 - 50 * severity, abs=0.01)  # dB
        assert abs(np.corrcoef(noise[1:], noise[:-1])[0, 1]) < 0.3  # white
        assert (after.inputs["audio"][row][~batch.mask["audio"][row]] == 0).all()
    assert after.mask["audio"].tobytes() == batch.mask["audio"].tobytes()


def test_audio_noise_leaves_silence_unchanged():
    batch = make_batch()
    batch = batch.replace(inputs={**batch.inputs, "audio": np.zeros_like(batch.inputs["audio"])})
    assert not corrupt_batch(batch, "audio", "noise", 1.0).inputs["audio"].any()


def test_time_mask_zeroes_one_span_of_the_expected_length():
    batch = make_batch()
    loud = batch.replace(inputs={**batch.inputs, "audio": batch.mask["audio"].astype(np.float32)})
    before = np.zeros_like(batch.mask["audio"])
    for severity in (0.3, 0.6, 1.0):
        after = corrupt_batch(loud, "audio", "time_mask", severity)
        assert after.mask["audio"].tobytes() == batch.mask["audio"].tobytes()
        occluded = loud.mask["audio"] & (after.inputs["audio"] == 0)
        assert (occluded | ~before).all()
        before = occluded
        for row in corruptible_rows():
            samples = np.flatnonzero(occluded[row])
            assert len(samples) == round(severity * corruption.TIME_MASK * batch.mask["audio"][row].sum())
            assert samples[-1] - samples[0] + 1 == len(samples)
    assert len({tuple(np.flatnonzero(occluded[row])[:1]) for row in corruptible_rows()}) > 15


def test_freeze_repeats_video_frames():
    batch = make_batch()
    video, after = real(batch, "video", 0), real(corrupt_batch(batch, "video", "freeze", 1.0), "video", 0)
    repeated = [t for t in range(1, len(video)) if np.array_equal(after[t], after[t - 1])]
    assert len(repeated) >= round(0.8 * len(video)) - 1
    assert all(
        np.array_equal(after[t], video[t]) for t in range(len(video)) if t not in repeated and t - 1 not in repeated
    )


def test_video_frames_share_one_occlusion():
    """The occluded rectangle is sampled once per video."""
    batch = make_batch()
    changed = real(corrupt_batch(batch, "video", "occlusion", 1.0), "video", 0) != real(batch, "video", 0)
    occluded = (real(corrupt_batch(batch, "video", "occlusion", 1.0), "video", 0) == corruption.GRAY).all(
        axis=(0, 3)
    )  # [H, W]
    assert 0.3 < occluded.mean() < 0.6
    assert not changed[:, ~occluded].any()


def test_table_noise_perturbs_numeric_and_resamples_categorical():
    batch = make_batch()
    after = corrupt_batch(batch, "table", "noise", 1.0)
    old, new = (np.concatenate([b.inputs["table"][corruptible_rows()]]) for b in (batch, after))
    mask = batch.mask["table"][corruptible_rows()]
    np.testing.assert_array_equal(after.mask["table"], batch.mask["table"])
    assert np.std((new - old)[:, [0, 2, 3, 4]][mask[:, [0, 2, 3, 4]]]) == pytest.approx(
        corruption.COLUMN_NOISE, rel=0.2
    )
    assert set(new[:, 1]) <= set(range(len(COLUMNS["kind"]["categories"]) + 1))
    swapped = (new != old)[:, 1][mask[:, 1]].mean()
    assert swapped == pytest.approx(corruption.LOST * 4 / 5, abs=0.25)  # one sample in five is the original category
    np.testing.assert_array_equal(new[~mask], 0)


def test_missing_columns_are_masked_but_at_least_one_remains():
    batch = make_batch()
    after = corrupt_batch(batch, "table", "missing", 1.0)
    remaining, before = after.mask["table"][corruptible_rows()], batch.mask["table"][corruptible_rows()]
    assert not (remaining & ~before).any()
    assert remaining.any(axis=1).all()
    assert remaining.sum() / before.sum() == pytest.approx(1 - corruption.LOST, abs=0.15)
    np.testing.assert_array_equal(after.inputs["table"][corruptible_rows()][~remaining], 0)


def test_edge_removal_keeps_the_adjacency_symmetric():
    batch = make_batch()
    old, new = (b.inputs["graph"][corruptible_rows()] for b in (batch, corrupt_batch(batch, "graph", "edges", 1.0)))
    np.testing.assert_array_equal(new[..., :2], old[..., :2])
    edges = new[..., 2:]
    np.testing.assert_array_equal(edges, edges.swapaxes(1, 2))
    assert not (edges > old[..., 2:]).any()
    assert edges.sum() / old[..., 2:].sum() == pytest.approx(1 - corruption.LOST, abs=0.1)
