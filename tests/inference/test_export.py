"""An exported run of four modalities and three tasks, loaded by a process of its own without this package."""

import json
import pickle
import shutil
import subprocess
import sys

import numpy as np
import pytest

from mmfusion.config import defaults
from mmfusion.inference import export as exporting
from mmfusion.inference.export import export
from mmfusion.inference.trained_model import TrainedModel
from mmfusion.training.loop import train
from mmfusion.training.restore import open_run
from tests import planted
from tests.errors import rejects

pytestmark = [pytest.mark.usefixtures("traced_once"), pytest.mark.process]

# Runs in the exported folder: predicts pickled rows in batches of several sizes, and says what it imported.
SCRIPT = """
import pickle, sys
from load_example import Model
model, rows = Model("."), pickle.load(open(sys.argv[1], "rb"))
result = {}
for size in (1, 3, 7, len(rows)):
    result[size] = [model(rows[i : i + size]) for i in range(0, len(rows), size)]
imported = sorted({name.partition(".")[0] for name in sys.modules})
pickle.dump((result, imported), open(sys.argv[2], "wb"))
"""


def numbers(i):
    return {
        "x": i * 1e6,
        "v": [i / 8, -i, 0.5],
        "city": ("Bonn", "Oslo", "7")[i % 3],
        "day": f"2024-05-{i % 28 + 1:02}",
    }


def rows():
    """Returns rows with values in every form that both loaders read, and with every modality absent once."""
    found = [
        {"image": planted.png(i * 9 % 256), "text": f"Row {i}, number{i % 7}!", "audio": planted.wav(0.1 + i / 50, 130)}
        | numbers(i)
        for i in range(22)
    ]
    pixels = np.random.default_rng(0).integers(0, 256, (13, 17, 3), np.uint8)
    found[1] |= {"image": pixels, "audio": np.sin(np.arange(60)), "city": 7.0, "v": "[1, 2.5, -3]"}
    found[2] |= {"image": None, "day": None}
    found[3] |= {"text": "", "x": None, "audio": (100 * np.arange(50)).astype(np.int16)}
    found[4] |= {"audio": None, "city": "Rome", "image": pixels[:, :, :1]}
    found[5] = {"text": "number1 row"}
    found[6] = {"image": pixels[:8, :8]}
    found[7] = {"city": "Oslo", "x": "12.5"}
    found[8] |= {"audio": planted.wav(0.3, 40), "text": "row " * 20}
    return found


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    config = planted.config("image+text+audio", tasks="label+tags+amount", select="label/accuracy")
    config = config.copy_and_resolve_references()
    with config.unlocked():
        config.data.modalities.numbers = defaults.modality(
            "table", "x+v+city+day", categorical=("city",), dates=("day",)
        )
        config.model.encoders.numbers = defaults.encoder("table", "table_mlp", hidden=(8,))
        config.model.fusion = defaults.fusion("weighted")  # has scalar parameters
    folder = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        examples = [planted.row(i, **numbers(i)) for i in range(40)]
        planted.plant(monkeypatch, train=examples, test=examples[:20])
        train(config.lock(), folder)
    return folder


@pytest.fixture(scope="module")
def exported(workdir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "model"
    assert export(workdir, folder) == ["cpu", "cuda", "tpu"]
    return folder


def test_export_predicts_the_same_in_a_process_with_jax_alone(workdir, exported, tmp_path):
    expected = TrainedModel(open_run(workdir, [])).predict(rows())
    assert not any(expected.errors)
    (tmp_path / "rows").write_bytes(pickle.dumps(rows()))
    command = [sys.executable, "-c", SCRIPT, str(tmp_path / "rows"), str(tmp_path / "result")]
    subprocess.run(command, cwd=exported, check=True, timeout=300)
    result, imported = pickle.loads((tmp_path / "result").read_bytes())
    assert "jax" in imported and not {"mmfusion", "flax", "tensorflow_datasets", "experiments"} & {*imported}
    for parts in result.values():
        for task, found in expected.tasks.items():
            labels = [label for part in parts for label in part[task].get("labels", [])]
            assert labels == found.labels
            if found.probabilities is None:
                values = np.concatenate([part[task]["values"] for part in parts])
                np.testing.assert_allclose(values, found.values, rtol=1e-5, atol=1e-5)
            else:
                probabilities = np.concatenate([part[task]["probabilities"] for part in parts])
                np.testing.assert_allclose(probabilities, found.probabilities, atol=1e-5)
    assert np.ptp(expected.tasks["amount"].values) > 1e-3  # not a constant


def test_export_describes_the_preprocessing_as_data(workdir, exported):
    names = ["README.md", "load_example.py", "model.stablehlo", "preprocessing.json", "tokenizer.text.json"]
    assert sorted(path.name for path in exported.iterdir()) == sorted([*names, "weights.safetensors"])
    spec = json.loads((exported / "preprocessing.json").read_text())
    assert {m: section["type"] for m, section in spec["modalities"].items()} == {
        "image": "image", "text": "text", "audio": "audio", "numbers": "table"
    }  # fmt: skip
    assert spec["modalities"]["image"]["shape"] == [8, 8, 3] and spec["modalities"]["audio"]["positions"] == 100
    assert spec["modalities"]["numbers"]["fitted"]["city"] == {"categories": ["Bonn", "Oslo", "7"]}
    assert spec["tasks"]["label"]["classes"] == ["no", "yes"]
    fitted = json.loads((workdir / "calibration.json").read_text())["tasks"]
    assert spec["tasks"]["label"]["temperature"] == fitted["label"]["temperature"]
    assert spec["tasks"]["amount"]["scale"]["std"] == pytest.approx(1.15, abs=0.3)
    weights = (exported / "weights.safetensors").stat().st_size
    result = json.loads((workdir / "result.json").read_text())
    assert weights >= 4 * result["parameters"]
    assert (exported / "model.stablehlo").stat().st_size < 1e6


def test_export_writes_a_model_card(workdir, exported):
    card = (exported / "README.md").read_text()
    result = json.loads((workdir / "result.json").read_text())
    assert result["data"]["fingerprint"] in card and "28 train, 12 valid, 20 test" in card
    correct = round(result["test"]["label/accuracy"] * 20)
    # Wilson's interval at 95 %, by its formula
    p, z = correct / 20, 1.959964
    centre, spread = p + z**2 / 40, z * (p * (1 - p) / 20 + z**2 / 1600) ** 0.5
    low, high = ((centre + sign * spread) / (1 + z**2 / 20) for sign in (-1, 1))
    (line,) = [line for line in card.splitlines() if line.startswith("| label/accuracy |")]
    assert line.endswith(f"| {low:.4g} to {high:.4g} |")
    assert "Licence: unknown" in card and "temperature" in card and "| numbers | table | x+v+city+day |" in card
    code = card.partition("```python\n")[2].partition("```")[0]
    compile(code, "README.md", "exec")
    assert len(code.splitlines()) <= 10


def test_export_of_a_run_without_a_result_says_that_it_is_untested(workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run" / "result.json").unlink()
    export(tmp_path / "run", tmp_path / "model")
    assert "Not tested: the run has not finished" in (tmp_path / "model" / "README.md").read_text()


def test_export_refuses_a_folder_with_content(workdir, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model" / "mine").write_text("mine")
    for output in ("model", "model/mine"):
        with rejects(f"--output={tmp_path / output}", None, says="exists"):
            export(workdir, tmp_path / output)
    with rejects(f"--output={tmp_path / 'none/model'}", None, says="there is no folder"):
        export(workdir, tmp_path / "none/model")
    assert (tmp_path / "model" / "mine").read_text() == "mine"


def test_export_is_whole_or_not_there(workdir, tmp_path, monkeypatch):
    (tmp_path / "model").mkdir()

    def fail(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(exporting, "write_json", fail)
    with rejects(f"--output={tmp_path / 'model'}", None, says="No space left on device"):
        export(workdir, tmp_path / "model")
    assert [path.name for path in tmp_path.iterdir()] == ["model"] and not list((tmp_path / "model").iterdir())


def test_export_command_writes_and_then_refuses_the_folder(workdir, command, tmp_path):
    arguments = (f"--workdir={workdir}", f"--output={tmp_path}/model")
    process = command("experiments.export", *arguments)
    assert (process.returncode, process.stderr) == (0, "")
    assert process.stdout == f"{tmp_path}/model: a program for cpu, cuda, tpu; README.md says how to load it\n"
    process = command("experiments.export", *arguments)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1 and "exists; give a folder" in process.stderr


@pytest.fixture(scope="module")
def loaded(exported):
    """The example loader, imported into this process."""
    sys.path.insert(0, str(exported))
    try:
        import load_example
    finally:
        sys.path.remove(str(exported))
    return load_example.Model(exported)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": ""}, "row 0: every modality is absent"),
        ({"image": b"none"}, "row 0, image: cannot identify image file"),
        ({"v": [1, 2]}, "row 0, numbers: column 'v' has 2 values, not 3"),
        ({"x": "many"}, "row 0, numbers: could not convert"),
        ({"audio": np.zeros((2, 50))}, r"row 0, audio: samples are \[2, 50\], not \[S\]"),
        ({"image": np.zeros((8, 8, 3))}, "row 0, image: pixels are float64"),
    ],
)
def test_example_loader_refuses_a_row_in_one_line(row, message, loaded):
    with pytest.raises(ValueError, match=message) as raised:
        loaded([row])
    assert "\n" not in str(raised.value)


def test_example_loader_takes_decoded_arrays_of_any_modality(loaded):
    (inputs, masks, _), expected = loaded.preprocess(rows()[:1]), loaded(rows()[:1])
    section = loaded.spec["modalities"]["numbers"]
    loaded.spec["modalities"]["numbers"] = section | {"type": "graph"}
    try:
        with pytest.raises(
            ValueError, match=r"reads no graph: give the arrays .input, mask. .float32\[12\], bool\[12\]"
        ):
            loaded(rows()[:1])
        found = loaded([{m: (inputs[m][0], masks[m][0]) for m in inputs}])
    finally:
        loaded.spec["modalities"]["numbers"] = section
    np.testing.assert_array_equal(found["label"]["probabilities"], expected["label"]["probabilities"])
