import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfusion.balance import OGMGE

KEY, ZERO = jax.random.key(0), jnp.int32(0)
GRADS = {
    "encoders_image": {"kernel": jnp.arange(12.0).reshape(3, 4), "bias": jnp.ones(4)},
    "encoders_text": {"kernel": jnp.linspace(-1, 1, 6)},
    "heads_label": {"kernel": jnp.ones((4, 2))},
}


def scores(image, text):
    return {"image": jnp.float32(image), "text": jnp.float32(text)}


def test_who_leads_is_held_back_by_the_written_formula():
    factors = OGMGE(alpha=0.5).factors(scores(0.8, 0.2))
    assert factors["image"] == pytest.approx(1 - np.tanh(0.5 * 4), rel=1e-5)
    assert factors["text"] == 1
    three = OGMGE(alpha=0.3).factors({**scores(0.6, 0.2), "audio": jnp.float32(0.4)})
    assert three["image"] == pytest.approx(1 - np.tanh(0.3 * 0.6 / 0.3), rel=1e-5)  # the others' mean is 0.3
    assert three["audio"] == three["text"] == 1
    assert all(factor == 1 for factor in OGMGE().factors(scores(0.5, 0.5)).values())


def test_only_encoders_change_and_noise_has_the_gradients_deviation():
    changed = OGMGE(alpha=0.5, noise=False)(GRADS, scores(0.8, 0.2), KEY, ZERO)
    np.testing.assert_allclose(
        changed["encoders_image"]["kernel"], (1 - np.tanh(2.0)) * GRADS["encoders_image"]["kernel"], rtol=1e-5
    )
    jax.tree.map(np.testing.assert_array_equal, changed["encoders_text"], GRADS["encoders_text"])
    large = {"encoders_image": {"kernel": 3 * jax.random.normal(KEY, (200, 200))}, "heads_label": jnp.ones(3)}
    noisy = OGMGE(noise=True)(large, scores(0.5, 0.5), KEY, ZERO)
    added = noisy["encoders_image"]["kernel"] - large["encoders_image"]["kernel"]
    assert np.std(added) == pytest.approx(3, rel=0.02)
    assert abs(np.corrcoef(added.ravel(), large["encoders_image"]["kernel"].ravel())[0, 1]) < 0.02
    np.testing.assert_array_equal(noisy["heads_label"], 1)


def test_it_ends_where_it_is_told_to_and_one_modality_is_left():
    ogm = OGMGE(until=3)
    for step, acts in ((2, True), (3, False)):
        changed = ogm(GRADS, scores(0.8, 0.2), KEY, jnp.int32(step))
        same = jax.tree.map(lambda a, b: bool((a == b).all()), changed, GRADS)
        assert all(jax.tree.leaves(same)) != acts
    assert ogm(GRADS, {"image": jnp.float32(0.9)}, KEY, ZERO) is GRADS
