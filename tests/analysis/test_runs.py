"""Comparison of runs: grouping into methods, method names and the table."""

import json
from pathlib import Path

import pytest

from configs import quickstart
from mmfusion import config as configs
from mmfusion.analysis import runs
from mmfusion.training import seal
from tests.errors import rejects


def write_finished_run(folder: Path, arg: str = "", accuracy: float | None = 0.5, rows: str = "abc", **changes) -> Path:
    config = quickstart.get_config(arg)
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    folder.mkdir()
    seal.write_config(folder, configs.to_json(config))
    scores = {"accuracy": accuracy, "loss": 1 - accuracy if accuracy is not None else None}
    result = {
        "valid": scores, "test": scores, "parameters": 1234, "seconds": 60.0, "steps": 10, "device": "1 x cpu",
        "data": {"name": "shapes/match", "fingerprint": arg, "rows": rows, "content": {}}, "versions": {"jax": "0"},
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_methods_are_named_by_their_differences(tmp_path):
    workdirs = [
        write_finished_run(tmp_path / "a", "fusion=gmu,seed=1", 0.75),
        write_finished_run(tmp_path / "b", "fusion=gmu,seed=0", 0.5, data__dir="elsewhere"),
        write_finished_run(tmp_path / "c", "fusion=concat"),
        write_finished_run(tmp_path / "d", "fusion=concat", optim__learning_rate=0.5),
    ]
    found = {method.name: method for method in runs.methods([runs.read(run) for run in workdirs])}
    learning_rate = quickstart.get_config().optim.learning_rate
    assert set(found) == {"gmu", f"concat optim.learning_rate={learning_rate}", "concat optim.learning_rate=0.5"}
    assert found["gmu"].scores("test", "accuracy") == [0.5, 0.75]  # ordered by seed
    assert runs.mean_and_deviation([0.5, 0.75]) == (0.625, pytest.approx(0.25 / 2**0.5))
    assert runs.mean_and_deviation([0.5]) == (0.5, None)


def test_methods_reject_duplicate_runs(tmp_path):
    one, other = write_finished_run(tmp_path / "a"), write_finished_run(tmp_path / "b")
    with rejects(other, None, says=f"same config and seed as {one}"):
        runs.methods([runs.read(one), runs.read(other)])


def test_read_rejects_unfinished_or_corrupt_runs(tmp_path):
    (write_finished_run(tmp_path / "a") / "result.json").unlink()
    (write_finished_run(tmp_path / "b") / "result.json").write_text("{")
    with rejects(tmp_path / "a", None, says="result.json is missing"):
        runs.read(tmp_path / "a")
    with rejects(tmp_path / "b" / "result.json", None, says="JSON"):
        runs.read(tmp_path / "b")
    with rejects("--metric", "acuracy", "accuracy"):
        runs.methods([runs.read(write_finished_run(tmp_path / "c"))])[0].scores("test", "acuracy")


def test_compare_command_sorts_best_first_and_writes_a_table(tmp_path, command):
    workdirs = [
        write_finished_run(tmp_path / "a", "fusion=gmu,seed=0", 0.75),
        write_finished_run(tmp_path / "b", "fusion=gmu,seed=1", 0.5),
        write_finished_run(tmp_path / "c", "fusion=concat", 0.75),
        write_finished_run(tmp_path / "d", "fusion=mean", None),
        write_finished_run(tmp_path / "e", "fusion=mean,seed=1", 0.5),
    ]
    process = command("experiments.compare", *map(str, workdirs), f"--output={tmp_path}/table.md")
    assert process.returncode == 0, process.stderr
    _, _, *rows = (tmp_path / "table.md").read_text().splitlines()
    assert rows[0] == "| concat | 0.7500 | 0.7500 | 1 | 1,234 | 60 |"
    assert rows[1] == "| gmu | 0.6250 ± 0.1768 | 0.5000 | 2 | 1,234 | 60 |"
    assert rows[2] == "| mean | undefined | undefined | 2 | 1,234 | 60 |"
    process = command("experiments.compare", *map(str, workdirs[:3]), "--metric=loss", f"--output={tmp_path}/loss.md")
    assert "| gmu | 0.3750 ± 0.1768 | 0.5000 | 2 |" in (tmp_path / "loss.md").read_text().splitlines()[3]


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ([], "give directories of finished runs"),
        (["{}/a", "{}/other"], "the runs used different data: shapes/match abc, shapes/match def"),
        (["{}/a", "{}/none"], "/none: has no finished run"),
        (["{}/a", "--output={}/none/table.md"], "must be a file in an existing folder"),
    ],
)
def test_compare_command_reports_bad_input_in_one_line(tmp_path, command, flags, message):
    write_finished_run(tmp_path / "a")
    write_finished_run(tmp_path / "other", "seed=1", rows="def")
    process = command("experiments.compare", *(flag.format(tmp_path) for flag in flags))
    assert process.returncode == 2 and len(process.stderr.splitlines()) == 1
    assert message in process.stderr
