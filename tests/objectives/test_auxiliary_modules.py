"""Modules of auxiliary objectives: formulas, invariance to absent modalities, and learning."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmfusion.models.model import Encoded
from mmfusion.objectives.alignment import reversed_gradient
from mmfusion.objectives.auxiliary import Auxiliary, has_modalities
from mmfusion.objectives.imputation import Critic
from mmfusion.objectives.registry import OBJECTIVES
from tests.models.random_variables import quick_jit, random_variables

B, D = 12, 6
AUXILIARIES = {name: kind for name, kind in OBJECTIVES.items() if issubclass(kind, Auxiliary)}
RANDOM = np.random.default_rng(0)
NAMES = ("audio", "image", "text")
POOLED = {m: RANDOM.normal(size=(B, D)).astype(np.float32) for m in NAMES}
ALL_PRESENT = {m: np.ones(B, bool) for m in NAMES}
SOME_PRESENT = {m: np.arange(B) % (2 + k) > 0 for k, m in enumerate(NAMES)}  # the first row has no modality
TINY = {"contrastive": {"shared": 4}, "cca": {"shared": 2}, "adversarial": {"hidden": 4}}
TINY |= {name: {"modalities": NAMES, "hidden": 4} for name in ("mvae", "mmvae", "gan")}


def make(name, **changes):
    return AUXILIARIES[name](width=D, **{**TINY[name], **changes})


def encode(present, pooled=POOLED):
    return Encoded({m: jnp.where(present[m][:, None], pooled[m], 0).astype(jnp.float32) for m in pooled}, present)


def variables_of(module):
    return random_variables(module, encode(ALL_PRESENT), train=False)


@pytest.mark.parametrize("name", AUXILIARIES)
def test_auxiliary_module_satisfies_the_contract(name):
    module = make(name)
    variables = variables_of(module)
    weights = RANDOM.normal(size=B).astype(np.float32)

    def loss(params, pooled, present):
        encoded = Encoded({m: jnp.where(present[m][:, None], pooled[m], 0) for m in pooled}, present)
        each = module.apply({"params": params}, encoded, train=False)
        return (weights * has_modalities(present, module.min_present) * each).sum(), each

    step = quick_jit(jax.grad(loss, argnums=(0, 1), has_aux=True))
    gradients, each = step(variables["params"], POOLED, ALL_PRESENT)
    assert each.shape == (B,)
    assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(gradients[0]))

    (gradients, inputs), each = step(variables["params"], POOLED, SOME_PRESENT)
    assert each[0] == 0
    for m in NAMES:
        np.testing.assert_array_equal(inputs[m][~SOME_PRESENT[m]], 0)
    with_nan = {m: np.where(SOME_PRESENT[m][:, None], POOLED[m], np.nan) for m in NAMES}
    jax.tree.map(
        np.testing.assert_array_equal, step(variables["params"], with_nan, SOME_PRESENT), ((gradients, inputs), each)
    )
    all_absent = {m: np.zeros(B, bool) for m in NAMES}
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(step(variables["params"], POOLED, all_absent)))


@pytest.mark.thorough(but=("contrastive",))
@pytest.mark.parametrize("name", ["contrastive", "cca"])
def test_auxiliary_loss_on_two_devices_equals_one(name):
    module = make(name)
    variables = variables_of(module)
    expected = quick_jit(lambda v: module.apply(v, encode(SOME_PRESENT), train=False))(variables)
    shards = jax.tree.map(lambda x: x.reshape(2, B // 2, *x.shape[1:]), encode(SOME_PRESENT))
    distributed = make(name, axis_name="data")
    each = quick_jit(jax.vmap(lambda shard: distributed.apply(variables, shard, train=True), axis_name="data"))(shards)
    np.testing.assert_allclose(each.reshape(B), expected, rtol=1e-5, atol=1e-6)

    def mean(params, shard):
        return jax.lax.psum(distributed.apply({"params": params}, shard, train=True).sum(), "data") / B

    per_device = quick_jit(jax.vmap(jax.grad(mean), (None, 0), axis_name="data"))(variables["params"], shards)
    mean_on_one = lambda params: module.apply({"params": params}, encode(SOME_PRESENT), train=False).sum() / B  # noqa: E731
    gradient = quick_jit(jax.grad(mean_on_one))(variables["params"])
    # Each device has the gradient of the sum over devices; the step averages these gradients.
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a.mean(axis=0), b, rtol=1e-4, atol=1e-5), per_device, gradient)


def test_contrastive_matches_its_formula():
    module = make("contrastive")
    variables = variables_of(module)
    pair = {m: POOLED[m] for m in ("image", "text")}
    present = {"image": ALL_PRESENT["image"], "text": np.arange(B) < 9}
    found = module.apply(variables, encode(present, pair), train=False)
    points = {m: x @ variables["params"][f"project_{m}"]["kernel"] for m, x in pair.items()}
    points = {m: x / np.linalg.norm(x, axis=1, keepdims=True) for m, x in points.items()}
    logits = np.exp(variables["params"]["log_scale"]) * points["image"][:9] @ points["text"][:9].T
    rows = [np.log(np.exp(table).sum(axis=1)) - np.diag(table) for table in (logits, logits.T)]
    np.testing.assert_allclose(found[:9], np.mean(rows, axis=0), rtol=1e-4)
    np.testing.assert_array_equal(found[9:], 0)


def test_cca_matches_the_canonical_correlations():
    module = make("cca", shared=2, ridge=0.0)
    identity = {f"project_{m}": {"kernel": jnp.eye(D, 2)} for m in ("image", "text")}
    rows = 500
    x = RANDOM.normal(size=(rows, 2)).astype(np.float32)
    mixed = (x @ [[1.0, 0.4], [0.2, -1.0]] + RANDOM.normal(size=(rows, 2))).astype(np.float32)
    padded = {m: np.pad(v, ((0, 0), (0, D - 2))) for m, v in (("image", x), ("text", mixed))}
    encoded = Encoded(padded, dict.fromkeys(padded, np.ones(rows, bool)))
    found = module.apply({"params": identity}, encoded, train=False)
    bases = [np.linalg.qr(v - v.mean(axis=0))[0] for v in (x, mixed)]
    expected = np.linalg.svd(bases[0].T @ bases[1], compute_uv=False).mean()
    np.testing.assert_allclose(found, -expected, rtol=1e-3)
    same = Encoded({"image": padded["image"], "text": padded["image"] * 3 + 1}, encoded.present)
    np.testing.assert_allclose(module.apply({"params": identity}, same, train=False), -1, rtol=1e-3)


def test_adversarial_gradient_is_reversed_at_the_features():
    x, g = jnp.array([1.0, -2.0]), jnp.array([0.5, 3.0])
    value, vjp = jax.vjp(lambda x: reversed_gradient(x, 0.5), x)
    np.testing.assert_array_equal(value, x)
    np.testing.assert_array_equal(vjp(g)[0], -0.5 * g)
    module = make("adversarial")
    variables = variables_of(module)
    loss = lambda params, pooled: module.apply({"params": params}, Encoded(pooled, ALL_PRESENT), train=False).mean()  # noqa: E731
    params, pooled = jax.grad(loss, argnums=(0, 1))(variables["params"], POOLED)
    before = loss(variables["params"], POOLED)
    step = 0.05
    assert loss(jax.tree.map(lambda p, g: p - step * g, variables["params"], params), POOLED) < before
    assert loss(variables["params"], {m: x - step * pooled[m] for m, x in POOLED.items()}) > before


def test_mvae_posterior_is_the_product_of_gaussian_experts():
    module = make("mvae")
    variables = variables_of(module)
    encoded = encode(SOME_PRESENT)
    experts = module.apply(variables, encoded, method="experts")
    mean, log_variance = module.apply(variables, experts, SOME_PRESENT, method="product")
    row = 5
    present = [m for m in NAMES if SOME_PRESENT[m][row]]
    precision = 1 + sum(np.exp(-experts[m][1][row]) for m in present)
    expected = sum(experts[m][0][row] * np.exp(-experts[m][1][row]) for m in present) / precision
    np.testing.assert_allclose(mean[row], expected, rtol=1e-5)
    np.testing.assert_allclose(np.exp(-log_variance[row]), precision, rtol=1e-5)
    np.testing.assert_array_equal(mean[0], 0)  # the prior, as the first row has no modality


@pytest.mark.parametrize("name", ["mvae", "mmvae"])
def test_vae_bounds_match_their_formula(name):
    """Compares with float64 NumPy in evaluation, where the latent is the posterior mean."""
    module, encoded = make(name, beta=0.7, latent=3), encode(SOME_PRESENT)
    variables = variables_of(module)
    params = jax.tree.map(np.float64, variables["params"])

    def dense(layer, x):
        return x @ layer["kernel"] + layer["bias"]

    def bound(row, experts):
        precision = 1 + sum(np.exp(-v) for _, v in experts) if name == "mvae" else np.exp(-experts[0][1])
        mean = sum(m * np.exp(-v) for m, v in experts) / precision
        divergence = 0.5 * (mean**2 + 1 / precision + np.log(precision) - 1).sum()
        present = [m for m in NAMES if SOME_PRESENT[m][row]]
        decoded = {
            m: dense(params[f"decode_{m}"]["out"], gelu(dense(params[f"decode_{m}"]["hidden"], mean))) for m in present
        }
        return sum(0.5 * ((decoded[m] - encoded.pooled[m][row]) ** 2).sum() for m in present) + 0.7 * divergence

    expected = np.zeros(B)
    for row in range(B):
        posteriors = {
            m: np.split(dense(params[f"infer_{m}"], encoded.pooled[m][row]), 2) for m in NAMES if SOME_PRESENT[m][row]
        }
        unimodal = [bound(row, [posterior]) for posterior in posteriors.values()]
        if posteriors:
            expected[row] = (
                bound(row, list(posteriors.values())) + sum(unimodal) if name == "mvae" else np.mean(unimodal)
            )
    np.testing.assert_allclose(module.apply(variables, encoded, train=False), expected / D, rtol=1e-4)


def gelu(x):
    return 0.5 * x * (1 + np.tanh(np.sqrt(2 / np.pi) * (x + 0.044715 * x**3)))


def test_mvae_of_three_modalities_trains_a_random_subset():
    module = make("mvae")
    variables = {**variables_of(module), "rows": {"id": np.arange(B, dtype=np.int32)}}
    apply = functools.partial(module.apply, variables, train=True, rngs={"dropout": jax.random.key(0)})
    two = {**ALL_PRESENT, "text": np.zeros(B, bool)}
    with pytest.MonkeyPatch.context() as patch:
        calls = []
        original = type(module).product
        patch.setattr(
            type(module),
            "product",
            lambda self, experts, present: calls.append(present) or original(self, experts, present),
        )
        apply(encode(two))
    assert len(calls) == 5  # all modalities, each one, and a random subset
    subset = np.stack([np.asarray(calls[-1][m]) for m in NAMES])
    assert not subset[NAMES.index("text")].any() and 0 < subset[:2].mean() < 1


@pytest.mark.parametrize("name", ["mvae", "mmvae"])
def test_imputation_targets_receive_no_gradient(name):
    """Otherwise the encoders would learn features that are easy to predict."""
    module = make(name)
    variables = variables_of(module)
    mean, log_variance = np.zeros((B, 16), np.float32), np.zeros((B, 16), np.float32)

    def loss(text):
        encoded = encode(ALL_PRESENT).replace(pooled={**POOLED, "text": text})
        return module.apply(variables, mean, log_variance, encoded, None, 0, method="bound").sum()

    assert loss(POOLED["text"]) != loss(POOLED["text"] + 1)
    np.testing.assert_array_equal(jax.grad(loss)(POOLED["text"]), 0)


def test_frozen_critic_passes_the_gradient_to_its_input():
    critic = Critic(hidden=4)
    x = POOLED["text"]
    variables = critic.init(jax.random.key(0), x, x, frozen=False)
    for frozen in (False, True):
        to_params, to_input = jax.grad(
            lambda v, x, frozen=frozen: critic.apply(v, x, POOLED["image"], frozen=frozen).sum(), argnums=(0, 1)
        )(variables, x)
        assert np.abs(to_input).max() > 0
        assert all((np.abs(g).max() > 0) != frozen for g in jax.tree.leaves(to_params))


@pytest.mark.loop
@pytest.mark.thorough(but=("gan",))
@pytest.mark.parametrize("name", ["mvae", "mmvae", "gan"])
def test_imputation_learns_to_predict_an_absent_modality(name):
    """Text features are a fixed rotation of the image features, which the module learns to predict."""
    rotation = np.linalg.qr(RANDOM.normal(size=(D, D)))[0].astype(np.float32)
    changes = {"beta": 0.1} if "vae" in name else {"error": 50.0}
    module = make(name, modalities=("image", "text"), hidden=32, **changes)
    features = np.random.default_rng(1).normal(size=(64, D)).astype(np.float32)
    all_present = {m: np.ones(64, bool) for m in ("image", "text")}
    variables = module.init(
        jax.random.key(0), Encoded({"image": features, "text": features @ rotation}, all_present), train=False
    )
    optimizer = optax.adam(1e-2)

    @jax.jit
    def step(params, state, key):
        x = jax.random.normal(key, (64, D))
        encoded = Encoded({"image": x, "text": x @ rotation}, all_present)
        grads = jax.grad(lambda p: module.apply({"params": p}, encoded, train=False).mean())(params)
        updates, state = optimizer.update(grads, state)
        return optax.apply_updates(params, updates), state

    params, state = variables["params"], optimizer.init(variables["params"])
    for key in jax.random.split(jax.random.key(1), 500):
        params, state = step(params, state, key)
    image_only = Encoded(
        {"image": features, "text": np.zeros_like(features)},
        {"image": all_present["image"], "text": ~all_present["text"]},
    )
    error = np.square(
        module.apply({"params": params}, image_only, method="impute")["text"] - features @ rotation
    ).mean()
    assert error < 0.35 * np.square(features).mean()


def test_has_modalities_requires_the_objectives_minimum():
    num_present = sum(SOME_PRESENT[m].astype(int) for m in NAMES)
    np.testing.assert_array_equal(has_modalities(SOME_PRESENT, 2), num_present >= 2)
    np.testing.assert_array_equal(has_modalities(SOME_PRESENT, 1), num_present >= 1)
    assert {name: AUXILIARIES[name].min_present for name in AUXILIARIES} == {
        "contrastive": 2, "cca": 2, "adversarial": 1, "mvae": 1, "mmvae": 1, "gan": 2,
    }  # fmt: skip


def test_gan_passes_no_gradient_to_the_encoders():
    module = make("gan")
    variables = variables_of(module)
    loss = jax.grad(lambda pooled: module.apply(variables, encode(ALL_PRESENT, pooled), train=False).sum())
    assert all((slope == 0).all() for slope in loss(POOLED).values())
