import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from mmfusion import optim
from mmfusion.optim.freezing import Freezing
from tests.errors import rejects

PARAMS = {"kernel": jnp.array([[1.0, -2.0], [3.0, 0.5]]), "bias": jnp.array([0.3, -0.7])}
GRADS = {"kernel": jnp.array([[0.1, 0.2], [-0.3, 0.4]]), "bias": jnp.array([-0.5, 0.6])}


def config(name, **changes):
    return {"name": name, "learning_rate": 0.1, "clip_norm": 0.0, **optim.options(name), **changes}


SCALES = (1.0, 2.0, -0.5, 0.8, -1.5, 0.1, -0.3, 0.4)  # of the gradient per update


def run(transformation):
    params, state = PARAMS, transformation.init(PARAMS)
    for scale in SCALES:
        grads = jax.tree.map(lambda g, scale=scale: g * scale, GRADS)
        updates, state = transformation.update(grads, state, params)
        params = optax.apply_updates(params, updates)
    return params


def assert_close(a, b, **tolerance):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, **({"rtol": 1e-6} | tolerance)), a, b)


def test_momentum_matches_the_heavy_ball_formula():
    """Heavy ball with L2 regularisation of the kernel: v = 0.9 v + g + 0.01 w, w = w - 0.1 v."""
    expected = {}
    for name, decay in (("kernel", 0.01), ("bias", 0.0)):
        w, v = np.asarray(PARAMS[name], np.float64), 0.0
        for scale in SCALES:
            v = 0.9 * v + np.asarray(GRADS[name]) * scale + decay * w
            w = w - 0.1 * v
        expected[name] = w
    assert_close(run(optim.make(config("momentum", weight_decay=0.01))), expected, rtol=1e-5)


@pytest.mark.parametrize(
    ("name", "changes", "reference"),
    [
        ("sgd", {}, lambda: optax.sgd(0.1)),
        ("adam", {"b1": 0.8}, lambda: optax.adam(0.1, b1=0.8, b2=0.999)),
        (
            "adamw",
            {"b2": 0.95, "weight_decay": 0.1},
            lambda: optax.adamw(0.1, b2=0.95, weight_decay=0.1, mask={"kernel": True, "bias": False}),
        ),
        (
            "lion",
            {"b1": 0.8, "weight_decay": 0.1},
            lambda: optax.lion(0.1, b1=0.8, b2=0.99, weight_decay=0.1, mask={"kernel": True, "bias": False}),
        ),
    ],
)
def test_optimizer_equals_optax(name, changes, reference):
    assert_close(run(optim.make(config(name, **changes))), run(reference()))


@pytest.mark.parametrize("name", list(optim.OPTIMIZERS))
def test_optimizer_uses_every_option(name):
    base = run(optim.make(config(name, **dict.fromkeys(optim.options(name), 0.1))))
    for option in optim.options(name):
        changed = run(optim.make(config(name, **dict.fromkeys(optim.options(name), 0.1)) | {option: 0.7}))
        assert any(not np.allclose(base[k], changed[k]) for k in base), option


@pytest.mark.parametrize("name", ["sgd", "momentum", "adamw", "lion"])
def test_weight_decay_excludes_biases(name):
    zero = jax.tree.map(jnp.zeros_like, GRADS)
    transformation = optim.make(config(name, weight_decay=0.5))
    updates, _ = transformation.update(zero, transformation.init(PARAMS), PARAMS)
    np.testing.assert_array_equal(updates["bias"], 0)
    np.testing.assert_allclose(updates["kernel"], -0.05 * PARAMS["kernel"], rtol=1e-6)


def test_clipping_is_by_global_norm_and_disabled_at_zero():
    norm = math.sqrt(sum(float(jnp.sum(g**2)) for g in jax.tree.leaves(GRADS)))
    for clip, factor in ((0.5 * norm, 0.5), (2 * norm, 1.0), (0.0, 1.0)):
        transformation = optim.make(config("sgd", clip_norm=clip))
        updates, _ = transformation.update(GRADS, transformation.init(PARAMS), PARAMS)
        assert_close(updates, jax.tree.map(lambda g, f=factor: -0.1 * f * g, GRADS), rtol=1e-5)


def test_clipping_of_auxiliary_parameters_is_separate():
    grads = {name: {"kernel": jnp.full((2, 2), value)} for name, value in (
        ("fusion", 1.0), ("heads_label", 1.0), ("auxiliaries_gan", 1e3), ("probes_label_image", 1e-3))}  # fmt: skip
    transformation = optim.make(config("sgd", clip_norm=0.1))
    updates, _ = transformation.update(grads, transformation.init(grads), grads)
    norm = lambda *names: float(optax.tree.norm([updates[name] for name in names]))  # noqa: E731
    assert norm("fusion", "heads_label") == pytest.approx(0.01)  # learning rate 0.1 times clip_norm 0.1
    assert norm("auxiliaries_gan", "probes_label_image") == pytest.approx(0.01)


def test_clipping_norm_excludes_frozen_parameters():
    grads = {"encoders_image": {"kernel": jnp.full((2, 2), 50.0)}, "heads_label": {"kernel": jnp.full((2, 2), 0.02)}}
    frozen = Freezing({"encoders_image": 3}, total=10)
    transformation = optim.make(config("sgd", clip_norm=1.0), frozen)
    for step, head in ((2, 0.02), (3, 0.02 / 100)):
        updates, _ = transformation.update(grads, transformation.init(grads), grads, step=jnp.int32(step))
        assert_close(updates["heads_label"]["kernel"], jnp.full((2, 2), -0.1 * head), rtol=1e-4)
        assert float(optax.tree.norm(updates["encoders_image"])) == pytest.approx(0.1, rel=1e-4)


def test_learning_rate_changes_without_recompilation():
    transformation = optim.make(config("sgd"))
    traces = []

    @jax.jit
    def step(params, state, rate):
        traces.append(rate)
        updates, state = transformation.update(GRADS, optax.tree.set(state, learning_rate=rate), params)
        return optax.apply_updates(params, updates), state

    state = transformation.init(PARAMS)
    for rate in (0.5, 0.25, 0.0):
        params, state = step(PARAMS, state, rate)
        assert_close(params, jax.tree.map(lambda p, g, r=rate: p - r * g, PARAMS, GRADS))
    assert len(traces) == 1


def test_optimizer_and_schedule_reject_unknown_and_missing_options():
    with rejects("config.optim.name", "adamm", "adamw"):
        optim.options("adamm")
    with rejects("config.optim.schedule.name", "cosine", "warmup_cosine"):
        optim.schedule_options("cosine")
    incomplete = config("adam")
    del incomplete["b1"]
    with rejects("config.optim.b1", None):
        optim.make(incomplete)
    with rejects("config.optim.schedule.end_factor", None):
        optim.learning_rate({"name": "warmup_cosine", "warmup_steps": 3}, 1.0, 0, 10)


def learning_rates(name, total=100, peak=2.0, **changes):
    schedule = {"name": name, **optim.schedule_options(name), **changes}
    return [optim.learning_rate(schedule, peak, step, total) for step in range(total + 1)]


def test_warmup_cosine_is_linear_then_equals_optax_cosine():
    values = learning_rates("warmup_cosine", warmup_steps=10, end_factor=0.1)
    np.testing.assert_allclose(values[:10], 2.0 * np.arange(1, 11) / 10)
    reference = optax.cosine_decay_schedule(2.0, 90, alpha=0.1)
    np.testing.assert_allclose(values[10:], [float(reference(s)) for s in range(91)], rtol=1e-5)
    assert values[10] == 2.0
    assert values[100] == pytest.approx(0.2)
    assert all(isinstance(v, float) for v in values)


def test_schedule_without_warmup_starts_at_the_peak():
    assert learning_rates("warmup_cosine")[0] == learning_rates("constant")[0] == learning_rates("plateau")[0] == 2.0


def test_constant_and_step_schedules_have_expected_rates():
    assert learning_rates("constant", warmup_steps=4)[:6] == [0.5, 1.0, 1.5, 2.0, 2.0, 2.0]
    for boundaries in ((0.5, 0.75), (50, 75), (0.5, 75)):
        values = learning_rates("step", boundaries=boundaries, factor=0.5)
        assert [values[s] for s in (0, 49, 50, 74, 75, 100)] == [2.0, 2.0, 1.0, 1.0, 0.5, 0.5]


@pytest.mark.parametrize("name", list(optim.SCHEDULES))
def test_schedule_reads_every_option(name):
    read = set()

    class RecordingDict(dict):
        def __getitem__(self, key):
            read.add(key)
            return super().__getitem__(key)

    schedule = RecordingDict(optim.schedule_options(name), name=name)
    optim.learning_rate(schedule, 1.0, 5, 10)
    if name == "plateau":
        state = optim.plateau_start()
        for _ in range(20):
            state = optim.plateau_update(state, 1.0, schedule)
    assert set(schedule) == read


@pytest.mark.parametrize("higher_is_better", [False, True])
def test_plateau_equals_optax_reduce_on_plateau(higher_is_better):
    values = np.random.default_rng(1).normal(size=60).cumsum() * (0.1 if higher_is_better else -0.1)
    options = {"factor": 0.5, "patience": 3, "min_delta": 0.05, "min_scale": 0.01}
    reference = optax.contrib.reduce_on_plateau(factor=0.5, patience=3, rtol=0.0, atol=0.05, min_scale=0.01)
    update = jax.jit(reference.update)
    reference_state, state = reference.init(PARAMS), optim.plateau_start()
    scales = set()
    for value in values:
        loss = -value if higher_is_better else value
        _, reference_state = update(GRADS, reference_state, value=loss)
        state = optim.plateau_update(state, float(value), options, higher_is_better)
        assert state["scale"] == pytest.approx(float(reference_state.scale))
        assert json.loads(json.dumps(state)) == state
        scales.add(state["scale"])
    assert len(scales) > 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), None])
def test_plateau_treats_a_non_finite_value_as_no_improvement(value):
    options = {"factor": 0.1, "patience": 2, "min_delta": 0.0, "min_scale": 0.0}
    state = optim.plateau_update(optim.plateau_start(), 1.0, options)
    first = optim.plateau_update(state, value, options)
    assert (first["scale"], first["best"]) == (1.0, 1.0)
    assert optim.plateau_update(first, value, options)["scale"] == pytest.approx(0.1)
    assert state == {"scale": 1.0, "best": 1.0, "waited": 0}


def test_plateau_scale_multiplies_the_learning_rate():
    schedule = {"name": "plateau", **optim.schedule_options("plateau")}
    assert optim.learning_rate(schedule, 2.0, 5, 10, scale=0.25) == 0.5
