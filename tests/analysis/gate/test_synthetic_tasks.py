import jax
import numpy as np
import pytest

from mmfusion.analysis.gate.synthetic_tasks import _prototypes, bayes_rate, joint, sample, tasks


@pytest.mark.parametrize("modalities", [1, 2, 3, 4])
def test_joint_distribution_has_balanced_labels(modalities):
    for task in tasks(modalities):
        table = joint(task, modalities, 0.8)
        np.testing.assert_allclose(table.sum(), 1.0)
        np.testing.assert_allclose(table.sum(axis=tuple(range(modalities))), [0.5, 0.5])


def test_bayes_rate_depends_on_the_visible_modalities():
    def rates(task, modalities=2):
        return [round(bayes_rate(task, modalities, 0.8, visible=visible), 6) for visible in ((), ("a",), ("b",), None)]

    assert rates("redundant") == [0.5, 0.9, 0.9, 0.9]
    assert rates("unique_a") == [0.5, 0.9, 0.5, 0.9]
    assert rates("unique_b", 3) == [0.5, 0.5, 0.9, 0.9]
    assert rates("synergy") == rates("synergy", 3) == [0.5, 0.5, 0.5, 0.9]
    assert rates("none") == [0.5] * 4
    assert bayes_rate("synergy", 2, 0.0) == 0.5
    assert bayes_rate("unique_c", 3, 1.0, visible=("c",)) == 1.0


def test_bayes_rate_accounts_for_absent_modalities():
    # Both modalities are needed: present with probability 0.75² = 0.5625, else chance level.
    np.testing.assert_allclose(bayes_rate("synergy", 2, 1.0, absent=0.25), 0.5625 + 0.4375 / 2)
    # One modality suffices: both are absent with probability 1/16.
    np.testing.assert_allclose(bayes_rate("redundant", 2, 1.0, absent=0.25), 15 / 16 + 1 / 32)


@pytest.mark.parametrize(
    ("task", "modalities", "dial"), [("synergy", 1, 1.0), ("unique_c", 2, 1.0), ("x", 2, 1.0), ("none", 2, 1.1)]
)
def test_joint_distribution_rejects_invalid_arguments(task, modalities, dial):
    with pytest.raises(ValueError, match=task):
        joint(task, modalities, dial)


def test_samples_follow_the_joint_distribution():
    tokens, mask, label = sample(
        jax.random.key(0), "synergy", 4096, modalities=3, tokens=4, width=8, dial=0.8, padded=True, absent=0.25
    )
    symbols, present = [], []
    for i, name in enumerate("abc"):
        prototypes = _prototypes(i, 8)[:2]
        present.append(np.asarray(mask[name]).any(axis=1))
        similarity = np.where(np.asarray(mask[name])[..., None], tokens[name] @ prototypes.T, -np.inf).max(
            axis=1
        )  # [B, 2]
        symbols.append(similarity.argmax(axis=1))
        assert abs(present[-1].mean() - 0.75) < 0.03
        assert set(np.asarray(mask[name]).sum(axis=1)) == {0, 1, 2, 3, 4}
    both = present[0] & present[1]
    agree = (symbols[0] ^ symbols[1])[both] == np.asarray(label)[both]
    assert abs(agree.mean() - 0.9) < 0.03
    assert abs((symbols[0][present[0]] == np.asarray(label)[present[0]]).mean() - 0.5) < 0.03


def test_samples_of_a_unique_task_show_the_label_in_one_modality():
    tokens, mask, label = sample(jax.random.key(1), "unique_b", 2048, modalities=2, tokens=3, width=8, dial=1.0)
    assert all(np.asarray(m).all() for m in mask.values())
    symbol = (np.asarray(tokens["b"]) @ _prototypes(1, 8)[:2].T).max(axis=1).argmax(axis=1)
    np.testing.assert_array_equal(symbol, label)
