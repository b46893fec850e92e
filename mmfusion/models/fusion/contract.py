"""What every fusion strategy returns and how it pools its tokens.

A feature-level strategy has `level = "feature"` and is called with `(tokens: dict[m, [B, N_m, D]],
mask: dict[m, [B, N_m]], *, train) -> Fused`. A decision-level one has `level = "decision"` and is called with
`(logits: dict[m, [B, C]], present: dict[m, [B]], *, train) -> [B, C]`. Modalities are taken in sorted order, as jit
sorts dictionaries; one that is absent (all its positions masked) contributes exactly nothing.

B batch · M modalities · N tokens · D width
"""

import flax.struct
import jax
import jax.numpy as jnp

from mmfusion.models.layers import masked_mean


@flax.struct.dataclass
class Fused:
    """The result of a feature-level fusion.

    Attributes:
      features: `[B, D]`.
      attention: weights `[B, heads, N_query, N_key]` by (query modality, key modality); empty without attention.
    """

    features: jax.Array
    attention: dict[tuple[str, str], jax.Array]


def pool(tokens: dict[str, jax.Array], mask: dict[str, jax.Array]) -> tuple[list[jax.Array], jax.Array]:
    """Returns the masked mean `[B, D]` of each modality, in sorted order, and which are present `[B, M]`."""
    names = sorted(tokens)
    present = jnp.stack([mask[m].any(axis=1) for m in names], axis=1)  # [B, M]
    return [masked_mean(tokens[m], mask[m]) for m in names], present
