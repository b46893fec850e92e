"""Co-attention between modalities: every modality's tokens query the tokens of all the others."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.errors import UserError
from mmfusion.models.fusion.contract import Declaration, Fused
from mmfusion.models.fusion.sequence import cut, joined
from mmfusion.models.layers import Dropout, TransformerBlock, masked_max, masked_mean

POOLS = {"mean": (masked_mean,), "max": (masked_max,), "mean_max": (masked_mean, masked_max)}


class CoAttention(nn.Module):
    """Co-attention in the manner of Lu et al. 2019 (arXiv:1908.02265), for any number of modalities.

    In each layer every modality's tokens attend to the tokens of all other modalities (one alone attends to itself),
    pre-norm with residuals and an MLP; then each modality is pooled, and a dense layer takes the concatenation.

    Attributes:
      width: width D of tokens and features.
      layers: attention layers.
      heads: attention heads; they divide the width.
      mlp_ratio: hidden width of the MLPs, in widths.
      dropout: rate on residual branches and features.
      pool: `mean`, `max` or `mean_max` (both, concatenated) over each modality's real tokens.
    """

    width: int
    layers: int = 2
    heads: int = 4
    mlp_ratio: float = 2.0
    dropout: float = 0.0
    pool: str = "mean_max"
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(family="attention", paper="arXiv:1908.02265", needs_tokens=True)

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, width]` with masks `[B, N_m]` into features `[B, width]`.

        The attention returned is the last layer's, of each (query, key) pair of modalities.

        Raises:
          UserError: `pool` is unknown, `layers` is below 1 or `heads` does not divide `width`.
        """
        if self.pool not in POOLS:
            raise UserError(f"co_attention: pool={self.pool!r} is unknown; choose {', '.join(POOLS)}")
        if self.layers < 1:
            raise UserError(f"co_attention: layers={self.layers} must be at least 1")
        names = sorted(tokens)
        others = {m: [k for k in names if k != m] or names for m in names}
        attention = {}
        for layer in range(self.layers):
            updated = {}
            for m in names:
                keys, keys_mask, sizes = joined(tokens, mask, others[m])  # [B, Nk, D], [B, Nk]
                block = TransformerBlock(
                    self.heads, self.width, self.mlp_ratio, self.dropout, self.dtype, name=f"{m}_{layer}"
                )
                updated[m], weights = block(tokens[m], mask[m], keys, keys_mask, train=train)
                attention |= cut(weights, [m], [tokens[m].shape[1]], others[m], sizes)
            tokens = updated
        pooled = []
        for m in names:
            normal = nn.LayerNorm(dtype=self.dtype, name=f"norm_{m}")(tokens[m])
            pooled += [reduce(normal, mask[m]) for reduce in POOLS[self.pool]]
        features = nn.gelu(nn.Dense(self.width, dtype=self.dtype, name="out")(jnp.concatenate(pooled, axis=-1)))
        return Fused(features=Dropout(self.dropout)(features, train=train), attention=attention)
