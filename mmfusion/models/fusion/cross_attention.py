"""Cross-attention from one modality to the others, and MulT, between every ordered pair of modalities."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.errors import UserError
from mmfusion.models.fusion.conditioning import choose_main
from mmfusion.models.fusion.contract import Declaration, Fused
from mmfusion.models.fusion.sequence import (
    AttentionFusion,
    concatenate_tokens,
    mean_max,
    split_weights,
    with_learned_token,
)
from mmfusion.models.layers import zero_masked


class CrossAttention(AttentionFusion):
    """Cross-attention from one modality to all others (Vaswani et al. 2017, arXiv:1706.03762).

    A learned token is prepended to the querying modality's, so that the other modalities contribute when it is absent.
    A single modality attends to itself.

    Attributes:
      width: width D of tokens and features.
      main: the modality of the queries; empty: the first in sorted order.
      layers: number of attention layers.
      heads: attention heads; divides `width`.
      dropout: rate on residual branches and features.
    """

    main: str = ""
    layers: int = 2

    declares: ClassVar[Declaration] = Declaration(family="attention", paper="arXiv:1706.03762", needs_tokens=True)

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, width]` with masks `[B, N_m]` into features `[B, width]`.

        The returned attention weights are the last layer's, from the main modality's tokens.

        Raises:
          UserError: `main` is not a modality of the model, or `heads` does not divide `width`.
        """
        main, others = choose_main("cross_attention", self.main, tokens)
        context, context_mask, sizes = concatenate_tokens(tokens, mask, others or [main])
        x, x_mask = with_learned_token(self, tokens[main], mask[main])
        attention = {}
        for layer in range(self.layers):
            block = self.block(f"layer{layer}")
            x, weights = block(x, x_mask, context, context_mask, train=train)
            attention = split_weights(weights[:, :, 1:], [main], [x.shape[1] - 1], others or [main], sizes)
        return Fused(features=self.output(mean_max(self.layer_norm(x), x_mask), train=train), attention=attention)


class MulT(AttentionFusion):
    """MulT: crossmodal transformers for all ordered pairs, then one per modality (Tsai et al. 2019, arXiv:1906.00295).

    For each modality, the outputs of its crossmodal transformers are concatenated and projected (the paper keeps the
    larger width), passed through a self-attention transformer, and pooled (the paper takes the last position). The
    paper's convolution of each modality to a common width is the encoders'. A single modality attends to itself.

    Attributes:
      width: width D of tokens and features.
      layers: number of layers of each crossmodal transformer; the paper's default is 4.
      memory: number of layers of each modality's self-attention transformer; the authors' code has at least 3.
      heads: attention heads; divides `width`.
      dropout: rate on residual branches and features.
    """

    layers: int = 4
    memory: int = 3

    declares: ClassVar[Declaration] = Declaration(family="attention", paper="arXiv:1906.00295", needs_tokens=True)

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, width]` with masks `[B, N_m]` into features `[B, width]`.

        The returned attention weights are the last crossmodal layer's, by ordered pair.

        Raises:
          UserError: `layers` or `memory` is below 1, or `heads` does not divide `width`.
        """
        for option in ("layers", "memory"):
            if (value := getattr(self, option)) < 1:
                raise UserError("must be at least 1", path=f"mult.{option}", value=value)
        names = sorted(tokens)
        attention, pooled = {}, []
        for m in names:
            crossmodal = []
            for source in [source for source in names if source != m] or names:
                x = zero_masked(tokens[m], mask[m])
                for layer in range(self.layers):
                    block = self.block(f"cross{layer}_{source}_to_{m}")
                    attended, attention[m, source] = block(x, mask[m], tokens[source], mask[source], train=train)
                    source_present = mask[source].any(axis=1)[:, None, None]
                    x = jnp.where(source_present, attended, x)  # absent keys do not update the queries
                crossmodal.append(x)
            x = nn.Dense(self.width, dtype=self.dtype, name=f"join_{m}")(jnp.concatenate(crossmodal, axis=-1))
            x = zero_masked(x, mask[m])
            for layer in range(self.memory):
                x, _ = self.block(f"self{layer}_{m}")(x, mask[m], train=train)
            pooled.append(mean_max(self.layer_norm(x, f"norm_{m}"), mask[m]))
        return Fused(features=self.output(jnp.concatenate(pooled, axis=-1), train=train), attention=attention)
