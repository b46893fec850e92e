"""Video: a fixed number of frames, decoded and resized on the host.

B batch · T frames · H W image · C channels.
"""

import io
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from mmfusion.data import image, image_files, image_range
from mmfusion.data.modality_type import Decoded, ModalityType, Options, is_missing
from mmfusion.errors import one_line

OPTIONS = {
    "frames": 8,  # longer videos are subsampled at even intervals, shorter ones padded at the end
    **image.PIXEL_OPTIONS,
}


def decode_animation(
    data: bytes,
    select: Callable[[int], Sequence[int]],
    size: tuple[int, int],
    channels: int,
    max_pixels: int = 2_000_000_000,
) -> list[np.ndarray]:
    """Returns the selected frames of an animated image, as of an 8-bit image by `image.decode`.

    Args:
      data: an encoded file (GIF, WebP, APNG).
      select: number of frames -> indices of the frames to decode, ascending.
      size: (H, W) in pixels.
      channels: C, from 1 to 4.
      max_pixels: limit on the number of pixels over all frames, checked before decoding.

    Raises:
      ValueError: the data are corrupt, too large or deeper than 8 bits; the message is short.
    """
    try:
        image_files.check_complete(data)
        if data[:3] == b"GIF":
            image_files.check_gif(data)
        animation, frames = Image.open(io.BytesIO(data), formats=image.FORMATS), []
        count = getattr(animation, "n_frames", 1)
        pixels = animation.width * animation.height
        if count * pixels > max_pixels or pixels > image.MAX_PIXELS:
            shape, limit = f"{animation.width} x {animation.height}", f"{max_pixels}, or {image.MAX_PIXELS} a frame"
            raise ValueError(f"{count} frames of {shape} pixels, over the limit of {limit}")
        for i in select(count):
            animation.seek(i)
            image_range.check_depth(image_files.depth_of(animation), None)
            frames.append(image.convert(animation.convert("RGB"), size, channels))
        return frames
    # Pillow's format plugins raise many exception types for corrupt bytes.
    except Exception as error:
        raise ValueError(f"not an animated image: {one_line(error, 170)}") from error


def _shape(options: Options, _: None) -> tuple[tuple[int, ...], Any, int]:
    return (options["frames"], *options["size"], options["channels"]), np.uint8, options["frames"]


def _decode(value: Any, options: Options, _: None) -> Decoded:
    """Decodes frames given as pixels `[t, H, W, C]`, as encoded images, or as the bytes of one animated image."""
    if is_missing(value):
        return None
    if isinstance(value, str | Mapping) or not hasattr(value, "__getitem__"):
        raise ValueError(f"must be frames or an animated image, got {type(value).__name__}")
    if isinstance(value, np.ndarray) and value.ndim == 3 and value.shape[2] <= max(image.MODES):
        raise ValueError(f"an array {list(value.shape)} is an image, not frames [t, h, w] or [t, h, w, c]")
    frame_count, size, channels = options["frames"], tuple(options["size"]), options["channels"]

    def select(count: int) -> list[int]:
        return np.linspace(0, count - 1, min(frame_count, count)).round().astype(int).tolist()

    if isinstance(value, bytes):
        frames = decode_animation(value, select, size, channels)
    else:
        frames = [image.decode(value[i], size, channels) for i in select(len(value))]
    pixels = np.zeros((frame_count, *size, channels), np.uint8)  # [T, H, W, C]
    pixels[: len(frames)] = frames
    return pixels, np.arange(frame_count) < len(frames)


TAKES = ("video", "images", "bytes", "array[3]", "array[4]")
TYPE = ModalityType(OPTIONS, _shape, _decode, normalize=image.normalize_pixels, takes=TAKES)
