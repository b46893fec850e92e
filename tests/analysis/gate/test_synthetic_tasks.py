import jax
import numpy as np
import pytest

from mmfusion.analysis.gate.synthetic_tasks import _prototypes, bayes_rate, joint, sample, tasks


@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
def test_a_table_is_balanced(modalities):
    for task in tasks(modalities):
        table = joint(task, modalities, 0.8)
        np.testing.assert_allclose(table.sum(), 1.0)
        np.testing.assert_allclose(table.sum(axis=tuple(range(modalities))), [0.5, 0.5])


def test_what_each_modality_tells():
    def rates(task, modalities=2):
        return [round(bayes_rate(task, modalities, 0.8, visible=v), 6) for v in ((), ("a",), ("b",), None)]

    assert rates("redundant") == [0.5, 0.9, 0.9, 0.9]
    assert rates("unique_a") == [0.5, 0.9, 0.5, 0.9]
    assert rates("unique_b", 3) == [0.5, 0.5, 0.9, 0.9]
    assert rates("synergy") == rates("synergy", 3) == [0.5, 0.5, 0.5, 0.9]
    assert rates("none") == [0.5] * 4
    assert bayes_rate("synergy", 2, 0.0) == 0.5
    assert bayes_rate("unique_c", 3, 1.0, visible=("c",)) == 1.0


def test_the_best_rate_with_absent_modalities():
    # Both are needed: present with chance 0.75² = 0.5625, else a guess.
    np.testing.assert_allclose(bayes_rate("synergy", 2, 1.0, absent=0.25), 0.5625 + 0.4375 / 2)
    # Either will do: none is there with chance 1/16.
    np.testing.assert_allclose(bayes_rate("redundant", 2, 1.0, absent=0.25), 15 / 16 + 1 / 32)


@pytest.mark.parametrize(
    ("task", "modalities", "dial"), [("synergy", 1, 1.0), ("unique_c", 2, 1.0), ("x", 2, 1.0), ("none", 2, 1.1)]
)
def test_there_is_no_such_task(task, modalities, dial):
    with pytest.raises(ValueError, match=task):
        joint(task, modalities, dial)


def test_samples_show_what_the_table_says():
    tokens, mask, label = sample(
        jax.random.key(0), "synergy", 4096, modalities=3, tokens=4, width=8, dial=0.8, padded=True, absent=0.25
    )
    symbols, there = [], []
    for i, name in enumerate("abc"):
        shows = _prototypes(i, 8)[:2]
        there.append(np.asarray(mask[name]).any(axis=1))
        likeness = np.where(np.asarray(mask[name])[..., None], tokens[name] @ shows.T, -np.inf).max(axis=1)  # [B, 2]
        symbols.append(likeness.argmax(axis=1))
        assert abs(there[-1].mean() - 0.75) < 0.03
        assert set(np.asarray(mask[name]).sum(axis=1)) == {0, 1, 2, 3, 4}
    both = there[0] & there[1]
    agree = (symbols[0] ^ symbols[1])[both] == np.asarray(label)[both]
    assert abs(agree.mean() - 0.9) < 0.03
    assert abs((symbols[0][there[0]] == np.asarray(label)[there[0]]).mean() - 0.5) < 0.03


def test_the_label_is_what_one_modality_shows_where_it_is_unique():
    tokens, mask, label = sample(jax.random.key(1), "unique_b", 2048, modalities=2, tokens=3, width=8, dial=1.0)
    assert all(np.asarray(m).all() for m in mask.values())
    symbol = (np.asarray(tokens["b"]) @ _prototypes(1, 8)[:2].T).max(axis=1).argmax(axis=1)
    np.testing.assert_array_equal(symbol, label)
