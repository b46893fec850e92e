"""Effects that the probes of the best method's runs show are corrected for their family."""

import numpy as np
import pytest

from mmfusion.analysis.claims.probes import probe_claims
from mmfusion.analysis.claims.selection import MethodResult

RUNS, SEED, NAMES = 8, 12, ("a", "b", "c", "d", "e")


def noisy_probes(folds):
    """Returns probes in which permuting `a` costs a little, of p just below 0.05, and everything else is noise."""
    effects = np.random.default_rng(SEED).normal(0.0, 0.03, (RUNS, len(NAMES)))
    effects[:, 0] += 0.03
    return [
        {
            "metric": "accuracy",
            "sign": 1,
            "rows": 100,
            "paired": 50,
            "fold": run if folds else None,
            "subsets": {},
            "perceptual": dict(zip(NAMES, own, strict=True)),
            "interaction": {
                name: {"whole": [0.9], "additive": [0.9 - effect]} for name, effect in zip(NAMES, own, strict=True)
            },
        }
        for run, own in enumerate(effects.tolist())
    ]


@pytest.mark.parametrize("folds", [False, True])
@pytest.mark.parametrize("about", ["modality", "interaction"])
def test_effects_are_corrected_for_the_number_of_modalities(about, folds):
    probes = noisy_probes(folds)
    for probe in probes:  # `subsets` has a claim of its own
        probe["subsets"] = {"": None}
    cells = tuple(range(RUNS))
    best = MethodResult(
        "gmu", False, {}, tuple(f"gmu {i}" for i in cells), (0,) * RUNS if folds else cells, (), (0.9,) * RUNS,
        (0.9,) * RUNS, 1, folds=cells if folds else (), test_over_train=0.1,
    )  # fmt: skip
    found = [one for one in probe_claims(best, probes, 0.0) if one.about == about and one.evidence]
    assert len(found) == len(NAMES)
    assert found[0].evidence.p < 0.05 and found[0].verdict == "cannot tell"  # significant by itself only
    assert f"p = {found[0].evidence.p:.3g}" not in found[0].text
