import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import ExifTags, Image

from mmfusion import rng
from mmfusion.data import image
from tests.errors import rejects

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)


def encode(pixels, kind="PNG", **options):
    pil_image = pixels if isinstance(pixels, Image.Image) else Image.fromarray(pixels)
    buffer = io.BytesIO()
    pil_image.save(buffer, kind, **options)
    return buffer.getvalue()


def test_image_decode_is_exact_for_lossless_files():
    np.testing.assert_array_equal(image.decode(encode(PIXELS), (6, 8), 3), PIXELS)
    np.testing.assert_array_equal(image.decode(PIXELS, (6, 8), 3), PIXELS)


def test_image_decode_converts_between_gray_and_rgb():
    gray = PIXELS[:, :, 0]
    for data in (gray, gray[:, :, None], encode(gray)):
        rgb = image.decode(data, (6, 8), 3)
        np.testing.assert_array_equal(rgb, np.repeat(gray[:, :, None], 3, axis=2))
        np.testing.assert_array_equal(image.decode(rgb, (6, 8), 1)[:, :, 0], gray)


def test_image_decode_converts_colour_to_luma():
    luma = PIXELS @ np.array([0.299, 0.587, 0.114])
    assert np.abs(image.decode(encode(PIXELS), (6, 8), 1)[:, :, 0] - luma).max() <= 1


def test_image_decode_keeps_drops_or_adds_alpha():
    rgba = np.concatenate([PIXELS, PIXELS[:, :, :1]], axis=2)
    np.testing.assert_array_equal(image.decode(encode(rgba), (6, 8), 4), rgba)
    np.testing.assert_array_equal(image.decode(encode(rgba), (6, 8), 3), PIXELS)
    np.testing.assert_array_equal(image.decode(PIXELS, (6, 8), 4)[:, :, 3], 255)


@pytest.mark.filterwarnings("error")
def test_image_decode_of_palettes_keeps_colours_and_alpha():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    np.testing.assert_array_equal(image.decode(encode(palette), (1, 2), 3), [[[10, 20, 30], [200, 100, 50]]])
    decoded = image.decode(encode(palette, transparency=bytes([128, 255])), (1, 2), 4)
    np.testing.assert_array_equal(decoded[0, :, 3], [128, 255])


UPRIGHT = np.kron(np.arange(6, dtype=np.uint8).reshape(2, 3, 1), np.ones((16, 16, 1), np.uint8)) * np.uint8([40, 20, 1])
STORED = {  # by EXIF orientation: where its first row and column are in the upright image
    1: UPRIGHT,  # top, left
    2: UPRIGHT[:, ::-1],  # top, right
    3: UPRIGHT[::-1, ::-1],  # bottom, right
    4: UPRIGHT[::-1],  # bottom, left
    5: UPRIGHT.transpose(1, 0, 2),  # left, top
    6: UPRIGHT[:, ::-1].transpose(1, 0, 2),  # right, top
    7: UPRIGHT[::-1, ::-1].transpose(1, 0, 2),  # right, bottom
    8: UPRIGHT[::-1].transpose(1, 0, 2),  # left, bottom
}


@pytest.mark.parametrize("orientation", STORED)
@pytest.mark.parametrize("kind", ["JPEG", "PNG", "TIFF", "WEBP"])
def test_image_decode_turns_files_upright(kind, orientation):
    exif = Image.Exif()
    exif[ExifTags.Base.Orientation] = orientation
    settings = {"WEBP": {"lossless": True}, "JPEG": {"subsampling": 0, "quality": 98}}.get(kind, {})
    data = encode(STORED[orientation], kind, exif=exif, **settings)
    decoded = image.decode(data, UPRIGHT.shape[:2], 3)
    np.testing.assert_allclose(decoded, UPRIGHT.astype(int), atol=3 if kind == "JPEG" else 0)


@pytest.mark.filterwarnings("ignore:Corrupt EXIF")
def test_image_decode_ignores_metadata_that_cannot_be_read():
    for exif in (b"Exif\0\0no TIFF", b"Exif\0\0II*\0\x08\0\0\0\x05\0cut"):
        np.testing.assert_array_equal(image.decode(encode(PIXELS, exif=exif), (6, 8), 3), PIXELS)


def test_image_resize_takes_height_first_and_keeps_constants():
    assert image.decode(encode(PIXELS), (3, 5), 3).shape == (3, 5, 3)
    assert (image.decode(np.full((7, 9, 3), 77, np.uint8), (4, 3), 3) == 77).all()
    ramp = np.repeat(np.linspace(0, 255, 16).astype(np.uint8)[None], 4, axis=0)  # increases along the width
    small = image.decode(ramp, (2, 4), 1)[:, :, 0].astype(int)
    assert (np.diff(small, axis=1) > 30).all()
    assert (np.diff(small, axis=0) == 0).all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"not an image at all", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n{} loop\n", "not an image"),
        (encode(PIXELS)[:-30], "trunc"),
        (encode(PIXELS, "JPEG")[:200], "Truncated"),
        (np.zeros((2, 2, 3), bool), "bool"),
        (np.zeros((0, 2, 3), np.uint8), "0"),
        (np.zeros((2, 2, 5), np.uint8), r"2, 5\], not \[h, w, c\] with 3 channels"),
    ],
)
def test_image_decode_rejects_bad_data_with_a_short_reason(data, reason):
    with pytest.raises(ValueError, match=reason) as error:
        image.decode(data, (6, 8), 3)
    assert 0 < len(str(error.value)) <= 200


def test_image_decode_rejects_large_images_by_header(monkeypatch):
    bomb = encode(Image.new("1", (9000, 6000)))
    assert len(bomb) < 10_000
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="9000 x 6000"):
        image.decode(bomb, (6, 8), 3)


IMAGES = jnp.asarray(np.random.default_rng(1).integers(0, 256, (4, 7, 7, 3), np.uint8))


def augment(images, ids=(3, 1, 4, 5), step=0, **options):
    keys = rng.row_keys(rng.key(0, "augment", step), jnp.asarray(ids))
    return np.asarray(image.augment(images, keys, {**image.AUGMENT, **options}))


def test_augment_with_default_options_is_the_identity():
    keys = rng.row_keys(rng.key(0), jnp.arange(4))
    assert not jax.make_jaxpr(lambda x, k: image.augment(x, k, image.AUGMENT))(IMAGES, keys).eqns


def test_augment_flip_mirrors_horizontally():
    np.testing.assert_array_equal(augment(IMAGES, flip=1.0), IMAGES[:, :, ::-1])
    augmented = augment(jnp.repeat(IMAGES[:1], 64, axis=0), ids=range(64), flip=0.5)
    mirrored = (augmented == np.asarray(IMAGES[0, :, ::-1])).all(axis=(1, 2, 3))
    assert ((augmented == np.asarray(IMAGES[0])).all(axis=(1, 2, 3)) ^ mirrored).all()
    assert 16 < mirrored.sum() < 48


def test_augment_crop_shifts_by_at_most_the_padding():
    pad = 2
    shifts = set()
    repeated = jnp.repeat(IMAGES[:1], 64, axis=0)
    padded = np.pad(np.asarray(IMAGES[0]), ((pad, pad), (pad, pad), (0, 0)), mode="edge")
    for row in augment(repeated, ids=range(64), crop=pad):
        found = [(y, x) for y in range(5) for x in range(5) if (padded[y : y + 7, x : x + 7] == row).all()]
        assert len(found) == 1
        shifts.add(found[0])
    assert {y for y, _ in shifts} == {x for _, x in shifts} == set(range(5))


def test_rotate_is_exact_for_multiples_of_90_degrees():
    pixels = IMAGES[0]
    np.testing.assert_allclose(image.rotate(pixels, 0.0), pixels, atol=1e-4)
    np.testing.assert_allclose(image.rotate(pixels, 90.0), np.rot90(pixels), atol=2e-3)
    np.testing.assert_allclose(image.rotate(pixels, 180.0), pixels[::-1, ::-1], atol=2e-3)
    np.testing.assert_allclose(image.rotate(jnp.full((5, 8, 1), 9, jnp.uint8), 33.0), 9, atol=1e-4)


def test_rotate_matches_pillow_away_from_borders():
    smooth = np.add.outer(np.arange(33) * 3, np.arange(33) * 4).astype(np.float32)
    rotated = np.asarray(image.rotate(jnp.asarray(smooth)[:, :, None], 20.0))[:, :, 0]
    expected = np.asarray(Image.fromarray(smooth).rotate(20, Image.Resampling.BILINEAR))
    np.testing.assert_allclose(rotated[8:-8, 8:-8], expected[8:-8, 8:-8], atol=0.1)


def test_augment_colour_changes_brightness_contrast_and_saturation():
    gray = jnp.full((4, 7, 7, 3), 100, jnp.uint8)
    bright = augment(gray, brightness=0.5)
    assert np.ptp(bright, axis=(1, 2, 3)).max() < 1e-3  # one factor per image
    factors = bright[:, 0, 0, 0] / 100
    assert len(set(factors)) == 4
    assert (np.abs(factors - 1) <= 0.5).all()
    np.testing.assert_allclose(augment(gray, contrast=0.5, saturation=0.5), 100, atol=1e-3)
    means = augment(IMAGES // 4 + 96, contrast=0.5).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(means, np.asarray(IMAGES // 4 + 96).mean(axis=(1, 2, 3)), rtol=1e-4)
    luma = np.array([0.299, 0.587, 0.114])
    colours = IMAGES // 4 + 96
    np.testing.assert_allclose(augment(colours, saturation=0.5) @ luma, np.asarray(colours) @ luma, atol=1e-2)
    strong = augment(IMAGES, brightness=0.9, contrast=0.9, saturation=0.9)
    assert strong.dtype == np.float32
    assert 0 <= strong.min() <= strong.max() <= 255


ALL_OPTIONS = {"flip": 0.5, "crop": 2, "rotate": 20.0, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2}


def test_augment_depends_on_each_rows_key_only():
    batch = augment(IMAGES, **ALL_OPTIONS)
    np.testing.assert_allclose(augment(IMAGES[2:3], ids=(4,), **ALL_OPTIONS), batch[2:3], atol=1e-3)
    np.testing.assert_allclose(augment(IMAGES[::-1], ids=(5, 4, 1, 3), **ALL_OPTIONS), batch[::-1], atol=1e-3)
    assert np.abs(augment(IMAGES, step=1, **ALL_OPTIONS) - batch).max() > 1
    assert np.abs(augment(IMAGES, ids=(3, 1, 4, 6), **ALL_OPTIONS) - batch)[3].max() > 1


def test_augment_operations_use_independent_random_numbers():
    flipped = augment(IMAGES, flip=0.5)
    np.testing.assert_allclose(augment(IMAGES, flip=0.5, brightness=1e-6), flipped, atol=1e-2)


def test_augment_rejects_saturation_of_gray_images():
    with rejects("augment.saturation", 0.1, says="not 1"):
        augment(IMAGES[..., :1], saturation=0.1)


def test_normalize_subtracts_mean_and_divides_by_std():
    mean, std = (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)
    result = image.normalize(IMAGES, mean, std)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, (np.asarray(IMAGES) / 255 - mean) / std, rtol=1e-4, atol=1e-5)
