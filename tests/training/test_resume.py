"""An interrupted and resumed run is bit-identical to an uninterrupted one."""

import itertools
import json
import re
import signal
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from mmfusion.checkpoints.manager import Checkpoints
from mmfusion.errors import Preempted, UserError
from mmfusion.tracking import provenance
from mmfusion.training import progress, run
from mmfusion.training.loop import train
from tests.errors import rejects
from tests.processes import Started
from tests.reliability.runs import newest_state

pytestmark = pytest.mark.usefixtures("traced_once")

STEPS = 240
# The tiny config has dropout. With 230 rows in batches of 16, every stop is within an epoch.
CHANGES: dict[str, Any] = {
    "optim.schedule.name": "plateau",
    "optim.schedule.warmup_steps": 20,
    "optim.schedule.patience": 1,
    "steps": STEPS,
    "eval_every": 40,
    "checkpoint_every": 25,
    "optim.accumulate": 2,
    "data.modalities.image.augment.flip": 0.5,
    "data.modalities.image.augment.crop": 2,
}


def lines(workdir: Path) -> list[dict[str, Any]]:
    """Returns the logged lines of a run, without values that depend on time."""
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    parsed = [json.loads(line) for line in text.split("\n")[:-1]]
    return [{k: v for k, v in line.items() if k != "examples_per_second"} for line in parsed]


def last_step(workdir: Path) -> int:
    return max((line["step"] for line in lines(workdir)), default=0)


def assert_same_run(interrupted: Path, uninterrupted: Path, steps: int) -> None:
    assert lines(interrupted) == lines(uninterrupted)
    assert [line["step"] for line in lines(interrupted) if line["split"] == "train"] == [*range(1, steps + 1)]
    jax.tree.map(np.testing.assert_array_equal, newest_state(interrupted), newest_state(uninterrupted))
    results = [json.loads((workdir / "result.json").read_text()) for workdir in (interrupted, uninterrupted)]
    for name in ("valid", "test", "best_step", "steps", "parameters", "data"):
        assert results[0][name] == results[1][name], name


def stop_at(process: Started, workdir: Path, step: int, sent: signal.Signals) -> tuple[int, str]:
    """Sends a signal after the run has logged `step`; returns its exit status and output."""
    deadline = time.monotonic() + 300
    while last_step(workdir) < step and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.002)
    assert process.poll() is None, process.communicate(300)[0][-3000:]
    process.send_signal(sent)
    output, _ = process.communicate(timeout=300)
    return process.poll(), output


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Returns the size and modification time of every file of a run."""
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.process
def test_resume_after_a_kill_and_sigterm_is_bit_identical(tiny_flags: Callable[..., list[str]], tmp_path: Path):
    def start(workdir: Path) -> Started:
        return Started("experiments.train", [*tiny_flags(CHANGES), f"--workdir={workdir}"], merged=True)

    uninterrupted, interrupted = tmp_path / "uninterrupted", tmp_path / "interrupted"
    process = start(uninterrupted)
    output, _ = process.communicate(timeout=300)
    assert process.poll() == 0, output[-3000:]
    learning_rates = {line["step"]: line["learning_rate"] for line in lines(uninterrupted) if line["split"] == "train"}
    assert learning_rates[1] < learning_rates[10] < learning_rates[30]  # warmup
    assert learning_rates[STEPS] < learning_rates[30]  # reduced on a plateau

    random = np.random.default_rng(0)
    status, _ = stop_at(start(interrupted), interrupted, int(random.integers(30, 130)), signal.SIGKILL)
    assert status == -signal.SIGKILL
    assert 30 <= last_step(interrupted) < STEPS

    status, output = stop_at(start(interrupted), interrupted, int(random.integers(150, 180)), signal.SIGTERM)
    assert status == 75, output[-3000:]
    at = int(re.search(r"saved at step (\d+) of", output)[1])
    checkpoints = Checkpoints(interrupted / "checkpoints")
    assert checkpoints.newest() == at == last_step(interrupted) < STEPS
    checkpoints.close()

    process = start(interrupted)
    output, _ = process.communicate(timeout=300)
    assert process.poll() == 0, output[-3000:]
    assert f"continued from step {at}" in output
    assert_same_run(interrupted, uninterrupted, STEPS)

    before = files(interrupted)
    process = start(interrupted)
    output, _ = process.communicate(timeout=300)
    assert process.poll() == 0, output[-3000:]
    assert files(interrupted) == before


RANDOM = "fusion=concat,objectives=mvae+modality_dropout"  # random objectives, in addition to dropout
SHORT = {"steps": 8, "eval_every": 4, "checkpoint_every": 3}


@pytest.fixture(scope="module")
def short(tiny_config: Callable[..., Any]) -> Any:
    return tiny_config(RANDOM, SHORT)


@pytest.fixture(scope="module")
def uninterrupted(short: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("short") / "uninterrupted"
    train(short, workdir)
    return workdir


@pytest.mark.loop
@pytest.mark.parametrize(
    "step", [pytest.param(4, marks=pytest.mark.thorough), 5, pytest.param(8, marks=pytest.mark.thorough)],
    ids=["at validation", "between", "last"],
)  # fmt: skip
def test_resume_after_sigterm_at_a_step_is_bit_identical(
    short: Any, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
):
    hold = progress.Meter.hold

    def hold_and_stop(self: progress.Meter, first: int, *rest: Any) -> None:
        hold(self, first, *rest)
        if first + 1 == step:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(Preempted, match=f"saved at step {step} of 8"):
        patch.setattr(progress.Meter, "hold", hold_and_stop)
        train(short, tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.newest() == step
    checkpoints.close()
    train(short, tmp_path)
    assert_same_run(tmp_path, uninterrupted, 8)


@pytest.mark.loop
def test_train_leaves_a_finished_run_unchanged(short: Any, uninterrupted: Path, capsys: pytest.CaptureFixture[str]):
    before = {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*") if path.is_file()}
    found = train(short, uninterrupted)
    assert capsys.readouterr().out == (f"train  finished before, at step 8; see {uninterrupted}/result.json\n")
    assert found == json.loads((uninterrupted / "result.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in uninterrupted.rglob("*") if path.is_file()} == before


def stop_in(patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """Raises SIGTERM on the first call of a function."""
    original, calls = getattr(owner, name), itertools.count()

    def raise_sigterm_once(*args: Any, **options: Any) -> Any:
        if next(calls) == 0:
            signal.raise_signal(signal.SIGTERM)
        return original(*args, **options)

    patch.setattr(owner, name, raise_sigterm_once)


@pytest.mark.thorough(but=("Checkpoints-save-3",))
@pytest.mark.loop
@pytest.mark.parametrize(
    ("owner", "name", "at"),
    [
        (run, "score", 4),  # validation
        (Checkpoints, "save", 3),
    ],
)
def test_resume_after_sigterm_during_a_phase_is_bit_identical(
    short: Any, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int
):
    """The current phase finishes, and the run is saved at the current step."""
    with monkeypatch.context() as patch:
        stop_in(patch, owner, name)
        with pytest.raises(Preempted, match=r"saved at step \d of 8"):
            train(short, tmp_path)
    assert at <= last_step(tmp_path) <= at + 1  # the signal is handled between two steps
    train(short, tmp_path)
    assert_same_run(tmp_path, uninterrupted, 8)


@pytest.mark.loop
def test_resume_after_sigterm_with_failing_saves_is_bit_identical(
    short: Any, uninterrupted: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """The run resumes from the previous checkpoint, if there is one."""
    hold = progress.Meter.hold

    def raise_disk_full(*_: Any, **__: Any) -> None:
        raise UserError("no space left")

    def stop_at(step: int, patch: pytest.MonkeyPatch) -> None:
        def hold_and_stop(self: progress.Meter, first: int, *rest: Any) -> None:
            hold(self, first, *rest)
            if first + 1 == step:
                patch.setattr(Checkpoints, "save", raise_disk_full)
                signal.raise_signal(signal.SIGTERM)

        patch.setattr(progress.Meter, "hold", hold_and_stop)

    with monkeypatch.context() as patch, pytest.raises(UserError, match="no space left"):
        stop_at(2, patch)
        train(short, tmp_path)
    with monkeypatch.context() as patch, pytest.raises(Preempted, match="saved at step 6 of 8"):
        stop_at(7, patch)
        train(short, tmp_path)
    assert "warning: no space left" in capsys.readouterr().out
    train(short, tmp_path)
    assert_same_run(tmp_path, uninterrupted, 8)


@pytest.mark.loop
def test_resume_warns_about_changed_code(
    short: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for commit, outcome in (("a", pytest.raises(Preempted)), ("a", pytest.raises(Preempted)), ("b", nullcontext())):
        assert "warning" not in capsys.readouterr().out
        with monkeypatch.context() as patch, outcome:
            patch.setattr(provenance, "commit", lambda _, commit=commit: {"id": commit * 40, "dirty": False})
            if commit == "a":
                stop_in(patch, Checkpoints, "save")
            train(short, tmp_path)
    output = "warning: the code was at commit aaaaaaaaaaaa and is at bbbbbbbbbbbb since the last checkpoint"
    assert output in capsys.readouterr().out


@pytest.mark.loop
def test_train_rejects_a_directory_of_another_config(tiny_config: Callable[..., Any], uninterrupted: Path):
    before = files(uninterrupted)
    other = tiny_config(f"{RANDOM},seed=1", SHORT)
    with rejects(uninterrupted, None, says="its config.seed is 0, here it is 1"):
        train(other, uninterrupted)
    assert files(uninterrupted) == before
