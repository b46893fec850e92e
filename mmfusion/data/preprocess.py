"""What happens to a batch on the device, inside jit, before a model sees it: augmentation, and pixels made numbers."""

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any

import jax

from mmfusion import rng
from mmfusion.data import image, text
from mmfusion.data.batch import Batch


def make_preprocess(
    modalities: Mapping[str, Any], owner: Mapping[str, str] = MappingProxyType({})
) -> Callable[[Batch, jax.Array | None], Batch]:
    """Returns `preprocess(batch, key)`: pictures and frames to float32.

    Where a key is given, pictures and texts are augmented, one draw an example id; that of `owner[m]` for what is read
    beside another, so that what is joined stays in place.
    """

    def preprocess(batch: Batch, key: jax.Array | None) -> Batch:
        inputs = dict(batch.inputs)
        for name, options in modalities.items():
            if key is not None and options["kind"] in AUGMENT:
                keys = rng.row_keys(rng.fold(key, owner.get(name, name)), batch.id)
                inputs[name] = AUGMENT[options["kind"]](inputs[name], keys, options["augment"])
            if options["kind"] in ("image", "video"):  # [B, H, W, C] or [B, T, H, W, C]
                inputs[name] = image.normalize(inputs[name], options["mean"], options["std"])
        return batch.replace(inputs=inputs)

    return preprocess


AUGMENT = {"image": image.augment, "text": text.augment}
