"""Traced programs shared between runs of the same config, because tracing dominates a short run."""

import contextlib
import dataclasses
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mmfusion import config as configs
from mmfusion.data.dataset import Dataset
from mmfusion.training import replay, restore, start
from mmfusion.training.setup import TrainSetup

# Values that the steps do not depend on: the same for all runs that share them.
LOOP = {"seed": 0, "eval_every": 1, "checkpoint_every": 1}
LOOP_RECOVERY = {"max_consecutive_bad_steps": 0, "rollbacks": 0, "lr_factor": 1.0}


@contextlib.contextmanager
def once() -> Iterator[None]:
    """Makes `train`, `open_run` and `replay` build and trace the setup of a config once within the context.

    Only for tests that do not patch the steps. Tests that kill runs show that a resumed run is bit-identical with
    steps traced by another process.
    """
    setups: dict[tuple[str, str], TrainSetup] = {}
    compiled: dict[tuple[Any, ...], tuple[TrainSetup, Any]] = {}
    build_setup = start.build_setup

    def shared_setup(config: configs.RunConfig, dataset: Dataset) -> TrainSetup:
        recovery = dataclasses.replace(config.recovery, **LOOP_RECOVERY)
        key = (repr(dataclasses.replace(config, recovery=recovery, **LOOP)), repr(dataset.saved()))
        if key not in setups:
            setups[key] = build_setup(config, dataset)
        return setups[key]

    def shared_step(name: str) -> Callable[..., Any]:
        original = getattr(TrainSetup, name)

        def method(self: TrainSetup, *args: Any) -> Any:
            key = (id(self), name, *args)
            if key not in compiled:
                compiled[key] = (self, original(self, *args))  # a reference prevents reuse of the id
            return compiled[key][1]

        return method

    with pytest.MonkeyPatch.context() as patch:
        for module in (start, restore, replay):
            patch.setattr(module, "build_setup", shared_setup)
        for name in ("compile_train_step", "compile_eval_step"):
            patch.setattr(TrainSetup, name, shared_step(name))
        yield
