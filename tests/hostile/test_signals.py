"""SIGTERM and Ctrl-C while data is prepared, while a program is compiled, and in training."""

import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmfusion.analysis.ablation import runner
from mmfusion.checkpoints.manager import Checkpoints
from mmfusion.distributed import signals
from mmfusion.distributed.preemption import stop_on_signal
from mmfusion.errors import Preempted, StoppedEarly
from mmfusion.training import progress
from mmfusion.training.loop import train
from mmfusion.training.setup import TrainSetup
from tests.processes import Started

BOTH = pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "SIGINT"])


@BOTH
def test_signal_before_the_first_step_ends_the_run_at_once(number):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(StoppedEarly, match="before a step was taken"), stop_on_signal():
        try:
            signal.raise_signal(number)
        except Exception:  # as libraries do
            pytest.fail("no library may take the signal for an error of its own")
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


@BOTH
def test_signal_after_a_step_lets_the_run_save_and_a_second_ctrl_c_does_not(number):
    with stop_on_signal() as stop:
        stop.after_step()
        signal.raise_signal(number)
        assert stop.is_set()
        signal.raise_signal(signal.SIGTERM)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)


def test_signal_that_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as of a job that a shell started with &
    try:
        with stop_on_signal() as stop:
            signal.raise_signal(signal.SIGINT)
            assert not stop.is_set()
    finally:
        signal.signal(signal.SIGINT, before)


@BOTH
def test_signal_ends_an_ablation_once_and_a_second_ctrl_c_kills_it(number):
    before = [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)]
    with pytest.raises(Preempted, match="which continues the running trials"), runner.preempted_by_signal():
        try:
            signal.raise_signal(number)
        finally:
            assert signal.getsignal(signal.SIGTERM) is signal.SIG_IGN
            assert signal.getsignal(signal.SIGINT) is signal.SIG_DFL
    assert [signal.getsignal(n) for n in (signal.SIGTERM, signal.SIGINT)] == before


def ended(process: Started, started: Path, sent: list[int]) -> tuple[int | None, str, float]:
    """Sends signals once a file exists; returns the exit status, the output, and the seconds since the first signal."""
    deadline = time.monotonic() + 100
    while not started.exists() and time.monotonic() < deadline and process.poll() is None:
        time.sleep(0.01)
    assert started.exists(), process.communicate(1)
    time.sleep(0.2)  # until the native call
    begun = time.monotonic()
    for number in sent:
        process.send_signal(number)
        time.sleep(0.2)
    output = process.communicate(30)[0]
    return process.poll(), output, time.monotonic() - begun


@pytest.mark.process
@pytest.mark.thorough(but=("SIGTERM",))
@pytest.mark.parametrize(
    ("stepping", "sent", "status", "seconds"),
    [
        ("no", [signal.SIGTERM], 75, 5),
        ("no", [signal.SIGINT], 75, 5),
        ("stepping", [signal.SIGINT, signal.SIGINT], 130, 2),
    ],
    ids=["SIGTERM", "SIGINT", "second SIGINT"],
)
def test_signal_ends_a_command_in_native_code(stepping, sent, status, seconds, tmp_path):
    process = Started("tests.hostile.slow", [str(tmp_path / "started"), stepping], merged=True)
    found, output, took = ended(process, tmp_path / "started", sent)
    assert found == status and took < seconds, output
    assert output.count("\n") == 1, output
    assert ("interrupted" if status == 130 else "run the same command to continue") in output


@pytest.mark.process
def test_signal_ends_train_while_data_is_prepared(tmp_path):
    (tmp_path / "data").mkdir()
    flags = [
        "--config=configs/quickstart.py", "--config.data.name=tests.hostile.slow:Slow", f"--workdir={tmp_path / 'run'}",
        f"--config.data.dir={tmp_path / 'data'}",
    ]  # fmt: skip
    process = Started("experiments.train", flags, merged=True)
    status, output, took = ended(process, tmp_path / "data" / "started", [signal.SIGTERM])
    assert status == 75 and took < 5, output
    assert "before a step was taken" in output.splitlines()[-1] and "Traceback" not in output
    assert not (tmp_path / "run" / "config.json").exists()
    assert not (tmp_path / "data" / "slow" / "1.0.0").exists()


@pytest.mark.loop
def test_signal_while_a_program_is_compiled_saves_nothing(
    tiny_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(TrainSetup, "compile_train_step", lambda _: signal.raise_signal(signal.SIGTERM))
    with pytest.raises(StoppedEarly):
        train(tiny_config("fusion=concat"), tmp_path / "run")
    checkpoints = Checkpoints(tmp_path / "run" / "checkpoints")
    assert checkpoints.steps() == []
    checkpoints.close()
    assert not (tmp_path / "run" / ".lock").exists()


@pytest.mark.loop
def test_ctrl_c_in_training_saves_the_run(
    tiny_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    hold = progress.Meter.hold

    def hold_and_interrupt(self: progress.Meter, first: int, *rest: Any) -> None:
        hold(self, first, *rest)
        if first == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(progress.Meter, "hold", hold_and_interrupt)
    with pytest.raises(Preempted, match="saved at step 3 of 8; run the same command") as raised:
        train(tiny_config("fusion=concat"), tmp_path)
    assert not isinstance(raised.value, StoppedEarly)
    checkpoints = Checkpoints(tmp_path / "checkpoints")
    assert checkpoints.newest() == 3
    checkpoints.close()


def test_a_notebook_is_not_ended_by_a_thread():
    """Only commands let a signal exit the process."""
    assert not signals.may_exit.is_set()
