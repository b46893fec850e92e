"""Sinks of metrics: what they are sent, with stand-ins for the packages of the optional ones, and where one fails.

`test_optional_sinks.py` runs the packages themselves where they are installed.
"""

import importlib
import importlib.machinery
import json
import subprocess
import sys
import threading
import types

import pytest

from mmfusion.tracking import sinks
from mmfusion.tracking.logger import Logger
from mmfusion.tracking.sinks import check_tracking
from tests.errors import rejects
from tests.tracking.test_logger import console, events, lines

CONFIG = {"seed": 3, "optim": {"name": "adamw", "learning_rate": 0.1}, "long": "x" * 9999}


class Calls:
    """Records calls by the name of the method, and returns what the method is to return."""

    def __init__(self, **results):
        self.calls, self._results = [], results

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls.append((name, args, kwargs))
            result = self._results.get(name)
            if isinstance(result, Exception):
                raise result
            return result

        return call

    def of(self, name):
        return [(args, kwargs) for called, args, kwargs in self.calls if called == name]


def stand_in(monkeypatch, name, **members):
    """Puts a module in place of a package."""
    module = types.ModuleType(name)
    module.__spec__ = importlib.machinery.ModuleSpec(name, None, origin="stand-in")
    vars(module).update(members)
    monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, f"mmfusion.tracking.{name.partition('.')[0]}_sink", raising=False)
    return module


@pytest.fixture
def wandb(monkeypatch):
    run = Calls()
    package = Calls(init=run, login=True, setup=types.SimpleNamespace(settings=types.SimpleNamespace(mode="online")))
    members = {name: getattr(package, name) for name in ("init", "login", "setup")}
    stand_in(monkeypatch, "wandb", Settings=lambda **options: options, **members)
    return types.SimpleNamespace(package=package, run=run)


@pytest.fixture
def mlflow(monkeypatch):
    run = types.SimpleNamespace(info=types.SimpleNamespace(run_id="run 1"))
    client = Calls(create_experiment="7", create_run=run)
    stand_in(monkeypatch, "mlflow", MlflowClient=lambda: client)
    entities = {"Metric": lambda *values: values, "Param": lambda *values: values}
    stand_in(monkeypatch, "mlflow.entities", **entities)
    return client


def write_run(workdir, tracking, resume_step=0, screen=None):
    config = {"tracking": tracking, **CONFIG}
    screen = screen or console(width=200)
    with Logger(workdir, resume_step=resume_step, total_steps=9, config=config, console=screen) as log:
        log.log(resume_step + 1, {"loss": 0.5, "auroc": None, "confusion": [[1]]})
        log.log(resume_step + 1, {"color/accuracy (%)": 0.25}, "test")
    return screen.file.getvalue()


def test_wandb_sink_writes_scalars_by_step_with_the_config_and_continues_its_run(tmp_path, wandb):
    write_run(tmp_path / "quick", "wandb")
    write_run(tmp_path / "quick", "wandb", resume_step=4)
    first, second = (options for _, options in wandb.package.of("init"))
    assert first == second and first["id"] == json.loads((tmp_path / "quick" / "wandb.json").read_text())["id"]
    assert (first["name"], first["project"], first["resume"]) == ("quick", "mmfusion", "allow")
    assert first["config"] == {"tracking": "wandb", **CONFIG}
    assert wandb.run.of("define_metric")[0] == (("*",), {"step_metric": "step"})
    assert [args[0] for args, _ in wandb.run.of("log")] == [
        {"train/loss": 0.5, "step": 1},
        {"test/color/accuracy (%)": 0.25, "step": 1},
        {"train/loss": 0.5, "step": 5},
        {"test/color/accuracy (%)": 0.25, "step": 5},
    ]
    assert wandb.run.of("finish") == [((), {"exit_code": 0})] * 2
    assert not list((tmp_path / "quick").glob("events.*"))


def test_wandb_sink_does_not_ask_for_a_login(tmp_path, wandb):
    wandb.package._results["login"] = False
    assert "train  warning: wandb: not logged in: run `wandb login`" in write_run(tmp_path, "wandb")
    assert wandb.package.of("login")[0] == ((), {"prompt": False})


def test_mlflow_sink_writes_scalars_by_step_with_the_config_and_continues_its_run(tmp_path, mlflow):
    write_run(tmp_path / "quick", "mlflow")
    write_run(tmp_path / "quick", "mlflow", resume_step=4)
    assert mlflow.of("create_run") == [(("7",), {"run_name": "quick"})]
    assert mlflow.of("update_run") == [(("run 1",), {"status": "RUNNING"})]
    batches = [options for args, options in mlflow.of("log_batch") if args == ("run 1",)]
    assert dict(batches[0]["params"]) == {
        "tracking": "mlflow", "seed": "3", "optim.name": "adamw", "optim.learning_rate": "0.1", "long": "x" * 500,
    }  # fmt: skip
    metrics = [(name, value, step) for each in batches[1:] for name, value, _, step in each["metrics"]]
    test = "test/color/accuracy ___"
    assert metrics == [("train/loss", 0.5, 1), (test, 0.25, 1), ("train/loss", 0.5, 5), (test, 0.25, 5)]
    assert mlflow.of("set_terminated") == [(("run 1", "FINISHED"), {})] * 2


def test_sinks_are_told_of_a_run_that_fails(tmp_path, wandb, mlflow):
    with pytest.raises(KeyError), Logger(tmp_path, total_steps=9, config={"tracking": "wandb+mlflow"}) as log:
        log.log(1, {"loss": 0.5})
        raise KeyError
    assert wandb.run.of("finish") == [((), {"exit_code": 1})]
    assert mlflow.of("set_terminated") == [(("run 1", "FAILED"), {})]


def test_a_failing_sink_is_reported_once_and_the_others_go_on(tmp_path, wandb, mlflow, monkeypatch):
    monkeypatch.setattr(sinks, "PAUSE_SECONDS", 0.0)
    mlflow._results["log_batch"] = ConnectionError("no server at\nhttp://localhost")
    screen = console(width=200)
    config = {"tracking": "tensorboard+mlflow+wandb"}
    with Logger(tmp_path, total_steps=9, config=config, console=screen) as log:
        for step in range(1, 9):
            log.log(step, {"loss": 0.5})
    assert screen.file.getvalue().count("warning") == 1
    assert (
        "train  warning: mlflow: no server at http://localhost; the run goes on, and metrics.jsonl has all metrics"
        in screen.file.getvalue()
    )
    assert len(lines(tmp_path)) == len(events(tmp_path)) == len(wandb.run.of("log")) == 8
    assert len(mlflow.of("log_batch")) >= 8


def test_a_sink_that_failed_is_tried_again(monkeypatch):
    monkeypatch.setattr(sinks, "PAUSE_SECONDS", 0.0)
    opened, reports = [OSError("first"), OSError("second"), Calls()], []

    def open_sink():
        result = opened.pop(0)
        if isinstance(result, Exception):
            raise result
        return result

    last = opened[-1]
    sink = sinks.Background("wandb", open_sink, reports.append)
    for step in range(4):
        sink.write_scalars(step, {"loss": 0.5})
    sink.close()
    assert [args for args, _ in last.of("write_scalars")] == [(2, {"loss": 0.5}), (3, {"loss": 0.5})]
    assert len(reports) == 1 and "wandb: first;" in reports[0]


def test_a_sink_that_hangs_does_not_hold_the_run(monkeypatch):
    monkeypatch.setattr(sinks, "CLOSE_SECONDS", 0.05)
    reports, release = [], threading.Event()
    sink = sinks.Background("wandb", release.wait, reports.append)
    for step in range(100):
        sink.write_scalars(step, {"loss": 0.5})
    sink.close()
    assert reports == [
        "train  warning: wandb: not closed after 0.05 s; the run goes on, and metrics.jsonl has all metrics"
    ]
    release.set()


def test_sinks_of_other_hosts_are_not_opened(tmp_path, wandb):
    with Logger(tmp_path / "run", primary=False, total_steps=9, config={"tracking": "wandb"}) as log:
        log.log(1, {"loss": 0.5})
    assert not wandb.package.calls


@pytest.mark.parametrize("name", ["wandb", "mlflow"])
def test_check_names_the_command_that_installs_a_missing_package(name, monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda _: None)
    with rejects("config.tracking", name, says=f"pip install '.[{name}]' in the repository, or pip install {name}"):
        check_tracking(f"tensorboard+{name}")


def test_check_does_not_take_a_folder_for_a_package(tmp_path, monkeypatch):
    (tmp_path / "wandb").mkdir()  # that of offline runs
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "wandb", raising=False)
    importlib.invalidate_caches()
    with rejects("config.tracking", "wandb", says="needs a package"):
        check_tracking("wandb")


def test_check_rejects_unknown_and_repeated_sinks():
    check_tracking("")
    check_tracking("tensorboard")
    with rejects("config.tracking", "tensorbord", suggests="tensorboard"):
        check_tracking("tensorbord")
    with rejects("config.tracking", "tensorboard+tensorboard", says="twice"):
        check_tracking("tensorboard+tensorboard")


@pytest.mark.process
def test_logger_imports_no_package_of_a_sink_before_it_is_on():
    code = (
        "import sys, mmfusion.tracking.logger;"
        "print(sorted({'tensorboardX', 'wandb', 'mlflow', 'torch'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
