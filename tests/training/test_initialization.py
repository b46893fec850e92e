import jax
import numpy as np

from mmfusion.training.setup import build_setup
from tests import initialization, synthetic, ways


def test_initialisation_by_parameter_equals_the_compiled_program():
    config = synthetic.config({"model.dtype": "float32"}, "concat")
    setup = build_setup(config, synthetic.dataset(config, ways.ROWS))
    compiled = initialization.compiled(setup, 3)
    with initialization.by_parameter():
        by_parameter = setup.init_sharded(3)
    assert jax.tree.structure(by_parameter) == jax.tree.structure(compiled)
    for ours, reference in zip(jax.tree.leaves(by_parameter), jax.tree.leaves(compiled), strict=True):
        assert ours.dtype == reference.dtype
        np.testing.assert_allclose(ours, reference, rtol=1e-6, atol=1e-6)
