import io
import itertools
import json

import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mmfusion import config as configs
from mmfusion import rng
from mmfusion.data import dataset, image
from mmfusion.data.image_range import Range
from tests import planted
from tests.data.deep_images import png, pnm, tiff

RANDOM = np.random.default_rng(0)
SIZE = (5, 7)
GRAY, RGB, RGBA = (RANDOM.integers(0, 2**16, (*SIZE, c), np.uint16) for c in (1, 3, 4))
FULL = Range(0, 2**16 - 1, "uint16")  # 257 stored levels for each of 8 bits
TYPE = image.TYPE


def options(**changes):
    return {**image.OPTIONS, "size": SIZE, "channels": 1, **changes}


def stored(pixels):
    """Returns the 16-bit levels of pixels decoded with the range `FULL`."""
    assert pixels.dtype == np.float32
    return np.rint(pixels.astype(np.float64) * 257)


# --- Files ---


@pytest.mark.parametrize("pixels", [GRAY, RGB, RGBA], ids=["gray", "RGB", "RGBA"])
def test_image_decode_keeps_both_bytes_of_16_bit_files(pixels):
    extra = [2] if pixels.shape[2] == 4 else []
    files = [png(pixels)]
    files += [tiff(pixels, order, deflate=deflate, extra=extra) for order in "<>" for deflate in (False, True)]
    if pixels.shape[2] < 4:
        files.append(pnm(pixels if pixels.shape[2] == 3 else pixels[:, :, 0], 2**16 - 1))
    for data in files:
        decoded = image.decode(data, SIZE, pixels.shape[2], value_range=FULL)
        np.testing.assert_array_equal(stored(decoded), pixels)


@pytest.mark.parametrize("order", ["<", ">"])
@pytest.mark.parametrize("deflate", [False, True])
@pytest.mark.parametrize("dtype", ["int8", "int16", "int32", "float32"])
def test_image_decode_reads_signed_and_float_tiff(dtype, deflate, order):
    pixels = np.array([[-100, 0, 27, 100]], dtype)
    data, depth = tiff(pixels, order, deflate=deflate), "float" if dtype == "float32" else dtype
    decoded = image.decode(data, (1, 4), 1, value_range=Range(-100, 100, depth))
    np.testing.assert_allclose(decoded[0, :, 0], [0, 127.5, 127 * 1.275, 255], rtol=1e-6)


def test_image_decode_reads_unsigned_32_bit_tiff():
    pixels = np.array([[0, 2**31 - 1, 2**31, 2**32 - 1]], np.uint32)
    decoded = image.decode(tiff(pixels), (1, 4), 1, value_range=Range(0, 2**32 - 1, "uint32"))
    np.testing.assert_allclose(decoded[0, :, 0], [0, 127.5, 127.5, 255], rtol=1e-6)


@pytest.mark.parametrize("maximum", [256, 1023, 4095])
def test_image_decode_reads_the_values_of_pgm_and_ppm_below_their_maximum(maximum):
    for pixels in (RANDOM.integers(0, maximum + 1, SIZE), RANDOM.integers(0, maximum + 1, (*SIZE, 3))):
        data = pnm(pixels, maximum)
        fitted = TYPE.load(TYPE.fit([data], options(channels=np.atleast_3d(pixels).shape[2])))
        assert fitted == Range(0, maximum, f"uint16/{maximum}")
        decoded = image.decode(data, SIZE, np.atleast_3d(pixels).shape[2], value_range=fitted)
        np.testing.assert_array_equal(np.rint(decoded * maximum / 255), np.atleast_3d(pixels))
        with pytest.raises(ValueError, match=r"truncated: \d+ of \d+ bytes"):
            image.decode(data[:-1], SIZE, 3, value_range=fitted)


def test_image_decode_keeps_4000_levels_of_a_12_bit_ramp():
    ramp = np.arange(4096, dtype=np.uint16).reshape(64, 64)
    fitted = TYPE.load(TYPE.fit([png(ramp)], options()))
    decoded, _ = TYPE.decode(png(ramp), options(size=(64, 64)), fitted)
    assert len(np.unique(decoded)) > 4000
    assert (np.diff(decoded.ravel()) >= 0).all()
    assert (decoded.min(), decoded.max()) == (0, 255)
    unclipped = np.diff(decoded.ravel())[10:-10]
    np.testing.assert_allclose(unclipped, unclipped.mean(), rtol=1e-2)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (png(RGBA[:, :, :2]), r"uint16 pixels \(LA;16B\) cannot be read in full: save them as gray, RGB or RGBA"),
        (tiff(GRAY, photometric=0), r"uint16 pixels \(white is 0\) cannot be read in full"),
        (tiff(RGB, planar=True), r"\(R by channel\)"),
        (tiff(RGB, planar=True, deflate=True), r"\(RGB;16N by channel\)"),
        (tiff(RGBA, extra=[1]), r"\(RGBa;16L\)"),
        (tiff(RGBA, extra=[0]), r"\(RGBX;16L\)"),
        (tiff(RGBA, photometric=5), r"\(CMYK;16L\)"),
        (b"P2\n2 1\n65535\n1 65535\n", "text PPM"),
        (tiff(np.zeros((2, 2, 13), np.uint16), photometric=1, extra=[0] * 12), "bands, bits or compression"),
        (tiff(np.zeros((2, 2), np.float64)), "bands, bits or compression"),
    ],
    ids=itertools.count(),
)
def test_image_decode_rejects_deep_files_that_pillow_cannot_read_in_full(data, reason):
    with pytest.raises(ValueError, match=reason) as error:
        image.decode(data, SIZE, 3, value_range=FULL)
    assert len(str(error.value)) <= 200


@pytest.mark.parametrize("bad", [np.nan, np.inf, -3.4e38])
def test_image_decode_rejects_floats_that_are_no_pixels(bad):
    pixels = np.float32([[0, bad], [1, 2]])
    for data in (pixels, tiff(pixels)):
        with pytest.raises(ValueError, match="not finite" if abs(bad) > 1e39 or bad != bad else "reach 3.4e\\+38"):
            image.decode(data, (2, 2), 1, value_range=Range(0, 1, "float"))


@pytest.mark.parametrize("orientation", [1, 6, 7])
def test_image_decode_turns_deep_files_upright(orientation):
    turned = {1: RGB, 6: np.rot90(RGB), 7: RGB[::-1, ::-1].transpose(1, 0, 2)}[orientation]
    for order in "<>":
        for pixels in (turned, turned[:, :, :1]):
            data = tiff(pixels, order, orientation=orientation)
            decoded = image.decode(data, SIZE, pixels.shape[2], value_range=FULL)
            np.testing.assert_array_equal(stored(decoded), RGB[:, :, : pixels.shape[2]])


# --- Depths and ranges ---


@pytest.mark.parametrize(
    ("data", "depth"),
    [
        (png(GRAY), "uint16"),
        (png(RGB), "uint16"),
        (tiff(RGB), "uint16"),
        (tiff(GRAY.astype(np.int32)), "int32"),
        (tiff(GRAY.astype(np.float32)), "float"),
        (tiff(GRAY.astype(np.int8)), "int8"),
        (pnm(GRAY[:, :, 0] % 1024, 1023), "uint16/1023"),
        (GRAY, "uint16"),
        (GRAY.astype(np.float64), "float"),
        (GRAY.astype(np.int64), "int64"),
    ],
    ids=itertools.count(),
)
def test_image_decode_of_deep_pixels_needs_the_range_of_their_depth(data, depth):
    with pytest.raises(ValueError, match=rf"{depth} pixels need the option range=\(low, high\)"):
        TYPE.decode(data, options(), None)
    with pytest.raises(ValueError, match=f"{depth} pixels, where the range is that of uint32 pixels"):
        TYPE.decode(data, options(), Range(0, 1, "uint32"))
    pixels, mask = TYPE.decode(data, options(), Range(0, 1, depth))
    assert (pixels.dtype, pixels.shape, mask.tolist()) == (np.float32, (*SIZE, 1), [True])
    given, _ = TYPE.decode(data, options(range=(0, 1)), None)
    np.testing.assert_array_equal(given, pixels)


def test_image_decode_does_not_mix_8_bit_and_deep_pixels():
    gray = (GRAY >> 8).astype(np.uint8)
    for data in (gray, tiff(gray)):
        for changes, fitted in (({}, FULL), ({"range": (0, 4095)}, None)):
            with pytest.raises(ValueError, match=r"uint8 pixels, where the range is that of (uint16|deeper) pixels"):
                TYPE.decode(data, options(**changes), fitted)


def test_image_range_clips_and_maps_stored_values():
    pixels = np.array([[0, 1000, 2000, 3000, 4000]], np.uint16)
    decoded = image.decode(pixels, (1, 5), 1, value_range=Range(1000, 3000, "uint16"))
    np.testing.assert_array_equal(decoded[0, :, 0], [0, 0, 127.5, 255, 255])


def test_image_range_of_8_bit_images_is_given_by_the_option():
    rgb = RANDOM.integers(0, 256, (*SIZE, 3), np.uint8)
    palette = Image.fromarray(rgb[:, :, 0]).convert("P")
    config = options(range=(50, 101), channels=3)
    for data, pixels in ((rgb, rgb), (tiff(rgb), rgb), (saved(palette, "PNG"), np.array(palette.convert("RGB")))):
        fitted = TYPE.load(TYPE.fit([data], config))
        assert fitted == Range(50, 101, "uint8")
        decoded, _ = TYPE.decode(data, config, fitted)
        np.testing.assert_allclose(decoded, np.clip((pixels - 50.0) * 5, 0, 255))


def test_image_range_of_a_palette_keeps_its_alpha():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    data = saved(palette, "PNG", transparency=bytes([128, 255]))
    decoded = image.decode(data, (1, 2), 4, value_range=Range(0, 51, "uint8"))
    np.testing.assert_allclose(decoded, [[[50, 100, 150, 128], [255, 255, 250, 255]]])


def saved(pil_image, kind, **parameters):
    file = io.BytesIO()
    pil_image.save(file, kind, **parameters)
    return file.getvalue()


def test_image_shape_is_float32_with_a_range_alone():
    assert TYPE.shape(options(), None) == ((*SIZE, 1), np.uint8, 1)
    for config, fitted in ((options(), FULL), (options(range=(0, 1)), None)):
        assert TYPE.shape(config, fitted) == ((*SIZE, 1), np.float32, 1)


# --- Fitting ---


def test_image_fit_of_8_bit_images_is_empty_and_loads_no_pixels(monkeypatch):
    gray = (GRAY >> 8).astype(np.uint8)
    values = [
        gray,
        tiff(gray),
        saved(Image.new("1", (8, 8)), "PNG"),
        saved(Image.new("RGB", (8, 8)), "JPEG"),
        None,
        b"",
    ]
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("loaded"))
    assert TYPE.fit(values, options()) == ""
    assert TYPE.fit([], options()) == ""


def test_image_fit_takes_percentiles_over_all_images():
    ramp = np.arange(10_001, dtype=np.uint16).reshape(73, 137)
    fitted = TYPE.load(TYPE.fit([png(ramp), tiff(ramp + np.uint16(20_000))], options()))
    assert fitted.depth == "uint16"
    np.testing.assert_allclose(
        (fitted.low, fitted.high), np.percentile([*range(10_001), *range(20_000, 30_001)], (0.1, 99.9))
    )
    floats = (ramp / 10_000 - 0.5).astype(np.float32)
    fitted = TYPE.load(TYPE.fit([floats, tiff(floats)], options()))
    np.testing.assert_allclose((fitted.low, fitted.high, fitted.depth == "float"), (-0.499, 0.499, True), atol=1e-6)


def test_image_fit_samples_pixels_of_large_images_evenly():
    ramp = np.arange(1000 * 1000, dtype=np.float32).reshape(1000, 1000)  # 20 times the pixels that are sampled
    fitted = TYPE.load(TYPE.fit([ramp], options()))
    np.testing.assert_allclose((fitted.low, fitted.high), (1000, 999_000), rtol=0.03)


def test_image_fit_uses_the_most_frequent_depth_and_skips_unreadable_images():
    nan = np.full(SIZE, np.nan)
    values = [GRAY, np.uint8(GRAY >> 8), GRAY, png(GRAY)[:60], b"no image", nan, nan, nan, nan, GRAY[:, :, [0] * 5]]
    assert TYPE.fit(values, options()) == TYPE.fit([GRAY, GRAY], options())
    assert TYPE.fit([GRAY, np.uint8(GRAY >> 8), np.uint8(GRAY >> 8)], options()) == ""


def test_image_fit_leaves_out_alpha_that_is_dropped():
    rgba = np.concatenate([RGB % 4096, np.full((*SIZE, 1), 2**16 - 1, np.uint16)], axis=2)
    for data, channels in ((png(rgba), 3), (png(rgba), 4), (tiff(rgba, extra=[2]), 3), (rgba, 3)):
        assert TYPE.load(TYPE.fit([data], options(channels=channels))).high < 4096
    assert TYPE.load(TYPE.fit([rgba], options(channels=4))).high == 2**16 - 1  # four bands of an array


def test_image_fit_keeps_the_option_and_records_the_depth():
    text = TYPE.fit([png(GRAY)], options(range=(-5, 4095.5)))
    assert json.loads(text) == {"low": -5, "high": 4095.5, "depth": "uint16"}
    assert TYPE.load(text) == Range(-5, 4095.5, "uint16")


def test_image_fit_of_one_value_has_a_range():
    flat = np.full(SIZE, 7, np.uint16)
    assert TYPE.load(TYPE.fit([flat], options())) == Range(7, 8, "uint16")
    large = np.zeros((100, 100), np.uint16)
    large[3, 3] = 900  # rarer than the percentiles
    assert TYPE.load(TYPE.fit([large], options())) == Range(0, 900, "uint16")


def test_load_learns_the_range_of_evenly_spaced_training_rows_and_saves_it(monkeypatch):
    def row(i, scale=1):
        return planted.row(i, image=np.uint16(scale * i * np.ones((8, 8, 3))))

    rows = [row(i) for i in range(2000)]
    planted.plant(monkeypatch, train=rows, test=[row(i, scale=3) for i in range(1000)])
    config = configs.read(planted.config("image")).data
    data = dataset.load(config, seed=0)
    fitted = TYPE.load(data.fitted["image"])
    assert fitted.depth == "uint16"
    assert 0 <= fitted.low < 50 and 1950 < fitted.high <= 1999
    inputs = data.splits["train"].take(np.arange(4)).inputs["image"]
    expected = (data.splits["train"].ids[:4] - fitted.low) * 255 / (fitted.high - fitted.low)
    assert inputs.dtype == np.float32
    np.testing.assert_allclose(inputs[:, 0, 0, 0], np.clip(expected, 0, 255), rtol=1e-4)
    resumed = dataset.load(config, seed=0, splits=("test",), saved=json.loads(json.dumps(data.saved())))
    assert resumed.fitted == data.fitted
    assert resumed.splits["test"].take(np.array([999])).inputs["image"].max() == 255


def test_load_of_8_bit_images_saves_no_range(monkeypatch):
    rows = [planted.row(i) for i in range(40)]
    planted.plant(monkeypatch, train=rows, test=rows[:9])
    data = dataset.load(configs.read(planted.config("image")).data, seed=0)
    assert data.fitted == {}
    assert data.splits["train"].take(np.arange(4)).inputs["image"].dtype == np.uint8


# --- Channels and sizes ---


@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_image_decode_resizes_any_number_of_channels_each_by_itself(dtype):
    bands = RANDOM.integers(0, 256, (12, 14, 13)).astype(dtype)
    value_range = None if dtype == np.uint8 else Range(0, 255, "float")
    np.testing.assert_array_equal(image.decode(bands, (12, 14), 13, value_range=value_range), bands)
    small = image.decode(bands, SIZE, 13, value_range=value_range)
    assert (small.shape, small.dtype) == ((*SIZE, 13), dtype)
    for band in range(13):
        alone = image.decode(bands[:, :, band], SIZE, 1, value_range=value_range)
        np.testing.assert_array_equal(small[:, :, [band]], alone)


def test_image_resize_of_floats_averages_as_that_of_8_bits():
    pixels = RANDOM.integers(0, 256, (40, 42, 3), np.uint8)
    small = image.decode(pixels.astype(np.float32), SIZE, 3, value_range=Range(0, 255, "float"))
    np.testing.assert_allclose(small, image.decode(pixels, SIZE, 3).astype(float), atol=1.01)
    flat = image.decode(np.full((40, 42), 0.3), SIZE, 1, value_range=Range(0, 1, "float"))
    np.testing.assert_allclose(flat, 0.3 * 255, rtol=1e-5)


@pytest.mark.parametrize("count", [1, 2, 3, 4])
@pytest.mark.parametrize("channels", [1, 2, 3, 4])
def test_image_decode_converts_channels_of_deep_pixels_as_of_8_bits(count, channels):
    pixels = RANDOM.integers(0, 256, (*SIZE, count), np.uint8)
    expected = image.decode(pixels, SIZE, channels)
    decoded = image.decode(pixels.astype(np.uint16) * 257, SIZE, channels, value_range=FULL)
    np.testing.assert_allclose(decoded, expected.astype(float), atol=0.51)


def test_image_decode_keeps_the_alpha_of_files_outside_the_range():
    decoded = image.decode(png(RGBA), SIZE, 4, value_range=Range(0, 4095, "uint16"))
    np.testing.assert_array_equal(stored(decoded[:, :, 3]), RGBA[:, :, 3])
    assert (image.decode(png(RGB), SIZE, 4, value_range=Range(0, 1, "uint16"))[:, :, 3] == 255).all()


@pytest.mark.parametrize("shape", [(3, 8, 8), (3, 8, 4), (3, 8, 1), (13, 8, 8), (8, 8, 5), (8, 8, 13)])
@pytest.mark.parametrize("dtype", [np.uint8, np.float32])
def test_image_decode_rejects_channels_first_and_other_channels(shape, dtype):
    value_range = None if dtype == np.uint8 else Range(0, 1, "float")
    with pytest.raises(ValueError, match=r"pixels are \[\d+, 8, \d+\], not \[h, w, c\] with 3 channels"):
        image.decode(np.zeros(shape, dtype), (8, 8), 3, value_range=value_range)


def test_image_decode_rejects_channels_first_of_many_bands_and_files_without_them():
    with pytest.raises(ValueError, match=r"pixels are \[13, 8, 8\], not \[h, w, c\] with 13 channels"):
        image.decode(np.zeros((13, 8, 8), np.uint8), (8, 8), 13)
    for data, value_range in ((tiff(np.zeros(SIZE, np.uint8)), None), (png(RGB), FULL)):
        with pytest.raises(ValueError, match="not 13"):
            image.decode(data, SIZE, 13, value_range=value_range)


# --- On the device ---


@pytest.mark.parametrize(
    "changes",
    [{}, {"flip": 0.5, "crop": 2}, {"flip": 0.5, "crop": 2, "rotate": 20.0, "brightness": 0.2, "contrast": 0.2}],
)
def test_augment_and_normalize_treat_float_images_as_8_bit_ones(changes):
    images = RANDOM.integers(0, 256, (4, 7, 7, 13), np.uint8)
    keys = rng.row_keys(rng.key(0, "augment", 0), jnp.arange(4))
    config = {**image.AUGMENT, **changes}
    expected = image.augment(jnp.asarray(images), keys, config)
    augmented = image.augment(jnp.asarray(images, jnp.float32), keys, config)
    assert augmented.dtype == jnp.float32
    np.testing.assert_allclose(augmented, expected, atol=1e-3)
    mean = tuple(np.linspace(0.1, 0.9, 13).tolist())
    np.testing.assert_allclose(
        image.normalize(augmented, mean, (0.5,)), image.normalize(expected, mean, (0.5,)), atol=1e-4
    )
