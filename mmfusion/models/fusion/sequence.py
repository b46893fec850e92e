"""What the attention family shares: tokens of several modalities as one sequence, and its weights cut apart again."""

import itertools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.models.layers import Dropout, TransformerBlock, masked_max, masked_mean, zero_masked

LEARNED = "learned"  # names learned tokens among the keys of `Fused.attention`


class AttentionFusion(nn.Module):
    """What strategies that are made of transformer blocks have in common.

    Attributes:
      width: width D of tokens and features.
      heads: attention heads; divides `width`.
      dropout: rate on residual branches and features.
    """

    width: int
    heads: int = 4
    dropout: float = 0.0
    dtype: Any = jnp.float32

    def block(self, name: str) -> TransformerBlock:
        """Returns a block of the strategy's; call it in a compact method."""
        return TransformerBlock(self.heads, self.width, dropout=self.dropout, dtype=self.dtype, name=name)

    def normal(self, x: jax.Array, name: str = "norm") -> jax.Array:
        """Returns x `[..., D]` layer-normalised; call it in a compact method."""
        return nn.LayerNorm(dtype=self.dtype, name=name)(x)

    def out(self, x: jax.Array, *, train: bool) -> jax.Array:
        """Returns the features GELU(W x + b) `[B, width]` of what was read `[B, ...]`; call it in a compact method."""
        features = nn.gelu(nn.Dense(self.width, dtype=self.dtype, name="out")(x))
        return Dropout(self.dropout)(features, train=train)


def joined(
    tokens: dict[str, jax.Array], mask: dict[str, jax.Array], names: list[str]
) -> tuple[jax.Array, jax.Array, list[int]]:
    """Returns the tokens `[B, ΣN_m, D]` of the named modalities, their mask, and how many each has."""
    together = jnp.concatenate([zero_masked(tokens[m], mask[m]) for m in names], axis=1)
    return together, jnp.concatenate([mask[m] for m in names], axis=1), [tokens[m].shape[1] for m in names]


def typed(module: nn.Module, tokens: dict[str, jax.Array], mask: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Returns the tokens with a learned vector of `module` added that says which modality each is from."""
    result = {}
    for m in sorted(tokens):
        kind = module.param(f"type_{m}", nn.initializers.normal(0.5), tokens[m].shape[-1:]).astype(tokens[m].dtype)
        result[m] = zero_masked(zero_masked(tokens[m], mask[m]) + kind, mask[m])
    return result


def learned_tokens(module: nn.Module, name: str, count: int, rows: int, width: int, dtype: Any) -> jax.Array:
    """Returns `count` learned tokens of `module`, the same for every row: `[B, count, D]`."""
    learned = module.param(name, nn.initializers.normal(1.0), (count, width)).astype(dtype)
    return jnp.broadcast_to(learned, (rows, count, width))


def with_learned_token(module: nn.Module, tokens: jax.Array, mask: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns tokens `[B, 1 + N, D]` and their mask, a learned token of `module` before the given ones."""
    rows, _, width = tokens.shape
    first = learned_tokens(module, "token", 1, rows, width, tokens.dtype)
    tokens = jnp.concatenate([first, zero_masked(tokens, mask)], axis=1)
    return tokens, jnp.concatenate([jnp.ones((rows, 1), bool), mask], axis=1)


def cut(
    weights: jax.Array, queries: list[str], query_sizes: list[int], keys: list[str], key_sizes: list[int]
) -> dict[tuple[str, str], jax.Array]:
    """Returns weights `[B, heads, ΣN_query, ΣN_key]` as `[B, heads, N_query, N_key]` by (query, key) modality."""
    rows = jnp.split(weights, list(itertools.accumulate(query_sizes))[:-1], axis=2)
    return {
        (q, k): part
        for q, row in zip(queries, rows, strict=True)
        for k, part in zip(keys, jnp.split(row, list(itertools.accumulate(key_sizes))[:-1], axis=3), strict=True)
    }


def mean_max(tokens: jax.Array, mask: jax.Array) -> jax.Array:
    """Returns the mean and the maximum of the real tokens, concatenated: `[B, 2D]`."""
    return jnp.concatenate([masked_mean(tokens, mask), masked_max(tokens, mask)], axis=-1)


def pooled_features(tokens: jax.Array, mask: jax.Array, width: int, dtype: Any) -> jax.Array:
    """Returns GELU(W [mean; max]) `[B, width]` of the real tokens; call it in a compact method."""
    return nn.gelu(nn.Dense(width, dtype=dtype, name="out")(mean_max(tokens, mask)))
