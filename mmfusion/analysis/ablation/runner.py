"""Runs the trials of a plan in several processes, each pinned to a core; any of them may be killed.

A trial is a run directory, where each stage of the ablation writes one output file. The same command resumes an
interrupted stage, and the output does not depend on the process that wrote it.
"""

import collections
import contextlib
import ctypes
import dataclasses
import fcntl
import json
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterator, Sequence
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

from ml_collections import ConfigDict

from mmfusion import config as configs
from mmfusion.analysis.ablation.leases import POLL, LeaseLost
from mmfusion.analysis.ablation.plan import Trial
from mmfusion.data.dataset import Dataset, load
from mmfusion.errors import Preempted, UserError
from mmfusion.files import write_json

FAILED, LOG, LOCK, RESULT = "failed.json", "log.txt", "lock", "result.json"
PR_SET_PDEATHSIG = 1
MAX_MEMORY_MAPS = 30_000  # Linux limits a process to 65,530 memory maps
MAX_OPEN_DATASETS = 2  # per process
_open_datasets: collections.OrderedDict[str, Dataset] = collections.OrderedDict()

Events = Iterator[tuple[Trial, str]]  # each finished trial, with "" or its error
Take = Callable[[], Sequence[Trial]]  # the next trials to run as one; none: there is nothing to run now


@dataclasses.dataclass(frozen=True)
class Stage:
    """A stage of an ablation, which processes one trial at a time.

    Attributes:
      function: called with the trial and its directory; importable by name.
      output: the file in the directory that exists once the stage is done.
    """

    function: Callable[[Trial, Path], None]
    output: str


def shard(trials: Sequence[Trial], part: str) -> list[Trial]:
    """Returns the share `i/n` of the trials: every n-th from the i-th on.

    Raises:
      UserError: `part` is not of the form i/n with 0 <= i < n.
    """
    index, _, count = part.partition("/")
    if not (index.isdecimal() and count.isdecimal() and int(index) < int(count)):
        raise UserError("must be i/n with i from 0 to n - 1, such as 0/4", path="--shard", value=part)
    return list(trials[int(index) :: int(count)])


def trial_directory(directory: Path, trial: Trial) -> Path:
    """Returns the run directory of a trial."""
    return directory / "trials" / trial.name


def is_done(directory: Path, trial: Trial, output: str = RESULT) -> bool:
    """Returns whether a trial has its result, or the output of another stage."""
    return (trial_directory(directory, trial) / output).exists()


def run(
    trials: Sequence[Trial], directory: Path, jobs: int, prepare: Callable[[], None], stage: Stage | None = None
) -> Events:
    """Runs one stage (default: training) for the trials that lack its output, in a pool of its own; see `Pool`."""
    stage = stage or TRAINING
    with Pool(directory, jobs, prepare) as pool:
        batches = iter([[trial] for trial in trials if not is_done(directory, trial, stage.output)])
        yield from pool.run(lambda: next(batches, []), stage)


def no_check() -> None:
    """Does nothing."""


class InProcess:
    """An `Executor` that runs trials in this process, one after another."""

    uploads = False

    def __init__(self, directory: Path):
        self._directory = directory
        self._setups: Any = collections.OrderedDict()

    def batches(self, trials: Sequence[Trial], stage: Stage) -> list[list[Trial]]:
        """Returns each trial by itself."""
        return [[trial] for trial in trials]

    def run(self, take: Take, stage: Stage, check: Callable[[], None] = no_check) -> Events:
        """See `Executor.run`; there is no process to watch meanwhile, so that `check` is not called."""
        from mmfusion.training.setup import shared_setups

        while batch := take():
            for trial in batch:
                with shared_setups(self._setups):
                    outcome = run_stage(trial, self._directory, stage)
                if isinstance(outcome, Preempted):
                    raise outcome
                yield trial, outcome


class Pool:
    """An `Executor` with worker processes, which run several stages.

    Args:
      directory: the ablation's directory; trials are below `trials/`.
      jobs: the maximum number of processes; each is pinned to a core of its own if there are enough.
      prepare: called first in each process; importable by name.
    """

    uploads = False

    def __init__(self, directory: Path, jobs: int, prepare: Callable[[], None]):
        self._directory, self._jobs, self._prepare = directory, jobs, prepare
        self._processors = sorted(os.sched_getaffinity(0)) if sys.platform == "linux" else []
        self._workers: list[_Worker] = []

    def __enter__(self) -> "Pool":
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: Any) -> None:
        for worker in self._workers:
            worker.stop(kill=kind is not None and issubclass(kind, LeaseLost))
        for worker in self._workers:
            worker.join()

    def batches(self, trials: Sequence[Trial], stage: Stage) -> list[list[Trial]]:
        """Returns each trial by itself."""
        return [[trial] for trial in trials]

    def run(self, take: Take, stage: Stage, check: Callable[[], None] = no_check) -> Events:
        """See `Executor.run`."""
        while True:
            check()
            while len(busy := self._busy()) < self._jobs and (batch := take()):
                for trial in batch:
                    self._idle_worker().submit(trial, stage)
            if not busy:
                return
            ready = wait([worker.connection for worker in busy], POLL)
            for worker in busy:
                if worker.connection in ready:
                    yield worker.collect()

    def _busy(self) -> "list[_Worker]":
        return [worker for worker in self._workers if worker.trial]

    def _idle_worker(self) -> "_Worker":
        """Returns a worker without a trial, a new one if there is none."""
        for worker in self._workers:
            if not worker.trial:
                return worker
        i = len(self._workers)
        processor = self._processors[i] if i < len(self._processors) else None
        self._workers.append(_Worker(self._directory, processor, self._prepare))
        return self._workers[-1]


class _Worker:
    """A process that runs one trial at a time, and is replaced when it dies."""

    def __init__(self, directory: Path, processor: int | None, prepare: Callable[[], None]):
        self.trial: Trial | None = None
        self._directory, self._processor, self._prepare = directory, processor, prepare
        self._start()

    def _start(self) -> None:
        # JAX does not support fork; spawned processes share the compilation cache.
        spawn = multiprocessing.get_context("spawn")
        self.connection, remote = spawn.Pipe()
        self._process = spawn.Process(
            target=_serve,
            args=(remote, self._directory, os.getpid(), self._processor, self._prepare),
            daemon=True,
        )
        self._process.start()
        remote.close()  # with an open copy here, recv() would not raise EOFError when the process ends

    def submit(self, trial: Trial, stage: Stage) -> None:
        self.trial = trial
        self.connection.send((trial, stage))

    def collect(self) -> tuple[Trial, str]:
        """Returns the trial and "" or its error; raises Preempted if SIGTERM stopped the trial."""
        assert self.trial is not None
        trial, self.trial = self.trial, None
        try:
            outcome = self.connection.recv()
        except (EOFError, ConnectionResetError):
            self._process.join()
            outcome = f"its process ended with status {self._process.exitcode}"
            write_failure(trial_directory(self._directory, trial), outcome)
            self._start()
        if isinstance(outcome, Preempted):
            raise outcome
        return trial, outcome

    def stop(self, *, kill: bool = False) -> None:
        """Terminates the process; a running trial saves a checkpoint first, unless the process is to be killed."""
        self.connection.close()
        if self.trial:
            self._process.kill() if kill else self._process.terminate()

    def join(self) -> None:
        """Waits until the process has ended."""
        self._process.join()


@contextlib.contextmanager
def preempted_by_signal() -> Iterator[None]:
    """Raises Preempted on the first SIGTERM or Ctrl-C; leaving a pool then lets its processes save their trials.

    A second SIGTERM is ignored, and a second Ctrl-C ends the process, and its processes with it.
    """

    def preempt(number: int, frame: Any) -> None:
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        signal.signal(signal.SIGINT, signal.SIG_DFL)
        name = "SIGTERM" if number == signal.SIGTERM else "Ctrl-C"
        raise Preempted(f"{name}; run the same command again, which continues the running trials")

    numbers = [n for n in (signal.SIGTERM, signal.SIGINT) if signal.getsignal(n) is not signal.SIG_IGN]
    before = {number: signal.signal(number, preempt) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _serve(
    connection: Connection, directory: Path, parent: int, processor: int | None, prepare: Callable[[], None]
) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches every process, and the parent handles it
    if sys.platform == "linux":  # die with the parent, even if it is killed
        ctypes.CDLL(None).prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:
            return
    if processor is not None:
        os.sched_setaffinity(0, {processor})
    prepare()
    from mmfusion.training.setup import shared_setups

    # the parent closed the connection
    with shared_setups(), contextlib.suppress(EOFError, BrokenPipeError, ConnectionResetError):
        while True:
            trial, stage = connection.recv()
            connection.send(run_stage(trial, directory, stage))


def run_stage(trial: Trial, directory: Path, stage: Stage) -> str | Preempted:
    """Runs a stage for a trial; returns "", its error (also written to `failed.json`), or Preempted after SIGTERM."""
    folder = trial_directory(directory, trial)
    with locked(folder), (folder / LOG).open("a") as log, contextlib.redirect_stdout(log):
        try:
            stage.function(trial, folder)
        except Preempted as preempted:
            return preempted
        except Exception as error:  # no error of a trial may stop the other trials
            return record(folder, error)
        finally:
            clear_programs()
    return record(folder, None)


def clear_programs(max_maps: int = MAX_MEMORY_MAPS) -> None:
    """Clears JAX's compiled programs if this process has more memory maps than `max_maps`."""
    maps = Path("/proc/self/maps")
    if "jax" in sys.modules and maps.exists() and maps.read_bytes().count(b"\n") > max_maps:
        if "mmfusion.training.setup" in sys.modules:
            sys.modules["mmfusion.training.setup"].forget_setups()
        sys.modules["jax"].clear_caches()


def record(folder: Path, error: Exception | None) -> str:
    """Writes an error to `failed.json` and returns it as one line; None removes the file."""
    if error is None:
        (folder / FAILED).unlink(missing_ok=True)
        return ""
    message = f"{type(error).__name__}: {' '.join(str(error).split())}"
    write_failure(folder, message)
    return message


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Creates a trial's directory and locks it against other processes on this machine."""
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / LOCK).open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def train_trial(trial: Trial, folder: Path) -> None:
    """Trains a trial in its directory, or resumes it; raises UserError if its test split has no labels."""
    from mmfusion.training.loop import train

    config = configs.from_json(trial.config)
    dataset = dataset_for(trial, config)
    test = dataset.splits.get("test")
    if test is not None and not test.has_labels:
        message = "has no label in any row, and methods are compared on it; `train` needs none"
        raise UserError(message, path="config.data.test", value=config.data.test)
    train(config, folder, dataset=dataset)


def dataset_for(trial: Trial, config: ConfigDict) -> Dataset:
    """Returns a trial's dataset, which consecutive trials with the same data share."""
    seed = config.seed if config.data.name.startswith("pair:") else 0  # only pairings depend on the seed
    key = json.dumps([trial.config["data"], seed])
    if key not in _open_datasets:
        while len(_open_datasets) >= MAX_OPEN_DATASETS:
            _open_datasets.popitem(last=False)
        _open_datasets[key] = load(configs.read(config).data, seed=config.seed)
    return _open_datasets[key]


def write_failure(folder: Path, message: str) -> None:
    """Writes an error of a trial to `failed.json`."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / FAILED, {"error": message})


TRAINING = Stage(train_trial, RESULT)
