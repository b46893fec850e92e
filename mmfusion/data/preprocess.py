"""Preprocessing on the device, inside jit: augmentation and normalisation."""

from collections.abc import Callable, Collection, Mapping
from types import MappingProxyType
from typing import Any

import jax
import jax.numpy as jnp

from mmfusion import rng
from mmfusion.data.batch import Batch
from mmfusion.data.modalities import modality_type


def make_preprocess(
    modalities: Mapping[str, Any],
    owner: Mapping[str, str] = MappingProxyType({}),
    computed: Collection[str] = (),
) -> Callable[[Batch, jax.Array | None], Batch]:
    """Returns `preprocess(batch, key)`, which augments if a key is given, and normalises.

    Args:
      modalities: per modality its options.
      owner: joined modality -> the modality that it is joined to, whose random keys augment both, so that they remain
        aligned.
      computed: modalities whose inputs are features `[B, 1 + V, ...]`, not augmented and of V augmented views, of which
        one is taken.
    """

    def preprocess(batch: Batch, key: jax.Array | None) -> Batch:
        inputs = dict(batch.inputs)
        for name, options in modalities.items():
            if name in computed:
                inputs[name] = _take_view(inputs[name], key if key is None else rng.fold(key, name), batch.id)
                continue
            kind = modality_type(options["kind"])
            if key is not None and kind.augment is not None:
                keys = rng.row_keys(rng.fold(key, owner.get(name, name)), batch.id)
                inputs[name] = kind.augment(inputs[name], keys, options["augment"])
            if kind.normalize is not None:
                inputs[name] = kind.normalize(inputs[name], options)
        return batch.replace(inputs=inputs)

    return preprocess


def _take_view(views: jax.Array, key: jax.Array | None, ids: jax.Array) -> jax.Array:
    """Returns one of the views `[B, 1 + V, ...]` of each row: the first, or with a key a random one of the others."""
    if key is None or views.shape[1] == 1:
        return views[:, 0]
    chosen = jax.vmap(lambda one: jax.random.randint(one, (), 1, views.shape[1]))(rng.row_keys(key, ids))  # [B]
    return views[jnp.arange(len(ids)), chosen]
