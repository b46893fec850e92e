"""The progress of an ablation: every cell once, failures, and too many methods for the terminal."""

import json

import pytest
from rich.console import Console

from experiments import progress_table
from mmfusion.analysis.ablation import runner
from mmfusion.analysis.ablation.plan import Cell
from mmfusion.analysis.ablation.runner import cell_directory


@pytest.fixture
def cells(tmp_path):
    made = []
    for method in ("gmu", "film", "mult"):
        for seed in range(3):
            cell = Cell(
                f"{method}_seed={seed}", method, method, "", False, {}, {"seed": seed, "steps": 8, "select": "accuracy"}
            )
            cell_directory(tmp_path, cell).mkdir(parents=True)
            made.append(cell)
    return made


def end(directory, cell, accuracy):
    (cell_directory(directory, cell) / "result.json").write_text(json.dumps({"valid": {"accuracy": accuracy}}))


def shown(board, height=30):
    console = Console(width=100, record=True, color_system=None)
    with console.capture() as capture:
        console.print(board.table(height))
    return capture.get()


def test_progress_table_shows_cells_in_every_state(cells, tmp_path):
    end(tmp_path, cells[0], 0.5)
    board = progress_table._Board("train", cells, tmp_path, runner.TRAINING)
    end(tmp_path, cells[1], 0.75)
    assert "valid accuracy 0.7500" in board.finished(cells[1], "").plain
    assert "failed: UserError: no" in board.finished(cells[3], "UserError: no").plain
    (cell_directory(tmp_path, cells[4]) / "metrics.jsonl").write_text('{"step": 2}\n{"step": 6}\n')
    (cell_directory(tmp_path, cells[5]) / "metrics.jsonl").write_text('{"step": 2')  # half a line
    rows = {line.split()[0]: line for line in shown(board).splitlines() if line.strip()}
    assert rows["gmu"].split()[1:3] == ["●●·", "0.6250"]
    assert rows["film"].split()[1] == "✕◐·"
    assert rows["mult"].split()[1] == "···"
    assert "3 of 9 cells, 1 failed" in rows["train"] and "left" in rows["train"]


def test_progress_table_shows_running_methods_first(cells, tmp_path):
    board = progress_table._Board("train", cells, tmp_path, runner.TRAINING)
    (cell_directory(tmp_path, cells[-1]) / "metrics.jsonl").write_text('{"step": 1}\n')
    many = [
        Cell(f"m{i}", f"m{i}", f"m{i}", "", False, {}, {"seed": 0, "steps": 8, "select": "accuracy"}) for i in range(20)
    ] + [cells[-1]]
    board = progress_table._Board("train", many, tmp_path, runner.TRAINING)
    said = shown(board, height=9)
    assert "mult" in said and "(17 more methods)" in said


def test_progress_without_a_terminal_is_a_line_per_cell(cells, tmp_path, capsys):
    for cell in cells:
        end(tmp_path, cell, None)
    progress_table.show("examine", cells, tmp_path, ((cell, "") for cell in cells), runner.Work(print, "examined.json"))
    said = capsys.readouterr().out.splitlines()
    assert len(said) == 10
    assert said[-1].startswith("examine  9 of 9 cells")


def test_progress_of_no_cells_is_empty(tmp_path, capsys):
    progress_table.show("examine", [], tmp_path, iter([]), runner.TRAINING)
    assert capsys.readouterr().out == ""
