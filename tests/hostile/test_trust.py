"""Runs of someone else, whose config names code to import and places to read from."""

import json
import shutil

import pytest

from experiments import reproduce
from mmfusion import config as configs
from mmfusion.analysis import runs
from mmfusion.data import trust
from mmfusion.inference.evaluate import evaluate
from mmfusion.inference.trained_model import load
from mmfusion.training import replay
from mmfusion.training.loop import train
from mmfusion.training.restore import read_config, trust_run
from tests import planted
from tests.errors import rejects

PLACES = {"data__dir": "/elsewhere/data", "data__manual_dir": "/elsewhere/archives"}


@pytest.fixture
def forget(tmp_path, monkeypatch):
    """Returns a function that makes this process one of a user who has trained nothing."""

    def forget(home="other"):
        monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / home))
        monkeypatch.setattr(trust, "_named", set())

    forget("own")
    return forget


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Returns the directory of a finished run whose config names two places."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        plant(patch)
        train(planted.config("text", **PLACES, data__cache=f"{workdir}-cache"), workdir)
    shutil.rmtree(f"{workdir}-cache")
    return workdir


def plant(monkeypatch):
    rows = [planted.row(i) for i in range(40)]
    planted.plant(monkeypatch, train=rows, test=rows[:20])


@pytest.fixture
def run(trained, tmp_path, monkeypatch):
    """Returns a copy of that run, with its data planted."""
    plant(monkeypatch)
    return shutil.copytree(trained, tmp_path / "run")


# --- Places ---


@pytest.mark.loop
def test_evaluate_reads_no_place_that_only_the_run_names(run, trained, forget):
    model = load(run)
    for attempt in (lambda: evaluate(run), lambda: model.evaluate("valid")):
        with rejects("config.data.dir", "/elsewhere/data", says="--trust"):
            attempt()
    assert model.predict([{"text": "row"}]).errors == [""]  # reads no data
    assert not trained.with_name("run-cache").exists()


@pytest.mark.loop
@pytest.mark.parametrize("way", ["trust", "trust of load", "places given again"])
def test_evaluate_reads_a_place_that_the_user_accepts(way, run, forget, monkeypatch):
    if way == "trust":
        trust_run(run)
        monkeypatch.setattr(trust, "_named", set())  # another process of this user
    if way == "places given again":
        for _, place in trust.places(configs.to_json(read_config(run))):
            trust.name_place(place)
    assert load(run, trust=way == "trust of load").evaluate("test")["rows"] == 20


@pytest.mark.loop
def test_evaluate_reads_the_data_folder_that_the_user_gives(run, trained, forget):
    for place in (PLACES["data__manual_dir"], f"{trained}-cache"):
        trust.name_place(place)
    assert evaluate(run, "test", data_dir="/mine")["rows"] == 20
    assert load(run, data_dir="/mine").evaluate("test")["rows"] == 20
    with rejects("config.data.dir"):
        evaluate(run, "test")


@pytest.mark.loop
def test_evaluate_reads_the_data_of_runs_of_this_user(run, forget, monkeypatch):
    train(read_config(run), run)  # it had finished: nothing but the directory is checked
    monkeypatch.setattr(trust, "_named", set())
    assert evaluate(run, "test")["rows"] == 20


@pytest.mark.loop
def test_replay_and_reproduce_read_no_place_that_only_the_run_names(run, forget):
    with rejects("config.data.dir"):
        replay.replay(run, 1)
    with rejects("config.data.manual_dir"):
        reproduce.relocated(read_config(run), ["--config.data.dir=/mine"])
    given = ["--config.data.dir=/mine", "--config.data.manual_dir=/mine", "--config.data.cache=off"]
    assert reproduce.relocated(read_config(run), given).data.dir == "/mine"


def test_places_are_those_that_a_config_reads(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = {
        "data": {
            "name": "my.csv", "fallback_name": "shapes", "dir": "gs://bucket/x", "manual_dir": "", "cache": "rows",
            "modalities": {
                "text": {"tokenizer": "t.json"}, "words": {"tokenizer": "word"}, "facts": {"triples": "a.tsv"},
            },
        },
        "model": {"encoders": {
            "text": {"init": "google/bert"}, "image": {"init": "run:runs/x"}, "audio": {"init": "a.safetensors"},
        }},
    }  # fmt: skip
    assert dict(trust.places(config)) == {
        "data.name": f"{tmp_path}/my.csv",
        "data.dir": "gs://bucket/x",
        "data.cache": f"{tmp_path}/rows",
        "data.modalities.text.tokenizer": f"{tmp_path}/t.json",
        "data.modalities.facts.triples": f"{tmp_path}/a.tsv",
        "model.encoders.text.init": "google/bert",
        "model.encoders.image.init": f"run:{tmp_path}/runs/x",
        "model.encoders.audio.init": f"{tmp_path}/a.safetensors",
    }


def test_remember_works_without_a_home_directory(tmp_path, monkeypatch, forget):
    (tmp_path / "file").write_text("")
    forget("file")  # no folder can be made in it
    trust.remember({"data": {"dir": "/mine"}})
    trust.check_places({"dir": "/mine"})
    monkeypatch.setattr(trust, "_named", set())
    with rejects("config.data.dir", "/mine"):
        trust.check_places({"dir": "/mine"})


def test_trusted_reads_a_damaged_file(tmp_path, forget):
    trust.remember({"data": {"dir": "/mine"}})
    path = tmp_path / "own" / "mmfusion" / "trusted"
    path.write_text('"/a"\nno JSON\n[1]\n' + path.read_text() + '"/b')
    trust.check_places({"dir": "/mine", "manual_dir": "/a"})
    with rejects("config.data.dir"):
        trust.check_places({"dir": "/b"})


@pytest.mark.loop
def test_load_reads_no_dataset_that_only_the_checkpoint_names(run, monkeypatch):
    from mmfusion.checkpoints.manager import Checkpoints

    meta = Checkpoints.meta

    def renamed(self, step):
        found = meta(self, step)
        return {**found, "data": {**found["data"], "name": "planted_code:Builder"}}

    monkeypatch.setattr(Checkpoints, "meta", renamed)
    with rejects("config.data.name", None):
        evaluate(run, "test")


# --- Code ---


def hostile(folder, key, name="planted_code:Class"):
    """Writes the config of a run that names the class at a key, and what else a finished run has."""
    values = configs.to_json(planted.config("text"))
    if key == "objectives":
        values["objectives"] = {name: {}}
    elif key == "objective's name":
        values["objectives"] = {"mine": {"name": name}}
    else:
        *sections, last = key.split(".")
        section = values
        for part in sections:
            section = section[part]
        section[last] = name
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(values))
    (folder / "result.json").write_text("{}")
    return folder


KEYS = ("model.fusion.name", "model.encoders.text.name", "data.modalities.text.kind", "data.name", "data.fallback_name",
        "data.targets.label.kind", "optim.name", "optim.schedule.name", "objectives", "objective's name")  # fmt: skip


@pytest.mark.parametrize("key", KEYS)
def test_read_config_imports_no_code_that_only_the_run_names(key, tmp_path, code, forget):
    folder = hostile(tmp_path / "run", key)
    for read in (read_config, runs.read, lambda folder: train(planted.config("text"), folder)):
        with rejects(f"config.{key}" if "." in key else rejected_key(key), "planted_code:Class"):
            read(folder)
    assert not code.exists()


def rejected_key(key):
    return "config.objectives.planted_code:Class" if key == "objectives" else "config.objectives.mine.name"


@pytest.mark.parametrize(
    "name", ["pair:shapes+planted_code:Class:by=index", "planted_code:Class/x.csv", "huggingface:planted", "pair:Class"]
)
def test_read_config_imports_no_dataset_of_another_package(name, tmp_path, code, forget):
    with rejects("config.data.name"):
        read_config(hostile(tmp_path / "run", "data.name", name))
    assert not code.exists()


@pytest.mark.parametrize(
    "name", ["shapes/match", "mnist:3.0.1", "mnist/big:1.*.*", "pair:shapes/a+mnist:by=label", "a.csv"]
)
def test_modules_leaves_out_datasets_of_tfds(name):
    assert not list(trust.modules({"data": {"name": name}}))


def test_modules_leaves_out_own_code_and_features():
    values = {
        "model": {"fusion": {"name": "mmfusion.models.fusion.gmu:GMU"}},
        "data": {"modalities": {"a": {"feature": "time:start", "kind": "table"}}, "train": "train[:50%]"},
    }
    assert not list(trust.modules(values))


def test_read_config_imports_code_that_the_user_has_trained_with(tmp_path, forget, monkeypatch):
    name = "tests.models.test_extensions:Sum"
    folder = hostile(tmp_path / "run", "model.fusion.name", name)
    with rejects("config.model.fusion.name", name):
        read_config(folder)
    trust_run(folder)
    monkeypatch.setattr(trust, "_named", set())
    assert trust.checked(configs.read_json(folder / "config.json"), folder)["model"]["fusion"]["name"] == name
