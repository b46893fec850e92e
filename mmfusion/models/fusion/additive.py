"""Additive strategies: features that are a sum of functions of one modality each, so no interaction is learned."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.models.fusion.contract import Declaration, Fused, learned_weights, pool, project_each
from mmfusion.models.layers import row_keys, zero_masked


def project(tokens: dict[str, jax.Array], pooled: list[jax.Array], width: int, dtype: Any) -> jax.Array:
    """Returns W_m x_m + b_m of each modality, stacked in sorted order `[B, M, width]`."""
    return jnp.stack(project_each(sorted(tokens), pooled, width, dtype), axis=1)


class Mean(nn.Module):
    """1 / |P| · Σ_{m in P} (W_m x_m + b_m) over the present modalities P; zeros where there is none.

    Attributes:
      width: width D of the features.
    """

    width: int
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(family="baseline", additive=True, synergy=False, symmetric=True)

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, D]` with masks `[B, N_m]` into features `[B, width]`."""
        del train
        pooled, present = pool(tokens, mask)
        projected = zero_masked(project(tokens, pooled, self.width, self.dtype), present)  # [B, M, D]
        count = jnp.maximum(present.sum(axis=1, keepdims=True), 1)
        return Fused(features=projected.sum(axis=1) / count.astype(self.dtype), attention={})


class Sum(nn.Module):
    """Σ_{m in P} (W_m x_m + b_m) over the present modalities P; zeros where there is none.

    Attributes:
      width: width D of the features.
    """

    width: int
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(family="baseline", additive=True, synergy=False, symmetric=True)

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, D]` with masks `[B, N_m]` into features `[B, width]`."""
        del train
        pooled, present = pool(tokens, mask)
        projected = zero_masked(project(tokens, pooled, self.width, self.dtype), present)  # [B, M, D]
        return Fused(features=projected.sum(axis=1), attention={})


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
        if len(tokens) == 1:  # its weight is 1, whatever the scalar
            return Fused(features=projected[:, 0], attention={})
        weights = learned_weights(self, sorted(tokens), present).astype(self.dtype)  # [B, M]
        return Fused(features=jnp.einsum("bm,bmd->bd", weights, projected), attention={})


class EmbraceNet(nn.Module):
    """Each feature is taken from one present modality, drawn anew for each row (Choi & Lee 2019, arXiv:1904.09078).

    Docking is d_m = ReLU(W_m x_m + b_m); in training feature i is d_m[i] with m drawn uniformly from the present
    modalities, in evaluation the mean over them, which is what the draw has on average, so that it is repeatable.

    Attributes:
      width: width D of the features.
    """

    width: int
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(
        family="weighted", paper="arXiv:1904.09078", additive=True, synergy=False, symmetric=True
    )

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, D]` with masks `[B, N_m]` into features `[B, width]`."""
        pooled, present = pool(tokens, mask)
        docked = zero_masked(nn.relu(project(tokens, pooled, self.width, self.dtype)), present)  # [B, M, D]
        chances = present / jnp.maximum(present.sum(axis=1, keepdims=True), 1)  # [B, M]
        keys = row_keys(self, train=train)
        if keys is None:
            return Fused(features=jnp.einsum("bm,bmd->bd", chances.astype(self.dtype), docked), attention={})

        def draw(key: jax.Array, row: jax.Array) -> jax.Array:
            chosen = jax.random.categorical(key, row, shape=(self.width,))
            return jax.nn.one_hot(chosen, row.shape[0], axis=0)  # [M, D]

        # A row without any modality draws among zeros.
        logits = jnp.where(present | ~present.any(axis=1, keepdims=True), 0.0, -jnp.inf)
        share = jax.vmap(draw)(keys, logits)  # [B, M, D]
        return Fused(features=(share.astype(self.dtype) * docked).sum(axis=1), attention={})
