"""The contract of auxiliary objectives: what they read of an encoded batch, and what they return.

B batch · D width
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.models.model import Encoded


class Auxiliary(nn.Module):
    """An objective beside the tasks': a module that is called with an `Encoded` and returns a loss a row `[B]`.

    Attributes:
      width: of the pooled tokens.
    """

    width: int
    # How many modalities a row must have for the objective to say anything of it.
    fewest = 1

    def __call__(self, encoded: Encoded, *, train: bool) -> jax.Array:
        """Returns the loss of each row `[B]` float32, 0 where the row does not count."""
        raise NotImplementedError


def counts(present: dict[str, jax.Array], fewest: int) -> jax.Array:
    """Returns which rows `[B]` have at least so many modalities, float32."""
    return (sum(there.astype(jnp.int32) for there in present.values()) >= fewest).astype(jnp.float32)


def mean_over(values: dict[str, jax.Array], there: dict[str, jax.Array]) -> jax.Array:
    """Returns each row's mean `[B]` of the values `[B]` that are there `[B]` bool; 0 where none is."""
    kept = jnp.stack([jnp.where(there[name], value, 0.0) for name, value in values.items()])
    count = jnp.stack([there[name] for name in values]).sum(axis=0)
    return kept.sum(axis=0) / jnp.maximum(count, 1)
