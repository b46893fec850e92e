"""Attribution, interaction, partial information and calibration, on inputs with known results."""

import itertools

import numpy as np
import pytest

from mmfusion.analysis import incomplete
from mmfusion.analysis.probing import attribution, calibration, confidence, emap, pid, probe
from mmfusion.inference import shapley
from mmfusion.training import uncertainty

pytestmark = pytest.mark.usefixtures("traced_once")

RANDOM = np.random.default_rng(0)


def test_shapley_values_are_mean_gains_over_all_orders():
    value = {s: float(RANDOM.normal()) for s in shapley.subsets("abc")}
    phi = shapley.shapley(value)
    assert sum(phi.values()) == pytest.approx(value["a", "b", "c"] - value[()])
    orders = list(itertools.permutations("abc"))
    for m in "abc":
        gains = [value[tuple(sorted((*o[: o.index(m)], m)))] - value[tuple(sorted(o[: o.index(m)]))] for o in orders]
        assert phi[m] == pytest.approx(np.mean(gains))


def test_shapley_values_match_xor_copy_and_a_single_modality():
    xor = {(): 0.5, ("a",): 0.5, ("b",): 0.5, ("a", "b"): 1.0}
    copy = {(): 0.5, ("a",): 1.0, ("b",): 1.0, ("a", "b"): 1.0}
    single = {(): 0.5, ("a",): 1.0, ("b",): 0.5, ("a", "b"): 1.0}
    assert shapley.shapley(xor) == shapley.shapley(copy) == {"a": 0.25, "b": 0.25}
    assert shapley.shapley(single) == {"a": 0.5, "b": 0.0}
    with pytest.raises(ValueError, match=r"missing \[\('b',\)\]"):
        shapley.shapley({(): 0.5, ("a",): 1.0, ("a", "b"): 1.0})


def test_perceptual_score_of_an_unused_modality_is_zero():
    label = RANDOM.integers(0, 4, 2000)

    def score(rows):  # reads a only
        return float((label[rows["a"]] == label).mean())

    decrease = attribution.perceptual(score, "ab", 2000, repeats=5, seed=0)
    assert decrease["b"] == 0.0
    assert decrease["a"] == pytest.approx(0.75, abs=0.02)
    with pytest.raises(ValueError, match="must be above 0"):
        attribution.perceptual(lambda rows: 0.0, "ab", 10, repeats=1, seed=0)


def test_emap_of_an_additive_model_is_the_model():
    left, right = RANDOM.normal(size=(2, 40, 3))
    table = left[:, None] + right[None]
    np.testing.assert_allclose(emap.emap(table), left + right, atol=1e-12)


def test_emap_of_xor_is_constant():
    a, b = np.array(list(itertools.product((0, 1), repeat=2)) * 10).T
    table = np.eye(2)[a[:, None] ^ b[None]]  # [n, n, 2]
    np.testing.assert_allclose(emap.emap(table), 0.5)
    with pytest.raises(ValueError, match="must have the shape"):
        emap.emap(table[:3])


def test_emap_is_the_least_squares_additive_projection():
    table = RANDOM.normal(size=(6, 6, 1))
    design = np.array([[*np.eye(6)[i], *np.eye(6)[j]] for i in range(6) for j in range(6)])
    fitted = design @ np.linalg.lstsq(design, table.reshape(36), rcond=None)[0]
    np.testing.assert_allclose(emap.emap(table)[:, 0], fitted.reshape(6, 6).diagonal(), atol=1e-12)


BITS = list(itertools.product((0, 1), repeat=2))
TABLES = {  # redundant, unique 1, unique 2, synergy in bits
    "xor": ({(a, b, a ^ b): 0.25 for a, b in BITS}, (0, 0, 0, 1)),
    "copy": ({(a, a, a): 0.5 for a in (0, 1)}, (1, 0, 0, 0)),
    "first": ({(a, b, a): 0.25 for a, b in BITS}, (0, 1, 0, 0)),
    "second": ({(a, b, b): 0.25 for a, b in BITS}, (0, 0, 1, 0)),
    "both": ({(a, b, 2 * a + b): 0.25 for a, b in BITS}, (0, 1, 1, 0)),
    "and": ({(a, b, a & b): 0.25 for a, b in BITS}, (0.311278, 0, 0, 0.5)),
    "nothing": ({(a, b, c): 0.125 for a, b in BITS for c in (0, 1)}, (0, 0, 0, 0)),
}


@pytest.mark.parametrize("name", TABLES)
def test_information_decomposition_matches_known_gates(name):
    entries, expected = TABLES[name]
    table = np.zeros((2, 2, 4))
    for cell, probability in entries.items():
        table[cell] = probability
    found = pid.decompose(table)
    np.testing.assert_allclose((found.redundant, found.unique_1, found.unique_2, found.synergy), expected, atol=2e-4)


def test_information_decomposition_is_bounded_and_sums():
    for _ in range(5):
        p = RANDOM.dirichlet(np.full(3 * 4 * 2, 0.5)).reshape(3, 4, 2)
        found = pid.decompose(p)
        first, second = pid._information(p.sum(axis=1)), pid._information(p.sum(axis=0))
        both = pid._information(p.reshape(12, 2))
        assert found.redundant + found.unique_1 == pytest.approx(first, abs=1e-6)
        assert found.redundant + found.unique_2 == pytest.approx(second, abs=1e-6)
        assert found.redundant + found.unique_1 + found.unique_2 + found.synergy == pytest.approx(both, abs=1e-6)
        assert -1e-9 <= found.redundant <= min(first, second) + 1e-6
    for invalid in (np.zeros((2, 2, 2)), np.full((2, 2), 0.25), np.full((2, 2, 2), np.nan), -np.ones((2, 2, 2))):
        with pytest.raises(ValueError, match="finite, non-negative"):
            pid.decompose(invalid)


def calibrated_predictions(rows=200_000, scale=2.0):
    logits = scale * RANDOM.normal(size=(rows, 3))
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    return logits, (RANDOM.random((rows, 1)) > probabilities.cumsum(axis=1)).sum(axis=1)


@pytest.mark.parametrize("equal_mass", [False, True])
def test_calibrated_model_has_zero_error_and_temperature_one(equal_mass):
    logits, targets = calibrated_predictions()
    found = calibration.reliability(logits, targets, equal_mass=equal_mass)
    assert found.error < 0.005
    assert found.count.sum() == len(targets)
    assert uncertainty.temperature(logits, targets) == pytest.approx(1.0, abs=0.02)
    if equal_mass:
        assert np.ptp(found.count) <= 1


def test_temperature_corrects_overconfidence():
    logits, targets = calibrated_predictions()
    overconfident = 3.0 * logits
    assert calibration.reliability(overconfident, targets).error > 0.05
    found = uncertainty.temperature(overconfident, targets)
    assert found == pytest.approx(3.0, abs=0.05)
    assert uncertainty.nll(overconfident, targets, found) < uncertainty.nll(overconfident, targets)
    assert calibration.reliability(overconfident / found, targets).error < 0.005


def test_probed_temperature_is_fitted_on_validation():
    (logits, targets), (others, other_targets) = (calibrated_predictions(20_000) for _ in range(2))
    found = probe._calibration((3.0 * logits, targets), (others, other_targets))
    assert found["temperature"] == pytest.approx(3.0, abs=0.2)  # that of test is 1
    assert found["before"]["ece"] < 0.02 < found["after"]["ece"]


def test_calibration_error_equals_the_ece_metric():
    from mmfusion import metrics

    logits, targets = calibrated_predictions(500)
    scores = metrics.classification(logits, targets, np.ones(500))
    assert calibration.reliability(logits, targets).error == pytest.approx(scores["ece"])
    assert uncertainty.nll(logits, targets) == pytest.approx(scores["nll"])


def test_additions_are_gains_of_a_modality_over_every_set_of_others():
    found = incomplete.additions({"": 0.1, "a": 0.4, "b": 0.6, "a+b": 0.5})
    assert found == pytest.approx({("", "a"): 0.3, ("", "b"): 0.5, ("a", "b"): 0.1, ("b", "a"): -0.1})
    three = {"+".join(kept): float(len(kept) ** 2) for kept in shapley.subsets("abc")}
    gains = incomplete.additions(three)
    assert len(gains) == 12 and gains["a+c", "b"] == 5.0 and gains["", "c"] == 1.0


def test_evenness_is_0_of_one_modality_and_1_of_equal_ones():
    assert incomplete.evenness({"a": 0.2, "b": 0.2, "c": 0.2}) == pytest.approx(1.0)
    assert incomplete.evenness({"a": 0.2, "b": -0.1}) == 0.0
    assert incomplete.evenness({"a": 3.0, "b": 1.0}) == pytest.approx(0.8113, abs=1e-4)  # the entropy of 1/4 in bits
    assert np.isnan(incomplete.evenness({"a": 0.0, "b": 0.0})) and np.isnan(incomplete.evenness({"a": 1.0}))


def test_protection_is_the_gain_within_and_beyond_the_trained_rate():
    plain = {0.0: 0.9, 0.25: 0.8, 0.5: 0.7, 0.75: 0.5}
    grid = {0.0: plain, 0.5: {0.0: 0.88, 0.25: 0.85, 0.5: 0.8, 0.75: 0.49}, 0.75: dict.fromkeys(plain, 0.9)}
    found = incomplete.protection(grid)
    assert found[0.5] == pytest.approx((0.075, -0.01))
    assert found[0.75][0] == pytest.approx((0.1 + 0.2 + 0.4) / 3) and np.isnan(found[0.75][1])


def test_risk_coverage_of_perfect_useless_and_reversed_confidence():
    wrong = np.repeat([0, 1], [80, 20])  # 100 examples of two classes, of which the last 20 are misclassified
    order = {"perfect": np.linspace(3, 1, 100), "useless": np.ones(100), "reversed": np.linspace(1, 3, 100)}
    found = {
        name: confidence.risk_coverage(np.stack([margin, np.zeros(100)], axis=1), wrong)
        for name, margin in order.items()
    }
    assert found["perfect"].risks[15] == 0.0 and found["perfect"].risks[-1] == pytest.approx(0.2)
    expected = np.mean(np.cumsum(wrong) / np.arange(1, 101))
    assert found["perfect"].area == pytest.approx(expected)
    assert found["useless"].risks == pytest.approx([0.2] * 20) and found["useless"].area == pytest.approx(0.2)
    assert found["reversed"].area > 0.5


def test_detection_is_the_probability_that_the_unlike_input_is_less_confident():
    sure, unsure = np.array([[4.0, 0], [5.0, 0]]), np.array([[0.0, 0], [0.0, 4.5]])
    assert confidence.detection(sure, np.zeros((3, 2))) == 1.0
    assert confidence.detection(np.zeros((3, 2)), sure) == 0.0
    assert confidence.detection(sure, unsure) == 0.75  # 4.5 lies between 4 and 5
    assert confidence.detection(sure, sure) == 0.5
