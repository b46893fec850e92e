"""Modality dropout: training rows lose modalities at random (Neverova et al. 2016, arXiv:1501.00102).

B batch · M modalities
"""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp

from mmfusion import rng
from mmfusion.data.batch import Batch
from mmfusion.errors import UserError
from mmfusion.objectives.base import Objective

if TYPE_CHECKING:
    from mmfusion.config import RunConfig


@dataclasses.dataclass(frozen=True)
class ModalityDropout(Objective):
    """Drops each modality of a row with probability `rate`, by example id and step; one modality always remains."""

    rate: float = 0.3

    @classmethod
    def validate(cls, path: str, options: Mapping[str, Any], config: "RunConfig") -> None:
        if not 0 <= options["rate"] < 1:
            raise UserError("must be at least 0 and below 1", path=f"{path}.rate", value=options["rate"])

    def transform_batch(self, batch: Batch, seed: jax.Array, step: jax.Array) -> Batch:
        keys = rng.row_keys(rng.key(seed, "modality_dropout", step), batch.id)
        names = sorted(batch.present)
        present = jnp.stack([batch.present[m] for m in names], axis=1)  # [B, M]
        draws = jax.vmap(lambda key: jax.random.uniform(key, (len(names),)))(keys)
        draws = jnp.where(present, draws, -1.0)
        keep = present & ((draws >= self.rate) | (draws == draws.max(axis=1, keepdims=True)))
        return batch.replace(present={m: keep[:, i] for i, m in enumerate(names)})
