"""Runs side by side: what is one method, what it is called, and what its table says."""

import json
from pathlib import Path

import pytest

from configs import quickstart
from mmfusion import config as configs
from mmfusion.analysis import runs
from mmfusion.errors import UserError


def finished(folder: Path, arg: str = "", accuracy: float | None = 0.5, rows: str = "abc", **changes) -> Path:
    config = quickstart.get_config(arg)
    config.update_from_flattened_dict({key.replace("__", "."): value for key, value in changes.items()})
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(configs.to_json(config)))
    scores = {"accuracy": accuracy, "loss": 1 - accuracy if accuracy is not None else None}
    result = {
        "valid": scores, "test": scores, "parameters": 1234, "seconds": 60.0, "steps": 10, "device": "1 x cpu",
        "data": {"name": "shapes/match", "fingerprint": arg, "rows": rows, "content": {}}, "versions": {"jax": "0"},
    }  # fmt: skip
    (folder / "result.json").write_text(json.dumps(result))
    return folder


def test_methods_are_named_by_what_sets_them_apart(tmp_path):
    made = [
        finished(tmp_path / "a", "fusion=gmu,seed=1", 0.75),
        finished(tmp_path / "b", "fusion=gmu,seed=0", 0.5, data__dir="elsewhere"),
        finished(tmp_path / "c", "fusion=concat"),
        finished(tmp_path / "d", "fusion=concat", optim__learning_rate=0.5),
    ]
    found = {method.name: method for method in runs.methods([runs.read(run) for run in made])}
    rate = quickstart.get_config().optim.learning_rate
    assert set(found) == {"gmu", f"concat optim.learning_rate={rate}", "concat optim.learning_rate=0.5"}
    assert found["gmu"].scores("test", "accuracy") == [0.5, 0.75]  # by seed
    assert runs.mean_and_deviation([0.5, 0.75]) == (0.625, pytest.approx(0.25 / 2**0.5))
    assert runs.mean_and_deviation([0.5]) == (0.5, None)


def test_the_same_run_twice_is_refused(tmp_path):
    one, other = finished(tmp_path / "a"), finished(tmp_path / "b")
    with pytest.raises(UserError, match=r"a and \S+b have the same config and seed"):
        runs.methods([runs.read(one), runs.read(other)])


def test_what_is_no_finished_run_is_refused(tmp_path):
    (finished(tmp_path / "a") / "result.json").unlink()
    (finished(tmp_path / "b") / "result.json").write_text("{")
    with pytest.raises(UserError, match=r"a has no finished run: result\.json is missing"):
        runs.read(tmp_path / "a")
    with pytest.raises(UserError, match="cannot be read as JSON"):
        runs.read(tmp_path / "b")
    with pytest.raises(UserError, match=r"no metric 'acuracy': did you mean accuracy"):
        runs.methods([runs.read(finished(tmp_path / "c"))])[0].scores("test", "acuracy")


def test_the_command_sorts_best_first_and_writes_the_table(tmp_path, command):
    made = [
        finished(tmp_path / "a", "fusion=gmu,seed=0", 0.75),
        finished(tmp_path / "b", "fusion=gmu,seed=1", 0.5),
        finished(tmp_path / "c", "fusion=concat", 0.75),
        finished(tmp_path / "d", "fusion=mean", None),
        finished(tmp_path / "e", "fusion=mean,seed=1", 0.5),
    ]
    done = command("experiments.compare", *map(str, made), f"--output={tmp_path}/table.md")
    assert done.returncode == 0, done.stderr
    _, _, *rows = (tmp_path / "table.md").read_text().splitlines()
    assert rows[0] == "| concat | 0.7500 | 0.7500 | 1 | 1,234 | 60 |"
    assert rows[1] == "| gmu | 0.6250 ± 0.1768 | 0.5000 | 2 | 1,234 | 60 |"
    assert rows[2] == "| mean | undefined | undefined | 2 | 1,234 | 60 |"
    done = command("experiments.compare", *map(str, made[:3]), "--metric=loss", f"--output={tmp_path}/loss.md")
    assert "| gmu | 0.3750 ± 0.1768 | 0.5000 | 2 |" in (tmp_path / "loss.md").read_text().splitlines()[3]


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        ([], "give directories of finished runs"),
        (["{}/a", "{}/other"], "the runs used different data: shapes/match abc, shapes/match def"),
        (["{}/a", "{}/none"], "none has no finished run"),
        (["{}/a", "--output={}/none/table.md"], "there is no folder"),
    ],
)
def test_bad_input_is_one_line(tmp_path, command, flags, said):
    finished(tmp_path / "a")
    finished(tmp_path / "other", "seed=1", rows="def")
    done = command("experiments.compare", *(flag.format(tmp_path) for flag in flags))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1
    assert said in done.stderr
