"""A run that is stopped, however often and wherever, ends as the run that was not: bit for bit."""

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
from mmfusion.training.setup import TrainSetup
from tests.processes import Started
from tests.reliability.runs import newest_state

pytestmark = pytest.mark.usefixtures("traced_once")

STEPS = 240
# Dropout is on in the tiny config. 230 rows in batches of 16: every stop is in the middle of an epoch.
CHANGES: dict[str, Any] = {
    "model.fusion.name": "concat",
    "model.fusion.heads": None,
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
    """Returns what a run logged, without what depends on the clock."""
    path = workdir / "metrics.jsonl"
    text = path.read_text() if path.exists() else ""
    whole = [json.loads(line) for line in text.split("\n")[:-1]]
    return [{k: v for k, v in line.items() if k != "examples_per_second"} for line in whole]


def last_step(workdir: Path) -> int:
    return max((line["step"] for line in lines(workdir)), default=0)


def assert_same_run(broken: Path, unbroken: Path, steps: int) -> None:
    assert lines(broken) == lines(unbroken)
    assert [line["step"] for line in lines(broken) if line["split"] == "train"] == [*range(1, steps + 1)]
    jax.tree.map(np.testing.assert_array_equal, newest_state(broken), newest_state(unbroken))
    results = [json.loads((workdir / "result.json").read_text()) for workdir in (broken, unbroken)]
    for name in ("valid", "test", "best_step", "steps", "parameters", "data"):
        assert results[0][name] == results[1][name], name


def stop_at(process: Started, workdir: Path, step: int, how: signal.Signals) -> tuple[int, str]:
    """Sends a signal once the run has logged `step`; returns its exit status and what it printed."""
    patience = time.monotonic() + 300
    while last_step(workdir) < step and process.poll() is None and time.monotonic() < patience:
        time.sleep(0.002)
    assert process.poll() is None, process.communicate(300)[0][-3000:]
    process.send_signal(how)
    said, _ = process.communicate(timeout=300)
    return process.poll(), said


def files(folder: Path) -> dict[str, tuple[int, int]]:
    """Returns the size and the time of change of every file of a run."""
    return {str(p): (p.stat().st_size, p.stat().st_mtime_ns) for p in sorted(folder.rglob("*")) if p.is_file()}


@pytest.mark.process
def test_killed_and_stopped_by_signals(tiny_flags: Callable[..., list[str]], tmp_path: Path):
    def start(workdir: Path) -> Started:
        return Started("experiments.train", [*tiny_flags(CHANGES), f"--workdir={workdir}"], merged=True)

    unbroken, broken = tmp_path / "unbroken", tmp_path / "broken"
    whole = start(unbroken)
    said, _ = whole.communicate(timeout=300)
    assert whole.poll() == 0, said[-3000:]
    rates = {line["step"]: line["learning_rate"] for line in lines(unbroken) if line["split"] == "train"}
    assert rates[1] < rates[10] < rates[30]  # it warms up
    assert rates[STEPS] < rates[30]  # it has met a plateau

    draw = np.random.default_rng(0)
    for low, high in ((30, 70), (90, 130)):
        status, _ = stop_at(start(broken), broken, int(draw.integers(low, high)), signal.SIGKILL)
        assert status == -signal.SIGKILL
        assert low <= last_step(broken) < STEPS

    status, said = stop_at(start(broken), broken, int(draw.integers(150, 180)), signal.SIGTERM)
    assert status == 75, said[-3000:]
    at = int(re.search(r"saved at step (\d+) of", said)[1])
    checkpoints = Checkpoints(broken / "checkpoints")
    assert checkpoints.newest() == at == last_step(broken) < STEPS
    checkpoints.close()

    rest = start(broken)
    said, _ = rest.communicate(timeout=300)
    assert rest.poll() == 0, said[-3000:]
    assert f"continued from step {at}" in said
    assert_same_run(broken, unbroken, STEPS)

    before = files(broken)
    again = start(broken)
    said, _ = again.communicate(timeout=300)
    assert again.poll() == 0, said[-3000:]
    assert files(broken) == before


DRAWING = "fusion=concat,objectives=mvae+modality_dropout"  # beside dropout
SHORT = {"steps": 8, "eval_every": 4, "checkpoint_every": 3}


@pytest.fixture(scope="module")
def short(tiny_config: Callable[..., Any]) -> Any:
    return tiny_config(DRAWING, SHORT)


@pytest.fixture(scope="module")
def unbroken(short: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    workdir = tmp_path_factory.mktemp("short") / "unbroken"
    train(short, workdir)
    return workdir


@pytest.mark.loop
@pytest.mark.parametrize("step", [4, 5, 8], ids=["when validation is due", "between", "last"])
def test_stopped_by_sigterm_at_a_step(
    short: Any, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
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
    assert_same_run(tmp_path, unbroken, 8)


@pytest.mark.loop
def test_a_finished_run_says_so_and_stays_as_it_is(short: Any, unbroken: Path, capsys: pytest.CaptureFixture[str]):
    before = {path: path.stat().st_mtime_ns for path in unbroken.rglob("*") if path.is_file()}
    found = train(short, unbroken)
    assert capsys.readouterr().out == (f"train  finished before, at step 8; see {unbroken}/result.json\n")
    assert found == json.loads((unbroken / "result.json").read_text())
    assert {path: path.stat().st_mtime_ns for path in unbroken.rglob("*") if path.is_file()} == before


def stop_in(patch: pytest.MonkeyPatch, owner: Any, name: str) -> None:
    """Lets SIGTERM come when a function is called for the first time."""
    honest, times = getattr(owner, name), itertools.count()

    def stopped(*args: Any, **options: Any) -> Any:
        if next(times) == 0:
            signal.raise_signal(signal.SIGTERM)
        return honest(*args, **options)

    patch.setattr(owner, name, stopped)


@pytest.mark.loop
@pytest.mark.parametrize(
    ("owner", "name", "at"),
    [
        (TrainSetup, "compile_train_step", 1),  # what is compiled
        (run, "score", 4),  # validation
        (Checkpoints, "save", 3),
    ],
)
def test_stopped_by_sigterm_in_the_middle_of_things(
    short: Any, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, owner: Any, name: str, at: int
):
    """What is under way ends, and the run is saved at the step that it has come to."""
    with monkeypatch.context() as patch:
        stop_in(patch, owner, name)
        with pytest.raises(Preempted, match=r"saved at step \d of 8"):
            train(short, tmp_path)
    assert at <= last_step(tmp_path) <= at + 1  # the signal is heard between two steps
    train(short, tmp_path)
    assert_same_run(tmp_path, unbroken, 8)


@pytest.mark.loop
def test_stopped_by_sigterm_where_nothing_more_can_be_written(
    short: Any, unbroken: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    """It goes on from the checkpoint before, if there is one."""
    hold = progress.Meter.hold

    def full(*_: Any, **__: Any) -> None:
        raise UserError("no space left")

    def stop_at(step: int, patch: pytest.MonkeyPatch) -> None:
        def hold_and_stop(self: progress.Meter, first: int, *rest: Any) -> None:
            hold(self, first, *rest)
            if first + 1 == step:
                patch.setattr(Checkpoints, "save", full)
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
    assert_same_run(tmp_path, unbroken, 8)


@pytest.mark.loop
def test_it_warns_where_it_goes_on_with_other_code(
    short: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    for commit, ends in (("a", pytest.raises(Preempted)), ("a", pytest.raises(Preempted)), ("b", nullcontext())):
        assert "warning" not in capsys.readouterr().out
        with monkeypatch.context() as patch, ends:
            patch.setattr(provenance, "commit", lambda _, commit=commit: {"id": commit * 40, "dirty": False})
            if commit == "a":
                stop_in(patch, Checkpoints, "save")
            train(short, tmp_path)
    said = "warning: the code was at commit aaaaaaaaaaaa and is at bbbbbbbbbbbb since the last checkpoint"
    assert said in capsys.readouterr().out


@pytest.mark.loop
def test_a_directory_of_another_config_is_refused(tiny_config: Callable[..., Any], unbroken: Path):
    before = files(unbroken)
    other = tiny_config(f"{DRAWING},seed=1", SHORT)
    with pytest.raises(UserError, match=r"belongs to another run: its config\.seed is 0, here it is 1"):
        train(other, unbroken)
    assert files(unbroken) == before
