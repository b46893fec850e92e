"""Encoders of table rows: numbers and categories by column, any of which may be missing.

B batch · F columns · N tokens · D width
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.models.layers import Dropout, TransformerBlock, normalised_tokens, zero_masked


class TableMLP(nn.Module):
    """An MLP over a row: numbers, embedded categories, and which columns are missing; one token.

    Attributes:
      width: token width D.
      categories: of each column, how many categories it has; 0: it holds numbers.
      embedding: width of each category's embedding.
      hidden: units of each hidden layer.
      dropout: rate on each hidden layer.
    """

    width: int
    categories: tuple[int, ...]
    embedding: int = 8
    hidden: tuple[int, ...] = (128, 64)
    dropout: float = 0.0
    dtype: Any = jnp.float32

    reads: ClassVar[str] = "table"
    layer_order: ClassVar = None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes rows `[B, F]` float32 (categories as their numbers) with `mask [B, F]` as a token `[B, 1, D]`."""
        x = zero_masked(x, mask)
        parts = [(~mask).astype(self.dtype)]
        for column, count in enumerate(self.categories):
            if count:
                embed = nn.Embed(count, self.embedding, dtype=self.dtype, name=f"column{column}")
                parts.append(zero_masked(embed(x[:, column].astype(jnp.int32)), mask[:, column]))
            else:
                parts.append(x[:, column : column + 1].astype(self.dtype))
        h = jnp.concatenate(parts, axis=-1)
        for layer, units in enumerate(self.hidden):
            h = nn.gelu(nn.Dense(units, dtype=self.dtype, name=f"hidden{layer}")(h))
            h = Dropout(self.dropout)(h, train=train)
        some = mask.any(axis=1, keepdims=True)  # [B, 1]
        token = nn.Dense(self.width, dtype=self.dtype, name="project")(h)[:, None]  # [B, 1, D]
        return normalised_tokens(token, some, self.dtype), some


class FTTransformer(nn.Module):
    """Every column a token, then transformer blocks (Gorishniy et al. 2021, arXiv:2106.11959).

    A number x of column j is x · w_j + b_j, a category its embedding + b_j; the first token is the paper's class token.
    The blocks are ours: GELU at twice the width where the paper has ReGLU at 4/3, and the first norm stays.

    Attributes:
      width: token width D of what is returned.
      categories: of each column, how many categories it has; 0: it holds numbers.
      layers: transformer blocks.
      hidden: width within the transformer.
      heads: attention heads; divides `hidden`.
      dropout: rate on the residual branches.
    """

    width: int
    categories: tuple[int, ...]
    layers: int = 2
    hidden: int = 64
    heads: int = 4
    dropout: float = 0.0
    dtype: Any = jnp.float32

    reads: ClassVar[str] = "table"
    layer_order: ClassVar = None

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes rows `[B, F]` float32 (categories as their numbers) with `mask [B, F]` as tokens `[B, 1 + F, D]`.

        Raises:
          UserError: `heads` does not divide `hidden`.
        """
        x = zero_masked(x, mask)
        start = nn.initializers.normal(0.5)
        each = []
        for column, count in enumerate(self.categories):
            if count:
                embed = nn.Embed(count, self.hidden, embedding_init=start, dtype=self.dtype, name=f"column{column}")
                value = embed(x[:, column].astype(jnp.int32))
            else:
                weight = self.param(f"column{column}", start, (self.hidden,)).astype(self.dtype)
                value = x[:, column : column + 1].astype(self.dtype) * weight
            each.append(value + self.param(f"bias{column}", start, (self.hidden,)).astype(self.dtype))
        first = self.param("class", start, (1, self.hidden)).astype(self.dtype)
        tokens = jnp.concatenate([jnp.broadcast_to(first[None], (x.shape[0], 1, self.hidden)), jnp.stack(each, 1)], 1)
        mask = jnp.concatenate([mask.any(axis=1, keepdims=True), mask], axis=1)  # [B, 1 + F]
        tokens = zero_masked(tokens, mask)
        for layer in range(self.layers):
            block = TransformerBlock(
                self.heads, self.hidden, dropout=self.dropout, dtype=self.dtype, name=f"block{layer}"
            )
            tokens, _ = block(tokens, mask, train=train)
        return normalised_tokens(nn.Dense(self.width, dtype=self.dtype, name="project")(tokens), mask, self.dtype), mask
