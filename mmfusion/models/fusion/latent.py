"""Learned latent queries that attend to the modalities: Perceiver and Q-Former."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.models.fusion.contract import Declaration, Fused
from mmfusion.models.fusion.sequence import (
    LEARNED,
    AttentionFusion,
    add_type_embeddings,
    concatenate_tokens,
    learned_tokens,
    split_weights,
)


class Perceiver(AttentionFusion):
    """Learned latents alternate cross-attention to all tokens with self-attention (Perceiver, Jaegle et al. 2021).

    arXiv:2103.03206.

    Attributes:
      width: width D of tokens and features.
      latents: number of latents.
      layers: number of layers, each a cross-attention and a self-attention.
      heads: attention heads; divides `width`.
      dropout: rate on residual branches and features.
    """

    latents: int = 8
    layers: int = 2

    declares: ClassVar[Declaration] = Declaration(
        family="attention", paper="arXiv:2103.03206", symmetric=True, needs_tokens=True
    )

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, width]` with masks `[B, N_m]` into features `[B, width]`.

        The returned attention weights are the last layer's, from the latents to each modality.

        Raises:
          UserError: `heads` does not divide `width`.
        """
        names = sorted(tokens)
        context, context_mask, sizes = concatenate_tokens(add_type_embeddings(self, tokens, mask), mask, names)
        x = learned_tokens(self, "latents", self.latents, context.shape[0], self.width, self.dtype)
        x_mask = jnp.ones(x.shape[:2], bool)
        attention = {}
        for layer in range(self.layers):
            cross_attention = self.block(f"read{layer}")
            x, weights = cross_attention(x, x_mask, context, context_mask, train=train)
            attention = split_weights(weights, [LEARNED], [self.latents], names, sizes)
            self_attention = self.block(f"think{layer}")
            x, _ = self_attention(x, x_mask, train=train)
        return Fused(features=self.output(self.layer_norm(x).mean(axis=1), train=train), attention=attention)


class QFormer(AttentionFusion):
    """Learned queries with self-attention, then cross-attention to each modality by separate layers (Li et al. 2023).

    BLIP-2, arXiv:2301.12597. Any number of modalities, in sorted order, replaces its single frozen image encoder.

    Attributes:
      width: width D of tokens and features.
      queries: number of queries.
      layers: number of layers, each a self-attention and one cross-attention per modality.
      heads: attention heads; divides `width`.
      dropout: rate on residual branches and features.
    """

    queries: int = 8
    layers: int = 2

    declares: ClassVar[Declaration] = Declaration(family="attention", paper="arXiv:2301.12597", needs_tokens=True)

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, width]` with masks `[B, N_m]` into features `[B, width]`.

        The returned attention weights are the last layer's, from the queries to each modality.

        Raises:
          UserError: `heads` does not divide `width`.
        """
        names = sorted(tokens)
        batch_size = tokens[names[0]].shape[0]
        x = learned_tokens(self, "queries", self.queries, batch_size, self.width, self.dtype)
        x_mask = jnp.ones(x.shape[:2], bool)
        attention = {}
        for layer in range(self.layers):
            self_attention = self.block(f"layer{layer}_self")
            x, _ = self_attention(x, x_mask, train=train)
            for m in names:
                block = self.block(f"layer{layer}_{m}")
                attended, attention[LEARNED, m] = block(x, x_mask, tokens[m], mask[m], train=train)
                x = jnp.where(mask[m].any(axis=1)[:, None, None], attended, x)  # absent keys do not update the queries
        return Fused(features=self.output(self.layer_norm(x).mean(axis=1), train=train), attention=attention)
