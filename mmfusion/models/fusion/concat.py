"""Concatenation and an MLP: the standard baseline of feature-level fusion."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.models.fusion.contract import Declaration, Fused, pool
from mmfusion.models.layers import Dropout


class Concat(nn.Module):
    """MLP([x_1; ...; x_M]) of the modalities' masked means; zeros for an absent modality.

    Attributes:
      width: width D of every layer.
      layers: number of dense layers, each followed by a GELU.
      dropout: dropout rate after each layer.
    """

    width: int
    layers: int = 2
    dropout: float = 0.0
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(family="baseline")

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, D]` with masks `[B, N_m]` into features `[B, width]`."""
        pooled, _ = pool(tokens, mask)
        x = jnp.concatenate(pooled, axis=-1)  # [B, M · D]
        for _ in range(self.layers):
            x = nn.gelu(nn.Dense(self.width, dtype=self.dtype)(x))
            x = Dropout(self.dropout)(x, train=train)
        return Fused(features=x, attention={})
