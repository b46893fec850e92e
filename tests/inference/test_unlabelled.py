"""A table whose test split has no labels, and tasks that rows lack: trained, evaluated and predicted."""

import csv
import json

import pytest

from mmfusion.analysis.ablation.plan import Trial
from mmfusion.analysis.ablation.runner import TRAINING, run_stage
from mmfusion.config import defaults
from mmfusion.config.from_table import propose
from mmfusion.inference.evaluate import evaluate
from mmfusion.inference.predict import predict
from mmfusion.training.loop import train
from tests import tiny
from tests.errors import rejects

pytestmark = pytest.mark.usefixtures("traced_once")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on 80 rows with two labels, each missing in some, whose test rows have -1 and nothing in their place."""
    folder = tmp_path_factory.mktemp("unlabelled")
    rows = [
        {
            "x": i % 9 / 3, "colour": "rgb"[i % 3],
            "kind": -1 if i >= 60 else "" if i % 4 == 0 else i % 2,
            "price": "" if i >= 60 or i % 3 == 0 else i / 3,
            "split": "test" if i >= 60 else "train",
        }
        for i in range(80)
    ]  # fmt: skip
    with (folder / "t.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    config, args = defaults.begin("", "mean")
    propose(config, str(folder / "t.csv"), "kind+price")
    defaults.finish(config, args)
    small = {"steps": 4, "eval_every": 2, "checkpoint_every": 2, "batch_size": 16, "log_every": 1, "model.width": 8}
    for path, value in {**small, "data.valid_fraction": 0.3}.items():
        tiny.put(config, path, value)
    return folder, train(config, folder / "run")


@pytest.mark.loop
def test_run_without_test_labels_is_not_tested_and_says_so(run, capsys):
    folder, result = run
    assert {result["test"][name] for name in ("loss", "kind/accuracy", "price/mae")} == {None}
    assert (result["test"]["rows"], result["test"]["examples"]) == (0, 0)
    assert result["data"]["examples"]["test"] == 20
    valid = result["valid"]
    assert 0 < valid["kind/examples"] < valid["examples"] and 0 < valid["price/examples"] < valid["examples"]
    assert valid["loss"] == pytest.approx(valid["kind/loss"] + valid["price/loss"])
    lines = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
    assert all(line["task/kind"] > 0 and line["task/price"] > 0 for line in lines if "grad_norm" in line)


@pytest.mark.loop
def test_evaluate_refuses_a_split_without_labels(run):
    folder, result = run
    with rejects("split", "test", says="has no label in any row"):
        evaluate(folder / "run")
    assert evaluate(folder / "run", "valid")["kind/accuracy"] == result["valid"]["kind/accuracy"]


@pytest.mark.loop
def test_trial_of_an_ablation_is_refused_before_it_is_trained(run, tmp_path):
    config = json.loads((run[0] / "run" / "config.json").read_text())
    del config["checksum"]
    trial = Trial("concat", "concat", "concat", "", False, {}, config)
    assert "config.data.test" in run_stage(trial, tmp_path, TRAINING)
    assert not list(tmp_path.rglob("metrics.jsonl"))


@pytest.mark.loop
def test_predict_takes_rows_without_labels_and_says_so(run):
    folder, _ = run
    lines = (folder / "t.csv").read_text().splitlines()
    (folder / "new.csv").write_text("\n".join([lines[0], *lines[61:]]))
    reported = []
    assert predict(folder / "run", folder / "new.csv", folder / "out.csv", report=reported.append) == (20, 20, [])
    said = [line.partition(": ")[2] for line in reported]
    assert said == [f"no row has a label in column {name!r}; all are predicted" for name in ("kind", "price")]
    reported.clear()
    predict(folder / "run", folder / "t.csv", folder / "out.csv", report=reported.append)
    assert not reported
