import numpy as np
import pytest

from mmfusion.data import targets
from mmfusion.data.features import Feature
from tests.errors import rejects

MULTILABEL = {"kind": "multilabel", "feature": "tags", **targets.TARGET_OPTIONS["multilabel"]}
REGRESSION = {"kind": "regression", "feature": "price", **targets.TARGET_OPTIONS["regression"]}


def labels(value, classes=3, encoding="auto"):
    return targets.decode(value, {**MULTILABEL, "encoding": encoding}, classes, None).tolist()


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (np.array([1, 1, 0]), [1, 1, 0]),  # as class numbers, 1 would occur twice
        ([0, 0, 0], [0, 0, 0]),
        (np.array([0.0, 0.3, 1.0], np.float32), [0, pytest.approx(0.3), 1]),  # soft scores, as of VQA
        (np.array([True, False, True]), [1, 0, 1]),
        ([2, 0], [1, 0, 1]),
        ([], [0, 0, 0]),
        ([2, 1, 0], [1, 1, 1]),
    ],
)
def test_multilabel_target_is_read_by_its_value(value, expected):
    assert labels(value) == expected


def test_multilabel_target_that_may_be_either_is_refused():
    with pytest.raises(ValueError, match="set its encoding to classes or multi_hot"):
        labels([1, 0], classes=2)
    assert labels([1, 0], 2, "classes") == [1, 1]
    assert labels([1, 0], 2, "multi_hot") == [1, 0]


@pytest.mark.parametrize("value", [[0.5, 2.0, 0.0], [0.0, np.nan, 1.0], [0.5], ["a"]])
def test_multilabel_target_outside_its_range_is_refused(value):
    with pytest.raises(ValueError):
        labels(np.array(value))


@pytest.mark.parametrize(
    ("feature", "expected"),
    [
        (Feature("array[1]", "int64", (3,)), "multi_hot"),  # Tensor((3,), int64)
        (Feature("classes"), "classes"),  # Sequence(ClassLabel)
        (Feature("array[1]", "int64", (None,)), "auto"),
        (None, "auto"),
    ],
)
def test_multilabel_encoding_follows_the_feature(feature, expected):
    assert targets.encoding(feature, MULTILABEL, 3, "config.data.targets.tags") == expected


def test_multilabel_encoding_refuses_another_number_of_values():
    with rejects(
        "config.data.targets.tags.feature", "tags", says="an array int64 [5], which is not one number for each"
    ):
        targets.encoding(Feature("array[1]", "int64", (5,)), MULTILABEL, 3, "config.data.targets.tags")
    with rejects("config.data.targets.tags.feature", "tags", says="holds a text"):
        targets.encoding(Feature("text"), MULTILABEL, 3, "config.data.targets.tags")


@pytest.mark.parametrize("scale", ["standard", "log", "none"])
def test_regression_scale_is_inverted_exactly(scale):
    prices = np.array([120_000, 250_000.0, 999_999, 40_000])
    fitted = targets.fit_scale(prices, {**REGRESSION, "scale": scale}, "path")
    scaled = np.array([targets.decode(price, REGRESSION, 1, fitted) for price in prices])
    assert scaled.dtype == np.float32
    if scale != "none":
        np.testing.assert_allclose([scaled.mean(), scaled.std()], [0, 1], atol=1e-6)
    np.testing.assert_allclose(fitted.invert(scaled), prices, rtol=1e-6)


def test_regression_scale_log_needs_positive_targets():
    with rejects("path.scale", "log", says="one is -1"):
        targets.fit_scale([1, 2, -1], {**REGRESSION, "scale": "log"}, "path")
    with pytest.raises(ValueError, match="above 0"):
        targets.decode(-3.0, REGRESSION, 1, targets.Scale(log=True))


def test_regression_scale_of_a_constant_target_is_finite():
    fitted = targets.fit_scale([5, 5, 5], REGRESSION, "path")
    assert (fitted.mean, fitted.std) == (5, 1)
