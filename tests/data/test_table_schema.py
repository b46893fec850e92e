import numpy as np
import pytest
from PIL import Image

from mmfusion.data.table_schema import describe, gives_away, is_missing, target_kind

N = 40


def column(values, tmp_path="."):
    return describe([{"x": value} for value in values], ["x"], tmp_path)["x"]


@pytest.mark.parametrize(
    ("values", "kind"),
    [
        (["a cat sat on the mat", "a dog ran off"] * 20, "text"),
        (["red", "blue", "red", ""] * 10, "category"),
        ([True, False] * 20, "category"),
        (["true", "FALSE"] * 20, "category"),
        ([str(i / 7) for i in range(N)], "number"),
        (list(range(N)), "number"),
        (["2024-05-31", "2023-01-01T10:00"] * 20, "date"),
        ([np.datetime64("2024-05-31"), np.datetime64("2023-01-01")] * 20, "date"),
        ([[0.5, 1.0]] * N, "vector"),
        (["[0.5, 1.0]"] * N, "vector"),
        ([np.zeros(i % 3 + 1) for i in range(N)], "sequence"),
        ([[[1, 2]], [[1, 2], [3, 4]]] * 20, "sequence"),
        ([["a", "b"], ["b"], []] * 10, "labels"),
        ([f"图像和文字的融合方法有很多种我们比较一下吧{i}" for i in range(N)], "text"),
        ([""] * N, "empty"),
        (["same"] * N, "constant"),
        (["1_0", "2_3"] * 20, "category"),  # Python would read numbers
        (
            ["天气很好我们去公园散步吧今天下午三点见面", "图像和文字的融合方法有很多种我们比较一下吧你说呢"] * 20,
            "category",
        ),
    ],
)
def test_describe_tells_what_a_column_holds(values, kind):
    found = column(values)
    assert found.kind == kind
    assert found.missing == sum(map(is_missing, values))


def test_describe_tells_identifiers_by_name_and_uniqueness():
    rows = [{"id": str(i), "row": f"r{i}", "count": i} for i in range(N)]
    kinds = {name: found.kind for name, found in describe(rows, list(rows[0]), ".").items()}
    assert kinds == {"id": "identifier", "row": "identifier", "count": "number"}


def test_describe_finds_files_and_says_which_are_missing(tmp_path):
    for i in range(3):
        Image.new("L", (4, 4)).save(tmp_path / f"{i}.png")
    assert column(["0.png", "1.png", "", "2.png"], tmp_path).kind == "image"
    found = column(["0.png", "7.png"], tmp_path)
    assert (found.kind, found.problem) == ("image", f"1 of 2 files do not exist under {tmp_path}")
    assert column([["0.png", "1.png"], ["2.png"]], tmp_path).kind == "images"


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        (["yes", "no"] * 20, "classification"),
        ([0, 1, 2, 1] * 10, "classification"),
        ([True, False] * 20, "classification"),
        ([i * 1000 + 7 for i in range(N)], "regression"),
        ([0.5, 1.0] * 20, "regression"),
        ([i % 99 for i in range(6 * 99)], "classification"),
        ([0] * 100 + [i % 99 for i in range(6 * 99)], "regression"),
        ([["a"], ["a", "b"]] * 20, "multilabel"),
        ([[0, 1, 1], [1, 0, 0]] * 20, "multilabel"),
    ],
)
def test_target_kind_follows_the_labels(values, expected):
    assert target_kind(column(values), values) == expected


def test_gives_away_finds_a_column_that_tells_the_label():
    rows = [{"code": f"c{i % 4}", "size": f"s{i % 3}", "label": "ab"[i % 4 // 2]} for i in range(120)]
    found = describe(rows, ["code", "size", "label"], ".")
    assert gives_away(rows, found["code"], "label")
    assert not gives_away(rows, found["size"], "label")
