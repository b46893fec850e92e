"""Random parameters without compiling an initialiser, so that no layer starts at a special value (0, 1, orthogonal)."""

import flax.linen as nn
import jax
import numpy as np


def random_variables(module: nn.Module, *args, seed: int = 0, **kwargs) -> dict:
    """Returns the module's variables: parameters drawn from N(0, 0.3²), running statistics as initialised."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[0].key == "batch_stats":
            return np.full(leaf.shape, 1.0 if path[-1].key == "var" else 0.0, np.float32)
        return (0.3 * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)
