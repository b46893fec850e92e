"""Gated multimodal units (Arevalo et al. 2017, arXiv:1702.01992)."""

from typing import Any, ClassVar, cast

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.models.fusion.contract import Declaration, Fused, pool


class GMU(nn.Module):
    """h = Σ_m z_m ⊙ tanh(W_m x_m) with gates z_m = σ(V_m [x_1; ...; x_M]), without biases or gate normalisation.

    For two modalities the gates are tied as in the paper: z for the first one in sorted order, 1 - z for the other.
    Otherwise each modality has its own gate. An absent modality is x_m = 0 and so contributes tanh(0) = 0.

    Attributes:
      width: width D of the features.
    """

    width: int
    dtype: Any = jnp.float32

    declares: ClassVar[Declaration] = Declaration(family="weighted", paper="arXiv:1702.01992")

    @nn.compact
    def __call__(self, tokens: dict[str, jax.Array], mask: dict[str, jax.Array], *, train: bool) -> Fused:
        """Fuses tokens `[B, N_m, D]` with masks `[B, N_m]` into features `[B, width]`."""
        del train
        names = sorted(tokens)
        pooled, _ = pool(tokens, mask)

        def linear(x: jax.Array, name: str) -> jax.Array:
            return nn.Dense(self.width, use_bias=False, dtype=self.dtype, name=name)(x)

        hidden = [nn.tanh(linear(x, f"hidden_{m}")) for m, x in zip(names, pooled, strict=True)]
        concatenated = jnp.concatenate(pooled, axis=-1)  # [B, M · D]
        if len(names) == 2:
            gate = nn.sigmoid(linear(concatenated, "gate"))
            gates = [gate, 1.0 - gate]
        else:
            gates = [nn.sigmoid(linear(concatenated, f"gate_{m}")) for m in names]
        features = sum(gate * h for gate, h in zip(gates, hidden, strict=True))
        return Fused(features=cast(jax.Array, features), attention={})
