"""Ablations on a cluster: the adapter with a stand-in for Ray, and a real cluster of which a node is killed."""

import contextlib
import functools
import importlib
import importlib.machinery
import importlib.util
import json
import os
import signal
import socket
import sys
import threading
import time
import types

import pytest
from fsspec.implementations.memory import MemoryFileSystem

import mmfusion
from mmfusion.analysis import ablate as ablate_module
from mmfusion.analysis import run_ablation
from mmfusion.analysis.ablation import plan, runner, scheduling
from mmfusion.analysis.ablation.leases import LeaseLost, Unshared
from mmfusion.analysis.ablation.remote_copy import RemoteCopy, local_directory
from mmfusion.analysis.ablation.runner import Stage
from mmfusion.analysis.run_ablation import Execution, Request
from mmfusion.errors import Preempted
from tests.analysis.ablation.test_ablation import do_nothing, make
from tests.errors import rejects

STARTS = "MMFUSION_TESTS_STARTS"  # environment variable: a file with a line per task of the real cluster


class RayError(Exception):
    """What Ray raises for a task that it gave up."""


class Task:
    """A task of the stand-in, which runs when its result is asked for."""

    def __init__(self, function, options, args):
        self.function, self.options, self.args = function, options, args


class Ray(types.ModuleType):
    """A stand-in for the package, of a cluster with `nodes`.

    Attributes:
      nodes: the cluster's resources.
      calls: the names of the functions called, with their arguments.
      losses: how often a task's process is lost, by the task's name.
      most: the largest number of tasks at a time.
    """

    exceptions = types.SimpleNamespace(RayError=RayError)

    def __init__(self):
        super().__init__("ray")
        self.__spec__ = importlib.machinery.ModuleSpec("ray", None, origin="stand-in")
        self.nodes, self.calls, self.losses, self.most = {"CPU": 2.0}, [], {}, 0
        for name in ("init", "cancel", "shutdown"):
            setattr(self, name, functools.partial(self._called, name))

    def _called(self, name, *args, **options):
        self.calls.append((name, *args, options))

    def cluster_resources(self):
        return self.nodes

    def remote(self, function):
        def options(**options):
            return types.SimpleNamespace(remote=lambda *args: Task(function, options, args))

        return types.SimpleNamespace(options=options)

    def wait(self, tasks, timeout):
        assert timeout > 0
        self.most = max(self.most, len(tasks))
        return tasks[-1:], tasks[:-1]

    def get(self, task):
        tries = task.options["max_retries"] + 1
        lost = self.losses.get(task.options["name"], 0)
        for _ in range(tries - lost):
            try:
                return task.function(*task.args)
            except tuple(task.options["retry_exceptions"]):
                continue
        raise RayError("The worker died\nunexpectedly")


@pytest.fixture
def ray(monkeypatch):
    package = Ray()
    monkeypatch.setitem(sys.modules, "ray", package)
    monkeypatch.delitem(sys.modules, "mmfusion.analysis.ablation.ray_tasks", raising=False)
    yield package
    sys.modules.pop("mmfusion.analysis.ablation.ray_tasks", None)  # it has the stand-in


@pytest.fixture
def tasks(ray, tmp_path):
    """`tasks(resources, jobs=0, remote="")` -> the executor with the stand-in, in a directory with a plan."""
    module = importlib.import_module("mmfusion.analysis.ablation.ray_tasks")
    (tmp_path / plan.PLAN).write_text("{}")

    def tasks(resources=None, jobs=0, remote=""):
        return module.RayTasks(tmp_path, "", resources or {}, jobs, do_nothing, remote)

    return tasks


def trials(*names):
    return [types.SimpleNamespace(name=name, config={"optim": {"learning_rate": 1}, "seed": 0}) for name in names]


def write_output(trial, folder, stops=()):
    """A stage; a trial that stops is preempted the first time."""
    if trial.name in stops and not (folder / "stopped").exists():
        (folder / "stopped").touch()
        raise Preempted("saved")
    if trial.name == "broken":
        raise ValueError("no data")
    (folder / "output").write_text(json.dumps(trial.name))


STAGE = Stage(write_output, "output")


def run(executor, planned, stage=STAGE, remote=""):
    """Runs a stage as an ablation does, and returns the events."""
    with executor:
        directory = executor._directory
        events = scheduling.run(planned, stage, directory, executor, Unshared(), RemoteCopy(remote, directory))
        return {trial.name: error for trial, error in events}


def test_ray_tasks_run_trials_with_their_resources(ray, tasks, tmp_path, capsys):
    ray.nodes = {"CPU": 4.0, "GPU": 1.0}
    options = []
    remote = ray.remote
    ray.remote = lambda function: types.SimpleNamespace(
        options=lambda **given: options.append(given) or remote(function).options(**given)
    )
    assert run(tasks({"GPU": 0.5, "TPU": 4.0}), trials("a", "b", "broken")) == {
        "a": "", "b": "", "broken": "ValueError: no data",
    }  # fmt: skip
    assert json.loads((tmp_path / "trials" / "a" / "output").read_text()) == "a"
    assert {given["name"] for given in options} == {"a", "b", "broken"}
    assert all((given["num_cpus"], given["num_gpus"], given["resources"]) == (1.0, 0.5, {"TPU": 4.0})
               for given in options)  # fmt: skip
    assert [name for name, *_ in ray.calls] == ["init", "shutdown"]
    assert "has 0 TPU now, and a trial needs 4: waiting" in capsys.readouterr().err
    assert ray.most == 1  # there is room for none, and one waits


def test_ray_tasks_fill_the_cluster(ray, tasks):
    ray.nodes = {"CPU": 3.0}
    run(tasks(), trials(*"abcdefgh"))
    assert ray.most == 4
    ray.most = 0
    run(tasks(jobs=2), trials(*"ijklmn"))
    assert ray.most == 2


def test_ray_tasks_are_repeated_when_lost_or_preempted(ray, tasks, tmp_path):
    ray.losses = {"a": 2, "b": 4}
    events = run(tasks(), trials("a", "b", "c"), Stage(functools.partial(write_output, stops=["c"]), "output"))
    assert events == {"a": "", "b": "its Ray task failed: RayError: The worker died unexpectedly", "c": ""}
    assert json.loads((tmp_path / "trials" / "b" / runner.FAILED).read_text()) == {"error": events["b"]}
    assert (tmp_path / "trials" / "c" / "stopped").exists()


def test_ray_tasks_end_with_the_ablation(ray, tasks):
    def lost():
        if ray.most:
            raise LeaseLost("lost")

    ray.wait = lambda tasks, timeout: (setattr(ray, "most", len(tasks)), ([], tasks))[1]
    batches = iter([[trial] for trial in trials("a", "b", "c", "d")])
    with pytest.raises(LeaseLost), tasks() as executor:
        list(executor.run(lambda: next(batches, []), STAGE, lost))
    assert [call[0] for call in ray.calls] == ["init", "cancel", "cancel", "cancel", "shutdown"]
    assert all(call[-1] == {"force": True} for call in ray.calls if call[0] == "cancel")


def test_ray_tasks_group_trials_on_accelerators(ray, tasks):
    planned = trials("a", "b")
    assert tasks({"TPU": 4.0}).batches(planned, runner.TRAINING) == [planned]
    assert tasks({"TPU": 4.0}).batches(planned, STAGE) == tasks().batches(planned, runner.TRAINING) == [
        [planned[0]], [planned[1]],
    ]  # fmt: skip


def test_ray_tasks_refuse_nodes_with_other_code_or_another_folder(ray, tasks, tmp_path):
    with tasks() as executor:
        (tmp_path / plan.PLAN).unlink()
        with rejects("--engine", None, says=f"does not see {tmp_path}"):
            list(executor.run(iter([trials("a"), []]).__next__, STAGE))
        assert not (tmp_path / "trials").exists()
    module = sys.modules["mmfusion.analysis.ablation.ray_tasks"]
    problem, _ = module.run_batch(trials("a"), tmp_path, STAGE, do_nothing, "other", "")
    assert "other code" in problem


def test_ray_tasks_upload_to_a_bucket_where_they_ran(ray, tasks, tmp_path, monkeypatch):
    monkeypatch.setattr(MemoryFileSystem, "store", {})
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "node"))
    stage = Stage(write_result, runner.RESULT)
    assert run(tasks(remote="memory://bucket/x"), trials("a", "broken"), stage, "memory://bucket/x") == {
        "a": "", "broken": "ValueError: no data",
    }  # fmt: skip
    node, _ = local_directory("memory://bucket/x", tmp_path / "node" / f"mmfusion-{os.getuid()}")
    assert (node / "trials" / "a" / runner.RESULT).exists()
    assert (tmp_path / "trials" / "a" / runner.RESULT).read_text() == "{}"  # downloaded
    assert json.loads((tmp_path / "trials" / "broken" / runner.FAILED).read_text())


def write_result(trial, folder):
    write_output(trial, folder)
    (folder / runner.RESULT).write_text("{}")


def test_ray_tasks_get_the_settings_of_jax(ray, tasks, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")
    monkeypatch.setenv("XLA_FLAGS", "--xla_a")
    monkeypatch.setenv("WANDB_API_KEY", "secret")
    with tasks({"CPU": 2.0}):
        pass
    with tasks({"GPU": 1.0}):
        pass
    on_cpu, on_gpu = (call[-1]["runtime_env"]["env_vars"] for call in ray.calls if call[0] == "init")
    assert on_cpu["XLA_FLAGS"] == on_gpu["XLA_FLAGS"] == "--xla_a"
    assert on_cpu["JAX_PLATFORMS"] == "cpu" and "JAX_PLATFORMS" not in on_gpu
    assert (on_cpu["PJRT_NPROC"], on_gpu["PJRT_NPROC"]) == ("2", "1") and "WANDB_API_KEY" not in on_cpu


def test_ray_tasks_leave_sigterm_to_the_command(ray, tasks, monkeypatch):
    monkeypatch.setattr(ray, "init", lambda **_: signal.signal(signal.SIGTERM, signal.SIG_DFL))
    with runner.preempted_by_signal():
        before = signal.getsignal(signal.SIGTERM)
        with pytest.raises(Preempted), tasks():
            assert signal.getsignal(signal.SIGTERM) is before
            signal.raise_signal(signal.SIGTERM)
    assert ray.calls == [("shutdown", {})]


def test_ray_tasks_reject_clusters_that_do_not_answer(ray, tasks, monkeypatch):
    connect = sys.modules["mmfusion.analysis.ablation.ray_tasks"].connect
    with contextlib.closing(socket.create_server(("127.0.0.1", 0))) as server:
        free = server.getsockname()[1]
    for address in (f"127.0.0.1:{free}", f"ray://127.0.0.1:{free}", "local", "127.0.0.1:x"):
        with rejects("--engine", f"ray:{address}", says="no Ray cluster answers"):
            connect(address, {})

    def refuse(**_):
        raise ConnectionError("Could not find any running\nRay instance.")

    monkeypatch.setattr(ray, "init", refuse)
    with rejects("--engine", "ray", says="ray start --head"):
        connect("", {})


def test_ablation_rejects_an_unknown_engine_and_passes_a_known_one_on(tmp_path, monkeypatch):
    given = []
    monkeypatch.setattr(ablate_module, "run_ablation", lambda request, execution: given.append(execution) or object())
    mmfusion.ablate("configs/quickstart.py", ["mean"], 1, tmp_path, engine="ray:a:1", resources={"GPU": 0.5}, jobs=3)
    assert (given[0].engine, given[0].resources, given[0].jobs) == ("ray:a:1", {"GPU": 0.5}, 3)
    with rejects("--engine", "rya:1", "ray"):
        mmfusion.ablate("configs/quickstart.py", ["mean"], 1, tmp_path, engine="rya:1")


def test_ablation_rejects_an_engine_that_is_not_installed(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    monkeypatch.delitem(sys.modules, "mmfusion.analysis.ablation.ray_tasks", raising=False)
    with rejects("--engine", "ray", says="pip install 'mmfusion[ray]'"):
        scheduling.executor(tmp_path, 0, do_nothing, "ray")


def note_start():
    """Appends the node of a task to a file."""
    package = importlib.import_module("ray")
    with open(os.environ[STARTS], "a") as file:
        file.write(package.get_runtime_context().get_node_id() + "\n")


def kill_a_node(cluster, nodes, directory, killed):
    """Kills a node once both have saved checkpoints of a trial that has not ended."""
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        folders = {path.parents[1] for path in directory.glob("trials/*/checkpoints/[1-9]*")}
        training = [folder for folder in folders if not (folder / runner.RESULT).exists()]
        if len(training) == len(nodes):
            killed.extend(folder.name for folder in training)
            cluster.remove_node(nodes[0], allow_graceful=False)
            return
        time.sleep(0.01)


@pytest.mark.process
@pytest.mark.thorough
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="pip install '.[ray]'")
def test_ablation_on_a_cluster_that_loses_a_node_gives_the_same_tables(data_dir, tmp_path, monkeypatch):
    from ray.cluster_utils import Cluster

    monkeypatch.setenv(STARTS, str(tmp_path / "starts"))
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    make_config = functools.partial(make, **{"data.dir": data_dir, "steps": 40, "checkpoint_every": 4})
    request = Request(make_config, ["mean"], 2)
    alone, directory, killed = tmp_path / "alone", tmp_path / "cluster", []
    run_ablation.run_ablation(request, Execution(alone, jobs=2))

    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
    killer = threading.Thread(target=kill_a_node, args=(cluster, nodes, directory, killed))
    killer.start()
    try:
        engine = f"ray:{cluster.address}"
        run_ablation.run_ablation(request, Execution(directory, engine=engine, prepare_worker=note_start))
        killer.join()
    finally:
        cluster.shutdown()
    assert len(killed) == 2
    for name in ("runs.csv", "claims.json"):
        assert (directory / name).read_bytes() == (alone / name).read_bytes()
    starts = (tmp_path / "starts").read_text().split()
    planned = json.loads((directory / plan.PLAN).read_text())["trials"]
    probed = len(list(directory.glob("trials/*/probe_*.json")))
    assert probed == 2 and len(starts) == len(planned) + probed + 1 and len(set(starts)) == 2
    assert not list((directory / "leases").iterdir())
