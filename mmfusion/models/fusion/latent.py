"""Learned queries that read the modalities: Perceiver and Q-Former."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.models.fusion.contract import Declaration, Fused
from mmfusion.models.fusion.sequence import LEARNED, AttentionFusion, cut, joined, learned_tokens, typed


class Perceiver(AttentionFusion):
    """Learned latents attend to all tokens, then to themselves, in turns (Jaegle et al. 2021, arXiv:2103.03206).

    Attributes:
      width: width D of tokens and features.
      latents: how many there are.
      layers: turns.
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

        The attention returned is the last turn's, of the latents to each modality.

        Raises:
          UserError: `heads` does not divide `width`.
        """
        names = sorted(tokens)
        context, context_mask, sizes = joined(typed(self, tokens, mask), mask, names)
        x = learned_tokens(self, "latents", self.latents, context.shape[0], self.width, self.dtype)
        real = jnp.ones(x.shape[:2], bool)
        attention = {}
        for layer in range(self.layers):
            read = self.block(f"read{layer}")
            x, weights = read(x, real, context, context_mask, train=train)
            attention = cut(weights, [LEARNED], [self.latents], names, sizes)
            think = self.block(f"think{layer}")
            x, _ = think(x, real, train=train)
        return Fused(features=self.out(self.normal(x).mean(axis=1), train=train), attention=attention)


class QFormer(AttentionFusion):
    """Learned queries attend to themselves, then to each modality by layers of its own (Li et al. 2023).

    BLIP-2, arXiv:2301.12597, whose one frozen image encoder is here any number of modalities, in sorted order.

    Attributes:
      width: width D of tokens and features.
      queries: how many there are.
      layers: layers, each a self-attention and a cross-attention a modality.
      heads: attention heads; divides `width`.
      dropout: rate on residual branches and features.
    """

    queries: int = 8
    layers: int = 2

    declares: ClassVar[Declaration] = Declaration(family="attention", paper="arXiv:2301.12597", needs_tokens=True)

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, width]` with masks `[B, N_m]` into features `[B, width]`.

        The attention returned is the last layer's, of the queries to each modality.

        Raises:
          UserError: `heads` does not divide `width`.
        """
        names = sorted(tokens)
        rows = tokens[names[0]].shape[0]
        x = learned_tokens(self, "queries", self.queries, rows, self.width, self.dtype)
        real = jnp.ones(x.shape[:2], bool)
        attention = {}
        for layer in range(self.layers):
            own = self.block(f"layer{layer}_self")
            x, _ = own(x, real, train=train)
            for m in names:
                block = self.block(f"layer{layer}_{m}")
                read, attention[LEARNED, m] = block(x, real, tokens[m], mask[m], train=train)
                x = jnp.where(mask[m].any(axis=1)[:, None, None], read, x)  # what is absent is not read
        return Fused(features=self.out(self.normal(x).mean(axis=1), train=train), attention=attention)
