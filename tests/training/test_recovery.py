"""What a run does whose numbers go wrong: it counts, goes back, stops, and says which examples it was."""

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
from mmfusion.errors import UserError
from mmfusion.optim import skip_step
from mmfusion.training import recovery
from mmfusion.training.loop import train
from mmfusion.training.replay import replay
from tests import spoiled
from tests.training.test_resume import assert_same_run

pytestmark = pytest.mark.usefixtures("traced_once")

SMALL = "fusion=concat,modalities=image"
CHANGES: dict[str, Any] = {"steps": 12, "eval_every": 4, "checkpoint_every": 2, "recovery.max_consecutive_bad_steps": 3}


@pytest.fixture
def spoil(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """Returns what spoils batches, see `spoiled.train_batches`."""
    return lambda *args, **options: monkeypatch.setattr(
        pipeline, "train_batches", spoiled.train_batches(*args, **options)
    )


def logged(workdir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (workdir / "metrics.jsonl").read_text().splitlines()]


def watched(losses: list[float], threshold: float) -> tuple[dict[str, Any], list[str], list[float]]:
    """Returns what is known after losses, what is said of each, and those that are remembered."""
    known, recent, said = recovery.no_bad_steps(), skip_step.init_history(), []
    judge = jax.jit(lambda recent, loss: (skip_step.is_spike(recent, loss, threshold), skip_step.append(recent, loss)))
    for step, loss in enumerate(losses, start=1):
        far, after = judge(recent, np.float32(loss))
        wrong = recovery.SPIKE if threshold and far else "" if math.isfinite(loss) else recovery.NOT_FINITE
        recent = recent if wrong else after
        known = recovery.count_step(known, step, wrong)
        said.append(wrong)
    return known, said, sorted(np.asarray(recent["losses"]).tolist())


def test_counts_what_is_not_finite_and_the_row_of_it():
    known, said, _ = watched([1.0, math.nan, 1.0, 1.0, math.nan], 0.0)
    assert [bool(wrong) for wrong in said] == [False, True, False, False, True]
    assert (known["skipped"], known["consecutive"], known["first"], known["spikes"]) == (2, 1, 5, 0)


def test_a_spike_is_far_above_the_newest_losses_and_is_not_learned_from():
    noise = np.random.default_rng(0).normal(1.0, 0.1, 200).astype(np.float32).tolist()
    known, said, newest = watched([*noise, 3.0, math.nan, 3.0], 10.0)
    assert said[:200] == [""] * 200
    assert said[200:] == [recovery.SPIKE, recovery.NOT_FINITE, recovery.SPIKE]
    assert newest == sorted(noise[-skip_step.WINDOW :])
    assert (known["consecutive"], known["first"]) == (3, 201)


def test_a_spike_is_judged_as_numpy_does():
    losses = np.random.default_rng(1).standard_cauchy(300).astype(np.float32)
    sound, expected = [], []
    for loss in losses:
        newest = np.array(sound[-skip_step.WINDOW :])
        middle = np.median(newest) if sound else 0.0
        spread = skip_step.DEVIATION * np.median(np.abs(newest - middle)) if sound else 0.0
        far = len(sound) >= skip_step.MIN_HISTORY and loss > middle + 5.0 * spread
        expected.append(recovery.SPIKE if far else "")
        sound += [] if far else [loss]
    assert 10 < expected.count(recovery.SPIKE) < 100
    assert watched(losses.tolist(), 5.0)[1] == expected


def test_no_spike_below_it_before_enough_is_known_or_where_none_is_asked_for():
    assert watched([1.0] * 5 + [100.0], 10.0)[1] == [""] * 6
    assert watched([1.0] * 50 + [-100.0, 1.005], 10.0)[1] == [""] * 52
    assert watched([1.0] * 50 + [100.0], 0.0)[1] == [""] * 51
    assert watched([1.0] * 50 + [1.02], 10.0)[1][-1] == recovery.SPIKE


@pytest.mark.loop
def test_single_updates_that_go_wrong_are_skipped_and_counted(
    tiny_config: Callable[..., Any], tmp_path: Path, spoil: Callable[..., None]
):
    spoil({2, 5, 6, 11})
    result = train(tiny_config(SMALL, CHANGES), tmp_path)
    assert (result["skipped"], result["rollbacks"], result["steps"]) == (4, 0, 12)
    assert math.isfinite(result["test"]["loss"])


@pytest.mark.loop
def test_goes_back_and_ends_as_if_nothing_had_been(
    tiny_config: Callable[..., Any], tmp_path: Path, spoil: Callable[..., None]
):
    train(tiny_config(SMALL, CHANGES), tmp_path / "unbroken")
    spoil({7, 8, 9}, times=1)
    result = train(
        tiny_config(SMALL, {**CHANGES, "recovery.rollbacks": 1, "recovery.lr_factor": 1.0}), tmp_path / "back"
    )
    assert result["rollbacks"] == 1
    assert_same_run(tmp_path / "back", tmp_path / "unbroken", 12)


@pytest.mark.loop
def test_goes_back_no_further_than_it_must_and_counts_what_it_skipped(
    tiny_config: Callable[..., Any], tmp_path: Path, spoil: Callable[..., None], capsys: pytest.CaptureFixture[str]
):
    spoil(range(6, 12), times=1)  # longer than two checkpoints
    changes = {**CHANGES, "checkpoint_every": 1, "recovery.max_consecutive_bad_steps": 6, "recovery.rollbacks": 1}
    result = train(tiny_config(SMALL, changes), tmp_path)
    assert "in the 6 updates up to step 11: back to step 5, 0.5 of the learning rate" in capsys.readouterr().out
    assert (result["skipped"], result["rollbacks"]) == (6, 1)


@pytest.mark.loop
def test_goes_back_to_the_beginning_with_a_lower_rate(
    tiny_config: Callable[..., Any], tmp_path: Path, spoil: Callable[..., None]
):
    spoil({1, 2, 3}, times=2)
    train(tiny_config(SMALL, {**CHANGES, "recovery.rollbacks": 2, "recovery.lr_factor": 0.25}), tmp_path)
    lines = logged(tmp_path)
    rates = [line["learning_rate"] for line in lines if line["split"] == "train"]
    shutil.rmtree(tmp_path)
    spoil(set())
    train(tiny_config(SMALL, CHANGES), tmp_path)
    lines = logged(tmp_path)
    usual = [line["learning_rate"] for line in lines if line["split"] == "train"]
    np.testing.assert_allclose(rates, np.array(usual) / 16, rtol=1e-6)


@pytest.mark.loop
def test_stops_with_the_examples_and_replays_the_first(
    tiny_config: Callable[..., Any], tmp_path: Path, spoil: Callable[..., None]
):
    spoil(range(6, 13))
    with pytest.raises(
        FloatingPointError, match="not finite in the 3 updates up to step 8, rolled back 1 times before"
    ):
        train(tiny_config(SMALL, {**CHANGES, "recovery.rollbacks": 1}), tmp_path)
    wrong = json.loads((tmp_path / recovery.FILE).read_text())
    assert [update["step"] for update in wrong["updates"]] == [6, 7, 8]
    assert all(len(set(update["ids"])) == 16 and update["loss"] is None for update in wrong["updates"])
    update = replay(tmp_path)
    assert (update.step, update.since) == (6, 4)
    assert "recorded   the same; not finite" in describe(update)
    assert math.isnan(update.gradients["heads_label/kernel"])

    # the same run goes on: it saved itself in the middle of what went wrong, and knows of it
    with pytest.raises(FloatingPointError, match="3 updates up to step 8, rolled back 1 times before"):
        train(tiny_config(SMALL, {**CHANGES, "recovery.rollbacks": 1}), tmp_path)

    # and goes back as often, and as far down with its rate, as it is told now
    with pytest.raises(FloatingPointError, match="3 updates up to step 8, rolled back 2 times before"):
        train(tiny_config(SMALL, {**CHANGES, "recovery.rollbacks": 2, "recovery.lr_factor": 0.1}), tmp_path)
    assert "recorded   the same; not finite" in describe(replay(tmp_path))


@pytest.mark.loop
def test_what_went_wrong_is_remembered_by_a_checkpoint(
    tiny_config: Callable[..., Any], tmp_path: Path, spoil: Callable[..., None]
):
    spoil(range(5, 13))
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
    again = json.loads((tmp_path / recovery.FILE).read_text())["updates"]
    named = [[(update["step"], update["ids"]) for update in updates] for updates in (before, again)]
    assert named[0] == named[1] and [step for step, _ in named[1]] == [5, 6, 7, 8, 9]
    assert [update["wrong"] for update in again] == 4 * [recovery.UNKNOWN] + [recovery.NOT_FINITE]
    update = replay(tmp_path)
    assert update.step == 5 and recovery.UNKNOWN in "".join(describe(update))


@pytest.mark.loop
def test_spikes_are_counted_and_end_a_run(tiny_config: Callable[..., Any], tmp_path: Path):
    changes = {**CHANGES, "steps": 60, "eval_every": 60, "checkpoint_every": 60}
    with pytest.raises(FloatingPointError, match="the loss was far above those before in the 3 updates"):
        train(tiny_config(SMALL, {**changes, "recovery.spike_threshold": 1e-6}), tmp_path)
    wrong = json.loads((tmp_path / recovery.FILE).read_text())
    assert wrong["first"] > skip_step.MIN_HISTORY
    lines = logged(tmp_path)
    losses = {line["step"]: line["loss"] for line in lines}
    assert [update["loss"] for update in wrong["updates"][:-1]] == [losses[wrong["first"]], losses[wrong["first"] + 1]]
    assert {line["spike"] for line in lines if line["step"] < skip_step.MIN_HISTORY + 1} == {0.0}
    assert lines[-1]["spike"] == 1.0 and lines[-1]["skipped"] == 0.0
    update = replay(tmp_path)
    assert update.since == 0
    assert "recorded   the same; a spike" in describe(update)


@pytest.mark.loop
def test_replays_a_sound_update_as_it_was_logged(tiny_config: Callable[..., Any], tmp_path: Path):
    train(tiny_config(SMALL, {**CHANGES, "checkpoint_every": 4}), tmp_path)
    lines = logged(tmp_path)
    told_then = next(line for line in lines if line["split"] == "train" and line["step"] == 11)
    update = replay(tmp_path, 11)
    assert update.since == 8
    assert {name: update.numbers[name] for name in ("loss", "grad_norm", "learning_rate")} == {
        name: told_then[name] for name in ("loss", "grad_norm", "learning_rate")
    }
    assert 0 < max(update.gradients.values()) <= update.numbers["grad_norm"]
    assert len(update.losses) == 16
    shutil.rmtree(tmp_path / "checkpoints" / "4", ignore_errors=True)  # where it is not the best one
    for step, said in ((6, "the checkpoint before it is gone"), (13, "updates of .* are 1 to 12"), (0, "has no wrong")):
        with pytest.raises(UserError, match=said):
            replay(tmp_path, step)


def test_the_command_ends_with_one_line_and_status_1(
    tiny_flags: Callable[..., list[str]], command: Callable[..., Any], tmp_path: Path
):
    # a learning rate that no model survives: its numbers overflow by themselves
    changes = {**CHANGES, "optim.name": "sgd", "optim.weight_decay": None, "optim.learning_rate": 1e30}
    changes |= {"optim.clip_norm": 0.0, "optim.schedule.warmup_steps": 0}
    done = command("experiments.train", *tiny_flags(changes), f"--workdir={tmp_path / 'run'}")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "python -m experiments.debug_step" in line
    assert "Traceback" not in done.stderr
    again = command("experiments.debug_step", str(tmp_path / "run"))
    assert again.returncode == 0, again.stderr[-2000:]
    assert "recorded   the same" in again.stdout
