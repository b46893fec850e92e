"""What keeps the models' tests short: random parameters without compiling an initialiser, and a quick compilation."""

from collections.abc import Callable

import flax.linen as nn
import jax
import numpy as np


def quick_jit(function: Callable) -> Callable:
    """Returns the function compiled without the optimisations that would take longer than the test.

    Its results are NumPy arrays: indexing those of JAX compiles a program for each shape.
    """
    compiled = jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})
    return lambda *args: jax.device_get(compiled(*args))


def random_variables(module: nn.Module, *args, seed: int = 0, **kwargs) -> dict:
    """Returns the module's variables: parameters from N(0, 0.3²), none left at 0 or 1; statistics as initialised."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        if path[0].key == "batch_stats":
            return np.full(leaf.shape, 1.0 if path[-1].key == "var" else 0.0, np.float32)
        return (0.3 * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(draw, shapes)
