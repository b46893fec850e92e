"""Training, evaluation and prediction of embeddings, sequences and several images a row."""

import csv
import json

import numpy as np
import pytest

from mmfusion import config as configs
from mmfusion.config import defaults
from mmfusion.inference.predict import predict
from mmfusion.inference.trained_model import TrainedModel
from mmfusion.training.loop import train
from mmfusion.training.restore import open_run
from tests import planted
from tests.errors import rejects

pytestmark = [pytest.mark.usefixtures("traced_once"), pytest.mark.loop]
INF = float("inf")


def row(i, **changes):
    """Returns a row with a vector of three numbers, a sequence of one to six positions with a -inf, and two images."""
    sequence = np.sin(np.arange(2.0 * (1 + i % 6)) + i).reshape(-1, 2)
    sequence[0, 1] = -INF
    return {
        "vector": np.cos(i + np.arange(3.0)), "signal": sequence, "views": [planted.png(i + 20), planted.png(200 - i)],
        "label": i % 2, **changes,
    }  # fmt: skip


ROWS = [row(i) for i in range(20)]
ROWS[3] |= {"vector": None}
ROWS[4] |= {"signal": [[-INF, None]], "views": []}
ROWS[5] |= {"views": [None, planted.png(77)]}


def make_config():
    result = planted.config("image").copy_and_resolve_references()
    with result.unlocked():
        result.data.modalities = {
            "embedding": defaults.modality("embedding", "vector"),
            "motion": defaults.modality("sequence", "signal", length=4),
            "views": defaults.modality("images", "views", count=3, size=(8, 8)),
        }
        result.data.modalities.views.augment.flip = 0.5
        result.model.encoders = {
            "embedding": defaults.encoder("embedding", "mlp", hidden=(8,)),
            "motion": defaults.encoder("motion", "rnn", hidden=4, embedding=4),
            "views": defaults.encoder("views", "cnn", channels=(4,), strides=(4,), dropout=0.1),
        }
        result.steps = 3
    return result.lock()


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns the run's directory and its result."""
    folder = tmp_path_factory.mktemp("run") / "run"
    config = make_config()
    with pytest.MonkeyPatch.context() as monkeypatch:
        planted.plant(monkeypatch, train=[row(i) for i in range(60)], test=ROWS)
        configs.check(config, devices=1)
        result = train(config, folder)
        evaluated = TrainedModel(open_run(folder, ["test"])).evaluate("test")
    return folder, result, evaluated


@pytest.fixture(scope="module")
def expected(run):
    """Returns the predictions of the rows given as Python objects."""
    found = TrainedModel(open_run(run[0], [])).predict([{k: r[k] for k in r if k != "label"} for r in ROWS])
    assert not any(found.errors)
    return found.tasks["label"].probabilities


def test_train_and_evaluate_agree(run, expected):
    _, result, evaluated = run
    assert np.isfinite(result["test"]["loss"])
    assert evaluated["loss"] == pytest.approx(result["test"]["loss"], rel=1e-5)
    loss = -np.log(expected[np.arange(20), [r["label"] for r in ROWS]]).mean()
    assert loss == pytest.approx(result["test"]["loss"], rel=1e-4)
    assert np.ptp(expected[:, 0]) > 1e-4


def as_json(value):
    """Returns a value with lists for arrays and None for numbers that JSON lacks."""
    if isinstance(value, np.ndarray | list):
        return [as_json(item) for item in value]
    return None if isinstance(value, float) and not np.isfinite(value) else value


def in_files(folder):
    """Writes the images as files, and returns the rows with paths."""
    rows = []
    for i, r in enumerate(ROWS):
        paths = []
        for k, data in enumerate(r["views"]):
            if data is not None:
                (folder / f"é {i} {k}.png").write_bytes(data)
            paths.append(None if data is None else f"é {i} {k}.png")
        rows.append({"vector": as_json(r["vector"]), "signal": as_json(r["signal"]), "views": paths})
    return rows


def write_json_lines(path, rows):
    path.write_text("\n".join(map(json.dumps, rows)), encoding="utf-8")


def write_csv(path, rows, wide=False):
    cells = [{k: "" if v is None else json.dumps(v) for k, v in r.items()} for r in rows]
    if wide:
        for line, r in zip(cells, rows, strict=True):
            del line["vector"]
            line |= {f"embedding_{i}": x for i, x in enumerate(r["vector"] or [""] * 3)}
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(cells[0]))
        writer.writeheader()
        writer.writerows(cells)


@pytest.mark.parametrize(
    ("name", "write"),
    [
        ("a.jsonl", write_json_lines),
        ("a.csv", write_csv),
        ("wide.csv", lambda path, rows: write_csv(path, rows, wide=True)),
    ],
)
def test_predict_reads_vectors_and_lists_of_paths_from_tables(name, write, run, expected, tmp_path):
    write(tmp_path / name, in_files(tmp_path))
    assert predict(run[0], tmp_path / name, tmp_path / "out.csv") == (20, 20, [])
    with (tmp_path / "out.csv").open(encoding="utf-8") as file:
        found = [[float(line[f"label: {c}"]) for c in ("no", "yes")] for line in csv.DictReader(file)]
    np.testing.assert_allclose(found, expected, atol=2e-6)


def test_predict_takes_python_lists_and_pixels(run, expected, tmp_path):
    rows = [{"embedding": r["vector"], "motion": r["signal"], "views": r["views"]} for r in in_files(tmp_path)]
    rows[0]["views"] = np.stack([np.full((8, 8, 3), level, np.uint8) for level in (20, 200)])
    found = TrainedModel(open_run(run[0], [])).predict(rows, folder=tmp_path)
    assert not any(found.errors)
    np.testing.assert_allclose(found.tasks["label"].probabilities, expected, atol=1e-6)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vector": [1, 2]}, "embedding: 'vector' has 2 values, not 3 as on train"),
        ({"vector": [1, 2, INF]}, "embedding: 'vector' has values that are not finite"),
        ({"signal": np.zeros((2, 3))}, "motion: is an array [2, 3], not [t, 2] as on train; it looks like [D, t]"),
        ({"signal": "words"}, "motion: must be numbers [t, D]"),
        ({"views": "a.png"}, 'views: must be a list of paths, such as ["a.png", "b.png"], got a.png'),
        ({"views": ["none.png"]}, "views: none.png: No such file"),
        ({"views": [3]}, "views: must be an array, bytes or a file path, got int"),
        (
            {"views": np.zeros((8, 8, 3), np.uint8)},
            "views: must be a list of images or pixels [k, h, w, c], got",
        ),
    ],
)
def test_predict_refuses_wrong_vectors_and_images_in_their_row(changes, message, run, tmp_path):
    found = TrainedModel(open_run(run[0], [])).predict([ROWS[0], row(1, **changes)], folder=tmp_path)
    assert not found.errors[0]
    assert found.errors[1].startswith(message)


@pytest.mark.parametrize(
    ("path", "value", "suggestion"),
    [
        ("data.modalities.embedding.normalize", "l1", "l2"),
        ("data.modalities.motion.normalize", "l2", "standard"),
        ("data.modalities.views.pool", "max", "mean"),
        ("data.modalities.motion.length", 0, ""),
        ("data.modalities.views.count", 0, ""),
        ("data.modalities.views.channels", 0, ""),
        ("model.encoders.motion.name", "tcnn", "tcn"),
        ("model.encoders.embedding.name", "rnn", "mlp"),
        ("model.encoders.views.name", "frame_cnn", "pooled_cnn"),
    ],
)
def test_check_refuses_wrong_options_of_the_new_types(path, value, suggestion, monkeypatch):
    planted.plant(monkeypatch)
    config = make_config().copy_and_resolve_references()
    section, _, key = path.rpartition(".")
    with rejects(f"config.{path}", value, suggestion), config.unlocked():
        if key == "name":
            configs.choose(config, section, value)
        else:
            config.update_from_flattened_dict({path: value})
        configs.check(config, devices=1)
