"""Bilinear attention networks: one softmax over all pairs of two modalities' tokens."""

import itertools
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.errors import UserError
from mmfusion.models.fusion.contract import Declaration, Fused, pool, project_each
from mmfusion.models.layers import masked_softmax, zero_masked


class BilinearAttention(nn.Module):
    """BAN (Kim et al. 2018, arXiv:1805.07932), summed over the pairs of modalities.

    In each glimpse a map A over all pairs of tokens, softmax of p · (ReLU(U a_i) ⊙ ReLU(V b_j)), weighs
    Σ_ij A_ij (U' a_i ⊙ V' b_j), with values that the glimpses share. The glimpses are concatenated, projected and
    added to Σ_m W_m x_m of the masked means, where the paper chains them over the question's tokens; a pair of which
    one is absent adds nothing. A modality alone is paired with itself.

    Attributes:
      width: width D of tokens and features.
      glimpses: maps of each pair.
    """

    width: int
    glimpses: int = 2
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(family="attention", paper="arXiv:1805.07932", needs_tokens=True)

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, width]` with masks `[B, N_m]` into features `[B, width]`.

        The attention returned is of each pair, a glimpse a head, and sums to 1 over both kinds of tokens.

        Raises:
          UserError: `glimpses` is below 1.
        """
        del train
        if self.glimpses < 1:
            raise UserError(f"bilinear_attention: glimpses={self.glimpses} must be at least 1")
        names = sorted(tokens)
        pooled, present = pool(tokens, mask)
        features, attention = jnp.zeros((), self.dtype), {}
        for i, linear in enumerate(project_each(names, pooled, self.width, self.dtype)):
            features = features + zero_masked(linear, present[:, i])

        def dense(x: jax.Array, name: str) -> jax.Array:
            return nn.Dense(self.width, dtype=self.dtype, name=name)(x)  # [B, N, D]

        for a, b in list(itertools.combinations(names, 2)) or [(names[0], names[0])]:
            left, right, pair = zero_masked(tokens[a], mask[a]), zero_masked(tokens[b], mask[b]), f"{a}_{b}"
            real = mask[a][:, :, None] & mask[b][:, None, :]  # [B, Na, Nb]
            some = real.any(axis=(1, 2))
            score = self.param(f"score_{pair}", nn.initializers.normal(self.width**-0.5), (self.glimpses, self.width))
            keys = (nn.relu(dense(left, f"query_left_{pair}")), nn.relu(dense(right, f"query_right_{pair}")))
            scores = jnp.einsum("bid,bjd,gd->bgij", *keys, score.astype(self.dtype))
            flat = masked_softmax(scores.reshape(*scores.shape[:2], -1), real.reshape(real.shape[0], 1, -1))
            attention[a, b] = flat.reshape(scores.shape)  # [B, g, Na, Nb]
            weights = attention[a, b].astype(self.dtype)
            values = (dense(left, f"value_left_{pair}"), dense(right, f"value_right_{pair}"))
            glimpses = jnp.einsum("bgij,bid,bjd->bgd", weights, *values)
            joint = nn.DenseGeneral(self.width, axis=(1, 2), dtype=self.dtype, name=f"out_{pair}")(glimpses)
            features = features + zero_masked(joint, some)
        return Fused(features=nn.gelu(features), attention=attention)
