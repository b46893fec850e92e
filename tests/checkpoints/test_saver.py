"""Saves that fail: each is reported and counted, and the best of them is written by the next save."""

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
from tests.checkpoints.test_manager import CONTEXT, files_of_at_most, noise

pytestmark = pytest.mark.usefixtures("traced_once")

TIMES = 3
ROWS = [planted.row(i) for i in range(40)]


def fail_in_a_row(folder: Path) -> None:
    """Ends this process, and with it Orbax's writers, after failed saves and then a successful one."""
    said: list[str] = []
    checkpoints = Checkpoints(folder)
    saver = Saver(checkpoints, lambda: None, SimpleNamespace(print=said.append, sync=lambda: None), max_failures=TIMES)
    saver.save(1, noise(1), {}, 0.5, last=False)
    saver.finish()
    with files_of_at_most(20_000):
        for step in range(2, 2 + TIMES):
            saver.save(step, noise(step), {}, 0.5, last=False)
            while len(said) < step - 1:  # as the loop does after each step
                saver.poll()
            assert f"this is failure {step - 1} of {TIMES} allowed" in said[-1] and "\n" not in said[-1]
            assert sorted(path.name for path in folder.iterdir()) == ["1"]  # nothing half-written on a full disk
    saver.save(9, noise(9), {}, 0.5, last=True)
    assert saver.failures == [] and checkpoints.steps() == [1, 9]

    with files_of_at_most(20_000):
        assert saver.save(10, noise(10), {}, 0.5, last=True) == 9  # an older one serves a run that stops
        assert "warning: cannot write a checkpoint" in said[-1]
        for step in range(11, 11 + TIMES):
            saver.save(step, noise(step), {}, 0.5, last=False)
            saver.poll(wait=True)
        saver.save(20, noise(20), {}, 0.5, last=False)
        with pytest.raises(UserError, match="cannot write a checkpoint"):
            saver.poll(wait=True)
    os._exit(0)


@pytest.mark.process
def test_saver_reports_and_counts_failures_in_the_background(tmp_path: Path):
    process = CONTEXT.Process(target=fail_in_a_row, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    again = Checkpoints(tmp_path)
    assert again.steps() == [1, 9]
    again.close()


@pytest.fixture
def saver(tmp_path: Path) -> tuple[Saver, list[str]]:
    """A saver that has saved step 1, and the lines it prints."""
    said: list[str] = []
    log = SimpleNamespace(print=said.append, sync=lambda: None)
    made = Saver(Checkpoints(tmp_path / "run"), lambda: None, log, max_failures=TIMES)
    made.save(1, noise(1), {}, 0.5, last=False)
    made.finish()
    return made, said


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_saver_continues_where_writing_is_refused(
    saver: tuple[Saver, list[str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
):
    made, said = saver
    mkdir = os.mkdir

    def refused(path: str, *rest: int, **options: int) -> None:
        if TEMPORARY in str(path):
            raise OSError(number, os.strerror(number), str(path))
        mkdir(path, *rest, **options)

    with monkeypatch.context() as patch:
        patch.setattr(os, "mkdir", refused)
        made.save(2, noise(2), {}, 0.9, last=False)
        made.poll(wait=True)
    (line,) = said
    assert f"cannot write a checkpoint under {tmp_path}/run: {os.strerror(number)}; older ones are untouched" in line
    assert [path.name for path in (tmp_path / "run").iterdir()] == ["1"]
    made.save(3, noise(3), {}, 0.1, last=True)  # after the pending best one
    assert made.checkpoints.steps() == [2, 3] and made.checkpoints.best() == 2


def test_saver_reports_a_vanished_folder_and_creates_it(saver: tuple[Saver, list[str]], tmp_path: Path):
    made, said = saver
    shutil.rmtree(tmp_path / "run")
    made.save(2, noise(2), {}, 0.4, last=False)
    assert f"warning: {tmp_path}/run is gone, and 1 checkpoints with it; going on, this is failure 1 of 3" in said[0]
    made.save(3, noise(3), {}, 0.3, last=True)
    assert made.checkpoints.steps() == [2, 3] and made.checkpoints.best() == 2


def test_saver_syncs_files_before_those_that_rely_on_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The log before its checkpoint, and a checkpoint before the next one, which deletes older ones."""
    events: list[str] = []
    fsync = os.fsync

    def noted(handle: int) -> None:
        fsync(handle)
        events.append(str(Path(f"/proc/self/fd/{handle}").readlink().relative_to(tmp_path)))

    monkeypatch.setattr(os, "fsync", noted)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    begin = checkpoints._manager.save
    monkeypatch.setattr(checkpoints._manager, "save", lambda s, **o: events.append(f"begin {s}") or begin(s, **o))
    with Logger(tmp_path, total_steps=4) as log:
        saver = Saver(checkpoints, lambda: None, log, max_failures=0)
        for step in (1, 2, 3, 4):
            log.log(step, {"loss": 1.0})
            events.append(f"logged {step}")
            saver.save(step, noise(step), {}, 0.5, last=step == 4)
    checkpoints.close()
    for step in (1, 2, 3, 4):
        own = events[events.index(f"logged {step}") : events.index(f"begin {step}")]
        assert {"metrics.jsonl", "."} <= set(own)
        until = events.index(f"begin {step + 1}") if step < 4 else None
        synced = events[events.index(f"begin {step}") : until]
        assert "checkpoints" in synced and f"checkpoints/{step}" in synced
        files = [path for path in (tmp_path / "checkpoints" / str(step)).rglob("*") if path.is_file()]
        assert {str(path.relative_to(tmp_path)) for path in files} <= set(synced)  # of those that are still there
    assert checkpoints.steps() == [1, 3, 4]


def test_saver_copies_the_state_before_it_is_donated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """For a save that is written at once, and for one that fails and is written later."""
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path)
    saver = Saver(checkpoints, lambda: None, SimpleNamespace(print=said.append, sync=lambda: None), max_failures=1)

    def save(step: int) -> None:
        on_device = jax.device_put(noise(step))
        saver.save(step, on_device, {}, step / 10, last=False)
        jax.block_until_ready(jax.jit(lambda tree: jax.tree.map(jnp.zeros_like, tree), donate_argnums=0)(on_device))

    def saved(step: int) -> None:
        np.testing.assert_array_equal(checkpoints.restore(step, noise(0))[0]["kernel"], noise(step)["kernel"])

    save(1)
    saver.poll(wait=True)
    saved(1)
    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "save", full)
        save(2)
    saver.save(3, noise(3), {}, 0.0, last=True)
    assert said[-1] == "train  the checkpoint of step 2 is written now"
    saved(2)
    checkpoints.close()


def test_checkpoints_save_does_not_raise_the_error_of_an_earlier_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """The save fails after it has started to write, and its writers then find that their files are gone."""
    checkpoints = Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        start, finalize = ocp.AsyncCheckpointer.save, ocp.CompositeCheckpointHandler.finalize
        patch.setattr(ocp.AsyncCheckpointer, "save", lambda *a, **o: (start(*a, **o), full()))
        patch.setattr(ocp.CompositeCheckpointHandler, "finalize", lambda *a: (time.sleep(0.5), finalize(*a)))
        with pytest.raises(UserError, match="No space left on device"):
            checkpoints.save(1, noise(1), {}, 0.5)
    checkpoints.save(2, noise(2), {}, 0.5)
    checkpoints.wait()
    assert checkpoints.newest() == 2
    checkpoints.close()


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("background", "newer"), [(False, False), (True, False), (False, True)])
def test_saver_writes_the_best_failed_save_with_the_next_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool, newer: bool
):
    """Whether it fails at once or in the background, it is on disk before the next save."""
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path)
    saver = Saver(checkpoints, lambda: None, SimpleNamespace(print=said.append, sync=lambda: None), max_failures=5)
    saver.save(1, noise(1), {}, 0.1, last=False)
    saver.finish()
    with monkeypatch.context() as patch:
        patch.setattr(ocp.CheckpointManager, "wait_until_finished" if background else "save", full)
        for step, score in ((2, 0.5), (3, 0.9), (4, 0.7), (5, None)):
            saver.save(step, noise(step), {"from": step}, score, last=False)
            saver.poll(wait=True)
        assert saver.pending_best.step == 3 and len(saver.failures) == 4
        if newer:  # the disk takes it, but not the pending one: a run that resumed from it would not know of step 3
            patch.undo()
            original, fails = ocp.CheckpointManager.save, iter([True])
            patch.setattr(
                ocp.CheckpointManager, "save", lambda *a, **o: full() if next(fails, False) else original(*a, **o)
            )
            saver.save(5, noise(5), {}, 0.3, last=False)
            saver.poll(wait=True)
            assert checkpoints.steps() == [1] and saver.pending_best.step == 3 and len(saver.failures) == 5
    saver.save(6, noise(6), {}, 0.2, last=True)
    assert said[-1] == "train  the checkpoint of step 3 is written now" and saver.pending_best is None
    assert checkpoints.best() == 3 and checkpoints.newest() == 6
    state, meta = checkpoints.restore(3, noise(0))
    assert meta["from"] == 3
    np.testing.assert_array_equal(state["kernel"], noise(3)["kernel"])
    checkpoints.close()


@pytest.mark.parametrize("failing", ["sync", "upload"])
def test_saver_counts_a_failed_log_as_a_failed_save(tmp_path: Path, failing: str):
    """A checkpoint without the log before it would lose those lines, were the run killed then."""

    def fails(*_: object) -> None:
        raise {"sync": OSError(errno.ENOSPC, "No space left on device"), "upload": UserError("no bucket")}[failing]

    checkpoints = Checkpoints(tmp_path)
    writes = {"sync": lambda: None, "upload": lambda: None, failing: fails}
    log = SimpleNamespace(print=lambda _: None, sync=writes["sync"])
    saver = Saver(checkpoints, writes["upload"], log, max_failures=2)
    for step in (1, 2):
        saver.save(step, noise(step), {}, 0.5, last=False)
    with pytest.raises(UserError, match=r"No space left|no bucket"):
        saver.save(3, noise(3), {}, 0.5, last=False)
    assert checkpoints.steps() == []


def test_logger_sync_notices_a_vanished_directory(tmp_path: Path):
    with Logger(tmp_path / "run", total_steps=2) as log:
        log.log(1, {"loss": 0.5})
        log.sync()
        shutil.rmtree(tmp_path / "run")
        log.log(2, {"loss": 0.5})
        with pytest.raises(FileNotFoundError):
            log.sync()
        (tmp_path / "run").mkdir()
        (tmp_path / "run" / "metrics.jsonl").touch()  # another one in its place
        with pytest.raises(FileNotFoundError):
            log.sync()


@pytest.mark.loop
def test_train_reports_a_full_disk(tmp_path, monkeypatch):
    planted.plant(monkeypatch, train=ROWS, test=ROWS[:20])
    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(UserError, match=r"cannot write a checkpoint under .*No space left on device; older ones are"):
        train(planted.config(), tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.loop
def test_train_reports_a_relative_directory_that_cannot_be_written(tmp_path, monkeypatch):
    planted.plant(monkeypatch, train=ROWS, test=ROWS[:20])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").touch()
    with pytest.raises(UserError, match=r"run/checkpoints: cannot write: File exists"):
        train(planted.config(), Path("run"))


@pytest.mark.loop
def test_train_continues_while_few_saves_fail(tmp_path, monkeypatch, capsys):
    save, calls, room = ocp.CheckpointManager.save, [], [False]

    def full_at_first(self, step, *args, **options):
        calls.append(step)
        if len(calls) <= 2 and not room[0]:
            full()
        return save(self, step, *args, **options)

    planted.plant(monkeypatch, train=ROWS, test=ROWS[:20])
    monkeypatch.setattr(ocp.CheckpointManager, "save", full_at_first)
    config = planted.config()
    with config.unlocked():
        config.steps, config.eval_every, config.checkpoint_every, config.recovery.failed_saves = 6, 2, 2, 1
    with pytest.raises(UserError, match="No space left on device"):
        train(config, tmp_path / "one")
    assert calls == [2, 2]  # the second failure in a row ends it
    calls.clear()
    with config.unlocked():
        config.recovery.failed_saves = 2
    result = train(config, tmp_path / "two")
    assert calls == [2, 2, 2, 6]
    assert "this is failure 2 of 2 allowed" in capsys.readouterr().out
    room[0] = True
    whole = train(config, tmp_path / "three")  # where nothing fails
    assert (result["best_step"], result["test"]) == (whole["best_step"], whole["test"])
