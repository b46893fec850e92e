"""Additive strategies: the features are a sum of functions of single modalities, without interactions."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion import rng
from mmfusion.errors import UserError
from mmfusion.models.fusion.contract import Declaration, Fused, learned_weights, pool, project_each
from mmfusion.models.layers import row_keys, zero_masked


def project(tokens: dict[str, jax.Array], pooled: list[jax.Array], width: int, dtype: Any) -> jax.Array:
    """Returns the projections W_m x_m + b_m, stacked in sorted order of the modalities, `[B, M, width]`."""
    return jnp.stack(project_each(sorted(tokens), pooled, width, dtype), axis=1)


class Mean(nn.Module):
    """1 / |P| · Σ_{m in P} (W_m x_m + b_m) over the present modalities P; zeros if none is present.

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
    """Σ_{m in P} (W_m x_m + b_m) over the present modalities P; zeros if none is present.

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
    """Σ_{m in P} w_m (W_m x_m + b_m), with w the softmax over the present modalities P of one learned scalar each.

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
        if len(tokens) == 1:  # a single weight is always 1
            return Fused(features=projected[:, 0], attention={})
        weights = learned_weights(self, sorted(tokens), present).astype(self.dtype)  # [B, M]
        return Fused(features=jnp.einsum("bm,bmd->bd", weights, projected), attention={})


class EmbraceNet(nn.Module):
    """EmbraceNet: each feature is sampled from one present modality per example (Choi & Lee 2019, arXiv:1904.09078).

    Docking is d_m = ReLU(W_m x_m + b_m). Feature i is d_m[i] with m sampled uniformly from the present modalities: in
    training anew for each example and step, in evaluation once for all, by a fixed key, so that equal examples have
    equal outputs. The authors' code samples anew in evaluation, too.

    Attributes:
      width: width D of the features.
      evaluation: `sample`, as the paper, or `mean`, the expected value: the mean of d_m[i] over the present modalities.
    """

    width: int
    evaluation: str = "sample"
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(
        family="weighted", paper="arXiv:1904.09078", additive=True, synergy=False
    )

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, D]` with masks `[B, N_m]` into features `[B, width]`.

        Raises:
          UserError: `evaluation` is unknown.
        """
        if self.evaluation not in (choices := ("sample", "mean")):
            raise UserError("unknown value", path="embracenet.evaluation", value=self.evaluation, choices=choices)
        pooled, present = pool(tokens, mask)
        docked = zero_masked(nn.relu(project(tokens, pooled, self.width, self.dtype)), present)  # [B, M, D]
        keys = row_keys(self, train=train)
        if keys is None and self.evaluation == "mean":
            probabilities = present / jnp.maximum(present.sum(axis=1, keepdims=True), 1)  # [B, M]
            return Fused(features=jnp.einsum("bm,bmd->bd", probabilities.astype(self.dtype), docked), attention={})
        if keys is None:
            keys = jnp.broadcast_to(rng.key(0, "embracenet"), present.shape[:1])

        def sample(key: jax.Array, row_logits: jax.Array) -> jax.Array:
            modality_index = jax.random.categorical(key, row_logits, shape=(self.width,))
            return jax.nn.one_hot(modality_index, row_logits.shape[0], axis=0)  # [M, D]

        # An example without any modality samples uniformly, among zeros.
        logits = jnp.where(present | ~present.any(axis=1, keepdims=True), 0.0, -jnp.inf)
        selection = jax.vmap(sample)(keys, logits)  # [B, M, D]
        return Fused(features=(selection.astype(self.dtype) * docked).sum(axis=1), attention={})
