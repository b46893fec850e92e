"""The range of stored pixel values that becomes [0, 255], for images of more than 8 bits per channel.

h w stored pixels · H W resized pixels · c stored channels · C channels
"""

import dataclasses
from collections.abc import Sequence

import numpy as np
from PIL import Image

PERCENTILES = (0.1, 99.9)  # of the stored values of training images, which become 0 and 255
SAMPLED_PIXELS = 50_000  # of an image, evenly spaced
LARGEST = 1e30  # floats beyond it are no pixels, but for example a marker of missing data
LUMA = np.array([[0.299], [0.587], [0.114]], np.float32)  # ITU-R BT.601, as in Pillow


@dataclasses.dataclass(frozen=True)
class Range:
    """The stored values that become 0 and 255; those outside are clipped.

    Attributes:
      low, high: the stored values.
      depth: the depth of the images that it is for, from `image_files`; empty: any but uint8.
    """

    low: float
    high: float
    depth: str = ""


def check_depth(depth: str, value_range: Range | None) -> None:
    """Raises ValueError unless pixels of a depth can be read with a range; None: it is not known."""
    if value_range is None and depth != "uint8":
        raise ValueError(f"{depth} pixels need the option range=(low, high) of images: the values of black and white")
    if value_range and depth != value_range.depth and (value_range.depth or depth == "uint8"):
        other = value_range.depth or "deeper"
        raise ValueError(f"{depth} pixels, where the range is that of {other} pixels: all images must have one depth")


def check_values(pixels: np.ndarray) -> None:
    """Raises ValueError if pixels are not finite, or too large."""
    if pixels.dtype.kind == "f":
        if not np.isfinite(pixels).all():
            raise ValueError("pixels are not finite")
        if (largest := float(np.abs(pixels).max())) > LARGEST:
            raise ValueError(f"pixels reach {largest:.3g}, which is no brightness")


def rescale(
    pixels: np.ndarray, value_range: Range, size: tuple[int, int], channels: int, *, has_alpha: bool
) -> np.ndarray:
    """Returns stored pixels `[h, w, c]` as `[H, W, C]` float32 in [0, 255], resized bilinearly (with antialiasing).

    Args:
      pixels: stored pixels.
      value_range: what becomes [0, 255].
      size: (H, W).
      channels: C; see `to_channels`.
      has_alpha: whether the last channel is alpha, whose range is that of its dtype.

    Raises:
      ValueError: pixels are not finite, or have channels that cannot be converted.
    """
    low, high = value_range.low, value_range.high
    check_values(pixels)
    values = pixels.astype(np.result_type(pixels, np.float32))
    values = np.clip((values - low) * (255 / (high - low)), 0, 255).astype(np.float32)
    if has_alpha:
        values[:, :, -1] = pixels[:, :, -1] * np.float32(255 / np.iinfo(pixels.dtype).max)
    return resize(to_channels(values, channels), size)


def to_channels(pixels: np.ndarray, channels: int) -> np.ndarray:
    """Returns pixels `[h, w, c]` float32 in [0, 255] as `[h, w, C]`, converted as by `image.decode`.

    Raises:
      ValueError: c and C differ, and not both are at most 4.
    """
    count = pixels.shape[2]
    if count == channels:
        return pixels
    if max(count, channels) > 4:
        raise ValueError(f"pixels have {count} channels, not {channels}")
    colour = pixels[:, :, : count - (count in (2, 4))]
    alpha = pixels[:, :, -1:] if count in (2, 4) else np.full_like(pixels[:, :, :1], 255)
    if channels > 2:
        colour = np.broadcast_to(colour, (*colour.shape[:2], 3))
    elif colour.shape[2] == 3:
        colour = colour @ LUMA
    return np.concatenate([colour, alpha], axis=2) if channels in (2, 4) else np.ascontiguousarray(colour)


def resize(pixels: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """Returns pixels `[h, w, c]`, uint8 or float32, as `[H, W, c]`; each channel is resized by itself."""
    if pixels.shape[:2] == size:
        return pixels
    planes = [Image.fromarray(np.ascontiguousarray(plane)) for plane in np.moveaxis(pixels, 2, 0)]
    resized = [np.array(plane.resize((size[1], size[0]), Image.Resampling.BILINEAR)) for plane in planes]
    return np.stack(resized, axis=2)


def sample(pixels: np.ndarray) -> np.ndarray:
    """Returns the values of at most `SAMPLED_PIXELS` evenly spaced pixels `[h, w, c]`, as one array."""
    flat = pixels.reshape(-1, pixels.shape[2])
    return flat[np.linspace(0, len(flat) - 1, min(SAMPLED_PIXELS, len(flat))).round().astype(int)].ravel()


def learn(samples: Sequence[np.ndarray], depth: str) -> Range:
    """Returns the range of images of one depth: the maximum that they declare, or percentiles of their values.

    Args:
      samples: values of each image, from `sample`.
      depth: their depth.
    """
    if "/" in depth:
        return Range(0, int(depth.partition("/")[2]), depth)
    values = np.concatenate(samples).astype(np.float64)
    low, high = np.percentile(values, PERCENTILES).tolist()
    if low == high:  # nearly all pixels have one value
        low, high = float(values.min()), float(values.max())
    return Range(low, high if high > low else low + 1, depth)
