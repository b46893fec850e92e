"""Cells of a method in one program: what is grouped, and what a group leaves."""

import functools
import json

import jax
import pytest

from mmfusion.analysis import grouped, plan, runner
from tests.analysis.test_ablation import make


@pytest.fixture
def planned(data_dir):
    changed = functools.partial(make, **{"data.dir": data_dir, "steps": 4, "parallel.mode": "jit"})
    return plan.build(changed, ["concat", "mean"], 2, {"optim.learning_rate": [1e-3, 3e-3]})


def test_seeds_and_learning_rates_go_together_and_nothing_else(planned):
    found = grouped.groups(planned.cells)
    assert [{cell.method for cell in group} for group in found] == [
        {"concat"}, {"mean"}, {"image alone"}, {"text alone"},
    ]  # fmt: skip
    assert [len(group) for group in found] == [4, 4, 4, 4]


def test_a_group_is_halved_where_memory_is_short_and_an_error_is_its_cell_s_own(planned, tmp_path, monkeypatch):
    cells = [cell for cell in planned.cells if cell.method == "concat"]
    sizes = []
    together = grouped.train_together

    def small(runs, around):
        sizes.append(len(runs))
        if len(runs) > 2:
            for one in runs:
                one.close()
            raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 1 bytes")
        return together(runs, around)

    monkeypatch.setattr(grouped, "train_together", small)
    damaged = runner.cell_directory(tmp_path, cells[1])
    damaged.mkdir(parents=True)
    (damaged / "config.json").write_text(json.dumps({**cells[1].config, "steps": 99}))
    ended = {cell.name: error for cell, error in grouped.run(cells, tmp_path)}
    assert sizes == [4, 2, 2]
    assert {name for name, error in ended.items() if error} == {cells[1].name}
    assert "belongs to another run" in json.loads((damaged / "failed.json").read_text())["error"]
    assert all(runner.is_done(tmp_path, cell) for cell in cells if cell is not cells[1])
    assert (runner.cell_directory(tmp_path, cells[0]) / "log.txt").read_text().count("test") > 0
    assert [cell.name for cell, _ in grouped.run(cells, tmp_path)] == [cells[1].name]
