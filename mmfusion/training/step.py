"""The train step: a pure function of (state, batch), the same under `pmap` and under `jit`.

Every loss is a sum over examples divided by a sum of weights. The weights are summed first, over micro-batches, devices
and hosts, so that each example's gradient is divided by the whole batch's weight once, wherever the example is.
"""

import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from mmfusion import rng
from mmfusion.data.batch import Batch, digest
from mmfusion.objectives.base import Context
from mmfusion.objectives.build import Objectives
from mmfusion.optim import micro_batching, skip_step
from mmfusion.optim.freezing import NOTHING, Freezing
from mmfusion.training.state import Preprocess, TrainState


@dataclasses.dataclass(frozen=True)
class StepSpec:
    """What a train step is made of, beside its state.

    Attributes:
      model: encoders, fusion and heads.
      optimizer: clips the gradients and computes the updates; its update takes the extra argument `step`.
      objectives: loss terms, measures, loss weights and batch transforms.
      preprocess: `(batch, key or None) -> batch`: augmentation and normalisation.
      freezing: which encoders do not learn.
      spike_threshold: see `skip_step.is_spike`; 0 judges no spikes.
      micro_batches: how many the rows are split into.
      unroll: unroll the loop over micro-batches instead of scanning it.
      axis_name: the axis of the devices under `pmap`; None under `jit`, where the compiler inserts the sums.
    """

    model: nn.Module
    optimizer: optax.GradientTransformationExtraArgs
    objectives: Objectives
    preprocess: Preprocess
    freezing: Freezing = NOTHING
    spike_threshold: float = 0.0
    micro_batches: int = 1
    unroll: bool = True
    axis_name: str | None = None

    def sum_over_devices(self, tree: Any) -> Any:
        """Returns the sum over devices of a tree of arrays."""
        return jax.lax.psum(tree, self.axis_name) if self.axis_name else tree


def train_step(
    state: TrainState, batch: Batch, learning_rate: jax.Array, *, spec: StepSpec
) -> tuple[TrainState, dict[str, jax.Array]]:
    """Takes one step.

    Args:
      state: before the step.
      batch: this device's rows under `pmap`, all rows under `jit`.
      learning_rate: scalar float32; an argument, so that a schedule does not recompile the step.
      spec: what the step is made of.

    Returns:
      The state after it, and scalars: `loss`, `grad_norm`, `weight` (examples counted), `ids` (a checksum of which
      examples), those of `skip_step.guard`, and those of `Objectives.metrics`.
    """
    objectives, sum_over_devices = spec.objectives, spec.sum_over_devices
    batch = spec.preprocess(batch, rng.key(state.seed, "augment", state.step))
    batch = objectives.transform_batch(batch, state.seed, state.step)
    counts = sum_over_devices(objectives.counts(batch))  # the denominator of each term

    def loss_fn(params: Any, batch_stats: Any, rows: Batch) -> tuple[jax.Array, tuple[Any, dict[str, jax.Array]]]:
        rngs = {"dropout": rng.key(state.seed, "dropout", state.step)}
        mixed = {"mix": rows.mix["features"]} if "features" in rows.mix else {}
        variables = {
            "params": spec.freezing.stop_gradient(params),
            "batch_stats": batch_stats,
            "rows": {"id": rows.id, **mixed},  # what dropout and the mixing of features depend on
        }
        outputs, updated = spec.model.apply(variables, rows, train=True, rngs=rngs, mutable=["batch_stats"])
        context = Context(rows, outputs, params, counts, state.step, state.loss_weights)
        # These rows' share of each mean; a term without a count is a sum. A batch without weight has loss 0, not NaN.
        means = {t.name: t.total(context) / jnp.maximum(counts.get(t.name, 1.0), 1e-9) for t in objectives.terms}
        losses = objectives.losses(objectives.coefficients(state.loss_weights, params), means)
        return losses, (updated.get("batch_stats", {}), {"loss": jnp.sum(losses), **means})

    grads, batch_stats, means = micro_batching.sum_gradients(
        loss_fn, state.params, state.batch_stats, batch,
        count=spec.micro_batches, group=objectives.group, unroll=spec.unroll,
    )  # fmt: skip
    grads, means = sum_over_devices((grads, means))  # batch normalisation has summed its statistics itself
    grads = objectives.transform_gradients(grads, means, state.seed, state.step)
    grad_norm = optax.tree.norm(grads)
    opt_state = optax.tree.set(state.opt_state, learning_rate=learning_rate)
    updates, opt_state = spec.optimizer.update(grads, opt_state, state.params, step=state.step)
    coefficients = objectives.coefficients(state.loss_weights, state.params)
    after = state.replace(
        params=optax.apply_updates(state.params, updates),
        batch_stats=spec.freezing.keep_frozen(state.batch_stats, batch_stats, state.step),
        opt_state=opt_state,
        loss_weights=objectives.update_weights(state.loss_weights, means, coefficients),
    )
    after, loss_history, skipped = skip_step.guard(  # a bad step leaves the state as it was, and counts as a step
        state, after, state.loss_history, means["loss"], grad_norm, spec.spike_threshold
    )
    weight, ids = sum_over_devices((jnp.sum(batch.weight), digest(batch.id)))
    metrics = {"loss": means["loss"], "grad_norm": grad_norm, "weight": weight, "ids": ids, **skipped}
    metrics |= objectives.metrics(means, state.loss_weights, state.params)
    return after.replace(step=state.step + 1, loss_history=loss_history), metrics
