"""Writes PNG, TIFF, PGM and PPM files with more than 8 bits per channel, most of which Pillow cannot write."""

import struct
import zlib

import numpy as np


def png(pixels):
    """Returns a PNG file of pixels `[h, w]` or `[h, w, c]` uint16."""
    height, width, channels = np.atleast_3d(pixels).shape
    colour_type = {1: 0, 2: 4, 3: 2, 4: 6}[channels]
    rows = b"".join(b"\0" + row.astype(">u2").tobytes() for row in pixels)
    header = struct.pack(">IIBBBBB", width, height, 16, colour_type, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(rows)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data)) for name, data in chunks
    )


def pnm(pixels, maximum):
    """Returns a binary PGM or PPM file of pixels `[h, w]` or `[h, w, 3]`."""
    magic = "P5" if pixels.ndim == 2 else "P6"
    header = f"{magic}\n# a comment\n{pixels.shape[1]} {pixels.shape[0]}\n{maximum}\n".encode()
    return header + pixels.astype("u1" if maximum < 256 else ">u2").tobytes()


def tiff(pixels, order="<", *, deflate=False, planar=False, photometric=None, extra=(), orientation=1):
    """Returns a TIFF file of pixels `[h, w]` or `[h, w, c]`, of any dtype.

    Args:
      pixels: the pixels.
      order: byte order, `<` or `>`.
      deflate: whether to compress the strips.
      planar: whether each channel is stored by itself.
      photometric: photometric interpretation; None: RGB for at least 3 channels, else gray where black is 0.
      extra: kinds of the extra channels: 0 unspecified, 1 premultiplied alpha, 2 alpha.
      orientation: as in EXIF.
    """
    pixels = np.atleast_3d(pixels).astype(pixels.dtype.newbyteorder(order))
    height, width, channels = pixels.shape
    strips = [plane.tobytes() for plane in (np.moveaxis(pixels, 2, 0) if planar else [pixels])]
    strips = [zlib.compress(strip) if deflate else strip for strip in strips]
    offsets = np.cumsum([8, *map(len, strips)]).tolist()
    content = b"".join(strips) + bytes(offsets[-1] % 2)
    tags = {
        256: ("I", [width]),
        257: ("I", [height]),
        258: ("H", [8 * pixels.dtype.itemsize] * channels),
        259: ("H", [8 if deflate else 1]),
        262: ("H", [(2 if channels > 2 else 1) if photometric is None else photometric]),
        273: ("I", offsets[:-1]),
        274: ("H", [orientation]),
        277: ("H", [channels]),
        278: ("I", [height]),
        279: ("I", [len(strip) for strip in strips]),
        284: ("H", [2 if planar else 1]),
        338: ("H", list(extra)),
        339: ("H", [{"u": 1, "i": 2, "f": 3}[pixels.dtype.kind]] * channels),
    }
    tags = {tag: value for tag, value in tags.items() if value[1]}
    start = 8 + len(content)
    entries, values = b"", b""
    for tag, (kind, numbers) in tags.items():
        packed = struct.pack(f"{order}{len(numbers)}{kind}", *numbers)
        if len(packed) > 4:
            position = start + 2 + 12 * len(tags) + 4 + len(values)
            values, packed = values + packed, struct.pack(order + "I", position)
        entries += struct.pack(order + "HHI", tag, {"H": 3, "I": 4}[kind], len(numbers)) + packed.ljust(4, b"\0")
    magic = b"II*\0" if order == "<" else b"MM\0*"
    directory = struct.pack(order + "H", len(tags)) + entries + bytes(4) + values
    return magic + struct.pack(order + "I", start) + content + directory
