"""The ablation command: from flags to claims, through kills, and what it refuses."""

import functools
import json
import re
import shlex
import subprocess
import sys
import time
from html import unescape
from pathlib import Path

import pytest

from experiments import cli, trial_config
from mmfusion import config as configs
from mmfusion.analysis.ablation import plan
from mmfusion.errors import UserError
from tests import tiny

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = "configs/quickstart.py"


@pytest.fixture
def start(data_dir):
    """`start(directory, *flags)` -> the process of a tiny ablation of a strategy and two seeds."""

    def start(directory, *flags):
        own = [flag for flag in tiny.flags({"data.dir": data_dir, "steps": 4}) if "model.fusion" not in flag]
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.ablate", f"--config={QUICKSTART}", "--fusions=mean", "--seeds=2",
             "--jobs=1", f"--workdir={directory}", *own, *flags],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    return start


@pytest.mark.process
@pytest.mark.thorough
@pytest.mark.spread
def test_ablate_command_after_a_kill_ends_in_the_same_tables(start, tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    said, _ = start(whole).communicate(timeout=600)
    assert "train    6 of 6 trials" in said and "probe    2 of 2 trials" in said, said
    assert "2 seeds cannot show a difference" in said

    process = start(broken)
    deadline = time.monotonic() + 300
    while not list(broken.glob("trials/*/result.json")) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None
    process.kill()
    process.wait()
    said, _ = start(broken).communicate(timeout=600)
    for name in ("runs.csv", "claims.json"):
        assert (broken / name).read_bytes() == (whole / name).read_bytes(), said
    lines = (whole / "runs.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 3
    assert "second" not in lines[0]
    claims = json.loads((whole / "claims.json").read_text())
    assert {one["method"] for one in claims["methods"]} >= {"mean", "image alone", "text alone", "majority"}
    page = " ".join(unescape(re.sub(r"<[^>]*>", "", (whole / "report.html").read_text())).split())
    for statement in claims["statements"]:
        assert statement["text"] in page


def test_trial_config_sets_strategy_seed_and_modalities(monkeypatch):
    monkeypatch.chdir(ROOT)
    overrides = ("--config.model.encoders.text.hidden=8", "--config.model.fusion.layers=1")
    config = trial_config.config(f"{QUICKSTART}:variant=redundant", overrides, "merged_attention", 3, "")
    assert (config.seed, config.model.fusion.name, config.model.fusion.layers) == (3, "merged_attention", 1)
    assert config.data.name == "shapes/redundant"
    alone = trial_config.config(QUICKSTART, overrides, "", 3, "image")  # has neither text nor a strategy to set
    assert set(alone.model.encoders) == {"image"}
    for key, flag in (("fusion", "--fusions"), ("seed", "--seeds")):
        with pytest.raises(UserError, match=f"the ablation sets {key}; give {flag}"):
            trial_config.config(f"{QUICKSTART}:{key}=1", (), "mean", 0, "")


@pytest.mark.parametrize(
    ("fusion", "modality", "vary"),
    [
        ("gmu", "", {}),
        ("concat", "", {"optim.name": "sgd", "model.width": 16}),
        ("", "text", {"data.missing": 0.3}),
        ("mean", "", {"objectives": "mvae+modality_dropout"}),
    ],
)
def test_trial_command_trains_that_cell(fusion, modality, vary):
    overrides = ("--config.steps=8", "--config.optim.learning_rate=0.01")
    make = functools.partial(trial_config.config, f"{QUICKSTART}:variant=relations", overrides)
    values = {key: [value] for key, value in vary.items()}
    trials = plan.build(make, [fusion or "concat"], 1, values).trials
    (trial,) = (trial for trial in trials if trial.unimodal_baseline == bool(modality) and modality in trial.name)
    argv = shlex.split(trial_config.command(f"{QUICKSTART}:variant=relations", overrides, trial))
    assert argv[:3] == ["python", "-m", "experiments.train"]
    source, rest = cli.take_config(["train", *argv[3:]])
    assert configs.to_json(cli.make_config(source, rest[1:])) == trial.config


def test_trial_command_keeps_the_objectives_of_its_source():
    source = f"{QUICKSTART}:objectives=unimodal,variant=match"
    make = functools.partial(trial_config.config, source, ())
    (trial, *_) = plan.build(make, ["concat"], 1, {"objectives": ["mvae"]}).trials
    argv = shlex.split(trial_config.command(source, (), trial))
    given, rest = cli.take_config(["train", *argv[3:]])
    assert configs.to_json(cli.make_config(given, rest[1:])) == trial.config
    assert set(trial.config["objectives"]) == {"unimodal", "mvae"}


def test_trial_values_are_parsed():
    assert trial_config.values("lr=1e-3,3e-4") == ("optim.learning_rate", [1e-3, 3e-4])
    assert trial_config.values("optim.name=adamw,sgd") == ("optim.name", ["adamw", "sgd"])
    for wrong in ("lr", "lr=", "=1"):
        with pytest.raises(UserError) as error:
            trial_config.values(wrong)
        assert (error.value.path, error.value.value) == ("--vary", wrong)


def test_published_scores_are_parsed():
    assert trial_config.score("CNN + LSTM, concat=0.6") == ("CNN + LSTM, concat", 0.6)
    for wrong in ("0.6", "=0.6", "a=b", "a=nan"):
        with pytest.raises(UserError, match="must be NAME=SCORE") as error:
            trial_config.score(wrong)
        assert (error.value.path, error.value.value) == ("--published", wrong)
