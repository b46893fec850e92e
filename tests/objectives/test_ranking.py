"""The regulariser of `qmf` against its formula in NumPy, and its history over steps."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from configs import quickstart
from mmfusion import config as configs
from mmfusion.data.batch import Batch
from mmfusion.models.build import build
from mmfusion.objectives import Task, build_objectives
from mmfusion.objectives.ranking import normalised_losses, ranking_loss
from mmfusion.training.state import init_state
from mmfusion.training.step import StepSpec, train_step
from tests.errors import rejects

CLASSES, WIDTH, HISTORY = 3, 4, 8
TASKS = {"label": Task("classification", CLASSES)}
PRESENT = {"a": np.array([1, 1, 1, 1, 1, 1], bool), "b": np.array([1, 0, 1, 1, 1, 1], bool)}


def batch_of(ids, seed=0, weight=(1, 1, 1, 1, 1, 0)):
    random = np.random.default_rng(seed)
    return Batch(
        inputs={m: random.normal(size=(6, 1, WIDTH)).astype(np.float32) for m in PRESENT},
        mask={m: mask[:, None] for m, mask in PRESENT.items()},
        present=PRESENT,
        targets={"label": random.integers(CLASSES, size=6).astype(np.int32)},
        weight=np.array(weight, np.float32),
        id=np.array(ids, np.int32),
    )


FIRST, SECOND = batch_of([3, 1, 10, 0, 5, -1]), batch_of([0, 1, 5, 3, 10, -1], seed=1)


@functools.cache
def prepared(micro_batches=1, **options):
    """Returns the model, its initial state, and the jitted step with learning rate 0."""
    fusion = {"name": "qmf", "history": HISTORY, **options}
    model = build(
        {"width": WIDTH, "encoders": {m: {"name": "mlp"} for m in PRESENT}, "fusion": fusion},
        {m: {} for m in PRESENT}, {"label": CLASSES},
    )  # fmt: skip
    optimizer = optax.with_extra_args_support(optax.inject_hyperparams(optax.sgd)(learning_rate=0.0))
    objectives = build_objectives(model, TASKS)
    spec = StepSpec(model, optimizer, objectives, lambda batch, key: batch, micro_batches=micro_batches)
    state = init_state(model, optimizer, FIRST, spec.preprocess, jnp.uint32(0), objectives)
    step = jax.jit(functools.partial(train_step, spec=spec))
    return model, state, lambda state, batch: step(state, batch, jnp.float32(0.0))


def heads(model, state, batch):
    """Returns each row's energy and cross-entropy by modality, in float64."""
    outputs = model.apply({"params": state.params}, batch, train=False)
    logits = {m: np.float64(x) for m, x in outputs.unimodal["label"].items()}
    centred = {m: x - x.mean(axis=1, keepdims=True) for m, x in logits.items()}
    energies = {m: np.log(np.exp(x).sum(axis=1)) for m, x in centred.items()}
    rows = np.arange(6), batch.targets["label"]
    return energies, {m: energies[m] - centred[m][rows] for m in logits}


def test_ranking_loss_matches_its_formula():
    """Pairs 0-1, 2-3 and 4-5: ranked wrongly, rightly by more than the margin, and without a rank."""
    confidence, past = np.array([0.9, 0.2, 0.1, 0.8, 0.5, 0.1]), np.array([0.7, 0.3, 0.6, 0.1, 0.4, 0.4])
    found = ranking_loss(jnp.float32(confidence), jnp.float32(past), jnp.arange(6) ^ 1)
    np.testing.assert_allclose(found, [0.7 + 0.4, 0.7 + 0.4, 0, 0, 0, 0], atol=1e-6)
    gradient = jax.grad(lambda c: ranking_loss(c, jnp.float32(past), jnp.arange(6) ^ 1).sum())(jnp.float32(confidence))
    np.testing.assert_array_equal(gradient, [2, -2, 0, 0, 0, 0])  # the confidence of the harder example falls


def test_past_losses_are_means_scaled_over_all_slots():
    history = {"losses": jnp.array([6.0, 0.0, 1.0, 8.0]), "times": jnp.array([2.0, 0.0, 1.0, 4.0])}
    past, seen = normalised_losses(history, jnp.array([0, 2, 3, 1]))
    np.testing.assert_allclose(past[:3], [1, 0, 0.5])  # means 3, 1 and 2
    assert seen.tolist() == [True, True, True, False]


@pytest.mark.parametrize("micro_batches", [1, pytest.param(3, marks=pytest.mark.thorough)])
def test_qmf_ranks_by_the_losses_of_earlier_steps(micro_batches):
    """Rows 0-1 lack b in row 1; 2-3 are ranked by both; row 5 has no weight. 10 shares slot 2 with nothing."""
    model, state, step = prepared(micro_batches)
    after, metrics = step(state, FIRST)
    assert metrics["objective/qmf"] == 0  # nothing was seen before
    _, losses = heads(model, state, FIRST)
    history = after.loss_weights["of_qmf"]["label"]
    slots = np.array([3, 1, 2, 0, 5])
    for m in PRESENT:
        kept = PRESENT[m][:5]
        np.testing.assert_array_equal(np.flatnonzero(history[m]["times"]), sorted(slots[kept]))
        np.testing.assert_allclose(history[m]["losses"][slots[kept]], losses[m][:5][kept], rtol=1e-5)
    energies, _ = heads(model, state, SECOND)
    expected = 0.0
    for m in PRESENT:
        past = dict(zip(slots[PRESENT[m][:5]], losses[m][:5][PRESENT[m][:5]], strict=True))
        low, high = min(past.values()), max(past.values())
        for i, j in [(2, 3), *([(0, 1)] if m == "a" else [])]:
            first, second = ((past[SECOND.id[row] % HISTORY] - low) / (high - low) for row in (i, j))
            hinge = np.sign(first - second) * (energies[m][i] - energies[m][j]) / 10 + abs(first - second)
            expected += 2 * max(hinge, 0.0) / SECOND.weight.sum()
    _, metrics = step(after, SECOND)
    assert metrics["objective/qmf"] == pytest.approx(expected, rel=1e-4) and expected > 0
    rest = metrics["task/label"] + metrics["objective/unimodal"]
    assert metrics["loss"] == pytest.approx(rest + metrics["objective/qmf"], rel=1e-5)
    again, _ = step(after, FIRST)
    np.testing.assert_array_equal(again.loss_weights["of_qmf"]["label"]["a"]["times"][slots], 2)


def test_qmf_without_ranking_has_no_history():
    _, state, step = prepared(ranking=0.0)
    assert state.loss_weights == {}
    assert "objective/qmf" not in step(state, FIRST)[1]


def test_qmf_needs_an_even_number_of_rows_in_a_micro_batch():
    config = quickstart.get_config("fusion=qmf")
    with config.unlocked():
        config.batch_size = 63
    with rejects("config.batch_size", 63, says="groups of 2 rows"):
        configs.check(config, 1)
    with config.unlocked():
        config.model.fusion.ranking = 0.0
    configs.check(config, 1)
