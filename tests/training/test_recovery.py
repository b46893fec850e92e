"""Recovery from non-finite losses and loss spikes: counting, rollback, termination, and the record of examples."""

import json
import math
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest

from experiments.debug_step import describe
from mmfusion.checkpoints.manager import Checkpoints
from mmfusion.data import pipeline
from mmfusion.optim import skip_step
from mmfusion.training import recovery
from mmfusion.training.loop import train
from mmfusion.training.replay import replay
from tests import spoiled
from tests.errors import rejects
from tests.training.test_resume import assert_same_run

pytestmark = pytest.mark.usefixtures("traced_once")

SMALL = "fusion=concat,modalities=image"
CHANGES: dict[str, Any] = {"steps": 12, "eval_every": 4, "checkpoint_every": 2, "recovery.max_consecutive_bad_steps": 3}


@pytest.fixture
def inject_nan(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Returns a function that injects NaN weights into batches, see `spoiled.train_batches`."""
    return lambda *args, **options: monkeypatch.setattr(
        pipeline, "train_batches", spoiled.train_batches(*args, **options)
    )


def logged(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def count_bad_steps(losses: list[float], threshold: float) -> tuple[dict[str, Any], list[str], list[float]]:
    """Returns the counts after `losses`, the reason for each bad step ("" if good), and the sorted loss history."""
    counts, history, reasons = recovery.no_bad_steps(), skip_step.init_history(), []
    update = jax.jit(
        lambda history, loss: (skip_step.is_spike(history, loss, threshold), skip_step.append(history, loss))
    )
    for step, loss in enumerate(losses, start=1):
        is_spike, updated = update(history, np.float32(loss))
        reason = recovery.SPIKE if threshold and is_spike else "" if math.isfinite(loss) else recovery.NOT_FINITE
        history = history if reason else updated
        counts = recovery.count_step(counts, step, reason)
        reasons.append(reason)
    return counts, reasons, sorted(np.asarray(history["losses"]).tolist())


def test_recovery_counts_non_finite_and_consecutive_bad_steps():
    counts, reasons, _ = count_bad_steps([1.0, math.nan, 1.0, 1.0, math.nan], 0.0)
    assert [bool(reason) for reason in reasons] == [False, True, False, False, True]
    assert (counts["skipped"], counts["consecutive"], counts["first"], counts["spikes"]) == (2, 1, 5, 0)


def test_spike_detection_excludes_bad_steps_from_the_history():
    noise = np.random.default_rng(0).normal(1.0, 0.1, 200).astype(np.float32).tolist()
    counts, reasons, history = count_bad_steps([*noise, 3.0, math.nan, 3.0], 10.0)
    assert reasons[:200] == [""] * 200
    assert reasons[200:] == [recovery.SPIKE, recovery.NOT_FINITE, recovery.SPIKE]
    assert history == sorted(noise[-skip_step.WINDOW :])
    assert (counts["consecutive"], counts["first"]) == (3, 201)


def test_spike_detection_matches_numpy():
    losses = np.random.default_rng(1).standard_cauchy(300).astype(np.float32)
    history, expected = [], []
    for loss in losses:
        newest = np.array(history[-skip_step.WINDOW :])
        median = np.median(newest) if history else 0.0
        spread = skip_step.DEVIATION * np.median(np.abs(newest - median)) if history else 0.0
        is_spike = len(history) >= skip_step.MIN_HISTORY and loss > median + 5.0 * spread
        expected.append(recovery.SPIKE if is_spike else "")
        history += [] if is_spike else [loss]
    assert 10 < expected.count(recovery.SPIKE) < 100
    assert count_bad_steps(losses.tolist(), 5.0)[1] == expected


def test_spike_detection_needs_history_a_high_loss_and_a_threshold():
    assert count_bad_steps([1.0] * 5 + [100.0], 10.0)[1] == [""] * 6
    assert count_bad_steps([1.0] * 50 + [-100.0, 1.005], 10.0)[1] == [""] * 52
    assert count_bad_steps([1.0] * 50 + [100.0], 0.0)[1] == [""] * 51
    assert count_bad_steps([1.0] * 50 + [1.02], 10.0)[1][-1] == recovery.SPIKE


@pytest.mark.loop
def test_recovery_skips_and_counts_single_bad_steps(
    tiny_config: Callable[..., Any], tmp_path: Path, inject_nan: Callable[..., None]
):
    inject_nan({2, 5, 6, 11})
    result = train(tiny_config(SMALL, CHANGES), tmp_path)
    assert (result["skipped"], result["rollbacks"], result["steps"]) == (4, 0, 12)
    assert math.isfinite(result["test"]["loss"])


@pytest.mark.loop
def test_rollback_gives_the_same_run_as_without_bad_steps(
    tiny_config: Callable[..., Any], tmp_path: Path, inject_nan: Callable[..., None]
):
    train(tiny_config(SMALL, CHANGES), tmp_path / "uninterrupted")
    inject_nan({7, 8, 9}, times=1)
    result = train(
        tiny_config(SMALL, {**CHANGES, "recovery.rollbacks": 1, "recovery.lr_factor": 1.0}), tmp_path / "rolled_back"
    )
    assert result["rollbacks"] == 1
    assert_same_run(tmp_path / "rolled_back", tmp_path / "uninterrupted", 12)


@pytest.mark.loop
def test_rollback_restores_the_last_good_step_and_counts_skipped(
    tiny_config: Callable[..., Any], tmp_path: Path, inject_nan: Callable[..., None], capsys: pytest.CaptureFixture[str]
):
    inject_nan(range(6, 12), times=1)  # spans more than two checkpoints
    changes = {**CHANGES, "checkpoint_every": 1, "recovery.max_consecutive_bad_steps": 6, "recovery.rollbacks": 1}
    result = train(tiny_config(SMALL, changes), tmp_path)
    assert "in the 6 updates up to step 11: back to step 5, 0.5 of the learning rate" in capsys.readouterr().out
    assert (result["skipped"], result["rollbacks"]) == (6, 1)


@pytest.mark.thorough
@pytest.mark.loop
def test_rollback_to_the_start_lowers_the_learning_rate(
    tiny_config: Callable[..., Any], tmp_path: Path, inject_nan: Callable[..., None]
):
    inject_nan({1, 2, 3}, times=2)
    train(tiny_config(SMALL, {**CHANGES, "recovery.rollbacks": 2, "recovery.lr_factor": 0.25}), tmp_path)
    lines = logged(tmp_path)
    lowered = [line["learning_rate"] for line in lines if line["split"] == "train"]
    shutil.rmtree(tmp_path)
    inject_nan(set())
    train(tiny_config(SMALL, CHANGES), tmp_path)
    lines = logged(tmp_path)
    original = [line["learning_rate"] for line in lines if line["split"] == "train"]
    np.testing.assert_allclose(lowered, np.array(original) / 16, rtol=1e-6)


@pytest.mark.loop
def test_recovery_records_examples_and_replay_reproduces_the_first(
    tiny_config: Callable[..., Any], tmp_path: Path, inject_nan: Callable[..., None]
):
    inject_nan(range(6, 13))
    with pytest.raises(
        FloatingPointError, match="not finite in the 3 updates up to step 8, rolled back 1 times before"
    ):
        train(tiny_config(SMALL, {**CHANGES, "recovery.rollbacks": 1}), tmp_path)
    record = json.loads((tmp_path / recovery.FILE).read_text())
    assert [update["step"] for update in record["updates"]] == [6, 7, 8]
    assert all(len(set(update["ids"])) == 16 and update["loss"] is None for update in record["updates"])
    update = replay(tmp_path)
    assert (update.step, update.since) == (6, 4)
    assert "recorded   the same; not finite" in describe(update)
    assert math.isnan(update.gradients["heads_label/kernel"])

    # The same run resumes: it was saved between the bad steps, and its checkpoint contains their counts.
    with pytest.raises(FloatingPointError, match="3 updates up to step 8, rolled back 1 times before"):
        train(tiny_config(SMALL, {**CHANGES, "recovery.rollbacks": 1}), tmp_path)

    # A resumed run uses the changed number of rollbacks and learning rate factor.
    with pytest.raises(FloatingPointError, match="3 updates up to step 8, rolled back 2 times before"):
        train(tiny_config(SMALL, {**CHANGES, "recovery.rollbacks": 2, "recovery.lr_factor": 0.1}), tmp_path)
    assert "recorded   the same; not finite" in describe(replay(tmp_path))


@pytest.mark.loop
def test_checkpoints_contain_bad_step_counts(
    tiny_config: Callable[..., Any], tmp_path: Path, inject_nan: Callable[..., None]
):
    inject_nan(range(5, 13))
    changes = {**CHANGES, "recovery.max_consecutive_bad_steps": 5}
    with pytest.raises(FloatingPointError, match="5 updates up to step 9"):
        train(tiny_config(SMALL, changes), tmp_path)
    checkpoints = Checkpoints(tmp_path / "checkpoints", readonly=True)
    assert checkpoints.newest() == 8
    assert checkpoints.meta(8)["progress"]["bad_steps"] == {
        **recovery.no_bad_steps(),
        "skipped": 4,
        "consecutive": 4,
        "first": 5,
    }
    before = json.loads((tmp_path / recovery.FILE).read_text())["updates"]
    with pytest.raises(FloatingPointError, match="5 updates up to step 9"):
        train(tiny_config(SMALL, changes), tmp_path)
    resumed = json.loads((tmp_path / recovery.FILE).read_text())["updates"]
    steps_and_ids = [[(update["step"], update["ids"]) for update in updates] for updates in (before, resumed)]
    assert steps_and_ids[0] == steps_and_ids[1] and [step for step, _ in steps_and_ids[1]] == [5, 6, 7, 8, 9]
    assert [update["wrong"] for update in resumed] == 4 * [recovery.UNKNOWN] + [recovery.NOT_FINITE]
    update = replay(tmp_path)
    assert update.step == 5 and recovery.UNKNOWN in "".join(describe(update))


@pytest.mark.loop
def test_recovery_stops_after_consecutive_spikes(tiny_config: Callable[..., Any], tmp_path: Path):
    changes = {**CHANGES, "steps": 60, "eval_every": 60, "checkpoint_every": 60}
    with pytest.raises(FloatingPointError, match="the loss was far above those before in the 3 updates"):
        train(tiny_config(SMALL, {**changes, "recovery.spike_threshold": 1e-6}), tmp_path)
    record = json.loads((tmp_path / recovery.FILE).read_text())
    assert record["first"] > skip_step.MIN_HISTORY
    lines = logged(tmp_path)
    losses = {line["step"]: line["loss"] for line in lines}
    assert [update["loss"] for update in record["updates"][:-1]] == [
        losses[record["first"]],
        losses[record["first"] + 1],
    ]
    assert {line["spike"] for line in lines if line["step"] < skip_step.MIN_HISTORY + 1} == {0.0}
    assert lines[-1]["spike"] == 1.0 and lines[-1]["skipped"] == 0.0
    update = replay(tmp_path)
    assert update.since == 0
    assert "recorded   the same; a spike" in describe(update)


@pytest.mark.thorough
@pytest.mark.loop
def test_replay_of_a_good_step_equals_its_log(tiny_config: Callable[..., Any], tmp_path: Path):
    train(tiny_config(SMALL, {**CHANGES, "checkpoint_every": 4}), tmp_path)
    lines = logged(tmp_path)
    logged_line = next(line for line in lines if line["split"] == "train" and line["step"] == 11)
    update = replay(tmp_path, 11)
    assert update.since == 8
    assert {name: update.numbers[name] for name in ("loss", "grad_norm", "learning_rate")} == {
        name: logged_line[name] for name in ("loss", "grad_norm", "learning_rate")
    }
    assert 0 < max(update.gradients.values()) <= update.numbers["grad_norm"]
    assert len(update.losses) == 16
    shutil.rmtree(tmp_path / "checkpoints" / "4", ignore_errors=True)  # absent unless best
    for step, fact in ((6, "checkpoint before it is gone"), (13, "are 1 to 12"), (0, "has no wrong")):
        with rejects("--step", says=fact):
            replay(tmp_path, step)


@pytest.mark.thorough
def test_train_command_exits_1_with_one_line_on_bad_steps(
    tiny_flags: Callable[..., list[str]], command: Callable[..., Any], tmp_path: Path
):
    # A learning rate so high that the parameters overflow.
    changes = {**CHANGES, "optim.name": "sgd", "optim.weight_decay": None, "optim.learning_rate": 1e30}
    changes |= {"optim.clip_norm": 0.0, "optim.schedule.warmup_steps": 0}
    process = command("experiments.train", *tiny_flags(changes), f"--workdir={tmp_path / 'run'}")
    assert process.returncode == 1
    (line,) = [line for line in process.stderr.splitlines() if line.startswith("error: ")]
    assert "python -m experiments.debug_step" in line
    assert "Traceback" not in process.stderr
    debug = command("experiments.debug_step", str(tmp_path / "run"))
    assert debug.returncode == 0, debug.stderr[-2000:]
    assert "recorded   the same" in debug.stdout
