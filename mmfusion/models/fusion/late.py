"""Decision-level strategies: each modality has its own logits, and those are fused."""

from typing import ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.models.fusion.contract import Declaration
from mmfusion.models.layers import zero_masked


class LateMean(nn.Module):
    """The mean of the present modalities' logits (a geometric mean of their probabilities); zeros where none is."""

    declares: ClassVar[Declaration] = Declaration(
        family="decision", level="decision", additive=True, synergy=False, symmetric=True
    )

    @nn.compact
    def __call__(self, logits: dict[str, jax.Array], present: dict[str, jax.Array], *, train: bool) -> jax.Array:
        """Fuses logits `[B, C]` of the modalities where `present [B]` is True into logits `[B, C]`."""
        del train
        names = sorted(logits)
        count = sum(present[m].astype(jnp.float32) for m in names)  # [B]
        total = sum(zero_masked(logits[m], present[m]) for m in names)  # [B, C]
        return total / jnp.maximum(count, 1.0)[:, None]
