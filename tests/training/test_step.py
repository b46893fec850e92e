"""The train step: loss normalisation, padding, skipped steps, clipping, precision and donation."""

from typing import Any

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from mmfusion.data.batch import Batch, digest
from mmfusion.training.setup import TrainSetup, build_setup
from tests import synthetic

DETERMINISTIC = {  # no randomness, so that the loss can be recomputed
    "batch_size": 16,
    "model.encoders.text.tokens": "mean",
    "model.encoders.text.dropout": 0.0,
    "model.encoders.image.dropout": 0.0,
    "model.fusion.dropout": 0.0,
    "data.modalities.image.augment.flip": 0.0,
    "data.modalities.image.augment.crop": 0,
    "data.modalities.image.augment.brightness": 0.0,
}


class Step:
    """A compiled train step on one device, with a batch."""

    def __init__(self, changes: dict[str, Any], optimizer: dict[str, Any] | None = None):
        config = synthetic.config({**DETERMINISTIC, **changes}, "concat")
        if optimizer:
            with config.unlocked():
                config.optim = synthetic.defaults.optimizer(**optimizer)
        self.dataset = synthetic.dataset(config, {"train": 64})
        self.setup: TrainSetup = build_setup(config, self.dataset)
        self.run = self.setup.compile_train_step()
        self.batch: Batch = self.dataset.splits["train"].take(np.array([*range(4, 16), -1, -1, -1, -1]))

    def __call__(self, state: Any, batch: Batch, rate: float = 0.3) -> tuple[Any, dict[str, float]]:
        """Returns the state after one step and its metrics, on the host."""
        partitioner = self.setup.partitioner
        put = partitioner.replicate(jax.device_get(state)), (partitioner.put_batch(batch),)
        state, metrics = self.run(*put, partitioner.replicate(np.float32([rate])))
        return jax.tree.map(np.array, state), {name: float(x[0]) for name, x in metrics.items()}

    def init_state(self) -> Any:
        return jax.device_get(self.setup.init_state(0))


@pytest.fixture(scope="module")
def step() -> Step:
    return Step({})


@pytest.fixture(scope="module")
def clipped() -> Step:
    return Step({}, {"name": "momentum", "learning_rate": 0.3, "clip_norm": 0.01, "schedule": "constant"})


def assert_equal(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def with_rows(batch: Batch, rows: slice, source: Batch) -> Batch:
    """Returns the batch with the inputs, masks, presence and targets of some rows taken from `source`."""

    def replace(original: np.ndarray, replacement: np.ndarray) -> np.ndarray:
        result = original.copy()
        result[rows] = replacement[rows]
        return result

    fields = {name: getattr(batch, name) for name in ("inputs", "mask", "present", "targets")}
    return batch.replace(**{k: {m: replace(v[m], getattr(source, k)[m]) for m in v} for k, v in fields.items()})


def test_step_ignores_rows_of_weight_0(step: Step):
    other = step.dataset.splits["train"].take(np.arange(36, 52))
    assert other.weight.all()
    padded, metrics = step(step.init_state(), step.batch)
    filled, filled_metrics = step(step.init_state(), with_rows(step.batch, slice(12, 16), other))
    assert_equal(padded, filled)
    assert metrics == filled_metrics
    assert metrics["weight"] == 12
    changed, _ = step(step.init_state(), with_rows(step.batch, slice(11, 16), other))  # row 11 has weight 1
    assert not np.array_equal(changed.params["heads_label"]["bias"], padded.params["heads_label"]["bias"])


def test_step_with_padding_equals_the_step_without(step: Step):
    padded, metrics = step(step.init_state(), step.batch)
    unpadded, unpadded_metrics = step(step.init_state(), jax.tree.map(lambda x: x[:12], step.batch))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), padded, unpadded)
    assert metrics == pytest.approx(unpadded_metrics, rel=1e-5)


def test_step_loss_is_the_weighted_mean_over_examples(step: Step):
    state, batch = step.init_state(), step.batch
    outputs = step.setup.compile_eval_step()(state.params, state.batch_stats, step.setup.partitioner.put_batch(batch))
    logits, labels = np.float64(outputs["logits"]["label"]), batch.targets["label"]
    targets = 0.9 * np.eye(3)[labels] + 0.1 / 3
    weights = batch.weight * np.array([1.0, 3.0, 0.5])[labels]
    expected = (weights * -(targets * log_softmax(logits, axis=1)).sum(1)).sum() / weights.sum()
    _, metrics = step(state, batch)
    assert len(set(labels[:12])) == 3
    expected += 0.3 * metrics["objective/mvae"]
    assert metrics["loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["accuracy"] == pytest.approx((logits.argmax(1) == labels)[:12].mean())


def test_step_gradient_matches_finite_differences(step: Step):
    initial = step.init_state()
    after, _ = step(initial, step.batch, rate=1.0)
    gradient = initial.params["heads_label"]["bias"] - after.params["heads_label"]["bias"]  # plain SGD
    losses = []
    for sign in (1, -1):
        shifted = jax.tree.map(np.copy, initial)
        shifted.params["heads_label"]["bias"][1] += sign * 1e-2
        losses.append(step(shifted, step.batch)[1]["loss"])
    assert gradient[1] == pytest.approx((losses[0] - losses[1]) / 2e-2, rel=1e-2)


def test_step_with_a_non_finite_loss_keeps_the_state(clipped: Step):
    state, metrics = clipped(clipped.init_state(), clipped.batch)
    assert metrics["skipped"] == 0
    state.params["heads_label"]["kernel"][:] = np.float32(3e38)
    after, metrics = clipped(state, clipped.batch)
    assert metrics["skipped"] == 1
    assert after.step == state.step + 1 == 2
    assert_equal(after.replace(step=state.step), state)


def test_step_with_a_loss_spike_keeps_the_state():
    step = Step({"recovery.spike_threshold": 10.0})
    state, first = step(step.init_state(), step.batch)
    assert (first["spike"], state.loss_history["seen"], state.loss_history["losses"][0]) == (
        0,
        1,
        np.float32(first["loss"]),
    )
    low_history = state.replace(
        loss_history={"losses": np.full_like(state.loss_history["losses"], 1e-3), "seen": np.int32(50)}
    )
    after, metrics = step(low_history, step.batch)
    assert (metrics["spike"], metrics["skipped"]) == (1, 0)
    assert after.step == low_history.step + 1
    assert_equal(after.replace(step=low_history.step), low_history)
    high_history = state.replace(
        loss_history={"losses": np.full_like(state.loss_history["losses"], 9.0), "seen": np.int32(50)}
    )
    after, metrics = step(high_history, step.batch)
    assert (metrics["spike"], after.loss_history["seen"], after.loss_history["losses"][50]) == (
        0,
        51,
        np.float32(metrics["loss"]),
    )
    assert not np.array_equal(after.params["heads_label"]["bias"], high_history.params["heads_label"]["bias"])


def test_step_logs_an_order_independent_digest_of_example_ids(step: Step):
    ids = np.array([5, 3, 1000, 7, 2**31 - 1], np.int32)
    expected = int(digest(ids))
    assert int(digest(ids[::-1])) == expected == int(digest(ids[:2]) + digest(ids[2:]))
    assert int(digest(np.append(ids, -1))) == expected
    assert len({expected, int(digest(ids[1:])), *(int(digest(ids + k)) for k in (1, 2, 3))}) == 5
    assert step(step.init_state(), step.batch)[1]["ids"] == int(digest(step.batch.id))


def test_step_clips_model_and_objective_gradients_separately(clipped: Step):
    initial = clipped.init_state()
    after, metrics = clipped(initial, clipped.batch)
    updates = jax.tree.map(lambda a, b: a - b, after.params, initial.params)
    auxiliary = {name for name in updates if name.startswith("auxiliaries_")}
    assert metrics["grad_norm"] > 0.1 and auxiliary
    for names in (auxiliary, set(updates) - auxiliary):
        leaves = [x for name in names for x in jax.tree.leaves(updates[name])]
        assert np.sqrt(sum(np.square(x).sum() for x in leaves)) == pytest.approx(0.3 * 0.01, rel=1e-3)


def test_step_in_bfloat16_keeps_float32_state(step: Step):
    half = Step({"model.dtype": "bfloat16"})
    state, metrics = half(half.init_state(), half.batch)
    _, full_metrics = step(step.init_state(), step.batch)
    floats = [x.dtype for x in jax.tree.leaves(state) if np.issubdtype(x.dtype, np.floating) or x.dtype.itemsize == 2]
    assert floats
    assert set(floats) == {np.dtype(np.float32)}
    assert metrics["loss"] != full_metrics["loss"]
    assert metrics["loss"] == pytest.approx(full_metrics["loss"], rel=0.05)


def test_step_donates_the_state_without_transfers(step: Step):
    partitioner = step.setup.partitioner
    state, learning_rates = step.setup.init_state(0), partitioner.replicate(np.float32([0.3]))
    batch = partitioner.put_batch(step.batch)
    with jax.transfer_guard("disallow"):
        after, _ = step.run(state, (batch,), learning_rates)
    assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.opt_state)))
    with pytest.raises(Exception, match="transfer"), jax.transfer_guard("disallow"):
        step.run(after, (batch,), np.float32([0.3]))


def test_step_keeps_frozen_encoders_until_their_step():
    frozen = Step({"model.encoders.image.freeze": 2, "model.encoders.image.norm": "batch"})
    states = [frozen.init_state()]
    for _ in range(3):
        states.append(frozen(states[-1], frozen.batch)[0])

    def changed(one: Any, other: Any) -> list[bool]:
        trees = [{"params": x.params["encoders_image"], "stats": x.batch_stats["encoders_image"]} for x in (one, other)]
        return [bool((a != b).any()) for a, b in zip(*map(jax.tree.leaves, trees), strict=True)]

    assert not any(changed(states[0], states[2]))
    assert all(changed(states[2], states[3]))
    assert (states[0].params["heads_label"]["kernel"] != states[1].params["heads_label"]["kernel"]).any()
