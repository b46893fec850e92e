import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfusion.models.pooling import max_pool


def value_and_gradients(pool, x, weights):
    value, gradient = jax.vjp(pool, x)
    return value, gradient(weights)


@pytest.mark.thorough(but=("window1-sides1-float32", "window2-sides2-bfloat16", "window3-sides3-float32"))
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize(("window", "sides"), [((2, 2), (6, 8)), ((2, 2), (7, 5)), ((3, 3), (7, 8)), ((4, 1), (8, 1))])
def test_max_pool_of_separate_windows_equals_reduce_window(window, sides, dtype):
    """Most windows of ReLU outputs in steps of 0.5 have several equal maxima."""
    random = np.random.default_rng(0)
    x = jnp.asarray(nn.relu(np.round(2 * random.normal(size=(3, *sides, 4))) / 2), dtype).at[0, 0].set(-jnp.inf)
    outputs = [3, *(side // size for side, size in zip(sides, window, strict=True)), 4]
    weights = jnp.asarray(random.normal(size=outputs), dtype)
    ours = value_and_gradients(lambda x: max_pool(x, window, window), x, weights)
    plain = value_and_gradients(lambda x: nn.max_pool(x, window, window), x, weights)
    jax.tree.map(np.testing.assert_array_equal, ours, plain)
    assert "reduce_window" not in str(jax.make_jaxpr(lambda x: max_pool(x, window, window))(x))


@pytest.mark.parametrize("position", [0, 1, 2, 3])
def test_max_pool_of_a_window_with_nan_is_nan(position):
    x = np.arange(4, dtype=np.float32)
    x[position] = np.nan
    assert np.isnan(max_pool(jnp.asarray(x.reshape(1, 2, 2, 1)), (2, 2), (2, 2))).all()


@pytest.mark.parametrize(
    ("strides", "padding", "backend"), [((1, 1), 0, "cpu"), ((2, 2), 1, "cpu"), ((2, 2), 0, "gpu")]
)
def test_max_pool_of_overlapping_windows_or_on_accelerators_is_that_of_xla(monkeypatch, strides, padding, backend):
    monkeypatch.setattr(jax, "default_backend", lambda: backend)
    program = jax.make_jaxpr(lambda x: max_pool(x, (2, 2), strides, padding))(jnp.zeros((1, 4, 4, 1)))
    assert "reduce_window" in str(program)
