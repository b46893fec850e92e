"""Gives the trials of a stage to an executor, while other workers on other machines may take the others."""

import contextlib
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Protocol

import jax

from mmfusion.analysis.ablation import leases, runner
from mmfusion.analysis.ablation.leases import Taking
from mmfusion.analysis.ablation.plan import Trial
from mmfusion.analysis.ablation.remote_copy import RemoteCopy
from mmfusion.analysis.ablation.replicated_runner import Replicas
from mmfusion.analysis.ablation.runner import Events, Stage, Take
from mmfusion.errors import UserError
from mmfusion.files import describe


class Executor(Protocol):
    """Runs trials: in this process, in processes of this machine, or on a cluster.

    Attributes:
      uploads: whether it copies what a trial wrote to the bucket itself.
    """

    uploads: bool

    def batches(self, trials: Sequence[Trial], stage: Stage) -> list[list[Trial]]:
        """Groups the trials that are best run as one, in starting order."""
        ...

    def run(self, take: Take, stage: Stage, check: Callable[[], None]) -> Events:
        """Yields each trial with "" or its error as it finishes.

        Args:
          take: returns the next batch to run, or [] where there is none now; called while there is room for one.
          stage: the stage to run.
          check: called every few seconds while other processes run trials; raises LeaseLost if they must be killed.

        Raises:
          Preempted: SIGTERM was received; the running trials saved a checkpoint.
        """
        ...


def executor(
    directory: Path,
    jobs: int,
    prepare: Callable[[], None],
    engine: str = "",
    resources: Mapping[str, float] | None = None,
    remote: str = "",
) -> contextlib.AbstractContextManager[Executor]:
    """Returns what runs the trials: a cluster, processes on CPU, or on an accelerator programs of several trials.

    Args:
      directory: the ablation's directory.
      jobs: the number of processes, or of tasks of a cluster; 0: this process, or as many tasks as there is room for.
      prepare: called first in each process; importable by name.
      engine: `ray`, `ray:ADDRESS`, or "" for this machine.
      resources: what a task of a cluster needs.
      remote: the bucket directory of which `directory` is a copy; "": none.

    Raises:
      UserError: Ray is not installed.
    """
    if engine:
        try:
            from mmfusion.analysis.ablation.ray_tasks import RayTasks
        except ImportError as error:
            raise UserError(f"needs `pip install 'mmfusion[ray]'` ({error})", path="--engine", value="ray") from error
        return RayTasks(directory, engine.partition(":")[2], resources or {}, jobs, prepare, remote)
    if jax.default_backend() != "cpu":
        return contextlib.nullcontext(Replicas(directory))
    return runner.Pool(directory, jobs, prepare) if jobs else contextlib.nullcontext(runner.InProcess(directory))


def run(
    trials: Sequence[Trial], stage: Stage, directory: Path, executor: Executor, taking: Taking, shared: RemoteCopy
) -> Events:
    """Returns each trial that lacks the stage's output, with "" or its error, as this or another worker finishes it.

    A trial that failed before this call is run again once, and one that another worker finished meanwhile is not.

    Args:
      trials: the trials of the stage, in starting order.
      stage: the stage.
      directory: the ablation's directory.
      executor: what runs a trial.
      taking: how this worker takes trials.
      shared: the copy of the directory in a bucket.

    Raises:
      LeaseLost: another worker may run a trial that runs here.
      Preempted: SIGTERM was received.
    """
    unfinished = {trial.name: trial for trial in trials if not runner.is_done(directory, trial, stage.output)}
    failures = {name: describe(_failure(directory, trial)) for name, trial in unfinished.items()}
    return _run(unfinished, failures, stage, directory, executor, taking, shared)


def _run(
    unfinished: dict[str, Trial],
    failures: dict[str, str],
    stage: Stage,
    directory: Path,
    executor: Executor,
    taking: Taking,
    shared: RemoteCopy,
) -> Events:
    running: set[str] = set()

    def ended(trial: Trial) -> bool:
        failure = describe(_failure(directory, trial))
        return runner.is_done(directory, trial, stage.output) or failure not in ("", failures[trial.name])

    def take() -> list[Trial]:
        while True:
            waiting = [trial for trial in unfinished.values() if trial.name not in running and not ended(trial)]
            groups = [[trial.name for trial in batch] for batch in executor.batches(waiting, stage)]
            if not (names := taking.take(groups)):
                return []
            for name in names:  # another worker may have finished it just before
                shared.fetch_trial(unfinished[name])
            taken = [unfinished[name] for name in names if not ended(unfinished[name])]
            taking.release(set(names) - {trial.name for trial in taken})
            if taken:
                running.update(trial.name for trial in taken)
                return taken

    def ended_elsewhere() -> Iterator[tuple[Trial, str]]:
        for trial in [trial for trial in unfinished.values() if trial.name not in running and ended(trial)]:
            del unfinished[trial.name]
            yield trial, "" if runner.is_done(directory, trial, stage.output) else _error(directory, trial)

    while unfinished:
        for trial, error in executor.run(take, stage, taking.check):
            taking.check()
            if not executor.uploads:
                shared.upload_trial(trial, error)
            taking.release([trial.name])
            running.discard(trial.name)
            del unfinished[trial.name]
            yield trial, error
            yield from ended_elsewhere()
        if unfinished:
            time.sleep(leases.POLL)
            shared.fetch(list(unfinished.values()))
            yield from ended_elsewhere()


def _failure(directory: Path, trial: Trial) -> str:
    return str(runner.trial_directory(directory, trial) / runner.FAILED)


def _error(directory: Path, trial: Trial) -> str:
    try:
        return json.loads(Path(_failure(directory, trial)).read_text())["error"]
    except FileNotFoundError:
        return "failed elsewhere, where it is now run again"
