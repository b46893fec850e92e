"""Images: decoded and resized on the host, augmented and normalised on the device inside jit.

B batch · H W image · C channels.
"""

import io
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates
from PIL import Image

from mmfusion.data.modality_type import Decoded, ModalityType, Options
from mmfusion.errors import UserError

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM")  # excludes formats that run an interpreter, such as EPS
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}

AUGMENT = {  # disabled by default
    "flip": 0.0,  # probability
    "crop": 0,  # padding in pixels before a random crop to the original size
    "rotate": 0.0,  # maximum angle, in degrees
    "brightness": 0.0,  # maximum relative change, also for contrast and saturation
    "contrast": 0.0,
    "saturation": 0.0,
}
PIXEL_OPTIONS = {
    "size": (32, 32),  # (H, W) in pixels; images of another size are resized
    "channels": 3,
    "mean": (0.5,),  # per channel, or one value for all; of pixels in [0, 1]
    "std": (0.25,),
}
OPTIONS = {
    **PIXEL_OPTIONS,
    "augment": dict(AUGMENT),  # applied on the device, to training batches only
}


def decode(data: bytes | np.ndarray, size: tuple[int, int], channels: int, max_pixels: int = 50_000_000) -> np.ndarray:
    """Returns the image as `[H, W, C]` uint8, resized bilinearly (with antialiasing) if its size differs.

    Alpha is dropped if C is 1 or 3; colour is converted to luma if C is 1 or 2.

    Args:
      data: an encoded file of `FORMATS`, or uint8 pixels `[h, w]` or `[h, w, c]`.
      size: (H, W) in pixels.
      channels: C, from 1 to 4.
      max_pixels: limit on height times width, checked in the header before pixels are decoded.

    Raises:
      ValueError: the data are corrupt, truncated, too large or not 8- or 16-bit; the message is short.
    """
    if isinstance(data, np.ndarray):
        if data.dtype != np.uint8 or data.ndim not in (2, 3) or data.size == 0:
            raise ValueError(f"pixels are {data.dtype}{list(data.shape)}, not uint8 [h, w] or [h, w, c]")
        data = data[:, :, None] if data.ndim == 2 else data
        if data.shape == (*size, channels):
            return data
        if data.shape[2] not in MODES:
            raise ValueError(f"pixels have {data.shape[2]} channels, not 1 to 4")
        image = Image.fromarray(data[:, :, 0] if data.shape[2] == 1 else data)
        return convert(image, size, channels)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > max_pixels:
            raise ValueError(f"{image.width} x {image.height} pixels, more than the limit of {max_pixels}")
        return convert(image, size, channels)
    except ValueError:
        raise
    # Pillow's format plugins raise many exception types (struct, zlib, index, syntax) for corrupt bytes.
    except Exception as error:
        reason = "empty" if not data else "not an image" if isinstance(error, Image.UnidentifiedImageError) else error
        raise ValueError(f"{reason}"[:200]) from error


def convert(image: Image.Image, size: tuple[int, int], channels: int) -> np.ndarray:
    """Returns an image as pixels `[H, W, C]` uint8; raises ValueError for pixels that are not 8- or 16-bit."""
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode}, not 8- or 16-bit")
    elif image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    if image.mode != MODES[channels]:
        image = image.convert(MODES[channels])
    if image.size != size[::-1]:
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.array(image).reshape(*size, channels)  # [H, W, C]


def augment(images: jax.Array, keys: jax.Array, options: Mapping[str, float]) -> jax.Array:
    """Returns the images `[B, H, W, C]`, each augmented with its own key; inside jit.

    A disabled option traces no operation. The result is uint8 after flips and crops only, and otherwise float32 in
    [0, 255].

    Args:
      images: `[B, H, W, C]` uint8.
      keys: one key per example `[B]`, see `rng.row_keys`.
      options: Python numbers, with the keys of `AUGMENT`.

    Raises:
      UserError: saturation is enabled and the images are not RGB.
    """
    if options["saturation"] and images.shape[-1] != 3:
        message = f"needs images with 3 channels, not {images.shape[-1]}; set it to 0"
        raise UserError(message, path="augment.saturation", value=options["saturation"])
    if not any(options[name] for name in AUGMENT):
        return images
    return jax.vmap(lambda image, key: _augment_one(image, key, options))(images, keys)


def _augment_one(image: jax.Array, key: jax.Array, options: Mapping[str, float]) -> jax.Array:
    # One key per operation, so that enabling one does not change the random numbers of the others.
    keys = dict(zip(AUGMENT, jax.random.split(key, len(AUGMENT)), strict=True))
    if options["flip"]:
        image = jnp.where(jax.random.bernoulli(keys["flip"], options["flip"]), image[:, ::-1], image)
    if options["crop"]:
        image = _crop(image, keys["crop"], int(options["crop"]))
    if options["rotate"]:
        angle = jax.random.uniform(keys["rotate"], minval=-options["rotate"], maxval=options["rotate"])
        image = rotate(image, angle)
    if options["brightness"]:
        image = jnp.clip(image * _factor(keys["brightness"], options["brightness"]), 0, 255)
    if options["contrast"]:
        image = _blend(image, jnp.mean(image.astype(jnp.float32)), _factor(keys["contrast"], options["contrast"]))
    if options["saturation"]:
        luma = image @ jnp.array([0.299, 0.587, 0.114])  # [H, W], ITU-R BT.601
        image = _blend(image, luma[:, :, None], _factor(keys["saturation"], options["saturation"]))
    return image


def _crop(image: jax.Array, key: jax.Array, pad: int) -> jax.Array:
    padded = jnp.pad(image, ((pad, pad), (pad, pad), (0, 0)), mode="edge")  # [H + 2 pad, W + 2 pad, C]
    top, left = jax.random.randint(key, (2,), 0, 2 * pad + 1)
    return jax.lax.dynamic_slice(padded, (top, left, 0), image.shape)


def rotate(image: jax.Array, degrees: jax.Array) -> jax.Array:
    """Returns the image `[H, W, C]` float32 rotated counter-clockwise, with bilinear sampling and edge padding.

    Args:
      image: `[H, W, C]`, any numeric dtype.
      degrees: a scalar.
    """
    height, width, _ = image.shape
    y, x = jnp.meshgrid(jnp.arange(height) - (height - 1) / 2, jnp.arange(width) - (width - 1) / 2, indexing="ij")
    sin, cos = jnp.sin(jnp.deg2rad(degrees)), jnp.cos(jnp.deg2rad(degrees))
    rows, columns = cos * y + sin * x + (height - 1) / 2, cos * x - sin * y + (width - 1) / 2  # [H, W]

    def rotate_channel(channel: jax.Array) -> jax.Array:  # [H, W]
        return map_coordinates(channel, (rows, columns), order=1, mode="nearest")

    return jax.vmap(rotate_channel, in_axes=2, out_axes=2)(image.astype(jnp.float32))


def _factor(key: jax.Array, change: float) -> jax.Array:
    return jax.random.uniform(key, minval=1 - change, maxval=1 + change)


def _blend(image: jax.Array, base: jax.Array, factor: jax.Array) -> jax.Array:
    return jnp.clip(base + (image - base) * factor, 0, 255)


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Returns (images / 255 - mean) / std `[..., C]` float32.

    Args:
      images: `[..., C]` in [0, 255].
      mean: one value per channel, or one for all; of pixels in [0, 1].
      std: like `mean`.
    """
    return (images.astype(jnp.float32) / 255 - jnp.asarray(mean)) / jnp.asarray(std)


def normalize_pixels(images: jax.Array, options: Options) -> jax.Array:
    """Returns images or frames normalised with the mean and standard deviation of their options; see `normalize`."""
    return normalize(images, options["mean"], options["std"])


def _shape(options: Options, _: None) -> tuple[tuple[int, ...], Any, int]:
    return (*options["size"], options["channels"]), np.uint8, 1


def _decode(value: Any, options: Options, _: None) -> Decoded:
    if value is None or len(value) == 0:
        return None
    return decode(value, tuple(options["size"]), options["channels"]), np.ones(1, bool)


TAKES = ("image", "bytes", "array[2]", "array[3]")
TYPE = ModalityType(OPTIONS, _shape, _decode, augment=augment, normalize=normalize_pixels, takes=TAKES)
