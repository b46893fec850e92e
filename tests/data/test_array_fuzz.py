"""Arrays of every dtype and axis order under every modality type: read like the reference order, or refused."""

import numpy as np
import pytest
from hypothesis import strategies as st

from mmfusion.data.decoding import BadRow, Reader
from mmfusion.data.modalities import MODALITY_TYPES
from mmfusion.errors import UserError
from tests.data.damage import few_and_many, is_short_line

NUMBERS = ("u1", "u2", "u4", "u8", "i1", "i2", "i4", "i8", "f2", "f4", "f8", ">i2", ">f4", "g")
OTHERS = ("?", "c8", "c16", "O", "U5", "S5", "M8[D]", "m8[s]", "V4")
DTYPES = st.sampled_from(NUMBERS + OTHERS)


def transposed(*axes):
    return lambda array: np.ascontiguousarray(array.transpose(axes))


def leading(array):
    return array[None]


def trailing(array):
    return array[..., None]


def same(array):
    return array


def flipped(array):  # equal values in another memory layout
    return np.asfortranarray(array)


# Per modality type its options, the shape of a value in the reference order, other orders, and which of these are read.
SIZE = {"size": (9, 11)}
CASES = {
    "image": (SIZE, (9, 11, 3), {"HWC": same, "CHW": transposed(2, 0, 1), "1HWC": leading, "HWC1": trailing}, ["HWC"]),
    "image gray": (
        {**SIZE, "channels": 1}, (9, 11), {"HW": same, "1HW": leading, "HW1": trailing}, ["HW", "HW1"],
    ),
    "images": (
        {**SIZE, "count": 5}, (5, 9, 11, 3),
        {"KHWC": same, "KCHW": transposed(0, 3, 1, 2), "CKHW": transposed(3, 0, 1, 2), "1KHWC": leading}, ["KHWC"],
    ),
    "video": (
        {**SIZE, "frames": 5}, (5, 9, 11, 3),
        {
            "THWC": same, "TCHW": transposed(0, 3, 1, 2), "CTHW": transposed(3, 0, 1, 2),
            "HWCT": transposed(1, 2, 3, 0), "1THWC": leading,
        },
        ["THWC"],
    ),
    "video gray": (
        {**SIZE, "frames": 5, "channels": 1}, (5, 9, 11), {"THW": same, "THW1": trailing, "1THW": leading},
        ["THW", "THW1"],
    ),
    "audio": ({"rate": 100}, (90,), {"T": same, "1T": leading, "T1": trailing, "11T": lambda x: x[None, None]},
              ["T", "1T", "T1"]),
    "audio stereo": (
        {"rate": 100}, (90, 2), {"TC": same, "CT": transposed(1, 0), "1TC": leading, "TC1": trailing}, ["TC", "CT"],
    ),
    "sequence": (
        {"length": 12}, (12, 5), {"TD": same, "DT": transposed(1, 0), "1TD": leading, "TD1": trailing}, ["TD"],
    ),
    "sequence scalar": ({"length": 12}, (12,), {"T": same, "T1": trailing, "1T": leading}, ["T", "T1"]),
    "embedding": ({}, (7,), {"D": same, "1D": leading, "D1": trailing}, ["D"]),
    "table": ({}, (7,), {"D": same, "1D": leading, "D1": trailing}, ["D"]),
    "graph": ({"nodes": 9, "features": 4}, (7, 4), {"NF": same, "FN": transposed(1, 0), "1NF": leading}, ["NF"]),
    "text": ({}, (3,), {"N": same, "1N": leading}, []),
    "knowledge": ({}, (3,), {"N": same, "1N": leading}, []),
}  # fmt: skip


def random_array(dtype, shape, seed, kind):
    rng = np.random.default_rng(seed)
    numbers = rng.integers(1, 100, shape)
    if kind == "audio" and np.dtype(dtype).kind in "fc":
        numbers = numbers / 100
    if dtype in ("U5", "S5"):
        return numbers.astype(str).astype(dtype)
    return numbers.astype("u4").view("V4") if dtype == "V4" else numbers.astype(dtype)


def row_of(kind, array):
    if kind == "graph":
        return {"x": array, "edges": np.array([[0, 1], [1, 2], [2, 3]])}
    return {"x": array}


def make_reader(kind, options, arrays):
    """Returns a reader of one modality, fitted to rows."""
    modality_type = MODALITY_TYPES[kind]
    options = {**modality_type.options, "kind": kind, "feature": "x+edges" if kind == "graph" else "x", **options}
    values = [row_of(kind, array) for array in arrays]
    values = values if modality_type.several_features else [value["x"] for value in values]
    saved = modality_type.fit(values, options) if modality_type.fit else ""
    return Reader({"m": options}, {}, {}, {"m": modality_type.load(saved)} if saved else {})


def read(reader, kind, array):
    try:
        return reader.read(row_of(kind, array), 0)[0]["m"]
    except BadRow as error:
        assert is_short_line(error)
        return None


def check_arrays(case, dtype, layout, seed):
    kind, (options, shape, orders, may_read) = case.partition(" ")[0], CASES[case]
    arrays = [layout(random_array(dtype, shape, seed + i, kind)) for i in range(3)]
    try:
        reader = make_reader(kind, options, arrays)
    except UserError as error:
        assert "\n" not in str(error)
        return
    reference = read(reader, kind, arrays[0])
    assert reference is None or dtype in (*NUMBERS, "?", "O")
    for order, reorder in orders.items():
        result = read(reader, kind, reorder(arrays[0]))
        if result is not None:
            assert order in may_read
            np.testing.assert_array_equal(result[0], reference[0])
            np.testing.assert_array_equal(result[1], reference[1])
        assert result is not None or order not in may_read or reference is None
    if reference is not None:  # as in float64, which holds every number here
        assert np.isfinite(reference[0]).all() and reference[1].any()
        plain = [np.ascontiguousarray(array).astype(np.float64) for array in arrays]
        if kind == "audio" and np.dtype(dtype).kind == "i":
            plain = [array / 2**15 for array in plain]
        if not (kind in ("image", "images", "video") and dtype == "u1"):
            expected = read(make_reader(kind, options, plain), kind, plain[0])
            np.testing.assert_allclose(reference[0], expected[0], rtol=2e-3, atol=2e-3)
        else:
            np.testing.assert_array_equal(reference[0].ravel(), arrays[0].ravel())


def check_values_of_other_types(case, value):
    kind, (options, shape, *_) = case.partition(" ")[0], CASES[case]
    arrays = [random_array("u1" if kind in ("image", "images", "video") else "f8", shape, i, kind) for i in range(3)]
    if kind in ("text", "knowledge"):
        arrays = ["1 2", "2 3", "3 4", "1 3"] * 3
    result = read(make_reader(kind, options, arrays), kind, value)
    assert result is None or kind in ("text", "knowledge", "table", "embedding") or isinstance(value, list | tuple)


CASE_NAMES = st.sampled_from(sorted(CASES))
LAYOUTS = st.sampled_from([same, flipped])
LEAVES = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.binary(max_size=9)
SCALARS = (
    LEAVES | st.builds(np.float32, st.floats(width=32)) | st.builds(np.array, st.integers(0, 9)) | st.complex_numbers()
)
VALUES = (
    SCALARS
    | st.lists(LEAVES, max_size=3)
    | st.dictionaries(st.text(max_size=2), LEAVES, max_size=2)
    | st.tuples(LEAVES)
)
pytestmark = pytest.mark.filterwarnings("error")
test_arrays_are_read_like_the_reference_order_or_refused, many_arrays = few_and_many(
    check_arrays, CASE_NAMES, DTYPES, LAYOUTS, st.integers(0, 2**20)
)
test_values_of_other_types_are_refused_in_one_line, many_values = few_and_many(
    check_values_of_other_types, CASE_NAMES, VALUES
)


@pytest.mark.thorough
@pytest.mark.parametrize("check", [many_arrays, many_values])
def test_1000_arrays_and_values_are_read_right_or_refused(check):
    check()
