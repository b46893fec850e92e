"""Initial parameters without a compiled program for each model, because compiling it dominates a short run."""

import contextlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import flax.core
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfusion import rng
from mmfusion.data.batch import Batch
from mmfusion.models.model import FusionModel
from mmfusion.training.setup import TrainSetup

compiled = TrainSetup.init_sharded
INITIALIZERS = jax.nn.initializers.variance_scaling.__globals__  # of JAX's module of initialisers


@contextlib.contextmanager
def by_parameter() -> Iterator[None]:
    """Makes `TrainSetup.init_sharded` draw each parameter as the model is traced, except for sharded states.

    A process compiles the drawing of random numbers once for each power of two. The commands that tests start use the
    compiled program, and `training/test_initialization.py` compares the two.
    """

    def init_sharded(self: TrainSetup, seed: int) -> Any:
        if self.partitioner.state_sharding(self.state_shapes()) is not None:
            return compiled(self, seed)
        variables = draw_variables(self, np.uint32(seed))
        if any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(variables)):
            return compiled(self, seed)  # a parameter that is drawn within a transformation
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FusionModel, "init", lambda *args, **kwargs: variables)
            patch.setattr(jnp, "zeros_like", lambda x, dtype=None, **_: np.zeros(np.shape(x), dtype or x.dtype))
            state = self._init.__wrapped__(self.example, seed=np.uint32(seed), preprocess=lambda batch, key: batch)
        return jax.device_put(state)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainSetup, "init_sharded", init_sharded)
        yield


def draw_variables(setup: TrainSetup, seed: np.uint32) -> Any:
    """Returns the initial variables of a model, each drawn while the model is traced."""
    variables, scope = {}, flax.core.Scope
    make_rng, param, variable = scope.make_rng, scope.param, scope.variable
    key = rng.key(seed, "init")

    def now(function: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            with jax.ensure_compile_time_eval():
                return function(*args, **kwargs)

        return call

    def trace(example: Batch) -> None:
        variables.update(setup.model.init(key, setup.spec.preprocess(example, None), train=False))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scope, "make_rng", now(make_rng))
        patch.setattr(
            scope, "param", lambda self, name, init, *args, **kwargs: param(self, name, now(init), *args, **kwargs)
        )
        patch.setattr(
            scope,
            "variable",
            lambda self, col, name, init=None, *args, **kwargs: variable(
                self, col, name, init and now(init), *args, **kwargs
            ),
        )
        patch.setitem(INITIALIZERS, "random", Random())
        patch.setitem(INITIALIZERS, "jnp", Constants())
        jax.eval_shape(trace, setup.example)
    return variables


class Drawn(np.ndarray):
    """Random numbers that are scaled without a compiled program."""

    __array_priority__ = 1000  # above that of JAX's arrays

    def __mul__(self, scale: Any) -> np.ndarray:
        return np.asarray(self) * np.asarray(scale)

    __rmul__ = __mul__


class Random:
    """`jax.random` as JAX's initialisers use it. A number depends on its position, not on how many are drawn."""

    def __getattr__(self, name: str) -> Any:
        draw = getattr(jax.random, name)
        if name not in ("normal", "uniform", "truncated_normal"):
            return draw
        before = 2 if name == "truncated_normal" else 0  # its bounds come before the shape

        def draw_more(key: jax.Array, *args: Any, **kwargs: Any) -> Any:
            kwargs.pop("out_sharding", None)
            shape = args[before]
            count = math.prod(shape)
            if isinstance(key, jax.core.Tracer) or not count:
                return draw(key, *args, **kwargs)
            power = 1 << (count - 1).bit_length()
            drawn = np.asarray(draw(key, *args[:before], (power,), *args[before + 1 :], **kwargs))
            return drawn[:count].reshape(shape).view(Drawn)

        return draw_more


class Constants:
    """`jax.numpy` as JAX's initialisers use it, with NumPy's constants."""

    def __getattr__(self, name: str) -> Any:
        function = getattr(jnp, name)
        if name not in ("zeros", "ones", "full"):
            return function

        def call(*args: Any, **kwargs: Any) -> Any:
            kwargs.pop("out_sharding", None)
            is_traced = any(isinstance(x, jax.core.Tracer) for x in args)
            return (function if is_traced else getattr(np, name))(*args, **kwargs)

        return call
