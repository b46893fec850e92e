import json

import numpy as np
import pytest
from scipy.special import expit, log_softmax, softmax
from sklearn import metrics as oracle

from mmfusion import metrics

RNG = np.random.default_rng(0)
LOGITS = RNG.normal(size=(200, 4)) * 2
TARGETS = np.where(RNG.random(200) < 0.5, LOGITS.argmax(1), RNG.integers(0, 4, 200))
ONES = np.ones(200)


def test_classification_against_scikit_learn():
    scores = metrics.classification(LOGITS, TARGETS, ONES)
    predictions, probabilities = LOGITS.argmax(1), softmax(LOGITS, axis=1)
    precision, recall, f1, support = oracle.precision_recall_fscore_support(TARGETS, predictions)
    expected = {
        "accuracy": oracle.accuracy_score(TARGETS, predictions),
        "balanced_accuracy": oracle.balanced_accuracy_score(TARGETS, predictions),
        "macro_precision": precision.mean(),
        "macro_recall": recall.mean(),
        "macro_f1": f1.mean(),
        "auroc": oracle.roc_auc_score(TARGETS, probabilities, multi_class="ovr"),
        "average_precision": oracle.average_precision_score(np.eye(4)[TARGETS], probabilities),
        "nll": oracle.log_loss(TARGETS, probabilities),
        "brier": ((probabilities - np.eye(4)[TARGETS]) ** 2).sum(1).mean(),
    }
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value), name
    assert scores["per_class"]["precision"] == pytest.approx(precision)
    assert scores["per_class"]["recall"] == pytest.approx(recall)
    assert scores["per_class"]["f1"] == pytest.approx(f1)
    assert scores["per_class"]["support"] == support.tolist()
    assert scores["confusion"] == oracle.confusion_matrix(TARGETS, predictions).tolist()


def test_classes_that_do_not_occur_follow_scikit_learn():
    logits, targets = LOGITS.copy(), np.where(TARGETS == 2, 0, TARGETS)
    logits[:, 3] = -9  # class 3 is never predicted, class 2 never a target
    scores = metrics.classification(np.pad(logits, ((0, 0), (0, 1)), constant_values=-99), targets, ONES)
    for name, score in (("macro_precision", oracle.precision_score), ("macro_recall", oracle.recall_score)):
        assert scores[name] == pytest.approx(score(targets, logits.argmax(1), average="macro", zero_division=0))
    recalls = [(logits.argmax(1) == targets)[targets == c].mean() for c in (0, 1, 3)]
    assert scores["balanced_accuracy"] == pytest.approx(np.mean(recalls))
    assert 0 < scores["auroc"] < 1


def test_auroc_is_the_share_of_pairs_in_order():
    logits, targets = LOGITS[:, :2].round(), TARGETS % 2  # rounding makes ties
    margin = logits[:, 1] - logits[:, 0]
    above = margin[targets == 1][:, None] - margin[targets == 0][None]
    expected = np.mean((above > 0) + 0.5 * (above == 0))
    assert metrics.classification(logits, targets, ONES)["auroc"] == pytest.approx(expected)


def test_ece_known_answers():
    """A model sure to p that is right p of the time is off by 0; one sure to p and never right, by p."""
    logits = np.tile([np.log(0.75), np.log(0.25)], (100, 1))
    targets = np.arange(100) % 4 == 0
    assert metrics.classification(logits, targets.astype(int), np.ones(100))["ece"] == pytest.approx(0, abs=1e-9)
    assert metrics.classification(logits, np.ones(100, int), np.ones(100))["ece"] == pytest.approx(0.75)


def test_ece_bins_are_closed_above():
    correct = np.array([True, False])
    assert metrics._ece(np.array([12 / 15, 0.79]), correct) == pytest.approx((0.79 - 0.2) / 2)
    assert metrics._ece(np.array([12 / 15, 0.81]), correct) == pytest.approx((0.81 + 0.2) / 2)


def test_ece_by_a_loop_over_bins():
    probabilities = softmax(LOGITS, axis=1)
    confidence, correct = probabilities.max(1), probabilities.argmax(1) == TARGETS
    expected = 0.0
    for k in range(15):
        rows = (confidence > k / 15) & (confidence <= (k + 1) / 15)
        if rows.any():
            expected += rows.mean() * abs(correct[rows].mean() - confidence[rows].mean())
    assert metrics.classification(LOGITS, TARGETS, ONES)["ece"] == pytest.approx(expected)


def test_undefined_auroc_is_none_and_large_logits_are_fine():
    scores = metrics.classification(LOGITS[:, :2] * 1e4, np.zeros(200, int), ONES)
    assert scores["auroc"] is None
    assert scores["nll"] == pytest.approx(-log_softmax(LOGITS[:, :2] * 1e4, axis=1)[:, 0].mean())


LABELS = (RNG.random((200, 4)) < expit(LOGITS)).astype(int)


def test_multilabel_against_scikit_learn():
    scores = metrics.multilabel(LOGITS, LABELS, ONES)
    predictions = LOGITS > 0
    expected = {
        "accuracy": 1 - oracle.hamming_loss(LABELS, predictions),
        "subset_accuracy": oracle.accuracy_score(LABELS, predictions),
        "macro_precision": oracle.precision_score(LABELS, predictions, average="macro"),
        "macro_recall": oracle.recall_score(LABELS, predictions, average="macro"),
        "macro_f1": oracle.f1_score(LABELS, predictions, average="macro"),
        "micro_f1": oracle.f1_score(LABELS, predictions, average="micro"),
        "micro_precision": oracle.precision_score(LABELS, predictions, average="micro"),
        "micro_recall": oracle.recall_score(LABELS, predictions, average="micro"),
        "balanced_accuracy": np.mean(
            [oracle.balanced_accuracy_score(LABELS[:, c], predictions[:, c]) for c in range(4)]
        ),
        "brier": np.mean([oracle.brier_score_loss(LABELS[:, c], expit(LOGITS[:, c])) for c in range(4)]),
        "auroc": oracle.roc_auc_score(LABELS, LOGITS),
        "average_precision": oracle.average_precision_score(LABELS, LOGITS),
        "nll": oracle.log_loss(LABELS.ravel(), expit(LOGITS).ravel()),
    }
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value), name
    assert scores["ece"] < 0.08  # the labels were drawn from these probabilities
    assert metrics.multilabel(-LOGITS, LABELS, ONES)["ece"] > 0.3
    assert metrics.multilabel(LOGITS, np.zeros_like(LABELS), ONES)["auroc"] is None


def test_regression_against_scikit_learn():
    targets = LOGITS[:, 0]
    predictions = targets + LOGITS[:, 1] * 0.5 + 0.3
    scores = metrics.regression(predictions, targets, ONES)
    assert scores["mae"] == pytest.approx(oracle.mean_absolute_error(targets, predictions))
    assert scores["rmse"] == pytest.approx(oracle.root_mean_squared_error(targets, predictions))
    assert scores["r2"] == pytest.approx(oracle.r2_score(targets, predictions))
    centred = (predictions - predictions.mean()) @ (targets - targets.mean())
    assert scores["pearson"] == pytest.approx(centred / 200 / predictions.std() / targets.std())


def test_regression_known_answers():
    targets = np.arange(5)
    exact = metrics.regression(targets.astype(float), targets, np.ones(5))
    assert exact == {"mae": 0, "rmse": 0, "r2": 1, "pearson": pytest.approx(1), "spearman": pytest.approx(1)}
    assert metrics.regression(targets**3.0, targets, np.ones(5))["spearman"] == pytest.approx(1)  # of ranks
    mean = metrics.regression(np.full(5, 2.0), targets, np.ones(5))
    assert (mean["r2"], mean["pearson"], mean["spearman"]) == (pytest.approx(0), None, None)
    assert metrics.regression(targets, np.full(5, 2), np.ones(5))["r2"] is None


SETS = {
    "classification": (metrics.classification, LOGITS, TARGETS),
    "multilabel": (metrics.multilabel, LOGITS, LABELS),
    "regression": (metrics.regression, LOGITS[:, 0], LOGITS[:, 1]),
}


@pytest.mark.parametrize("kind", list(SETS))
def test_padding_changes_nothing(kind):
    score, outputs, targets = SETS[kind]
    rows = RNG.permutation(230)
    garbage = np.full((30, *outputs.shape[1:]), np.nan)
    padded = np.concatenate([outputs, garbage])[rows]
    weight = np.concatenate([ONES, np.zeros(30)])[rows]
    same = score(padded, np.concatenate([targets, np.zeros((30, *targets.shape[1:]), targets.dtype)])[rows], weight)
    expected = score(outputs, targets, ONES)
    for name in metrics.METRICS[kind]:
        assert name == "loss" or same[name] == pytest.approx(expected[name], rel=1e-9), name


@pytest.mark.parametrize("kind", list(SETS))
def test_output_is_json_and_covers_the_choosable_metrics(kind):
    score, outputs, targets = SETS[kind]
    for rows, weight in ((outputs, ONES), (outputs * np.nan, ONES), (outputs, 0 * ONES), (outputs.astype("f4"), ONES)):
        scores = score(rows, targets, weight)
        assert json.loads(json.dumps(scores, allow_nan=False)) == scores
        assert set(metrics.METRICS[kind]) - {"loss"} <= set(scores)
    for weight in (np.zeros(200), ONES):
        broken = score(outputs if not weight.any() else outputs * np.nan, targets, weight)
        assert all(value is None for value in broken.values())


def test_a_better_model_scores_better_in_the_declared_direction():
    """Mixing the scores with noise makes every metric worse."""
    good = np.eye(4)[TARGETS] * 4 + LOGITS * 0.3
    cases = {
        "classification": (metrics.classification, good, -good, TARGETS),
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
def test_shape_mismatch_raises(score, shapes):
    outputs, targets, weight = shapes
    with pytest.raises(ValueError, match="expected"):
        score(np.zeros(outputs), np.zeros(targets, int), np.ones(weight))


def test_bad_targets_raise():
    with pytest.raises(ValueError, match="outside"):
        metrics.classification(np.zeros((2, 3)), np.array([0, 3]), np.ones(2))
    with pytest.raises(ValueError, match="0 or 1"):
        metrics.multilabel(np.zeros((2, 3)), np.full((2, 3), 2), np.ones(2))
