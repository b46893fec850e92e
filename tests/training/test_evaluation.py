import numpy as np
import pytest

from mmfusion.data.targets import Scale
from mmfusion.objectives import Task
from mmfusion.training.evaluation import score

TASKS = {
    "kind": Task("classification", 2),
    "price": Task("regression", 1, weight=0.5, scale=Scale(mean=10.0, std=2.0)),
}


def collected(kind, price):
    """Five rows, of which `kind` and `price` say which have a label; the others have NaN where one must not be read."""
    weights = {"kind": np.array(kind, np.float32), "price": np.array(price, np.float32)}
    return {
        "logits": {"kind": np.array([[2, 0], [0, 1], [3, 0], [0, 1], [1, 0]], np.float32),
                   "price": np.array([[0], [1], [2], [0], [1]], np.float32)},
        "targets": {"kind": np.array([0, 1, 1, 0, 0]), "price": np.array([1, 1, 0, 2, 0], np.float32)},
        "loss": {"kind": np.arange(1, 6, dtype=np.float32), "price": np.array([1, 0, 4, 4, 1], np.float32)},
        "loss_weight": weights,
        "metric_weight": weights,
        "weight": np.ones(5, np.float32),
        "any_present": np.ones(5, bool),
    }  # fmt: skip


def test_score_is_over_the_rows_with_a_label_of_each_task():
    scores = score(collected([1, 1, 1, 0, 0], [1, 0, 1, 1, 0]), TASKS, skip_empty=True)
    assert (scores["rows"], scores["examples"], scores["kind/examples"], scores["price/examples"]) == (5, 5, 3, 3)
    assert scores["kind/accuracy"] == pytest.approx(2 / 3)
    assert scores["price/mae"] == pytest.approx(2 * (1 + 2 + 2) / 3)  # in the units of the data
    assert scores["kind/loss"] == pytest.approx(2) and scores["price/loss"] == pytest.approx(3)
    assert scores["loss"] == pytest.approx(2 + 0.5 * 3)


def test_score_of_a_task_without_labels_is_none_and_no_part_of_the_loss():
    scores = score(collected([1, 1, 1, 0, 0], [0] * 5), TASKS)
    assert {scores[f"price/{name}"] for name in ("mae", "rmse", "r2", "loss")} == {None}
    assert (scores["price/examples"], scores["loss"]) == (0, pytest.approx(2))
    assert score(collected([0] * 5, [0] * 5), TASKS)["loss"] is None
