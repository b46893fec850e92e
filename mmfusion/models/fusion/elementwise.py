"""Elementwise maximum and product of the modalities' projections."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.models.fusion.additive import project
from mmfusion.models.fusion.contract import Declaration, Fused, pool
from mmfusion.models.layers import masked_max


class Max(nn.Module):
    """max_{m in P} (W_m x_m + b_m) over the present modalities P; zeros if none is present.

    Attributes:
      width: width D of the features.
    """

    width: int
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(family="baseline", symmetric=True)

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, D]` with masks `[B, N_m]` into features `[B, width]`."""
        del train
        pooled, present = pool(tokens, mask)
        return Fused(features=masked_max(project(tokens, pooled, self.width, self.dtype), present), attention={})


class Product(nn.Module):
    """Π_{m in P} (1 + W_m x_m + b_m) over the present modalities P; ones if none is present.

    The 1 keeps products of many factors near 1 at initialisation, and lets an uninformative modality be ignored.

    Attributes:
      width: width D of the features.
    """

    width: int
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(family="baseline", symmetric=True)

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, D]` with masks `[B, N_m]` into features `[B, width]`."""
        del train
        pooled, present = pool(tokens, mask)
        factors = 1 + project(tokens, pooled, self.width, self.dtype)  # [B, M, D]
        factors = jnp.where(present[:, :, None], factors, 1)
        features = factors[:, 0]
        for m in range(1, factors.shape[1]):  # not `jnp.prod`: its gradient divides by the factors
            features = features * factors[:, m]
        return Fused(features=features, attention={})
