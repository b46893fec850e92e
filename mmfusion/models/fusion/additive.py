"""Additive strategies: features that are a sum of functions of one modality each, so no interaction is learned."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.models.fusion.contract import Declaration, Fused, pool
from mmfusion.models.layers import masked_softmax, zero_masked


def project(tokens: dict[str, jax.Array], pooled: list[jax.Array], width: int, dtype: Any) -> jax.Array:
    """Returns W_m x_m + b_m of each modality, stacked in sorted order `[B, M, width]`."""
    names = sorted(tokens)
    return jnp.stack(
        [nn.Dense(width, dtype=dtype, name=f"project_{m}")(x) for m, x in zip(names, pooled, strict=True)], axis=1
    )


class Mean(nn.Module):
    """1 / |P| · Σ_{m in P} (W_m x_m + b_m) over the present modalities P; zeros where there is none.

    Attributes:
      width: width D of the features.
    """

    width: int
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(family="weighted", additive=True, synergy=False, symmetric=True)

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, D]` with masks `[B, N_m]` into features `[B, width]`."""
        del train
        pooled, present = pool(tokens, mask)
        projected = zero_masked(project(tokens, pooled, self.width, self.dtype), present)  # [B, M, D]
        count = jnp.maximum(present.sum(axis=1, keepdims=True), 1)
        return Fused(features=projected.sum(axis=1) / count.astype(self.dtype), attention={})


class Weighted(nn.Module):
    """Σ_{m in P} w_m (W_m x_m + b_m), w the softmax over the present modalities P of one learned scalar each.

    Attributes:
      width: width D of the features.
    """

    width: int
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(family="weighted", additive=True, synergy=False, symmetric=True)

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, D]` with masks `[B, N_m]` into features `[B, width]`."""
        del train
        pooled, present = pool(tokens, mask)
        projected = zero_masked(project(tokens, pooled, self.width, self.dtype), present)  # [B, M, D]
        scores = self.param("scores", nn.initializers.zeros, (len(pooled),))
        weights = masked_softmax(jnp.broadcast_to(scores, present.shape), present).astype(self.dtype)  # [B, M]
        return Fused(features=jnp.einsum("bm,bmd->bd", weights, projected), attention={})
