"""What would change a result without a word: other rows, another order of classes, overflow, cut recordings."""

import dataclasses
import io
import json
import os
from pathlib import Path
from typing import Any, ClassVar

import jax
import numpy as np
import pytest
import soundfile
import tensorflow_datasets as tfds

from mmfusion import config as configs
from mmfusion.data import audio, content, dataset, missing, sources, trust
from mmfusion.data.batch import Batch
from mmfusion.distributed import hosts
from mmfusion.inference import load_example
from mmfusion.inference import rows as input_rows
from mmfusion.inference.predictions import NOT_FINITE, Uncertainty, predictions
from mmfusion.inference.trained_model import TrainedModel
from mmfusion.objectives import Task
from mmfusion.tracking import provenance
from mmfusion.training.loop import train
from mmfusion.training.restore import open_run
from tests import planted
from tests.errors import rejects

pytestmark = pytest.mark.usefixtures("traced_once")

SIGNS = "tests.hostile.test_silent_difference:Signs"


class Signs(tfds.core.GeneratorBasedBuilder):
    """Rows with a class and a list of classes, whose order is `NAMES`; `TEXTS` are their texts."""

    VERSION = tfds.core.Version("1.0.0")
    NAMES: ClassVar[tuple[str, ...]] = ("minus", "none", "plus")
    TEXTS: ClassVar[list[str]] = [f"sign {i}" for i in range(150)]

    def _info(self) -> tfds.core.DatasetInfo:
        label = tfds.features.ClassLabel(names=self.NAMES)
        features = {"text": tfds.features.Text(), "label": label, "tags": tfds.features.Sequence(label)}
        return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(features))

    def _split_generators(self, dl_manager: Any) -> dict[str, Any]:
        return {"train": self._generate_examples(self.TEXTS), "test": self._generate_examples(self.TEXTS[:9])}

    def _generate_examples(self, texts: list[str]) -> Any:
        for i, text in enumerate(texts):
            name = ("minus", "none", "plus")[i % 3]
            yield i, {"text": text, "label": name, "tags": [name]}


def signs(folder: Path, task: str = "label", **options: Any) -> dataset.Dataset:
    """Opens `Signs` as it is prepared in a folder, or prepares it there."""
    config = planted.config("text", tasks=task, data__name=SIGNS, data__dir=str(folder))
    return dataset.load(configs.read(config).data, seed=0, **options)


# --- The order of classes ---


def named_targets(found: dataset.Dataset, task: str) -> dict[str, str]:
    """Returns the name of each test row's class by its text."""
    split = found.splits["test"]
    batch = split.take(np.arange(len(split)))
    classes = batch.targets[task] if task == "label" else np.argmax(batch.targets[task], axis=1)
    texts = [split.source[int(i)]["text"] for i in split.ids]
    return {text: found.class_names[task][int(c)] for text, c in zip(texts, classes, strict=True)}


@pytest.mark.parametrize("task", ["label", "tags"])
def test_classes_in_another_order_are_matched_by_name(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = signs(tmp_path / "first", task)
    assert first.class_names[task] == Signs.NAMES
    monkeypatch.setattr(Signs, "NAMES", ("plus", "minus", "none"))
    trust.name_place(str(tmp_path / "again"))
    again = signs(tmp_path / "again", task, splits=("test",), saved=first.saved())
    assert again.class_names[task] == ("minus", "none", "plus")
    assert named_targets(again, task) == named_targets(first, task)
    with rejects("RUN", None, says="class_names"):
        signs(tmp_path / "again", task).check_unchanged(first.saved(), "RUN")


@pytest.mark.parametrize("task", ["label", "tags"])
def test_classes_that_a_run_does_not_know_are_refused(task: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    first = signs(tmp_path / "first", task)
    monkeypatch.setattr(Signs, "NAMES", ("plus", "minus", "none", "other"))
    trust.name_place(str(tmp_path / "again"))
    with rejects("config.data.name", SIGNS, says="it does not know other"):
        signs(tmp_path / "again", task, splits=("test",), saved={**first.saved(), "name": SIGNS})


def test_class_number_outside_the_classes_of_another_order_is_refused(monkeypatch: pytest.MonkeyPatch):
    rows = [planted.row(i) for i in range(40)]
    planted.plant(monkeypatch, train=rows, test=rows[:9])
    data = configs.read(planted.config("text")).data
    saved = dataset.load(data, seed=0).saved()
    planted.plant(monkeypatch, {"label": ("yes",)}, test=rows[:9])  # with rows of class 1
    with rejects("config.data.targets", says="row 1, target 'label'"):
        dataset.load(data, seed=0, splits=("test",), saved=saved)


def test_classes_of_a_list_without_names_are_those_of_an_older_run(tmp_path: Path):
    found = signs(tmp_path, "tags")
    saved = {**found.saved(), "class_names": {"tags": ["0", "1", "2"]}}
    found.check_unchanged(saved, "RUN")
    assert signs(tmp_path, "tags", splits=("test",), saved=saved).class_names == {"tags": ("0", "1", "2")}


# --- The checksum of all rows ---


@pytest.mark.parametrize("row", [0, 1, 77, 149])
def test_content_covers_every_row(row: int, monkeypatch: pytest.MonkeyPatch):
    rows = [planted.row(i) for i in range(150)]

    def load() -> dataset.Dataset:
        return dataset.load(configs.read(planted.config("text")).data, seed=0)

    planted.plant(monkeypatch, train=rows, test=rows[:9])
    saved = load().saved()
    load().check_unchanged(saved, "RUN")
    changed = [*rows[:row], {**rows[row], "text": "another"}, *rows[row + 1 :]]
    planted.plant(monkeypatch, train=changed, test=rows[:9])
    with rejects("RUN", None, says="rows of train"):
        load().check_unchanged(saved, "RUN")


def test_content_of_a_prepared_dataset_is_kept_in_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    computed = []
    checksum = content.checksum
    monkeypatch.setattr(content, "checksum", lambda *args: computed.append(1) or checksum(*args))
    first = signs(tmp_path)
    assert len(computed) == 2  # the splits train, of which valid is a part, and test
    assert signs(tmp_path).content == first.content and len(computed) == 2
    (kept,) = tmp_path.rglob(sources.KEPT)
    damaged = {**json.loads(kept.read_text()), "splits": "x"}
    for text in ("", "[]", "{", json.dumps(damaged)):
        kept.write_text(text)
        assert signs(tmp_path).content == first.content
    computed.clear()
    records = next(tmp_path.rglob("*test.array_record*"))
    os.utime(records, ns=(1, 1))
    assert signs(tmp_path).content == first.content and len(computed) == 2
    kept.unlink()
    kept.mkdir()  # nothing can be kept
    assert signs(tmp_path).content == first.content


def test_content_of_a_table_is_read_again_where_a_file_changes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("mmfusion.data.cache.SECONDS", 0)
    for i in range(150):
        (tmp_path / f"{i}.png").write_bytes(planted.png(i))
    lines = [f"{i}.png,{'ab'[i % 2]},{'test' if i > 140 else 'train'}" for i in range(150)]
    (tmp_path / "table.csv").write_text("\n".join(["image,label,split", *lines]))
    config = planted.config("image", data__name=str(tmp_path / "table.csv"), data__cache=str(tmp_path / "cache"))
    data = configs.read(config).data
    first = dataset.load(data, seed=0).saved()
    (tmp_path / "149.png").write_bytes(planted.png(7))
    dataset.load(data, seed=0).check_unchanged(first, "RUN")  # a row of test
    (tmp_path / "77.png").write_bytes(planted.png(7))
    with rejects("RUN", None, says="rows of train"):
        dataset.load(data, seed=0).check_unchanged(first, "RUN")


def test_content_of_an_older_run_is_compared_as_it_was_saved(monkeypatch: pytest.MonkeyPatch):
    rows = [planted.row(i) for i in range(150)]
    planted.plant(monkeypatch, train=rows, test=rows[:9])
    found = dataset.load(configs.read(planted.config("text")).data, seed=0)
    older = {split: content.sampled_checksum(each.source) for split, each in found.splits.items()}
    found.check_unchanged({**found.saved(), "content": older}, "RUN")
    with rejects("RUN", None, says="rows of valid"):
        found.check_unchanged({**found.saved(), "content": {**older, "valid": "0" * 16}}, "RUN")


# --- Hosts ---


def agree(monkeypatch: pytest.MonkeyPatch, first: dict[str, Any], own: dict[str, Any]) -> None:
    """Checks as host 1 of two, where host 0 has the facts `first`."""
    text = np.frombuffer(json.dumps(first, sort_keys=True).encode(), np.uint8)

    def allgather(array: np.ndarray) -> np.ndarray:
        other = np.array([len(text)]) if array.dtype == np.int32 else np.pad(text, (0, len(array) - len(text)))
        return np.stack([other, array])

    monkeypatch.setattr(jax, "process_count", lambda: 2)
    monkeypatch.setattr(hosts, "allgather", allgather)
    hosts.check_agreement(own)


def test_hosts_say_which_version_code_rows_or_vocabulary_differs(monkeypatch: pytest.MonkeyPatch):
    facts = []
    for changed in ({}, {"text": "more words"}):
        rows = [planted.row(i, **changed) for i in range(40)]
        planted.plant(monkeypatch, train=rows, test=rows[:9])
        facts.append(dataset.load(configs.read(planted.config("text")).data, seed=0).identity())
    versions = provenance.identity()
    assert versions["code"] and versions["jax"] == jax.__version__
    same = {**versions, **facts[0]}
    agree(monkeypatch, same, dict(same))
    for own, fact in [
        ({**same, "numpy": "1.0"}, f"numpy is 1.0 on host 1 and {np.__version__} on host 0"),
        ({**same, "code": "0"}, "code is 0 on host 1"),
        ({**same, **facts[1]}, "rows of train is all:"),
        ({**same, **facts[1]}, "vocabulary or columns of text is "),
        ({key: value for key, value in same.items() if key != "flax"}, "flax is None on host 1"),
    ]:
        with rejects("", None, says=fact):
            agree(monkeypatch, same, own)


def test_provenance_digests_the_code(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    (tmp_path / "tracking").mkdir()
    monkeypatch.setattr(provenance, "__file__", str(tmp_path / "tracking" / "provenance.py"))
    found = []
    for text in ("a = 1", "a = 2"):
        (tmp_path / "model.py").write_text(text)
        found.append(provenance.identity()["code"])
    assert found[0] != found[1]


# --- Predictions ---


def predict(task: Task, logits: list[list[float]], temperature: float = 1.0) -> Any:
    names = {"y": tuple("abc"[: task.outputs]) if task.kind != "regression" else ()}
    given = {("x",): {"y": np.array(logits, np.float32)}}
    return predictions(given, {"y": task}, names, [""] * len(logits), {"y": Uncertainty(temperature)})


@pytest.mark.parametrize("kind", ["classification", "multilabel"])
def test_predictions_whose_probabilities_overflow_are_errors_of_their_rows(kind: str):
    found = predict(Task(kind, 3), [[1.0, 2.0, 3.0], [3e38, 1.0, 2.0]], temperature=1e-320)
    if kind == "classification":
        assert found.errors == [NOT_FINITE, NOT_FINITE] and found.labels == [None, None]
    assert np.isfinite(found.probabilities[[not error for error in found.errors]]).all()
    found = predict(Task(kind, 3), [[1.0, 2.0, 3.0], [np.nan, 1.0, 2.0], [np.inf, 1.0, 2.0]])
    assert found.errors == ["", NOT_FINITE, NOT_FINITE] and found.labels[1:] == [None, None]


def test_predicted_values_that_overflow_are_errors_of_their_rows():
    scale = dataclasses.replace(Task("regression", 1).scale, log=True)
    found = predict(Task("regression", 1, scale=scale), [[1.0], [2000.0]])
    assert found.errors == ["", NOT_FINITE]
    assert np.isfinite(found.values[0]) and np.isnan(found.values[1])


def test_exported_model_refuses_a_row_whose_probabilities_are_not_finite(monkeypatch: pytest.MonkeyPatch):
    model = object.__new__(load_example.Model)
    model.spec = {"tasks": {"y": {"kind": "classification", "classes": ["a", "b"]}}}
    model.weights, outputs = {}, {"logits": np.array([[1.0, 2.0], [np.nan, 1.0]])}
    model.program = type("Program", (), {"call": lambda *_: {"y": {**outputs, "probabilities": outputs["logits"]}}})()
    monkeypatch.setattr(load_example.Model, "preprocess", lambda self, rows: ({}, {}, {}))
    with pytest.raises(ValueError, match="row 1, y: the model's logits are not finite"):
        model([{}, {}])
    outputs["logits"] = np.array([[1.0, 2.0], [3.0, 1.0]])
    assert model([{}, {}])["y"]["labels"] == ["b", "a"]


# --- Audio ---

TONE = 0.5 * np.sin(np.arange(500) * 0.1)


def encode(kind: str, waveform: np.ndarray = TONE, subtype: str = "PCM_16") -> bytes:
    file = io.BytesIO()
    soundfile.write(file, waveform, 8000, format=kind, subtype=subtype)
    return file.getvalue()


def left_open(kind: str) -> bytes:
    """Returns a file whose header leaves open how many samples follow, as a program writes it to a pipe."""
    data, unknown = bytearray(encode(kind)), b"\xff" * 8
    if kind == "AU":
        data[8:12] = unknown[:4]
    elif kind == "AIFF":
        data[4:8] = bytes(4)
        data[(at := data.index(b"SSND") + 4) : at + 4] = bytes(4)
    elif kind == "CAF":
        data[(at := data.index(b"data") + 4) : at + 8] = unknown
    elif kind == "W64":
        data[16:24] = bytes(8)
        data[(at := data.index(b"data") + 16) : at + 8] = unknown
    else:
        data[4:8] = unknown[:4]
        data[20:36] = bytes(8) + unknown
        data[(at := data.index(b"data") + 4) : at + 4] = unknown[:4]
    return bytes(data)


@pytest.mark.parametrize("kind", ["AIFF", "AU", "W64", "RF64", "CAF"])
def test_recordings_cut_where_their_header_leaves_the_length_open_are_refused(kind: str):
    data = left_open(kind)
    if kind not in ("RF64", "CAF"):
        with soundfile.SoundFile(io.BytesIO(data[:-200])) as file:
            assert 0 < file.frames < 500  # libsndfile reads what is there
    with pytest.raises(ValueError, match=r"truncated|leaves open|malformed"):
        audio.decode(data[:-200], 8000)


@pytest.mark.parametrize("kind", ["WAV", "AIFF", "AU", "W64", "RF64", "CAF"])
@pytest.mark.parametrize("value", [1e300, 1e39, np.inf, np.nan, 2000.0])
def test_recordings_beyond_the_range_of_floats_are_refused(kind: str, value: float):
    data = encode(kind, np.array([0.0, 0.1, value] * 20), "DOUBLE")
    with pytest.raises(ValueError, match="samples"):
        audio.decode(data, 8000)
    section = {"options": {"rate": 8000, "stored_rate": 0}, "shape": [100]}
    with pytest.raises(ValueError, match="samples"):
        load_example.audio(data, section)
    with pytest.raises(ValueError, match="not a recording"):
        load_example.audio(b"RIFF", section)


# --- Rows without any modality, files without a byte ---


def test_training_gives_no_weight_to_a_row_without_any_modality():
    batch = Batch(
        inputs={}, mask={}, targets={},
        present={"a": np.array([True, False, False]), "b": np.array([False, False, True])},
        weight=np.ones(3, np.float32), id=np.arange(3, dtype=np.int32),
    )  # fmt: skip
    found = missing.without_empty_rows(batch)
    assert found.weight.tolist() == [1, 0, 1] and found.id.tolist() == [0, -1, 2]
    assert found.weight.dtype == np.float32 and found.id.dtype == np.int32
    assert batch.weight.all()


EMPTY = range(0, 40, 5)  # rows without any modality


def train_with_empty_rows(folder: Path, monkeypatch: pytest.MonkeyPatch, labels: int) -> dict[str, Any]:
    """Trains on rows of which some have no modality, and the label `labels`; returns the result."""
    rows = [planted.row(i, **({"text": " ", "label": labels} if i in EMPTY else {})) for i in range(40)]
    planted.plant(monkeypatch, train=rows, valid=rows, test=rows)
    config = planted.config(
        "text", steps=6, eval_every=6, checkpoint_every=6, data__valid="valid", data__valid_fraction=0.0
    )
    return train(config, folder)


@pytest.mark.loop
def test_row_without_any_modality_counts_nowhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
):
    results = [train_with_empty_rows(tmp_path / str(label), monkeypatch, label) for label in (0, 1)]
    assert "8 of 40 rows of test have no modality and do not count" in capsys.readouterr().out
    first, other = (open_run(tmp_path / str(label), []) for label in (0, 1))
    jax.tree.map(np.testing.assert_array_equal, first.state.params, other.state.params)
    assert results[0]["test"] == results[1]["test"]
    assert (results[0]["test"]["rows"], results[0]["test"]["examples"]) == (40, 32)
    calibrations = [json.loads((tmp_path / str(label) / "calibration.json").read_text())["tasks"] for label in (0, 1)]
    assert calibrations[0] == calibrations[1]
    assert TrainedModel(first).predict([{"text": " "}, {"text": "row 1"}]).errors == ["every modality is absent", ""]


def test_file_without_a_byte_is_unreadable_in_training_and_prediction(tmp_path: Path):
    for i in range(40):
        (tmp_path / f"{i}.png").write_bytes(planted.png(i) if i else b"")
    lines = [f"{i}.png,row {i},{'ab'[i % 2]},{'test' if i > 30 else 'train'}" for i in range(40)]
    (tmp_path / "table.csv").write_text("\n".join(["image,text,label,split", *lines]))
    config = planted.config(
        "image+text", data__name=str(tmp_path / "table.csv"), data__cache="off", data__max_bad_fraction=0.5
    )
    found = dataset.load(configs.read(config).data, seed=0)
    bad = {**found.splits["train"].bad, **found.splits["valid"].bad}
    assert bad == {0: "row 0, image: 0.png: empty file"}
    rows = [{"image": f"{i}.png", "text": "row"} for i in range(2)] + [{"image": b"", "text": "row"}]
    ((batch, errors),) = input_rows.batches(found.reader, rows, 3, tmp_path)
    assert errors == ["image: 0.png: empty file", "", ""]
    assert batch.present["image"].tolist() == [False, True, False]  # bytes without an element are absent
