import jax
import numpy as np
import pytest

from mmfusion.analysis.known_answer import TASKS, bayes_rate, joint, sample


@pytest.mark.parametrize("modalities", [2, 3])
@pytest.mark.parametrize("task", TASKS)
def test_a_table_is_balanced(task, modalities):
    table = joint(task, modalities, 0.8)
    np.testing.assert_allclose(table.sum(), 1.0)
    np.testing.assert_allclose(table.sum(axis=tuple(range(modalities))), [0.5, 0.5])


def test_what_each_modality_tells():
    def rates(task, modalities=2):
        table = joint(task, modalities, 0.8)
        return [round(bayes_rate(table, visible=v), 6) for v in ((), (0,), (1,), None)]

    assert rates("redundant") == [0.5, 0.9, 0.9, 0.9]
    assert rates("unique_a") == [0.5, 0.9, 0.5, 0.9]
    assert rates("unique_b", 3) == [0.5, 0.5, 0.9, 0.9]
    assert rates("synergy") == rates("synergy", 3) == [0.5, 0.5, 0.5, 0.9]
    assert rates("none") == [0.5] * 4
    assert bayes_rate(joint("synergy", 2, 0.0)) == 0.5
    assert bayes_rate(joint("unique_c", 3, 1.0), visible=(2,)) == 1.0


def test_the_best_rate_with_absent_modalities():
    # Both are needed: present with chance 0.75² = 0.5625, else a guess.
    np.testing.assert_allclose(bayes_rate(joint("synergy", 2, 1.0), absent=0.25), 0.5625 + 0.4375 / 2)
    # Either will do: none is there with chance 1/16.
    np.testing.assert_allclose(bayes_rate(joint("redundant", 2, 1.0), absent=0.25), 15 / 16 + 1 / 32)


@pytest.mark.parametrize(("task", "modalities"), [("synergy", 1), ("unique_c", 2), ("x", 2)])
def test_there_is_no_such_task(task, modalities):
    with pytest.raises(ValueError, match=task):
        joint(task, modalities, 1.0)


def test_samples_show_what_the_table_says():
    table = joint("synergy", 3, 0.8)
    tokens, mask, label = sample(jax.random.key(0), table, 4096, tokens=4, width=8, padded=True, absent=0.25)
    symbols, there = [], []
    for m, name in enumerate("abc"):
        prototypes = 2.0 * np.random.default_rng(m).normal(size=(2, 8))
        real = np.where(np.asarray(mask[name])[..., None], tokens[name], 0.0)
        there.append(np.asarray(mask[name]).any(axis=1))
        distance = [np.where(mask[name], np.abs(real - p).sum(-1), np.inf).min(axis=1) for p in prototypes]
        symbols.append(np.argmin(distance, axis=0))
        assert abs(there[-1].mean() - 0.75) < 0.03
        assert set(np.asarray(mask[name]).sum(axis=1)) == {0, 1, 2, 3, 4}
    both = there[0] & there[1]
    agree = (symbols[0] ^ symbols[1])[both] == np.asarray(label)[both]
    assert abs(agree.mean() - 0.9) < 0.03
    assert abs((symbols[0][there[0]] == np.asarray(label)[there[0]]).mean() - 0.5) < 0.03
