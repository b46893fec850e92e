"""The Batch: what the data pipeline hands to the step, and the one thing models know of data.

B batch · N positions · H W image · C channels or classes · T time · S audio samples · F table columns.
"""

import flax.struct
import jax
import jax.numpy as jnp


class Batch(flax.struct.PyTreeNode):
    """One batch of examples, all arrays with the examples on axis 0; nothing mutates it.

    Attributes:
      inputs: raw arrays per modality: image `[B, H, W, C]` uint8, text ids `[B, T]` int32, audio `[B, S]` float32.
      mask: per modality `[B, N]` bool, which positions are real; N is 1 for an image, T for text, S for audio.
      present: per modality `[B]` bool, which examples have it at all.
      targets: per task: class `[B]` int32, multi-label `[B, C]` float32, or regression `[B]` float32.
      weight: `[B]` float32; 0 on rows that only pad the batch.
      id: `[B]` int32, the row's number in its source; -1 on padding.
      mix: where rows are mixed in pairs, the share `[B]` of a row's own `targets` and of its own `features`.
    """

    inputs: dict[str, jax.Array]
    mask: dict[str, jax.Array]
    present: dict[str, jax.Array]
    targets: dict[str, jax.Array]
    weight: jax.Array
    id: jax.Array
    mix: dict[str, jax.Array] = flax.struct.field(default_factory=dict)

    @property
    def partner(self) -> jax.Array:
        """The position `[B]` of the row that each row is mixed with, its neighbour."""
        return jnp.arange(self.id.shape[0]) ^ 1


def digest(ids: jax.Array) -> jax.Array:
    """Returns a checksum, uint32, of which examples `[B]` there are; those of a batch's parts add up to the whole's.

    Each is mixed by Chris Wellons' 32-bit hash of 2018 (github.com/skeeto/hash-prospector), so that other sets of ids
    hardly have the same sum.
    """
    x = ids.astype(jnp.uint32)
    x = (x ^ (x >> 16)) * jnp.uint32(0x7FEB352D)
    x = (x ^ (x >> 15)) * jnp.uint32(0x846CA68B)
    return jnp.sum(jnp.where(ids < 0, 0, x ^ (x >> 16)), dtype=jnp.uint32)  # without padding
