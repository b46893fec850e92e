import numpy as np
import pytest

from mmfusion.data import text
from mmfusion.data.decoding import BadRow, BadTarget, Reader, empty_batch, fill_row
from mmfusion.data.text import as_string
from mmfusion.errors import UserError
from tests import planted

CONFIG = planted.config(tasks="label+tags+amount")
READER = Reader(
    CONFIG.data.modalities.to_dict(),
    CONFIG.data.targets.to_dict(),
    {"label": 2, "tags": 3, "amount": 1},
    {"text": text.train_tokenizer([planted.row(i)["text"] for i in range(9)], "word", 50)},
)


def fill(*rows):
    batch = empty_batch(READER, len(rows) + 1)  # one padding row
    for position, row in enumerate(rows):
        fill_row(batch, position, row, 100 + position, READER)
    return batch


def test_fill_row_decodes_every_modality():
    batch = fill(planted.row(5))
    assert (batch.inputs["image"][0] == 25).all()
    words = [READER.fitted["text"].id_to_token(i) for i in batch.inputs["text"][0]]
    assert words == ["row", "5", "number5", "[PAD]", "[PAD]", "[PAD]"]
    np.testing.assert_array_equal(batch.mask["text"][0], [1, 1, 1, 0, 0, 0])
    np.testing.assert_allclose(batch.inputs["audio"][0], np.sin(np.arange(100) * 0.2), atol=1e-4)
    assert {name: target[0].tolist() for name, target in batch.targets.items()} == {
        "label": 1,
        "tags": [0, 0, 1],
        "amount": 0.5,
    }
    assert (batch.id.tolist(), batch.weight.tolist()) == ([100, -1], [1, 0])


def test_batch_arrays_have_documented_shapes_and_dtypes():
    batch = fill(planted.row(0))
    arrays = {
        "image": batch.inputs["image"], "text": batch.inputs["text"], "audio": batch.inputs["audio"],
        "image mask": batch.mask["image"], "text mask": batch.mask["text"], "audio mask": batch.mask["audio"],
        "present": batch.present["text"], **batch.targets, "weight": batch.weight, "id": batch.id,
    }  # fmt: skip
    assert {name: (array.shape, str(array.dtype)) for name, array in arrays.items()} == {
        "image": ((2, 8, 8, 3), "uint8"), "text": ((2, 6), "int32"), "audio": ((2, 100), "float32"),
        "image mask": ((2, 1), "bool"), "text mask": ((2, 6), "bool"), "audio mask": ((2, 100), "bool"),
        "present": ((2,), "bool"), "label": ((2,), "int32"), "tags": ((2, 3), "float32"), "amount": ((2,), "float32"),
        "weight": ((2,), "float32"), "id": ((2,), "int32"),
    }  # fmt: skip
    per_row = sum(array[0].nbytes for name, array in arrays.items() if name in READER.modalities)
    assert READER.bytes_per_row() == per_row + 1 + 6 + 100  # plus the masks


@pytest.mark.parametrize(
    ("modality", "values"),
    [
        ("image", [None, b""]),
        ("text", [None, "", b"", " \n\t"]),
        ("audio", [None, b"", planted.wav(0.1, samples=0), np.zeros(0, np.float32)]),
    ],
)
def test_fill_row_treats_an_empty_value_as_an_absent_modality(modality, values):
    for value in values:
        batch = fill(planted.row(3, **{modality: value}))
        assert not batch.present[modality][0]
        assert not batch.mask[modality][0].any()
        assert not batch.inputs[modality][0].any()
        assert all(batch.present[m][0] for m in READER.modalities if m != modality)
        assert (batch.weight[0], batch.id[0]) == (1, 100)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"image": planted.png(9)[:50]}, "row 100, image: "),
        ({"image": b"no image"}, "row 100, image: not an image"),
        ({"audio": planted.wav(0.1)[:90]}, "row 100, audio: truncated"),
        ({"audio": np.full(100, np.nan, np.float32)}, "row 100, audio: samples are not finite"),
    ],
)
def test_fill_row_reports_an_unreadable_row_and_leaves_padding(changes, message):
    batch = empty_batch(READER, 1)
    with pytest.raises(BadRow, match=message):
        fill_row(batch, 0, planted.row(1, **changes), 100, READER)
    assert (batch.weight.tolist(), batch.id.tolist()) == ([0], [-1])
    assert not any(batch.inputs[m].any() or batch.mask[m].any() or batch.present[m].any() for m in batch.inputs)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"label": 2}, "row 100, target 'label': class 2 is outside 0 to 1"),
        ({"label": -1}, "class -1 is outside 0 to 1; it stands for no label only where all rows have it"),
        ({"label": 0.5}, "one integer"),
        ({"label": [1]}, "one integer"),
        ({"tags": [0, 3]}, r"row 100, target 'tags': classes \[0, 3\] are outside 0 to 2"),
        ({"tags": [-1]}, "outside"),
        ({"tags": [0.5]}, r"3 numbers in \[0, 1\], one for each class"),
        ({"tags": ["a"]}, "integers"),
        ({"amount": np.nan}, "row 100, target 'amount': a regression target must be one finite number"),
        ({"amount": np.inf}, "finite"),
        ({"amount": [1.0]}, "one finite number"),
    ],
)
def test_fill_row_rejects_invalid_targets(changes, message):
    with pytest.raises(BadTarget, match=message):
        fill(planted.row(1, **changes))


def test_multilabel_targets_are_indices_or_booleans():
    rows = [planted.row(0, tags=tags) for tags in ([2, 0], np.array([True, False, True]), [])]
    np.testing.assert_array_equal(fill(*rows).targets["tags"][:3], [[1, 0, 1], [1, 0, 1], [0, 0, 0]])


def test_as_string_accepts_bytes_and_none_but_no_array():
    assert [as_string(x) for x in (b"h\xc3\xa9", None, "a", np.array(b"x", object), b"\xff")] == [
        "hé",
        "",
        "a",
        "x",
        "�",
    ]
    with pytest.raises(UserError, match=r"one string, got an array"):
        as_string(np.array([b"a", b"b"], object))
