import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfusion.data.batch import Batch
from mmfusion.models.build import build
from mmfusion.models.fusion import FUSIONS
from mmfusion.models.model import Outputs
from mmfusion.objectives import Task
from mmfusion.objectives.base import Context
from mmfusion.objectives.gradient_modulation import OGMGE
from mmfusion.objectives.weighting import GradientBlending, GradNorm
from tests.errors import rejects

KEY, ZERO = jax.random.key(0), jnp.int32(0)
GRADS = {
    "encoders_image": {"kernel": jnp.arange(12.0).reshape(3, 4), "bias": jnp.ones(4)},
    "encoders_text": {"kernel": jnp.linspace(-1, 1, 6)},
    "heads_label": {"kernel": jnp.ones((4, 2))},
}


def start(*tasks):
    """Returns the state of GradNorm before the first step."""
    return {"tasks": {task: jnp.ones(()) for task in tasks}, "first": {task: jnp.zeros(()) for task in tasks}}


def updated(gradnorm, state, losses, norms):
    """Returns the state after a step with the given unweighted gradient norms per task."""
    return gradnorm.balance(state, losses, {task: state["tasks"][task] * norm for task, norm in norms.items()})


def scores(image, text):
    return {"image": jnp.float32(image), "text": jnp.float32(text)}


def test_ogm_ge_factors_match_their_formula():
    factors = OGMGE(alpha=0.5).factors(scores(0.8, 0.2))
    assert factors["image"] == pytest.approx(1 - np.tanh(0.5 * 4), rel=1e-5)
    assert factors["text"] == 1
    three = OGMGE(alpha=0.3).factors({**scores(0.6, 0.2), "audio": jnp.float32(0.4)})
    assert three["image"] == pytest.approx(1 - np.tanh(0.3 * 0.6 / 0.3), rel=1e-5)  # the mean of the others is 0.3
    assert three["audio"] == three["text"] == 1
    assert all(factor == 1 for factor in OGMGE().factors(scores(0.5, 0.5)).values())


def test_ogm_ge_scales_encoder_gradients_and_adds_noise():
    changed = OGMGE(alpha=0.5, noise=False, modulate="all").modulated(GRADS, scores(0.8, 0.2), KEY, ZERO)
    np.testing.assert_allclose(
        changed["encoders_image"]["kernel"], (1 - np.tanh(2.0)) * GRADS["encoders_image"]["kernel"], rtol=1e-5
    )
    jax.tree.map(np.testing.assert_array_equal, changed["encoders_text"], GRADS["encoders_text"])
    large = {"encoders_image": {"kernel": 3 * jax.random.normal(KEY, (200, 200))}, "heads_label": jnp.ones(3)}
    noisy = OGMGE(noise=True, modulate="all").modulated(large, scores(0.5, 0.5), KEY, ZERO)
    noise = noisy["encoders_image"]["kernel"] - large["encoders_image"]["kernel"]
    assert np.std(noise) == pytest.approx(3, rel=0.02)
    assert abs(np.corrcoef(noise.ravel(), large["encoders_image"]["kernel"].ravel())[0, 1]) < 0.02
    np.testing.assert_array_equal(noisy["heads_label"], 1)


def test_ogm_ge_modulates_convolution_kernels_only():
    """As the authors' code: arrays of 4 dimensions, of every encoder, by k g + N(0, std(g))."""
    kernel = 2 * jax.random.normal(KEY, (3, 3, 30, 40))
    grads = {
        "encoders_image": {"conv": {"kernel": kernel, "bias": jnp.ones(40)}, "dense": {"kernel": jnp.ones((4, 4))}},
        "encoders_text": {"conv": {"kernel": kernel}, "embed": jnp.ones((5, 4))},
        "heads_label": {"kernel": jnp.ones((1, 2, 3, 4))},
    }
    changed = OGMGE(alpha=0.2).modulated(grads, scores(0.8, 0.4), KEY, ZERO)
    for m, factor in (("image", 1 - np.tanh(0.4)), ("text", 1.0)):
        noise = np.asarray(changed[f"encoders_{m}"]["conv"].pop("kernel") - factor * kernel)
        assert np.std(noise) == pytest.approx(np.std(kernel), rel=0.03) and abs(noise.mean()) < 0.1
        assert abs(np.corrcoef(noise.ravel(), kernel.ravel())[0, 1]) < 0.03
        grads[f"encoders_{m}"]["conv"].pop("kernel")
    jax.tree.map(np.testing.assert_array_equal, changed, grads)
    with rejects("ogm_ge.modulate", "convolutions", says="no encoder has a convolution"):
        OGMGE().modulated(GRADS, scores(0.8, 0.2), KEY, ZERO)


def test_ogm_ge_modulates_between_start_and_until_and_ignores_a_single_modality():
    ogm = OGMGE(start=1, until=3, modulate="all")
    for step, active in ((0, False), (1, True), (2, True), (3, False)):
        changed = ogm.modulated(GRADS, scores(0.8, 0.2), KEY, jnp.int32(step))
        equal = jax.tree.map(lambda a, b: bool((a == b).all()), changed, GRADS)
        assert all(jax.tree.leaves(equal)) != active
    assert ogm.modulated(GRADS, {"image": jnp.float32(0.9)}, KEY, ZERO) is GRADS


def test_ogm_ge_scores_by_the_columns_of_the_joint_head():
    """Σ_i softmax(x_m W_m + b / 2)[y_i] over the rows that have the modality, in float64."""
    random = np.random.default_rng(0)
    features, kernel, bias = random.normal(size=(4, 6)), random.normal(size=(6, 3)), random.normal(size=3)
    targets, present = np.array([0, 2, 1, 1]), {"image": np.ones(4, bool), "text": np.array([1, 1, 0, 1], bool)}
    model = build(
        {"width": 3, "encoders": {m: {"name": "mlp"} for m in present}, "fusion": {"name": "concat", "layers": 0}},
        {m: {} for m in present}, {"label": 3},
    )  # fmt: skip
    terms = OGMGE().terms("ogm_ge", model, {"label": Task("classification", 3)})
    batch = Batch({}, {}, present, {"label": targets}, np.ones(4, np.float32), np.arange(4))
    outputs = Outputs({}, np.float32(features), {}, {}, present, {})
    params = {"heads_label": {"kernel": np.float32(kernel), "bias": np.float32(bias)}}
    for term, columns, rows in zip(terms, (slice(3), slice(3, 6)), present.values(), strict=True):
        logits = features[:, columns] @ kernel[columns] + bias / 2
        probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
        expected = probabilities[np.arange(4), targets][rows].sum()
        assert term.total(Context(batch, outputs, params, {})) == pytest.approx(expected, rel=1e-5)
        assert term.count(batch) == rows.sum()
    for fusion, scored in (({"layers": 2}, "head"), ({"layers": 0}, "probes")):
        other = model.clone(fusion=FUSIONS["concat"](width=3, **fusion))
        assert not OGMGE(scores=scored).terms("ogm_ge", other, {"label": Task("classification", 3)})[0].joint


def test_gradnorm_update_matches_its_formula():
    """Compares with the finite difference of Σ |w_i g_i - target_i| for fixed targets."""
    gradnorm = GradNorm(alpha=1.5, rate=0.1)
    state = {
        "tasks": {"a": jnp.float32(1.2), "b": jnp.float32(0.8)},
        "first": {"a": jnp.float32(2.0), "b": jnp.float32(1.0)},
    }
    losses, norms = {"a": jnp.float32(1.0), "b": jnp.float32(0.9)}, {"a": jnp.float32(0.5), "b": jnp.float32(2.0)}
    after = updated(gradnorm, state, losses, norms)
    remaining = np.array([1 / 2, 0.9 / 1])
    weighted_norms = np.array([1.2 * 0.5, 0.8 * 2.0])
    targets = weighted_norms.mean() * (remaining / remaining.mean()) ** 1.5
    weights, epsilon = np.array([1.2, 0.8]), 1e-6
    differences = [
        ((weights[i] + epsilon) * norm - targets[i], weights[i] * norm - targets[i])
        for i, norm in enumerate((0.5, 2.0))
    ]
    gradient = np.array([(abs(shifted) - abs(value)) / epsilon for shifted, value in differences])
    expected = weights - 0.1 * gradient
    np.testing.assert_allclose(list(after["tasks"].values()), expected * 2 / expected.sum(), rtol=1e-4)
    assert after["first"] == state["first"]


def test_gradnorm_equalises_gradient_norms():
    gradnorm = GradNorm(alpha=0.0, rate=0.02)
    state, norms = start("a", "b", "c"), {"a": 4.0, "b": 1.0, "c": 2.0}
    for _ in range(500):
        state = updated(gradnorm, state, dict.fromkeys(norms, jnp.float32(1.0)), norms)
    weighted = [float(state["tasks"][task]) * norm for task, norm in norms.items()]
    np.testing.assert_allclose(weighted, np.mean(weighted), rtol=0.15)
    assert sum(state["tasks"].values()) == pytest.approx(3, rel=1e-4)
    first = updated(gradnorm, start("a", "b"), {"a": jnp.float32(5), "b": jnp.float32(3)}, {"a": 1.0, "b": 2.0})
    assert (first["first"]["a"], first["first"]["b"]) == (5, 3)
    second = updated(gradnorm, first, {"a": jnp.float32(4), "b": jnp.float32(2)}, {"a": 1.0, "b": 2.0})
    assert second["first"] == first["first"]


def test_gradnorm_increases_the_weight_of_slow_tasks():
    gradnorm, losses = GradNorm(alpha=1.0, rate=0.01), {"a": jnp.float32(0.2), "b": jnp.float32(1.0)}
    state = {**start(*losses), "first": dict.fromkeys(losses, jnp.float32(1.0))}
    for _ in range(200):
        state = updated(gradnorm, state, losses, dict.fromkeys(losses, 1.0))
    assert state["tasks"]["b"] / state["tasks"]["a"] == pytest.approx(5, rel=0.1)  # as (1.0 / 0.2)^1


def test_gradient_blending_weights_match_their_formula():
    before = {"joint": (1.0, 1.1), "image": (1.2, 1.2), "text": (0.9, 1.0)}
    now = {"joint": (0.5, 0.9), "image": (1.0, 1.1), "text": (0.3, 1.2)}
    # Generalisation G: 0.2, 0.1, none; overfitting O: 0.3, 0.1, 0.8.
    ratios = np.array([0.2 / 0.3**2, 0.1 / 0.1**2, 0.0])
    weights = GradientBlending(floor=0.01).on_validation(before, now)
    np.testing.assert_allclose(list(weights.values()), 0.1 + 0.9 * 3 * ratios / ratios.sum(), rtol=1e-6)
    assert sum(weights.values()) == pytest.approx(3)
    floored = GradientBlending(floor=0.2, least=0.0).on_validation(before, now)
    assert floored["image"] / floored["joint"] == pytest.approx((0.1 / 0.2**2) / (0.2 / 0.3**2))
    assert GradientBlending().on_validation(now, now) is None
    assert GradientBlending().on_validation(before, {**now, "joint": (float("nan"), 0.1)}) is None
