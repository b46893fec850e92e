"""Saves that fail in the background: each is told by the next step, and counted, and the next one is written again."""

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

TIMES = 3
ROWS = [planted.row(i) for i in range(40)]


def fail_in_a_row(folder: Path) -> None:
    """Ends this process, and with it Orbax's writers, after saves that fail, and then one that does not."""
    said: list[str] = []
    checkpoints = Checkpoints(folder)
    saver = Saver(checkpoints, lambda: None, SimpleNamespace(print=said.append, sync=lambda: None), may_fail=TIMES)
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
    assert saver.failed == [] and checkpoints.steps() == [1, 9]

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


def test_saves_that_fail_in_the_background_are_told_and_counted(tmp_path: Path):
    process = CONTEXT.Process(target=fail_in_a_row, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    again = Checkpoints(tmp_path)
    assert again.steps() == [1, 9]
    again.close()


@pytest.fixture
def saver(tmp_path: Path) -> tuple[Saver, list[str]]:
    """One that has saved step 1, and what it says."""
    said: list[str] = []
    log = SimpleNamespace(print=said.append, sync=lambda: None)
    made = Saver(Checkpoints(tmp_path / "run"), lambda: None, log, may_fail=TIMES)
    made.save(1, noise(1), {}, 0.5, last=False)
    made.finish()
    return made, said


@pytest.mark.parametrize("number", [errno.EROFS, errno.EACCES, errno.EDQUOT])
def test_what_may_not_be_written_is_told_and_goes_on(
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
    made.save(3, noise(3), {}, 0.1, last=True)  # and before it the best one, which was owed
    assert made.checkpoints.steps() == [2, 3] and made.checkpoints.best() == 2


def test_a_folder_that_vanishes_is_told_and_made_anew(saver: tuple[Saver, list[str]], tmp_path: Path):
    made, said = saver
    shutil.rmtree(tmp_path / "run")
    made.save(2, noise(2), {}, 0.4, last=False)
    assert f"warning: {tmp_path}/run is gone, and 1 checkpoints with it; going on, this is failure 1 of 3" in said[0]
    made.save(3, noise(3), {}, 0.3, last=True)
    assert made.checkpoints.steps() == [2, 3] and made.checkpoints.best() == 2


def test_files_are_on_the_disk_before_what_relies_on_them(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """What was logged before its checkpoint, and a checkpoint before the next one, which lets older ones go."""
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
        saver = Saver(checkpoints, lambda: None, log, may_fail=0)
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


def test_donation_after_a_save_does_not_reach_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Neither of one that is written at once, nor of one that fails and is written later."""
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path)
    saver = Saver(checkpoints, lambda: None, SimpleNamespace(print=said.append, sync=lambda: None), may_fail=1)

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
        patch.setattr(checkpoints._manager, "save", full)
        save(2)
    saver.save(3, noise(3), {}, 0.0, last=True)
    assert said[-1] == "train  the checkpoint of step 2 is written now"
    saved(2)
    checkpoints.close()


def test_an_error_of_a_save_that_failed_is_not_the_next_ones(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """It fails once it has begun to write, and its writers find afterwards that what they wrote is gone."""
    checkpoints = Checkpoints(tmp_path)
    with monkeypatch.context() as patch:
        begin = checkpoints._manager._checkpointer.save
        patch.setattr(checkpoints._manager._checkpointer, "save", lambda *a, **o: (begin(*a, **o), full()))
        commit = checkpoints._manager._checkpointer._handler.finalize
        patch.setattr(
            checkpoints._manager._checkpointer._handler, "finalize", lambda folder: (time.sleep(0.5), commit(folder))
        )
        with pytest.raises(UserError, match="No space left on device"):
            checkpoints.save(1, noise(1), {}, 0.5)
    checkpoints.save(2, noise(2), {}, 0.5)
    checkpoints.wait()
    assert checkpoints.newest() == 2
    checkpoints.close()


def full(*_, **__):
    raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize(("background", "newer"), [(False, False), (True, False), (False, True)])
def test_the_best_checkpoint_is_written_later_where_it_could_not_be(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, background: bool, newer: bool
):
    """What a full disk does not take at once or, as a save ends, is kept, and is there before the next one."""
    said: list[str] = []
    checkpoints = Checkpoints(tmp_path)
    saver = Saver(checkpoints, lambda: None, SimpleNamespace(print=said.append, sync=lambda: None), may_fail=5)
    saver.save(1, noise(1), {}, 0.1, last=False)
    saver.finish()
    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._manager, "wait_until_finished" if background else "save", full)
        for step, score in ((2, 0.5), (3, 0.9), (4, 0.7), (5, None)):
            saver.save(step, noise(step), {"from": step}, score, last=False)
            saver.poll(wait=True)
        assert saver.owed[0] == 3 and len(saver.failed) == 4
        if newer:  # the disk would take it, but not what is owed: a run that went on from it would know of no 3
            patch.undo()
            honest, fails = checkpoints._manager.save, iter([True])
            patch.setattr(
                checkpoints._manager, "save", lambda *a, **o: full() if next(fails, False) else honest(*a, **o)
            )
            saver.save(5, noise(5), {}, 0.3, last=False)
            saver.poll(wait=True)
            assert checkpoints.steps() == [1] and saver.owed[0] == 3 and len(saver.failed) == 5
    saver.save(6, noise(6), {}, 0.2, last=True)
    assert said[-1] == "train  the checkpoint of step 3 is written now" and saver.owed is None
    assert checkpoints.best() == 3 and checkpoints.newest() == 6
    state, meta = checkpoints.restore(3, noise(0))
    assert meta["from"] == 3
    np.testing.assert_array_equal(state["kernel"], noise(3)["kernel"])
    checkpoints.close()


@pytest.mark.parametrize("failing", ["sync", "upload"])
def test_what_is_logged_counts_as_a_save_that_fails(tmp_path: Path, failing: str):
    """A checkpoint without the log before it would lose those lines, were the run killed then."""

    def fails(*_: object) -> None:
        raise {"sync": OSError(errno.ENOSPC, "No space left on device"), "upload": UserError("no bucket")}[failing]

    checkpoints = Checkpoints(tmp_path)
    writes = {"sync": lambda: None, "upload": lambda: None, failing: fails}
    log = SimpleNamespace(print=lambda _: None, sync=writes["sync"])
    saver = Saver(checkpoints, writes["upload"], log, may_fail=2)
    for step in (1, 2):
        saver.save(step, noise(step), {}, 0.5, last=False)
    with pytest.raises(UserError, match=r"No space left|no bucket"):
        saver.save(3, noise(3), {}, 0.5, last=False)
    assert checkpoints.steps() == []


def test_a_directory_that_vanishes_is_noticed(tmp_path: Path):
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
def test_no_space_left_for_a_checkpoint(tmp_path, monkeypatch):
    planted.plant(monkeypatch, train=ROWS, test=ROWS[:20])
    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(UserError, match=r"cannot write a checkpoint under .*No space left on device; older ones are"):
        train(planted.config(), tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.loop
def test_what_may_not_be_written_in_a_relative_directory_is_told_in_a_line(tmp_path, monkeypatch):
    planted.plant(monkeypatch, train=ROWS, test=ROWS[:20])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "checkpoints").touch()
    with pytest.raises(UserError, match=r"cannot write .*run/checkpoints: File exists"):
        train(planted.config(), Path("run"))


@pytest.mark.loop
def test_training_goes_on_while_few_checkpoints_fail(tmp_path, monkeypatch, capsys):
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
