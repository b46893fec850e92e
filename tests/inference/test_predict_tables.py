"""Prediction of tables in every format, by a tiny run of text, audio, a number, a vector and a category."""

import csv
import json
import shutil

import jax
import numpy as np
import pyarrow
import pytest
import soundfile
from pyarrow import parquet

from mmfusion.config import defaults
from mmfusion.inference import predict as predicting
from mmfusion.inference.predict import predict
from mmfusion.inference.trained_model import TrainedModel
from mmfusion.training.loop import train
from mmfusion.training.restore import open_run
from tests import planted, tiny
from tests.errors import rejects

pytestmark = [pytest.mark.usefixtures("traced_once"), pytest.mark.loop]

BATCH = 8
PREDICTIONS = [
    "amount", "label", "label: no", "label: yes", "tags", "tags: 0", "tags: 1", "tags: 2", "error"
]  # fmt: skip


def numbers(i):
    return {"x": i / 4, "v": [i / 8, -i, 0.5], "city": ("Bonn", "Oslo")[i % 2]}


def rows(count=20):
    """Returns rows with the text's feature, an id, and names that clash with those of predictions; some are absent."""
    found = [
        {
            "id": i,
            "text": f"row {i} number{i % 7}",
            "audio": np.sin(np.arange(100) * (0.1 + i / 50)).round(3).tolist(),
            **numbers(i),
            "label": "kept",
        }
        for i in range(count)
    ]
    found[3] |= {"text": None, "audio": None}
    found[4] |= {"x": None, "v": None, "city": None}
    return found


@pytest.fixture(scope="module")
def workdir(tmp_path_factory):
    config = planted.config(
        "text+audio", tasks="label+tags+amount", select="label/accuracy"
    ).copy_and_resolve_references()
    with config.unlocked():
        config.data.modalities.numbers = defaults.modality("table", "x+v+city", categorical=("city",))
        config.model.encoders.numbers = defaults.encoder("table", "table_mlp", hidden=(8,))
    folder = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        examples = [planted.row(i, **numbers(i)) for i in range(40)]
        planted.plant(monkeypatch, train=examples, test=examples[:20])
        train(config.lock(), folder)
    return folder


@pytest.fixture(scope="module")
def expected(workdir):
    """Returns the predictions of the rows given as Python objects."""
    found = TrainedModel(open_run(workdir, [])).predict(rows())
    assert not any(found.errors)
    return found


def wav_path(folder, row):
    """Returns the name of a WAV file with the row's samples, as CSV cannot have them."""
    if row["audio"] is None:
        return ""
    soundfile.write(folder / f"{row['id']}.wav", np.array(row["audio"]), 1000, subtype="FLOAT")
    return f"{row['id']}.wav"


def write_csv(path, table, delimiter=",", wide=False):
    lines = []
    for row in table:
        line = {**row, "audio": wav_path(path.parent, row), "v": json.dumps(row["v"]) if row["v"] else ""}
        if wide:
            del line["v"]
            line |= {f"v_{i}": x for i, x in enumerate(row["v"] or [""] * 3)}
        lines.append(line)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(lines[0]), delimiter=delimiter)
        writer.writeheader()
        writer.writerows(lines)


WRITERS = {
    "a.csv": write_csv,
    "wide.csv": lambda path, table: write_csv(path, table, wide=True),
    "semicolons.csv": lambda path, table: write_csv(path, table, delimiter=";"),
    "a.tsv": lambda path, table: write_csv(path, table, delimiter="\t"),
    "a.jsonl": lambda path, table: path.write_text("\n".join(map(json.dumps, table))),
    "a.json": lambda path, table: path.write_text(json.dumps(table)),
    "a.parquet": lambda path, table: parquet.write_table(pyarrow.Table.from_pylist(table), path),
}


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def check(cells, expected, indices):
    """Checks the rows of an output against the expected predictions of the rows at `indices`."""
    for task, found in expected.tasks.items():
        for row, i in zip(cells, indices, strict=True):
            if found.values is not None:
                assert float(row[task]) == pytest.approx(found.values[i], rel=1e-4, abs=1e-5)
            else:
                shares = [float(row[f"{task}: {name}"]) for name in found.classes]
                np.testing.assert_allclose(shares, found.probabilities[i], atol=2e-6)


@pytest.mark.parametrize("name", WRITERS)
def test_predict_is_the_same_for_every_format(name, workdir, expected, tmp_path):
    WRITERS[name](tmp_path / name, rows())
    assert predict(workdir, tmp_path / name, tmp_path / "out.csv") == (20, 20, [])
    found = read(tmp_path / "out.csv")
    assert list(found[0]) == ["row", "id", "input: label", *PREDICTIONS]
    assert [(row["row"], row["id"], row["input: label"]) for row in found] == [
        (str(i), str(i), "kept") for i in range(20)
    ]
    check(found, expected, range(20))


def test_predict_is_the_same_for_any_order_and_number_of_rows(workdir, expected, tmp_path):
    for indices in ([*range(20)][::-1], [4], [3, 19, 3], [*range(7, 17)]):
        WRITERS["a.jsonl"](tmp_path / "a.jsonl", [rows()[i] for i in indices])
        predict(workdir, tmp_path / "a.jsonl", tmp_path / "out.csv")
        check(read(tmp_path / "out.csv"), expected, indices)


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_predict_is_the_same_for_any_batch_size(batch_size, workdir, expected, tmp_path, monkeypatch):
    def open_with_batch_size(workdir, splits):
        return open_run(workdir, splits, lambda config: tiny.put(config, "batch_size", batch_size))

    monkeypatch.setattr(predicting, "open_run", open_with_batch_size)
    WRITERS["a.jsonl"](tmp_path / "a.jsonl", rows())
    predict(workdir, tmp_path / "a.jsonl", tmp_path / "out.csv")
    check(read(tmp_path / "out.csv"), expected, range(20))


def test_predict_reads_a_batch_at_a_time(workdir, tmp_path, monkeypatch):
    sizes, original = [], TrainedModel.predict

    def recorded(self, batch, *args, **options):
        sizes.append(len(batch))
        return original(self, batch, *args, **options)

    monkeypatch.setattr(TrainedModel, "predict", recorded)
    WRITERS["a.jsonl"](tmp_path / "a.jsonl", rows())
    predict(workdir, tmp_path / "a.jsonl", tmp_path / "out.csv")
    assert sizes == [0, BATCH, BATCH, 20 - 2 * BATCH]  # the first gives the columns


def test_predict_refuses_a_table_that_is_damaged_at_its_end_before_it_predicts(workdir, tmp_path, monkeypatch):
    WRITERS["a.csv"](tmp_path / "a.csv", rows())
    with (tmp_path / "a.csv").open("ab") as file:
        file.write(b'"open')
    monkeypatch.delattr(TrainedModel, "predict")
    with rejects(f"--input={tmp_path / 'a.csv'}", None, says="line 22: a quoted cell is not closed"):
        predict(workdir, tmp_path / "a.csv", tmp_path / "out.csv")


def test_predict_accounts_for_every_row(workdir, expected, tmp_path):
    WRITERS["a.csv"](tmp_path / "a.csv", rows())
    lines = (tmp_path / "a.csv").read_text().splitlines()
    lines[1 + 2] += ",more"
    lines[1 + 5] = "5,short"
    lines[1 + 6] = lines[1 + 6].replace("row 6", "row \0")
    lines[1 + 9] = ""
    lines[1 + 12] = lines[1 + 12].replace("[1.5, -12, 0.5]", "[1.5, -12]")
    lines[1 + 13] = lines[1 + 13].replace("3.25", "3;25")
    lines[1 + 14] = "14,,,,,,"
    (tmp_path / "a.csv").write_text("\n".join([*lines, "", ""]))
    predicted, total, errors = predict(workdir, tmp_path / "a.csv", tmp_path / "out.csv")
    found = read(tmp_path / "out.csv")
    assert {i: row["error"] for i, row in enumerate(found) if row["error"]} == {
        2: "line 4 has 8 cells, the header has 7",
        5: "line 7 has 2 cells, the header has 7",
        6: "column 'text' has a NUL character",
        9: "a blank line",
        12: "numbers: column 'v' has 2 values, not 3",
        13: "numbers: column 'x': must be a finite number, or a list such as [0.1, 0.2], got 3;25",
        14: "every modality is absent",
    }
    assert (predicted, total, len(errors)) == (13, 20, 7) and errors[0] == f"row 2: {found[2]['error']}"
    assert [row["row"] for row in found] == [str(i) for i in range(20)]
    assert [found[i]["id"] for i in (1, 2, 12, 14)] == ["1", "", "12", "14"]
    valid = [i for i, row in enumerate(found) if not row["error"]]
    assert all(not row[name] for row in found if row["error"] for name in PREDICTIONS[:-1])
    check([found[i] for i in valid], expected, valid)


def test_predict_returns_the_first_errors_only(workdir, tmp_path):
    (tmp_path / "a.jsonl").write_text('{"text": "row 1", "x": 1}\n' + '{"text": "row 1", "x": "?"}\n' * 30)
    predicted, total, errors = predict(workdir, tmp_path / "a.jsonl", tmp_path / "out.csv", allow_missing=True)
    assert (predicted, total, len(errors)) == (1, 31, 10)


def test_predict_of_values_of_the_wrong_type_are_errors(workdir, tmp_path):
    good = {"text": "row 1", "audio": [0.5, 1], "x": 1, "v": [1, 2, 3], "city": "Bonn"}
    wrong = [{"text": ["a"]}, {"audio": 3}, {"audio": [[1], [1, 2]]}, {"audio": ["a"]}, {"x": "?"}, {"x": 10**400},
             {"v": [1, [2]]}, {"v": 1}, {"city": ["Bonn"]}, {"audio": "none.wav"}, {"audio": "a.jsonl"}]  # fmt: skip
    (tmp_path / "a.jsonl").write_text("\n".join(json.dumps(good | change) for change in [{}, *wrong]))
    assert predict(workdir, tmp_path / "a.jsonl", tmp_path / "out.csv")[:2] == (1, 1 + len(wrong))
    for row, change in zip(read(tmp_path / "out.csv")[1:], wrong, strict=True):
        (name,) = change
        assert row["error"].startswith(f"{name}: " if name in ("text", "audio") else "numbers: "), row


def test_predict_carries_over_what_the_run_does_not_read(workdir, tmp_path):
    columns = {
        "text": ["row 1", "row 2"], "row": [7, 8], "input: row": ["a", None], "bytes": [b"\xff", None],
        "list": [[1, 2], [0.5]], "ok": [True, False], "x": [1.0, 2.0], "error": ["é,\n", '"'],
        "day": pyarrow.array([1, 2], pyarrow.date32()),
    }  # fmt: skip
    parquet.write_table(pyarrow.table(columns), tmp_path / "a.parquet")
    predict(workdir, tmp_path / "a.parquet", tmp_path / "out.csv", allow_missing=True)
    found = read(tmp_path / "out.csv")
    carried = ["input: input: row", "input: row", "bytes", "list", "ok", "input: error", "day"]
    assert list(found[0]) == ["row", *carried, *PREDICTIONS]
    assert [[row[name] for name in ("row", *carried)] for row in found] == [
        ["0", "7", "a", "/w==", "[1.0, 2.0]", "true", "é,\n", "1970-01-02"],
        ["1", "8", "", "", "[0.5]", "false", '"', "1970-01-03"],
    ]


def test_predict_does_not_overwrite_its_input(workdir, tmp_path):
    WRITERS["a.csv"](tmp_path / "a.csv", rows())
    before = (tmp_path / "a.csv").read_bytes()
    (tmp_path / "link.csv").symlink_to("a.csv")
    for output in ("a.csv", "link.csv"):
        with rejects(f"--output={tmp_path / output}", None, says="is the input"):
            predict(workdir, tmp_path / "a.csv", tmp_path / output)
    assert (tmp_path / "a.csv").read_bytes() == before


def test_predict_needs_every_column_of_a_table_modality(workdir, tmp_path):
    table = [{name: value for name, value in row.items() if name != "v"} for row in rows()]
    WRITERS["a.json"](tmp_path / "a.json", table)
    with rejects(f"--input={tmp_path / 'a.json'}", None, says="no column v, which the run reads"):
        predict(workdir, tmp_path / "a.json", tmp_path / "out.csv")
    assert predict(workdir, tmp_path / "a.json", tmp_path / "out.csv", allow_missing=True) == (20, 20, [])


def test_predict_of_outputs_that_are_not_finite_are_errors(workdir, tmp_path, monkeypatch):
    def open_diverged(workdir, splits):
        run = open_run(workdir, splits)
        params = jax.tree.map(lambda x: x * np.nan, run.state.params)
        object.__setattr__(run, "state", run.state.replace(params=params))
        return run

    monkeypatch.setattr(predicting, "open_run", open_diverged)
    WRITERS["a.jsonl"](tmp_path / "a.jsonl", rows())
    with rejects(f"--input={tmp_path / 'a.jsonl'}", None, says="row 0: the model's output is not finite"):
        predict(workdir, tmp_path / "a.jsonl", tmp_path / "out.csv")
    found = read(tmp_path / "out.csv")
    assert [row["error"] for row in found] == ["the model's output is not finite"] * 20
    assert not any(row[name] for row in found for name in PREDICTIONS[:-1])


ADDED = {
    "amount": ["amount: low", "amount: high", *(f"amount: contribution of {m}" for m in ("audio", "numbers", "text"))],
    "label": ["label: set", *(f"label: contribution of {m}" for m in ("audio", "numbers", "text"))],
}
OPTIONS = {"intervals": 0.7, "sets": 0.7, "contributions": True}


@pytest.mark.parametrize("batch_size", [1, 3, 20])
def test_predict_options_add_columns_that_are_the_same_for_any_batch_size(
    batch_size, workdir, expected, tmp_path, monkeypatch
):
    found = TrainedModel(open_run(workdir, [])).predict(rows(), **OPTIONS)

    def open_with_batch_size(workdir, splits):
        return open_run(workdir, splits, lambda config: tiny.put(config, "batch_size", batch_size))

    monkeypatch.setattr(predicting, "open_run", open_with_batch_size)
    WRITERS["a.jsonl"](tmp_path / "a.jsonl", rows())
    assert predict(workdir, tmp_path / "a.jsonl", tmp_path / "out.csv", **OPTIONS) == (20, 20, [])
    written = read(tmp_path / "out.csv")
    check(written, expected, range(20))
    assert [name for name in written[0] if name.startswith("amount")] == ["amount", *ADDED["amount"]]
    assert [name for name in written[0] if name.startswith("label")] == [
        "label", "label: no", "label: yes", *ADDED["label"]
    ]  # fmt: skip
    for i, row in enumerate(written):
        ends = found.tasks["amount"].intervals[i]
        np.testing.assert_allclose([float(row["amount: low"]), float(row["amount: high"])], ends, rtol=1e-4, atol=1e-5)
        assert row["label: set"].split("|")[0] == row["label"]
        for task in ("amount", "label", "tags"):
            for m, share in found.tasks[task].contributions.items():
                assert float(row[f"{task}: contribution of {m}"]) == pytest.approx(share[i], rel=1e-3, abs=1e-5)


def test_predict_contributions_sum_to_the_difference_from_no_modality(workdir):
    model = TrainedModel(open_run(workdir, []))
    found = model.predict(rows(), contributions=True).tasks
    run = model._run
    nothing = model._apply(model._eval_step, rows(), ".", keep=("logits",), subsets=[()])[0][0]["logits"]
    base = run.setup.tasks["amount"].scale.invert(nothing["amount"][:, 0])
    np.testing.assert_allclose(sum(found["amount"].contributions.values()), found["amount"].values - base, atol=1e-5)
    for m, i in (("text", 3), ("audio", 3), ("numbers", 4)):  # absent
        assert all(abs(task.contributions[m][i]) < 1e-6 for task in found.values())
    assert all(np.abs(task.contributions["text"]).max() > 1e-5 for task in found.values())


def test_predict_calibrated_changes_probabilities_only(workdir, expected):
    raw = TrainedModel(open_run(workdir, [])).predict(rows(), calibrated=False)
    fitted = json.loads((workdir / "calibration.json").read_text())
    assert fitted["step"] == open_run(workdir, []).step and len(fitted["tasks"]["amount"]["scores"]) == 12
    for name, task in raw.tasks.items():
        assert task.labels == expected.tasks[name].labels
        temperature = fitted["tasks"][name]["temperature"]
        if name == "label":
            odds = [np.log(t.probabilities[:, 1] / t.probabilities[:, 0]) for t in (task, expected.tasks[name])]
            np.testing.assert_allclose(odds[0] / temperature, odds[1], rtol=1e-5)
    np.testing.assert_array_equal(raw.tasks["amount"].values, expected.tasks["amount"].values)


def test_predict_fits_a_missing_or_outdated_calibration_again(workdir, expected, tmp_path, monkeypatch):
    shutil.copytree(workdir, tmp_path / "run")
    file = tmp_path / "run" / "calibration.json"
    before = json.loads(file.read_text())
    examples = [planted.row(i, **numbers(i)) for i in range(40)]
    planted.plant(monkeypatch, train=examples, test=examples[:20])
    for content in ("", json.dumps({**before, "step": 1, "tasks": {}})):
        file.write_text(content) if content else file.unlink()
        found = TrainedModel(open_run(tmp_path / "run", [])).predict(rows())
        np.testing.assert_allclose(found.tasks["label"].probabilities, expected.tasks["label"].probabilities, rtol=1e-5)
        assert json.loads(file.read_text())["step"] == before["step"]
        for task, values in json.loads(file.read_text())["tasks"].items():
            np.testing.assert_allclose(values["scores"], before["tasks"][task]["scores"], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("content", ["{", "[]", '{"step": 2, "tasks": {}}', '{"step": 2, "tasks": {"label": 1}}'])
def test_predict_refuses_a_damaged_calibration(content, workdir, tmp_path):
    shutil.copytree(workdir, tmp_path / "run")
    (tmp_path / "run" / "calibration.json").write_text(content)
    with rejects(tmp_path / "run" / "calibration.json", None):
        TrainedModel(open_run(tmp_path / "run", [])).predict(rows())


def test_predict_refuses_options_before_it_writes(workdir, tmp_path):
    WRITERS["a.jsonl"](tmp_path / "a.jsonl", rows())
    with rejects("intervals", 0.95, says="needs at least 19 validation examples of amount, the run has 12"):
        predict(workdir, tmp_path / "a.jsonl", tmp_path / "out.csv", intervals=0.95)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]
