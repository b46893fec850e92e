"""Initial parameters without a compiled program for each model, because compiling it dominates a short run."""

import contextlib
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np
import pytest

from mmfusion.models.model import FusionModel
from mmfusion.training.setup import TrainSetup

compiled = TrainSetup.init_sharded


@contextlib.contextmanager
def by_operation() -> Iterator[None]:
    """Makes `TrainSetup.init_sharded` run each initialiser by itself within the context, except for sharded states.

    A process compiles each operation and shape once. The commands that tests start use the compiled program, and
    `training/test_initialization.py` compares the two.
    """
    init = FusionModel.init

    def lazy_init(model: FusionModel, key: jax.Array, batch: Any, **kwargs: Any) -> Any:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FusionModel, "init", init)  # which Flax's lazy_init calls, for the parameters only
            return model.lazy_init(key, jax.eval_shape(lambda x: x, batch), **kwargs)

    def init_sharded(self: TrainSetup, seed: int) -> Any:
        if self.partitioner.state_sharding(self.state_shapes()) is not None:
            return compiled(self, seed)
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(FusionModel, "init", lazy_init)
            return self._init.__wrapped__(self.example, seed=np.uint32(seed))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(TrainSetup, "init_sharded", init_sharded)
        yield
