"""Image files as stored: their depth, and their pixels in full depth, which Pillow reduces or misreads in some formats.

h w pixels · c channels
"""

import contextlib
import io
import sys
import zlib
from collections.abc import Mapping
from typing import Any

import numpy as np
from PIL import Image, ImageOps

# Raw modes of files with one channel that Pillow reads in full.
ONE_CHANNEL = (
    "L", "I;16", "I;16B", "I;16N", "I;16S", "I;16BS", "I;16NS", "I;32N", "I;32S", "I;32BS", "F;32F", "F;32BF",
)  # fmt: skip
# Pillow keeps one byte of each 16-bit channel: with these raw modes the high byte, with the other order the low byte.
OTHER_ORDER = {"B": "L", "L": "B", "N": "B" if sys.byteorder == "little" else "L"}
BOTH_BYTES = {
    f"{mode};16{order}": f"{mode};16{OTHER_ORDER[order]}" for mode in ("RGB", "RGBA") for order in OTHER_ORDER
}
BITS_PER_SAMPLE, PHOTOMETRIC, PLANAR, SAMPLE_FORMAT = 258, 262, 284, 339  # TIFF tags
SAMPLE_FORMATS = {1: "uint", 2: "int", 3: "float"}


def check_complete(data: bytes) -> None:
    """Raises ValueError if a file is damaged in a way that can be detected, and that Pillow does not look for.

    Pillow reads a PNG file up to its last row, and so not the checksum at the end; a text PGM or PPM file may have lost
    digits of its last value.
    """
    if data[:8] == b"\x89PNG\r\n\x1a\n":
        _check_png(data)
    elif data[:2] in (b"P2", b"P3") and not data[-1:].isspace():
        raise ValueError("truncated, or without white space after its last value")


def _check_png(data: bytes) -> None:
    """Raises ValueError unless a PNG file is complete, and each of its chunks has the checksum that it declares."""
    view, position, name = memoryview(data), 8, b""
    while name != b"IEND":
        size, name = int.from_bytes(data[position : position + 4]), data[position + 4 : position + 8]
        end = position + 12 + size  # length, name and checksum have 4 bytes each
        if end > len(data):
            raise ValueError(f"truncated: {len(data)} of at least {end} bytes")
        if zlib.crc32(view[position + 4 : end - 4]) != int.from_bytes(data[end - 4 : end]):
            raise ValueError(f"damaged: the checksum of chunk {name!r} does not match")
        position = end


def check_gif(data: bytes) -> None:
    """Raises ValueError unless a GIF file is complete; Pillow takes one cut between frames as a shorter animation."""

    def after_table(flags_at: int, start: int) -> int:
        flags = byte(flags_at)
        return start + (3 << (flags & 7) + 1 if flags & 128 else 0)  # a table of colours

    def byte(position: int) -> int:
        if position >= len(data):
            raise ValueError(f"truncated: {len(data)} bytes without an end")
        return data[position]

    position = after_table(10, 13)
    while (block := byte(position)) != 0x3B:
        if block == 0x2C:  # an image: 9 bytes, a table, and the code size
            position = after_table(position + 9, position + 10) + 1
        elif block == 0x21:  # an extension
            position += 2
        else:
            raise ValueError(f"no GIF block at byte {position}")
        while size := byte(position):
            position += 1 + size
        position += 1


def depth_of(image: np.ndarray | Image.Image) -> str:
    """Returns the depth of an image's pixels: the dtype that holds them, or `float` for floats of any size.

    It ends with `/MAXIMUM` if a file declares a maximum below that of the dtype (PGM, PPM).

    Args:
      image: pixels, or an opened file, whose pixels are not loaded yet.
    """
    if isinstance(image, np.ndarray):
        return "float" if image.dtype.kind == "f" else image.dtype.name
    raw_mode, codec, parameters = _tile(image)
    if tags := _tiff_tags(image):
        bits, kind = max(tags.get(BITS_PER_SAMPLE, (1,))), SAMPLE_FORMATS[max(tags.get(SAMPLE_FORMAT, (1,)))]
        return "float" if kind == "float" else "uint8" if kind == "uint" and bits <= 8 else f"{kind}{bits}"
    if image.mode == "F":
        return "float"
    if codec.startswith("ppm") and parameters[0] > 255:
        return "uint16" if parameters[0] == 2**16 - 1 else f"uint16/{parameters[0]}"
    return "uint16" if ";16" in raw_mode else "uint8"


def _tile(image: Image.Image) -> tuple[str, str, tuple]:
    """Returns the raw mode of an opened file's pixels, the name of their codec, and its other arguments."""
    tiles = getattr(image, "tile", ())
    if not tiles:
        return image.mode, "", ()
    raw_mode, *others = tiles[0].args if isinstance(tiles[0].args, tuple) else (tiles[0].args,)
    return str(raw_mode), tiles[0].codec_name, tuple(others)


def _tiff_tags(image: Image.Image) -> Mapping:
    return getattr(image, "tag_v2", {})


def upright(image: Image.Image) -> None:
    """Loads an image, and rotates or flips it in place as its metadata say (EXIF or XMP orientation)."""
    image.load()
    if image.format == "PNG" and not image.info:
        return  # it has no metadata, and looking for them takes longer than a small image
    with contextlib.suppress(Exception):  # metadata that cannot be read say nothing of the orientation
        ImageOps.exif_transpose(image, in_place=True)


def stored_pixels(image: np.ndarray | Image.Image, data: Any) -> tuple[np.ndarray, bool]:
    """Returns an image's pixels `[h, w, c]` in full depth, upright, and whether the last channel is known to be alpha.

    Args:
      image: pixels, which are returned, or an opened file, whose pixels are not loaded yet.
      data: the file's bytes.

    Raises:
      ValueError: Pillow cannot read all bits of these pixels; the message is short.
    """
    if isinstance(image, np.ndarray):
        return image, False
    depth, tags, (raw_mode, codec, _) = depth_of(image), _tiff_tags(image), _tile(image)
    if depth == "uint8":
        transparent = image.has_transparency_data
        upright(image)
        mode = "L" if image.mode == "1" else "RGBA" if transparent else "RGB"
        image = image if image.mode in ("L", "LA", "RGB", "RGBA") else image.convert(mode)
        return np.array(image).reshape(image.height, image.width, -1), image.mode in ("LA", "RGBA")
    if image.format == "PPM" and depth != "float":
        return _ppm_pixels(image, data), False
    if raw_mode in BOTH_BYTES and tags.get(PLANAR, 1) == 1:  # 1: the channels of a pixel are together
        low = Image.open(io.BytesIO(data), formats=[str(image.format)])
        low.tile = [_with_raw_mode(tile, BOTH_BYTES[raw_mode]) for tile in low.tile]  # pyright: ignore
        upright(image)
        upright(low)
        return np.array(image).astype(np.uint16) << 8 | np.array(low), image.mode == "RGBA"
    if raw_mode not in ONE_CHANNEL or tags.get(PHOTOMETRIC, 1) != 1:  # 1: black is 0
        layout = "white is 0" if raw_mode in ONE_CHANNEL else raw_mode + " by channel" * (tags.get(PLANAR, 1) != 1)
        raise ValueError(f"{depth} pixels ({layout}) cannot be read in full: save them as gray, RGB or RGBA")
    upright(image)
    pixels = np.array(image).astype("float32" if depth == "float" else depth)[:, :, None]
    order = raw_mode.partition(";")[2]  # has a B for big-endian, an N for the machine's
    if codec == "libtiff" and "N" not in order and ("B" in order) == (sys.byteorder == "little"):
        pixels = pixels.byteswap()  # libtiff gives the machine's byte order, and Pillow reads the file's
    return pixels, False


def _with_raw_mode(tile, raw_mode: str):
    return tile._replace(args=(raw_mode, *tile.args[1:]) if isinstance(tile.args, tuple) else raw_mode)


def _ppm_pixels(image: Image.Image, data: bytes) -> np.ndarray:
    """Returns the pixels of a 16-bit PGM or PPM file, which Pillow would rescale or reduce to 8 bits."""
    offset, channels = image.tile[0].offset, {b"P5": 1, b"P6": 3}.get(data[:2])  # pyright: ignore
    if channels is None:
        raise ValueError("16-bit pixels of a text PPM file cannot be read in full: save them as binary (P5 or P6)")
    count = image.height * image.width * channels
    if len(data) < offset + 2 * count:
        raise ValueError(f"truncated: {len(data)} of {offset + 2 * count} bytes")
    return np.frombuffer(data, ">u2", count, offset).reshape(image.height, image.width, channels).astype(np.uint16)
