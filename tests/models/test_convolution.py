import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfusion.models.convolution import conv

RANDOM = np.random.default_rng(0)


def outputs_and_gradients(module, variables, x, weights):
    def loss(variables, x):
        out = module.apply(variables, x)
        return (out * weights).sum(), out

    gradients, out = jax.grad(loss, argnums=(0, 1), has_aux=True)(variables, x)
    return out, gradients


@pytest.mark.thorough(but=("1-0-3", "2-None-1", "stride3-0-4"))
@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize(("stride", "padding"), [(1, 0), (1, None), (2, None), ((2, 1), 0)])
def test_convolution_of_a_first_layer_equals_that_of_xla(channels, stride, padding, monkeypatch):
    x = RANDOM.normal(size=(2, 9, 8, channels)).astype(np.float32)
    module = conv(5, 3, stride, np.float32, padding=padding)
    variables = module.init(jax.random.key(0), x)
    weights = RANDOM.normal(size=module.apply(variables, x).shape)
    assert "conv_general_dilated" not in str(jax.make_jaxpr(lambda x: module.apply(variables, x))(x))
    ours = outputs_and_gradients(module, variables, x, weights)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    assert "conv_general_dilated" in str(jax.make_jaxpr(lambda x: module.apply(variables, x))(x))
    plain = outputs_and_gradients(module, variables, x, weights)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5 * np.abs(b).max()), ours, plain)


@pytest.mark.parametrize(
    ("channels", "kernel", "groups", "dtype"),
    [(5, 3, 1, jnp.float32), (3, 5, 1, jnp.float32), (4, 3, 2, jnp.float32), (3, 3, 1, jnp.bfloat16)],
)
def test_convolution_of_other_layers_is_that_of_xla(channels, kernel, groups, dtype):
    x = jnp.zeros((2, 9, 8, channels))
    module = conv(4, kernel, 1, dtype, groups=groups)
    program = jax.make_jaxpr(lambda x: module.init_with_output(jax.random.key(0), x)[0])(x)
    assert "conv_general_dilated" in str(program)
