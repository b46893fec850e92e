"""One step: what it divides by, what it leaves alone, what it refuses."""

from typing import Any

import jax
import numpy as np
import pytest
from scipy.special import log_softmax

from mmfusion.data.batch import Batch, digest
from mmfusion.training.setup import TrainSetup, build_setup
from tests import synthetic

STILL = {  # nothing random, so that the loss can be computed again
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
    """A compiled train step on one device, with the batch that it is tried on."""

    def __init__(self, changes: dict[str, Any], optimizer: dict[str, Any] | None = None):
        config = synthetic.config({**STILL, **changes}, "concat")
        if optimizer:
            with config.unlocked():
                config.optim = synthetic.defaults.optimizer(**optimizer)
        self.dataset = synthetic.dataset(config, {"train": 64})
        self.setup: TrainSetup = build_setup(config, self.dataset)
        self.run = self.setup.compile_train_step()
        self.batch: Batch = self.dataset.splits["train"].take(np.array([*range(4, 16), -1, -1, -1, -1]))

    def __call__(self, state: Any, batch: Batch, rate: float = 0.3) -> tuple[Any, dict[str, float]]:
        """Returns the state after one step and its numbers, on the host."""
        partitioner = self.setup.partitioner
        put = partitioner.replicate(jax.device_get(state)), (partitioner.put_batch(batch),)
        state, numbers = self.run(*put, partitioner.replicate(np.float32([rate])))
        return jax.tree.map(np.array, state), {name: float(x[0]) for name, x in numbers.items()}

    def begin(self) -> Any:
        return jax.device_get(self.setup.init_state(0))


@pytest.fixture(scope="module")
def step() -> Step:
    return Step({})


@pytest.fixture(scope="module")
def clipped() -> Step:
    return Step({}, {"name": "momentum", "learning_rate": 0.3, "clip_norm": 0.01, "schedule": "constant"})


def equal(one: Any, other: Any) -> None:
    jax.tree.map(np.testing.assert_array_equal, one, other)


def with_rows(batch: Batch, rows: slice, source: Batch) -> Batch:
    """Returns the batch with some rows' inputs, masks, presence and targets taken from another."""

    def take(mine: np.ndarray, theirs: np.ndarray) -> np.ndarray:
        mine = mine.copy()
        mine[rows] = theirs[rows]
        return mine

    setup = {name: getattr(batch, name) for name in ("inputs", "mask", "present", "targets")}
    return batch.replace(**{k: {m: take(v[m], getattr(source, k)[m]) for m in v} for k, v in setup.items()})


def test_a_row_of_weight_0_changes_nothing(step: Step):
    other = step.dataset.splits["train"].take(np.arange(36, 52))
    assert other.weight.all()
    padded, numbers = step(step.begin(), step.batch)
    filled, more = step(step.begin(), with_rows(step.batch, slice(12, 16), other))
    equal(padded, filled)
    assert numbers == more
    assert numbers["weight"] == 12
    changed, _ = step(step.begin(), with_rows(step.batch, slice(11, 16), other))  # the eleventh row does count
    assert not np.array_equal(changed.params["heads_label"]["bias"], padded.params["heads_label"]["bias"])


def test_a_padded_batch_is_the_batch_without_its_padding(step: Step):
    padded, numbers = step(step.begin(), step.batch)
    bare, more = step(step.begin(), jax.tree.map(lambda x: x[:12], step.batch))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), padded, bare)
    assert numbers == pytest.approx(more, rel=1e-5)


def test_loss_is_the_weighted_sum_over_the_sum_of_weights(step: Step):
    state, batch = step.begin(), step.batch
    outputs = step.setup.compile_eval_step()(state.params, state.batch_stats, step.setup.partitioner.put_batch(batch))
    logits, labels = np.float64(outputs["logits"]["label"]), batch.targets["label"]
    smooth = 0.9 * np.eye(3)[labels] + 0.1 / 3
    weights = batch.weight * np.array([1.0, 3.0, 0.5])[labels]
    expected = (weights * -(smooth * log_softmax(logits, axis=1)).sum(1)).sum() / weights.sum()
    _, numbers = step(state, batch)
    assert len(set(labels[:12])) == 3
    expected += 0.3 * numbers["objective/mvae"]
    assert numbers["loss"] == pytest.approx(expected, rel=1e-5)
    assert numbers["accuracy"] == pytest.approx((logits.argmax(1) == labels)[:12].mean())


def test_gradient_is_of_that_loss(step: Step):
    begin = step.begin()
    after, _ = step(begin, step.batch, rate=1.0)
    gradient = begin.params["heads_label"]["bias"] - after.params["heads_label"]["bias"]  # plain SGD
    losses = []
    for sign in (1, -1):
        moved = jax.tree.map(np.copy, begin)
        moved.params["heads_label"]["bias"][1] += sign * 1e-2
        losses.append(step(moved, step.batch)[1]["loss"])
    assert gradient[1] == pytest.approx((losses[0] - losses[1]) / 2e-2, rel=1e-2)


def test_a_step_that_is_not_finite_leaves_the_state_as_it_was(clipped: Step):
    begin, numbers = clipped(clipped.begin(), clipped.batch)
    assert numbers["skipped"] == 0
    begin.params["heads_label"]["kernel"][:] = np.float32(3e38)
    after, numbers = clipped(begin, clipped.batch)
    assert numbers["skipped"] == 1
    assert after.step == begin.step + 1 == 2
    equal(after.replace(step=begin.step), begin)


def test_a_spike_leaves_the_state_as_it_was():
    step = Step({"recovery.spike_threshold": 10.0})
    begin, first = step(step.begin(), step.batch)
    assert (first["spike"], begin.loss_history["seen"], begin.loss_history["losses"][0]) == (
        0,
        1,
        np.float32(first["loss"]),
    )
    small = begin.replace(
        loss_history={"losses": np.full_like(begin.loss_history["losses"], 1e-3), "seen": np.int32(50)}
    )
    after, numbers = step(small, step.batch)
    assert (numbers["spike"], numbers["skipped"]) == (1, 0)
    assert after.step == small.step + 1
    equal(after.replace(step=small.step), small)
    usual = begin.replace(
        loss_history={"losses": np.full_like(begin.loss_history["losses"], 9.0), "seen": np.int32(50)}
    )
    after, numbers = step(usual, step.batch)
    assert (numbers["spike"], after.loss_history["seen"], after.loss_history["losses"][50]) == (
        0,
        51,
        np.float32(numbers["loss"]),
    )
    assert not np.array_equal(after.params["heads_label"]["bias"], usual.params["heads_label"]["bias"])


def test_the_checksum_of_examples_is_of_their_ids_alone(step: Step):
    ids = np.array([5, 3, 1000, 7, 2**31 - 1], np.int32)
    whole = int(digest(ids))
    assert int(digest(ids[::-1])) == whole == int(digest(ids[:2]) + digest(ids[2:]))
    assert int(digest(np.append(ids, -1))) == whole
    assert len({whole, int(digest(ids[1:])), *(int(digest(ids + k)) for k in (1, 2, 3))}) == 5
    assert step(step.begin(), step.batch)[1]["ids"] == int(digest(step.batch.id))


def test_clipping_is_by_the_norm_of_the_models_gradient_and_of_the_objectives_own(clipped: Step):
    begin = clipped.begin()
    after, numbers = clipped(begin, clipped.batch)
    moved = jax.tree.map(lambda a, b: a - b, after.params, begin.params)
    own = {name for name in moved if name.startswith("auxiliaries_")}
    assert numbers["grad_norm"] > 0.1 and own
    for names in (own, set(moved) - own):
        leaves = [x for name in names for x in jax.tree.leaves(moved[name])]
        assert np.sqrt(sum(np.square(x).sum() for x in leaves)) == pytest.approx(0.3 * 0.01, rel=1e-3)


def test_bfloat16_computes_and_float32_keeps(step: Step):
    half = Step({"model.dtype": "bfloat16"})
    state, numbers = half(half.begin(), half.batch)
    _, single = step(step.begin(), step.batch)
    floats = [x.dtype for x in jax.tree.leaves(state) if np.issubdtype(x.dtype, np.floating) or x.dtype.itemsize == 2]
    assert floats
    assert set(floats) == {np.dtype(np.float32)}
    assert numbers["loss"] != single["loss"]
    assert numbers["loss"] == pytest.approx(single["loss"], rel=0.05)


def test_the_state_is_donated_and_nothing_is_transferred_in_the_call(step: Step):
    partitioner = step.setup.partitioner
    state, rates = step.setup.init_state(0), partitioner.replicate(np.float32([0.3]))
    batch = partitioner.put_batch(step.batch)
    with jax.transfer_guard("disallow"):
        after, _ = step.run(state, (batch,), rates)
    assert all(x.is_deleted() for x in jax.tree.leaves((state.params, state.opt_state)))
    with pytest.raises(Exception, match="transfer"), jax.transfer_guard("disallow"):
        step.run(after, (batch,), np.float32([0.3]))


def test_what_is_frozen_for_some_steps_stays_as_it_is_and_then_learns():
    held = Step({"model.encoders.image.freeze": 2, "model.encoders.image.norm": "batch"})
    states = [held.begin()]
    for _ in range(3):
        states.append(held(states[-1], held.batch)[0])

    def moved(one: Any, other: Any) -> list[bool]:
        setup = [{"params": x.params["encoders_image"], "stats": x.batch_stats["encoders_image"]} for x in (one, other)]
        return [bool((a != b).any()) for a, b in zip(*map(jax.tree.leaves, setup), strict=True)]

    assert not any(moved(states[0], states[2]))
    assert all(moved(states[2], states[3]))
    assert (states[0].params["heads_label"]["kernel"] != states[1].params["heads_label"]["kernel"]).any()
