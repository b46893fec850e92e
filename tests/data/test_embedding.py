"""Precomputed vectors as a modality: known values, sizes, missing and wrong vectors."""

import json

import numpy as np
import pytest

from mmfusion.data.embedding import TYPE
from mmfusion.data.modalities import MODALITY_TYPES, feature_names
from tests.errors import rejects

TRAIN = [[0.0, 10.0, 7.0], [2.0, 30.0, 7.0], None, [4.0, 50.0, 7.0]]  # mean (2, 30, 7), deviation √(8/3) · (1, 10, 0)


def fit(values, feature="v", **changes):
    """Returns the options and the fitted state of a modality of one feature, or of several given as dicts."""
    options = {"kind": "embedding", "feature": feature, **TYPE.options, **changes}
    rows = [value if isinstance(value, dict) else {feature: value} for value in values]
    return options, TYPE.load(TYPE.fit(rows, options))


def decode(value, options, fitted):
    return TYPE.decode(value if isinstance(value, dict) else {options["feature"]: value}, options, fitted)


def test_embedding_is_registered():
    assert MODALITY_TYPES["embedding"] is TYPE
    assert TYPE.options == {"normalize": "standard"}


def test_embedding_is_standardised_by_the_training_rows():
    options, fitted = fit(TRAIN)
    assert TYPE.shape(options, fitted) == ((3,), np.float32, 1)
    np.testing.assert_allclose(fitted["mean"], [2, 30, 7])
    np.testing.assert_allclose(fitted["std"], [np.sqrt(8 / 3), np.sqrt(800 / 3), 1])
    x, mask = decode([4, 10, 9], options, fitted)
    assert x.dtype == np.float32
    np.testing.assert_allclose(x, [np.sqrt(1.5), -np.sqrt(1.5), 2], rtol=1e-6)
    np.testing.assert_array_equal(mask, [True])


@pytest.mark.parametrize(
    ("normalize", "value", "expected"),
    [
        ("none", [3, 4, 0], [3, 4, 0]),
        ("l2", [3, 4, 0], [0.6, 0.8, 0]),
        ("l2", [0, 0, 0], [0, 0, 0]),
        ("l2", [3e38, 0, 0], [1, 0, 0]),
        ("none", "[1, 2, 3]", [1, 2, 3]),
        ("none", ["1", "2.5", "3e0"], [1, 2.5, 3]),
        ("none", np.float16([1, 2, 3]), [1, 2, 3]),
    ],
)
def test_embedding_of_other_normalisations_and_containers(normalize, value, expected):
    x, _ = decode(value, *fit(TRAIN, normalize=normalize))
    np.testing.assert_allclose(x, expected, rtol=1e-6)


@pytest.mark.parametrize("value", [None, "", [], np.full(3, np.nan), [None, None, None], ["", "", ""], np.nan])
def test_embedding_of_no_value_is_absent(value):
    assert decode(value, *fit(TRAIN)) is None


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ([1, 2], "'v' has 2 values, not 3 as on train"),
        (5.0, "'v' has 1 values, not 3 as on train"),
        ([1, np.nan, 3], "'v' has values that are not finite"),
        ([1, np.inf, 3], "'v' has values that are not finite"),
        ([[1, 2, 3]], r"must be a vector such as \[0.1, 0.2\] in 'v', got an array \[1, 3\]"),
        ("a b", "must be a vector such as .* in 'v', got a b"),
        ([1e39, 0, 0], "must be a vector"),
    ],
)
def test_embedding_refuses_other_vectors(value, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        decode(value, *fit(TRAIN))


def test_embedding_of_several_features_concatenates_them():
    rows = [{"x": 1, "v": [10, 20], "y": "3"}, {"x": 3, "v": [30, 40], "y": "5"}]
    options, fitted = fit(rows, "x+v+y", normalize="none")
    assert feature_names(options) == ["x", "v", "y"]
    assert fitted["sizes"] == {"x": 1, "v": 2, "y": 1}
    x, mask = decode({"y": 4, "x": 2, "v": "[1, 2]"}, options, fitted)
    np.testing.assert_array_equal(x, [2, 1, 2, 4])
    assert mask.shape == (1,)
    assert decode({"x": None, "v": "", "y": np.nan}, options, fitted) is None
    with pytest.raises(ValueError, match=r"^'v' is missing, and other parts of the vector are not"):
        decode({"x": 1, "v": None, "y": 2}, options, fitted)
    with pytest.raises(ValueError, match=r"^'x' has 2 values, not 1"):  # the total is right
        decode({"x": [1, 2], "v": [3], "y": 2}, options, fitted)


def test_embedding_fit_leaves_wrong_vectors_to_their_rows():
    options, fitted = fit([*TRAIN, [1.0, 2.0], "oops", [np.inf, 0, 0]])
    assert json.dumps(fitted) == TYPE.fit([{"v": value} for value in TRAIN], options)


@pytest.mark.parametrize(("values", "says"), [([None, ""], "has no vector in any training row"), (["a"], "got a")])
def test_embedding_fit_needs_a_vector(values, says):
    with rejects("feature v", None, says=says):
        fit(values)
