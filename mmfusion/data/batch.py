"""The Batch: the output of the data pipeline, and the only data structure that models read.

B batch · N positions · H W image · C channels or classes · T time · S audio samples · F table columns.
"""

import flax.struct
import jax
import jax.numpy as jnp


class Batch(flax.struct.PyTreeNode):
    """One immutable batch of examples; axis 0 of every array is the example.

    Attributes:
      inputs: raw arrays per modality: image `[B, H, W, C]` uint8, or float32 in [0, 255] if deeper than 8 bits; text
        ids `[B, T]` int32, audio `[B, S]` float32.
      mask: per modality `[B, N]` bool, False at padded positions; N is 1 for an image, T for text, S for audio.
      present: per modality `[B]` bool, True for examples that have it.
      targets: per task: class `[B]` int32, multi-label `[B, C]` float32, or regression `[B]` float32.
      weight: `[B]` float32; 0 on padding rows and unreadable rows.
      id: `[B]` int32, the row's index in its source; -1 on padding rows.
      labelled: per task `[B]` bool, which rows have a label of it; others have the target 0. All have one of a task
        that is left out.
      row_weight: `[B]` float32, each row's weight in the tasks' losses, but not in metrics; None: all 1.
      mix: if rows are mixed in pairs, the share `[B]` of a row's own `targets` and of its own `features`.
    """

    inputs: dict[str, jax.Array]
    mask: dict[str, jax.Array]
    present: dict[str, jax.Array]
    targets: dict[str, jax.Array]
    weight: jax.Array
    id: jax.Array
    mix: dict[str, jax.Array] = flax.struct.field(default_factory=dict)
    labelled: dict[str, jax.Array] = flax.struct.field(default_factory=dict)
    row_weight: jax.Array | None = None

    def metric_weight(self, task: str) -> jax.Array:
        """Returns the weight `[B]` float32 of each row in a task's metrics: 0 without a label of it."""
        return self.weight * self.labelled[task] if task in self.labelled else self.weight

    def loss_weight(self, task: str) -> jax.Array:
        """Returns the weight `[B]` float32 of each row in a task's loss: 0 without a label of it."""
        weight = self.metric_weight(task)
        return weight if self.row_weight is None else weight * self.row_weight

    @property
    def partner(self) -> jax.Array:
        """The position `[B]` of the row that each row is mixed with: the neighbour in its pair."""
        return jnp.arange(self.id.shape[0]) ^ 1


def digest(ids: jax.Array) -> jax.Array:
    """Returns a uint32 checksum of a set of ids `[B]`; the checksums of the parts of a batch sum to that of the batch.

    Each id is hashed by Chris Wellons' 32-bit function of 2018 (github.com/skeeto/hash-prospector), so that different
    sets of ids rarely have the same sum.
    """
    x = ids.astype(jnp.uint32)
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return jnp.sum(jnp.where(ids < 0, 0, x ^ (x >> 16)), dtype=jnp.uint32)  # padding adds 0
