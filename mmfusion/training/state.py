"""The state that a train step reads and writes."""

from collections.abc import Callable, Mapping
from typing import Any

import flax.core
import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import optax

from mmfusion import rng
from mmfusion.data.batch import Batch
from mmfusion.optim import skip_step


@flax.struct.dataclass
class TrainState:
    """Everything a step reads and writes; with the config it determines the rest of the run.

    Attributes:
      step: steps taken, int32.
      seed: of all the run's randomness, uint32; an array, so that another seed needs no new program.
      params: the model's parameters.
      batch_stats: running statistics of batch normalisation, empty without it.
      opt_state: the optimizer's.
      balance: numbers that weigh losses, see `Objectives.balance`.
      recent: the newest losses, where spikes are looked for, see `spikes.start`.
    """

    step: jax.Array
    seed: jax.Array
    params: Any
    batch_stats: Any
    opt_state: Any
    balance: Any = flax.struct.field(default_factory=dict)
    recent: Any = flax.struct.field(default_factory=dict)


Preprocess = Callable[[Batch, jax.Array | None], Batch]


def init_state(
    model: nn.Module,
    optimizer: optax.GradientTransformation,
    batch: Batch,
    preprocess: Preprocess,
    seed: jax.Array,
    balance: Mapping[str, Any] = flax.core.FrozenDict(),
    spike: float = 0.0,
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
        balance=dict(balance),
        recent=skip_step.start() if spike else {},
    )
