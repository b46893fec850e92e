"""Run directories that are shared, damaged, hostile, without a home or on a full disk: one line, exit status 2."""

import errno
import functools
import json
import os
import pwd
import shutil
import signal
import stat
import types
from pathlib import Path
from typing import Any

import grain
import numpy as np
import pytest
import tensorflow_datasets as tfds

from experiments import cli
from mmfusion import config as configs
from mmfusion.checkpoints.manager import Checkpoints
from mmfusion.config.files import load_file
from mmfusion.data import pipeline, preparation
from mmfusion.errors import UserError
from mmfusion.tracking.lock import locked
from mmfusion.training.directory import run_directory
from mmfusion.training.restore import read_config
from tests import processes
from tests.errors import rejects

# --- Two commands in one directory ---


def test_lock_refuses_a_second_command_and_says_who_holds_it(tmp_path):
    config = load_file("configs/quickstart.py")
    with run_directory(tmp_path / "run", config):
        holder = f"another command runs in this directory: process {os.getpid()} on"
        with rejects(tmp_path / "run", None, says=holder), run_directory(tmp_path / "run", config):
            pytest.fail("two commands are in one directory")
        with run_directory(tmp_path / "other", config):
            (tmp_path / "other" / "kept").touch()
    with run_directory(tmp_path / "run", config):
        pass
    assert sorted(tmp_path.rglob("*")) == [tmp_path / "other", tmp_path / "other" / "kept"]  # nothing of its own


def hold(folder: Path) -> None:
    with locked(folder):
        (folder / "locked").touch()
        signal.pause()


@pytest.mark.process
def test_lock_of_a_killed_command_is_free(tmp_path):
    holder = processes.CONTEXT.Process(target=hold, args=(tmp_path,), daemon=True)
    holder.start()
    while not (tmp_path / "locked").exists() and holder.is_alive():
        holder.join(0.01)
    with rejects(tmp_path, None, says=f"process {holder.pid} on"), locked(tmp_path):
        pass
    holder.kill()
    holder.join()
    assert (tmp_path / ".lock").exists()  # what a killed process leaves locks nobody out
    with locked(tmp_path):
        pass


def test_lock_holds_without_its_description(tmp_path):
    with locked(tmp_path):
        (tmp_path / ".lock").write_text("")  # on a full disk
        with rejects(tmp_path, None, says="an unknown process"), locked(tmp_path):
            pass


def test_lock_is_not_needed_where_a_file_system_has_none(tmp_path, monkeypatch, capsys):
    def no_locks(*_: Any) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("mmfusion.tracking.lock.fcntl.flock", no_locks)
    with locked(tmp_path):
        warning = f"warning: {tmp_path} has no locks (No locks available): run one command there\n"
        assert capsys.readouterr().err == warning


# --- config.json ---


@functools.cache
def valid() -> str:
    return json.dumps(configs.to_json(load_file("configs/quickstart.py")))


def changed(path: str, value: Any) -> str:
    values = json.loads(valid())
    *sections, key = path.split(".")
    section = values
    for name in sections:
        section = section[name]
    section[key] = value
    return json.dumps(values)


@pytest.mark.parametrize(
    "content",
    [
        "",
        "{}",
        "[]",
        "null",
        "\0",
        '{"data": 1, "model": 2}',
        "[" * 200_000,
        '{"a":' * 200_000,
        "9" * 5_000,
        ("data", []),
        ("data", {"name": "x"}),
        ("data.modalities", 3),
        ("data.modalities.image", {}),
        ("data.targets.label", {"kind": ["classification"]}),
        ("data.unknown", 1),
        ("model.encoders.image", "cnn"),
        ("model.fusion.name", None),
        ("model.width", "wide"),
        ("optim.schedule", None),
        ("objectives", ["x"]),
        ("steps", "many"),
        ("steps", -1),
        ("seed", 2**80),
    ],
    ids=lambda content: content[:12] if isinstance(content, str) else f"{content[0]} {str(content[1])[:12]}",
)
def test_config_that_is_no_config_is_refused(content, tmp_path):
    (tmp_path / "config.json").write_text(content if isinstance(content, str) else changed(*content))
    for use in (read_config, lambda folder: run_directory(folder, load_file("configs/quickstart.py")).__enter__()):
        with pytest.raises(UserError) as raised:
            use(tmp_path)
        assert "\n" not in str(raised.value) and len(str(raised.value)) < 1000


def test_config_that_is_no_small_regular_file_is_refused(tmp_path):
    path = tmp_path / "config.json"
    path.write_text(valid())
    os.truncate(path, 1 << 40)  # without blocks
    with rejects(path, None, says="has more than"):
        configs.read_json(path)
    path.unlink()
    os.mkfifo(path)
    assert stat.S_ISFIFO(path.stat().st_mode)
    with rejects(path, None, says="not a regular file"):
        configs.read_json(path)


# --- Checkpoints ---


@pytest.mark.parametrize("name", ["²", "٣", "007", "③"])
def test_checkpoints_refuse_a_folder_that_is_named_like_another_step(name, tmp_path):
    """A folder ٣, which is 3, made the intact checkpoint 3 be moved away as damaged."""
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    for step in (3, 7):
        checkpoints.save(step, {"a": np.ones(2)}, {"progress": {}}, 0.5)
        checkpoints.wait()
    checkpoints.close()
    (tmp_path / "checkpoints" / name).mkdir()
    for readonly in (True, False):
        with rejects(tmp_path / "checkpoints" / name, None, says="move it away"):
            Checkpoints(tmp_path / "checkpoints", readonly=readonly)
    (tmp_path / "checkpoints" / name).rmdir()
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.steps() == [3, 7]
    checkpoints.close()


# --- Paths, homes, disks ---


@pytest.mark.process
@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("train", "--config=configs/quickstart.py"), "File name too long"),
        (("evaluate",), "is no run directory"),
    ],
    ids=["train", "evaluate"],
)
def test_path_that_is_too_long_is_refused(arguments, says, command):
    done = command(f"experiments.{arguments[0]}", *arguments[1:], f"--workdir=/tmp/{'x/' * 3000}")
    assert done.returncode == 2 and done.stderr.count("\n") == 1 and len(done.stderr) < 700, done.stderr
    assert says in done.stderr


@pytest.fixture
def homeless(monkeypatch):
    def no_user(uid: int) -> None:
        raise KeyError(uid)

    for name in ("HOME", "XDG_CACHE_HOME", "TFDS_DATA_DIR"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(pwd, "getpwuid", no_user)


def test_commands_without_a_home_keep_nothing_or_say_so(homeless, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    cli.enable_compilation_cache()  # without one
    with pytest.raises(UserError, match="HOME") as raised, cli.system_errors():
        cli.cache_folder()
    assert raised.value.message.startswith("this user has no home directory")
    with rejects("config.data.dir", None, says="no home directory"):
        preparation.make_builder("mnist", "")
    assert not list(tmp_path.iterdir())  # such as a folder named ~
    preparation.make_builder("shapes/match", str(tmp_path))


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.ENAMETOOLONG])
def test_system_errors_become_a_line(number):
    with rejects("/some/file", None, says=os.strerror(number)), cli.system_errors():
        raise OSError(number, os.strerror(number), "/some/file")
    with pytest.raises(OSError, match="Bad file"), cli.system_errors():
        raise OSError(errno.EBADF, os.strerror(errno.EBADF))  # an error of the program


class Small(tfds.core.GeneratorBasedBuilder):
    """A dataset of two rows."""

    VERSION = tfds.core.Version("1.0.0")

    def _info(self):
        return self.dataset_info_from_configs(features=tfds.features.FeaturesDict({"text": tfds.features.Text()}))

    def _split_generators(self, dl_manager):
        return {"train": ((i, {"text": "word"}) for i in range(2))}

    def _generate_examples(self):
        raise NotImplementedError


def test_full_disk_while_a_dataset_is_prepared_is_a_line(tmp_path, monkeypatch):
    """ArrayRecord's error is a RuntimeError without errno."""
    from array_record.python import array_record_module

    writer, name = array_record_module.ArrayRecordWriter, "tests.hostile.test_run_directories:Small"
    monkeypatch.setattr(array_record_module, "ArrayRecordWriter", lambda path, *rest: writer("/dev/full", *rest))
    with rejects("config.data.name", name, says="no space left to prepare it under"):
        preparation.prepared_builder(name, str(tmp_path), "")
    assert not [path for path in tmp_path.rglob("*") if path.name == "dataset_info.json"]
    monkeypatch.undo()
    preparation.prepared_builder(name, str(tmp_path), "")  # with space, nothing of before is in the way


@pytest.mark.parametrize(
    "error",
    [
        OSError(errno.ENOSPC, "No space left on device"),
        RuntimeError("Worker process was terminated unexpectedly with exit code -7. Search the logs"),
    ],
    ids=["semaphore", "batch"],
)
def test_full_shared_memory_is_named(error, monkeypatch):
    """A semaphore or a batch does not fit: errors of Grain's, as a container with 64 KiB of /dev/shm gave them."""

    def fail() -> Any:
        raise error

    monkeypatch.setattr(grain.IterDataset, "mp_prefetch", lambda *_: iter(fail, None))
    monkeypatch.setattr(shutil, "disk_usage", lambda path: types.SimpleNamespace(total=64e6, free=1e6))
    with rejects("config.data.workers", 2, says="is full (1.0 of 64.0 MB are free)"):
        next(pipeline._prefetch(lambda step: step, 0, 4, 2))
