"""Damaged image files are read, or refused in one line; what is lost or has a wrong checksum is never read."""

import io
import resource
import time

import numpy as np
import pytest
from hypothesis import strategies as st
from PIL import ExifTags, Image

from mmfusion.data import image, video
from mmfusion.data.image_range import Range
from tests.data.damage import CUTS, DAMAGE, FLIPS, damaged, few_and_many, is_short_line
from tests.data.deep_images import png, pnm, tiff

SIZE = (23, 31)
SECONDS, BYTES = 30, 2**30  # of one file at most, the memory on top of what the process had at its peak


def encode(picture, kind, **options):
    file = io.BytesIO()
    picture.save(file, kind, **options)
    return file.getvalue()


def text_pnm(magic, pixels):
    return f"{magic}\n{SIZE[1]} {SIZE[0]}\n255\n{' '.join(map(str, pixels.ravel()))}\n".encode()


def make_files():
    """Returns valid files by name, of every format and depth, each with the range of its stored values."""
    ramp = np.add.outer(np.arange(SIZE[0]) * 7, np.arange(SIZE[1]) * 5)
    pixels = np.stack([ramp, 2 * ramp, 3 * ramp], axis=2).astype(np.uint8)
    pixels[5:9] = np.random.default_rng(0).integers(0, 256, (4, SIZE[1], 3))
    rgb = Image.fromarray(pixels)
    gray, palette, rgba, exif = rgb.convert("L"), rgb.quantize(64), rgb.copy(), Image.Exif()
    rgba.putalpha(gray)
    exif[ExifTags.Base.Orientation] = 6
    bits = gray.convert("1")
    pictures = {"gray": gray, "rgb": rgb, "palette": palette, "rgba": rgba, "la": rgba.convert("LA"), "bits": bits}
    files = {f"png {name}": encode(picture, "PNG") for name, picture in pictures.items()}
    files["png transparency"] = encode(palette, "PNG", transparency=bytes(range(64)))
    for kind in ("PNG", "JPEG", "TIFF", "WEBP"):
        files[f"{kind} exif"] = encode(rgb, kind, exif=exif)
    for name, options in {"": {}, "progressive": {"progressive": True}, "rst": {"restart_marker_blocks": 1}}.items():
        files[f"jpeg {name}"] = encode(rgb, "JPEG", **options)
    files |= {"jpeg gray": encode(gray, "JPEG"), "jpeg cmyk": encode(rgb.convert("CMYK"), "JPEG")}
    for name in ("raw", "tiff_deflate", "tiff_lzw", "packbits", "jpeg"):
        files[f"tiff {name}"] = encode(rgb, "TIFF", compression=name)
    files["tiff group4"] = encode(bits, "TIFF", compression="group4")
    files |= {"webp": encode(rgb, "WEBP"), "webp lossless": encode(rgba, "WEBP", lossless=True)}
    files |= {"bmp": encode(rgb, "BMP"), "bmp palette": encode(palette, "BMP"), "bmp bits": encode(bits, "BMP")}
    files |= {"gif": encode(palette, "GIF"), "gif interlaced": encode(palette, "GIF", interlace=1, transparency=3)}
    for kind in ("GIF", "WEBP", "PNG"):
        rest = [Image.fromarray(np.roll(pixels, 5 * i, axis=0)) for i in range(1, 4)]
        files[f"animated {kind}"] = encode(rgb, kind, save_all=True, append_images=rest)
    files |= {"pgm": pnm(np.array(gray), 255), "ppm": pnm(pixels, 255), "pbm": encode(bits, "PPM")}
    files |= {"pgm text": text_pnm("P2", np.array(gray)), "ppm text": text_pnm("P3", pixels)}
    result = {name: (data, None) for name, data in files.items()}
    deep, full = (ramp * 97).astype(np.uint16), Range(0, 2**16 - 1, "uint16")
    colour = np.stack([deep, deep[::-1], deep[:, ::-1]], axis=2)
    result |= {f"png 16 {p.ndim}": (png(p), full) for p in (deep, colour)}
    result["pgm 16"] = pnm(deep, 2**16 - 1), full
    result["ppm 12"] = pnm(colour % 4096, 4095), Range(0, 4095, "uint16/4095")
    for order in "<>":
        for deflate in (False, True):
            result[f"tiff 16 {order}{deflate}"] = tiff(colour, order, deflate=deflate), full
            result[f"tiff float {order}{deflate}"] = (
                tiff(deep.astype(np.float32), order, deflate=deflate),
                Range(0, 2**16, "float"),
            )
    result["pfm"] = encode(Image.fromarray(deep.astype(np.float32)), "PPM"), Range(0, 2**16, "float")
    return result


FILES = make_files()
NAMES = st.sampled_from(sorted(FILES))
PNGS = st.sampled_from(sorted(name for name in FILES if name.lower().startswith("png")))
ANIMATIONS = st.sampled_from(["animated GIF", "animated WEBP", "animated PNG"])


def decode(data, value_range, kind="image"):
    options = {**image.OPTIONS, **video.OPTIONS, "size": SIZE, "channels": 4, "frames": 4}
    if kind == "video":
        return video.TYPE.decode(data, options, None)
    return image.TYPE.decode(data, options, value_range)


ORIGINAL = {name: decode(*file)[0] for name, file in FILES.items()}


def read_damaged(name, changes, kind="image"):
    """Returns what is read from a damaged file, None where it is refused, in one line and within the limits."""
    data, value_range = FILES[name]
    data = damaged(data, changes)
    started, memory = time.monotonic(), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    try:
        result = decode(data, value_range, kind)
    except ValueError as error:
        result = None
        assert is_short_line(error)
    else:
        assert result is not None or not data
    assert time.monotonic() - started < SECONDS
    assert 1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory) < BYTES
    return result


def check_damaged(name, changes):
    result = read_damaged(name, changes)
    if result is not None:
        pixels, mask = result
        assert pixels.shape == (*SIZE, 4) and pixels.dtype == ORIGINAL[name].dtype and mask.all()
        assert np.isfinite(pixels).all() and 0 <= pixels.min() <= pixels.max() <= 255


def check_cut(name, cut):
    result = read_damaged(name, [cut])
    assert result is None or np.array_equal(result[0], ORIGINAL[name])


def check_flipped(name, flip):
    assert read_damaged(name, [flip]) is None


def check_animation(name, changes, cut):
    whole = decode(FILES[name][0], None, "video")
    result = read_damaged(name, [cut], "video")
    assert whole[1].all() and (result is None or np.array_equal(result[0], whole[0]))
    result = read_damaged(name, changes, "video")
    assert result is None or (result[0].shape == (4, *SIZE, 4) and result[1].any())


# Pillow warns of metadata that it ignores, and of large images before they are refused.
pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::PIL.Image.DecompressionBombWarning")
test_image_decode_reads_or_refuses_damaged_files, many_damaged = few_and_many(check_damaged, NAMES, DAMAGE)
test_image_decode_refuses_files_that_are_cut_unless_all_pixels_are_left, many_cut = few_and_many(check_cut, NAMES, CUTS)
test_image_decode_refuses_png_files_with_a_flipped_bit, many_flipped = few_and_many(check_flipped, PNGS, FLIPS)
test_video_decode_refuses_animations_that_are_cut, many_animations = few_and_many(
    check_animation, ANIMATIONS, DAMAGE, CUTS
)


@pytest.mark.thorough
@pytest.mark.parametrize("check", [many_damaged, many_cut, many_flipped, many_animations])
def test_image_decode_reads_or_refuses_1000_damaged_files(check):
    check()
