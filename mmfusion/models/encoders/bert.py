"""BERT and RoBERTa on token ids, with the layers of published weights.

B batch · T time · N tokens · D width
"""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.errors import UserError
from mmfusion.models.layers import Attention, Dropout, masked_mean, normalised_tokens, zero_masked

ACTIVATIONS = {
    "gelu": lambda x: nn.gelu(x, approximate=False),
    "gelu_tanh": lambda x: nn.gelu(x, approximate=True),
    "relu": nn.relu,
    "silu": nn.silu,
}
TOKENS = ("all", "first", "mean")


def activation(name: str, owner: str) -> Any:
    """Returns the activation function of a name; raises UserError if it is unknown."""
    if name not in ACTIVATIONS:
        raise UserError("unknown value", path=f"{owner}.activation", value=name, choices=ACTIVATIONS)
    return ACTIVATIONS[name]


def embedding_rows(rows: int, vocabulary: int, owner: str) -> int:
    """Returns the number of rows of the token embeddings, `vocabulary` if `rows` is 0; raises UserError for too few."""
    if rows and rows < vocabulary:
        message = f"the tokenizer has {vocabulary:,} ids: set the tokenizer that belongs to the weights, or 0"
        raise UserError(message, path=f"{owner}.embeddings", value=rows)
    return rows or vocabulary


def selected(hidden: jax.Array, mask: jax.Array, tokens: str) -> tuple[jax.Array, jax.Array]:
    """Returns the positions `[B, T or 1, hidden]` that an option `tokens` outputs, and their mask."""
    if tokens == "mean":
        return masked_mean(hidden, mask)[:, None], mask.any(axis=1, keepdims=True)
    return (hidden, mask) if tokens == "all" else (hidden[:, :1], mask[:, :1])


class BERTBlock(nn.Module):
    """Post-norm attention and MLP, each with a residual connection, as in published BERT weights."""

    heads: int
    mlp: int
    dropout: float
    epsilon: float
    activation: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> jax.Array:
        """Maps `x [B, T, hidden]` with `mask [B, T]` to the same shape."""
        width = x.shape[-1]
        attended, _ = Attention(self.heads, width, self.dtype, key_bias=True, name="attention")(x, x, mask)
        x = x + Dropout(self.dropout)(attended, train=train)
        x = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm_attention")(x)
        hidden = ACTIVATIONS[self.activation](nn.Dense(self.mlp, dtype=self.dtype, name="mlp_in")(x))
        hidden = nn.Dense(width, dtype=self.dtype, name="mlp_out")(hidden)
        x = x + Dropout(self.dropout)(hidden, train=train)
        return nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm_mlp")(x)


class BERT(nn.Module):
    """BERT, by default in the base size (Devlin et al. 2019, arXiv:1810.04805).

    MiniLM (arXiv:2002.10957), e5 (arXiv:2212.03533) and other sentence encoders have its layers.

    Attributes:
      width: width D of the output tokens.
      vocabulary: number of token ids.
      layers: number of transformer blocks.
      hidden: width of the transformer blocks.
      heads: attention heads; divides `hidden`.
      mlp: hidden width of each block's MLP.
      positions: maximum number of tokens.
      embeddings: rows of the token embeddings, of which published weights may have more than ids; 0: `vocabulary`.
      segments: rows of the segment embeddings.
      offset: row of the position embeddings that the first token has.
      epsilon: epsilon of the layer normalisations.
      activation: of the MLPs: `gelu` (exact), `gelu_tanh`, `relu` or `silu`.
      tokens: `all` outputs the T positions; `first`, `mean` and `pooled` output one token: the first position, the mean
        of the unmasked ones, or tanh(W x + b) of the first.
      dropout: dropout rate of the embeddings and the residual branches (the paper: 0.1).
    """

    width: int
    vocabulary: int
    layers: int = 12
    hidden: int = 768
    heads: int = 12
    mlp: int = 3072
    positions: int = 512
    embeddings: int = 0
    segments: int = 2
    offset: int = 0
    epsilon: float = 1e-12
    activation: str = "gelu"
    tokens: str = "all"
    dropout: float = 0.0
    dtype: Any = jnp.float32

    reads: ClassVar[str] = "text"
    layer_order: ClassVar = (
        "embed|place|segment|norm_embed",
        r"block\d+",
        "pooler|project|norm",
    )

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes ids `[B, T]` int32 with `mask [B, T]` (a prefix) as tokens `[B, T or 1, D]` and their mask.

        All positions belong to the first segment.

        Raises:
          UserError: T is above `positions`, `heads` does not divide `hidden`, `embeddings` is below `vocabulary`, or
            `tokens` or `activation` is unknown.
        """
        if self.tokens not in (*TOKENS, "pooled"):
            raise UserError("unknown value", path="bert.tokens", value=self.tokens, choices=(*TOKENS, "pooled"))
        if x.shape[1] > self.positions:
            raise UserError(f"texts of length={x.shape[1]} are longer", path="bert.positions", value=self.positions)
        activation(self.activation, "bert")
        rows = embedding_rows(self.embeddings, self.vocabulary, "bert")

        def embedding(rows: int, name: str) -> nn.Embed:
            return nn.Embed(rows, self.hidden, dtype=self.dtype, name=name)

        hidden = embedding(rows, "embed")(jnp.where(mask, x, 0))
        hidden = hidden + embedding(self.offset + self.positions, "place")(self.offset + jnp.arange(x.shape[1]))
        hidden = hidden + embedding(self.segments, "segment")(jnp.zeros((1, 1), jnp.int32))
        hidden = nn.LayerNorm(epsilon=self.epsilon, dtype=self.dtype, name="norm_embed")(hidden)
        hidden = Dropout(self.dropout)(zero_masked(hidden, mask), train=train)  # [B, T, hidden]
        for layer in range(self.layers):
            hidden = BERTBlock(
                self.heads, self.mlp, self.dropout, self.epsilon, self.activation, self.dtype, name=f"block{layer}"
            )(hidden, mask, train=train)
        hidden, mask = selected(hidden, mask, self.tokens)
        if self.tokens == "pooled":
            hidden = nn.tanh(nn.Dense(self.hidden, dtype=self.dtype, name="pooler")(hidden))
        return normalised_tokens(nn.Dense(self.width, dtype=self.dtype, name="project")(hidden), mask, self.dtype), mask


class RoBERTa(BERT):
    """RoBERTa, by default in the base size (Liu et al. 2019, arXiv:1907.11692); attributes as BERT.

    The first two rows of its position embeddings are those of padding, and there is one segment.
    """

    segments: int = 1
    offset: int = 2
    epsilon: float = 1e-5
