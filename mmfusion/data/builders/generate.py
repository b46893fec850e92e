"""Helpers of the builders: platform-independent random bits, and PNG encoding."""

import hashlib
import io

import numpy as np
import tensorflow_datasets as tfds
from PIL import Image


def variant(builder: tfds.core.DatasetBuilder) -> str:
    """Returns the name of a builder's configuration."""
    assert builder.builder_config is not None
    return builder.builder_config.name


def bits(*names: str) -> np.random.Philox:
    """Returns the counter-based bit generator of these names, whose raw output is the same in every NumPy version."""
    key = hashlib.blake2b("/".join(names).encode(), digest_size=16).digest()
    return np.random.Philox(key=int.from_bytes(key, "big"))


def png(pixels: np.ndarray) -> bytes:
    """Returns pixels `[H, W]` or `[H, W, C]` uint8, with 1, 3 or 4 channels, as PNG bytes."""
    buffer = io.BytesIO()
    pixels = pixels[..., 0] if pixels.ndim == 3 and pixels.shape[2] == 1 else pixels
    Image.fromarray(pixels).save(buffer, "PNG", compress_level=1)
    return buffer.getvalue()
