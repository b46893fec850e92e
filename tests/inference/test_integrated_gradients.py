"""Integrated gradients of functions whose integrals are known."""

import jax
import jax.numpy as jnp
import numpy as np

from mmfusion.inference.integrated_gradients import MAX_STEPS, TOLERANCE, integrated_gradients

RANDOM = np.random.default_rng(0)
X, ZERO = (jnp.asarray(RANDOM.normal(size=(6, 5)), jnp.float32) for _ in range(2))
WEIGHT = jnp.asarray(RANDOM.normal(size=5), jnp.float32)


def test_integrated_gradients_of_a_linear_function_are_weight_times_input_minus_baseline():
    found = integrated_gradients(lambda weight, x: x @ weight + 3)(WEIGHT, X, ZERO)
    np.testing.assert_allclose(found.attributions, WEIGHT * (X - ZERO), atol=1e-6)
    np.testing.assert_allclose(found.value, X @ WEIGHT + 3, atol=1e-5)
    np.testing.assert_allclose(found.baseline, ZERO @ WEIGHT + 3, atol=1e-5)
    assert found.gap.max() < 1e-5


def test_integrated_gradients_of_a_product_are_half_of_it_each():
    inputs = {"a": X[:, 0], "b": X[:, 1:3]}
    baseline = jax.tree.map(jnp.zeros_like, inputs)
    found = integrated_gradients(lambda _, x: x["a"] * x["b"][:, 0])(None, inputs, baseline)
    np.testing.assert_allclose(found.attributions["a"], X[:, 0] * X[:, 1] / 2, atol=1e-6)
    np.testing.assert_allclose(found.attributions["b"][:, 0], X[:, 0] * X[:, 1] / 2, atol=1e-6)
    assert not found.attributions["b"][:, 1].any()


def test_integrated_gradients_of_a_norm_of_zero_and_of_kinks_are_complete():
    def output(_, x):
        normalised = x / jnp.sqrt(jnp.square(x).mean(axis=1, keepdims=True) + 1e-6)  # steep near the baseline
        return 10 * normalised @ WEIGHT + jax.nn.relu(x - 0.3).sum(axis=1) * jax.nn.relu(1 - x[:, 0])

    found = integrated_gradients(output)(None, X, jnp.zeros_like(X))
    change = found.value - found.baseline
    assert (found.gap <= TOLERANCE * np.maximum(np.abs(change), 1)).all() and np.abs(change).max() > 10
    np.testing.assert_allclose(np.abs(found.attributions.sum(axis=1) - change), found.gap, atol=1e-9)


def test_integrated_gradients_of_a_row_do_not_depend_on_the_others():
    def output(_, x):
        return jnp.tanh(20 * x[:, 0]) * x[:, 1] ** 3

    integrate = integrated_gradients(output)
    together = integrate(None, X, ZERO).attributions
    alone = np.concatenate([integrate(None, X[i : i + 1], ZERO[i : i + 1]).attributions for i in range(len(X))])
    np.testing.assert_allclose(together, alone, rtol=1e-5, atol=1e-6)


def test_integrated_gradients_that_are_not_finite_are_nan_in_their_row_only():
    bad = X.at[2, 0].set(jnp.nan)
    found = integrated_gradients(lambda _, x: jnp.square(x).sum(axis=1))(None, bad, ZERO)
    assert np.isnan(found.gap).tolist() == [i == 2 for i in range(len(X))]
    np.testing.assert_allclose(found.attributions[:2], (X**2 - ZERO**2)[:2], atol=1e-5)


def test_integrated_gradients_stop_at_the_maximum_of_steps_and_report_the_gap():
    steep = integrated_gradients(lambda _, x: jnp.sin(5000 * x[:, 0]) * 300)
    found = steep(None, jnp.ones((1, 1)), jnp.zeros((1, 1)))
    error = abs(found.attributions.sum() - (found.value - found.baseline)[0])
    np.testing.assert_allclose(found.gap, error, rtol=1e-6)
    assert MAX_STEPS < 1000 and error > TOLERANCE
