"""One transformer over all modalities: merged tokens, bottleneck tokens between them, or one token a modality."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.errors import UserError
from mmfusion.models.fusion.contract import Declaration, Fused, pool
from mmfusion.models.fusion.sequence import (
    LEARNED,
    AttentionFusion,
    cut,
    joined,
    learned_tokens,
    mean_max,
    typed,
    with_learned_token,
)
from mmfusion.models.layers import Dropout


class MergedAttention(AttentionFusion):
    """Early fusion: all tokens, each with a vector that says its modality, in one transformer (Li et al. 2019).

    VisualBERT, arXiv:1908.03557.

    Attributes:
      width: width D of tokens and features.
      layers: transformer layers.
      heads: attention heads; divides `width`.
      dropout: rate on residual branches and features.
    """

    layers: int = 2

    declares: ClassVar[Declaration] = Declaration(
        family="attention", paper="arXiv:1908.03557", symmetric=True, needs_tokens=True
    )

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, width]` with masks `[B, N_m]` into features `[B, width]`.

        The attention returned is the last layer's.

        Raises:
          UserError: `heads` does not divide `width`.
        """
        names = sorted(tokens)
        x, real, sizes = joined(typed(self, tokens, mask), mask, names)
        attention = {}
        for layer in range(self.layers):
            block = self.block(f"layer{layer}")
            x, weights = block(x, real, train=train)
            attention = cut(weights, names, sizes, names, sizes)
        return Fused(features=self.out(mean_max(self.normal(x), real), train=train), attention=attention)


class LateTransformer(AttentionFusion):
    """A transformer over a learned token and one token a modality, its masked mean with a vector of its own.

    The features are read at the learned token (Dosovitskiy et al. 2021, arXiv:2010.11929).

    Attributes:
      width: width D of tokens and features.
      layers: transformer layers.
      heads: attention heads; divides `width`.
      dropout: rate on residual branches and features.
    """

    layers: int = 2

    declares: ClassVar[Declaration] = Declaration(family="attention", paper="arXiv:2010.11929", symmetric=True)

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, width]` with masks `[B, N_m]` into features `[B, width]`.

        The attention returned is the last layer's, of the learned token to each modality's one token.

        Raises:
          UserError: `heads` does not divide `width`.
        """
        names = sorted(tokens)
        pooled, present = pool(tokens, mask)
        single = {m: x[:, None] for m, x in zip(names, pooled, strict=True)}
        token_mask = {m: present[:, i, None] for i, m in enumerate(names)}
        x, real, sizes = joined(typed(self, single, token_mask), token_mask, names)
        x, real = with_learned_token(self, x, real)  # [B, 1 + M, D]
        attention = {}
        for layer in range(self.layers):
            block = self.block(f"layer{layer}")
            x, weights = block(x, real, train=train)
            attention = cut(weights[:, :, :1, 1:], [LEARNED], [1], names, sizes)
        return Fused(features=self.out(self.normal(x[:, 0]), train=train), attention=attention)


class Bottleneck(AttentionFusion):
    """Multimodal bottleneck transformer: modalities exchange through a few tokens (Nagrani et al. 2021).

    arXiv:2107.00135. Up to layer `fuse_from` each modality attends to itself; from it on to itself and the bottleneck,
    and the next bottleneck is the mean of the present modalities' versions of it.

    Attributes:
      width: width D of tokens and features.
      layers: transformer layers of each modality.
      fuse_from: the first layer with the bottleneck, from 0.
      bottleneck: tokens in it.
      heads: attention heads; divides `width`.
      dropout: rate on residual branches and features.
    """

    layers: int = 2
    fuse_from: int = 0
    bottleneck: int = 4

    declares: ClassVar[Declaration] = Declaration(
        family="attention", paper="arXiv:2107.00135", symmetric=True, needs_tokens=True
    )

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, width]` with masks `[B, N_m]` into features `[B, width]`.

        The attention returned is the last layer's, of each modality to itself and with the bottleneck.

        Raises:
          UserError: `fuse_from` is none of the layers, or `heads` does not divide `width`.
        """
        if not 0 <= self.fuse_from < self.layers:
            raise UserError(f"bottleneck: fuse_from={self.fuse_from} must be from 0 to layers - 1 = {self.layers - 1}")
        names = sorted(tokens)
        rows = tokens[names[0]].shape[0]
        present = {m: mask[m].any(axis=1) for m in names}
        count = jnp.maximum(sum(rows.astype(jnp.float32) for rows in present.values()), 1)[:, None, None]
        shared = learned_tokens(self, "bottleneck", self.bottleneck, rows, self.width, self.dtype)
        attention = {}
        for layer in range(self.layers):
            versions, updated = [], {}
            for m in names:
                size = tokens[m].shape[1]
                block = self.block(f"layer{layer}_{m}")
                if layer < self.fuse_from:
                    updated[m], _ = block(tokens[m], mask[m], train=train)
                    continue
                real = jnp.concatenate([mask[m], jnp.broadcast_to(present[m][:, None], shared.shape[:2])], axis=1)
                x, weights = block(jnp.concatenate([tokens[m], shared], axis=1), real, train=train)
                updated[m], version = x[:, :size], x[:, size:]
                versions.append(version)  # zeros where the modality is absent
                sizes = [size, self.bottleneck]
                parts = cut(weights, [m, LEARNED], sizes, [m, LEARNED], sizes)
                attention |= {pair: part for pair, part in parts.items() if pair != (LEARNED, LEARNED)}
            tokens = updated
            if versions:
                shared = sum(versions) / count.astype(self.dtype)
        pooled = sum(
            nn.Dense(self.width, use_bias=False, dtype=self.dtype, name=f"out_{m}")(
                mean_max(self.normal(tokens[m], f"norm_{m}"), mask[m])
            )
            for m in names
        )
        pooled = pooled + nn.Dense(self.width, dtype=self.dtype, name="out")(shared.mean(axis=1))
        return Fused(features=Dropout(self.dropout)(nn.gelu(pooled), train=train), attention=attention)
