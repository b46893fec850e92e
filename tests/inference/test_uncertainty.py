"""Calibration, conformal prediction and contributions, on logits with known answers; nothing is trained."""

import contextlib

import numpy as np
import pytest
from scipy import stats
from scipy.special import softmax

from mmfusion.data.targets import Scale
from mmfusion.inference.contributions import contributions, needed_subsets
from mmfusion.inference.predict import _header
from mmfusion.inference.predictions import Predictions, Uncertainty, predictions, uncertainties
from mmfusion.objectives import Task
from mmfusion.training import calibration
from mmfusion.training.calibration import Calibration
from mmfusion.training.uncertainty import conformal_quantile, examples_needed, nll
from tests.errors import rejects

CLASSES = Task("classification", 3)
NAMES = ("a", "b", "c")


def collected(logits, targets, weight=None):
    weight = np.ones(len(targets), np.float32) if weight is None else weight
    present = np.ones(len(logits), bool)
    return {"logits": {"t": logits}, "targets": {"t": targets}, "loss_weight": {"t": weight}, "any_present": present}


def labelled(random, n, scale=2.0):
    """Returns logits `[n, 3]` and classes drawn from their softmax."""
    logits = scale * random.normal(size=(n, 3))
    return logits, (random.random((n, 1)) > softmax(logits, axis=1).cumsum(axis=1)).sum(axis=1)


def predicted(logits, task, uncertainty, names=NAMES):
    return predictions({("x",): {"t": logits}}, {"t": task}, {"t": names}, [""] * len(logits), uncertainty).tasks["t"]


@pytest.mark.parametrize(
    ("n", "coverage", "rank"), [(9, 0.9, 9), (9, 0.8, 8), (19, 0.9, 18), (20, 0.9, 19), (9, 0.7, 7), (1, 0.5, 1)]
)
def test_conformal_quantile_is_a_known_rank(n, coverage, rank):
    scores = np.random.default_rng(0).permutation(np.arange(1.0, n + 1))
    assert conformal_quantile(scores, coverage) == rank


@pytest.mark.parametrize(("coverage", "needed"), [(0.5, 1), (0.8, 4), (0.9, 9), (0.95, 19), (0.99, 99), (0.6, 2)])
def test_examples_needed_is_the_smallest_number_with_a_finite_quantile(coverage, needed):
    assert examples_needed(coverage) == needed
    assert np.isfinite(conformal_quantile(np.zeros(needed), coverage))
    assert conformal_quantile(np.zeros(needed - 1), coverage) == np.inf


@pytest.mark.parametrize("coverage", [0.5, 0.8, 0.9])
@pytest.mark.parametrize("log", [False, True])
def test_intervals_cover_exactly_the_expected_share(coverage, log):
    trials, n, random = 3000, 19, np.random.default_rng(1)
    task = Task("regression", 1, scale=Scale(2.0, 3.0, log))
    covered, widths = 0, []
    for _ in range(trials):
        logits = random.normal(size=(n + 1, 1))
        z = logits[:, 0] + random.standard_t(3, size=n + 1) * 0.3
        fitted = calibration.fit(collected(logits[:n], z[:n]), {"t": task})
        found = predicted(logits[n:], task, uncertainties({"t": task}, fitted, intervals=coverage), ())
        low, high = found.intervals[0]
        covered += low <= task.scale.invert(z[n]) <= high
        assert low <= found.values[0] <= high and (low > 0 or not log)
        widths.append(high - low)
    expected = np.ceil((n + 1) * coverage) / (n + 1)
    assert stats.binomtest(covered, trials, expected).pvalue > 1e-3
    assert np.isfinite(widths).all()


@pytest.mark.parametrize("coverage", [0.8, 0.95])
def test_sets_cover_at_least_the_requested_share(coverage):
    trials, n, random = 600, 39, np.random.default_rng(2)
    covered = 0
    for _ in range(trials):
        logits, targets = labelled(random, n + 1)
        logits *= 3  # overconfident
        fitted = calibration.fit(collected(logits[:n], targets[:n]), {"t": CLASSES})
        found = predicted(logits[n:], CLASSES, uncertainties({"t": CLASSES}, fitted, sets=coverage))
        covered += NAMES[targets[n]] in found.sets[0]
        assert found.labels[0] == found.sets[0][0]
    assert stats.binomtest(covered, trials, coverage, alternative="less").pvalue > 1e-3


def test_sets_are_those_of_the_definition():
    fitted = {"t": Calibration(5.0, np.array([0.1, 0.2, 0.6, 0.8]))}
    logits = np.log([[0.7, 0.2, 0.1], [0.45, 0.4, 0.15], [0.34, 0.33, 0.33]])
    for calibrated in (True, False):
        found = predicted(logits, CLASSES, uncertainties({"t": CLASSES}, fitted, sets=0.6, calibrated=calibrated))
        assert found.sets == [("a",), ("a", "b"), ("a",)]  # 1 - p up to 0.6, and always the most probable


def test_calibration_finds_the_temperature_and_keeps_labels():
    logits, targets = labelled(np.random.default_rng(3), 20_000)
    fitted = calibration.fit(collected(3 * logits, targets), {"t": CLASSES})
    assert fitted["t"].temperature == pytest.approx(3.0, abs=0.15)
    assert len(fitted["t"].scores) == calibration.MAX_EXAMPLES
    raw, calibrated = (
        predicted(3 * logits, CLASSES, uncertainties({"t": CLASSES}, fitted, calibrated=on)) for on in (False, True)
    )
    assert raw.labels == calibrated.labels
    np.testing.assert_allclose(raw.probabilities, softmax(3 * logits, axis=1))
    np.testing.assert_allclose(calibrated.probabilities, softmax(3 * logits / fitted["t"].temperature, axis=1))
    content = calibration.to_json(fitted, {"step": 7, "checksum": "a"})
    assert calibration.from_json(content, "a")["t"].temperature == fitted["t"].temperature


def test_calibration_of_multilabel_tasks_finds_the_temperature():
    random = np.random.default_rng(4)
    logits = 2 * random.normal(size=(20_000, 3))
    targets = (random.random(logits.shape) < 1 / (1 + np.exp(-logits))).astype(np.float32)
    task = Task("multilabel", 3)
    fitted = calibration.fit(collected(logits / 2, targets), {"t": task})["t"]
    assert fitted.temperature == pytest.approx(0.5, abs=0.03) and fitted.scores.size == 0
    assert nll(logits / 2, targets, fitted.temperature) < nll(logits / 2, targets)


def test_calibration_leaves_out_rows_without_label_or_finite_logits():
    logits, targets = labelled(np.random.default_rng(5), 40)
    weight = np.ones(40, np.float32)
    weight[30:] = 0
    targets[30:] = -1
    spoiled = logits.copy()
    spoiled[20:30] = np.nan
    found = calibration.fit(collected(spoiled, targets, weight), {"t": CLASSES})["t"]
    expected = calibration.fit(collected(logits[:20], targets[:20]), {"t": CLASSES})["t"]
    assert found.temperature == expected.temperature
    np.testing.assert_array_equal(found.scores, expected.scores)


@pytest.mark.parametrize("rows", [0, 5])
def test_calibration_without_a_likelihood_maximum_is_the_identity(rows):
    logits = np.eye(3)[np.arange(rows) % 3]
    fitted = calibration.fit(collected(logits, np.arange(rows) % 3), {"t": CLASSES})["t"]  # every row is right
    assert (fitted.temperature, len(fitted.scores)) == (1.0, rows)


def test_uncertainties_refuse_what_the_run_cannot_give():
    fitted = {"t": Calibration(1.0, np.zeros(8))}
    with rejects("sets", 0.9, says="at least 9 validation examples of t, the run has 8"):
        uncertainties({"t": CLASSES}, fitted, sets=0.9)
    for coverage in (0.0, 1.0, 90.0, float("nan")):
        with rejects("sets", coverage, says="above 0 and below 1"):
            uncertainties({"t": CLASSES}, fitted, sets=coverage)
    with rejects("intervals", 0.5, says="needs a regression task (t is classification)"):
        uncertainties({"t": CLASSES}, fitted, intervals=0.5)


def test_predict_refuses_a_class_with_the_name_of_an_added_column():
    fitted = {"t": Calibration(1.0, np.linspace(0, 1, 20))}
    added = uncertainties({"t": CLASSES}, fitted, sets=0.8)
    for uncertainty, refused in ((added, True), ({"t": Uncertainty()}, False)):
        task = predicted(np.zeros((0, 3)), CLASSES, uncertainty, names=("a", "set", "b"))
        with rejects("t: set", None, says="several columns") if refused else contextlib.nullcontext():
            assert _header(Predictions({"t": task}, [])) == ["t", "t: a", "t: set", "t: b", "error"]


def test_contributions_are_shapley_values_of_each_row():
    random = np.random.default_rng(6)
    task, subsets = Task("regression", 1, scale=Scale(1.0, 2.0)), needed_subsets(["b", "a", "c"])
    assert len(subsets) == 8 and subsets[0] == () and subsets[-1] == ("a", "b", "c")
    gain = {m: random.normal(size=4) for m in "abc"}
    joint = random.normal(size=4)  # of a and b together
    logits = {
        kept: {"t": (sum((gain[m] for m in kept), np.zeros(4)) + joint * ({"a", "b"} <= set(kept)))[:, None]}
        for kept in subsets
    }
    found = predictions(logits, {"t": task}, {"t": ()}, ["", "", "", "bad"], {"t": Uncertainty()}).tasks["t"]
    np.testing.assert_allclose(found.contributions["a"][:3], 2 * (gain["a"] + joint / 2)[:3])
    np.testing.assert_allclose(found.contributions["c"][:3], 2 * gain["c"][:3])
    assert all(np.isnan(share[3]) for share in found.contributions.values())
    total = 2 * (logits["a", "b", "c"]["t"] - logits[()]["t"])[:3, 0]
    np.testing.assert_allclose(sum(found.contributions.values())[:3], total)


def test_contributions_divide_the_probability_of_the_predicted_class():
    logits = {(): np.zeros((1, 3)), ("a",): np.log([[0.2, 0.3, 0.5]]), ("b",): np.zeros((1, 3))}
    logits[("a", "b")] = np.log([[0.1, 0.6, 0.3]])
    found = predictions(
        {kept: {"t": x} for kept, x in logits.items()}, {"t": CLASSES}, {"t": NAMES}, [""], {"t": Uncertainty()}
    ).tasks["t"]
    assert found.labels == ["b"]
    third = 1 / 3
    assert found.contributions["a"][0] == pytest.approx(((0.3 - third) + (0.6 - third)) / 2)
    assert found.contributions["b"][0] == pytest.approx((0.6 - 0.3) / 2)


def test_contributions_of_five_modalities_are_the_loss_without_each():
    subsets = needed_subsets("abcde")
    assert len(subsets) == 6 and subsets[-1] == tuple("abcde")
    value = {kept: np.array([10.0 * ("a" in kept) + len(kept)]) for kept in subsets}
    assert contributions(value) == {"a": 11.0, "b": 1.0, "c": 1.0, "d": 1.0, "e": 1.0}
