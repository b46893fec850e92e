"""Helpers that keep model tests fast: random parameters without compiled initialisers, and fast compilation."""

from collections.abc import Callable

import flax.linen as nn
import jax
import numpy as np


def quick_jit(function: Callable) -> Callable:
    """Returns the function compiled without expensive optimisations.

    Results are NumPy arrays, because indexing JAX arrays compiles a program per shape.
    """
    compiled = jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})
    return lambda *args: jax.device_get(compiled(*args))


def random_variables(module: nn.Module, *args, seed: int = 0, **kwargs) -> dict:
    """Returns the module's variables: all parameters from N(0, 0.3²), batch statistics at their initial values."""
    shapes = jax.eval_shape(lambda: module.init(jax.random.key(0), *args, **kwargs))
    rng = np.random.default_rng(seed)

    def sample(path, leaf):
        if path[0].key == "batch_stats":
            return np.full(leaf.shape, 1.0 if path[-1].key == "var" else 0.0, np.float32)
        return (0.3 * rng.normal(size=leaf.shape)).astype(np.float32)

    return jax.tree_util.tree_map_with_path(sample, shapes)
