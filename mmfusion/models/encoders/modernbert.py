"""ModernBERT on token ids, with the layers of published weights (Warner et al. 2024, arXiv:2412.13663).

B batch · T time · h heads · d width of a head · D width
"""

import math
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from mmfusion.errors import UserError
from mmfusion.models.encoders.bert import ACTIVATIONS, TOKENS, activation, embedding_rows, selected
from mmfusion.models.layers import Dropout, head_width, masked_softmax, normalised_tokens, zero_masked


def rotated(x: jax.Array, theta: float) -> jax.Array:
    """Returns `x [B, T, h, d]`, each position rotated by its angles (RoPE; Su et al. 2021, arXiv:2104.09864).

    Dimensions i and i + d/2 are a pair, which position t rotates by t · theta^(-2i/d).
    """
    half = x.shape[-1] // 2
    rates = theta ** (-np.arange(half) / half)
    angles = jnp.asarray(np.arange(x.shape[1])[:, None] * rates, jnp.float32)[:, None]  # [T, 1, d/2]
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    sin, cos = jnp.sin(angles), jnp.cos(angles)
    return jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1).astype(x.dtype)


class RotaryAttention(nn.Module):
    """Multi-head self-attention with rotary positions, over all positions or a window.

    Attributes:
      heads: number of heads; divides the width.
      theta: base of the rotary wavelengths.
      reach: how many positions to each side are attended to; None: all.
    """

    heads: int
    theta: float
    reach: int | None
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """Maps `x [B, T, D]` with `mask [B, T]` to the same shape."""
        width, head_dim = x.shape[-1], head_width(x.shape[-1], self.heads)

        def dense(name: str) -> nn.Dense:
            return nn.Dense(width, use_bias=False, dtype=self.dtype, name=name)

        x = zero_masked(x, mask)
        query, key, value = (
            dense(name)(x).reshape(*x.shape[:2], self.heads, head_dim) for name in ("query", "key", "value")
        )
        query, key = rotated(query, self.theta), rotated(key, self.theta)
        scores = jnp.einsum("bqhd,bkhd->bhqk", query, key, preferred_element_type=jnp.float32)
        visible = mask[:, None, None, :]  # [B, 1, 1, T]
        if self.reach is not None:
            positions = np.arange(x.shape[1])
            visible = visible & jnp.asarray(abs(positions[:, None] - positions) <= self.reach)  # [B, 1, T, T]
        weights = masked_softmax(scores / math.sqrt(head_dim), visible).astype(value.dtype)
        return dense("out")(jnp.einsum("bhqk,bkhd->bqhd", weights, value).reshape(x.shape))


class ModernBERTBlock(nn.Module):
    """Pre-norm rotary attention and gated MLP, each with a residual connection and without biases."""

    heads: int
    mlp: int
    theta: float
    reach: int | None
    first: bool
    dropout: float
    epsilon: float
    activation: str
    dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> jax.Array:
        """Maps `x [B, T, hidden]` with `mask [B, T]` to the same shape."""

        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(epsilon=self.epsilon, use_bias=False, dtype=self.dtype, name=name)

        def dense(width: int, name: str) -> nn.Dense:
            return nn.Dense(width, use_bias=False, dtype=self.dtype, name=name)

        queries = x if self.first else norm("norm_attention")(x)  # the embeddings are normalised
        attended = RotaryAttention(self.heads, self.theta, self.reach, self.dtype, name="attention")(queries, mask)
        x = x + Dropout(self.dropout)(attended, train=train)
        hidden, gate = jnp.split(dense(2 * self.mlp, "mlp_in")(norm("norm_mlp")(x)), 2, axis=-1)
        hidden = dense(x.shape[-1], "mlp_out")(ACTIVATIONS[self.activation](hidden) * gate)
        return zero_masked(x + Dropout(self.dropout)(hidden, train=train), mask)


class ModernBERT(nn.Module):
    """ModernBERT, by default in the base size (Warner et al. 2024, arXiv:2412.13663).

    Attributes:
      width: width D of the output tokens.
      vocabulary: number of token ids.
      layers: number of transformer blocks.
      hidden: width of the transformer blocks.
      heads: attention heads; divides `hidden`.
      mlp: width of each block's MLP behind its gate.
      positions: maximum number of tokens.
      window: the blocks between the global ones attend to window // 2 positions to each side.
      every: blocks 0, `every`, 2 · `every`, ... attend to all positions.
      theta, local_theta: bases of the rotary wavelengths of the global and the other blocks.
      embeddings: rows of the token embeddings, of which published weights may have more than ids; 0: `vocabulary`.
      epsilon: epsilon of the layer normalisations.
      activation: of the MLPs: `gelu` (exact), `gelu_tanh`, `relu` or `silu`.
      tokens: `all` outputs the T positions; `first` and `mean` output one token: the first position, or the mean of the
        unmasked ones.
      dropout: dropout rate of the embeddings and the residual branches.
    """

    width: int
    vocabulary: int
    layers: int = 22
    hidden: int = 768
    heads: int = 12
    mlp: int = 1152
    positions: int = 8192
    window: int = 128
    every: int = 3
    theta: float = 160_000.0
    local_theta: float = 10_000.0
    embeddings: int = 0
    epsilon: float = 1e-5
    activation: str = "gelu"
    tokens: str = "all"
    dropout: float = 0.0
    dtype: Any = jnp.float32

    reads: ClassVar[str] = "text"
    layer_order: ClassVar = ("embed|norm_embed", r"block\d+", "norm_last|project|norm")

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Encodes ids `[B, T]` int32 with `mask [B, T]` (a prefix) as tokens `[B, T or 1, D]` and their mask.

        Raises:
          UserError: T is above `positions`, `heads` does not divide `hidden` into even widths, `embeddings` is below
            `vocabulary`, or `tokens` or `activation` is unknown.
        """
        if self.tokens not in TOKENS:
            raise UserError("unknown value", path="modernbert.tokens", value=self.tokens, choices=TOKENS)
        if x.shape[1] > self.positions:
            message = f"texts of length={x.shape[1]} are longer"
            raise UserError(message, path="modernbert.positions", value=self.positions)
        if head_width(self.hidden, self.heads) % 2:
            message = f"hidden={self.hidden} must be divided into heads of even width"
            raise UserError(message, path="modernbert.heads", value=self.heads)
        activation(self.activation, "modernbert")
        rows = embedding_rows(self.embeddings, self.vocabulary, "modernbert")

        def norm(name: str) -> nn.LayerNorm:
            return nn.LayerNorm(epsilon=self.epsilon, use_bias=False, dtype=self.dtype, name=name)

        hidden = norm("norm_embed")(nn.Embed(rows, self.hidden, dtype=self.dtype, name="embed")(jnp.where(mask, x, 0)))
        hidden = Dropout(self.dropout)(zero_masked(hidden, mask), train=train)  # [B, T, hidden]
        for layer in range(self.layers):
            is_global = layer % self.every == 0
            theta, reach = (self.theta, None) if is_global else (self.local_theta, self.window // 2)
            hidden = ModernBERTBlock(
                self.heads, self.mlp, theta, reach, layer == 0, self.dropout, self.epsilon, self.activation, self.dtype,
                name=f"block{layer}",
            )(hidden, mask, train=train)  # fmt: skip
        hidden, mask = selected(norm("norm_last")(hidden), mask, self.tokens)
        return normalised_tokens(nn.Dense(self.width, dtype=self.dtype, name="project")(hidden), mask, self.dtype), mask
