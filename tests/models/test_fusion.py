import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfusion.models.build import module_options
from mmfusion.models.fusion import FUSIONS
from mmfusion.models.fusion.tensor import _count_sketch
from tests.errors import rejects
from tests.models import renderings
from tests.models.inputs import FEATURE, RNGS, ROWS, WIDTH, make, take, with_nan_padding, without
from tests.models.random_variables import quick_jit, random_variables

FEW_MODALITIES = [f"{name}-{count}" for name in ("concat", "cross_attention") for count in (1, 2)]


@functools.cache
def compiled_step(name, count):
    """Returns the strategy, its parameters, its compiled step and the step's result, shared between tests."""
    tokens, mask = take(count)
    fusion = make(name)
    variables = random_variables(fusion, tokens, mask, train=False)
    weights = np.random.default_rng(1).normal(size=(3, WIDTH)).astype(np.float32)

    def loss(variables, tokens, mask):
        fused = fusion.apply({**variables, **ROWS}, tokens, mask, train=True, rngs=RNGS)
        return (fused.features * weights).sum(), fused

    step = quick_jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    return fusion, variables, step, step(variables, tokens, mask)


@pytest.mark.thorough(but=(*(f"{name}-3" for name in FEATURE), *FEW_MODALITIES))
@pytest.mark.parametrize("count", (1, 2, 3))
@pytest.mark.parametrize("name", FEATURE)
def test_feature_fusion_satisfies_the_contract(name, count):
    tokens, mask = take(count)
    fusion, variables, step, ((gradient, to_tokens), fused) = compiled_step(name, count)
    assert fused.features.shape == (3, WIDTH)
    assert fused.features.dtype == jnp.float32
    unused = {
        jax.tree_util.keystr(k) for k, g in jax.tree_util.tree_leaves_with_path(gradient) if not np.abs(g).max() > 0
    }
    assert not unused
    for m in tokens:
        np.testing.assert_array_equal(to_tokens[m][~mask[m]], 0.0)
        gradient_norm = np.abs(to_tokens[m][mask[m]]).sum(axis=-1)
        # EmbraceNet may sample no feature from a token.
        assert (gradient_norm.max() if name == "embracenet" else gradient_norm.min()) > 0

    # Padding has no influence.
    jax.tree.map(np.testing.assert_array_equal, step(variables, with_nan_padding(tokens, mask), mask)[1], fused)

    # An absent modality changes only its own row and receives no gradient, whatever its values.
    m = list(tokens)[-1]
    absent = without(mask, m, 1)
    (gradient, to_tokens), fused_absent = step(variables, with_nan_padding(tokens, absent), absent)
    other = {**tokens, m: tokens[m] + 1.0 * ~absent[m][..., None]}
    jax.tree.map(np.testing.assert_array_equal, step(variables, other, absent), ((gradient, to_tokens), fused_absent))
    np.testing.assert_array_equal(to_tokens[m][1], 0.0)
    change = np.abs(fused_absent.features - fused.features).max(axis=1)
    assert change[0] < 1e-6
    assert change[1] > 1e-4
    assert change[2] < 1e-6
    for (query, key), attention in fused_absent.attention.items():
        assert attention.shape[:2] == (3, 1 if name == "attention_pool" else 2)
        # One token per modality for strategies of pooled features.
        sizes = zip((query, key), attention.shape[2:], strict=True)
        assert all(n in ((tokens[k].shape[1], 1) if k in tokens else (n,)) for k, n in sizes)
        if m in (query, key):
            np.testing.assert_array_equal(attention[1], 0.0)

    none_present = {m: mask[m] & False for m in mask}
    (gradient, to_tokens), fused_none = step(variables, with_nan_padding(tokens, none_present), none_present)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves((gradient, fused_none)))
    assert all((g == 0).all() for g in jax.tree.leaves(to_tokens))

    # Evaluation returns the same shapes and dtypes.
    evaluated = jax.eval_shape(lambda *args: fusion.apply(*args, train=False), variables, tokens, mask)
    jax.tree.map(lambda a, b: np.testing.assert_equal((a.shape, a.dtype), (b.shape, b.dtype)), evaluated, fused)


@pytest.mark.parametrize("name", ["low_rank_tensor", "mlb", "mfb", "mfh", "mutan", "block"])
def test_every_element_of_a_bilinear_strategy_learns(name):
    """No rank, factor, chunk or block is frozen: they share arrays, whose gradient is elsewhere not zero."""
    *_, ((gradient, _), _) = compiled_step(name, 3)
    for path, leaf in jax.tree_util.tree_leaves_with_path(gradient):
        assert np.abs(leaf).min() > 0, jax.tree_util.keystr(path)


OF_PRODUCTS = ("mfb", "mfh")  # drop products, not features
WITH_DROPOUT = [n for n in FEATURE if "dropout" in module_options(FUSIONS[n]) and n not in OF_PRODUCTS]


@pytest.mark.parametrize("name", WITH_DROPOUT)
def test_fusion_drops_features_and_hidden_units_in_training_only(name):
    tokens, mask = take(2)
    rate = 0.25
    fusion = make(name, dropout=rate)
    variables = random_variables(fusion, tokens, mask, train=False)
    trained, evaluated = quick_jit(
        lambda v: (
            fusion.apply({**v, **ROWS}, tokens, mask, train=True, rngs=RNGS).features,
            fusion.apply(v, tokens, mask, train=False).features,
        )
    )(variables)
    kept = trained != 0
    assert 0.5 < kept.mean() < 1  # 0.75 expected, of 24 features
    assert (evaluated != 0).all()
    # Scaled by 1 / (1 - rate), the features that are kept equal those of evaluation only if nothing before is dropped.
    assert not np.isclose(trained * (1 - rate), evaluated, rtol=1e-3)[kept].all()


@pytest.mark.parametrize("name", OF_PRODUCTS)
def test_mfb_and_mfh_drop_products_before_they_are_summed(name):
    """With one factor, a dropped product is a feature of 0, and the others are doubled in each block."""
    tokens, mask = take(2)
    fusion = make(name, factors=1, dropout=0.5)
    variables = random_variables(fusion, tokens, mask, train=False)
    _, state = fusion.apply(
        {**variables, **ROWS}, tokens, mask, train=True, rngs=RNGS, capture_intermediates=True, mutable="intermediates"
    )
    calls = state["intermediates"]
    prefixes = ("project",) if name == "mfb" else ("block0", "block1")
    factors = [[calls[f"{prefix}_{m}"]["__call__"][0] for m in tokens] for prefix in prefixes]
    dropped = [calls[f"Dropout_{i}"]["__call__"][0] for i in range(len(factors))]  # [B, D, 1]
    products = np.float64(1.0)
    for block, found in zip(factors, dropped, strict=True):
        products = np.float64(products) * np.prod(block, axis=0)
        products = np.where(np.asarray(found) == 0, 0.0, 2 * products)
        np.testing.assert_allclose(found, products, rtol=1e-5)
    assert 0.2 < np.mean(np.asarray(dropped[0]) == 0) < 0.8
    if name == "mfb":
        expected = renderings.signed_sqrt_normalised(products.sum(axis=-1))
        np.testing.assert_allclose(calls["__call__"][0].features, expected, atol=1e-5)


def test_fusion_is_independent_of_the_dictionary_order():
    tokens, mask = take(3)
    fusion = make("concat")
    variables = random_variables(fusion, tokens, mask, train=False)
    run = lambda order: fusion.apply(variables, *({m: x[m] for m in order} for x in (tokens, mask)), train=False)  # noqa: E731
    np.testing.assert_array_equal(run(list(tokens)).features, run(sorted(tokens)).features)


@pytest.mark.parametrize("name", [name for name in FUSIONS if name not in FEATURE])
def test_decision_fusion_satisfies_the_contract(name):
    kind = FUSIONS[name]
    fusion = kind(width=WIDTH) if kind.declares.level == "mixed" else kind()
    random = np.random.default_rng(0)
    present = {"text": jnp.array([True, True, False]), "audio": jnp.array([True, False, False])}
    nan = {m: ~mask[:, None] * jnp.where(mask[:, None], 0.0, jnp.nan) for m, mask in present.items()}
    logits = {m: random.normal(size=(3, 4)) + nan[m] for m in present}
    features = {m: random.normal(size=(3, WIDTH)) + nan[m] for m in present}
    kwargs = {"features": features} if kind.declares.level == "mixed" else {}
    variables = random_variables(fusion, logits, present, **kwargs, train=False)

    def loss(variables, logits):
        out = fusion.apply({**variables, **ROWS}, logits, present, **kwargs, train=True, rngs=RNGS)
        return (out**2).sum(), out

    (gradient, to_logits), out = quick_jit(jax.grad(loss, argnums=(0, 1), has_aux=True))(variables, logits)
    assert np.isfinite(out).all()
    if not variables:  # parameters may include a bias
        np.testing.assert_array_equal(out[2], 0.0)
    assert all(np.isfinite(g).all() and np.abs(g).max() > 0 for g in jax.tree.leaves(gradient))
    for m in logits:
        np.testing.assert_array_equal(to_logits[m][~present[m]], 0.0)
        if name == "stacking":  # stacking stops the gradient of the logits
            np.testing.assert_array_equal(to_logits[m], 0.0)
        else:
            assert np.abs(to_logits[m][present[m]]).min() > 0
    evaluated = fusion.apply(variables, logits, present, **kwargs, train=False)
    np.testing.assert_allclose(evaluated, out, atol=1e-5)


ATTENTION_SUMS = {  # name -> the axes over which the weights of a real query sum to one
    "attention_pool": "keys",
    "nl_gate": "keys",
    "cross_attention": "keys",
    "co_attention": "keys",
    "merged_attention": "keys",
    "bottleneck": "keys",
    "perceiver": "keys",
    "gat": "keys",
    "knowledge_graph": "keys",
    "mult": "pair",
    "qformer": "pair",
    "late_transformer": "less",  # the learned token also attends to itself
    "bilinear_attention": "both axes",
}


@pytest.mark.parametrize("name", FEATURE)
def test_attention_weights_sum_to_one(name):
    _, mask = take(3)
    *_, (_, fused) = compiled_step(name, 3)  # without dropout, as in evaluation
    attention = fused.attention
    assert bool(attention) == (name in ATTENTION_SUMS)
    sum_over = ATTENTION_SUMS.get(name)
    for query in {query for query, _ in attention}:
        per_key = [weights for (q, _), weights in attention.items() if q == query]
        assert all((weights >= 0).all() for weights in per_key)
        if sum_over == "both axes":
            for weights in per_key:
                np.testing.assert_allclose(weights.sum(axis=(2, 3)), 1.0, rtol=1e-5)
            continue
        if (name, query) == ("bottleneck", "learned"):  # one set of weights per modality, each with self-attention
            continue
        real = np.ones((3, per_key[0].shape[2]), bool)
        if query in mask and per_key[0].shape[2] == mask[query].shape[1]:
            real = mask[query]
        totals = [np.moveaxis(weights.sum(axis=-1), 1, 2) for weights in per_key]  # [B, Nq, heads]
        for total in totals if sum_over == "pair" else [sum(totals)]:
            np.testing.assert_array_equal(total[~real], 0.0)
            if sum_over == "less":
                assert ((total > 0) & (total < 1)).all()
            else:
                np.testing.assert_allclose(total[real], 1.0, rtol=1e-5)
    for (_, key), weights in attention.items():
        if key in mask and weights.shape[3] == mask[key].shape[1]:
            np.testing.assert_array_equal(np.moveaxis(weights, 3, 1)[~mask[key]], 0.0)


def test_co_attention_attends_to_the_other_modalities():
    tokens, mask = take(3)
    fusion = make("co_attention")
    fused = jax.eval_shape(lambda: fusion.init_with_output(jax.random.key(0), tokens, mask, train=False)[0])
    assert set(fused.attention) == {(q, k) for q in tokens for k in tokens if q != k}


@pytest.mark.parametrize(("options", "path"), [({"layers": 0}, "co_attention.layers"), ({"heads": 3}, "heads")])
def test_co_attention_rejects_invalid_options(options, path):
    tokens, mask = take(2)
    with rejects(path, *options.values()):
        jax.eval_shape(
            lambda: FUSIONS["co_attention"](width=WIDTH, **options).init(jax.random.key(0), tokens, mask, train=False)
        )


@pytest.mark.parametrize(
    ("name", "options", "path", "value", "fact"),
    [
        ("tensor", {"project": 100}, "tensor.budget", 4096, "10,201 elements"),
        ("multiplicative", {"budget": 100}, "multiplicative.budget", 100, "512 elements"),
        ("block", {"chunks": 3}, "block.chunks", 3, "width=8"),
        ("mcb", {"sketch": 1}, "mcb.sketch", 1, "at least 2"),
        ("embracenet", {"evaluation": "max"}, "embracenet.evaluation", "max", "unknown"),
        ("mult", {"layers": 0}, "mult.layers", 0, "at least 1"),
        ("mult", {"memory": 0}, "mult.memory", 0, "at least 1"),
        ("film", {"kernel": 2}, "film.kernel", 2, "odd"),
        ("central", {"layers": 0}, "central.layers", 0, "at least 1"),
        ("bottleneck", {"fuse_from": 2}, "bottleneck.fuse_from", 2, "layers - 1 = 1"),
        ("bilinear_attention", {"glimpses": 0}, "bilinear_attention.glimpses", 0, "at least 1"),
        ("merged_attention", {"heads": 3}, "heads", 3, "width=8"),
        ("gat", {"heads": 3}, "heads", 3, "width=8"),
    ],
)
def test_feature_fusion_rejects_invalid_options(name, options, path, value, fact):
    tokens, mask = take(2)
    fusion = FUSIONS[name](width=WIDTH, **options)
    with rejects(path, value, says=fact):
        jax.eval_shape(lambda: fusion.init(jax.random.key(0), tokens, mask, train=False))


@pytest.mark.parametrize("name", ["film", "nl_gate", "mag", "cross_attention", "channel_multiply"])
def test_main_must_be_a_modality_of_the_model(name):
    tokens, mask = take(2)
    fusion = FUSIONS[name](width=WIDTH, main="video")
    with rejects(f"{name}.main", "video", "audio"):
        jax.eval_shape(lambda: fusion.init(jax.random.key(0), tokens, mask, train=False))


@pytest.mark.parametrize(
    ("name", "options", "outputs", "path", "value", "suggestion"),
    [
        ("tmc", {}, 1, "tmc", None, ""),
        ("qmf", {}, 1, "qmf", None, ""),
        ("qmf", {"temperature": 0.0}, 2, "qmf.temperature", 0.0, ""),
        ("qmf", {"ranking": -1.0}, 2, "qmf.ranking", -1.0, ""),
        ("qmf", {"history": 0}, 2, "qmf.history", 0, ""),
        ("moe", {"width": WIDTH, "gate": "hard"}, 2, "moe.gate", "hard", "top1"),
    ],
)
def test_decision_fusion_rejects_invalid_options(name, options, outputs, path, value, suggestion):
    logits, present = (dict.fromkeys("ab", x) for x in (np.zeros((2, outputs), np.float32), np.ones(2, bool)))
    features = {m: np.zeros((2, WIDTH), np.float32) for m in "ab"}
    kwargs = {"features": features} if FUSIONS[name].declares.level == "mixed" else {}
    fusion = FUSIONS[name](**options)
    with rejects(path, value, suggestion):
        jax.eval_shape(lambda: fusion.init(jax.random.key(0), logits, present, **kwargs, train=False))


def test_mult_has_the_depth_of_its_paper():
    tokens, mask = take(2)
    fusion = FUSIONS["mult"](width=WIDTH, heads=2)
    names = jax.eval_shape(lambda: fusion.init(jax.random.key(0), tokens, mask, train=False))["params"]
    crossmodal = {f"cross{layer}_{a}_to_{b}" for layer in range(4) for a, b in (("text", "audio"), ("audio", "text"))}
    assert {name for name in names if name.startswith("cross")} == crossmodal
    assert {name for name in names if name.startswith("self")} == {f"self{i}_{m}" for i in range(3) for m in tokens}


@pytest.mark.parametrize("main", [pytest.param("image", marks=pytest.mark.thorough), "text"])
@pytest.mark.parametrize("name", ["nl_gate", "mag", "cross_attention", "channel_multiply"])
def test_main_option_is_equivalent_to_the_first_modality(name, main):
    tokens, mask = take(3)
    first, selected = (FUSIONS[name](width=WIDTH, main=m) for m in ("", main))
    variables = random_variables(selected, tokens, mask, train=False)
    apply = lambda fusion, variables: quick_jit(lambda *args: fusion.apply(*args, train=False))(variables, tokens, mask)  # noqa: E731
    fused = apply(selected, variables)
    # Equal to the default with that modality's name sorted first.
    new_names = {m: "a_first" if m == main else m for m in tokens}
    renamed = _renamed(variables, f"_{main}", "_a_first")
    tokens, mask = ({new_names[m]: x for m, x in arrays.items()} for arrays in (tokens, mask))
    np.testing.assert_allclose(fused.features, apply(first, renamed).features, atol=1e-5)


def _renamed(tree, old, new):
    if not isinstance(tree, dict):
        return tree
    return {key.removesuffix(old) + new if key.endswith(old) else key: _renamed(x, old, new) for key, x in tree.items()}


def test_count_sketch_depends_on_the_name_and_skips_bucket_0():
    first, other = (_count_sketch(name, 64, 32) for name in ("image", "text"))
    for matrix in (first, other):
        np.testing.assert_array_equal(np.abs(matrix).sum(axis=1), 1.0)  # one sign per row
        assert not matrix[:, 0].any() and set(np.unique(matrix)) == {-1.0, 0.0, 1.0}
    assert not np.array_equal(first, other)
    # Sketches are not saved with a run, so they must never change: signed buckets of the first rows.
    assert [int(row @ np.arange(32)) for row in first[:4]] == [22, -31, -17, -25]


@pytest.mark.parametrize("train", [True, False])
def test_embracenet_samples_each_feature_from_one_modality(train):
    tokens, mask = take(3)
    fusion = make("embracenet")
    variables = random_variables(fusion, tokens, mask, train=False)
    sampled = fusion.apply({**variables, **ROWS}, tokens, mask, train=train, rngs=RNGS).features
    # Docked features of each modality.
    docked = [
        fusion.apply(variables, tokens, {m: mask[m] & (m == only) for m in mask}, train=False).features
        for only in tokens
    ]
    selected = [np.isclose(sampled, x, atol=1e-6) for x in docked]
    assert np.logical_or.reduce(selected).all()
    assert all(one.any() for one in selected) and not any(one.all() for one in selected)


def test_embracenet_samples_uniformly_and_once_for_all_in_evaluation():
    tokens, mask = take(3)
    fusion = FUSIONS["embracenet"](width=3000)
    shapes = jax.eval_shape(lambda: fusion.init(jax.random.key(0), tokens, mask, train=False))
    docks = {f"project_{m}": i + 1.0 for i, m in enumerate(tokens)}  # the docked features of each are a constant
    params = {
        name: {"kernel": np.zeros(layer["kernel"].shape), "bias": np.full(3000, docks[name], np.float32)}
        for name, layer in shapes["params"].items()
    }
    absent = without(mask, "image", 1)  # docked as 3
    out = fusion.apply({"params": params}, tokens, absent, train=False).features
    np.testing.assert_array_equal(out[0], out[2])  # the same for every example with the same modalities
    np.testing.assert_array_equal(out[1:2], fusion.apply(  # wherever it is in a batch
        {"params": params}, *({m: x[m][1:2] for m in x} for x in (tokens, absent)), train=False
    ).features)  # fmt: skip
    for row, shares in ((0, (1 / 3, 1 / 3, 1 / 3)), (1, (1 / 2, 1 / 2, 0))):
        found = [np.mean(out[row] == value) for value in (1, 2, 3)]
        np.testing.assert_allclose(found, shares, atol=0.03)
        assert sum(found) == pytest.approx(1)


def test_qmf_passes_no_gradient_through_its_confidence():
    """Of Σ_m c_m l_m · a the gradient of l_m is c_m a: the confidence is a constant."""
    random = np.random.default_rng(0)
    logits = {m: random.normal(size=(2, 3)).astype(np.float32) for m in "ab"}
    direction = random.normal(size=3).astype(np.float32)
    present = {m: np.ones(2, bool) for m in "ab"}
    fuse = lambda x: FUSIONS["qmf"]().apply({}, x, present, train=True)  # noqa: E731
    gradient = jax.grad(lambda x: (fuse(x) @ direction).sum())(logits)
    for m in "ab":
        confidence = fuse({name: logits[m] if name == m else np.zeros((2, 3), np.float32) for name in "ab"}) / logits[m]
        np.testing.assert_allclose(gradient[m], confidence * direction, rtol=1e-5)


def test_moe_with_top_1_gate_selects_one_expert():
    logits = {m: np.float32(x * np.eye(4)[:, :2]) for m, x in (("a", 1.0), ("b", 2.0))}
    present = {m: np.ones(4, bool) for m in logits}
    features = {m: np.random.default_rng(i).normal(size=(4, WIDTH)).astype(np.float32) for i, m in enumerate(logits)}
    soft, top = (FUSIONS["moe"](width=WIDTH, gate=gate) for gate in ("soft", "top1"))
    variables = random_variables(soft, logits, present, features=features, train=False)
    out = top.apply(variables, logits, present, features=features, train=False)
    _, state = soft.apply(
        variables,
        logits,
        present,
        features=features,
        train=False,
        capture_intermediates=True,
        mutable=["intermediates"],
    )
    joint = state["intermediates"]["joint"]["__call__"][0]
    for row in range(4):
        assert any(np.allclose(out[row], expert[row], atol=1e-6) for expert in (logits["a"], logits["b"], joint))
    mixed = soft.apply(variables, logits, present, features=features, train=False)
    assert not np.allclose(out, mixed, atol=1e-3)
