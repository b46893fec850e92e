import importlib.util
import json

import pytest

from configs import table as table_config
from mmfusion import config as configs
from mmfusion.config import defaults
from mmfusion.config.from_table import propose
from mmfusion.config.render import render
from mmfusion.models.fusion import FUSIONS

ROWS = [
    {"review": f"a {('good', 'bad')[i % 2]} film of {i} minutes", "stars": 5 - 4 * (i % 2), "year": 1990 + i % 9,
     "sold": i % 3 == 0, "label": ("pos", "neg")[i % 2]}
    for i in range(60)
]  # fmt: skip


@pytest.fixture
def path(tmp_path):
    path = tmp_path / "films.jsonl"
    path.write_text("\n".join(map(json.dumps, ROWS)))
    return path


def test_rendered_config_is_the_proposed_one(path, tmp_path):
    config, args = defaults.begin("fusion=gmu,seed=3", "concat")
    propose(config, str(path))
    (tmp_path / "films.py").write_text(render(config, "Films."))
    spec = importlib.util.spec_from_file_location("films", tmp_path / "films.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    expected = defaults.finish(config, args)
    assert module.get_config("seed=3").to_dict() == expected.to_dict()
    assert table_config.get_config(f"data={path},fusion=gmu,seed=3").to_dict() == expected.to_dict()
    for name in FUSIONS:
        configs.check(table_config.get_config(f"data={path},fusion={name}"), devices=1)


def test_inspect_shows_columns_and_writes_a_config_and_a_picture(path, tmp_path, command):
    config, plot = tmp_path / "films.py", tmp_path / "films.png"
    done = command("experiments.inspect", str(path), f"--output={config}", f"--plot={plot}")
    assert done.returncode == 0, done.stderr
    for text in ("stars", "not read:", "rows    60:", "label   2 classes: pos 50.0%, neg 50.0%"):
        assert text in done.stdout
    assert plot.read_bytes().startswith(b"\x89PNG")
    run = command("experiments.train", f"--config={config}", f"--workdir={tmp_path / 'run'}", "--config.steps=2",
                  "--config.model.width=8", "--config.eval_every=2")  # fmt: skip
    assert run.returncode == 0, run.stderr
    predicted = command("experiments.predict", f"--workdir={tmp_path / 'run'}", f"--input={path}",
                        f"--output={tmp_path / 'out.csv'}")  # fmt: skip
    assert predicted.returncode == 0, predicted.stderr
    assert "60 of 60 rows predicted" in predicted.stdout


@pytest.mark.thorough
def test_run_of_a_table_is_evaluated_and_predicts_on_another_one(path, tmp_path, command):
    run = command("experiments.train", f"--config=configs/table.py:data={path}", f"--workdir={tmp_path / 'run'}",
                  "--config.steps=2", "--config.model.width=8", "--config.eval_every=2")  # fmt: skip
    assert run.returncode == 0, run.stderr
    other = tmp_path / "other.jsonl"  # of one class only, with a category that training did not have
    other.write_text("\n".join(json.dumps({**row, "sold": "unclear"}) for row in ROWS if row["label"] == "pos"))
    evaluated = command("experiments.evaluate", f"--workdir={tmp_path / 'run'}", f"--data={other}")
    assert evaluated.returncode == 0, evaluated.stderr
    assert "30" in evaluated.stdout
    predicted = command("experiments.predict", f"--workdir={tmp_path / 'run'}", f"--input={other}",
                        f"--output={tmp_path / 'out.csv'}")  # fmt: skip
    assert "30 of 30 values of table column 'sold' are unknown categories" in predicted.stdout, predicted


def test_inspect_refuses_in_one_line(path, tmp_path, command):
    for arguments, says in (
        ([], "give one table"),
        ([str(path), "--label=lable"], "did you mean label?"),
        ([str(tmp_path / "none.csv")], "cannot be read"),
        ([str(path), f"--output={tmp_path}/none/x.py"], "existing folder"),
    ):
        done = command("experiments.inspect", *arguments)
        assert done.returncode == 2 and says in done.stderr and done.stderr.count("\n") == 1, done.stderr
