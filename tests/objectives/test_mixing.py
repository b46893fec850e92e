import jax
import jax.numpy as jnp
import numpy as np
import pytest

from configs import quickstart
from mmfusion import config as configs
from mmfusion.data.batch import Batch
from mmfusion.data.preprocess import lose_modalities
from mmfusion.errors import UserError
from mmfusion.objectives.mixing import Mixing

KEY = jax.random.key(0)


def make_batch(rows=6, weight=None):
    pictures = np.arange(rows, dtype=np.float32)[:, None, None, None] * np.ones((1, 20, 30, 1), np.float32)
    there = np.ones(rows, bool)
    return Batch(
        inputs={"image": pictures}, mask={"image": there[:, None]}, present={"image": there}, targets={},
        weight=np.ones(rows, np.float32) if weight is None else np.asarray(weight, np.float32),
        id=np.arange(100, 100 + rows, dtype=np.int32),
    )  # fmt: skip


def test_neighbours_are_mixed_by_one_draw_of_the_pair():
    mixing, batch = Mixing("mixup", 1.0, "input"), make_batch()
    mix = mixing.draw(batch, KEY)
    np.testing.assert_array_equal(mix.partner, [1, 0, 3, 2, 5, 4])
    np.testing.assert_array_equal(mix.share[::2], mix.share[1::2])
    assert len(set(np.asarray(mix.share).tolist())) == 3
    mixed, same = mixing.inputs(batch, mix)
    np.testing.assert_array_equal(same.share, mix.share)
    expected = mix.share * np.arange(6) + (1 - mix.share) * mix.partner
    np.testing.assert_allclose(mixed.inputs["image"][:, 3, 4, 0], expected, rtol=1e-6)
    # Half a batch on each of two devices is mixed as the whole.
    halves = [mixing.draw(jax.tree.map(lambda x, s=s: x[s], batch), KEY).share for s in (slice(0, 4), slice(4, 6))]
    np.testing.assert_array_equal(np.concatenate(halves), mix.share)


def test_what_does_not_count_is_not_mixed_in():
    batch = make_batch(6, [1, 0, 1, 1, 1, 1])
    batch = batch.replace(present={"image": np.array([True, True, True, False, True, True])})
    mixing = Mixing("mixup", 1.0, "input")
    mix = mixing.draw(batch, KEY)
    np.testing.assert_array_equal(np.asarray(mix.share) == 1, [True] * 4 + [False] * 2)
    mixed, _ = mixing.inputs(batch, mix)
    np.testing.assert_array_equal(mixed.inputs["image"][:4], batch.inputs["image"][:4])


def test_a_rectangle_is_the_partners_and_counts_by_its_area():
    mixing, batch = Mixing("cutmix", 1.0, "input"), make_batch(40)
    mixed, mix = mixing.inputs(batch, mixing.draw(batch, KEY))
    pictures = np.asarray(mixed.inputs["image"])[..., 0]  # [B, H, W]
    own = pictures == np.arange(40)[:, None, None]
    np.testing.assert_allclose(mix.share, own.mean(axis=(1, 2)), atol=1e-6)
    assert set(np.unique(np.abs(pictures - np.arange(40)[:, None, None]))) <= {0, 1}
    for outside in own:
        rows, columns = (~outside).any(axis=1), (~outside).any(axis=0)
        np.testing.assert_array_equal(~outside, rows[:, None] & columns[None])
        assert all(np.abs(np.diff(side.astype(int))).sum() <= 2 for side in (rows, columns))
    drawn = mixing.draw(batch, KEY).share
    np.testing.assert_allclose(mix.share, drawn, atol=0.08)


def test_modalities_are_lost_at_their_rate_and_one_stays():
    rows = 4000
    there = {"image": np.ones(rows, bool), "text": np.arange(rows) % 4 > 0}
    batch = Batch({}, {}, there, {}, np.ones(rows, np.float32), np.arange(rows, dtype=np.int32))
    after = lose_modalities(batch, 0.3, KEY).present
    both = there["text"]
    assert (after["image"] | after["text"]).all()
    assert after["image"][~both].all()
    assert not after["text"][~both].any()
    # Each is lost with 0.3, but for the last one: both with 0.09, of which one stays.
    for m in after:
        assert 1 - after[m][both].mean() == pytest.approx(0.3 - 0.09 / 2, abs=0.03)
    part = jax.tree.map(lambda x: x[7:9], batch)
    np.testing.assert_array_equal(lose_modalities(part, 0.3, KEY).present["image"], after["image"][7:9])
    assert not jnp.array_equal(lose_modalities(batch, 0.3, jax.random.key(1)).present["image"], after["image"])


@pytest.mark.parametrize(
    ("names", "changes", "said"),
    [
        ("cutmix", {}, "'text' is text, which would stay its own: use mixup with where=features"),
        ("mixup+cutmix", {}, "mixup and cutmix cannot both mix"),
        ("mixup", {"mixup.where": "input"}, "'text' is text"),
        ("mixup", {"mixup.where": "logits"}, r"mixup\.where='logits' is unknown"),
        (
            "mixup",
            {"batch_size": 65},
            r"divide over 1 devices x 1 micro-batches of pairs that are mixed: choose 64 or 66",
        ),
        ("mixup", {"mixup.alpha": 0.0}, r"mixup\.alpha=0\.0 must be above 0"),
        ("modality_dropout", {"modality_dropout.rate": 1.0}, r"rate=1\.0 must be at least 0 and below 1"),
    ],
)
def test_what_cannot_be_mixed_is_told(names, changes, said):
    config = quickstart.get_config(f"objectives={names}")
    with config.unlocked():
        for path, value in changes.items():
            name, _, key = path.partition(".")
            section = config.objectives[name] if key else config
            section[key or name] = value
    with pytest.raises(UserError, match=said):
        configs.check(config, 1)
