import csv

import numpy as np
import pytest
from scipy.special import softmax

from mmfusion.inference.predict import predict
from mmfusion.inference.trained_model import SMALL_BATCH, TrainedModel
from mmfusion.training.evaluation import collect
from mmfusion.training.loop import train
from mmfusion.training.restore import open_run
from tests.errors import rejects

pytestmark = pytest.mark.usefixtures("traced_once")


@pytest.fixture(scope="module")
def run(tiny_config, tmp_path_factory):
    """Returns a tiny run's directory, its first 20 test rows, class names, and their evaluated probabilities."""
    workdir = tmp_path_factory.mktemp("run") / "run"
    train(tiny_config("fusion=concat"), workdir)
    opened = open_run(workdir, ["test"])
    split, run_eval = opened.dataset.splits["test"], opened.setup.compile_eval_step()
    expected = {
        kept: softmax(
            collect(run_eval, opened.state, split, opened.setup, batch_size=16, modalities=kept)["logits"]["label"][
                :20
            ],
            1,
        )
        for kept in (None, ("text",))
    }
    return workdir, [split.source[i] for i in range(20)], opened.dataset.class_names["label"], expected


@pytest.fixture
def table(run, tmp_path):
    """Returns a function that writes those rows as images and a CSV table with changed cells, and returns its path."""

    def write(columns=("image", "text"), changes=None, name="rows.csv"):
        (tmp_path / "my images").mkdir(exist_ok=True)
        with (tmp_path / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, ["note", *columns])
            writer.writeheader()
            for i, row in enumerate(run[1]):
                (tmp_path / "my images" / f"{i}.png").write_bytes(row["image"])
                cells = {"image": f"my images/{i}.png", "text": row["sentence"].decode(), "sentence": "", "note": i}
                cells |= {"sentence": cells["text"]} | (changes or {}).get(i, {})
                writer.writerow({c: cells[c] for c in ("note", *columns)})
        return tmp_path / name

    return write


def read(path):
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def probabilities(rows, names):
    return np.array([[float(row[f"label: {name}"] or "nan") for name in names] for row in rows])


@pytest.mark.loop
def test_predict_keeps_order_and_equals_evaluation(run, table, tmp_path):
    workdir, _, names, expected = run
    assert predict(workdir, table(), tmp_path / "out.csv", calibrated=False) == (20, 20, [])
    rows = read(tmp_path / "out.csv")
    assert list(rows[0]) == ["row", "note", "label", "label: false", "label: true", "error"]
    assert [row["note"] for row in rows] == [str(i) for i in range(20)]
    assert [row["row"] for row in rows] == [str(i) for i in range(20)]
    np.testing.assert_allclose(probabilities(rows, names), expected[None], atol=2e-6)
    np.testing.assert_allclose(probabilities(rows, names).sum(axis=1), 1, atol=2e-6)
    assert [row["label"] for row in rows] == [names[i] for i in expected[None].argmax(axis=1)]
    assert not any(row["error"] for row in rows)


@pytest.mark.loop
def test_predict_of_few_rows_equals_that_of_the_same_rows_among_many(run):
    opened = open_run(run[0], [])
    rows = [{"image": row["image"], "text": row["sentence"].decode()} for row in run[1]]
    many = TrainedModel(opened).predict(rows).probabilities
    for model in (TrainedModel(opened), TrainedModel(opened, small_batch=0)):
        np.testing.assert_array_equal(model.predict(rows[:3]).probabilities, many[:3])
    sizes = [TrainedModel(opened)._batch_size(count) for count in (0, 1, SMALL_BATCH, SMALL_BATCH + 1)]
    assert sizes == [16, SMALL_BATCH, SMALL_BATCH, 16]


@pytest.mark.loop
@pytest.mark.parametrize("column", ["text", "sentence"])
def test_predict_allow_missing_treats_a_missing_column_as_an_absent_modality(column, run, table, tmp_path):
    workdir, _, names, expected = run
    source = table(columns=(column,))
    predicted = predict(workdir, source, tmp_path / "out.csv", allow_missing=True, calibrated=False)
    assert predicted == (20, 20, [])
    np.testing.assert_allclose(probabilities(read(tmp_path / "out.csv"), names), expected["text",], atol=2e-6)


@pytest.mark.loop
def test_predict_reports_invalid_rows_and_keeps_the_others(run, table, tmp_path):
    workdir, _, names, expected = run
    (tmp_path / "broken.png").write_bytes(run[1][0]["image"][:100])
    (tmp_path / "text.png").write_text("no image")
    invalid = {
        2: {"image": "nowhere.png"},
        5: {"image": "broken.png"},
        17: {"image": "text.png"},
        18: {"image": "", "text": " "},
    }
    changes = {**invalid, 4: {"image": ""}, 9: {"note": 'a "quoted",\nbroken line'}}
    predicted, total, errors = predict(workdir, table(changes=changes), tmp_path / "out.csv", calibrated=False)
    assert (predicted, total) == (16, 20)
    assert [error.partition(":")[0] for error in errors] == [f"row {i}" for i in invalid]
    rows = read(tmp_path / "out.csv")
    assert [row["row"] for row in rows] == [str(i) for i in range(20)]
    assert {i: row["error"] for i, row in enumerate(rows) if row["error"]}.keys() == invalid.keys()
    assert "nowhere.png: No such file" in rows[2]["error"]
    assert rows[17]["error"] == "image: not an image"
    assert rows[18]["error"] == "every modality is absent"
    assert all(not value for i in invalid for key, value in rows[i].items() if key not in ("row", "note", "error"))
    valid = [i for i in range(20) if i not in changes]
    np.testing.assert_allclose(probabilities([rows[i] for i in valid], names), expected[None][valid], atol=2e-6)
    np.testing.assert_allclose(probabilities([rows[4]], names)[0], expected["text",][4], atol=2e-6)


@pytest.mark.loop
def test_predict_explains_the_first_predicted_rows_after_the_output_is_written(run, table, tmp_path):
    given = []

    def explain(model, rows, folder, predicted):
        given.append((rows, folder, predicted, len(read(tmp_path / "out.csv"))))
        assert not any(model.predict(list(rows.values()), folder).errors)

    source = table(changes={1: {"image": "nowhere.png"}})
    predict(run[0], source, tmp_path / "out.csv", explain=explain, explain_rows=3)
    ((rows, *rest),) = given
    assert list(rows) == [0, 2, 3] and rest == [tmp_path, 19, 20]
    assert rows[2]["image"] == "my images/2.png" and rows[2]["text"] == run[1][2]["sentence"].decode()


@pytest.mark.loop
def test_predict_of_an_empty_table_writes_an_empty_table(run, tmp_path):
    (tmp_path / "rows.csv").write_text("text,image\n")
    assert predict(run[0], tmp_path / "rows.csv", tmp_path / "out.csv") == (0, 0, [])
    assert (tmp_path / "out.csv").read_text().strip() == "row,label,label: false,label: true,error"


@pytest.mark.loop
@pytest.mark.parametrize(
    ("content", "fact"),
    [
        (None, "No such file"),
        (b"text,image\na,b\n\xff\xfe", "line 3: byte 0xff"),
        (b'text,image\n"open', "line 2: a quoted cell is not closed"),
        (b"text,image\na,b\n" * 9000 + b'"open', "line 18001"),
        (b"note,id\na,b\n", "no columns image, text, which the run reads (it has note, id); with --allow-missing"),
        (b"image,sentense\na,b\n", "no column text, which the run reads (did you mean sentense?)"),
        (b"", "has no columns: it is empty"),
    ],
)
def test_predict_of_an_unreadable_table_keeps_the_output_file(content, fact, run, tmp_path):
    if content is not None:
        (tmp_path / "rows.csv").write_bytes(content)
    (tmp_path / "out.csv").write_text("mine")
    with rejects(f"--input={tmp_path / 'rows.csv'}", None, says=fact):
        predict(run[0], tmp_path / "rows.csv", tmp_path / "out.csv")
    assert (tmp_path / "out.csv").read_text() == "mine"
    assert {path.name for path in tmp_path.iterdir()} <= {"rows.csv", "out.csv"}


@pytest.mark.loop
@pytest.mark.parametrize("output", ["none/out.csv", "."])
def test_predict_checks_the_output_path_first(output, run, table, tmp_path):
    with rejects(f"--output={tmp_path / output}", None):
        predict(run[0], table(), tmp_path / output)


@pytest.mark.loop
def test_predict_failure_leaves_no_partial_file(run, table, tmp_path, monkeypatch):
    source = table()
    before = sorted(path.name for path in tmp_path.iterdir())

    def writerow(self, row):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(csv.DictWriter, "writerow", writerow)
    with rejects(f"--output={tmp_path / 'out.csv'}", says="No space left on device"):
        predict(run[0], source, tmp_path / "out.csv")
    assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_predict_command_prints_errors_and_counts(run, table, command, tmp_path):
    source = table(changes={3: {"image": "nowhere.png"}})
    process = command("experiments.predict", f"--workdir={run[0]}", f"--input={source}", f"--output={tmp_path}/out.csv")
    assert (process.returncode, process.stderr) == (0, "")
    assert "row 3: " in process.stdout
    assert f"{tmp_path}/out.csv: 19 of 20 rows predicted, 1 with an error (column error)\n" in process.stdout
    assert len(read(tmp_path / "out.csv")) == 20


def test_predict_command_passes_its_options_on(run, table, command, tmp_path):
    arguments = (f"--workdir={run[0]}", f"--input={table()}", f"--output={tmp_path}/out.csv")
    explain = (f"--explain={tmp_path}/why", "--explain_rows=2")
    process = command(
        "experiments.predict", *arguments, "--calibrated=false", "--sets=0.8", "--contributions", *explain
    )
    assert (process.returncode, process.stderr) == (0, "")
    assert (
        f"{tmp_path}/why/index.html: 2 of 20 predicted rows explained; --explain_rows=N explains more" in process.stdout
    )
    assert {path.stem for path in (tmp_path / "why").glob("*.html")} == {"index", "row_00000", "row_00001"}
    rows = read(tmp_path / "out.csv")
    assert list(rows[0]) == [
        "row", "note", "label", "label: false", "label: true", "label: set", "label: contribution of image",
        "label: contribution of text", "error",
    ]  # fmt: skip
    np.testing.assert_allclose(probabilities(rows, run[2]), run[3][None], atol=2e-6)
    process = command("experiments.predict", *arguments, *explain)
    assert process.returncode == 2 and f"--explain={tmp_path}/why: exists" in process.stderr
    process = command("experiments.predict", *arguments, "--intervals=0.9")
    assert process.returncode == 2 and process.stderr.count("\n") == 1
    assert "needs a regression task (label is classification)" in process.stderr


def test_predict_command_without_any_predicted_row_exits_2_and_writes_the_reasons(run, command, tmp_path):
    (tmp_path / "rows.jsonl").write_text('{"text": ""}\n{"text": null}\n')
    arguments = (f"--workdir={run[0]}", f"--input={tmp_path}/rows.jsonl", f"--output={tmp_path}/out.csv")
    process = command("experiments.predict", *arguments)
    assert process.returncode == 2
    assert process.stderr.count("\n") == 1 and "no column image" in process.stderr
    assert not (tmp_path / "out.csv").exists()
    process = command("experiments.predict", *arguments, "--allow-missing")
    assert process.returncode == 2
    assert process.stderr.startswith(
        f"error: --input={tmp_path}/rows.jsonl: no row could be predicted; column error of"
    )
    assert process.stderr.count("\n") == 1 and process.stdout == ""
    assert [row["error"] for row in read(tmp_path / "out.csv")] == ["every modality is absent"] * 2
