"""`import mmfusion`: what it offers, and a script in another folder that uses it."""

import os
import subprocess
import sys

import numpy as np
import pytest

import mmfusion
from mmfusion.analysis import baselines
from mmfusion.data import image
from mmfusion.training.restore import open_run
from tests.errors import rejects
from tests.processes import ROOT

pytestmark = pytest.mark.usefixtures("traced_once")

CONFIG = """
from tests import tiny


def get_config(arg=""):
    return tiny.config(arg, {"data.dir": DATA})
"""


@pytest.fixture(scope="module")
def config_file(data_dir, tmp_path_factory):
    """A config file of the tiny quickstart, in a folder of its own."""
    path = tmp_path_factory.mktemp("configs") / "small.py"
    path.write_text(CONFIG.replace("DATA", repr(data_dir)))
    return path


@pytest.fixture(scope="module")
def trained(config_file, tmp_path_factory):
    """A run of a fusion with attention: its directory, and what `train` returned."""
    workdir = tmp_path_factory.mktemp("run") / "run"
    return workdir, mmfusion.train(f"{config_file}:fusion=cross_attention", workdir, changes={"steps": 4})


@pytest.fixture(scope="module")
def model(trained):
    return mmfusion.load(trained[0])


@pytest.fixture(scope="module")
def rows(trained):
    """Test rows as a user has them: pixels and text."""
    split = open_run(trained[0], ["test"]).dataset.splits["test"]
    return [{"image": split.source[i]["image"], "text": split.source[i]["sentence"].decode()} for i in range(20)]


def test_public_names_exist_and_are_documented():
    assert set(mmfusion.__all__) <= set(dir(mmfusion))
    for name in mmfusion.__all__:
        value = getattr(mmfusion, name)
        assert isinstance(value, str | dict) or value.__doc__, name
    assert {"concat", "gmu"} <= set(mmfusion.FUSIONS) and "cnn" in mmfusion.ENCODERS
    assert "mvae" in mmfusion.OBJECTIVES and "image" in mmfusion.MODALITY_TYPES
    with pytest.raises(AttributeError, match="no attribute 'trains'"):
        mmfusion.trains  # noqa: B018


@pytest.mark.process
def test_import_does_not_import_jax():
    code = "import sys, mmfusion; assert not {'jax', 'flax', 'tensorflow_datasets', 'numpy'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.process
def test_train_command_imports_late_what_its_first_step_may_not_need():
    late = [
        "grain", "matplotlib", "orbax.checkpoint", "pandas", "scipy", "sklearn", "tensorflow", "tensorflow_datasets",
        "torch",
    ]  # fmt: skip
    code = f"import sys, experiments.train, mmfusion.training.train; print(*({set(late)} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert result.stdout.split() == []


@pytest.mark.loop
def test_train_accepts_a_config_and_leaves_it_as_it_was(config_file, tmp_path, trained):
    config = mmfusion.load_config(f"{config_file}:fusion=cross_attention")
    result = mmfusion.train(config, tmp_path / "run", changes={"steps": 4})
    assert config.steps == 8 and config.is_locked
    assert result["test"] == trained[1]["test"]


@pytest.mark.loop
@pytest.mark.parametrize(
    ("config", "changes", "path", "value"),
    [
        ("nowhere.py", {}, "--config", "nowhere.py"),
        ("{}", {"step": 3}, "config.step", None),
        ("{}", {"model": 3}, "config.model", None),
        ("{}", {"model.fusion.layers": 0}, "config.model.fusion.layers", 0),
    ],
)
def test_train_names_what_is_wrong(config, changes, path, value, config_file, tmp_path):
    with rejects(path, value):
        mmfusion.train(config.format(config_file), tmp_path / "run", changes=changes)
    assert not (tmp_path / "run").exists()


@pytest.mark.loop
def test_evaluate_gives_what_training_reported_and_takes_modalities(model, trained):
    scores = model.evaluate()
    assert (scores["split"], scores["modalities"], scores["step"]) == ("test", ["image", "text"], model.step)
    assert scores["accuracy"] == trained[1]["test"]["accuracy"]
    assert model.evaluate("valid")["accuracy"] == trained[1]["valid"]["accuracy"]
    assert model.evaluate(modalities=["text"])["loss"] != scores["loss"]
    with rejects("split", "tests", "test"):
        model.evaluate("tests")
    with rejects("modality", "images", "image"):
        model.evaluate(modalities=["images"])


@pytest.mark.loop
def test_predict_takes_arrays_bytes_paths_and_text(model, rows, tmp_path):
    expected = model.predict(rows)
    assert len(expected) == 20 and not any(expected.errors)
    assert expected.tasks["label"].classes == ("false", "true") and expected.values is None
    np.testing.assert_allclose(expected.probabilities.sum(axis=1), 1, rtol=1e-12)
    assert expected.labels == [("false", "true")[i] for i in expected.probabilities.argmax(axis=1)]
    (tmp_path / "0.png").write_bytes(rows[0]["image"])
    forms = [
        {"image": "0.png", "text": rows[0]["text"]},
        {"image": tmp_path / "0.png", "sentence": rows[0]["text"]},
        {"image": image.decode(rows[0]["image"], (32, 32), 3), "text": rows[0]["text"]},
    ]
    same = model.predict(forms, folder=tmp_path)
    np.testing.assert_allclose(same.probabilities, np.repeat(expected.probabilities[:1], 3, axis=0), atol=1e-6)


@pytest.mark.loop
def test_predict_reports_bad_rows_and_keeps_the_others(model, rows):
    bad = [rows[0], {"image": b"no image", "text": "x"}, {"image": 3}, {"text": ""}, {"image": "none.png"}, rows[5]]
    predicted = model.predict(bad)
    assert [bool(error) for error in predicted.errors] == [False, True, True, True, True, False]
    assert predicted.errors[3] == "every modality is absent" and "got int" in predicted.errors[2]
    assert [label is None for label in predicted.labels] == [False, True, True, True, True, False]
    assert np.isnan(predicted.probabilities[1:5]).all()
    clean = model.predict([rows[0], rows[5]])
    np.testing.assert_array_equal(predicted.probabilities[[0, 5]], clean.probabilities)
    with rejects("rows", None, says="columns image, text; it has words"):
        model.predict([{"words": "a"}])
    with rejects("rows", None, says="sequence"):
        model.predict(rows[0])
    assert model.predict([]).probabilities.shape == (0, 2)


@pytest.mark.loop
def test_features_are_fused_and_per_modality(model, rows):
    found = model.features([*rows, {"text": rows[0]["text"]}, {"image": b"no image"}])
    assert found.fused.shape[0] == 22 and set(found.modalities) == {"image", "text"}
    assert found.modalities["image"].shape == (22, model.config.model.width)
    assert found.present["image"].tolist() == [True] * 20 + [False] * 2
    assert not found.modalities["image"][20].any() and found.modalities["text"][20].any()
    np.testing.assert_array_equal(np.isnan(found.fused).any(axis=1), [False] * 21 + [True])
    # the heads read the fused features
    head = model.params["heads_label"]
    logits = found.fused[:20] @ head["kernel"] + head["bias"]
    probabilities = model.predict(rows, calibrated=False).probabilities
    np.testing.assert_allclose(
        np.log(probabilities[:, 1] / probabilities[:, 0]), logits[:, 1] - logits[:, 0], atol=1e-4
    )


@pytest.mark.loop
def test_attention_weights_sum_to_one_where_both_modalities_are_present(model, rows):
    found = model.attention([*rows[:3], {"text": rows[0]["text"]}])
    assert found.errors == [""] * 4 and found.weights
    for (query, key), weights in found.weights.items():
        assert {query, key} <= {"image", "text", *(name for pair in found.weights for name in pair)}
        sums = weights[:3].sum(axis=-1)
        assert ((np.abs(sums - 1) < 1e-5) | (sums == 0)).all() and sums.any()
        if key == "image":
            assert not weights[3].any()


@pytest.mark.loop
def test_attention_of_a_strategy_without_it_is_empty(config_file, tmp_path):
    mmfusion.train(f"{config_file}:fusion=concat", tmp_path / "run", changes={"steps": 4})
    found = mmfusion.load(tmp_path / "run").attention([{"text": "red"}])
    assert found.weights == {} and found.errors == [""]


@pytest.mark.process  # scikit-learn asks lscpu for the number of cores
@pytest.mark.thorough  # the examples of experiments/README.md run one, too
def test_ablate_ends_in_claims_and_a_table(config_file, tmp_path, monkeypatch):
    first = {kind: models[:1] for kind, models in baselines.MODELS.items()}
    monkeypatch.setattr(baselines, "MODELS", first)  # the others take most of the time
    changes = {"steps": 2, "eval_every": 2, "checkpoint_every": 2, "data.test": "test[:32]"}
    config = mmfusion.load_config(config_file)
    result = mmfusion.ablate(config, ["mean"], 1, tmp_path / "ablation", changes=changes)
    assert {"mean", "image alone", "text alone"} <= {row["method"] for row in result.table}
    scores = [row["mean"] for row in result.table]
    assert scores == sorted(scores, reverse=True) and result.errors == {}
    assert result.claims.none  # one seed supports no claim
    assert (tmp_path / "ablation" / "report.html").exists() and (tmp_path / "ablation" / "claims.json").exists()
    again = mmfusion.ablate(config, "mean", 1, tmp_path / "ablation", changes=changes)  # nothing is left to run
    assert again.table == result.table


def test_ablate_rejects_an_unknown_strategy(config_file, tmp_path):
    with rejects("--fusions", "men", "mean"):
        mmfusion.ablate(config_file, ["men"], 1, tmp_path)
    with rejects("--config", f"{config_file}:seed=3", says="--seeds"):
        mmfusion.ablate(f"{config_file}:seed=3", ["mean"], 1, tmp_path)


SCRIPT = """
import mmfusion

result = mmfusion.train("small.py:fusion=concat", "run", changes={"steps": 2, "eval_every": 2, "checkpoint_every": 2})
model = mmfusion.load("run")
assert model.evaluate()["accuracy"] == result["test"]["accuracy"]
assert mmfusion.load_config("configs/quickstart.py:fusion=gmu").model.fusion.name == "gmu"  # of the package
print(model.predict([{"text": "the red circle"}]).labels)
"""


@pytest.mark.process
def test_api_works_in_a_script_in_another_folder(config_file, tmp_path):
    (tmp_path / "small.py").write_text(config_file.read_text())
    (tmp_path / "script.py").write_text(SCRIPT)
    done = subprocess.run(
        [sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] in ("['false']", "['true']")
    assert (tmp_path / "run" / "result.json").exists()
