"""Encoders of tabular data with numerical and categorical columns, any of which may be missing.

B batch · F columns · N tokens · D width
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.models.layers import Dropout, TransformerBlock, normalised_tokens, zero_masked


class TableMLP(nn.Module):
    """MLP over numerical columns, embedded categories and missing-value indicators; one token.

    Attributes:
      width: width D of the tokens.
      categories: number of categories of each column; 0 for a numerical column.
      embedding: width of the category embeddings.
      hidden: units of each hidden layer.
      dropout: dropout rate after each hidden layer.
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
        """Encodes float32 rows `[B, F]`, categories as indices, with `mask [B, F]` as a token `[B, 1, D]` and mask."""
        x = zero_masked(x, mask)
        inputs = [(~mask).astype(self.dtype)]
        for column, size in enumerate(self.categories):
            if size:
                embed = nn.Embed(size, self.embedding, dtype=self.dtype, name=f"column{column}")
                inputs.append(zero_masked(embed(x[:, column].astype(jnp.int32)), mask[:, column]))
            else:
                inputs.append(x[:, column : column + 1].astype(self.dtype))
        x = jnp.concatenate(inputs, axis=-1)
        for layer, units in enumerate(self.hidden):
            x = nn.gelu(nn.Dense(units, dtype=self.dtype, name=f"hidden{layer}")(x))
            x = Dropout(self.dropout)(x, train=train)
        present = mask.any(axis=1, keepdims=True)  # [B, 1]
        token = nn.Dense(self.width, dtype=self.dtype, name="project")(x)[:, None]  # [B, 1, D]
        return normalised_tokens(token, present, self.dtype), present


class FTTransformer(nn.Module):
    """Transformer blocks over one token per column (Gorishniy et al. 2021, arXiv:2106.11959).

    The token of a numerical value x in column j is x · w_j + b_j, that of a category is its embedding + b_j. The first
    token is the paper's class token. The blocks differ from the paper: GELU with twice the width replaces ReGLU with
    4/3 the width, and the first norm is kept.

    Attributes:
      width: width D of the output tokens.
      categories: number of categories of each column; 0 for a numerical column.
      layers: number of transformer blocks.
      hidden: width of the transformer blocks.
      heads: attention heads; divides `hidden`.
      dropout: dropout rate of the residual branches.
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
        """Encodes float32 rows `[B, F]`, categories as indices, with `mask [B, F]` as tokens `[B, 1 + F, D]` and mask.

        Raises:
          UserError: `heads` does not divide `hidden`.
        """
        x = zero_masked(x, mask)
        init = nn.initializers.normal(0.5)
        columns = []
        for column, size in enumerate(self.categories):
            if size:
                embed = nn.Embed(size, self.hidden, embedding_init=init, dtype=self.dtype, name=f"column{column}")
                token = embed(x[:, column].astype(jnp.int32))
            else:
                weight = self.param(f"column{column}", init, (self.hidden,)).astype(self.dtype)
                token = x[:, column : column + 1].astype(self.dtype) * weight
            columns.append(token + self.param(f"bias{column}", init, (self.hidden,)).astype(self.dtype))
        class_token = self.param("class", init, (1, self.hidden)).astype(self.dtype)
        tokens = jnp.concatenate(
            [jnp.broadcast_to(class_token[None], (x.shape[0], 1, self.hidden)), jnp.stack(columns, 1)], 1
        )
        mask = jnp.concatenate([mask.any(axis=1, keepdims=True), mask], axis=1)  # [B, 1 + F]
        tokens = zero_masked(tokens, mask)
        for layer in range(self.layers):
            block = TransformerBlock(
                self.heads, self.hidden, dropout=self.dropout, dtype=self.dtype, name=f"block{layer}"
            )
            tokens, _ = block(tokens, mask, train=train)
        return normalised_tokens(nn.Dense(self.width, dtype=self.dtype, name="project")(tokens), mask, self.dtype), mask
