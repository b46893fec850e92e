"""The command of a study: its configs, the ablations that it runs, and rejected flags."""

import json
import subprocess
import sys

import pytest

from experiments import study_plan
from tests import tiny
from tests.errors import rejects
from tests.processes import ROOT

MATCH, RELATIONS = "configs/quickstart.py:variant=match", "configs/quickstart.py:variant=relations"


def test_configs_are_separated_by_commas_before_files_and_named_by_file_and_arguments():
    assert study_plan.named_sources(["configs/leaf.py,configs/fashion.py"]) == {
        "leaf": "configs/leaf.py", "fashion": "configs/fashion.py",
    }  # fmt: skip
    given = ["configs/table.py:data=my.csv,label=x,a.py:encoder=my.py,key=1", "b.py"]
    assert study_plan.named_sources(given) == {
        "table_my.csv_x": "configs/table.py:data=my.csv,label=x", "a_my.py_1": "a.py:encoder=my.py,key=1", "b": "b.py",
    }  # fmt: skip
    assert list(study_plan.named_sources([f"{MATCH},{RELATIONS}"])) == ["quickstart_match", "quickstart_relations"]
    assert list(study_plan.named_sources(["t.py:data=/x/y z.csv"])) == ["t_-x-y-z.csv"]  # a folder's name
    assert list(study_plan.named_sources(["t.py:a=.."])) == ["t_.."]


def test_configs_that_are_missing_or_given_twice_are_rejected():
    for given in ([], [""]):
        with rejects("--configs", None, says="is required"):
            study_plan.named_sources(given)
    with rejects("--configs", MATCH, says="given twice"):
        study_plan.named_sources([f"{MATCH},{RELATIONS}", MATCH])
    with rejects("--configs", "other/leaf.py", says="in common with configs/leaf.py"):
        study_plan.named_sources(["configs/leaf.py,other/leaf.py"])


def test_each_ablation_has_the_command_that_runs_it_alone(tmp_path):
    argv = ["study", f"--configs={MATCH},{RELATIONS}", "--seeds=9", f"--workdir={tmp_path}", "--config.steps=4"]
    assert study_plan.ablate_command(argv, MATCH, tmp_path / "quickstart_match").split() == [
        "python", "-m", "experiments.ablate", f"--config={MATCH}", "--seeds=9", "--config.steps=4",
        f"--workdir={tmp_path}/quickstart_match",
    ]  # fmt: skip


@pytest.mark.thorough(but=("flags3-stepz",))
@pytest.mark.parametrize(
    ("flags", "says"),
    [
        ((), "--configs: is required"),
        ((f"--configs={RELATIONS},seed=1",), "the ablation sets seed; give --seeds"),
        ((f"--configs={MATCH}", "--workdir=gs://bucket/x"), "must be a local folder"),
        ((f"--configs={MATCH}", "--config.stepz=1"), "stepz"),
        ((f"--configs={MATCH},configs/laef.py",), "did you mean configs/leaf.py"),
    ],
)
def test_study_rejects_bad_flags_in_one_line(flags, says, command, tmp_path):
    process = command("experiments.study", f"--workdir={tmp_path}/x", *flags)
    assert process.returncode == 2 and says in process.stderr, process.stderr
    assert process.stderr.count("\n") == 1 and not (tmp_path / "x").exists()


@pytest.mark.process
@pytest.mark.thorough
@pytest.mark.spread
def test_study_command_runs_two_ablations_and_continues_with_a_third_seed(data_dir, prepare, tmp_path):
    folder = prepare("shapes/match")
    assert prepare("shapes/relations") == folder == data_dir
    _, *config_flags = [f for f in tiny.flags({"data.dir": folder, "steps": 4}) if "model.fusion" not in f]

    def run(seeds):
        argv = [sys.executable, "-m", "experiments.study", f"--configs={MATCH},{RELATIONS}", "--fusions=mean,concat",
                f"--seeds={seeds}", "--jobs=1", f"--workdir={tmp_path}", *config_flags]  # fmt: skip
        process = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, timeout=900, check=False)
        assert process.returncode == 0, process.stderr
        return process.stdout

    output = run(1)
    assert "[2/2] quickstart_relations" in output and "2 datasets cannot show a difference" in output
    for name in ("quickstart_match", "quickstart_relations"):
        assert (tmp_path / name / "report.html").exists()
        assert f'href="{name}/report.html"' in (tmp_path / "study.html").read_text()
    output = run(2)
    assert output.count("train    8 of 8 trials") == 2
    content = json.loads((tmp_path / "study.json").read_text())
    assert [dataset["seeds"] for dataset in content["datasets"]] == [[0, 1], [0, 1]]
    assert {row["method"] for row in content["methods"]} == {
        "mean", "concat", "best single modality", "best classical model", "ensemble (mean)", "ensemble (stacked)"
    }  # fmt: skip
