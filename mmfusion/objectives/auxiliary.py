"""Auxiliary objectives: modules that read the encoded modalities and return a loss per row.

B batch · D width
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import flax.linen as nn
import jax
import jax.numpy as jnp

from mmfusion.data.batch import Batch
from mmfusion.models.model import Encoded, FusionModel
from mmfusion.objectives.base import Context, Objective, Term


class Auxiliary(nn.Module, Objective):
    """A module that is called with an `Encoded` and returns a loss per row `[B]`; the model holds its parameters.

    Attributes:
      width: of the pooled tokens.
      weight: coefficient of the loss.
    """

    width: int
    weight: float = 1.0
    # Rows with fewer modalities do not count.
    min_present: ClassVar[int] = 1

    def __call__(self, encoded: Encoded, *, train: bool) -> jax.Array:
        """Returns the loss of each row `[B]` float32, 0 where the row does not count."""
        raise NotImplementedError

    def terms(self, name: str, model: FusionModel, tasks: Mapping[str, Any]) -> Sequence[Term]:
        metric = f"objective/{name}"
        return [AuxiliaryLoss(name=metric, weight=self.weight, metric=metric, auxiliary=name, model=model)]


@dataclasses.dataclass(frozen=True, kw_only=True)
class AuxiliaryLoss(Term):
    """The mean loss of an auxiliary module over the rows that count."""

    auxiliary: str
    model: FusionModel

    def count(self, batch: Batch) -> jax.Array:
        return jnp.sum(self._row_weight(batch))

    def total(self, context: Context) -> jax.Array:
        return jnp.sum(self._row_weight(context.batch) * context.outputs.auxiliary[self.auxiliary])

    def _row_weight(self, batch: Batch) -> jax.Array:
        min_present = self.model.auxiliaries[self.auxiliary].min_present
        return batch.weight * has_modalities(self.model.presence(batch), min_present)


def has_modalities(present: Mapping[str, jax.Array], minimum: int) -> jax.Array:
    """Returns which rows `[B]` have at least `minimum` modalities, float32."""
    return (jnp.stack(list(present.values())).sum(axis=0) >= minimum).astype(jnp.float32)


def masked_row_mean(values: Mapping[str, jax.Array], mask: Mapping[str, jax.Array]) -> jax.Array:
    """Returns each row's mean `[B]` of the values `[B]` whose mask `[B]` is True; 0 where none is."""
    kept = jnp.stack([jnp.where(mask[name], value, 0.0) for name, value in values.items()])
    count = jnp.stack([mask[name] for name in values]).sum(axis=0)
    return kept.sum(axis=0) / jnp.maximum(count, 1)
