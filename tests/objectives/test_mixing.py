import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart
from mmfusion import config as configs
from mmfusion import rng
from mmfusion.data.batch import Batch
from mmfusion.objectives.mixing import CutMix, MixUp, draw
from mmfusion.objectives.modality_dropout import ModalityDropout
from tests import tiny
from tests.errors import rejects

SEED, STEP = jnp.uint32(0), jnp.int32(0)
KEY = rng.key(SEED, "mixing", STEP)


def make_batch(rows=6, weight=None):
    images = np.arange(rows, dtype=np.float32)[:, None, None, None] * np.ones((1, 20, 30, 1), np.float32)
    present = np.ones(rows, bool)
    return Batch(
        inputs={"image": images}, mask={"image": present[:, None]}, present={"image": present}, targets={},
        weight=np.ones(rows, np.float32) if weight is None else np.asarray(weight, np.float32),
        id=np.arange(100, 100 + rows, dtype=np.int32),
    )  # fmt: skip


def test_mixup_mixes_neighbours_with_one_coefficient_per_pair():
    batch = make_batch()
    share, _ = draw(batch, 1.0, KEY)
    np.testing.assert_array_equal(batch.partner, [1, 0, 3, 2, 5, 4])
    np.testing.assert_array_equal(share[::2], share[1::2])
    assert len(set(np.asarray(share).tolist())) == 3
    mixed = MixUp(1.0, "input").transform_batch(batch, SEED, STEP)
    np.testing.assert_array_equal(mixed.mix["targets"], share)
    assert set(mixed.mix) == {"targets"}
    expected = share * np.arange(6) + (1 - share) * batch.partner
    np.testing.assert_allclose(mixed.inputs["image"][:, 3, 4, 0], expected, rtol=1e-6)
    features = MixUp(1.0, "features").transform_batch(batch, SEED, STEP)
    np.testing.assert_array_equal(features.mix["features"], share)
    np.testing.assert_array_equal(features.inputs["image"], batch.inputs["image"])
    # Two shards of the batch are mixed as the full batch.
    shards = [draw(jax.tree.map(lambda x, s=s: x[s], batch), 1.0, KEY)[0] for s in (slice(0, 4), slice(4, 6))]
    np.testing.assert_array_equal(np.concatenate(shards), share)


def test_mixup_skips_pairs_with_padding_or_different_modalities():
    batch = make_batch(6, [1, 0, 1, 1, 1, 1])
    batch = batch.replace(present={"image": np.array([True, True, True, False, True, True])})
    mixed = MixUp(1.0, "input").transform_batch(batch, SEED, STEP)
    np.testing.assert_array_equal(np.asarray(mixed.mix["targets"]) == 1, [True] * 4 + [False] * 2)
    np.testing.assert_array_equal(mixed.inputs["image"][:4], batch.inputs["image"][:4])


def test_cutmix_pastes_a_rectangle_and_mixes_targets_by_area():
    batch = make_batch(40)
    mixed = CutMix(1.0).transform_batch(batch, SEED, STEP)
    images = np.asarray(mixed.inputs["image"])[..., 0]  # [B, H, W]
    kept = images == np.arange(40)[:, None, None]
    np.testing.assert_allclose(mixed.mix["targets"], kept.mean(axis=(1, 2)), atol=1e-6)
    assert set(np.unique(np.abs(images - np.arange(40)[:, None, None]))) <= {0, 1}
    for outside in kept:
        rows, columns = (~outside).any(axis=1), (~outside).any(axis=0)
        np.testing.assert_array_equal(~outside, rows[:, None] & columns[None])
        assert all(np.abs(np.diff(side.astype(int))).sum() <= 2 for side in (rows, columns))
    sampled, _ = draw(batch, 1.0, KEY)
    np.testing.assert_allclose(mixed.mix["targets"], sampled, atol=0.08)


def drop_modalities(batch, seed=0):
    return ModalityDropout(0.3).transform_batch(batch, jnp.uint32(seed), STEP).present


def test_modality_dropout_drops_at_its_rate_but_keeps_one():
    rows = 4000
    present = {"image": np.ones(rows, bool), "text": np.arange(rows) % 4 > 0}
    batch = Batch({}, {}, present, {}, np.ones(rows, np.float32), np.arange(rows, dtype=np.int32))
    after = drop_modalities(batch)
    both = present["text"]
    assert (after["image"] | after["text"]).all()
    assert after["image"][~both].all()
    assert not after["text"][~both].any()
    # Each is dropped with probability 0.3; both with 0.09, in which case one is kept.
    for m in after:
        assert 1 - after[m][both].mean() == pytest.approx(0.3 - 0.09 / 2, abs=0.03)
    subset = jax.tree.map(lambda x: x[7:9], batch)
    np.testing.assert_array_equal(drop_modalities(subset)["image"], after["image"][7:9])
    assert not jnp.array_equal(drop_modalities(batch, seed=1)["image"], after["image"])


@pytest.mark.parametrize(
    ("names", "changes", "path", "fact"),
    [
        ("cutmix", {}, "objectives.cutmix", "'text' is of kind text"),
        ("mixup+cutmix", {}, "objectives.cutmix", "combined with mixup"),
        ("mixup", {"objectives.mixup.where": "input"}, "objectives.mixup", "'text' is of kind text"),
        ("mixup", {"objectives.mixup.where": "logits"}, "objectives.mixup.where", ""),
        ("mixup", {"batch_size": 65}, "batch_size", "groups of 2 rows: choose 64 or 66"),
        ("mixup", {"objectives.mixup.alpha": 0.0}, "objectives.mixup.alpha", "above 0"),
        ("modality_dropout", {"objectives.modality_dropout.rate": 1.0}, "objectives.modality_dropout.rate", "below 1"),
    ],
)
def test_check_rejects_invalid_mixing_objectives(names, changes, path, fact):
    config = quickstart.get_config(f"objectives={names}")
    for key, value in changes.items():
        tiny.put(config, key, value)
    with rejects(f"config.{path}", changes.get(path), says=fact):
        configs.check(config, 1)
