"""Objectives that align modalities: contrastive, canonical correlation, and an adversarial modality discriminator.

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
    """Contrastive alignment of the modalities of each row (CLIP, Radford et al. 2021, arXiv:2103.00020).

    Softmax cross-entropy over cosine similarities times a learned scale, in both directions, averaged over pairs of
    modalities. Negatives are the other rows of the micro-batch, on all devices.

    Attributes:
      shared: width K of the shared space.
      temperature: inverse of the initial scale; the scale is at most 100.
    """

    shared: int = 64
    temperature: float = 0.07
    dtype: Any = jnp.float32
    axis_name: str | None = None

    requires: ClassVar[Requirements] = Requirements(modalities=2)
    min_present: ClassVar[int] = 2

    @nn.compact
    def __call__(self, encoded: Encoded, *, train: bool) -> jax.Array:
        """Returns the loss of each row `[B]`, averaged over the pairs of modalities that it has."""
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
            forward = _matching_loss(points[a], points[b], both[pair], scale, axis)
            losses[pair] = (forward + _matching_loss(points[b], points[a], both[pair], scale, axis)) / 2
        return masked_row_mean(losses, both)


def _matching_loss(
    queries: jax.Array, keys: jax.Array, mask: jax.Array, scale: jax.Array, axis: str | None
) -> jax.Array:
    """Returns the cross-entropy `[B]` of matching each query `[B, K]` to its own key, among the keys in `mask [B]`."""
    target = jnp.arange(queries.shape[0])
    if axis is not None:
        target = target + jax.lax.axis_index(axis) * queries.shape[0]
        keys, mask = jax.lax.all_gather((keys, mask), axis, tiled=True)  # [n, K], [n]
    logits = jnp.where(mask, scale * queries @ keys.T, -1e9)  # [B, n]
    return optax.softmax_cross_entropy_with_integer_labels(logits, target)


class CCA(Auxiliary):
    """The negative mean canonical correlation of two modalities (Andrew et al. 2013, ICML), averaged over pairs.

    The correlation is that of the micro-batch on all devices, so that every row with both modalities has the same loss.

    Attributes:
      shared: width K of the projections; the loss lies between -1 (K perfect correlations) and 0.
      ridge: added to the variances, for directions with little variance in the batch.
    """

    shared: int = 8
    ridge: float = 1e-2
    dtype: Any = jnp.float32
    axis_name: str | None = None

    requires: ClassVar[Requirements] = Requirements(modalities=2)
    min_present: ClassVar[int] = 2

    @nn.compact
    def __call__(self, encoded: Encoded, *, train: bool) -> jax.Array:
        """Returns the loss of each row `[B]`, averaged over the pairs of modalities that it has."""
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
        means = [x_sum / jnp.maximum(count, 1.0) for x_sum in sums]
        x, y = (weight * (values - mean) for values, mean in zip((x, y), means, strict=True))
        xx, yy, xy = (product / jnp.maximum(count - 1, 1.0) for product in total((x.T @ x, y.T @ y, x.T @ y)))
        eye = self.ridge * jnp.eye(self.shared)
        left, right = (jnp.linalg.cholesky(variance + eye) for variance in (xx, yy))
        half = jax.scipy.linalg.solve_triangular(left, xy, lower=True)
        whitened = jax.scipy.linalg.solve_triangular(right, half.T, lower=True)  # [K, K]
        return jnp.linalg.svd(whitened, compute_uv=False).mean()


@jax.custom_vjp
def reversed_gradient(x: jax.Array, strength: float) -> jax.Array:
    """Returns x, whose gradient is multiplied by -`strength` (Ganin et al. 2016, arXiv:1505.07818)."""
    return x


reversed_gradient.defvjp(lambda x, strength: (x, strength), lambda strength, g: (-strength * g, None))


class Adversarial(Auxiliary):
    """A discriminator predicts the modality of a feature, and the encoders learn to deceive it (arXiv:1505.07818).

    Attributes:
      hidden: units of the discriminator's hidden layer.
      strength: factor of the reversed gradient that reaches the encoders.
    """

    hidden: int = 64
    strength: float = 1.0
    dtype: Any = jnp.float32

    requires: ClassVar[Requirements] = Requirements(modalities=2)

    @nn.compact
    def __call__(self, encoded: Encoded, *, train: bool) -> jax.Array:
        """Returns the discriminator's cross-entropy of each row `[B]`, averaged over its modalities."""
        del train
        names = sorted(encoded.pooled)
        hidden, output = nn.Dense(self.hidden, name="hidden"), nn.Dense(len(names), name="modality")
        losses = {}
        for number, m in enumerate(names):
            logits = output(nn.gelu(hidden(reversed_gradient(encoded.pooled[m], self.strength)))).astype(jnp.float32)
            target = jnp.full(logits.shape[:1], number)
            losses[m] = optax.softmax_cross_entropy_with_integer_labels(logits, target)
        return masked_row_mean(losses, encoded.present)
