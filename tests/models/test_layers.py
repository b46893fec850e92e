import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfusion import rng
from mmfusion.models import layers
from tests.errors import rejects
from tests.models.random_variables import random_variables

RANDOM = np.random.default_rng(0)


def normal(*shape):
    return RANDOM.normal(size=shape).astype(np.float32)


TOKENS = normal(3, 4, 2)
MASK = np.array([[1, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]], bool)


@pytest.mark.parametrize(("reduce", "expected"), [(layers.masked_mean, np.mean), (layers.masked_max, np.max)])
def test_masked_reduction_uses_real_positions_only(reduce, expected):
    garbage = np.where(MASK[..., None], TOKENS - 5.0, np.nan)  # negative: a leaked zero would be the maximum
    out = reduce(garbage, MASK)
    np.testing.assert_allclose(out[0], expected(garbage[0, [0, 1, 3]], axis=0), rtol=1e-6)
    np.testing.assert_allclose(out[2], garbage[2, 0], rtol=1e-6)
    np.testing.assert_array_equal(out[1], 0.0)
    gradient = jax.grad(lambda t: (reduce(t, MASK) * TOKENS[:, 0]).sum())(garbage)
    np.testing.assert_array_equal(gradient[~MASK], 0.0)
    assert np.isfinite(gradient).all()
    assert (np.abs(gradient[MASK]).sum(axis=1) > 0).any()


def apply_dropout(ids, step=0, rate=0.4, shape=(6, 5)):
    x = jnp.ones((len(ids), *shape))
    variables = {"rows": {"id": jnp.asarray(ids)}}
    return layers.Dropout(rate).apply(variables, x, train=True, rngs={"dropout": rng.key(7, "dropout", step)})


def test_dropout_depends_on_the_example_and_the_step_only():
    batch = apply_dropout([10, 11, 12, 13])
    np.testing.assert_array_equal(apply_dropout([13, 11]), batch[jnp.array([3, 1])])
    np.testing.assert_array_equal(
        jax.vmap(lambda i: apply_dropout(i[None])[0])(jnp.array([12, 10])), batch[np.array([2, 0])]
    )
    assert not np.array_equal(batch[0], batch[1])
    assert not np.array_equal(apply_dropout([10], step=1), batch[:1])


def test_dropout_masks_of_two_layers_differ():
    class Twice(nn.Module):
        @nn.compact
        def __call__(self, x):
            return layers.Dropout(0.5)(x, train=True), layers.Dropout(0.5)(x, train=True)

    variables = {"rows": {"id": jnp.arange(4)}}
    first, second = Twice().apply(variables, jnp.ones((4, 30)), rngs={"dropout": jax.random.key(0)})
    assert not np.array_equal(first, second)


def test_dropout_keeps_the_mean():
    out = np.asarray(apply_dropout(range(50), rate=0.25, shape=(200,)))
    np.testing.assert_allclose(np.unique(out), [0.0, 1 / 0.75], rtol=1e-6)
    assert abs((out == 0).mean() - 0.25) < 0.02  # five standard deviations


def test_dropout_is_the_identity_in_evaluation_and_requires_rows():
    x = jnp.ones((2, 3))
    np.testing.assert_array_equal(layers.Dropout(0.5).apply({}, x, train=False), x)
    with pytest.raises(ValueError, match="rows"):
        layers.Dropout(0.5).apply({}, x, train=True, rngs={"dropout": jax.random.key(0)})


NORM_X = normal(6, 3, 4) * 2 + 1
NORM_VARIABLES = {
    "params": {"scale": normal(4), "bias": normal(4)},
    "batch_stats": {"mean": normal(4), "var": np.abs(normal(4)) + 0.5},
}


def batch_norm(x, mask, *, train, axis_name=None):
    return layers.BatchNorm(axis_name).apply(NORM_VARIABLES, x, mask, train=train, mutable=["batch_stats"])


@pytest.mark.parametrize("train", [True, False])
def test_batch_norm_equals_flax_batch_norm_without_padding(train):
    reference = nn.BatchNorm(use_running_average=not train, momentum=0.9, epsilon=1e-5)
    expected, expected_stats = reference.apply(NORM_VARIABLES, NORM_X, mutable=["batch_stats"])
    out, stats = batch_norm(NORM_X, np.ones(6, bool), train=train)
    np.testing.assert_allclose(out, expected, atol=1e-5)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5),
        stats["batch_stats"],
        dict(expected_stats)["batch_stats"],
    )


@pytest.mark.parametrize("per_position", [False, True])
def test_batch_norm_with_a_mask_equals_batch_norm_of_the_subset(per_position):
    mask = np.array([1, 0, 1, 1, 0, 1], bool)
    if per_position:
        mask = mask[:, None] & np.array([[1, 1, 0]], bool)
    garbage = np.where(mask.reshape(*mask.shape, *[1] * (3 - mask.ndim)), NORM_X, np.nan)
    out, stats = batch_norm(garbage, mask, train=True)
    subset = NORM_X[mask].reshape(-1, 1, 4)
    expected, expected_stats = batch_norm(subset, np.ones(len(subset), bool), train=True)
    np.testing.assert_allclose(out[mask].reshape(expected.shape), expected, atol=1e-5)
    np.testing.assert_array_equal(out[~mask], 0.0)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5), stats, expected_stats)


def test_batch_norm_without_real_rows_keeps_its_statistics():
    out, stats = batch_norm(np.full_like(NORM_X, np.nan), np.zeros(6, bool), train=True)
    np.testing.assert_array_equal(out, 0.0)
    jax.tree.map(np.testing.assert_array_equal, stats["batch_stats"], NORM_VARIABLES["batch_stats"])


def test_batch_norm_over_devices_equals_one_global_batch():
    mask = np.array([1, 1, 1, 1, 0, 0], bool)  # shards of 3 and 1 real rows: a mean of means would be wrong
    weights = normal(6, 3, 4)

    def loss(x, weights, mask, axis_name):
        out, stats = batch_norm(x, mask, train=True, axis_name=axis_name)
        return (out * weights).sum(), stats

    (_, expected), gradient = jax.value_and_grad(loss, has_aux=True)(NORM_X, weights, mask, None)
    shards = [a.reshape(2, 3, *a.shape[1:]) for a in (NORM_X, weights, mask)]
    sharded = jax.vmap(jax.value_and_grad(lambda *a: loss(*a, "data"), has_aux=True), axis_name="data")
    (_, stats), shard_gradient = sharded(*shards)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a[0], b, rtol=1e-5), stats, expected)
    jax.tree.map(lambda a: np.testing.assert_array_equal(a[0], a[1]), stats)
    np.testing.assert_allclose(shard_gradient.reshape(gradient.shape), gradient, atol=1e-5)


def test_group_norm_matches_its_formula_on_real_positions():
    x, scale, bias = normal(3, 5, 3, 12), normal(12), normal(12)
    mask = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [0, 0, 0, 0, 0]], bool)
    garbage = np.where(mask[..., None, None], x, np.nan)

    def apply(params, x):
        return layers.Norm("group").apply({"params": {"group": params}}, x, mask, train=False)

    params = {"scale": scale, "bias": bias}
    out = apply(params, garbage)
    for row in range(3):
        groups = x[row][mask[row]].reshape(-1, 3, 2, 6)  # 12 channels are 2 groups of 6
        if groups.size:
            mean, var = groups.mean((0, 1, 3), keepdims=True), groups.var((0, 1, 3), keepdims=True)
            expected = ((groups - mean) / np.sqrt(var + 1e-6)).reshape(-1, 3, 12) * scale + bias
            np.testing.assert_allclose(out[row][mask[row]], expected, atol=1e-5)
    np.testing.assert_array_equal(out[~mask], 0.0)
    gradients = jax.grad(lambda params, x: (apply(params, x) ** 2).sum(), argnums=(0, 1))(params, garbage)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(gradients))
    np.testing.assert_array_equal(gradients[1][~mask], 0.0)


def test_norm_rejects_an_unknown_name():
    with rejects("norm", "layers", "layer"):
        layers.Norm("layers").init(jax.random.key(0), NORM_X, np.ones(6, bool), train=False)


def test_attention_matches_the_papers_formula():
    queries, keys, mask = normal(2, 3, 8), normal(2, 5, 8), np.array([[1, 1, 1, 1, 1], [1, 0, 1, 0, 0]], bool)
    module = layers.Attention(heads=2, width=8)
    variables = random_variables(module, queries, keys, mask)
    out, weights = module.apply(variables, queries, keys, mask)
    params = variables["params"]
    q, k, v = (
        x @ params[n]["kernel"] + params[n].get("bias", 0.0)
        for x, n in ((queries, "query"), (keys, "key"), (keys, "value"))
    )
    for row in range(2):
        heads = []
        for head in range(2):
            columns = slice(4 * head, 4 * head + 4)
            scores = np.exp(q[row, :, columns] @ k[row, mask[row], columns].T / np.sqrt(4.0))
            expected = scores / scores.sum(axis=1, keepdims=True)
            np.testing.assert_allclose(weights[row, head][:, mask[row]], expected, atol=1e-5)
            np.testing.assert_array_equal(weights[row, head][:, ~mask[row]], 0.0)
            heads.append(expected @ v[row, mask[row], columns])
        expected = np.concatenate(heads, axis=1) @ params["out"]["kernel"] + params["out"]["bias"]
        np.testing.assert_allclose(out[row], expected, atol=1e-5)


def test_attention_to_masked_keys_is_zero_without_gradient():
    queries, mask = normal(2, 3, 8), np.array([[0, 0, 0], [1, 1, 0]], bool)
    keys = np.where(mask[..., None], normal(2, 3, 8), np.nan)
    module = layers.Attention(heads=2, width=8)
    variables = random_variables(module, queries, keys, mask)

    def loss(variables, queries, keys):
        out, weights = module.apply(variables, queries, keys, mask)
        return (out**2).sum() + (weights**2).sum(), (out, weights)

    gradients, (out, weights) = jax.jit(jax.grad(loss, argnums=(0, 1, 2), has_aux=True))(variables, queries, keys)
    np.testing.assert_array_equal(out[0], 0.0)
    np.testing.assert_array_equal(weights[0], 0.0)
    np.testing.assert_array_equal(gradients[1][0], 0.0)
    np.testing.assert_array_equal(gradients[2][~mask], 0.0)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(gradients))
    assert np.abs(gradients[2][mask]).min() > 0


@pytest.mark.parametrize("scale", [1.0, 10.0])
def test_heads_first_attention_equals_dot_product_attention(scale):
    """Scores of some hundreds would overflow without their maximum subtracted."""
    query, key, value = scale * normal(3, 4, 2, 8), scale * normal(3, 5, 2, 8), normal(3, 5, 2, 8)
    mask = np.array([[1, 1, 1, 1, 1], [0, 0, 1, 1, 0], [1, 0, 0, 0, 0]], bool)
    weights = normal(3, 4, 2, 8)

    def plain(*tokens):
        pairs = jnp.broadcast_to(mask[:, None, None], (3, 1, 4, 5))
        return jax.nn.dot_product_attention(*tokens, mask=pairs, implementation="xla")

    def heads_first(*tokens):
        return layers.heads_first_attention(*tokens, mask)

    results = []
    for attention in (plain, heads_first):
        out, gradients = jax.vjp(attention, query, key, value)
        results.append((out, *gradients(weights)))
    for expected, actual in zip(*results, strict=True):
        assert np.isfinite(actual).all()
        np.testing.assert_allclose(actual, expected, rtol=1e-5, atol=1e-5 * scale)
    for gradient in results[1][2:]:  # of the keys and values
        np.testing.assert_array_equal(gradient[~mask], 0.0)


def test_attention_rejects_heads_that_do_not_divide_the_width():
    with rejects("heads", 3, says="width=8"):
        layers.Attention(heads=3, width=8).init(jax.random.key(0), TOKENS, TOKENS, MASK)


class Device:
    def __init__(self, platform, capability):
        self.platform = platform
        self.compute_capability = capability


@pytest.mark.parametrize(
    ("device", "dtype", "head_dim", "queries", "keys", "expected"),
    [
        (Device("gpu", "9.0"), jnp.bfloat16, 16, 4, 6, "cudnn"),
        (Device("gpu", "8.0"), jnp.float16, 128, 4, 6, "cudnn"),
        (Device("gpu", "7.5"), jnp.bfloat16, 16, 4, 6, "xla"),
        (Device("gpu", "gfx90a"), jnp.bfloat16, 16, 4, 6, "xla"),
        (Device("gpu", "9.0"), jnp.float32, 16, 4, 6, "xla"),
        (Device("gpu", "9.0"), jnp.bfloat16, 12, 4, 6, "xla"),
        (Device("gpu", "9.0"), jnp.bfloat16, 136, 4, 6, "xla"),
        (Device("gpu", "9.0"), jnp.bfloat16, 16, 3, 6, "xla"),
        (Device("gpu", "9.0"), jnp.bfloat16, 16, 4, 5, "xla"),
        (Device("cpu", ""), jnp.bfloat16, 16, 4, 6, "xla"),
        (Device("cpu", ""), jnp.float32, 16, 4, 6, "heads_first"),
    ],
)
def test_attention_kernel_depends_on_device_and_shape(monkeypatch, device, dtype, head_dim, queries, keys, expected):
    implementations = []
    attention = jax.nn.dot_product_attention

    def record(*args, implementation, **kwargs):
        implementations.append(implementation)
        return attention(*args, implementation="xla", **kwargs)

    def heads_first(*args):
        implementations.append("heads_first")
        return heads_first_attention(*args)

    heads_first_attention = layers.heads_first_attention
    monkeypatch.setattr(layers, "heads_first_attention", heads_first)
    monkeypatch.setattr(jax.nn, "dot_product_attention", record)
    monkeypatch.setattr(jax, "devices", lambda: [device])
    module = layers.Attention(heads=2, width=2 * head_dim, dtype=dtype)
    shapes = [jax.ShapeDtypeStruct((3, n, 8), jnp.float32) for n in (queries, keys)]
    mask = jax.ShapeDtypeStruct((3, keys), bool)
    jax.eval_shape(lambda *args: module.init(jax.random.key(0), *args), *shapes, mask)
    assert set(implementations) == {expected}


@pytest.mark.parametrize("self_attention", [True, False])
def test_transformer_block_ignores_masked_tokens(self_attention):
    tokens, mask = normal(3, 4, 8), MASK
    context = () if self_attention else (normal(3, 2, 8), np.array([[1, 0], [1, 1], [0, 0]], bool))
    module = layers.TransformerBlock(heads=2, width=8)
    variables = random_variables(module, tokens, mask, *context, train=False)
    apply = jax.jit(lambda *args: module.apply(variables, *args, train=False))
    out, weights = apply(tokens, mask, *context)
    garbage = [np.where(m[..., None], x, np.nan) for x, m in ((tokens, mask), context or (tokens, mask))]
    padded, padded_weights = apply(garbage[0], mask, *([] if self_attention else [garbage[1], context[1]]))
    np.testing.assert_array_equal(padded, out)
    np.testing.assert_array_equal(padded_weights, weights)
    np.testing.assert_array_equal(out[~mask], 0.0)
    assert np.abs(out[mask] - tokens[mask]).min() > 0
    np.testing.assert_array_equal(np.moveaxis(weights, 1, 2)[~mask], 0.0)
