"""Cross-attention, where one modality's tokens query the others', and MulT, where each queries each."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.models.fusion.conditioning import choose_main
from mmfusion.models.fusion.contract import Declaration, Fused
from mmfusion.models.fusion.sequence import AttentionFusion, cut, joined, mean_max, with_learned_token
from mmfusion.models.layers import zero_masked


class CrossAttention(AttentionFusion):
    """One modality queries all the others, as a decoder its encoder (Vaswani et al. 2017, arXiv:1706.03762).

    A learned token stands beside the querying modality's, so that the others are heard where it is absent; a modality
    alone queries itself.

    Attributes:
      width: width D of tokens and features.
      main: the modality that queries; empty: the first in sorted order.
      layers: attention layers.
      heads: attention heads; divides `width`.
      dropout: rate on residual branches and features.
    """

    main: str = ""
    layers: int = 2

    declares: ClassVar[Declaration] = Declaration(family="attention", paper="arXiv:1706.03762", needs_tokens=True)

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, width]` with masks `[B, N_m]` into features `[B, width]`.

        The attention returned is the last layer's, of the modality's own tokens.

        Raises:
          UserError: `main` is none of the modalities, or `heads` does not divide `width`.
        """
        main, others = choose_main("cross_attention", self.main, tokens)
        context, context_mask, sizes = joined(tokens, mask, others or [main])
        x, real = with_learned_token(self, tokens[main], mask[main])
        attention = {}
        for layer in range(self.layers):
            block = self.block(f"layer{layer}")
            x, weights = block(x, real, context, context_mask, train=train)
            attention = cut(weights[:, :, 1:], [main], [x.shape[1] - 1], others or [main], sizes)
        return Fused(features=self.out(mean_max(self.normal(x), real), train=train), attention=attention)


class MulT(AttentionFusion):
    """Multimodal transformer: a crossmodal one for every ordered pair, then one a modality (Tsai et al. 2019).

    arXiv:1906.00295. What modality m found in each other one is concatenated and projected, attends to itself, and is
    pooled (the paper takes the last position). A modality alone queries itself.

    Attributes:
      width: width D of tokens and features.
      layers: layers of each crossmodal transformer.
      heads: attention heads; divides `width`.
      dropout: rate on residual branches and features.
    """

    layers: int = 1

    declares: ClassVar[Declaration] = Declaration(family="attention", paper="arXiv:1906.00295", needs_tokens=True)

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, width]` with masks `[B, N_m]` into features `[B, width]`.

        The attention returned is the last crossmodal layer's, of each ordered pair.

        Raises:
          UserError: `heads` does not divide `width`.
        """
        names = sorted(tokens)
        attention, pooled = {}, []
        for m in names:
            found = []
            for k in [k for k in names if k != m] or names:
                x = zero_masked(tokens[m], mask[m])
                for layer in range(self.layers):
                    block = self.block(f"cross{layer}_{k}_to_{m}")
                    read, attention[m, k] = block(x, mask[m], tokens[k], mask[k], train=train)
                    x = jnp.where(mask[k].any(axis=1)[:, None, None], read, x)  # what is absent is not read
                found.append(x)
            x = nn.Dense(self.width, dtype=self.dtype, name=f"join_{m}")(jnp.concatenate(found, axis=-1))
            own = self.block(f"self_{m}")
            x, _ = own(zero_masked(x, mask[m]), mask[m], train=train)
            pooled.append(mean_max(self.normal(x, f"norm_{m}"), mask[m]))
        return Fused(features=self.out(jnp.concatenate(pooled, axis=-1), train=train), attention=attention)
