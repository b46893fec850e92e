import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfusion.errors import UserError
from mmfusion.models.fusion import FUSIONS
from mmfusion.models.model import options
from tests.models.random_variables import quick_jit, random_variables

WIDTH = 8
RANDOM = np.random.default_rng(0)
COUNTS = {"text": 5, "audio": 3, "image": 4}  # not in sorted order, as a caller's dictionary may be
TOKENS = {m: RANDOM.normal(size=(3, n, WIDTH)).astype(np.float32) for m, n in COUNTS.items()}
MASK = {
    "text": np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]], bool),
    "audio": np.array([[1, 1, 0], [1, 1, 1], [1, 1, 1]], bool),
    "image": np.ones((3, 4), bool),
}
FEATURE = [name for name, kind in FUSIONS.items() if kind.declares.level == "feature"]
OPTIONS = {
    name: {"heads": 2} | ({"layers": 1} if "layers" in options(kind) else {})
    for name, kind in FUSIONS.items()
    if "heads" in options(kind)
}


def make(name):
    return FUSIONS[name](width=WIDTH, **OPTIONS.get(name, {}))


def take(count):
    names = list(COUNTS)[:count]
    return {m: TOKENS[m] for m in names}, {m: MASK[m] for m in names}


def spoilt(tokens, mask):
    return {m: np.where(mask[m][..., None], tokens[m], np.nan) for m in tokens}


def without(mask, modality, row):
    kept = mask[modality].copy()
    kept[row] = False
    return {**mask, modality: kept}


@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("name", FEATURE)
def test_feature_contract(name, count):
    tokens, mask = take(count)
    fusion = make(name)
    variables = random_variables(fusion, tokens, mask, train=False)
    weights = RANDOM.normal(size=(3, WIDTH)).astype(np.float32)

    def loss(variables, tokens, mask):
        fused = fusion.apply(variables, tokens, mask, train=True)
        return (fused.features * weights).sum(), fused

    step = quick_jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    (gradient, to_tokens), fused = step(variables, tokens, mask)
    assert fused.features.shape == (3, WIDTH)
    assert fused.features.dtype == jnp.float32
    unused = {
        jax.tree_util.keystr(k) for k, g in jax.tree_util.tree_leaves_with_path(gradient) if not np.abs(g).max() > 0
    }
    assert not unused
    for m in tokens:
        np.testing.assert_array_equal(to_tokens[m][~mask[m]], 0.0)
        assert np.abs(to_tokens[m][mask[m]]).sum(axis=-1).min() > 0

    # Padding has no influence.
    jax.tree.map(np.testing.assert_array_equal, step(variables, spoilt(tokens, mask), mask)[1], fused)

    # An absent modality contributes nothing, to that row alone, and receives no gradient, whatever it holds.
    m = list(tokens)[-1]
    absent = without(mask, m, 1)
    (gradient, to_tokens), fewer = step(variables, spoilt(tokens, absent), absent)
    other = {**tokens, m: tokens[m] + 1.0 * ~absent[m][..., None]}
    jax.tree.map(np.testing.assert_array_equal, step(variables, other, absent), ((gradient, to_tokens), fewer))
    np.testing.assert_array_equal(to_tokens[m][1], 0.0)
    change = np.abs(fewer.features - fused.features).max(axis=1)
    assert change[0] < 1e-6
    assert change[1] > 1e-4
    assert change[2] < 1e-6
    for (query, key), attention in fewer.attention.items():
        assert attention.shape[:2] == (3, 2)
        sizes = zip((query, key), attention.shape[2:], strict=True)  # one token of each where only means are read
        assert all(n in ((tokens[k].shape[1], 1) if k in tokens else (n,)) for k, n in sizes)
        if m in (query, key):
            np.testing.assert_array_equal(attention[1], 0.0)

    none = {m: mask[m] & False for m in mask}
    (gradient, to_tokens), nothing = step(variables, spoilt(tokens, none), none)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((gradient, nothing)))
    assert all((g == 0).all() for g in jax.tree.leaves(to_tokens))

    # The same type comes back in evaluation.
    evaluated = jax.eval_shape(lambda *args: fusion.apply(*args, train=False), variables, tokens, mask)
    jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), evaluated, fused)


@pytest.mark.parametrize("name", FEATURE)
def test_jit_is_eager_whatever_the_order_of_the_dictionary(name):
    tokens, mask = take(2)
    fusion = make(name)
    variables = random_variables(fusion, tokens, mask, train=False)
    eager = fusion.apply(variables, tokens, mask, train=False)
    compiled = jax.jit(lambda v, t, m: fusion.apply(v, t, m, train=False))(variables, tokens, mask)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), eager, compiled)


def means(tokens, mask):
    return {
        m: np.stack(
            [tokens[m][row, mask[m][row]].mean(axis=0) if mask[m][row].any() else np.zeros(WIDTH) for row in range(3)]
        )
        for m in sorted(tokens)
    }


def fuse(name, count, mask=None):
    tokens, real = take(count)
    real = mask or real
    fusion = make(name)
    variables = random_variables(fusion, tokens, real, train=False)
    return fusion.apply(variables, tokens, real, train=False).features, variables["params"], means(tokens, real)


def test_mean_is_its_formula():
    mask = without(without(take(3)[1], "text", 0), "audio", 0)
    out, params, x = fuse("mean", 3, mask)
    projected = {m: x[m] @ params[f"project_{m}"]["kernel"] + params[f"project_{m}"]["bias"] for m in x}
    np.testing.assert_allclose(out[0], projected["image"][0], atol=1e-5)
    np.testing.assert_allclose(out[1:], sum(projected.values())[1:] / 3, atol=1e-5)


def test_weighted_is_its_formula():
    mask = without(take(3)[1], "image", 0)
    out, params, x = fuse("weighted", 3, mask)
    projected = [x[m] @ params[f"project_{m}"]["kernel"] + params[f"project_{m}"]["bias"] for m in sorted(x)]
    weights = np.exp([params[f"score_{m}"] for m in sorted(x)])  # audio, image, text
    full = sum(w * p for w, p in zip(weights, projected, strict=True)) / weights.sum()
    np.testing.assert_allclose(out[1:], full[1:], atol=1e-5)
    fewer = (weights[0] * projected[0] + weights[2] * projected[2]) / (weights[0] + weights[2])
    np.testing.assert_allclose(out[0], fewer[0], atol=1e-5)


def test_gmu_ties_the_gates_of_two_modalities():
    out, params, x = fuse("gmu", 2)
    hidden = {m: np.tanh(x[m] @ params[f"hidden_{m}"]["kernel"]) for m in x}
    gate = 1 / (1 + np.exp(-np.concatenate([x["audio"], x["text"]], axis=1) @ params["gate"]["kernel"]))
    np.testing.assert_allclose(out, gate * hidden["audio"] + (1 - gate) * hidden["text"], atol=1e-5)


def test_gmu_gates_each_of_three_modalities():
    out, params, x = fuse("gmu", 3)
    joined = np.concatenate([x["audio"], x["image"], x["text"]], axis=1)
    expected = sum(
        np.tanh(x[m] @ params[f"hidden_{m}"]["kernel"]) / (1 + np.exp(-joined @ params[f"gate_{m}"]["kernel"]))
        for m in x
    )
    np.testing.assert_allclose(out, expected, atol=1e-5)


def test_concat_is_an_mlp_of_the_means():
    out, params, x = fuse("concat", 2)
    hidden = np.concatenate([x["audio"], x["text"]], axis=1)
    for layer in ("Dense_0", "Dense_1"):
        hidden = jax.nn.gelu(hidden @ params[layer]["kernel"] + params[layer]["bias"])
    np.testing.assert_allclose(out, hidden, atol=1e-5)


@pytest.mark.parametrize(
    ("name", "additive"),
    [("mean", True), ("weighted", True), ("concat", False), ("gmu", False), ("cross_attention", False)],
)
def test_only_additive_strategies_have_no_interaction(name, additive):
    """f(a, b) - f(a', b) - f(a, b') + f(a', b') is 0 exactly where f is a sum of functions of one modality."""
    tokens, mask = take(2)
    fusion = make(name)
    variables = random_variables(fusion, tokens, mask, train=False)
    apply = quick_jit(
        lambda text, audio: fusion.apply(variables, {"text": text, "audio": audio}, mask, train=False).features
    )
    text, audio = tokens["text"], tokens["audio"]
    interaction = apply(text, audio) - apply(-text, audio) - apply(text, -audio) + apply(-text, -audio)
    assert (np.abs(interaction).max() < 1e-5) == additive


@pytest.mark.parametrize("name", [name for name in FUSIONS if name not in FEATURE])
def test_decision_contract(name):
    kind = FUSIONS[name]
    fusion = kind(width=WIDTH) if kind.declares.level == "mixed" else kind()
    present = {"text": jnp.array([True, True, False]), "audio": jnp.array([True, False, False])}
    nan = {m: ~there[:, None] * jnp.where(there[:, None], 0.0, jnp.nan) for m, there in present.items()}
    logits = {m: RANDOM.normal(size=(3, 4)) + nan[m] for m in present}
    features = {m: RANDOM.normal(size=(3, WIDTH)) + nan[m] for m in present}
    more = {"features": features} if kind.declares.level == "mixed" else {}
    variables = random_variables(fusion, logits, present, **more, train=False)

    def loss(variables, logits):
        out = fusion.apply(variables, logits, present, **more, train=True)
        return (out**2).sum(), out

    (gradient, to_logits), out = quick_jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(variables, logits)
    assert np.isfinite(out).all()
    if not variables:  # what has parameters may have a bias
        np.testing.assert_array_equal(out[2], 0.0)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))
    for m in logits:
        np.testing.assert_array_equal(to_logits[m][~present[m]], 0.0)
        if name == "stacking":  # its logits are constants to it
            np.testing.assert_array_equal(to_logits[m], 0.0)
        else:
            assert np.abs(to_logits[m][present[m]]).min() > 0
    again = fusion.apply(variables, logits, present, **more, train=False)
    np.testing.assert_allclose(again, out, atol=1e-5)


def test_late_mean_is_the_mean_of_the_present():
    logits = {m: RANDOM.normal(size=(2, 4)).astype(np.float32) for m in "abc"}
    present = {"a": np.array([True, True]), "b": np.array([True, False]), "c": np.array([True, True])}
    out = FUSIONS["late_mean"]().apply({}, logits, present, train=False)
    np.testing.assert_allclose(out[0], (logits["a"] + logits["b"] + logits["c"])[0] / 3, rtol=1e-5)
    np.testing.assert_allclose(out[1], (logits["a"] + logits["c"])[1] / 2, rtol=1e-5)


def test_co_attention_weights_sum_to_one_over_the_other_modalities():
    tokens, mask = take(3)
    fusion = make("co_attention")
    variables = random_variables(fusion, tokens, mask, train=False)
    attention = quick_jit(lambda v, t, m: fusion.apply(v, t, m, train=False))(variables, tokens, mask).attention
    assert set(attention) == {(q, k) for q in tokens for k in tokens if q != k}
    for q in tokens:
        total = sum(attention[q, k].sum(axis=-1) for k in tokens if k != q)  # [B, heads, Nq]
        np.testing.assert_allclose(np.moveaxis(total, 1, 2)[mask[q]], 1.0, rtol=1e-5)


@pytest.mark.parametrize(
    ("options", "said"), [({"pool": "x"}, "mean_max"), ({"layers": 0}, "layers"), ({"heads": 3}, "heads=3")]
)
def test_co_attention_refuses_wrong_options(options, said):
    tokens, mask = take(2)
    with pytest.raises(UserError, match=said):
        jax.eval_shape(
            lambda: FUSIONS["co_attention"](width=WIDTH, **options).init(jax.random.key(0), tokens, mask, train=False)
        )
