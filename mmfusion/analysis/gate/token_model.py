"""A model whose inputs are tokens: the strategy that is examined, between encoders that change nothing and a head.

B batch · M modalities · N tokens · D width
"""

from typing import Any

import flax.core
import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.analysis.gate.synthetic_tasks import MODALITIES
from mmfusion.data.batch import Batch
from mmfusion.models.model import FusionModel

TASK, CLASSES = "label", 2

Tokens = dict[str, Any]  # modality -> array [B, N, D] of NumPy or JAX
Masks = dict[str, Any]  # modality -> array [B, N] of NumPy or JAX


class Given(nn.Module):
    """An identity encoder, whose inputs are tokens and mask."""

    def __call__(self, x: jax.Array, mask: jax.Array, *, train: bool) -> tuple[jax.Array, jax.Array]:
        """Returns its inputs `[B, N, D]` and `[B, N]`."""
        del train
        return x, mask


def model_of(strategy: nn.Module, modalities: int) -> FusionModel:
    """Returns the model of a strategy over the first M modalities, whose inputs are tokens."""
    encoders = flax.core.FrozenDict({m: Given() for m in MODALITIES[:modalities]})
    return FusionModel(encoders=encoders, fusion=strategy, tasks=((TASK, CLASSES),))


def as_batch(tokens: Tokens, mask: Masks, label: jax.Array) -> Batch:
    """Returns a batch whose inputs are tokens `[B, N, D]` with masks `[B, N]` and labels `[B]`."""
    rows = label.shape[0]
    return Batch(
        inputs=tokens,
        mask=mask,
        present={m: real.any(axis=1) for m, real in mask.items()},
        targets={TASK: label},
        weight=jnp.ones(rows),
        id=jnp.arange(rows),
    )
