"""Trains the trials of a plan on an accelerator, in this process, with one program per method.

The trials of a group differ in seed and learning rate only. On CPU `runner` is faster, with one process per core.
"""

import contextlib
import json
from collections.abc import Callable, Sequence
from pathlib import Path

from mmfusion import config as configs
from mmfusion.analysis.ablation import runner
from mmfusion.analysis.ablation.plan import Trial
from mmfusion.analysis.ablation.runner import Events, Stage, Take
from mmfusion.distributed.preemption import stop_on_signal
from mmfusion.distributed.signals import Stop
from mmfusion.errors import Preempted
from mmfusion.training.replicas import Replica, replica, train_replicas

OUT_OF_MEMORY = "RESOURCE_EXHAUSTED"  # in XLA's error message


class Replicas:
    """An `Executor` that trains the trials of a group at once, in this process."""

    uploads = False

    def __init__(self, directory: Path):
        self._directory = directory

    def batches(self, trials: Sequence[Trial], stage: Stage) -> list[list[Trial]]:
        """Returns the groups of the trials; for stages other than training, each trial by itself."""
        return groups(trials) if stage is runner.TRAINING else [[trial] for trial in trials]

    def run(self, take: Take, stage: Stage, check: Callable[[], None] = runner.no_check) -> Events:
        """See `Executor.run`; there is no process to watch meanwhile, so that `check` is not called."""
        while batch := take():
            yield from run(self._directory, batch, stage)


def run(directory: Path, trials: Sequence[Trial], stage: Stage = runner.TRAINING) -> Events:
    """Runs the stage for the trials that lack its output, and yields each with "" or its error.

    All trials of a group are trained at once; the group is halved when device memory runs out. Other stages process one
    trial at a time.

    Raises:
      Preempted: SIGTERM or Ctrl-C was received; the running trials saved a checkpoint.
    """
    waiting = [trial for trial in trials if not runner.is_done(directory, trial, stage.output)]
    if stage is not runner.TRAINING:
        for trial in waiting:
            outcome = runner.run_stage(trial, directory, stage)
            if isinstance(outcome, Preempted):
                raise outcome
            yield trial, outcome
        return
    for group in groups(waiting):
        yield from _train(group, directory)


def groups(trials: Sequence[Trial]) -> list[list[Trial]]:
    """Returns the trials grouped by the program that trains them, in the order of each group's first trial."""
    by_config: dict[str, list[Trial]] = {}
    for trial in trials:
        optim = {key: value for key, value in trial.config["optim"].items() if key != "learning_rate"}
        shared = {**trial.config, "seed": None, "optim": optim}
        by_config.setdefault(json.dumps(shared, sort_keys=True), []).append(trial)
    return list(by_config.values())


def _train(trials: list[Trial], directory: Path) -> Events:
    folders = [runner.trial_directory(directory, trial) for trial in trials]
    with contextlib.ExitStack() as stack:
        for folder in folders:
            stack.enter_context(runner.locked(folder))
        stop = stack.enter_context(stop_on_signal())
        logs = [stack.enter_context((folder / runner.LOG).open("a")) for folder in folders]
        runs = [_run(trial, folder, stop) for trial, folder in zip(trials, folders, strict=True)]
        try:
            results = train_replicas(runs, lambda i: contextlib.redirect_stdout(logs[i]))
        except Exception as error:  # an error of the shared program must not stop the other groups
            results = [error] * len(trials)
    if len(trials) > 1 and all(OUT_OF_MEMORY in str(result) for result in results) and not stop.is_set():
        middle = len(trials) // 2
        for half in (trials[:middle], trials[middle:]):
            yield from _train(half, directory)
        return
    for trial, folder, result in zip(trials, folders, results, strict=True):
        if not isinstance(result, Preempted):
            yield trial, runner.record(folder, result if isinstance(result, Exception) else None)
    for result in results:
        if isinstance(result, Preempted):
            raise result
    if stop.is_set():  # after the last checkpoint
        raise Preempted("stopped by a signal; run the same command again")


def _run(trial: Trial, folder: Path, stop: Stop) -> Replica:
    config = configs.from_json(trial.config)
    return (yield from replica(config, folder, stop, runner.dataset_for(trial, config)))
