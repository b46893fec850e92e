"""Shared functions of the attention strategies: concatenating tokens of several modalities, splitting the weights."""

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.models.layers import Dropout, TransformerBlock, masked_max, masked_mean, zero_masked

LEARNED = "learned"  # key of learned tokens in `Fused.attention`


class AttentionFusion(nn.Module):
    """Base class of strategies built from transformer blocks.

    Attributes:
      width: width D of tokens and features.
      heads: attention heads; divides `width`.
      dropout: dropout rate of residual branches and features.
    """

    width: int
    heads: int = 4
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def block(self, name: str) -> TransformerBlock:
        """Returns a transformer block; call it in a compact method."""
        return TransformerBlock(self.heads, self.width, dropout=self.dropout, dtype=self.dtype, name=name)

    def layer_norm(self, x: jax.Array, name: str = "norm") -> jax.Array:
        """Returns `x [..., D]`, layer-normalised; call it in a compact method."""
        return nn.LayerNorm(dtype=self.dtype, name=name)(x)

    def output(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Returns the features GELU(W x + b) `[B, width]` of `x [B, ...]`; call it in a compact method."""
        features = nn.gelu(nn.Dense(self.width, dtype=self.dtype, name="out")(x))
        return Dropout(self.dropout)(features, train=train)


def concatenate_tokens(
    tokens: dict[str, jax.Array], mask: dict[str, jax.Array], names: list[str]
) -> tuple[jax.Array, jax.Array, list[int]]:
    """Returns the tokens `[B, ΣN_m, D]` of the named modalities, their mask, and the number of tokens of each."""
    concatenated = jnp.concatenate([zero_masked(tokens[m], mask[m]) for m in names], axis=1)
    return concatenated, jnp.concatenate([mask[m] for m in names], axis=1), [tokens[m].shape[1] for m in names]


def add_type_embeddings(
    module: nn.Module, tokens: dict[str, jax.Array], mask: dict[str, jax.Array]
) -> dict[str, jax.Array]:
    """Returns the tokens with a learned modality embedding of `module` added."""
    result = {}
    for m in sorted(tokens):
        embedding = module.param(f"type_{m}", nn.initializers.normal(0.5), tokens[m].shape[-1:]).astype(tokens[m].dtype)
        result[m] = zero_masked(zero_masked(tokens[m], mask[m]) + embedding, mask[m])
    return result


def learned_tokens(module: nn.Module, name: str, count: int, batch_size: int, width: int, dtype: Any) -> jax.Array:
    """Returns `count` learned tokens of `module`, shared by the batch: `[B, count, D]`."""
    learned = module.param(name, nn.initializers.normal(1.0), (count, width)).astype(dtype)
    return jnp.broadcast_to(learned, (batch_size, count, width))


def with_learned_token(module: nn.Module, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns tokens `[B, 1 + N, D]` and their mask, with a learned token of `module` prepended."""
    batch_size, _, width = tokens.shape
    learned_token = learned_tokens(module, "token", 1, batch_size, width, tokens.dtype)
    tokens = jnp.concatenate([learned_token, zero_masked(tokens, mask)], axis=1)
    return tokens, jnp.concatenate([jnp.ones((batch_size, 1), bool), mask], axis=1)


def split_weights(
    weights: jax.Array, queries: list[str], query_sizes: list[int], keys: list[str], key_sizes: list[int]
) -> dict[tuple[str, str], jax.Array]:
    """Splits weights `[B, heads, ΣN_query, ΣN_key]` into `[B, heads, N_query, N_key]` by (query, key) modality."""
    weights_by_query = jnp.split(weights, list(itertools.accumulate(query_sizes))[:-1], axis=2)
    return {
        (query, key): block
        for query, query_weights in zip(queries, weights_by_query, strict=True)
        for key, block in zip(
            keys, jnp.split(query_weights, list(itertools.accumulate(key_sizes))[:-1], axis=3), strict=True
        )
    }


def mean_max(tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the mean and maximum over the unmasked tokens, concatenated: `[B, 2D]`."""
    return jnp.concatenate([masked_mean(tokens, mask), masked_max(tokens, mask)], axis=-1)


def pooled_features(tokens: jax.Array, mask: jax.Array, width: int, dtype: Any) -> jax.Array:
    """Returns GELU(W [mean; max]) `[B, width]` over the unmasked tokens; call it in a compact method."""
    return nn.gelu(nn.Dense(width, dtype=dtype, name="out")(mean_max(tokens, mask)))
