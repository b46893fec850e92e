"""Runs of one config share their traced programs: tracing is most of a short run, and the second time is the same."""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from mmfusion import config as configs
from mmfusion.data.dataset import Dataset
from mmfusion.training import start
from mmfusion.training.setup import TrainSetup

OF_THE_LOOP = {
    "seed",
    "eval_every",
    "checkpoint_every",
    "recovery.max_consecutive_bad_steps",
    "recovery.rollbacks",
    "recovery.lr_factor",
}


@contextlib.contextmanager
def once() -> Iterator[None]:
    """Within it, `train` builds and traces the setup of a config once; only for tests that leave the steps as they are.

    That a run goes on to the bit with steps that another process has traced is shown where runs are killed.
    """
    setups: dict[str, TrainSetup] = {}
    compiled: dict[tuple[Any, ...], Any] = {}
    build_setup = start.build_setup

    def assembled(config: configs.RunConfig, dataset: Dataset) -> TrainSetup:
        known = {path: x for path, x in configs.flat(dataclasses.asdict(config)).items() if path not in OF_THE_LOOP}
        key = json.dumps([known, dataset.fingerprint], sort_keys=True)
        if key not in setups:
            setups[key] = build_setup(config, dataset)
        return setups[key]

    def kept(name: str) -> Callable[..., Any]:
        honest = getattr(TrainSetup, name)

        def method(self: TrainSetup, *args: Any) -> Any:
            key = (id(self), name, *args)
            if key not in compiled:
                compiled[key] = honest(self, *args)
            return compiled[key]

        return method

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(start, "build_setup", assembled)
        for name in ("train_step", "eval_step"):
            patch.setattr(TrainSetup, name, kept(name))
        yield
