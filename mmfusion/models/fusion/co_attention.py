"""Co-attention: the tokens of each modality attend to the tokens of all other modalities."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.errors import UserError
from mmfusion.models.fusion.contract import Declaration, Fused
from mmfusion.models.fusion.sequence import AttentionFusion, concatenate_tokens, mean_max, split_weights


class CoAttention(AttentionFusion):
    """Co-attention between any number of modalities, after Lu et al. 2019 (arXiv:1908.02265).

    In each layer the tokens of each modality attend to the tokens of all other modalities (a single modality attends to
    itself), in a pre-norm block with residual connections and an MLP. The pooled modalities are then concatenated and
    projected by a dense layer. The paper's self-attention after each layer is omitted, since encoders mix the tokens.

    Attributes:
      width: width D of tokens and features.
      layers: number of attention layers.
      heads: attention heads; divides `width`.
      dropout: rate on residual branches and features.
    """

    layers: int = 2

    declares: ClassVar[Declaration] = Declaration(family="attention", paper="arXiv:1908.02265", needs_tokens=True)

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, width]` with masks `[B, N_m]` into features `[B, width]`.

        The returned attention weights are the last layer's, by (query, key) pair of modalities.

        Raises:
          UserError: `layers` is below 1 or `heads` does not divide `width`.
        """
        if self.layers < 1:
            raise UserError("must be at least 1", path="co_attention.layers", value=self.layers)
        names = sorted(tokens)
        others = {m: [other for other in names if other != m] or names for m in names}
        attention = {}
        for layer in range(self.layers):
            updated = {}
            for m in names:
                keys, keys_mask, sizes = concatenate_tokens(tokens, mask, others[m])  # [B, Nk, D], [B, Nk]
                block = self.block(f"layer{layer}_{m}")
                updated[m], weights = block(tokens[m], mask[m], keys, keys_mask, train=train)
                attention |= split_weights(weights, [m], [tokens[m].shape[1]], others[m], sizes)
            tokens = updated
        pooled = [mean_max(self.layer_norm(tokens[m], f"norm_{m}"), mask[m]) for m in names]
        return Fused(features=self.output(jnp.concatenate(pooled, axis=-1), train=train), attention=attention)
