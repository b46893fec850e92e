"""Saves that fail in the background: each is told by the next step, and counted, and the next one is written again."""

import errno
import os
from pathlib import Path
from types import SimpleNamespace

import pytest

from mmfusion.checkpoint import Checkpoints, ocp
from mmfusion.errors import UserError
from mmfusion.logger import Logger
from mmfusion.saving import Saver
from mmfusion.train import train
from tests import planted
from tests.test_checkpoint import CONTEXT, files_of_at_most, noise

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
                saver.hear()
            assert f"this is failure {step - 1} of {TIMES} allowed" in said[-1] and "\n" not in said[-1]
            assert sorted(path.name for path in folder.iterdir()) == ["1"]  # nothing half-written on a full disk
    saver.save(9, noise(9), {}, 0.5, last=True)
    assert saver.failed == [] and checkpoints.steps() == [1, 9]

    with files_of_at_most(20_000):
        with pytest.raises(UserError, match="cannot write a checkpoint"):
            saver.save(10, noise(10), {}, 0.5, last=True)
        saver.failed.clear()
        for step in range(11, 11 + TIMES):
            saver.save(step, noise(step), {}, 0.5, last=False)
            saver.hear(wait=True)
        saver.save(20, noise(20), {}, 0.5, last=False)
        with pytest.raises(UserError, match="cannot write a checkpoint"):
            saver.hear(wait=True)
    os._exit(0)


def test_saves_that_fail_in_the_background_are_told_and_counted(tmp_path: Path):
    process = CONTEXT.Process(target=fail_in_a_row, args=(tmp_path,))
    process.start()
    process.join(120)
    assert process.exitcode == 0
    again = Checkpoints(tmp_path)
    assert again.steps() == [1, 9]
    again.close()


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


def test_no_space_left_for_a_checkpoint(tmp_path, monkeypatch):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, "No space left on device")

    planted.plant(monkeypatch, train=ROWS, test=ROWS[:20])
    monkeypatch.setattr(ocp.CheckpointManager, "save", full)
    with pytest.raises(UserError, match=r"cannot write a checkpoint under .*No space left on device; older ones are"):
        train(planted.config(), tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()


def test_training_goes_on_while_few_checkpoints_fail(tmp_path, monkeypatch, capsys):
    save, calls = ocp.CheckpointManager.save, []

    def full_at_first(self, *args, **options):
        calls.append(None)
        if len(calls) <= 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        return save(self, *args, **options)

    planted.plant(monkeypatch, train=ROWS, test=ROWS[:20])
    monkeypatch.setattr(ocp.CheckpointManager, "save", full_at_first)
    config = planted.config()
    with config.unlocked():
        config.steps, config.eval_every, config.checkpoint_every, config.recovery.failed_saves = 6, 2, 2, 1
    with pytest.raises(UserError, match="No space left on device"):
        train(config, tmp_path / "one")
    assert len(calls) == 2  # the second failure in a row ends it
    calls.clear()
    with config.unlocked():
        config.recovery.failed_saves = 2
    result = train(config, tmp_path / "two")
    assert len(calls) == 3 and result["best_step"] == 6
    assert "this is failure 2 of 2 allowed" in capsys.readouterr().out
