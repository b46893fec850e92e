"""The progress table of an ablation: trial states, failures, and more methods than terminal lines."""

import json

import pytest
from rich.console import Console

from experiments import progress_table
from mmfusion.analysis.ablation import runner
from mmfusion.analysis.ablation.plan import Trial
from mmfusion.analysis.ablation.runner import trial_directory


@pytest.fixture
def trials(tmp_path):
    trials = []
    for method in ("gmu", "film", "mult"):
        for seed in range(3):
            trial = Trial(
                f"{method}_seed={seed}", method, method, "", False, {}, {"seed": seed, "steps": 8, "select": "accuracy"}
            )
            trial_directory(tmp_path, trial).mkdir(parents=True)
            trials.append(trial)
    return trials


def finish(directory, trial, accuracy):
    (trial_directory(directory, trial) / "result.json").write_text(json.dumps({"valid": {"accuracy": accuracy}}))


def rendered(board, height=30):
    console = Console(width=100, record=True, color_system=None)
    with console.capture() as capture:
        console.print(board.table(height))
    return capture.get()


def test_progress_table_shows_trials_in_every_state(trials, tmp_path):
    finish(tmp_path, trials[0], 0.5)
    board = progress_table._Board("train", trials, tmp_path, runner.TRAINING)
    finish(tmp_path, trials[1], 0.75)
    assert "valid accuracy 0.7500" in board.finished(trials[1], "").plain
    assert "failed: UserError: no" in board.finished(trials[3], "UserError: no").plain
    (trial_directory(tmp_path, trials[4]) / "metrics.jsonl").write_text('{"step": 2}\n{"step": 6}\n')
    (trial_directory(tmp_path, trials[5]) / "metrics.jsonl").write_text('{"step": 2')  # a partially written line
    rows = {line.split()[0]: line for line in rendered(board).splitlines() if line.strip()}
    assert rows["gmu"].split()[1:3] == ["●●·", "0.6250"]
    assert rows["film"].split()[1] == "✕◐·"
    assert rows["mult"].split()[1] == "···"
    assert "3 of 9 trials, 1 failed" in rows["train"] and "left" in rows["train"]


def test_progress_table_shows_running_methods_first(trials, tmp_path):
    board = progress_table._Board("train", trials, tmp_path, runner.TRAINING)
    (trial_directory(tmp_path, trials[-1]) / "metrics.jsonl").write_text('{"step": 1}\n')
    many = [
        Trial(f"m{i}", f"m{i}", f"m{i}", "", False, {}, {"seed": 0, "steps": 8, "select": "accuracy"})
        for i in range(20)
    ] + [trials[-1]]
    board = progress_table._Board("train", many, tmp_path, runner.TRAINING)
    text = rendered(board, height=9)
    assert "mult" in text and "(17 more methods)" in text


def test_progress_without_a_terminal_is_a_line_per_trial(trials, tmp_path, capsys):
    for trial in trials:
        finish(tmp_path, trial, None)
    progress_table.show(
        "probe", trials, tmp_path, ((trial, "") for trial in trials), runner.Stage(print, "examined.json")
    )
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 10
    assert lines[-1].startswith("probe    9 of 9 trials")


def test_progress_without_trials_is_empty(tmp_path, capsys):
    progress_table.show("probe", [], tmp_path, iter([]), runner.TRAINING)
    assert capsys.readouterr().out == ""
