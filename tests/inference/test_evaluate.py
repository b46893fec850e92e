import dataclasses
import json
import re
import shutil

import numpy as np
import pytest

from mmfusion.distributed import mesh
from mmfusion.inference.evaluate import evaluate
from mmfusion.inference.predict import predict
from mmfusion.inference.trained_model import load
from mmfusion.metrics import METRICS
from mmfusion.training.evaluation import collect
from mmfusion.training.loop import train
from mmfusion.training.restore import open_run
from tests import planted
from tests.errors import rejects

pytestmark = pytest.mark.usefixtures("traced_once")


@pytest.fixture(scope="module")
def trained(tiny_config, tmp_path_factory):
    """Returns the directory and result of a profiled run of the tiny quickstart with 8 steps."""
    workdir = tmp_path_factory.mktemp("run") / "run"
    return workdir, train(tiny_config("fusion=concat"), workdir, profile=True)


@pytest.fixture(scope="module")
def opened_run(trained):
    """Returns the opened run, and a function that collects the results of a split."""
    run = open_run(trained[0], ["test"])
    run_eval = run.setup.compile_eval_step()
    return run, lambda split, modalities=None, batch_size=16: collect(
        run_eval, run.state, split, run.setup, batch_size=batch_size, modalities=modalities
    )


def metrics(scores):
    return {name: value for name, value in scores.items() if name in METRICS["classification"]}


@pytest.mark.thorough
@pytest.mark.loop
def test_train_with_profile_writes_a_trace(trained):
    assert list((trained[0] / "profile").rglob("*.xplane.pb"))


@pytest.mark.loop
@pytest.mark.parametrize("split", ["test", "valid"])
def test_evaluate_equals_the_result_of_training(split, trained):
    workdir, result = trained
    scores = evaluate(workdir, split)
    assert set(metrics(scores)) == set(METRICS["classification"])
    assert metrics(scores) == pytest.approx(metrics(result[split]), rel=1e-6)
    assert scores["confusion"] == result[split]["confusion"]
    assert scores["step"] == result["best_step"]
    assert json.loads((workdir / "result.json").read_text())["test"] == result["test"]


@pytest.mark.loop
def test_evaluate_runs_an_8_device_run_on_one_device(trained, tmp_path):
    workdir, result = trained

    def use_8_devices(config):
        config.parallel.update({"mode": "jit", "devices": 8, "mesh": {"data": 1, "fsdp": 4, "model": 2}})

    assert metrics(evaluate(workdir, overrides=use_8_devices)) == pytest.approx(metrics(result["test"]), rel=1e-6)


@pytest.mark.parametrize(
    ("available", "devices", "fsdp", "model", "batch", "expected"),
    [
        (8, 0, 4, 2, 16, {}),
        (8, 0, 1, 1, 16, {}),
        (16, 8, 4, 2, 12, {}),
        (1, 8, 4, 2, 16, (1, 1, 1)),
        (4, 0, 1, 1, 15, (3, 1, 1)),  # the batch is divisible by three of the devices
        (6, 8, 4, 1, 16, (4, 1, 1)),
        (16, 32, 4, 2, 16, (16, 4, 2)),
        (4, 8, 4, 1, 2, (2, 1, 1)),  # no sharded mesh divides the batch
    ],
)
def test_fit_to_machine_selects_devices_and_mesh(available, devices, fsdp, model, batch, expected, monkeypatch):
    monkeypatch.setattr(mesh.jax, "device_count", lambda: available)
    requested = {"devices": devices, "mesh": {"data": -1, "fsdp": fsdp, "model": model}}
    found = mesh.fit_to_machine(requested, batch)
    assert found == (
        {"devices": expected[0], "mesh": {"data": -1, "fsdp": expected[1], "model": expected[2]}} if expected else {}
    )


def test_fit_to_machine_uses_all_devices_of_several_hosts(monkeypatch):
    monkeypatch.setattr(mesh.jax, "device_count", lambda: 4)
    monkeypatch.setattr(mesh.jax, "process_count", lambda: 2)
    requested = {"devices": 2, "mesh": {"data": -1, "fsdp": 1, "model": 4}}
    assert mesh.fit_to_machine(requested, 16) == {"devices": 4, "mesh": {"data": -1, "fsdp": 1, "model": 1}}
    with rejects("config.batch_size", 50, says="4 devices of 2 hosts"):
        mesh.fit_to_machine(requested, 50)


@pytest.mark.loop
def test_collect_returns_every_row_once_for_any_batch_size(opened_run):
    run, rows_of = opened_run
    split = run.dataset.splits["test"]
    rows = rows_of(split)
    assert rows["id"].tolist() == split.ids.tolist()
    assert rows["targets"]["label"].tolist() == [split.source[int(i)]["label"] for i in split.ids]
    padded = rows_of(split, batch_size=24)  # 64 rows: the last batch is padded
    assert padded["id"].tolist() == rows["id"].tolist()
    np.testing.assert_allclose(padded["logits"]["label"], rows["logits"]["label"], atol=1e-5)


@pytest.mark.loop
def test_collect_ignores_the_content_of_dropped_modalities(opened_run):
    run, rows_of = opened_run
    split = run.dataset.splits["test"]
    noise = np.random.default_rng(0).integers(0, 256, split.arrays.inputs["image"].shape, np.uint8)
    noisy = dataclasses.replace(split, arrays=split.arrays.replace(inputs={**split.arrays.inputs, "image": noise}))
    logits = {
        (name, kept): rows_of(part, modalities=kept)["logits"]["label"]
        for name, part in (("clean", split), ("noisy", noisy))
        for kept in (None, ("text",), ("image",))
    }
    np.testing.assert_array_equal(logits["clean", ("text",)], logits["noisy", ("text",)])
    for kept in (None, ("image",)):
        assert np.abs(logits["clean", kept] - logits["noisy", kept]).max() > 1e-3
    assert np.abs(logits["clean", None] - logits["clean", ("text",)]).max() > 1e-3


def test_evaluate_command_prints_a_table_and_writes_json(trained, command):
    workdir, result = trained
    before = {path: path.stat().st_mtime_ns for path in workdir.rglob("*") if path.is_file()}
    process = command("experiments.evaluate", f"--workdir={workdir}", "--modalities=text", COLUMNS="200")
    assert (process.returncode, process.stderr) == (0, "")
    (written,) = json.loads((workdir / "evaluation.json").read_text())
    assert (written["split"], written["modalities"], written["examples"]) == ("test", ["text"], 64)
    assert (written["data"], written["rows"]) == ("shapes/match", 64)
    assert written["step"] == result["best_step"]
    assert set(metrics(written)) == set(METRICS["classification"])
    assert "test: text" in process.stdout
    assert "balanced" in process.stdout
    assert f"{written['accuracy']:.4f}" in process.stdout
    after = {path: path.stat().st_mtime_ns for path in before}
    assert after == before


@pytest.mark.loop
@pytest.mark.parametrize(
    ("options", "path", "value", "suggestion"),
    [
        ({"split": "tests"}, "split", "tests", "test"),
        ({"modalities": ["img"]}, "modality", "img", "image"),
    ],
)
def test_evaluate_suggests_the_nearest_split_or_modality(options, path, value, suggestion, trained):
    with rejects(path, value, suggestion):
        evaluate(trained[0], **options)


@pytest.fixture(scope="module")
def planted_run(tmp_path_factory):
    """Returns the directory and the result of a run on 40 planted rows, of which 5 test rows have no image."""
    workdir = tmp_path_factory.mktemp("planted") / "run"
    with pytest.MonkeyPatch.context() as patch:
        planted.plant(patch, train=PLANTED, test=SPARSE)
        return workdir, train(planted.config("image+text", data__max_bad_fraction=0.2), workdir)


PLANTED = [planted.row(i) for i in range(40)]
SPARSE = [planted.row(i, **({"image": None} if i < 5 else {})) for i in range(20)]


@pytest.mark.loop
def test_evaluate_counts_only_rows_that_have_a_modality(planted_run, monkeypatch):
    planted.plant(monkeypatch, train=PLANTED, test=SPARSE)
    model = load(planted_run[0])
    scores = model.evaluate(modalities=["image"])
    assert (scores["examples"], scores["rows"]) == (15, 20)
    assert (model.evaluate()["examples"], planted_run[1]["test"]["rows"]) == (20, 20)
    predicted = model.predict([{"image": row["image"]} for row in SPARSE])
    assert [bool(error) for error in predicted.errors] == [i < 5 for i in range(20)]
    right = [predicted.tasks["label"].labels[i] == ("no", "yes")[SPARSE[i]["label"]] for i in range(5, 20)]
    assert scores["accuracy"] == pytest.approx(np.mean(right))


@pytest.mark.loop
def test_evaluate_rejects_a_split_without_the_modality(planted_run, monkeypatch):
    def streamed(config):  # rows in memory are checked as they are read
        config.data.memory_gb = 0.0

    planted.plant(monkeypatch, none=SPARSE[:5])
    with rejects("modalities", ["image"], says="none of the 5 rows of 'none' has any"):
        evaluate(planted_run[0], "none", ["image"], streamed, data="planted")


@pytest.mark.loop
def test_evaluate_reads_another_dataset_as_the_runs_own(planted_run, monkeypatch):
    workdir, result = planted_run
    planted.plant(monkeypatch, other=SPARSE, more=[planted.row(i) for i in range(50, 57)])
    scores = evaluate(workdir, "other", data="planted")
    assert (scores["data"], scores["split"]) == ("planted", "other")
    assert metrics(scores) == pytest.approx(metrics(result["test"]), rel=1e-6)
    assert evaluate(workdir, "more", data="planted")["rows"] == 7


@pytest.mark.loop
@pytest.mark.parametrize("names", [("No", "Yes"), ("no", "yes", "maybe")])
def test_evaluate_rejects_other_classes(names, planted_run, monkeypatch):
    planted.plant(monkeypatch, {"label": names}, train=PLANTED, test=SPARSE, other=SPARSE)
    for split, data in (("other", "planted"), ("test", "")):  # another dataset, and the run's own prepared again
        with rejects("config.data.name", "planted", says=f"has the classes {', '.join(names)} of the target 'label'"):
            evaluate(planted_run[0], split, data=data)


@pytest.mark.loop
def test_evaluate_matches_classes_in_another_order_by_name(planted_run, monkeypatch):
    workdir, result = planted_run
    swapped = [{**row, "label": 1 - row["label"]} for row in SPARSE]
    planted.plant(monkeypatch, {"label": ("yes", "no")}, train=PLANTED, test=swapped, other=swapped)
    for split, data in (("other", "planted"), ("test", "")):  # another dataset, and the run's own prepared again
        assert metrics(evaluate(workdir, split, data=data)) == pytest.approx(metrics(result["test"]), rel=1e-6)


@pytest.mark.loop
def test_evaluate_rejects_a_missing_run_or_checkpoint(trained, tmp_path):
    with rejects(tmp_path, None, says="config.json"):
        evaluate(tmp_path)
    shutil.copy(trained[0] / "config.json", tmp_path)
    with rejects(tmp_path, None, says="has no checkpoints yet"):
        evaluate(tmp_path)
    (tmp_path / "checkpoints").mkdir()
    with rejects(tmp_path, None, says="has no checkpoint yet"):
        evaluate(tmp_path)
    (tmp_path / "config.json").write_text((trained[0] / "config.json").read_text()[:-40])
    with rejects(tmp_path / "config.json", None):
        evaluate(tmp_path)


@pytest.mark.loop
def test_evaluate_rejects_another_architecture(trained, tmp_path):
    def widen(config):
        config.model.width = 16

    with rejects(trained[0] / "checkpoints" / str(trained[1]["best_step"]), None) as error:
        evaluate(trained[0], overrides=widen)
    assert re.search(r"params/\S+ is \[.*16.*\].* in the model, \[.*8.*\]", error.value.message)


@pytest.mark.loop
def test_tasks_of_every_type_are_trained_and_predicted_together(monkeypatch, tmp_path):
    rows = [planted.row(i) for i in range(40)]
    planted.plant(monkeypatch, train=rows, test=rows[:20])
    config = planted.config(
        "image+text", tasks="label+tags+amount", data__targets__amount__weight=0.5, select="label/accuracy"
    )
    result = train(config, tmp_path / "run")
    expected = {
        "label": {*METRICS["classification"], "per_class", "confusion"},
        "tags": {*METRICS["multilabel"], "per_class"},
        "amount": set(METRICS["regression"]),
    }
    scale = open_run(tmp_path / "run", []).dataset.reader.scales["amount"]
    assert scale.std > 1
    for split in ("valid", "test"):
        scores = result[split]
        names = {f"{task}/{name}" for task, metric_names in expected.items() for name in metric_names}
        counts = {f"{task}/examples": scores["examples"] for task in ("label", "tags", "amount")}
        assert set(scores) == names | {"loss", "examples", "rows"} | counts.keys()
        assert counts.items() <= scores.items()
        total = scores["label/loss"] + scores["tags/loss"] + 0.5 * scores["amount/loss"]
        assert scores["loss"] == pytest.approx(total)
        assert scores["amount/loss"] == pytest.approx((scores["amount/rmse"] / scale.std) ** 2, rel=1e-4)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert any("label/accuracy" in json.dumps(line) for line in lines)

    (tmp_path / "rows.csv").write_text("text\nrow 3 number3\nrow 4 number4\n")
    predicted = predict(tmp_path / "run", tmp_path / "rows.csv", tmp_path / "out.csv", allow_missing=True)
    assert predicted == (2, 2, [])
    header, *cells = [line.split(",") for line in (tmp_path / "out.csv").read_text().splitlines()]
    columns = ["row", "amount", "label", "label: no", "label: yes", "tags", "tags: 0", "tags: 1", "tags: 2", "error"]
    assert header == columns
    for cell in (dict(zip(header, row, strict=True)) for row in cells):
        assert float(cell["label: no"]) + float(cell["label: yes"]) == pytest.approx(1, abs=2e-6)
        assert set(filter(None, cell["tags"].split("|"))) == {k for k in "012" if float(cell[f"tags: {k}"]) >= 0.5}
        assert np.isfinite(float(cell["amount"]))
