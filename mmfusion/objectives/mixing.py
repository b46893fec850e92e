"""MixUp and CutMix: each example is mixed with its neighbour, and answers for both.

B batch · H W picture · C channels · D width
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from mmfusion import rng
from mmfusion.data.batch import Batch


class Mix(NamedTuple):
    """How each row of a batch is mixed with its partner's.

    Attributes:
      partner: the other row's place `[B]`; rows are paired, so it is each other's.
      share: of the row itself `[B]`, from 0 to 1; 1 where a partner does not count, or has other modalities.
      corner: (top, left) of the rectangle that comes from the partner `[B, 2]`, in shares of the picture.
    """

    partner: jax.Array
    share: jax.Array
    corner: jax.Array


@dataclasses.dataclass(frozen=True)
class Mixing:
    """MixUp (Zhang et al. 2018, arXiv:1710.09412) and CutMix (Yun et al. 2019, arXiv:1905.04899).

    A row's partner is its neighbour in the batch, the same on any number of devices and in micro-batches; a pair's draw
    depends on its rows' ids alone. Of what a partner lacks nothing could be mixed in: rows are mixed that have the same
    modalities.

    Attributes:
      kind: `mixup`, a weighted mean, or `cutmix`, where a rectangle is the partner's.
      alpha: the share is drawn from Beta(alpha, alpha).
      where: `input`, every modality of which must be pictures, or `features`, what the heads read.
    """

    kind: str
    alpha: float
    where: str

    def draw(self, batch: Batch, key: jax.Array) -> Mix:
        """Returns how the rows of a batch, an even number, are mixed."""
        partner = jnp.arange(batch.id.shape[0]) ^ 1
        keys = rng.row_keys(key, jnp.minimum(batch.id, batch.id[partner]))
        share = jax.vmap(lambda k: jax.random.beta(k, self.alpha, self.alpha))(keys)
        corner = jax.vmap(lambda k: jax.random.uniform(jax.random.fold_in(k, 1), (2,)))(keys)
        counts = (batch.weight > 0) & (batch.weight[partner] > 0)
        same = [there == there[partner] for there in batch.present.values()]
        return Mix(partner, jnp.where(jnp.stack([counts, *same]).all(axis=0), share, 1.0), corner)

    def inputs(self, batch: Batch, mix: Mix) -> tuple[Batch, Mix]:
        """Returns the batch of normalised pictures mixed, and the mix with each row's share as it came out."""
        share, inputs = mix.share, dict(batch.inputs)
        for m, x in batch.inputs.items():  # [B, H, W, C]
            if self.kind == "mixup":
                weight = share[:, None, None, None]
                inputs[m] = weight * x + (1 - weight) * x[mix.partner]
            else:
                outside = _outside(x.shape[1:3], share, mix.corner)  # [B, H, W, 1]
                inputs[m], mix = jnp.where(outside, x, x[mix.partner]), mix._replace(share=outside.mean((1, 2, 3)))
        return batch.replace(inputs=inputs), mix


def _outside(size: tuple[int, int], share: jax.Array, corner: jax.Array) -> jax.Array:
    """Returns where a picture stays itself `[B, H, W, 1]`: outside a rectangle of its own proportions."""
    sides = jnp.sqrt(1 - share)[:, None]  # of the rectangle, in shares of the picture's
    start = corner * (1 - sides)  # [B, 2]
    inside = True
    for axis, length in enumerate(size):
        place = (jnp.arange(length) + 0.5) / length
        shape = (-1, length, 1, 1) if axis == 0 else (-1, 1, length, 1)
        within = (place >= start[:, axis : axis + 1]) & (place < start[:, axis : axis + 1] + sides)  # [B, length]
        inside = inside & within.reshape(shape)
    return ~inside
