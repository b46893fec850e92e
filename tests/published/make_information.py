"""Writes `information.npz`: tables P(x1, x2, y) and their decomposition by the `dit` package, for `test_published.py`.

pip install dit==2.3
python tests/published/make_information.py

dit's optimizer does not always converge: tables with negative information are replaced by new samples.
"""

from pathlib import Path

import dit
import numpy as np
from dit.pid import PID_BROJA

SHAPES = [(2, 2, 2)] * 4 + [(2, 3, 2), (3, 2, 3), (3, 3, 2), (2, 2, 4)]
ATOMS = (((0,), (1,)), ((0,),), ((1,),), ((0, 1),))  # redundant, unique 1, unique 2, synergy
TINY = 1e-4


def decompose(table):
    """Returns the four atoms of information in bits; see ATOMS."""
    outcomes = [tuple(map(int, index)) for index in np.ndindex(table.shape)]
    found = PID_BROJA(dit.Distribution(outcomes, table.ravel().tolist()), ((0,), (1,)), (2,))
    return [found.get_pi(atom) for atom in ATOMS]


if __name__ == "__main__":
    random = np.random.default_rng(0)
    cases = {}
    for index, shape in enumerate(SHAPES):
        while True:
            table = random.dirichlet(np.full(np.prod(shape), 0.5)).reshape(shape)
            parts = decompose(table)
            if min(parts) > -TINY:
                break
            print("not converged:", parts)
        cases[f"{index}/table"], cases[f"{index}/parts"] = table, np.array(parts)
    np.savez_compressed(Path(__file__).with_name("information.npz"), **cases)
