"""Transformers over all modalities: merged tokens, bottleneck tokens, or one token per modality."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.errors import UserError
from mmfusion.models.fusion.contract import Declaration, Fused, pool
from mmfusion.models.fusion.sequence import (
    LEARNED,
    AttentionFusion,
    add_type_embeddings,
    concatenate_tokens,
    learned_tokens,
    mean_max,
    split_weights,
    with_learned_token,
)
from mmfusion.models.layers import Dropout


class MergedAttention(AttentionFusion):
    """Early fusion: one transformer over all tokens with modality embeddings (VisualBERT, Li et al. 2019).

    arXiv:1908.03557.

    Attributes:
      width: width D of tokens and features.
      layers: number of transformer layers.
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

        The returned attention weights are the last layer's.

        Raises:
          UserError: `heads` does not divide `width`.
        """
        names = sorted(tokens)
        x, x_mask, sizes = concatenate_tokens(add_type_embeddings(self, tokens, mask), mask, names)
        attention = {}
        for layer in range(self.layers):
            block = self.block(f"layer{layer}")
            x, weights = block(x, x_mask, train=train)
            attention = split_weights(weights, names, sizes, names, sizes)
        return Fused(features=self.output(mean_max(self.layer_norm(x), x_mask), train=train), attention=attention)


class LateTransformer(AttentionFusion):
    """Transformer over a learned token and one token per modality, its masked mean plus a modality embedding.

    The features are taken from the learned token (Dosovitskiy et al. 2021, arXiv:2010.11929).

    Attributes:
      width: width D of tokens and features.
      layers: number of transformer layers.
      heads: attention heads; divides `width`.
      dropout: rate on residual branches and features.
    """

    layers: int = 2

    declares: ClassVar[Declaration] = Declaration(family="attention", paper="arXiv:2010.11929", symmetric=True)

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, width]` with masks `[B, N_m]` into features `[B, width]`.

        The returned attention weights are the last layer's, from the learned token to each modality's token.

        Raises:
          UserError: `heads` does not divide `width`.
        """
        names = sorted(tokens)
        pooled, present = pool(tokens, mask)
        modality_tokens = {m: x[:, None] for m, x in zip(names, pooled, strict=True)}
        token_mask = {m: present[:, i, None] for i, m in enumerate(names)}
        x, x_mask, sizes = concatenate_tokens(add_type_embeddings(self, modality_tokens, token_mask), token_mask, names)
        x, x_mask = with_learned_token(self, x, x_mask)  # [B, 1 + M, D]
        attention = {}
        for layer in range(self.layers):
            block = self.block(f"layer{layer}")
            x, weights = block(x, x_mask, train=train)
            attention = split_weights(weights[:, :, :1, 1:], [LEARNED], [1], names, sizes)
        return Fused(features=self.output(self.layer_norm(x[:, 0]), train=train), attention=attention)


class Bottleneck(AttentionFusion):
    """Multimodal bottleneck transformer: modalities interact through a few shared tokens (Nagrani et al. 2021).

    arXiv:2107.00135. Before layer `fuse_from` each modality attends to itself; from it on, to itself and the bottleneck
    tokens. The next bottleneck is the mean of the present modalities' updates of it.

    Attributes:
      width: width D of tokens and features.
      layers: number of transformer layers of each modality.
      fuse_from: index of the first layer with the bottleneck, from 0.
      bottleneck: number of bottleneck tokens.
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

        The returned attention weights are the last layer's, within each modality and between it and the bottleneck.

        Raises:
          UserError: `fuse_from` is not the index of a layer, or `heads` does not divide `width`.
        """
        if not 0 <= self.fuse_from < self.layers:
            raise UserError(
                f"must be from 0 to layers - 1 = {self.layers - 1}", path="bottleneck.fuse_from", value=self.fuse_from
            )
        names = sorted(tokens)
        batch_size = tokens[names[0]].shape[0]
        present = {m: mask[m].any(axis=1) for m in names}
        count = jnp.maximum(sum(x.astype(jnp.float32) for x in present.values()), 1)[:, None, None]
        bottleneck = learned_tokens(self, "bottleneck", self.bottleneck, batch_size, self.width, self.dtype)
        attention = {}
        for layer in range(self.layers):
            bottleneck_updates, updated = [], {}
            for m in names:
                num_tokens = tokens[m].shape[1]
                block = self.block(f"layer{layer}_{m}")
                if layer < self.fuse_from:
                    updated[m], _ = block(tokens[m], mask[m], train=train)
                    continue
                joint_mask = jnp.concatenate(
                    [mask[m], jnp.broadcast_to(present[m][:, None], bottleneck.shape[:2])], axis=1
                )
                x, weights = block(jnp.concatenate([tokens[m], bottleneck], axis=1), joint_mask, train=train)
                updated[m], bottleneck_update = x[:, :num_tokens], x[:, num_tokens:]
                bottleneck_updates.append(bottleneck_update)  # zeros where the modality is absent
                sizes = [num_tokens, self.bottleneck]
                weights_by_pair = split_weights(weights, [m, LEARNED], sizes, [m, LEARNED], sizes)
                attention |= {
                    pair: pair_weights for pair, pair_weights in weights_by_pair.items() if pair != (LEARNED, LEARNED)
                }
            tokens = updated
            if bottleneck_updates:
                bottleneck = sum(bottleneck_updates) / count.astype(self.dtype)
        pooled = sum(
            nn.Dense(self.width, use_bias=False, dtype=self.dtype, name=f"out_{m}")(
                mean_max(self.layer_norm(tokens[m], f"norm_{m}"), mask[m])
            )
            for m in names
        )
        pooled = pooled + nn.Dense(self.width, dtype=self.dtype, name="out")(bottleneck.mean(axis=1))
        return Fused(features=Dropout(self.dropout)(nn.gelu(pooled), train=train), attention=attention)
