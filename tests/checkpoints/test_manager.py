"""Checkpoints: retention, the best step, errors of corrupt and failed checkpoints, and remaining files."""

import errno
import json
import os
import re
import resource
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mmfusion.checkpoints.manager import Checkpoints
from mmfusion.distributed import mesh
from mmfusion.errors import Unreachable
from tests.errors import rejects
from tests.processes import CONTEXT


def state(value: float, rows: int = 3) -> dict[str, Any]:
    return {
        "params": {"dense": {"kernel": np.full((rows, 2), value, np.float32), "bias": np.zeros(2, np.float32)}},
        "step": np.int32(value),
    }


def save_checkpoints(directory: Path, scores: dict[int, float | None]) -> Checkpoints:
    checkpoints = Checkpoints(directory)
    for step, score in scores.items():
        checkpoints.save(step, state(step), {"data": {"names": ["a", "b"]}}, score)
        checkpoints.wait()
    return checkpoints


def test_checkpoints_resolve_a_relative_directory(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(tmp_path)
    assert save_checkpoints(Path("runs/a"), {1: 0.5}).newest() == 1
    assert Checkpoints(tmp_path / "runs" / "a").newest() == 1


@pytest.mark.parametrize(
    ("scores", "best"),
    [
        ({1: 0.5, 2: 0.9, 3: 0.6, 4: None, 5: 0.7}, 2),
        ({1: 0.5, 2: float("nan"), 3: 0.4, 4: float("inf"), 5: float("nan")}, 1),
        ({1: -3.0, 2: -2.0, 3: -4.0, 4: None}, 2),  # a negated loss
        ({1: 0.5, 2: 0.9, 3: 0.8, 4: 0.9}, 2),  # the first of equal scores, even if others were deleted
        ({1: None, 2: float("nan"), 3: None}, 3),
    ],
)
def test_checkpoints_keep_the_best_and_the_newest_two(tmp_path: Path, scores: dict[int, float | None], best: int):
    last = max(scores)
    first = save_checkpoints(tmp_path, scores)
    assert first.best() == best
    assert {best, last - 1, last} <= set(first.steps())
    first.close()

    reopened = save_checkpoints(
        tmp_path, {last + 1: float("nan"), last + 2: None, last + 3: 0.0 if best == last else None}
    )
    expected = last + 3 if best == last else best
    assert (reopened.newest(), reopened.best()) == (last + 3, expected)
    assert len(reopened.steps()) <= 4
    restored, meta = reopened.restore(expected, state(0))
    jax.tree.map(np.testing.assert_array_equal, restored, state(expected))
    assert meta["data"] == {"names": ["a", "b"]}
    reopened.close()


def test_checkpoints_delete_old_steps(tmp_path: Path):
    checkpoints = save_checkpoints(tmp_path, {step: step / 10 for step in range(1, 6)})
    assert checkpoints.steps() == [4, 5]
    checkpoints.close()


def test_checkpoints_save_skips_a_saved_step(tmp_path: Path):
    checkpoints = save_checkpoints(tmp_path, {1: 0.5})
    checkpoints.save(1, state(7), {}, 0.9)
    checkpoints.wait()
    restored, _ = checkpoints.restore(1, state(0))
    assert restored["step"] == 1
    checkpoints.close()


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        (lambda p: p["dense"].update(kernel=np.zeros((5, 2), np.float32)), "dense/kernel is [5, 2] float32 in the"),
        (lambda p: p["dense"].update(bias=np.zeros(2, np.float16)), "dense/bias is [2] float16 in the model"),
        (lambda p: p["dense"].pop("bias"), "dense/bias [2] is in the checkpoint, not in the model"),
        (lambda p: p.update(head=np.zeros(4)), "params/head [4] is in the model, not in the checkpoint"),
    ],
    ids=["shape", "dtype", "missing", "new"],
)
def test_checkpoints_restore_reports_architecture_differences(tmp_path: Path, change: Any, expected: str):
    checkpoints = save_checkpoints(tmp_path, {1: 0.5})
    other = state(0)
    change(other["params"])
    with rejects(tmp_path / "1", None, says=expected):
        checkpoints.restore(1, other)
    checkpoints.close()


@contextmanager
def limit_file_size(size: int) -> Iterator[None]:
    """Fails writes beyond `size` bytes per file, as on a full disk, in any library."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def random_state(step: int) -> dict[str, Any]:
    """Returns an incompressible state."""
    return {"kernel": np.random.default_rng(step).normal(size=(200, 200)).astype(np.float32)}


def fail_to_write(folder: Path, size: int) -> None:
    """Saves a second checkpoint under a file size limit, then ends this process and Orbax's writers."""
    checkpoints = Checkpoints(folder)
    checkpoints.save(1, random_state(1), {}, 0.5)
    checkpoints.wait()
    with rejects(folder, None, says="cannot write a checkpoint"), limit_file_size(size):
        checkpoints.save(2, random_state(2), {}, 0.9)
        checkpoints.wait()
    os._exit(0)


@pytest.mark.process
@pytest.mark.parametrize("size", [20_000, 0])
def test_checkpoints_keep_older_steps_after_a_failed_write(tmp_path: Path, size: int):
    process = CONTEXT.Process(target=fail_to_write, args=(tmp_path, size))
    process.start()
    process.join(120)
    assert process.exitcode == 0

    reopened = Checkpoints(tmp_path)
    assert (reopened.steps(), reopened.best()) == ([1], 1)
    reopened.save(2, random_state(2), {}, 0.9)  # the failed step can be saved once the disk has space
    reopened.wait()
    assert reopened.steps() == [1, 2]
    restored, _ = reopened.restore(1, random_state(0))
    np.testing.assert_array_equal(restored["kernel"], random_state(1)["kernel"])
    reopened.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2"]  # no partial checkpoint remains


def test_checkpoints_report_a_full_disk_at_the_next_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    checkpoints = save_checkpoints(tmp_path, {1: 0.5})

    def raise_disk_full(*_: Any, **__: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch, rejects(tmp_path, None, says="No space left on device"):
        patch.setattr("orbax.checkpoint.JsonCheckpointHandler.async_save", raise_disk_full)
        checkpoints.save(2, state(2), {}, 0.9)
        checkpoints.save(3, state(3), {}, 0.9)
    restored, _ = Checkpoints(tmp_path).restore(1, state(0))
    assert restored["step"] == 1


def test_checkpoints_close_prints_a_failed_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    checkpoints = save_checkpoints(tmp_path, {1: 0.5})
    checkpoints.wait()
    checkpoints.save(2, random_state(2), {}, 0.6)
    wait, errors = checkpoints._manager.wait_until_finished, [OSError(errno.ENOSPC, "No space left on device")]

    def raise_disk_full_once() -> None:
        wait()
        if errors:
            raise errors.pop()

    monkeypatch.setattr(checkpoints._manager, "wait_until_finished", raise_disk_full_once)
    checkpoints.close()
    assert f"warning: {tmp_path}: cannot write a checkpoint: No space left on device" in capsys.readouterr().err


def test_checkpoints_delete_incomplete_steps(tmp_path: Path):
    save_checkpoints(tmp_path, {1: 0.5}).close()
    (tmp_path / "2.orbax-checkpoint-tmp" / "state.orbax-checkpoint-tmp").mkdir(parents=True)
    reopened = save_checkpoints(tmp_path, {3: 0.5})
    assert reopened.steps() == [1, 3]
    reopened.close()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]


def test_checkpoints_restored_state_can_be_donated(tmp_path: Path):
    partitioner = mesh.make_partitioner("pmap")
    checkpoints = save_checkpoints(tmp_path, {1: 0.5})
    restored, _ = checkpoints.restore(1, state(0))
    on_device = jax.jit(lambda tree: tree)(partitioner.replicate(restored))
    run = partitioner.compile_train(
        lambda tree, batch, rate: (jax.tree.map(lambda x: x + x.dtype.type(1), tree), {"rate": rate})
    )
    moved, _ = run(
        on_device, (partitioner.put_batch({"id": np.arange(4)}),), partitioner.replicate(np.ones(1, np.float32))
    )
    assert all(x.is_deleted() for x in jax.tree.leaves(on_device))
    jax.tree.map(lambda new, old: np.testing.assert_array_equal(new, old + 1), jax.device_get(moved), restored)
    jax.tree.map(np.testing.assert_array_equal, restored, state(1))
    checkpoints.close()


def restore_first_valid(directory: Path, *, best: bool = False) -> tuple[int, Any] | None:
    checkpoints = Checkpoints(directory)
    try:
        found = checkpoints.first_valid(lambda step: checkpoints.restore(step, state(0)), best=best)
    finally:
        checkpoints.close()
    return found and (found[1]["step"], found[0])


def flip_bit(path: Path, random: np.random.Generator) -> None:
    """Flips one bit of a file."""
    data = bytearray(path.read_bytes())
    data[random.integers(len(data))] ^= 1 << int(random.integers(8))
    path.write_bytes(data)


def test_checkpoints_restore_a_valid_state_after_a_bit_flip(tmp_path: Path):
    """A bit flip in any file of the newer of two checkpoints restores one of the two exactly."""
    random, original, fallbacks = np.random.default_rng(0), tmp_path / "original" / "checkpoints", 0
    save_checkpoints(original, {1: 0.5, 2: 0.7}).close()
    files = [
        path.relative_to(original)
        for path in sorted((original / "2").rglob("*"))
        if path.is_file() and path.stat().st_size
    ]
    assert any(path.suffix == "" for path in files)
    for index, name in enumerate(files):
        directory = tmp_path / str(index) / "checkpoints"
        shutil.copytree(original, directory)
        flip_bit(directory / name, random)
        step, found = restore_first_valid(directory, best=bool(index % 2))
        assert step in (1, 2), name
        jax.tree.map(np.testing.assert_array_equal, found, state(step))
        quarantine = directory.parent / "damaged-checkpoints"
        assert quarantine.exists() == (step == 1), name
        fallbacks += step == 1
    assert fallbacks >= 2  # at least the arrays and the metadata


def test_checkpoints_detect_the_state_of_another_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture):
    """Every file of the replaced state is well-formed."""
    directory, other = tmp_path / "checkpoints", tmp_path / "other"
    save_checkpoints(directory, {1: 0.5, 2: 0.7}).close()
    foreign = Checkpoints(other)
    foreign.save(2, state(9), {}, 0.7)
    foreign.close()
    shutil.rmtree(directory / "2" / "state")
    shutil.copytree(other / "2" / "state", directory / "2" / "state")
    assert restore_first_valid(directory)[0] == 1
    stderr = capsys.readouterr().err
    assert re.search(
        r"warning: checkpoint .*/2 is damaged: params/dense/kernel and 1 more is not what was saved", stderr
    )
    assert [path.name for path in (tmp_path / "damaged-checkpoints").iterdir()] == ["2-0"]
    reopened = save_checkpoints(directory, {2: 0.9})  # the step can be saved again
    assert reopened.steps() == [1, 2] and reopened.best() == 2
    reopened.close()


def test_checkpoints_raise_when_all_are_corrupt(tmp_path: Path):
    directory = tmp_path / "checkpoints"
    save_checkpoints(directory, {1: 0.5, 2: 0.7}).close()
    for step in ("1", "2"):
        for path in (directory / step / "meta").rglob("*"):
            if path.is_file():
                path.write_bytes(b"")
    for _ in range(2):  # a second attempt fails too
        with rejects(directory, None, says=tmp_path / "damaged-checkpoints"):
            restore_first_valid(directory)
        assert len(list((tmp_path / "damaged-checkpoints").iterdir())) == 2


def test_checkpoints_restart_after_deleting_all_despite_quarantine(tmp_path: Path):
    (tmp_path / "damaged-checkpoints" / "1-0").mkdir(parents=True)
    checkpoints = save_checkpoints(tmp_path / "checkpoints", {2: 0.5})
    checkpoints.delete_from(2)
    assert checkpoints.restore_valid(state(0.0)) is None
    checkpoints.close()


def test_checkpoints_readonly_does_not_quarantine(tmp_path: Path, capsys: pytest.CaptureFixture):
    directory = tmp_path / "checkpoints"
    save_checkpoints(directory, {1: 0.5, 2: 0.7}).close()
    (directory / "2" / "meta" / "metadata").write_text("{}")
    before = sorted(tmp_path.rglob("*"))
    reader = Checkpoints(directory, readonly=True)
    assert reader.steps() == [1]
    found, _ = reader.first_valid(lambda step: reader.restore(step, state(0)), best=True)
    jax.tree.map(np.testing.assert_array_equal, found, state(1))
    reader.close()
    assert sorted(tmp_path.rglob("*")) == before
    assert "is damaged" in capsys.readouterr().err


def test_checkpoints_detect_corruption_after_opening(tmp_path: Path):
    directory = tmp_path / "checkpoints"
    checkpoints = save_checkpoints(directory, {1: 0.5, 2: 0.7})
    path = directory / "2" / "meta" / "metadata"
    path.write_text(path.read_text().replace("0.7", "0.9"))
    _, meta = checkpoints.first_valid(lambda step: checkpoints.restore(step, state(0)), best=True)
    assert meta["step"] == 1
    checkpoints.close()


@pytest.mark.parametrize(
    ("error", "raised"),
    [
        (MemoryError("no memory"), MemoryError),
        (OSError(24, "Too many open files"), Unreachable),
        (ValueError("UNAVAILABLE"), Unreachable),
    ],
)
def test_checkpoints_do_not_treat_machine_errors_as_corruption(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, raised: type[Exception]
):
    directory = tmp_path / "checkpoints"
    checkpoints = save_checkpoints(directory, {1: 0.5})

    def fail(*_: Any, **__: Any) -> None:
        raise error

    with monkeypatch.context() as patch:
        patch.setattr(checkpoints._manager, "restore", fail)
        with pytest.raises(raised, match=str(error.args[-1])):
            checkpoints.first_valid(lambda step: checkpoints.restore(step, state(0)))
    assert checkpoints.steps() == [1]
    checkpoints.close()
    monkeypatch.setattr(json, "loads", fail)
    with pytest.raises(raised, match=str(error.args[-1])):
        Checkpoints(directory)
    assert (directory / "1").exists()


def test_checkpoints_do_not_treat_partial_deletion_as_corruption(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    deleted: list[str] = []
    delete_files = Checkpoints._delete_files

    def record_deleted(self: Checkpoints) -> None:
        deleted.extend(path.name for path in tmp_path.glob("deleted/*"))
        delete_files(self)

    monkeypatch.setattr(Checkpoints, "_delete_files", record_deleted)
    save_checkpoints(tmp_path, {1: 0.1, 2: 0.2, 3: 0.3}).close()
    assert deleted == ["1"] and sorted(path.name for path in tmp_path.iterdir()) == ["2", "3"]

    (tmp_path / "deleted" / "1" / "state").mkdir(parents=True)  # as after a kill during deletion
    reopened = Checkpoints(tmp_path)
    assert reopened.steps() == [2, 3] and not (tmp_path / "deleted").exists()
    reopened.delete_from(2)
    assert reopened.steps() == [] and list(tmp_path.iterdir()) == []
    assert reopened.first_valid(lambda step: step) is None
    reopened.close()
    assert not (tmp_path.parent / "damaged-checkpoints").exists()
