"""Sequences of vectors as a modality: known values, masks, -inf, and arrays along another axis."""

import json

import numpy as np
import pytest

from mmfusion.data.modalities import MODALITY_TYPES
from mmfusion.data.sequence import TYPE
from tests.errors import rejects

INF = np.inf
# Dimension 0 has mean 2 and deviation 2; dimension 1 has mean 5 and no variance.
TRAIN = [[[0, 5], [4, 5], [0, -INF]], [[4, 5]], None, [[np.nan, -INF]]]


def fit(values, **changes):
    options = {"kind": "sequence", "feature": "v", **TYPE.options, "length": 4, **changes}
    return options, TYPE.load(TYPE.fit(values, options))


def test_sequence_is_registered():
    assert MODALITY_TYPES["sequence"] is TYPE
    assert TYPE.options == {"length": 50, "normalize": "standard"}


def test_sequence_is_standardised_over_the_finite_values_of_train():
    options, fitted = fit(TRAIN)
    assert fitted == {"mean": [2, 5], "std": [2, 1]}
    assert TYPE.shape(options, fitted) == ((4, 2), np.float32, 4)
    x, mask = TYPE.decode([[0, 5], [6, 7]], options, fitted)
    assert x.dtype == np.float32
    np.testing.assert_array_equal(x, [[-1, 0], [2, 2], [0, 0], [0, 0]])
    np.testing.assert_array_equal(mask, [1, 1, 0, 0])


@pytest.mark.parametrize(("normalize", "filled"), [("standard", [[0, 2], [2, 0]]), ("none", [[2, 7], [6, 5]])])
def test_sequence_replaces_single_values_by_the_mean_and_masks_positions_without_one(normalize, filled):
    value = np.array([[np.nan, -INF], [-INF, 7], [np.nan, np.nan], [6, INF]])
    x, mask = TYPE.decode(value, *fit(TRAIN, normalize=normalize))
    np.testing.assert_array_equal(mask, [0, 1, 0, 1])
    np.testing.assert_array_equal(x[mask], filled)
    np.testing.assert_array_equal(x[~mask], 0)


def test_sequence_is_truncated_at_the_end():
    options, fitted = fit([np.arange(12.0).reshape(6, 2)], normalize="none")
    assert fitted["mean"] == [3, 4]  # of the first four positions
    x, mask = TYPE.decode(np.arange(12).reshape(6, 2), options, fitted)
    np.testing.assert_array_equal(x, np.arange(8).reshape(4, 2))
    assert mask.all()


@pytest.mark.parametrize("value", [[1, 2], "[1, 2]", np.array([[1], [2]], np.int8), ["1", "2"], [[1], ["2"]]])
def test_sequence_of_numbers_has_one_dimension(value):
    options, fitted = fit([[1.0, 3.0]], normalize="none")
    x, mask = TYPE.decode(value, options, fitted)
    np.testing.assert_array_equal(x, [[1], [2], [0], [0]])
    np.testing.assert_array_equal(mask, [1, 1, 0, 0])


@pytest.mark.parametrize("value", [None, "", [], "[]", [[]], [[np.nan, -INF]], [[None, None]], np.zeros((0, 2))])
def test_sequence_without_a_value_is_absent(value):
    assert TYPE.decode(value, *fit(TRAIN)) is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (np.zeros((2, 3)), r"is an array \[2, 3\], not \[t, 2\] as on train; it looks like \[D, t\]: transpose it"),
        (np.zeros((4, 3)), r"is an array \[4, 3\], not \[t, 2\] as on train$"),
        ([1, 2, 3], r"is an array \[3, 1\], not \[t, 2\]"),
        (np.zeros((1, 2, 2)), r"must be numbers \[t, D\], such as .*, got an array \[1, 2, 2\]"),
        (5, "must be numbers .*, got a number"),
        ([[1, 2], [3]], "must be numbers .*, got"),
        ("text", "must be numbers .*, got text"),
        ({"a": 1}, "must be numbers .*, got"),
    ],
)
def test_sequence_refuses_other_arrays(value, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        TYPE.decode(value, *fit(TRAIN))


def test_sequence_with_as_many_positions_as_dimensions_is_read():
    x, _ = TYPE.decode([[1, 2], [3, 4]], *fit(TRAIN, normalize="none"))
    np.testing.assert_array_equal(x[:2], [[1, 2], [3, 4]])


def test_sequence_fit_refuses_arrays_along_the_other_axis():
    with rejects("feature v", None, says="has arrays [2, 3 to 5]: transpose them"):
        fit([np.zeros((2, t)) for t in (3, 4, 5)])


def test_sequence_fit_leaves_wrong_sequences_to_their_rows():
    options, fitted = fit([*TRAIN, [[1, 2, 3]], "oops"])
    assert json.dumps(fitted) == TYPE.fit(TRAIN, options)


@pytest.mark.parametrize(("values", "says"), [([None, ""], "has no sequence in any training row"), (["a"], "got a")])
def test_sequence_fit_needs_a_sequence(values, says):
    with rejects("feature v", None, says=says):
        fit(values)
