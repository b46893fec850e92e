import json

import numpy as np
import pytest
from scipy.special import expit, log_softmax, softmax
from sklearn import metrics as reference  # for regression metrics

from mmfusion import metrics

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(200, 4)) * 2
TARGETS = np.where(RNG.random(200) < 0.5, LOGITS.argmax(1), RNG.integers(0, 4, 200))
ONES = np.ones(200)


def ratio(part: float, whole: float) -> float:
    return part / whole if whole else 0.0


def precision_recall_f1(target: np.ndarray, prediction: np.ndarray) -> tuple[float, float, float]:
    """Returns the metrics of boolean arrays of any shape; undefined ones are 0."""
    hits, actual, predicted = (target & prediction).sum(), target.sum(), prediction.sum()
    return ratio(hits, predicted), ratio(hits, actual), ratio(2 * hits, actual + predicted)


def pairs_in_order(target: np.ndarray, score: np.ndarray) -> float:
    """Returns the AUROC: the fraction of correctly ordered (positive, negative) pairs; ties count one half."""
    above = score[target][:, None] - score[~target][None]
    return np.mean((above > 0) + 0.5 * (above == 0))


def average_precision(target: np.ndarray, score: np.ndarray) -> float:
    """Returns Σ (R_k - R_{k-1}) P_k over the distinct thresholds, from the highest."""
    total, recall_before = 0.0, 0.0
    for threshold in sorted(set(score), reverse=True):
        precision, recall, _ = precision_recall_f1(target, score >= threshold)
        total, recall_before = total + (recall - recall_before) * precision, recall
    return total


def test_classification_metrics_match_their_formulas():
    scores = metrics.classification(LOGITS, TARGETS, ONES)
    predictions, probabilities = LOGITS.argmax(1), softmax(LOGITS, axis=1)
    columns = [(c == TARGETS, predictions == c, probabilities[:, c]) for c in range(4)]
    precision, recall, f1 = np.transpose([precision_recall_f1(*column[:2]) for column in columns])
    expected = {
        "accuracy": np.mean(predictions == TARGETS),
        "balanced_accuracy": np.mean([(predictions == c)[c == TARGETS].mean() for c in range(4)]),
        "macro_precision": precision.mean(),
        "macro_recall": recall.mean(),
        "macro_f1": f1.mean(),
        "auroc": np.mean([pairs_in_order(target, score) for target, _, score in columns]),
        "average_precision": np.mean([average_precision(target, score) for target, _, score in columns]),
        "nll": -np.log(probabilities[np.arange(200), TARGETS]).mean(),
        "brier": ((probabilities - np.eye(4)[TARGETS]) ** 2).sum(1).mean(),
    }
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value, rel=1e-12), name
    assert scores["per_class"]["precision"] == pytest.approx(precision, rel=1e-12)
    assert scores["per_class"]["recall"] == pytest.approx(recall, rel=1e-12)
    assert scores["per_class"]["f1"] == pytest.approx(f1, rel=1e-12)
    assert scores["per_class"]["support"] == np.bincount(TARGETS).tolist()
    counts = [[int(np.sum((t == TARGETS) & (predictions == p))) for p in range(4)] for t in range(4)]
    assert scores["confusion"] == counts


def test_classification_metrics_handle_missing_classes():
    logits, targets = LOGITS.copy(), np.where(TARGETS == 2, 0, TARGETS)
    logits[:, 3] = -9  # class 3 is never predicted, class 2 is never a target, class 4 is neither
    predictions, padded = logits.argmax(1), np.pad(logits, ((0, 0), (0, 1)), constant_values=-99)
    scores = metrics.classification(padded, targets, ONES)
    precision, recall, f1 = np.transpose([precision_recall_f1(targets == c, predictions == c) for c in range(4)])
    for name, values in (("precision", precision), ("recall", recall), ("f1", f1)):
        assert scores[f"macro_{name}"] == pytest.approx(values.mean(), rel=1e-12)
        assert scores["per_class"][name] == pytest.approx([*values, 0.0], rel=1e-12)
    assert scores["balanced_accuracy"] == pytest.approx(recall[[0, 1, 3]].mean(), rel=1e-12)
    ordered = [pairs_in_order(targets == c, log_softmax(padded, axis=1)[:, c]) for c in (0, 1, 3)]
    assert scores["auroc"] == pytest.approx(np.mean(ordered), rel=1e-12)


def test_classification_auroc_counts_ties_as_one_half():
    logits, targets = LOGITS[:, :2].round(), TARGETS % 2  # rounding makes ties
    expected = pairs_in_order(targets == 1, logits[:, 1] - logits[:, 0])
    assert metrics.classification(logits, targets, ONES)["auroc"] == pytest.approx(expected, rel=1e-12)


def test_ece_matches_known_confidences():
    """At confidence p the error is 0 for accuracy p, and p for accuracy 0."""
    logits = np.tile([np.log(0.75), np.log(0.25)], (100, 1))
    targets = np.arange(100) % 4 == 0
    assert metrics.classification(logits, targets.astype(int), np.ones(100))["ece"] == pytest.approx(0, abs=1e-9)
    assert metrics.classification(logits, np.ones(100, int), np.ones(100))["ece"] == pytest.approx(0.75)


def test_ece_bins_are_closed_above():
    correct = np.array([True, False])
    assert metrics._ece(np.array([12 / 15, 0.79]), correct) == pytest.approx((0.79 - 0.2) / 2)
    assert metrics._ece(np.array([12 / 15, 0.81]), correct) == pytest.approx((0.81 + 0.2) / 2)


def test_ece_equals_a_loop_over_bins():
    probabilities = softmax(LOGITS, axis=1)
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == TARGETS
    expected = 0.0
    for k in range(15):
        rows = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if rows.any():
            expected += rows.mean() * abs(correct[rows].mean() - confidence[rows].mean())
    assert metrics.classification(LOGITS, TARGETS, ONES)["ece"] == pytest.approx(expected)


def test_classification_undefined_auroc_is_none():
    scores = metrics.classification(LOGITS[:, :2] * 1e4, np.zeros(200, int), ONES)
    assert scores["auroc"] is None
    assert scores["nll"] == pytest.approx(-log_softmax(LOGITS[:, :2] * 1e4, axis=1)[:, 0].mean())


LABELS = (RNG.random((200, 4)) < expit(LOGITS)).astype(int)


def test_multilabel_metrics_match_their_formulas():
    scores = metrics.multilabel(LOGITS, LABELS, ONES)
    target, predictions, probabilities = LABELS == 1, LOGITS > 0, expit(LOGITS)
    precision, recall, f1 = np.transpose([precision_recall_f1(target[:, c], predictions[:, c]) for c in range(4)])
    micro = precision_recall_f1(target, predictions)
    specificity = [(~predictions[:, c])[~target[:, c]].mean() for c in range(4)]
    expected = {
        "accuracy": np.mean(target == predictions),
        "subset_accuracy": np.mean([(target[i] == predictions[i]).all() for i in range(200)]),
        "macro_precision": precision.mean(),
        "macro_recall": recall.mean(),
        "macro_f1": f1.mean(),
        "micro_precision": micro[0],
        "micro_recall": micro[1],
        "micro_f1": micro[2],
        "balanced_accuracy": np.mean((recall + specificity) / 2),
        "brier": np.mean((probabilities - LABELS) ** 2),
        "auroc": np.mean([pairs_in_order(target[:, c], LOGITS[:, c]) for c in range(4)]),
        "average_precision": np.mean([average_precision(target[:, c], LOGITS[:, c]) for c in range(4)]),
        "nll": -np.log(np.where(target, probabilities, 1 - probabilities)).mean(),
    }
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value, rel=1e-12), name
    assert scores["per_class"] == {
        "precision": pytest.approx(precision, rel=1e-12),
        "recall": pytest.approx(recall, rel=1e-12),
        "f1": pytest.approx(f1, rel=1e-12),
        "support": LABELS.sum(0).tolist(),
    }
    assert scores["ece"] < 0.08  # the labels were sampled from these probabilities
    assert metrics.multilabel(-LOGITS, LABELS, ONES)["ece"] > 0.3


def test_multilabel_undefined_metrics_are_none_or_skipped():
    all_negative = metrics.multilabel(LOGITS, np.zeros_like(LABELS), ONES)
    assert all_negative["auroc"] is all_negative["average_precision"] is all_negative["balanced_accuracy"] is None
    assert all_negative["micro_f1"] == all_negative["macro_recall"] == 0
    all_positive = metrics.multilabel(LOGITS, np.ones_like(LABELS), ONES)
    assert all_positive["auroc"] is all_positive["balanced_accuracy"] is None and all_positive["average_precision"] == 1
    labels = LABELS.copy()
    labels[:, 0], labels[:, 1] = 0, 1  # label 1 has an average precision, label 0 has not; neither has an AUROC
    scores, target = metrics.multilabel(LOGITS, labels, ONES), labels == 1
    ordered = [pairs_in_order(target[:, c], LOGITS[:, c]) for c in (2, 3)]
    assert scores["auroc"] == pytest.approx(np.mean(ordered), rel=1e-12)
    precision = [1.0, *(average_precision(target[:, c], LOGITS[:, c]) for c in (2, 3))]
    assert scores["average_precision"] == pytest.approx(np.mean(precision), rel=1e-12)


@pytest.mark.parametrize("positive", [0, 1])
def test_metrics_handle_a_single_label_or_class(positive: int):
    one = metrics.multilabel(LOGITS[:, :1], np.full((200, 1), positive), ONES)
    expected = precision_recall_f1(np.full(200, positive == 1), LOGITS[:, 0] > 0)
    assert [one["per_class"][name] for name in ("precision", "recall", "f1")] == [[value] for value in expected]
    assert metrics.classification(LOGITS[:, :1], np.zeros(200, int), ONES)["macro_f1"] == 1


def test_regression_equals_scikit_learn():
    targets = LOGITS[:, 0]
    predictions = targets + LOGITS[:, 1] * 0.5 + 0.3
    scores = metrics.regression(predictions, targets, ONES)
    assert scores["mae"] == pytest.approx(reference.mean_absolute_error(targets, predictions))
    assert scores["rmse"] == pytest.approx(reference.root_mean_squared_error(targets, predictions))
    assert scores["r2"] == pytest.approx(reference.r2_score(targets, predictions))
    centred = (predictions - predictions.mean()) @ (targets - targets.mean())
    assert scores["pearson"] == pytest.approx(centred / 200 / predictions.std() / targets.std())


def test_regression_metrics_match_known_predictions():
    targets = np.arange(5)
    exact = metrics.regression(targets.astype(float), targets, np.ones(5))
    assert exact == {"mae": 0, "rmse": 0, "r2": 1, "pearson": pytest.approx(1), "spearman": pytest.approx(1)}
    assert metrics.regression(targets**3.0, targets, np.ones(5))["spearman"] == pytest.approx(1)  # computed on ranks
    mean = metrics.regression(np.full(5, 2.0), targets, np.ones(5))
    assert (mean["r2"], mean["pearson"], mean["spearman"]) == (pytest.approx(0), None, None)
    assert metrics.regression(targets, np.full(5, 2), np.ones(5))["r2"] is None


METRIC_CASES = {
    "classification": (metrics.classification, LOGITS, TARGETS),
    "multilabel": (metrics.multilabel, LOGITS, LABELS),
    "regression": (metrics.regression, LOGITS[:, 0], LOGITS[:, 1]),
}


@pytest.mark.parametrize("kind", list(METRIC_CASES))
def test_metrics_ignore_padding(kind):
    score, outputs, targets = METRIC_CASES[kind]
    rows = RNG.permutation(230)
    garbage = np.full((30, *outputs.shape[1:]), np.nan)
    padded = np.concatenate([outputs, garbage])[rows]
    weight = np.concatenate([ONES, np.zeros(30)])[rows]
    found = score(padded, np.concatenate([targets, np.zeros((30, *targets.shape[1:]), targets.dtype)])[rows], weight)
    expected = score(outputs, targets, ONES)
    for name in metrics.METRICS[kind]:
        assert name == "loss" or found[name] == pytest.approx(expected[name], rel=1e-9), name


@pytest.mark.parametrize("kind", list(METRIC_CASES))
def test_metrics_are_json_and_include_every_selectable_one(kind):
    score, outputs, targets = METRIC_CASES[kind]
    for rows, weight in ((outputs, ONES), (outputs * np.nan, ONES), (outputs, 0 * ONES), (outputs.astype("f4"), ONES)):
        scores = score(rows, targets, weight)
        assert json.loads(json.dumps(scores, allow_nan=False)) == scores
        assert set(metrics.METRICS[kind]) - {"loss"} <= set(scores)
    for weight in (np.zeros(200), ONES):
        undefined = score(outputs if not weight.any() else outputs * np.nan, targets, weight)
        assert all(value is None for value in undefined.values())


def test_metrics_improve_in_the_declared_direction():
    """Inverted predictions make every metric worse."""
    logits = np.eye(4)[TARGETS] * 4 + LOGITS * 0.3
    cases = {
        "classification": (metrics.classification, logits, -logits, TARGETS),
        "multilabel": (metrics.multilabel, LABELS * 8 - 4.0, 4.0 - LABELS * 8, LABELS),
        "regression": (metrics.regression, LOGITS[:, 0] + 0.01, -LOGITS[:, 0], LOGITS[:, 0]),
    }
    for kind, (score, better, worse, targets) in cases.items():
        high, low = score(better, targets, ONES), score(worse, targets, ONES)
        for name, higher_is_better in metrics.METRICS[kind].items():
            assert name == "loss" or (high[name] > low[name]) == higher_is_better, (kind, name)


@pytest.mark.parametrize(
    ("score", "shapes"),
    [
        (metrics.classification, ((5, 3), (5, 1), (5,))),
        (metrics.classification, ((5,), (5,), (5,))),
        (metrics.classification, ((5, 3), (5,), (4,))),
        (metrics.multilabel, ((5, 3), (5,), (5,))),
        (metrics.regression, ((5, 1), (5,), (5,))),
        (metrics.regression, ((5,), (5, 1), (5,))),
    ],
)
def test_metrics_reject_mismatched_shapes(score, shapes):
    outputs, targets, weight = shapes
    with pytest.raises(ValueError, match="expected"):
        score(np.zeros(outputs), np.zeros(targets, int), np.ones(weight))


def test_metrics_reject_out_of_range_targets():
    with pytest.raises(ValueError, match="outside"):
        metrics.classification(np.zeros((2, 3)), np.array([0, 3]), np.ones(2))
    with pytest.raises(ValueError, match=r"in \[0, 1\]"):
        metrics.multilabel(np.zeros((2, 3)), np.full((2, 3), 2), np.ones(2))


def test_weighted_f1_of_a_known_confusion():
    logits = np.eye(2)[[0, 0, 1, 1]]
    scores = metrics.classification(logits, np.array([0, 0, 0, 1]), np.ones(4))
    assert scores["weighted_f1"] == pytest.approx((3 * 0.8 + 2 / 3) / 4)  # F1 0.8 of three rows, 2/3 of one


def test_sentiment_metrics_of_known_predictions():
    targets = np.array([-3.0, -1.4, 0.0, 0.6, 2.6, 1.0])
    predictions = np.array([-3.7, -0.6, 0.2, -0.1, 1.6, 3.4])
    assert metrics.sentiment(predictions, targets, np.ones(6)) == {
        "acc2": pytest.approx(5 / 6),  # all but 0.6
        "acc2_nonzero": pytest.approx(4 / 5),  # without the third
        "acc5": pytest.approx(4 / 6),  # -2 -1 0 0 2 2 for -2 -1 0 1 2 1
        "acc7": pytest.approx(3 / 6),  # -3 -1 0 0 2 3 for -3 -1 0 1 3 1
    }


def test_sentiment_metrics_round_halves_to_even_and_targets_before():
    halves = metrics.sentiment(np.array([0.5, 1.5, 2.5]), np.array([0.0, 2.0, 2.0]), np.ones(3))
    assert halves["acc7"] == 1
    scaled = metrics.sentiment(np.array([-1.0, 2.0]), np.array([1e-8, 2.5 + 1e-7]), np.ones(2))
    assert scaled == {"acc2": 0.5, "acc2_nonzero": 1.0, "acc5": 0.5, "acc7": 0.5}
    assert metrics.sentiment(np.ones(2), np.zeros(2), np.ones(2))["acc2_nonzero"] is None
    assert set(metrics.sentiment(np.ones(2), np.ones(2), np.zeros(2)).values()) == {None}


@pytest.mark.parametrize(("classes", "listed", "confusion"), [(20, True, True), (21, False, True), (101, False, False)])
def test_class_lists_of_many_classes_are_left_out(classes, listed, confusion):
    scores = metrics.classification(np.eye(classes), np.arange(classes), np.ones(classes))
    assert (scores["confusion"] is not None) == confusion
    for prefix in ("", "task/"):
        logged = metrics.without_class_lists({prefix + name: value for name, value in scores.items()})
        assert (prefix + "per_class" in logged, prefix + "confusion" in logged) == (listed, listed)
        assert logged[prefix + "accuracy"] == 1


@pytest.mark.thorough(but=("100",))
@pytest.mark.parametrize("classes", [100, 460])
def test_result_of_many_classes_is_small(classes):
    scores = metrics.classification(RNG.normal(size=(3000, classes)), RNG.integers(0, classes, 3000), np.ones(3000))
    result = {"valid": metrics.without_class_lists(scores), "test": scores}
    assert len(json.dumps(result, indent=2)) < 200_000
