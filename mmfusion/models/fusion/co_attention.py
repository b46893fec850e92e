"""Co-attention between modalities: every modality's tokens query the tokens of all the others."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.errors import UserError
from mmfusion.models.fusion.contract import Declaration, Fused
from mmfusion.models.fusion.sequence import AttentionFusion, cut, joined, mean_max


class CoAttention(AttentionFusion):
    """Co-attention in the manner of Lu et al. 2019 (arXiv:1908.02265), for any number of modalities.

    In each layer every modality's tokens attend to the tokens of all other modalities (one alone attends to itself),
    pre-norm with residuals and an MLP; then each modality is pooled, and a dense layer takes the concatenation. The
    paper's self-attention after each such layer is left out: the encoders have mixed a modality's own tokens.

    Attributes:
      width: width D of tokens and features.
      layers: attention layers.
      heads: attention heads; divides `width`.
      dropout: rate on residual branches and features.
    """

    layers: int = 2

    declares: ClassVar[Declaration] = Declaration(family="attention", paper="arXiv:1908.02265", needs_tokens=True)

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, width]` with masks `[B, N_m]` into features `[B, width]`.

        The attention returned is the last layer's, of each (query, key) pair of modalities.

        Raises:
          UserError: `layers` is below 1 or `heads` does not divide `width`.
        """
        if self.layers < 1:
            raise UserError(f"co_attention: layers={self.layers} must be at least 1")
        names = sorted(tokens)
        others = {m: [k for k in names if k != m] or names for m in names}
        attention = {}
        for layer in range(self.layers):
            updated = {}
            for m in names:
                keys, keys_mask, sizes = joined(tokens, mask, others[m])  # [B, Nk, D], [B, Nk]
                block = self.block(f"layer{layer}_{m}")
                updated[m], weights = block(tokens[m], mask[m], keys, keys_mask, train=train)
                attention |= cut(weights, [m], [tokens[m].shape[1]], others[m], sizes)
            tokens = updated
        pooled = [mean_max(self.normal(tokens[m], f"norm_{m}"), mask[m]) for m in names]
        return Fused(features=self.out(jnp.concatenate(pooled, axis=-1), train=train), attention=attention)
