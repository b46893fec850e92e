"""Replicas: several runs that differ only in seed and learning rate, whose steps are one vmapped program.

R runs
"""

import contextlib
import time
from collections.abc import Callable, Generator, Sequence
from pathlib import Path
from typing import Any, cast

import jax
from ml_collections import ConfigDict

from mmfusion import config as configs
from mmfusion.data import dataset as datasets
from mmfusion.data.dataset import Dataset
from mmfusion.distributed.signals import Stop
from mmfusion.models.convolution import as_patches
from mmfusion.training import recovery
from mmfusion.training.directory import run_directory
from mmfusion.training.run import Call, TrainRun
from mmfusion.training.setup import TrainSetup
from mmfusion.training.start import start_run

Result = dict[str, Any] | Exception
Replica = Generator[tuple[TrainRun, Call], tuple[Any, Any], dict[str, Any]]


def replica(config: ConfigDict, workdir: str | Path, stop: Stop, dataset: Dataset | None = None) -> Replica:
    """Yields the run and each call whose steps are due, receives the state and the metrics, and returns the result.

    It is what `mmfusion.training.loop.train` does, but for the steps, and raises what that does.
    """
    started, bad_steps = time.monotonic(), None
    with run_directory(workdir, config) as directory:
        run_config = configs.read(config)
        dataset = dataset or datasets.load(run_config.data, seed=run_config.seed)
        while True:
            try:
                with start_run(config, directory, dataset, started=started, bad_steps=bad_steps) as run:
                    if not isinstance(run, TrainRun):  # it had finished before
                        return run
                    for call in run.calls():
                        state, metrics = yield run, call
                        run.advance(call, state, metrics)
                        run.validate_and_save_if_due(stop)
                    return run.test(alone=False)
            except recovery.TooManyBadSteps as error:
                recovery.check_may_roll_back(error, directory, run_config, dataset)
                bad_steps = error


def train_replicas(
    replicas: Sequence[Replica],
    context: Callable[[int], contextlib.AbstractContextManager] = lambda _: contextlib.nullcontext(),
) -> list[Result]:
    """Takes the steps of runs of one model together, by one program.

    Each run sees the examples, the random numbers and the files that it would see by itself. A run that ends early, by
    an error or because it had finished before, leaves a smaller program to the others.

    Args:
      replicas: of configs that differ in their seed and learning rate only.
      context: number of a run -> a context to be in while that run works by itself.

    Returns:
      For each run its result, or the exception that ended it.

    Raises:
      jax.errors.JaxRuntimeError: the device has no memory for all of them; they are closed and can be started again.
    """
    results: list[Result | None] = [None] * len(replicas)
    outputs: dict[int, Any] = dict.fromkeys(range(len(replicas)))
    compiled: dict[int, Callable[..., Any]] = {}
    with contextlib.ExitStack() as stack:
        for each in replicas:
            stack.enter_context(contextlib.closing(each))
        while True:
            due: dict[int, tuple[TrainRun, Call]] = {}
            for i, output in outputs.items():
                try:
                    with context(i):
                        due[i] = replicas[i].send(output)
                except StopIteration as end:
                    results[i] = end.value
                except Exception as error:
                    results[i] = error
            if not due:
                return cast(list[Result], results)
            runs, calls = zip(*due.values(), strict=True)
            if len(runs) not in compiled:
                compiled[len(runs)] = compile_step(runs[0].setup, len(runs))
            states = tuple(run.state for run in runs)
            batches = tuple(call.device_batches for call in calls)
            rates = tuple(run.setup.partitioner.replicate(call.learning_rates) for run, call in due.values())
            with jax.transfer_guard("disallow"):
                outputs = dict(zip(due, compiled[len(runs)](states, batches, rates), strict=True))


def compile_step(setup: TrainSetup, replicas: int) -> Callable[..., Any]:
    """Returns the compiled step of R runs, with convolutions as matrix products: vmapped ones would be grouped."""

    def step(*args: Any) -> Any:
        with as_patches():  # while it is traced
            return setup.step(*args)

    return setup.partitioner.compile_train(step, replicas=replicas)
