"""Failed saves: each is reported and counted, and the best of them is written by the next save."""

import errno
import os
import shutil
import time
from pathlib import Path
from types import SimpleNamespace

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from mmfusion.checkpoints.manager import TEMPORARY, Checkpoints, ocp
from mmfusion.checkpoints.saver import Saver
from mmfusion.errors import UserError
from mmfusion.tracking.logger import Logger
from mmfusion.training.loop import train
from tests import planted
from tests.checkpoints.test_manager import CONTEXT, limit_file_size, random_state
from tests.errors import rejects

pytestmark = pytest.mark.usefixtures("traced_once")

MAX_FAILURES = 3
ROWS = [planted.row(i) for i in range(40)]


def save_with_failures(folder: Path) -> None:
    """Saves with failures, then successfully, then ends this process and Orbax's writers."""
    messages: list[str] = []
    checkpoints = Checkpoints(folder)
    saver = Saver(
        checkpoints, lambda: None, SimpleNamespace(print=messages.append, sync=lambda: None), max_failures=MAX_FAILURES
    )
    saver.save(1, random_state(1), {}, 0.5, last=False)
    saver.finish()
    with limit_file_size(20_000):
        for step in range(2, 2 + MAX_FAILURES):
            saver.save(step, random_state(step), {}, 0.5, last=False)
            while len(messages) < step - 1:  # as the training loop does after each step
                saver.poll()
            assert f"this is failure {step - 1} of {MAX_FAILURES} allowed" in messages[-1] and "\n" not in messages[-1]
            assert sorted(path.name for path in folder.iterdir()) == ["1"]  # no partial checkpoint remains
    saver.save(9, random_state(9), {}, 0.5, last=True)
    assert saver.failures == [] and checkpoints.steps() == [1, 9]

    with limit_file_size(20_000):
        assert saver.save(10, random_state(10), {}, 0.5, last=True) == 9  # a run that stops can use an older checkpoint
        assert "cannot write a checkpoint" in messages[-1]
        for step in range(11, 11 + MAX_FAILURES):
            saver.save(step, random_state(step), {}, 0.5, last=False)
            saver.poll(wait=True)
        saver.save(20, random_state(20), {}, 0.5, last=False)
        with rejects(folder, None, says="cannot write a checkpoint"):
            saver.poll(wait=True)
    os._exit(0)


@pytest.mark.process
def test_saver_reports_and_counts_failures_in_the_background(tmp_path: Path):
    process = CONTEXT.Process(target=save_with_failures, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    reopened = Checkpoints(tmp_path)
    assert reopened.steps() == [1, 9]
    reopened.close()


@pytest.fixture
def saver_and_messages(tmp_path: Path) -> tuple[Saver, list[str]]:
    """Returns a saver that has saved step 1, and the list of its messages."""
    messages: list[str] = []
    log = SimpleNamespace(print=messages.append, sync=lambda: None)
    saver = Saver(Checkpoints(tmp_path / "run"), lambda: None, log, max_failures=MAX_FAILURES)
    saver.save(1, random_state(1), {}, 0.5, last=False)
    saver.finish()
    return saver, messages


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_saver_continues_after_a_refused_write(
    saver_and_messages: tuple[Saver, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int
):
    saver, messages = saver_and_messages
    mkdir = os.mkdir

    def refuse_temporary(path: str, *rest: int, **options: int) -> None:
        if TEMPORARY in str(path):
            raise OSError(code, os.strerror(code), str(path))
        mkdir(path, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", refuse_temporary)
        saver.save(2, random_state(2), {}, 0.9, last=False)
        saver.poll(wait=True)
    (line,) = messages
    assert f"{tmp_path}/run: cannot write a checkpoint: {os.strerror(code)}; older ones are untouched" in line
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["1"]
    saver.save(3, random_state(3), {}, 0.1, last=True)  # after the pending best checkpoint
    assert saver.checkpoints.steps() == [2, 3] and saver.checkpoints.best() == 2


def test_saver_reports_and_recreates_a_deleted_directory(saver_and_messages: tuple[Saver, list[str]], tmp_path: Path):
    saver, messages = saver_and_messages
    shutil.rmtree(tmp_path / "run")
    saver.save(2, random_state(2), {}, 0.4, last=False)
    assert (
        f"warning: {tmp_path}/run: is gone, and 1 checkpoints with it; going on, this is failure 1 of 3" in messages[0]
    )
    saver.save(3, random_state(3), {}, 0.3, last=True)
    assert saver.checkpoints.steps() == [2, 3] and saver.checkpoints.best() == 2


def test_saver_syncs_files_before_dependent_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The log is synced before its checkpoint, and a checkpoint before the next, which deletes older ones."""
    events: list[str] = []
    fsync = os.fsync

    def record_fsync(handle: int) -> None:
        fsync(handle)
        events.append(str(Path(f"/proc/self/fd/{handle}").readlink().relative_to(tmp_path)))

    monkeypatch.setattr(os, "fsync", record_fsync)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    save = checkpoints._manager.save
    monkeypatch.setattr(checkpoints._manager, "save", lambda s, **o: events.append(f"begin {s}") or save(s, **o))
    with Logger(tmp_path, total_steps=4) as log:
        saver = Saver(checkpoints, lambda: None, log, max_failures=0)
        for step in (1, 2, 3, 4):
            log.log(step, {"loss": 1.0})
            events.append(f"logged {step}")
            saver.save(step, random_state(step), {}, 0.5, last=step == 4)
    checkpoints.close()
    for step in (1, 2, 3, 4):
        before_save = events[events.index(f"logged {step}") : events.index(f"begin {step}")]
        assert {"metrics.jsonl", "."} <= set(before_save)
        end = events.index(f"begin {step + 1}") if step < 4 else None
        synced = events[events.index(f"begin {step}") : end]
        assert "checkpoints" in synced and f"checkpoints/{step}" in synced
        files = [path for path in (tmp_path / "checkpoints" / str(step)).rglob("*") if path.is_file()]
        assert {str(path.relative_to(tmp_path)) for path in files} <= set(synced)  # of the files that still exist
    assert checkpoints.steps() == [1, 3, 4]


def test_saver_copies_the_state_before_donation(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Holds for a save that is written at once, and for one that fails and is written later."""
    messages: list[str] = []
    checkpoints = Checkpoints(tmp_path)
    saver = Saver(checkpoints, lambda: None, SimpleNamespace(print=messages.append, sync=lambda: None), max_failures=1)

    def save(step: int) -> None:
        on_device = jax.device_put(random_state(step))
        saver.save(step, on_device, {}, step / 10, last=False)
        jax.block_until_ready(jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0)(on_device))

    def assert_saved(step: int) -> None:
        np.testing.assert_array_equal(
            checkpoints.restore(step, random_state(0))[0]["kernel"], random_state(step)["kernel"]
        )

    save(1)
    saver.poll(wait=True)
    assert_saved(1)
    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", raise_disk_full)
        save(2)
    saver.save(3, random_state(3), {}, 0.0, last=True)
    assert messages[-1] == "train  the checkpoint of step 2 is written now"
    assert_saved(2)
    checkpoints.close()


def test_checkpoints_save_does_not_raise_an_earlier_saves_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The save fails after it has started to write, and its writers then find their files deleted."""
    checkpoints = Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        start, finalize = ocp.AsyncCheckpointer.save, ocp.CompositeCheckpointHandler.finalize
        patch.setattr(ocp.AsyncCheckpointer, "save", lambda *a, **o: (start(*a, **o), raise_disk_full()))
        patch.setattr(ocp.CompositeCheckpointHandler, "finalize", lambda *a: (time.sleep(0.5), finalize(*a)))
        with rejects(tmp_path, None, says="No space left on device"):
            checkpoints.save(1, random_state(1), {}, 0.5)
    checkpoints.save(2, random_state(2), {}, 0.5)
    checkpoints.wait()
    assert checkpoints.newest() == 2
    checkpoints.close()


def raise_disk_full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("background", "newer"), [(False, False), (True, False), (False, True)])
def test_saver_writes_the_best_failed_save_with_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool, newer: bool
):
    """The save fails at once or in the background, and is on disk before the next save."""
    messages: list[str] = []
    checkpoints = Checkpoints(tmp_path)
    saver = Saver(checkpoints, lambda: None, SimpleNamespace(print=messages.append, sync=lambda: None), max_failures=5)
    saver.save(1, random_state(1), {}, 0.1, last=False)
    saver.finish()
    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "wait_until_finished" if background else "save", raise_disk_full)
        for step, score in ((2, 0.5), (3, 0.9), (4, 0.7), (5, None)):
            saver.save(step, random_state(step), {"from": step}, score, last=False)
            saver.poll(wait=True)
        assert saver.pending_best.step == 3 and len(saver.failures) == 4
        if newer:  # only the pending save fails: a run resumed from the newer one would lose step 3
            patch.undo()
            original, fails = ocp.CheckpointManager.save, iter([True])
            patch.setattr(
                ocp.CheckpointManager,
                "save",
                lambda *a, **o: raise_disk_full() if next(fails, False) else original(*a, **o),
            )
            saver.save(5, random_state(5), {}, 0.3, last=False)
            saver.poll(wait=True)
            assert checkpoints.steps() == [1] and saver.pending_best.step == 3 and len(saver.failures) == 5
    saver.save(6, random_state(6), {}, 0.2, last=True)
    assert messages[-1] == "train  the checkpoint of step 3 is written now" and saver.pending_best is None
    assert checkpoints.best() == 3 and checkpoints.newest() == 6
    state, meta = checkpoints.restore(3, random_state(0))
    assert meta["from"] == 3
    np.testing.assert_array_equal(state["kernel"], random_state(3)["kernel"])
    checkpoints.close()


@pytest.mark.parametrize("failing", ["sync", "upload"])
def test_saver_counts_a_failed_log_sync_as_a_failed_save(tmp_path: Path, failing: str):
    """A run killed after a checkpoint without a synced log would lose those log lines."""

    def fail(*_: object) -> None:
        raise {"sync": OSError(errno.ENOSPC, "No space left on device"), "upload": UserError("no bucket")}[failing]

    checkpoints = Checkpoints(tmp_path)
    writes = {"sync": lambda: None, "upload": lambda: None, failing: fail}
    log = SimpleNamespace(print=lambda _: None, sync=writes["sync"])
    saver = Saver(checkpoints, writes["upload"], log, max_failures=2)
    for step in (1, 2):
        saver.save(step, random_state(step), {}, 0.5, last=False)
    with pytest.raises(UserError, match=r"No space left|no bucket"):
        saver.save(3, random_state(3), {}, 0.5, last=False)
    assert checkpoints.steps() == []


def test_logger_sync_detects_a_deleted_directory(tmp_path: Path):
    with Logger(tmp_path / "run", total_steps=2) as log:
        log.log(1, {"loss": 0.5})
        log.sync()
        shutil.rmtree(tmp_path / "run")
        log.log(2, {"loss": 0.5})
        with pytest.raises(FileNotFoundError):
            log.sync()
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.jsonl").touch()  # a different file of the same name
        with pytest.raises(FileNotFoundError):
            log.sync()


@pytest.mark.loop
def test_train_reports_a_full_disk(tmp_path, monkeypatch):
    planted.plant(monkeypatch, train=ROWS, test=ROWS[:20])
    monkeypatch.setattr(ocp.CheckpointManager, "save", raise_disk_full)
    with rejects(tmp_path / "run" / "checkpoints", None, says="No space left on device; older ones are"):
        train(planted.config(), tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.loop
def test_train_reports_an_unwritable_relative_directory(tmp_path, monkeypatch):
    planted.plant(monkeypatch, train=ROWS, test=ROWS[:20])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").touch()
    with rejects(tmp_path / "run" / "checkpoints", None, says="File exists"):
        train(planted.config(), Path("run"))


@pytest.mark.loop
def test_train_continues_while_few_saves_fail(tmp_path, monkeypatch, capsys):
    save, calls, disk_has_space = ocp.CheckpointManager.save, [], [False]

    def full_for_two_saves(self, step, *args, **options):
        calls.append(step)
        if len(calls) <= 2 and not disk_has_space[0]:
            raise_disk_full()
        return save(self, step, *args, **options)

    planted.plant(monkeypatch, train=ROWS, test=ROWS[:20])
    monkeypatch.setattr(ocp.CheckpointManager, "save", full_for_two_saves)
    config = planted.config(optim__learning_rate=3.0)  # diverges, so that step 2 is the best
    with config.unlocked():
        config.steps, config.eval_every, config.checkpoint_every, config.recovery.failed_saves = 6, 2, 2, 1
    with rejects(tmp_path / "one" / "checkpoints", None, says="No space left on device"):
        train(config, tmp_path / "one")
    assert calls == [2, 2]  # the second consecutive failure ends the run
    calls.clear()
    with config.unlocked():
        config.recovery.failed_saves = 2
    result = train(config, tmp_path / "two")
    assert calls == [2, 2, 2, 6]
    assert "this is failure 2 of 2 allowed" in capsys.readouterr().out
    disk_has_space[0] = True
    uninterrupted = train(config, tmp_path / "three")  # without failures
    assert (result["best_step"], result["test"]) == (uninterrupted["best_step"], uninterrupted["test"])
