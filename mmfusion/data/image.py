"""Images: decoded and resized on the host, augmented and normalised on the device inside jit.

B batch · H W image · C channels.
"""

import io
from collections.abc import Callable, Mapping, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates
from PIL import Image

from mmfusion.errors import UserError

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM")  # and none that starts a program, as EPS does
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}

# Everything off: flip is a probability, crop the padding in pixels, rotate the largest angle in degrees, and
# brightness, contrast and saturation the largest relative change.
AUGMENT = {"flip": 0.0, "crop": 0, "rotate": 0.0, "brightness": 0.0, "contrast": 0.0, "saturation": 0.0}


def decode(data: bytes | np.ndarray, size: tuple[int, int], channels: int, max_pixels: int = 50_000_000) -> np.ndarray:
    """Returns the picture as `[H, W, C]` uint8, resized bilinearly (with antialiasing) where its size differs.

    Transparency is dropped where C has no alpha; colour becomes luma where C is 1.

    Args:
      data: an encoded file of `FORMATS`, or uint8 pixels `[h, w]` or `[h, w, c]`.
      size: (H, W) in pixels.
      channels: C, from 1 to 4.
      max_pixels: larger pictures are refused by their header, before their pixels are decoded.

    Raises:
      ValueError: a short reason, if the data are corrupt, truncated, too large or not 8- or 16-bit.
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
        return _convert(image, size, channels)
    try:
        image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > max_pixels:
            raise ValueError(f"{image.width} x {image.height} pixels, more than the limit of {max_pixels}")
        return _convert(image, size, channels)
    except ValueError:
        raise
    # Pillow's format plugins let many kinds of exception through (struct, zlib, index, syntax) on broken bytes.
    except Exception as error:
        reason = "empty" if not data else "not a picture" if isinstance(error, Image.UnidentifiedImageError) else error
        raise ValueError(f"{reason}"[:200]) from error


def decode_film(
    data: bytes,
    chosen: Callable[[int], Sequence[int]],
    size: tuple[int, int],
    channels: int,
    max_pixels: int = 2_000_000_000,
) -> list[np.ndarray]:
    """Returns those frames of an animated picture that `chosen` takes of so many, each as `decode` gives it.

    Args:
      data: an encoded file (GIF, WebP, APNG).
      chosen: the number of frames -> which ones, ascending; no other is kept.
      size: (H, W) in pixels.
      channels: C, from 1 to 4.
      max_pixels: a film of more, over all frames, is refused before they are decoded.

    Raises:
      ValueError: a short reason, if the data are corrupt or too large.
    """
    try:
        film, frames = Image.open(io.BytesIO(data), formats=FORMATS), []
        count = getattr(film, "n_frames", 1)
        if count * film.width * film.height > max_pixels:
            raise ValueError(f"{count} frames of {film.width} x {film.height} pixels, over the limit of {max_pixels}")
        for i in chosen(count):
            film.seek(i)
            frames.append(_convert(film.convert("RGB"), size, channels))
        return frames
    # Pillow's format plugins let many kinds of exception through on broken bytes.
    except Exception as error:
        raise ValueError(f"not a moving picture: {error}"[:200]) from error


def _convert(image: Image.Image, size: tuple[int, int], channels: int) -> np.ndarray:
    if image.mode.startswith("I;16"):
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    elif image.mode in ("I", "F"):
        raise ValueError(f"pixels of mode {image.mode}, not 8- or 16-bit")
    elif image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    if image.mode != MODES[channels]:
        image = image.convert(MODES[channels])
    if image.size != size[::-1]:
        image = image.resize(size[::-1], Image.Resampling.BILINEAR)
    return np.array(image).reshape(*size, channels)  # [H, W, C]


def augment(images: jax.Array, keys: jax.Array, options: Mapping[str, float]) -> jax.Array:
    """Returns the pictures `[B, H, W, C]`, each changed at random by its own key alone; inside jit.

    An option that is off traces no operation. The result stays uint8 where the pixels only move, and is float32 in
    [0, 255] after a rotation or a change of colour.

    Args:
      images: `[B, H, W, C]` uint8.
      keys: one key an example `[B]`, see `rng.row_keys`.
      options: Python numbers, the keys of `AUGMENT`.

    Raises:
      UserError: if saturation is on and the pictures are not RGB.
    """
    if options["saturation"] and images.shape[-1] != 3:
        raise UserError(f"saturation needs pictures of 3 channels, these have {images.shape[-1]}; set it to 0")
    if not any(options[name] for name in AUGMENT):
        return images
    return jax.vmap(lambda image, key: _augment_one(image, key, options))(images, keys)


def _augment_one(image: jax.Array, key: jax.Array, options: Mapping[str, float]) -> jax.Array:
    # One key an operation, whether or not it is on: switching one on leaves the others' draws as they were.
    keys = dict(zip(AUGMENT, jax.random.split(key, len(AUGMENT)), strict=True))
    if options["flip"]:
        image = jnp.where(jax.random.bernoulli(keys["flip"], options["flip"]), image[:, ::-1], image)
    if options["crop"]:
        image = _crop(image, keys["crop"], options["crop"])
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
    """Returns `[H, W, C]` float32 turned counter-clockwise about its centre, bilinear, its edges extended outwards.

    Args:
      image: `[H, W, C]`, any number type.
      degrees: a scalar.
    """
    height, width, _ = image.shape
    y, x = jnp.meshgrid(jnp.arange(height) - (height - 1) / 2, jnp.arange(width) - (width - 1) / 2, indexing="ij")
    sin, cos = jnp.sin(jnp.deg2rad(degrees)), jnp.cos(jnp.deg2rad(degrees))
    rows, columns = cos * y + sin * x + (height - 1) / 2, cos * x - sin * y + (width - 1) / 2  # [H, W]
    turn = lambda plane: map_coordinates(plane, (rows, columns), order=1, mode="nearest")  # noqa: E731
    return jax.vmap(turn, in_axes=2, out_axes=2)(image.astype(jnp.float32))


def _factor(key: jax.Array, change: float) -> jax.Array:
    return jax.random.uniform(key, minval=1 - change, maxval=1 + change)


def _blend(image: jax.Array, base: jax.Array, factor: jax.Array) -> jax.Array:
    return jnp.clip(base + (image - base) * factor, 0, 255)


def normalize(images: jax.Array, mean: Sequence[float], std: Sequence[float]) -> jax.Array:
    """Returns (images / 255 - mean) / std `[..., C]` float32.

    Args:
      images: `[..., C]` in [0, 255].
      mean: one number a channel, of pixels in [0, 1].
      std: likewise.
    """
    return (images.astype(jnp.float32) / 255 - jnp.asarray(mean)) / jnp.asarray(std)
