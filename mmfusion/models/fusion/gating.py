"""Input-dependent weights: attention over modalities, and squeeze-and-excitation."""

from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.models.fusion.additive import project
from mmfusion.models.fusion.contract import Declaration, Fused, pool
from mmfusion.models.fusion.sequence import LEARNED
from mmfusion.models.layers import masked_softmax, zero_masked


class AttentionPool(nn.Module):
    """Σ_m a_m h_m with h_m = W_m x_m + b_m and a the softmax over the present modalities of u · tanh(V h_m).

    The score of a modality depends on that modality alone, so XOR cannot be learned: with positive weights e^s, the
    sign of e^s(a) h(a) + e^s(b) h(b) is that of a sum of functions of one modality each. Attention over annotations
    after Bahdanau et al. 2015 (arXiv:1409.0473), with one annotation per modality.

    Attributes:
      width: width D of the features.
    """

    width: int
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(
        family="weighted", paper="arXiv:1409.0473", synergy=False, symmetric=True
    )

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, D]` with masks `[B, N_m]` into features `[B, width]`.

        The returned attention weights are a, from the learned u to each modality.
        """
        del train
        pooled, present = pool(tokens, mask)
        projected = zero_masked(project(tokens, pooled, self.width, self.dtype), present)  # [B, M, D]
        if len(tokens) == 1:  # a single weight is always 1
            return _weighted_sum(present.astype(jnp.float32), projected, tokens)
        hidden = nn.tanh(nn.Dense(self.width, dtype=self.dtype, name="hidden")(projected))
        scores = nn.Dense(1, use_bias=False, dtype=self.dtype, name="score")(hidden)[..., 0]  # [B, M]
        return _weighted_sum(masked_softmax(scores, present), projected, tokens)


def _weighted_sum(weights: jax.Array, projected: jax.Array, tokens: dict[str, jax.Array]) -> Fused:
    features = jnp.einsum("bm,bmd->bd", weights.astype(projected.dtype), projected)
    attention = {(LEARNED, m): weights[:, i, None, None, None] for i, m in enumerate(sorted(tokens))}  # [B, 1, 1, 1]
    return Fused(features=features, attention=attention)


class SqueezeExcite(nn.Module):
    """Multimodal transfer module: gates on each modality from all modalities (Joze et al. 2020, arXiv:1911.08670).

    z = ReLU(Σ_m S_m x_m + c), gates 2 σ(E_m z), features Σ_m W_m (gate_m ⊙ x_m). An absent modality has x_m = 0.

    Attributes:
      width: width D of the features.
      ratio: ratio of the modalities' total width to the width of z, which is at least 4.
    """

    width: int
    ratio: int = 4
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(family="weighted", paper="arXiv:1911.08670", symmetric=True)

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, D]` with masks `[B, N_m]` into features `[B, width]`."""
        del train
        names = sorted(tokens)
        pooled, present = pool(tokens, mask)
        size = max(len(names) * self.width // self.ratio, 4)

        def dense(width: int, x: jax.Array, name: str, bias: bool = False) -> jax.Array:
            return nn.Dense(width, use_bias=bias, dtype=self.dtype, name=name)(x)

        squeezed = sum(dense(size, x, f"squeeze_{m}") for m, x in zip(names, pooled, strict=True))
        squeezed = nn.relu(squeezed + self.param("squeeze_bias", nn.initializers.zeros, (size,)).astype(self.dtype))
        gated = [
            2 * nn.sigmoid(dense(self.width, squeezed, f"excite_{m}", bias=True)) * x
            for m, x in zip(names, pooled, strict=True)
        ]
        projected = project(tokens, gated, self.width, self.dtype)  # [B, M, D]
        return Fused(features=zero_masked(projected, present).sum(axis=1), attention={})
