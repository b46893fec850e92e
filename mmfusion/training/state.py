"""The state that a train step reads and writes."""

from collections.abc import Callable
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from mmfusion import rng
from mmfusion.data.batch import Batch
from mmfusion.objectives import Objectives
from mmfusion.optim import skip_step

Preprocess = Callable[[Batch, jax.Array | None], Batch]


class TrainState(flax.struct.PyTreeNode):
    """Everything a step reads and writes; with the config it determines the rest of the run.

    Attributes:
      step: steps taken, int32.
      seed: of all randomness of the run, uint32; an array, so that another seed needs no new program.
      params: parameters of the model.
      batch_stats: running statistics of batch normalisation, empty without it.
      opt_state: state of the optimizer.
      loss_weights: state of the loss weights by objective, see `Objectives.init_weights`.
      loss_history: the newest losses, by which spikes are judged; empty where they are not.
    """

    step: jax.Array
    seed: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    loss_weights: Any = flax.struct.field(default_factory=dict)
    loss_history: Any = flax.struct.field(default_factory=dict)


def init_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    batch: Batch,
    preprocess: Preprocess,
    seed: jax.Array,
    objectives: Objectives | None = None,
    spike_threshold: float = 0.0,
) -> TrainState:
    """Returns the state before the first step; `batch` gives shapes only."""
    variables = model.init(rng.key(seed, "init"), preprocess(batch, None), train=False)
    params = variables["params"]
    return TrainState(
        step=jnp.zeros((), jnp.int32),
        seed=jnp.asarray(seed, jnp.uint32),
        params=params,
        batch_stats=variables.get("batch_stats", {}),
        opt_state=optimizer.init(params),
        loss_weights=objectives.init_weights() if objectives else {},
        loss_history=skip_step.init_history() if spike_threshold else {},
    )
