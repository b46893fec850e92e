"""Several images a row: their decoding, masks and augmentation."""

import jax
import numpy as np
import pytest

from mmfusion.data import image, images
from mmfusion.data.modalities import MODALITY_TYPES
from tests.planted import png

TYPE = images.TYPE
PIXELS = np.random.default_rng(0).integers(0, 256, (3, 4, 4, 3), np.uint8)


def options(**changes):
    return {"kind": "images", "feature": "x", **TYPE.options, "size": (4, 4), **changes}


def test_images_are_registered_with_the_options_of_an_image():
    assert MODALITY_TYPES["images"] is TYPE
    assert TYPE.options == {"count": 4, "pool": "none", **image.PIXEL_OPTIONS, "augment": image.AUGMENT}
    assert TYPE.shape(options(count=5, channels=1), None) == ((5, 4, 4, 1), np.uint8, 5)


@pytest.mark.parametrize("value", [PIXELS, list(PIXELS), tuple(PIXELS), np.array([*PIXELS, None], object)[:3]])
def test_images_are_decoded_in_order_and_padded(value):
    x, mask = TYPE.decode(value, options(), None)
    np.testing.assert_array_equal(x[:3], PIXELS)
    assert x.dtype == np.uint8 and not x[3].any()
    np.testing.assert_array_equal(mask, [1, 1, 1, 0])


def test_images_that_are_missing_are_masked_in_their_place():
    x, mask = TYPE.decode([png(10), None, PIXELS[0], b""], options(), None)
    np.testing.assert_array_equal(mask, [1, 0, 1, 0])
    np.testing.assert_array_equal(x[0], np.full((4, 4, 3), 10))
    np.testing.assert_array_equal(x[2], PIXELS[0])
    assert not x[1].any()


def test_images_beyond_the_count_are_left_out():
    x, mask = TYPE.decode([*PIXELS, b"not read"], options(count=2), None)
    np.testing.assert_array_equal(x, PIXELS[:2])
    assert mask.all()


@pytest.mark.parametrize("value", [None, "", b"", [], [None, b""], np.zeros((0, 4, 4, 3), np.uint8)])
def test_images_without_one_are_absent(value):
    assert TYPE.decode(value, options(), None) is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (PIXELS[0], r"must be a list of images or pixels \[k, h, w, c\], got an array \[4, 4, 3\]"),
        (png(10), "must be a list of images .*, got bytes"),
        ("a.png", "must be a list of images .*, got str"),
        ([png(10), b"no image"], "image 1: "),
        (PIXELS.astype(np.float64), "image 0: float pixels need"),
    ],
)
def test_images_refuse_other_values(value, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        TYPE.decode(value, options(), None)


def test_images_are_augmented_independently_by_the_key_of_their_row():
    batch = np.stack([np.stack([PIXELS[0]] * 8), np.stack([PIXELS[1]] * 8)])  # [2, 8, 4, 4, 3]
    keys = jax.random.split(jax.random.key(0), 2)
    flipped = np.asarray(TYPE.augment(batch, keys, {**image.AUGMENT, "flip": 0.5}))
    is_flipped = (flipped == batch[:, :, :, ::-1]).all(axis=(2, 3, 4))
    is_same = (flipped == batch).all(axis=(2, 3, 4))
    assert (is_flipped ^ is_same).all()
    assert 0 < is_flipped[0].sum() < 8 and (is_flipped[0] != is_flipped[1]).any()
    alone = TYPE.augment(batch[1:], keys[1:], {**image.AUGMENT, "flip": 0.5})
    np.testing.assert_array_equal(alone[0], flipped[1])
    np.testing.assert_array_equal(TYPE.augment(batch, keys, image.AUGMENT), batch)
