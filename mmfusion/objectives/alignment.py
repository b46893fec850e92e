"""Objectives that bring modalities together: contrastive, canonical correlation, and a discriminator to be deceived.

B batch · n examples of all devices · D width · K shared width
"""

import itertools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import optax

from mmfusion.models.model import Encoded
from mmfusion.objectives.auxiliary import Auxiliary, masked_row_mean
from mmfusion.objectives.base import Requirements


class Contrastive(Auxiliary):
    """Each row's modalities must find one another among all rows' (Radford et al. 2021, arXiv:2103.00020).

    Softmax cross-entropy over cosines times a learned scale, both ways, the mean over pairs of modalities; negatives
    are the rows of all devices, of one micro-batch.

    Attributes:
      shared: width K of the shared space.
      temperature: one over the scale, to begin with; the scale stays below 100.
    """

    shared: int = 64
    temperature: float = 0.07
    dtype: Any = jnp.float32
    axis_name: str | None = None

    requires: ClassVar[Requirements] = Requirements(modalities=2)
    min_present: ClassVar[int] = 2

    @nn.compact
    def __call__(self, encoded: Encoded, *, train: bool) -> jax.Array:
        """Returns the loss of each row `[B]`, of the pairs of modalities that it has."""
        axis = self.axis_name if train and not self.is_initializing() else None
        points = {}
        for m, x in encoded.pooled.items():
            z = nn.Dense(self.shared, use_bias=False, name=f"project_{m}")(x).astype(jnp.float32)
            points[m] = z * jax.lax.rsqrt(jnp.square(z).sum(axis=-1, keepdims=True) + 1e-12)  # [B, K]
        scale = self.param("log_scale", nn.initializers.constant(-jnp.log(self.temperature)), ())
        scale = jnp.exp(jnp.minimum(scale, jnp.log(100.0)))
        losses, both = {}, {}
        for a, b in itertools.combinations(sorted(points), 2):
            pair = f"{a}+{b}"
            both[pair] = encoded.present[a] & encoded.present[b]
            forth = _find(points[a], points[b], both[pair], scale, axis)
            losses[pair] = (forth + _find(points[b], points[a], both[pair], scale, axis)) / 2
        return masked_row_mean(losses, both)


def _find(queries: jax.Array, keys: jax.Array, there: jax.Array, scale: jax.Array, axis: str | None) -> jax.Array:
    """Returns how badly each query `[B, K]` finds its own key among all devices' that are there `[B]`."""
    place = jnp.arange(queries.shape[0])
    if axis is not None:
        place = place + jax.lax.axis_index(axis) * queries.shape[0]
        keys, there = jax.lax.all_gather((keys, there), axis, tiled=True)  # [n, K], [n]
    logits = jnp.where(there, scale * queries @ keys.T, -1e9)  # [B, n]
    return optax.softmax_cross_entropy_with_integer_labels(logits, place)


class CCA(Auxiliary):
    """Minus the mean canonical correlation of two modalities (Andrew et al. 2013, ICML), averaged over pairs.

    Of the batch of all devices, as a whole: every row that has both has the same loss.

    Attributes:
      shared: width K of what is correlated; the loss is between -1, K perfect correlations, and 0.
      ridge: added to the variances, against directions that the batch hardly shows.
    """

    shared: int = 8
    ridge: float = 1e-2
    dtype: Any = jnp.float32
    axis_name: str | None = None

    requires: ClassVar[Requirements] = Requirements(modalities=2)
    min_present: ClassVar[int] = 2

    @nn.compact
    def __call__(self, encoded: Encoded, *, train: bool) -> jax.Array:
        """Returns the loss of each row `[B]`, of the pairs of modalities that it has."""
        axis = self.axis_name if train and not self.is_initializing() else None
        points = {
            m: nn.Dense(self.shared, use_bias=False, name=f"project_{m}")(x).astype(jnp.float32)
            for m, x in encoded.pooled.items()
        }
        losses, both = {}, {}
        for a, b in itertools.combinations(sorted(points), 2):
            pair = f"{a}+{b}"
            both[pair] = encoded.present[a] & encoded.present[b]
            correlation = self._correlation(points[a], points[b], both[pair].astype(jnp.float32)[:, None], axis)
            losses[pair] = jnp.broadcast_to(-correlation, both[pair].shape)
        return masked_row_mean(losses, both)

    def _correlation(self, x: jax.Array, y: jax.Array, weight: jax.Array, axis: str | None) -> jax.Array:
        """Returns the mean canonical correlation of `x [B, K]` and `y [B, K]` over rows of weight 1 `[B, 1]`."""
        total = (lambda tree: jax.lax.psum(tree, axis)) if axis else lambda tree: tree
        count, *sums = total((weight.sum(), (weight * x).sum(axis=0), (weight * y).sum(axis=0)))
        means = [one / jnp.maximum(count, 1.0) for one in sums]
        x, y = (weight * (values - mean) for values, mean in zip((x, y), means, strict=True))
        xx, yy, xy = (product / jnp.maximum(count - 1, 1.0) for product in total((x.T @ x, y.T @ y, x.T @ y)))
        eye = self.ridge * jnp.eye(self.shared)
        left, right = (jnp.linalg.cholesky(variance + eye) for variance in (xx, yy))
        half = jax.scipy.linalg.solve_triangular(left, xy, lower=True)
        whitened = jax.scipy.linalg.solve_triangular(right, half.T, lower=True)  # [K, K]
        return jnp.linalg.svd(whitened, compute_uv=False).mean()


@jax.custom_vjp
def reversed_gradient(x: jax.Array, strength: float) -> jax.Array:
    """Returns x, whose gradient is turned round and multiplied by `strength` (Ganin et al. 2016, arXiv:1505.07818)."""
    return x


reversed_gradient.defvjp(lambda x, strength: (x, strength), lambda strength, g: (-strength * g, None))


class Adversarial(Auxiliary):
    """A discriminator tells the modality of a feature, and the encoders learn to deceive it (arXiv:1505.07818).

    Attributes:
      hidden: units of its hidden layer.
      strength: of the gradient that reaches the encoders, turned round.
    """

    hidden: int = 64
    strength: float = 1.0
    dtype: Any = jnp.float32

    requires: ClassVar[Requirements] = Requirements(modalities=2)

    @nn.compact
    def __call__(self, encoded: Encoded, *, train: bool) -> jax.Array:
        """Returns the discriminator's cross-entropy of each row `[B]`, the mean over its modalities."""
        del train
        names = sorted(encoded.pooled)
        hide, tell = nn.Dense(self.hidden, name="hidden"), nn.Dense(len(names), name="modality")
        losses = {}
        for number, m in enumerate(names):
            logits = tell(nn.gelu(hide(reversed_gradient(encoded.pooled[m], self.strength)))).astype(jnp.float32)
            target = jnp.full(logits.shape[:1], number)
            losses[m] = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        return masked_row_mean(losses, encoded.present)
