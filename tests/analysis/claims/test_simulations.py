import numpy as np

from mmfusion.analysis.claims import simulations
from mmfusion.analysis.claims.simulations import Row


def test_rows_hold_within_twice_their_error():
    assert Row("", "", 0.06, 1_000, most=0.05).holds and not Row("", "", 0.07, 1_000, most=0.05).holds
    assert Row("", "", 0.92, 1_000, least=0.93).holds and not Row("", "", 0.91, 1_000, least=0.93).holds
    assert Row("", "", 0.5, 1_000).holds


def test_few_simulations_of_every_part_hold(monkeypatch):
    monkeypatch.setattr(simulations, "EXAMPLES", (300,))
    monkeypatch.setattr(simulations, "SEEDS", (6,))
    found = [*simulations.false_claims_on_new_data(300, np.random.default_rng(1))]
    found += simulations.coverage(200, np.random.default_rng(2))
    found += simulations.equivalence(100, np.random.default_rng(3))
    assert [row.setting for row in found if not row.holds] == []
    text = simulations.table(found)
    assert text.count("\n") == len(found) + 2 and "| yes |" in text and "**no**" not in text


def test_a_claim_by_the_wrong_rule_does_not_hold():
    random, claimed = np.random.default_rng(4), 0
    for _ in range(200):
        first, second = simulations.equal_methods(12, 300, random)
        means = (first - second).mean(axis=0)  # over seeds: examples alone, as if there were one run
        claimed += abs(means.mean()) > 1.0 * means.std(ddof=1) / 300**0.5  # half of the interval
    assert not Row("", "", claimed / 200, 200, most=0.05).holds
