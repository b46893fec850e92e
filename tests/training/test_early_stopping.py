"""Training that ends before its last step, and the checkpoint that is tested."""

import json
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mmfusion import config as configs
from mmfusion.distributed.signals import Stop
from mmfusion.errors import Preempted
from mmfusion.training import progress
from mmfusion.training.loop import train
from mmfusion.training.progress import Progress
from mmfusion.training.replicas import replica, train_replicas
from tests import planted, tiny
from tests.training.test_resume import assert_same_run

pytestmark = pytest.mark.usefixtures("traced_once")

# At this learning rate no parameter moves, so that only the first validation improves the loss.
STILL = {"optim.learning_rate": 1e-30, "select": "loss", "model.encoders.image.norm": "layer"}
STOPPED = {**STILL, "eval_every": 2, "checkpoint_every": 3, "early_stopping": 2}


def count(scores: list[float], patience: int, steps: int = 100) -> list[tuple[int, str]]:
    """Returns what was counted after each validation: those in vain, and why training stops."""
    config = configs.read(tiny.config(changes={"early_stopping": patience, "steps": steps}))
    state, seen = Progress(), []
    for score in scores:
        state.step += 1
        state.stop_early_if_due(config, score)
        seen.append((state.without_improvement, state.stopped))
    return seen


def test_early_stopping_counts_validations_without_improvement():
    counts = count([0.3, 0.3, 0.4, float("nan"), 0.2, 0.4], patience=3)
    assert [number for number, _ in counts] == [0, 1, 0, 1, 2, 3]
    assert [bool(reason) for _, reason in counts] == [False] * 5 + [True]
    assert counts[-1][1] == "accuracy has not improved in 3 validations"


def test_early_stopping_is_off_by_default_and_not_at_the_last_step():
    assert count([0.3] * 5, patience=0) == [(0, "")] * 5
    assert count([0.3] * 3, patience=2, steps=3)[-1] == (2, "")


@pytest.fixture(scope="module")
def stopped(tiny_config: Callable[..., Any], tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    """Returns the config and the directory of a run that stops at step 6 of 8."""
    config, workdir = tiny_config("fusion=concat", STOPPED), tmp_path_factory.mktemp("stopped") / "run"
    train(config, workdir)
    return config, workdir


@pytest.mark.loop
def test_stopped_run_tests_its_best_checkpoint_and_is_finished(
    stopped: tuple[Any, Path], capsys: pytest.CaptureFixture[str]
):
    config, workdir = stopped
    result = json.loads((workdir / "result.json").read_text())
    assert (result["steps"], result["stopped"]) == (6, "loss has not improved in 2 validations")
    assert result["best_step"] == 2
    lines = [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["split"] == "valid"] == [2, 4, 6]
    assert [line["step"] for line in lines if line["split"] == "train"] == [*range(1, 7)]
    capsys.readouterr()
    assert train(config, workdir) == result
    assert capsys.readouterr().out == f"train  finished before, at step 6; see {workdir}/result.json\n"


@pytest.mark.loop
@pytest.mark.parametrize("step", [3, 6], ids=["before", "at the stop"])
def test_resumed_run_stops_at_the_same_step(
    stopped: tuple[Any, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int
):
    hold = progress.Meter.hold

    def hold_and_stop(self: progress.Meter, first: int, *rest: Any) -> None:
        hold(self, first, *rest)
        if first + 1 == step:
            signal.raise_signal(signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(Preempted, match=f"saved at step {step} of 8"):
        patch.setattr(progress.Meter, "hold", hold_and_stop)
        train(stopped[0], tmp_path)
    train(stopped[0], tmp_path)
    assert_same_run(tmp_path, stopped[1], 6)


@pytest.mark.thorough
@pytest.mark.loop
def test_replicas_stop_by_themselves(tiny_config: Callable[..., Any], tmp_path: Path):
    rates = {"still": 1e-30, "moving": 0.003}
    run_configs = {
        name: tiny_config("fusion=concat", {**STOPPED, "optim.learning_rate": rate}) for name, rate in rates.items()
    }
    results = train_replicas([replica(config, tmp_path / name, Stop()) for name, config in run_configs.items()])
    assert [(result["steps"], bool(result["stopped"])) for result in results] == [(6, True), (8, False)]
    assert results[0]["best_step"] == 2


@pytest.mark.loop
def test_select_last_tests_the_newest_checkpoint(tiny_config: Callable[..., Any], tmp_path: Path):
    config = tiny_config("fusion=concat", {**STILL, "select": "last"})
    result = train(config, tmp_path)
    assert (result["best_step"], result["steps"], result["stopped"]) == (8, 8, "")


@pytest.mark.loop
@pytest.mark.parametrize("rate", [1e-30, 0.03])
def test_train_warns_once_of_a_regression_below_the_mean(
    rate: float, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = [planted.row(i) for i in range(40)]
    planted.plant(monkeypatch, train=rows, test=rows[:20])
    changes = {"steps": 20, "eval_every": 4, "optim__learning_rate": rate, "data__allow_leakage": True}
    train(planted.config("image", "amount", **changes), tmp_path)
    warning = "train  warning: the prediction of 'amount' explains less than the mean of its targets would (R2 -"
    assert capsys.readouterr().out.count(warning) == 1


@pytest.mark.loop
def test_train_selects_by_a_sentiment_metric_in_the_units_of_the_data(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    rows = [planted.row(i, amount=(i - 20) / 7) for i in range(41)]
    planted.plant(monkeypatch, train=rows, test=rows[:20])
    changes = {"data__targets__amount__metrics": ("sentiment",), "select": "acc7", "optim__learning_rate": 1e-30}
    result = train(planted.config("image", "amount", **changes), tmp_path)
    assert {"acc2", "acc2_nonzero", "acc5", "acc7", "mae"} < set(result["test"])
    assert result["select"] == "acc7"
