import numpy as np

from mmfusion.tracking import tables
from tests.tracking.test_logger import console


def test_tables_show_totals_and_omit_nested_scores():
    screen = console()
    screen.print(tables.model_table([("encoders/[image]", (64, 128), 1200, 0.75), ("head", "13", 34, None)]))
    output = screen.file.getvalue()
    assert "encoders/[image]" in output
    assert "64×128" in output
    total = next(line for line in output.splitlines() if "total" in line)
    assert total.split() == ["total", "1,234", "75.0%"]
    screen = console()
    scores = {"valid": {"accuracy": 0.5, "auroc": None, "confusion": [[1]]}, "test": {"accuracy": np.float64(0.25)}}
    screen.print(tables.results_table(scores))
    rows = [line.split() for line in screen.file.getvalue().splitlines() if line.strip()]
    assert rows[0] == ["valid", "test"]
    assert rows[2:] == [["accuracy", "0.5000", "0.2500"], ["auroc", "–", "–"]]


def test_results_table_shows_which_rows_count():
    screen = console()
    screen.print(tables.results_table({"test": {"rows": 1064, "examples": 60}}))
    rows = [line.split() for line in screen.file.getvalue().splitlines() if line.strip()]
    assert rows[2:] == [["examples", "60", "of", "1,064"]]
