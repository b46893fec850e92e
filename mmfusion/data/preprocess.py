"""What happens to a batch on the device, inside jit, before a model sees it: pictures and frames made numbers."""

from collections.abc import Callable, Mapping
from typing import Any

import jax

from mmfusion import rng
from mmfusion.data import image
from mmfusion.data.batch import Batch


def make_preprocess(modalities: Mapping[str, Any]) -> Callable[[Batch, jax.Array | None], Batch]:
    """Returns `preprocess(batch, key)`: pictures and frames to float32.

    Where a key is given, pictures are augmented, one draw an example id.
    """
    images = {name: options for name, options in modalities.items() if options["kind"] in ("image", "video")}

    def preprocess(batch: Batch, key: jax.Array | None) -> Batch:
        inputs = dict(batch.inputs)
        for name, options in images.items():
            pixels = inputs[name]  # [B, H, W, C] or [B, T, H, W, C]
            if key is not None and options["kind"] == "image":
                pixels = image.augment(pixels, rng.row_keys(rng.fold(key, name), batch.id), options["augment"])
            inputs[name] = image.normalize(pixels, options["mean"], options["std"])
        return batch.replace(inputs=inputs)

    return preprocess
