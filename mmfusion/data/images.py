"""Several images a row: views, scans, photographs of one product; each is decoded like an image.

B batch · K images · H W image · C channels
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np

from mmfusion.data import image
from mmfusion.data.modality_type import Decoded, ModalityType, Options, is_missing

POOLS = ("none", "mean")
OPTIONS = {
    "count": 4,  # images; of longer lists the first ones are read, shorter lists are padded at the end
    "pool": "none",  # an image encoder gives one token an image; "mean": one token, their mean
    **image.PIXEL_OPTIONS,
    "augment": dict(image.AUGMENT),  # applied to each image on the device, in training batches only
}


def augment(images: jax.Array, keys: jax.Array, options: Mapping[str, float]) -> jax.Array:
    """Returns the images `[B, K, H, W, C]`, each augmented with a key of its own; see `image.augment`."""
    shape = images.shape
    own_keys = jax.vmap(lambda key: jax.random.split(key, shape[1]))(keys).reshape(-1)  # [B · K]
    return image.augment(images.reshape(-1, *shape[2:]), own_keys, options).reshape(shape)


def _shape(options: Options, _: None) -> tuple[tuple[int, ...], Any, int]:
    return (options["count"], *options["size"], options["channels"]), np.uint8, options["count"]


def _decode(value: Any, options: Options, _: None) -> Decoded:
    """Decodes a list of images, or pixels `[k, h, w, c]`; an image that is None or empty is masked in its place."""
    if is_missing(value):
        return None
    if isinstance(value, np.ndarray) and value.dtype == object:
        value = value.tolist()
    if isinstance(value, str | bytes | Mapping) or (isinstance(value, np.ndarray) and value.ndim != 4):
        given = f"an array {list(value.shape)}" if isinstance(value, np.ndarray) else type(value).__name__
        raise ValueError(f"must be a list of images or pixels [k, h, w, c], got {given}")
    size, channels = tuple(options["size"]), options["channels"]
    pixels = np.zeros((options["count"], *size, channels), np.uint8)  # [K, H, W, C]
    mask = np.zeros(options["count"], bool)
    for i in range(min(len(value), options["count"])):
        try:
            if not is_missing(value[i]):
                pixels[i], mask[i] = image.decode(value[i], size, channels), True
        except ValueError as error:
            raise ValueError(f"image {i}: {error}") from error
    return (pixels, mask) if mask.any() else None


def _encoder_kwargs(options: Options, _: None) -> dict[str, Any]:
    return {"pool": options["pool"]}


TYPE = ModalityType(
    OPTIONS,
    _shape,
    _decode,
    encoder_kwargs=_encoder_kwargs,
    takes=("images", "array[4]"),
    augment=augment,
    normalize=image.normalize_pixels,
)
