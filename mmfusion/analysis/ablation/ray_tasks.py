"""Runs the trials of an ablation as tasks of a Ray cluster, which Ray places, and repeats where a node is lost.

Only `--engine=ray` imports this module: `pip install 'mmfusion[ray]'`. Every node needs this package in the same
version, the data, and the ablation's directory: a folder that all nodes mount, or a bucket.
"""

import contextlib
import os
import platform
import signal
import socket
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import ray  # pyright: ignore[reportMissingImports]

from mmfusion.analysis.ablation import replicated_runner, runner
from mmfusion.analysis.ablation.leases import POLL
from mmfusion.analysis.ablation.plan import PLAN, Trial, code_digest
from mmfusion.analysis.ablation.remote_copy import RemoteCopy, local_directory
from mmfusion.analysis.ablation.runner import Events, Stage, Take
from mmfusion.errors import Preempted, UserError, one_line

RETRIES = 3  # of a task that was lost with its process or node, or received SIGTERM
CONNECT_SECONDS = 10  # Ray itself tries for five minutes, and then ends the process
VISIBLE_SECONDS = 120
ACCELERATORS = ("GPU", "TPU")
ENVIRONMENT = ("JAX_", "XLA_", "MMFUSION_")  # prefixes of variables that tasks get from this process


class RayTasks:
    """An `Executor` that runs trials as tasks of a Ray cluster, to which it is connected inside `with`.

    On CPU a task is a trial; with GPUs or TPUs it is a group of trials that one program trains.

    Args:
      directory: the ablation's directory.
      address: `HOST:PORT` or `ray://HOST:PORT`; "": that of RAY_ADDRESS, or the cluster of this machine.
      resources: what a task needs, by Ray's names, such as `{"CPU": 1, "GPU": 0.5}`.
      jobs: the maximum number of tasks at a time; 0: as many as the cluster has room for.
      prepare: called first in each task; importable by name.
      remote: the bucket directory of which `directory` is a copy; "": none.

    Raises:
      UserError: there is no such cluster.
    """

    uploads = True

    def __init__(
        self,
        directory: Path,
        address: str,
        resources: Mapping[str, float],
        jobs: int,
        prepare: Callable[[], None],
        remote: str,
    ):
        self._directory, self._jobs, self._prepare, self._remote = directory.absolute(), jobs, prepare, remote
        self._address, self._resources = address or os.environ.get("RAY_ADDRESS", ""), {"CPU": 1.0, **resources}
        self._grouped = any(resources.get(name) for name in ACCELERATORS)
        self._shared = RemoteCopy(remote, directory)
        self._running: dict[Any, list[Trial]] = {}

    def __enter__(self) -> "RayTasks":
        connect(self._address, task_environment(os.environ, self._resources))
        total = ray.cluster_resources()
        for name, amount in self._resources.items():
            if total.get(name, 0.0) < amount:
                has = f"the cluster has {total.get(name, 0.0):g} {name} now, and a trial needs {amount:g}"
                print(f"{has}: waiting for a node that an autoscaler may add", file=sys.stderr)
        return self

    def __exit__(self, *_: Any) -> None:
        with contextlib.suppress(ray.exceptions.RayError):  # the cluster is gone
            for task in self._running:  # they continue from their last checkpoint
                ray.cancel(task, force=True)
        ray.shutdown()

    def batches(self, trials: Sequence[Trial], stage: Stage) -> list[list[Trial]]:
        """Returns each trial by itself; on accelerators the groups that are trained as one program."""
        if self._grouped and stage is runner.TRAINING:
            return replicated_runner.groups(trials)
        return [[trial] for trial in trials]

    def run(self, take: Take, stage: Stage, check: Callable[[], None] = runner.no_check) -> Events:
        """See `Executor.run`."""
        while True:
            check()
            while len(self._running) < self._limit() and (batch := take()):
                self._running[self._submit(batch, stage)] = list(batch)
            if not self._running:
                return
            ended, _ = ray.wait(list(self._running), timeout=POLL)
            for task in ended:
                yield from self._collect(task, stage)

    def _limit(self) -> int:
        """Returns the number of tasks that there may be now, one of which waits and shows that there is more to do."""
        total = ray.cluster_resources()
        room = (total.get(name, 0.0) / amount for name, amount in self._resources.items() if amount)
        return self._jobs or int(min(room, default=0.0) + 1e-6) + 1

    def _submit(self, batch: Sequence[Trial], stage: Stage) -> Any:
        others = {name: amount for name, amount in self._resources.items() if name not in ("CPU", "GPU")}
        task = ray.remote(run_batch).options(
            num_cpus=self._resources["CPU"],
            num_gpus=self._resources.get("GPU", 0),
            resources=others,
            max_retries=RETRIES,
            retry_exceptions=[Preempted],
            scheduling_strategy="SPREAD",
            name=batch[0].name,
        )
        return task.remote(list(batch), self._directory, stage, self._prepare, code_digest(), self._remote)

    def _collect(self, task: Any, stage: Stage) -> Iterator[tuple[Trial, str]]:
        try:
            problem, errors = ray.get(task)
        except ray.exceptions.RayError as error:
            problem, errors = (
                "",
                [f"its Ray task failed: {type(error).__name__}: {one_line(error)}"] * len(self._running[task]),
            )
            for trial, message in zip(self._running[task], errors, strict=True):
                runner.write_failure(runner.trial_directory(self._directory, trial), message)
                self._shared.upload_trial(trial, message)
        if problem:
            raise UserError(problem, path="--engine")
        for trial, error in zip(self._running.pop(task), errors, strict=True):
            self._shared.fetch_trial(trial)
            if not error:
                self._wait_for_output(trial, stage)
            yield trial, error

    def _wait_for_output(self, trial: Trial, stage: Stage) -> None:
        """Waits until this machine sees what the node has written, which network file systems show late."""
        deadline = time.monotonic() + VISIBLE_SECONDS
        while not runner.is_done(self._directory, trial, stage.output):
            if time.monotonic() > deadline:
                folder = runner.trial_directory(self._directory, trial)
                raise UserError(f"a task wrote {stage.output}, which does not show here", path=str(folder))
            time.sleep(0.1)


def connect(address: str, variables: Mapping[str, str]) -> None:
    """Connects to a cluster, whose tasks get the environment variables.

    Raises:
      UserError: there is none, or one of another version of Ray or Python.
    """
    if address and address != "auto":
        host, _, port = address.removeprefix("ray://").rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), CONNECT_SECONDS).close()
        except (OSError, ValueError) as error:
            message = f"no Ray cluster answers ({error}); give ray:HOST:PORT or ray:ray://HOST:PORT"
            raise UserError(message, path="--engine", value=f"ray:{address}") from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    on_sigterm = signal.getsignal(signal.SIGTERM)
    try:
        ray.init(
            address=address or "auto",
            runtime_env={"env_vars": dict(variables)},
            log_to_driver=False,
            logging_level="ERROR",
        )
    except (ConnectionError, RuntimeError, ValueError) as error:
        message = f"cannot connect to a Ray cluster, which `ray start --head` starts: {one_line(error)}"
        raise UserError(message, path="--engine", value=f"ray:{address}" if address else "ray") from error
    finally:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, on_sigterm)  # Ray replaces it


def task_environment(environment: Mapping[str, str], resources: Mapping[str, float]) -> dict[str, str]:
    """Returns the environment variables of tasks: this process's settings of JAX, and a thread per CPU for XLA.

    The platform is the node's own where a task needs an accelerator, which this process's machine may not have.
    """
    names = [name for name in environment if name.startswith(ENVIRONMENT)]
    if any(resources.get(name) for name in ACCELERATORS):
        names = [name for name in names if name != "JAX_PLATFORMS"]
    return {"PJRT_NPROC": str(max(1, int(resources["CPU"]))), **{name: environment[name] for name in names}}


def run_batch(
    trials: Sequence[Trial], directory: Path, stage: Stage, prepare: Callable[[], None], code: str, remote: str
) -> tuple[str, list[str]]:
    """Runs a stage for trials on a node; returns why the node can run none, or "", and "" or the error of each trial.

    Raises:
      Preempted: SIGTERM was received, and the trial saved a checkpoint.
    """
    if code_digest() != code:
        return f"{platform.node()} has other code ({code_digest()}, here {code}): install the same on all nodes", []
    if remote:
        directory, _ = local_directory(remote, Path(tempfile.gettempdir()) / f"mmfusion-{os.getuid()}")
    elif not (directory / PLAN).exists():
        return f"{platform.node()} does not see {directory}: give a folder that all nodes mount, or a bucket", []
    prepare()
    import jax  # a node without accelerators gets no group

    shared = RemoteCopy(remote, directory)
    for trial in trials:
        shared.fetch_trial(trial)
    on_cpu = jax.default_backend() == "cpu"
    executor = runner.InProcess(directory) if on_cpu else replicated_runner.Replicas(directory)
    batches = iter([trials])
    errors = {trial.name: error for trial, error in executor.run(lambda: next(batches, []), stage)}
    for trial in trials:
        shared.upload_trial(trial, errors.get(trial.name, ""))
    return "", [errors.get(trial.name, "") for trial in trials]
