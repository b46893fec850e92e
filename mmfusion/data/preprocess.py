"""Preprocessing on the device, inside jit: augmentation and normalisation."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax

from mmfusion import rng
from mmfusion.data.batch import Batch
from mmfusion.data.modalities import modality_type


def make_preprocess(
    modalities: Mapping[str, Any], owner: Mapping[str, str] = MappingProxyType({})
) -> Callable[[Batch, jax.Array | None], Batch]:
    """Returns `preprocess(batch, key)`, which augments if a key is given, and normalises.

    Args:
      modalities: per modality its options.
      owner: joined modality -> the modality that it is joined to, whose random keys augment both, so that they remain
        aligned.
    """

    def preprocess(batch: Batch, key: jax.Array | None) -> Batch:
        inputs = dict(batch.inputs)
        for name, options in modalities.items():
            kind = modality_type(options["kind"])
            if key is not None and kind.augment is not None:
                keys = rng.row_keys(rng.fold(key, owner.get(name, name)), batch.id)
                inputs[name] = kind.augment(inputs[name], keys, options["augment"])
            if kind.normalize is not None:
                inputs[name] = kind.normalize(inputs[name], options)
        return batch.replace(inputs=inputs)

    return preprocess
