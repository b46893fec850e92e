"""Columns of tables, values of rows, and predictions from logits; nothing is trained."""

import numpy as np
import pytest

from mmfusion.data import modalities
from mmfusion.data.decoding import BadRow, Reader
from mmfusion.data.modality_type import ModalityType
from mmfusion.errors import UserError
from mmfusion.inference import rows as input_rows
from mmfusion.inference.columns import bind, names_read, read_row
from mmfusion.inference.predictions import NOT_FINITE, Uncertainty, predictions
from mmfusion.objectives import Task
from tests.errors import rejects

MODALITIES = {
    "caption": {"kind": "text", "feature": "sentence", "length": 4},
    "numbers": {"kind": "table", "feature": "x+v+city", "categorical": ("city",)},
}
READER = Reader(MODALITIES, {}, {}, {})
COLUMNS = ["sentence", "x", "v", "city"]


def test_columns_are_named_after_modalities_or_features():
    expected = {"caption": {"sentence": ["sentence"]}, "numbers": {"x": ["x"], "v": ["v"], "city": ["city"]}}
    assert bind(READER, COLUMNS, "T") == expected
    expected["caption"]["sentence"] = ["caption"]  # the modality's own name has precedence
    bound = bind(READER, ["id", "caption", *COLUMNS], "T")
    assert bound == expected
    assert names_read(bound) == {"caption", "x", "v", "city"}


def test_columns_of_elements_are_a_vector_in_the_order_of_their_numbers():
    elements = [f"v_{i}" for i in (10, 9, 8, 7, 6, 5, 4, 3, 2, 1, 0)]
    bound = bind(READER, ["caption", "x", "city", "v_", "v_01", "v_x", *elements], "T")
    assert bound["numbers"]["v"] == elements[::-1]
    assert bind(READER, [*COLUMNS, *elements], "T")["numbers"]["v"] == ["v"]
    row = {"caption": None, "x": "1", "city": "Bonn", **{name: name[2:] for name in elements}}
    assert read_row(bound, row) == {
        "caption": "", "numbers": {"x": "1", "v": [str(i) for i in range(11)], "city": "Bonn"},
    }  # fmt: skip


@pytest.mark.parametrize(
    ("columns", "fact"),
    [
        (["caption", "x", "city"], "no column v, which the run reads (it has caption, x, city)"),
        (["captoin", "x", "v", "city"], "no column caption, which the run reads (did you mean captoin?)"),
        (["caption", "x", "V", "cities"], "no columns v, city, which the run reads (did you mean cities?)"),
        (["caption", "x", "city", "v_0", "v_2"], "has the column v_2, but not v_1"),
        (["caption", "x", "city", "v_1"], "has the column v_1, but not v_0"),
        (["caption_0", "x", "v", "city"], "no column caption"),  # texts have no elements
        (["caption", "x", "v", "city_0"], "no column city"),
    ],
)
def test_columns_that_are_missing_are_named(columns, fact):
    with rejects("T", None, says=fact):
        bind(READER, columns, "T")


def test_columns_may_be_missing_but_not_all():
    bound = bind(READER, ["x", "id"], "T", allow_missing=True)
    assert read_row(bound, {"x": 1, "id": 2}) == {"caption": "", "numbers": {"x": 1, "v": "", "city": ""}}
    with rejects("T", None, says="(it has id)"):
        bind(READER, ["id"], "T", allow_missing=True)


def test_row_of_modalities_that_have_the_names_of_others_features_is_not_mixed():
    crossed = {"a": {"kind": "text", "feature": "b"}, "b": {"kind": "text", "feature": "c"}}
    bound = bind(Reader(crossed, {}, {}, {}), ["a", "b"], "T")
    row = read_row(bound, {"a": None, "b": "of b"})
    raw = {m: input_rows._raw(m, options, row, ".") for m, options in crossed.items()}
    assert raw == {"a": {"b": ""}, "b": {"c": "of b"}}


def test_batch_has_different_values_of_a_feature_that_two_modalities_share():
    shared = {m: {"kind": "table", "feature": "x", "categorical": ()} for m in ("a", "b")}
    reader = Reader(shared, {}, {}, {m: {"x": {"mean": [0], "std": [1]}} for m in shared})
    ((batch, errors),) = input_rows.batches(reader, [{"a": 1, "b": 2}, {"a": 3}, {"x": 4}, {"a": 5, "b": "?"}], 4)
    assert [bool(error) for error in errors] == [False, False, False, True]
    np.testing.assert_array_equal(batch.inputs["a"][:, 0], [1, 3, 4, 0])
    np.testing.assert_array_equal(batch.inputs["b"][:, 0], [2, 0, 4, 0])
    np.testing.assert_array_equal(batch.present["a"], [True, True, True, False])
    np.testing.assert_array_equal(batch.present["b"], [True, False, True, False])
    np.testing.assert_array_equal(batch.weight, [1, 1, 1, 0])
    np.testing.assert_array_equal(batch.id, [0, 1, 2, -1])


@pytest.mark.parametrize("error", [TypeError, AttributeError, KeyError, ZeroDivisionError, UserError])
def test_batch_has_an_error_where_a_decoder_does_not_expect_the_value(error, monkeypatch):
    def decode(value, options, fitted):
        if value == "bad":
            raise error("of the decoder")
        return np.ones(1), np.ones(1, bool)

    custom = ModalityType({}, lambda options, fitted: ((1,), np.float32, 1), decode)
    monkeypatch.setitem(modalities.MODALITY_TYPES, "custom", custom)
    reader = Reader({"m": {"kind": "custom", "feature": "x"}}, {}, {}, {})
    ((_, errors),) = input_rows.batches(reader, [{"m": "good"}, {"m": "bad"}], 2)
    said = "m: of the decoder" if error is UserError else f"m: a value of the wrong type ({error.__name__}: "
    assert errors[0] == "" and errors[1].startswith(said)


NUMBERS = {"kind": "table", "feature": "v", "categorical": ()}


@pytest.mark.parametrize("value", [["a"], {"a": 1}, np.array(["a", "b"])])
@pytest.mark.parametrize("options", [MODALITIES["caption"] | {"feature": "v"}, NUMBERS | {"categorical": ("v",)}])
def test_text_or_category_that_is_no_string_is_an_error_of_the_row(value, options):
    with pytest.raises(BadRow, match="'v' must be a string, got "):
        input_rows._raw("t", options, {"v": value}, ".")


@pytest.mark.parametrize(
    ("path", "reason"),
    [("a\0b", "null"), ("x" * 9999, "too long"), ("two\nlines", "two lines: No such file"), (".", "directory")],
)
def test_file_path_that_cannot_be_read_is_an_error_of_the_row(path, reason, tmp_path):
    with pytest.raises(BadRow, match=reason) as raised:
        input_rows._raw("i", {"kind": "image", "feature": "image"}, {"image": path}, tmp_path)
    assert len(str(raised.value)) < 200


@pytest.mark.parametrize(
    ("keys", "meant"),
    [(["captoin", "city"], "caption"), (["sentences", "city"], "sentence"), (["numbres", "caption"], "numbers")],
)
def test_keys_that_are_misspelt_modalities_are_refused(keys, meant):
    with rejects("rows", keys[0], suggests=meant):
        input_rows.check_columns(READER, keys, "rows")
    with rejects("rows", keys[0].upper()):
        input_rows.check_columns(READER, [keys[0].upper(), keys[1]], "rows")


def test_keys_that_no_modality_reads_are_ignored_unless_there_are_no_others():
    input_rows.check_columns(READER, ["caption", "captions", "city", "id"], "rows")
    views = Reader({m: {"kind": "text", "feature": m} for m in ("view1", "view2")}, {}, {}, {})
    input_rows.check_columns(views, ["view1"], "rows")
    with rejects("rows", None, says="it has id"):
        input_rows.check_columns(READER, ["id"], "rows")


TASKS = {"c": Task("classification", 2), "m": Task("multilabel", 2), "r": Task("regression", 1)}
NAMES = {"c": ("a", "b"), "m": ("a", "b"), "r": ()}


def test_predictions_of_logits_are_known_probabilities():
    logits = {
        "c": np.array([[0, np.log(3)], [1e4, -1e4]]), "m": np.array([[0, np.log(3)], [-1e4, 1e4]]),
        "r": np.array([[2.5], [-1]]),
    }  # fmt: skip
    with np.errstate(all="raise", under="ignore"):
        found = predictions({("x",): logits}, TASKS, NAMES, ["", ""], dict.fromkeys(TASKS, Uncertainty()))
    np.testing.assert_allclose(found.tasks["c"].probabilities, [[0.25, 0.75], [1, 0]])
    np.testing.assert_allclose(found.tasks["m"].probabilities, [[0.5, 0.75], [0, 1]])
    np.testing.assert_array_equal(found.tasks["r"].values, [2.5, -1])
    assert (found.tasks["c"].labels, found.tasks["m"].labels) == (["b", "a"], [("a", "b"), ("b",)])


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("task", ["c", "m", "r"])
def test_predictions_of_logits_that_are_not_finite_are_errors(task, value):
    logits = {"c": np.zeros((3, 2), np.float32), "m": np.zeros((3, 2), np.float32), "r": np.zeros((3, 1), np.float32)}
    logits[task][1, -1] = value
    plain = dict.fromkeys(TASKS, Uncertainty())
    found = predictions({("x",): logits}, TASKS, NAMES, ["unreadable", "", ""], plain)
    assert found.errors == ["unreadable", NOT_FINITE, ""]
    for part in found.tasks.values():
        values = part.values if part.probabilities is None else part.probabilities[:, 0]
        np.testing.assert_array_equal(np.isnan(values), [True, True, False])
        assert part.labels in ([], [None, None, "a"], [None, None, ("a", "b")])
