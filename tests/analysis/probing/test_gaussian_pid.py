"""Information of several Gaussian sources about a label, where it is known."""

import numpy as np
import pytest

from mmfusion.analysis.probing.gaussian_pid import decompose

RANDOM = np.random.default_rng(0)
N = 40_000
NOISE = RANDOM.standard_normal((N, 6))
LABEL = RANDOM.standard_normal((N, 1))
BITS = 0.5 * np.log2(1 + 1 / 0.25)  # of LABEL plus noise of variance 1/4


def test_unique_information_is_that_of_the_only_source_that_has_any():
    found = decompose({"a": LABEL + 0.5 * NOISE[:, :1], "b": NOISE[:, 1:2], "c": NOISE[:, 2:4]}, LABEL)
    assert found.unique == pytest.approx({"a": BITS, "b": 0, "c": 0}, abs=0.01)
    assert found.redundant == pytest.approx(0, abs=0.01) and found.synergy == pytest.approx(0, abs=0.01)


def test_copies_of_a_source_are_redundant_but_for_what_independent_noise_would_add():
    source = LABEL + 0.5 * NOISE[:, :1]
    found = decompose({"a": source, "b": source, "c": source}, LABEL)
    # Of k independent measurements with this noise.
    three, two = (0.5 * np.log2(1 + k / 0.25) for k in (3, 2))
    assert found.unique == pytest.approx(dict.fromkeys("abc", three - two), abs=0.02)
    assert found.synergy == pytest.approx(BITS - three, abs=0.02)  # the copies share their noise: less than independent
    assert sum(found.unique.values()) + found.redundant + found.synergy == pytest.approx(BITS, abs=0.02)


def test_synergy_is_what_one_source_tells_of_the_noise_of_another():
    noise = NOISE[:, :1]
    found = decompose({"a": LABEL + noise, "b": noise + 0.1 * NOISE[:, 1:2], "c": NOISE[:, 2:3]}, LABEL)
    alone = 0.5 * np.log2(2)
    together = 0.5 * np.log2(1 + 1 / (0.01 / 1.01))  # the noise is known but for the variance 0.01 / 1.01
    assert found.unique == pytest.approx({"a": alone, "b": 0, "c": 0}, abs=0.01)
    assert found.synergy == pytest.approx(together - alone, abs=0.02)


def test_decomposition_does_not_depend_on_units_or_order():
    sources = {"a": LABEL + NOISE[:, :2], "b": LABEL - NOISE[:, 2:3], "c": NOISE[:, 3:5] + 0.3 * LABEL}
    first = decompose(sources, LABEL)
    moved = {"c": sources["c"] @ np.array([[2.0, 1.0], [0.0, 3.0]]) + 7, "a": 1e3 * sources["a"], "b": sources["b"]}
    second = decompose(moved, -5 * LABEL)
    assert second.unique == pytest.approx(first.unique, abs=1e-4)
    assert (second.redundant, second.synergy) == pytest.approx((first.redundant, first.synergy), abs=1e-4)
