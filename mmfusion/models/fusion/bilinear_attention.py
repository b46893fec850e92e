"""Bilinear attention networks: a softmax over all pairs of tokens of two modalities."""

import itertools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.errors import UserError
from mmfusion.models.fusion.contract import Declaration, Fused, pool, project_each
from mmfusion.models.layers import masked_softmax, zero_masked


class BilinearAttention(nn.Module):
    """Bilinear attention network, summed over pairs of modalities (BAN, Kim et al. 2018, arXiv:1805.07932).

    Each glimpse has an attention map A over all token pairs, the softmax of p · (ReLU(U a_i) ⊙ ReLU(V b_j)), and output
    Σ_ij A_ij (U' a_i ⊙ V' b_j); glimpses share the values. The glimpses are concatenated, projected and added to
    Σ_m W_m x_m of the masked means, where the paper chains them over the question's tokens. A pair with an absent
    modality contributes nothing. A single modality is paired with itself.

    Attributes:
      width: width D of tokens and features.
      glimpses: number of attention maps per pair.
    """

    width: int
    glimpses: int = 2
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(family="attention", paper="arXiv:1805.07932", needs_tokens=True)

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, width]` with masks `[B, N_m]` into features `[B, width]`.

        The returned attention weights of each pair have one head per glimpse and sum to 1 over all token pairs.

        Raises:
          UserError: `glimpses` is below 1.
        """
        del train
        if self.glimpses < 1:
            raise UserError("must be at least 1", path="bilinear_attention.glimpses", value=self.glimpses)
        names = sorted(tokens)
        pooled, present = pool(tokens, mask)
        features, attention = jnp.zeros((), self.dtype), {}
        for i, projected in enumerate(project_each(names, pooled, self.width, self.dtype)):
            features = features + zero_masked(projected, present[:, i])

        def dense(x: jax.Array, name: str) -> jax.Array:
            return nn.Dense(self.width, dtype=self.dtype, name=name)(x)  # [B, N, D]

        for a, b in list(itertools.combinations(names, 2)) or [(names[0], names[0])]:
            left, right, pair = zero_masked(tokens[a], mask[a]), zero_masked(tokens[b], mask[b]), f"{a}_{b}"
            pair_mask = mask[a][:, :, None] & mask[b][:, None, :]  # [B, Na, Nb]
            pair_present = pair_mask.any(axis=(1, 2))
            score = self.param(f"score_{pair}", nn.initializers.normal(self.width**-0.5), (self.glimpses, self.width))
            queries_and_keys = (
                nn.relu(dense(left, f"query_left_{pair}")),
                nn.relu(dense(right, f"query_right_{pair}")),
            )
            scores = jnp.einsum("bid,bjd,gd->bgij", *queries_and_keys, score.astype(self.dtype))
            flat_weights = masked_softmax(
                scores.reshape(*scores.shape[:2], -1), pair_mask.reshape(pair_mask.shape[0], 1, -1)
            )
            attention[a, b] = flat_weights.reshape(scores.shape)  # [B, g, Na, Nb]
            weights = attention[a, b].astype(self.dtype)
            values = (dense(left, f"value_left_{pair}"), dense(right, f"value_right_{pair}"))
            glimpses = jnp.einsum("bgij,bid,bjd->bgd", weights, *values)
            joint = nn.DenseGeneral(self.width, axis=(1, 2), dtype=self.dtype, name=f"out_{pair}")(glimpses)
            features = features + zero_masked(joint, pair_present)
        return Fused(features=nn.gelu(features), attention=attention)
