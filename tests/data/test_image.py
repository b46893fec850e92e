import io

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from mmfusion import rng
from mmfusion.data import image
from mmfusion.errors import UserError

PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 3), np.uint8)


def file(picture, kind="PNG", **options):
    picture = picture if isinstance(picture, Image.Image) else Image.fromarray(picture)
    buffer = io.BytesIO()
    picture.save(buffer, kind, **options)
    return buffer.getvalue()


def test_lossless_file_decodes_to_its_pixels():
    np.testing.assert_array_equal(image.decode(file(PIXELS), (6, 8), 3), PIXELS)
    np.testing.assert_array_equal(image.decode(PIXELS, (6, 8), 3), PIXELS)


def test_gray_becomes_three_equal_channels_and_back():
    gray = PIXELS[:, :, 0]
    for data in (gray, gray[:, :, None], file(gray)):
        rgb = image.decode(data, (6, 8), 3)
        np.testing.assert_array_equal(rgb, np.repeat(gray[:, :, None], 3, axis=2))
        np.testing.assert_array_equal(image.decode(rgb, (6, 8), 1)[:, :, 0], gray)


def test_colour_becomes_luma():
    luma = PIXELS @ np.array([0.299, 0.587, 0.114])
    assert np.abs(image.decode(file(PIXELS), (6, 8), 1)[:, :, 0] - luma).max() <= 1


def test_alpha_is_kept_dropped_or_added():
    rgba = np.concatenate([PIXELS, PIXELS[:, :, :1]], axis=2)
    np.testing.assert_array_equal(image.decode(file(rgba), (6, 8), 4), rgba)
    np.testing.assert_array_equal(image.decode(file(rgba), (6, 8), 3), PIXELS)
    np.testing.assert_array_equal(image.decode(PIXELS, (6, 8), 4)[:, :, 3], 255)


@pytest.mark.filterwarnings("error")
def test_palette_keeps_its_colours_and_transparency():
    palette = Image.new("P", (2, 1))
    palette.putpalette([10, 20, 30, 200, 100, 50])
    palette.putpixel((1, 0), 1)
    np.testing.assert_array_equal(image.decode(file(palette), (1, 2), 3), [[[10, 20, 30], [200, 100, 50]]])
    seen = image.decode(file(palette, transparency=bytes([128, 255])), (1, 2), 4)
    np.testing.assert_array_equal(seen[0, :, 3], [128, 255])


def test_sixteen_bits_keep_their_range():
    deep = np.array([[0, 256, 32768, 65535]], np.uint16)
    np.testing.assert_array_equal(image.decode(file(deep), (1, 4), 1)[0, :, 0], [0, 1, 128, 255])


def test_resize_takes_height_first_and_keeps_a_constant():
    assert image.decode(file(PIXELS), (3, 5), 3).shape == (3, 5, 3)
    assert (image.decode(np.full((7, 9, 3), 77, np.uint8), (4, 3), 3) == 77).all()
    ramp = np.repeat(np.linspace(0, 255, 16).astype(np.uint8)[None], 4, axis=0)  # dark to bright along the width
    small = image.decode(ramp, (2, 4), 1)[:, :, 0].astype(int)
    assert (np.diff(small, axis=1) > 30).all()
    assert (np.diff(small, axis=0) == 0).all()


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty"),
        (b"not a picture at all", "not an image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n%%EndComments\n{} loop\n", "not an image"),
        (file(PIXELS)[:-30], "trunc"),
        (file(PIXELS, "JPEG")[:200], "Truncated"),
        (file(Image.new("F", (2, 2)), "TIFF"), "mode F"),
        (np.zeros((2, 2, 3), np.float32), "float32"),
        (np.zeros((0, 2, 3), np.uint8), "0"),
        (np.zeros((2, 2, 5), np.uint8), "5 channels"),
    ],
)
def test_bad_data_raise_a_short_reason(data, reason):
    with pytest.raises(ValueError, match=reason) as error:
        image.decode(data, (6, 8), 3)
    assert 0 < len(str(error.value)) <= 200


def test_large_images_are_refused_before_their_pixels_are_decoded(monkeypatch):
    bomb = file(Image.new("1", (9000, 6000)))
    assert len(bomb) < 10_000
    monkeypatch.setattr(Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match="9000 x 6000"):
        image.decode(bomb, (6, 8), 3)


IMAGES = jnp.asarray(np.random.default_rng(1).integers(0, 256, (4, 7, 7, 3), np.uint8))


def augment(images, ids=(3, 1, 4, 5), step=0, **options):
    keys = rng.row_keys(rng.key(0, "augment", step), jnp.asarray(ids))
    return np.asarray(image.augment(images, keys, {**image.AUGMENT, **options}))


def test_everything_off_traces_nothing():
    keys = rng.row_keys(rng.key(0), jnp.arange(4))
    assert not jax.make_jaxpr(lambda x, k: image.augment(x, k, image.AUGMENT))(IMAGES, keys).eqns


def test_flip_mirrors_left_and_right():
    np.testing.assert_array_equal(augment(IMAGES, flip=1.0), IMAGES[:, :, ::-1])
    some = augment(jnp.repeat(IMAGES[:1], 64, axis=0), ids=range(64), flip=0.5)
    mirrored = (some == np.asarray(IMAGES[0, :, ::-1])).all(axis=(1, 2, 3))
    assert ((some == np.asarray(IMAGES[0])).all(axis=(1, 2, 3)) ^ mirrored).all()
    assert 16 < mirrored.sum() < 48


def test_crop_is_a_shift_of_at_most_the_padding_with_edges_extended():
    pad = 2
    shifts = set()
    same = jnp.repeat(IMAGES[:1], 64, axis=0)
    padded = np.pad(np.asarray(IMAGES[0]), ((pad, pad), (pad, pad), (0, 0)), mode="edge")
    for row in augment(same, ids=range(64), crop=pad):
        found = [(y, x) for y in range(5) for x in range(5) if (padded[y : y + 7, x : x + 7] == row).all()]
        assert len(found) == 1
        shifts.add(found[0])
    assert {y for y, _ in shifts} == {x for _, x in shifts} == set(range(5))


def test_rotation_known_answers():
    picture = IMAGES[0]
    np.testing.assert_allclose(image.rotate(picture, 0.0), picture, atol=1e-4)
    np.testing.assert_allclose(image.rotate(picture, 90.0), np.rot90(picture), atol=2e-3)
    np.testing.assert_allclose(image.rotate(picture, 180.0), picture[::-1, ::-1], atol=2e-3)
    np.testing.assert_allclose(image.rotate(jnp.full((5, 8, 1), 9, jnp.uint8), 33.0), 9, atol=1e-4)


def test_rotation_matches_pillow_inside():
    smooth = np.add.outer(np.arange(33) * 3, np.arange(33) * 4).astype(np.float32)
    ours = np.asarray(image.rotate(jnp.asarray(smooth)[:, :, None], 20.0))[:, :, 0]
    theirs = np.asarray(Image.fromarray(smooth).rotate(20, Image.Resampling.BILINEAR))
    np.testing.assert_allclose(ours[8:-8, 8:-8], theirs[8:-8, 8:-8], atol=0.1)


def test_colour_stays_in_range_and_does_what_it_says():
    gray = jnp.full((4, 7, 7, 3), 100, jnp.uint8)
    bright = augment(gray, brightness=0.5)
    assert np.ptp(bright, axis=(1, 2, 3)).max() < 1e-3  # one factor a picture
    factors = bright[:, 0, 0, 0] / 100
    assert len(set(factors)) == 4
    assert (np.abs(factors - 1) <= 0.5).all()
    np.testing.assert_allclose(augment(gray, contrast=0.5, saturation=0.5), 100, atol=1e-3)
    means = augment(IMAGES // 4 + 96, contrast=0.5).mean(axis=(1, 2, 3))
    np.testing.assert_allclose(means, np.asarray(IMAGES // 4 + 96).mean(axis=(1, 2, 3)), rtol=1e-4)
    luma = np.array([0.299, 0.587, 0.114])
    colours = IMAGES // 4 + 96
    np.testing.assert_allclose(augment(colours, saturation=0.5) @ luma, np.asarray(colours) @ luma, atol=1e-2)
    wild = augment(IMAGES, brightness=0.9, contrast=0.9, saturation=0.9)
    assert wild.dtype == np.float32
    assert 0 <= wild.min() <= wild.max() <= 255


ALL = {"flip": 0.5, "crop": 2, "rotate": 20.0, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2}


def test_rows_depend_on_their_own_key_alone():
    whole = augment(IMAGES, **ALL)
    np.testing.assert_allclose(augment(IMAGES[2:3], ids=(4,), **ALL), whole[2:3], atol=1e-3)
    np.testing.assert_allclose(augment(IMAGES[::-1], ids=(5, 4, 1, 3), **ALL), whole[::-1], atol=1e-3)
    assert np.abs(augment(IMAGES, step=1, **ALL) - whole).max() > 1
    assert np.abs(augment(IMAGES, ids=(3, 1, 4, 6), **ALL) - whole)[3].max() > 1


def test_switching_one_operation_on_leaves_the_draws_of_the_others():
    flipped = augment(IMAGES, flip=0.5)
    np.testing.assert_allclose(augment(IMAGES, flip=0.5, brightness=1e-6), flipped, atol=1e-2)


def test_saturation_of_gray_images_is_refused():
    with pytest.raises(UserError, match="saturation"):
        augment(IMAGES[..., :1], saturation=0.1)


def test_normalize():
    mean, std = (0.5, 0.4, 0.3), (0.1, 0.2, 0.3)
    result = image.normalize(IMAGES, mean, std)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, (np.asarray(IMAGES) / 255 - mean) / std, rtol=1e-4, atol=1e-5)
