"""The ablation command: trial configs from flags, resumption after a kill, and rejected flags."""

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
from tests import tiny
from tests.errors import rejects

ROOT = Path(__file__).resolve().parents[2]
QUICKSTART = "configs/quickstart.py"
RESULTS = "trials/*/result.json"


@pytest.fixture
def start(data_dir):
    """Returns `start(directory, *flags)`, which starts a tiny ablation of one strategy and two seeds."""

    def start(directory, *flags):
        _, *config_flags = [f for f in tiny.flags({"data.dir": data_dir, "steps": 4}) if "model.fusion" not in f]
        return subprocess.Popen(
            [sys.executable, "-m", "experiments.ablate", f"--config={QUICKSTART}", "--fusions=mean", "--seeds=2",
             "--jobs=1", f"--workdir={directory}", *config_flags, *flags],
            cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        )  # fmt: skip

    return start


@pytest.mark.process
@pytest.mark.thorough
@pytest.mark.spread
@pytest.mark.parametrize(("flags", "pattern"), [((), RESULTS), (("--tune=2",), f"tuning/{RESULTS}")])
def test_ablate_command_gives_the_same_tables_after_a_kill(start, tmp_path, flags, pattern):
    uninterrupted, killed = tmp_path / "uninterrupted", tmp_path / "killed"
    output, _ = start(uninterrupted, *flags).communicate(timeout=600)
    assert ("tune     6 of 6 trials" in output) == bool(flags), output
    assert "train    6 of 6 trials" in output and "probe    2 of 2 trials" in output, output
    assert "2 seeds cannot show a difference" in output and "Undertrained, so that no claim rests on them" in output

    process = start(killed, *flags)
    deadline = time.monotonic() + 300
    while not list(killed.glob(pattern)) and process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert process.poll() is None
    process.kill()
    process.wait()
    output, _ = start(killed, *flags).communicate(timeout=600)
    for name in ("runs.csv", "claims.json"):
        assert (killed / name).read_bytes() == (uninterrupted / name).read_bytes(), output
    lines = (uninterrupted / "runs.csv").read_text().splitlines()
    assert len(lines) == 1 + 2 * 3
    assert "second" not in lines[0]
    claims = json.loads((uninterrupted / "claims.json").read_text())
    assert {one["method"] for one in claims["methods"]} >= {"mean", "image alone", "text alone", "majority"}
    page = " ".join(unescape(re.sub(r"<[^>]*>", "", (uninterrupted / "report.html").read_text())).split())
    for statement in claims["statements"]:
        assert statement["text"] in page


@pytest.mark.process
@pytest.mark.thorough
@pytest.mark.spread
def test_ablate_commands_that_share_a_folder_give_the_same_tables_when_one_is_killed(start, tmp_path):
    alone, both = tmp_path / "alone", tmp_path / "both"
    start(alone).communicate(timeout=600)
    killed, other = start(both), start(both)
    deadline = time.monotonic() + 300
    while not list(both.glob("trials/*/result.json")) and killed.poll() is None and time.monotonic() < deadline:
        time.sleep(0.05)
    assert killed.poll() is None
    held = {path.name.rpartition(".")[0] for path in (both / "leases").iterdir()}
    killed.kill()
    output, _ = other.communicate(timeout=600)
    assert other.returncode == 0 and len(held) == 2 and "train    6 of 6 trials" in output, output
    for name in ("runs.csv", "claims.json"):
        assert (both / name).read_bytes() == (alone / name).read_bytes(), output
    assert list((both / "leases").iterdir()) == []


def test_trial_config_sets_strategy_seed_and_modalities(monkeypatch):
    monkeypatch.chdir(ROOT)
    overrides = ("--config.model.encoders.text.hidden=8", "--config.model.fusion.layers=1")
    config = trial_config.config(f"{QUICKSTART}:variant=redundant", overrides, "merged_attention", 3, "")
    assert (config.seed, config.model.fusion.name, config.model.fusion.layers) == (3, "merged_attention", 1)
    assert config.data.name == "shapes/redundant"
    unimodal = trial_config.config(QUICKSTART, overrides, "", 3, "image")  # overrides of text and strategy are ignored
    assert set(unimodal.model.encoders) == {"image"}
    for key, flag in (("fusion", "--fusions"), ("seed", "--seeds")):
        with rejects("--config", f"{QUICKSTART}:{key}=1", says=flag):
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
def test_trial_command_reproduces_the_trial_config(fusion, modality, vary):
    overrides = ("--config.steps=8", "--config.optim.learning_rate=0.01")
    make = functools.partial(trial_config.config, f"{QUICKSTART}:variant=relations", overrides)
    values = {key: [value] for key, value in vary.items()}
    trials = plan.build(make, [fusion or "concat"], 1, values).trials
    (trial,) = (trial for trial in trials if trial.unimodal_baseline == bool(modality) and modality in trial.name)
    argv = shlex.split(trial_config.command(f"{QUICKSTART}:variant=relations", overrides, trial))
    assert argv[:3] == ["python", "-m", "experiments.train"]
    source, rest = cli.take_config(["train", *argv[3:]])
    assert configs.to_json(cli.make_config(source, rest[1:])) == trial.config


def test_trial_command_keeps_the_sources_objectives():
    source = f"{QUICKSTART}:objectives=unimodal,variant=match"
    make = functools.partial(trial_config.config, source, ())
    (trial, *_) = plan.build(make, ["concat"], 1, {"objectives": ["mvae"]}).trials
    argv = shlex.split(trial_config.command(source, (), trial))
    config_source, rest = cli.take_config(["train", *argv[3:]])
    assert configs.to_json(cli.make_config(config_source, rest[1:])) == trial.config
    assert set(trial.config["objectives"]) == {"unimodal", "mvae"}


def test_trial_values_are_parsed():
    assert trial_config.values("lr=1e-3,3e-4") == ("optim.learning_rate", [1e-3, 3e-4])
    assert trial_config.values("optim.name=adamw,sgd") == ("optim.name", ["adamw", "sgd"])
    for invalid in ("lr", "lr=", "=1"):
        with rejects("--vary", invalid):
            trial_config.values(invalid)


def test_search_space_is_parsed():
    assert trial_config.dimension("lr=1e-4..1e-2:log") == ("optim.learning_rate", "1e-4..1e-2:log")
    assert trial_config.dimension("model.*.dropout=none") == ("model.*.dropout", "none")
    for invalid in ("lr", "lr=", "=1"):
        with rejects("--space", invalid):
            trial_config.dimension(invalid)


def test_resources_are_parsed():
    assert trial_config.resources("") == {}
    assert trial_config.resources("CPU=4,GPU=0.5,TPU=8,accelerator_type:A100=0.001") == {
        "CPU": 4, "GPU": 0.5, "TPU": 8, "accelerator_type:A100": 0.001,
    }  # fmt: skip
    for invalid in ("GPU", "GPU=a", "=1", "GPU=1.5", "CPU=-1", "CPU=inf", "CPU=nan"):
        with rejects("--resources", invalid):
            trial_config.resources(invalid)


def test_published_scores_are_parsed():
    assert trial_config.score("CNN + LSTM, concat=0.6") == ("CNN + LSTM, concat", 0.6)
    for invalid in ("0.6", "=0.6", "a=b", "a=nan"):
        with rejects("--published", invalid):
            trial_config.score(invalid)
