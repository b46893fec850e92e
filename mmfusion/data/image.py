"""Images: decoded and resized on the host, augmented and normalised on the device inside jit.

B batch · H W image · C channels.
"""

import contextlib
import dataclasses
import io
import json
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.ndimage import map_coordinates
from PIL import Image

from mmfusion.data import image_files, image_range
from mmfusion.data.image_range import Range
from mmfusion.data.modality_type import Decoded, ModalityType, Options, is_missing
from mmfusion.errors import UserError, one_line

FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "TIFF", "BMP", "PPM")  # excludes formats that run an interpreter, such as EPS
MODES = {1: "L", 2: "LA", 3: "RGB", 4: "RGBA"}
MAX_PIXELS = 50_000_000  # of a file, in its header
FIT_IMAGES = 200  # training images that the range of deeper images is learned from

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
    "range": (),  # (low, high), the stored values that become 0 and 255; empty: learned, unless images have 8 bits
    "augment": dict(AUGMENT),  # applied on the device, to training batches only
}


def decode(
    data: bytes | np.ndarray,
    size: tuple[int, int],
    channels: int,
    max_pixels: int = MAX_PIXELS,
    value_range: Range | None = None,
) -> np.ndarray:
    """Returns the image as `[H, W, C]`, resized bilinearly (with antialiasing) if its size differs.

    It is uint8 without a range, and otherwise float32 in [0, 255]. Files are upright, as their EXIF orientation says.
    Alpha is dropped if C is 1 or 3; colour is converted to luma if C is 1 or 2.

    Args:
      data: an encoded file of `FORMATS`, or pixels `[h, w]` or `[h, w, c]`, integers or floats.
      size: (H, W) in pixels.
      channels: C; it must be that of the image if either has more than 4.
      max_pixels: limit on height times width, checked in the header before pixels are decoded.
      value_range: the stored values that become [0, 255]; None: those of 8-bit images, and deeper images are errors.

    Raises:
      ValueError: the data are corrupt, truncated, too large or not finite, or have another depth or other channels than
        they must have; the message is short.
    """
    with _errors_of(data):
        opened = _open(data, channels, max_pixels)
        image_range.check_depth(image_files.depth_of(opened), value_range)
        if value_range is None:
            to_uint8 = _convert_array if isinstance(opened, np.ndarray) else convert
            return to_uint8(opened, size, channels)  # pyright: ignore[reportArgumentType]
        pixels, has_alpha = image_files.stored_pixels(opened, data)
        return image_range.rescale(pixels, value_range, size, channels, has_alpha=has_alpha)


@contextlib.contextmanager
def _errors_of(data: bytes | np.ndarray) -> Iterator[None]:
    try:
        yield
    except ValueError:
        raise
    # Pillow's format plugins raise many exception types (struct, zlib, index, syntax) for corrupt bytes.
    except Exception as error:
        reason = one_line(error, 200)
        if isinstance(error, Image.UnidentifiedImageError):
            is_tiff = data[:4] in (b"II*\0", b"MM\0*")
            reason = "a TIFF file whose bands, bits or compression are not supported" if is_tiff else "not an image"
        raise ValueError("empty" if len(data) == 0 else reason) from error


def _open(data: bytes | np.ndarray, channels: int, max_pixels: int) -> np.ndarray | Image.Image:
    """Returns an image's array `[h, w, c]`, or its file, whose pixels are not loaded yet."""
    if isinstance(data, np.ndarray):
        if data.dtype.kind not in "uif" or data.ndim not in (2, 3) or data.size == 0:
            raise ValueError(f"pixels are {data.dtype}{list(data.shape)}, not integers or floats [h, w] or [h, w, c]")
        data = data[:, :, None] if data.ndim == 2 else data
        if data.shape[2] != channels and (data.shape[0] == channels or max(data.shape[2], channels) > max(MODES)):
            raise ValueError(f"pixels are {list(data.shape)}, not [h, w, c] with {channels} channels")
        return data
    if not isinstance(data, bytes):
        raise ValueError(f"must be a file or pixels, got {type(data).__name__}")
    image_files.check_complete(data)
    image = Image.open(io.BytesIO(data), formats=FORMATS)
    if image.width * image.height > max_pixels:
        raise ValueError(f"{image.width} x {image.height} pixels, more than the limit of {max_pixels}")
    return image


def _convert_array(pixels: np.ndarray, size: tuple[int, int], channels: int) -> np.ndarray:
    """Returns pixels `[h, w, c]` uint8 as `[H, W, C]` uint8."""
    if pixels.shape[2] == channels and (channels not in MODES or pixels.shape[:2] == size):
        return image_range.resize(pixels, size)
    return convert(Image.fromarray(pixels[:, :, 0] if pixels.shape[2] == 1 else pixels), size, channels)


def convert(image: Image.Image, size: tuple[int, int], channels: int) -> np.ndarray:
    """Returns an 8-bit image as pixels `[H, W, C]` uint8, upright; C is 1 to 4."""
    if channels not in MODES:
        raise ValueError(f"a file has 1 to 4 channels, not {channels}")
    image_files.upright(image)
    if image.mode == "P":
        image = image.convert("RGBA" if "transparency" in image.info else "RGB")
    if image.mode != MODES[channels]:
        image = image.convert(MODES[channels])
    if image.size != size[::-1]:
        image = image.resize((size[1], size[0]), Image.Resampling.BILINEAR)
    return np.array(image).reshape(*size, channels)  # [H, W, C]


def augment(images: jax.Array, keys: jax.Array, options: Mapping[str, float]) -> jax.Array:
    """Returns the images `[B, H, W, C]`, each augmented with its own key; inside jit.

    A disabled option traces no operation. The result has the images' dtype after flips and crops only, and otherwise is
    float32 in [0, 255].

    Args:
      images: `[B, H, W, C]` uint8, or float32 in [0, 255].
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


def _shape(options: Options, fitted: Range | None) -> tuple[tuple[int, ...], Any, int]:
    return (*options["size"], options["channels"]), np.float32 if _range(options, fitted) else np.uint8, 1


def _decode(value: Any, options: Options, fitted: Range | None) -> Decoded:
    if is_missing(value):
        return None
    pixels = decode(value, tuple(options["size"]), options["channels"], value_range=_range(options, fitted))
    return pixels, np.ones(1, bool)


def _range(options: Options, fitted: Range | None) -> Range | None:
    given = options.get("range")  # configs saved before there was the option lack it
    return fitted or (Range(*given) if given else None)


def _fit(values: Sequence[Any], options: Options) -> str:
    """Returns as JSON the range of the images and their most frequent depth; empty for 8 bits without the option."""
    samples: dict[str, list[np.ndarray]] = defaultdict(list)
    for value in values:
        with contextlib.suppress(ValueError):  # unreadable images are reported when all rows are decoded
            if not is_missing(value):
                depth, sampled = _sample(value, options)
                samples[depth].append(sampled)
    depth = max(samples, key=lambda depth: len(samples[depth]), default="")
    if options["range"]:
        learned = Range(*options["range"], depth=depth)
    elif depth in ("", "uint8"):
        return ""
    else:
        learned = image_range.learn(samples[depth], depth)
    return json.dumps(dataclasses.asdict(learned))


def _sample(value: bytes | np.ndarray, options: Options) -> tuple[str, np.ndarray]:
    """Returns an image's depth, and some of its stored values if a range is to be learned from them."""
    with _errors_of(value):
        opened = _open(value, options["channels"], MAX_PIXELS)
        depth = image_files.depth_of(opened)
        if depth == "uint8" or options["range"]:
            return depth, np.zeros(0)
        pixels, has_alpha = image_files.stored_pixels(opened, value)
    image_range.check_values(pixels)
    count = pixels.shape[2]
    dropped = count in (2, 4) and count != options["channels"]  # as alpha, see `decode`
    return depth, image_range.sample(pixels[:, :, : count - (has_alpha or dropped)])


def _load(fitted: str) -> Range:
    return Range(**json.loads(fitted))


TAKES = ("image", "bytes", "array[2]", "array[3]")
TYPE = ModalityType(
    OPTIONS,
    _shape,
    _decode,
    fit=_fit,
    fit_rows=FIT_IMAGES,
    load=_load,
    augment=augment,
    normalize=normalize_pixels,
    takes=TAKES,
)
