"""User errors: one clear line or the documented behaviour, without lost or partially written files."""

import errno
import json
import re
import shutil
import urllib.error
import zipfile

import jax
import numpy as np
import pytest

from configs import easy_vqa
from mmfusion.data.builders import archives
from mmfusion.data.builders.easy_vqa import easy_vqa_dataset_builder
from mmfusion.data.builders.shapes import shapes_dataset_builder
from mmfusion.data.holdout import holdout_split
from mmfusion.training.loop import train
from mmfusion.training.restore import open_run
from mmfusion.training.setup import TrainSetup
from tests import planted, tiny
from tests.errors import rejects

pytestmark = pytest.mark.usefixtures("traced_once")

ROWS = 40


def rows(changes=None):
    """Returns valid rows, some of which lack a modality, with `changes` by row number."""
    absent = {0: {"text": ""}, 1: {"audio": planted.wav(0.1, samples=0)}, 2: {"image": None}, 3: {"text": " \n"}}
    changes = {**absent, **(changes or {})}
    return [planted.row(i, **changes.get(i, {})) for i in range(ROWS)]


def plant(monkeypatch, train=None, test=None):
    planted.plant(monkeypatch, train=rows(train), test=rows(test)[:20])


def directory_content(folder):
    """Returns the bytes of every file below a directory."""
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.fixture(scope="module")
def finished_run(tmp_path_factory):
    """Returns the directory of a finished run on valid rows, which tests do not change."""
    workdir = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as monkeypatch:
        plant(monkeypatch)
        train(planted.config(), workdir)
    return workdir


@pytest.fixture
def run(finished_run, tmp_path, monkeypatch):
    """Returns a copy of the finished run, with its data planted."""
    plant(monkeypatch)
    shutil.copytree(finished_run, tmp_path / "run")
    return tmp_path / "run"


# --- Archives and disks ---


@pytest.fixture
def archive(tmp_path, monkeypatch):
    """Returns the expected path of easy-VQA's archive, and disables the network."""

    def unreachable(*_, **__):
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(archives.urllib.request, "urlopen", unreachable)
    (tmp_path / "manual").mkdir()
    return tmp_path / "manual" / easy_vqa_dataset_builder.ARCHIVE.filename


def easy_vqa_config(tmp_path):
    config = easy_vqa.get_config()
    tiny.put(config, "data.dir", f"{tmp_path}/data")
    tiny.put(config, "data.manual_dir", f"{tmp_path}/manual")
    return config


def write_another_zip(path):
    with zipfile.ZipFile(path, "w") as file:
        file.writestr("easy-VQA-master/README.md", "another archive " * 100)


@pytest.mark.loop
@pytest.mark.parametrize(
    ("defect", "fact"),
    [("missing", "Name or service not known"), ("truncated", "truncated"), ("another", "has 0 of the ")],
)
def test_train_reports_an_unusable_archive(defect, fact, archive, tmp_path):
    if defect != "missing":
        write_another_zip(archive)
    if defect == "truncated":
        archive.write_bytes(archive.read_bytes()[:-50])
    with rejects(easy_vqa_dataset_builder.ARCHIVE.url if defect == "missing" else archive, None, says=fact):
        train(easy_vqa_config(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "data").rglob("*.array_record*"))


@pytest.mark.loop
def test_train_rejects_an_archive_with_other_content(archive, tmp_path, monkeypatch):
    write_another_zip(archive)
    known = archives.dataclasses.replace(easy_vqa_dataset_builder.ARCHIVE, members=r"README\.md", count=1)
    monkeypatch.setattr(easy_vqa_dataset_builder, "ARCHIVE", known)
    with rejects(archive, None, says="fingerprint"):
        train(easy_vqa_config(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.thorough
def test_train_command_exits_2_on_an_unusable_archive(tmp_path, command):
    (tmp_path / "manual").mkdir()
    path = tmp_path / "manual" / easy_vqa_dataset_builder.ARCHIVE.filename
    write_another_zip(path)
    process = command(
        "experiments.train", "--config=configs/easy_vqa.py", f"--workdir={tmp_path}/run",
        f"--config.data.dir={tmp_path}/data", f"--config.data.manual_dir={tmp_path}/manual",
    )  # fmt: skip
    assert process.returncode == 2
    assert process.stderr.startswith(f"error: {path}: has 0 of the ")
    assert process.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


@pytest.mark.loop
def test_train_reports_a_full_disk_during_preparation(tmp_path, monkeypatch):
    def raise_disk_full(*_):
        yield from ()
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(shapes_dataset_builder.Builder, "_generate_examples", raise_disk_full)
    config = tiny.config(changes={"data.dir": str(tmp_path / "data")})
    with rejects("config.data.name", "shapes/match", says=f"no space left to prepare it under {tmp_path}/data"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "data").rglob("*.array_record*"))


@pytest.mark.loop
@pytest.mark.parametrize(("folder", "path"), [("/proc/none", "/proc/none"), ("file/run", "--workdir")])
def test_train_reports_a_directory_that_cannot_be_created(tmp_path, monkeypatch, folder, path):
    (tmp_path / "file").write_text("")
    plant(monkeypatch)
    with rejects(path):
        train(planted.config(), tmp_path / folder)


# --- Rows ---

CORRUPT = {6: {"image": planted.png(9)[:50]}, 14: {"audio": planted.wav(0.1)[:90]}}
MESSAGES = {6: "row 6, image: ", 14: "row 14, audio: truncated"}


@pytest.mark.loop
def test_train_gives_corrupt_files_weight_0(tmp_path, monkeypatch):
    plant(monkeypatch, train=CORRUPT, test=CORRUPT)
    results = [
        train(planted.config(steps=4, data__max_bad_fraction=0.2, data__memory_gb=gb), tmp_path / f"{gb}")
        for gb in (1.0, 0.0)
    ]
    for result in results:
        assert result["test"]["examples"] == 18
        unreadable = result["data"]["unreadable"]
        assert [a.startswith(b) for a, b in zip(unreadable["test"], sorted(MESSAGES.values()), strict=True)] == [
            True,
            True,
        ]
        assert len(unreadable["train"]) + len(unreadable["valid"]) == 2
    for split in ("valid", "test"):
        assert results[0][split] == results[1][split]
    logs = [
        [json.loads(line) for line in (tmp_path / f"{gb}" / "metrics.jsonl").read_text().splitlines()]
        for gb in (1.0, 0.0)
    ]
    losses = [[line["loss"] for line in log if "grad_norm" in line] for log in logs]
    assert len(losses[0]) == 4
    assert losses[0] == losses[1]
    assert np.isfinite(losses[0]).all()


@pytest.mark.thorough(but=("0.0-train",))
@pytest.mark.loop
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("memory_gb", [1.0, 0.0])
def test_train_rejects_too_many_corrupt_files(memory_gb, split, tmp_path, monkeypatch):
    in_valid = holdout_split(range(ROWS), planted.SMALL["data.valid_fraction"])
    corrupt = {number: {"image": b"no image"} for number in range(20) if split == "test" or not in_valid[number]}
    plant(monkeypatch, **{split: corrupt})
    config = planted.config(data__max_bad_fraction=0.1, data__memory_gb=memory_gb)
    with rejects("config.data.max_bad_fraction", 0.1, says=f"rows of split '{split}'") as error:
        train(config, tmp_path / "run")
    assert re.search(r"the first: row \d+, image", error.value.message)
    if memory_gb:
        assert not (tmp_path / "run").exists()
        return
    # A streamed split fails during training: the checkpoints remain, and no result is written.
    assert not (tmp_path / "run" / "result.json").exists()
    plant(monkeypatch)
    assert train(config, tmp_path / "run")["steps"] == 2


@pytest.mark.loop
@pytest.mark.parametrize("memory_gb", [1.0, 0.0])
@pytest.mark.parametrize(
    ("target", "fact"),
    [
        ({"label": 2}, "class 2 is outside 0 to 1"),
        ({"amount": np.float32("nan")}, "one finite"),
        ({"tags": [3]}, "classes [3] are outside 0 to 2"),
    ],
)
def test_train_rejects_an_invalid_target(target, fact, memory_gb, tmp_path, monkeypatch):
    plant(monkeypatch, train={8: target})
    (task,) = target
    config = planted.config("text", tasks=task, data__memory_gb=memory_gb, steps=8, eval_every=8)
    with rejects("config.data.targets", None, says=f"split 'train', row 8, target '{task}': ") as error:
        train(config, tmp_path / "run")
    assert fact in error.value.message
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.loop
def test_train_rejects_an_empty_split_and_an_absent_modality(tmp_path, monkeypatch):
    planted.plant(monkeypatch, train=rows(), test=[])
    with rejects("config.data.name", "planted", says="planted:test"):
        train(planted.config(), tmp_path / "run")
    plant(monkeypatch, test={number: {"text": ""} for number in range(ROWS)})
    with rejects("config.data.modalities.text", None, says="split 'test'"):
        train(planted.config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- Directories ---


@pytest.mark.loop
@pytest.mark.parametrize(
    ("changes", "fact"),
    [
        ({"steps": 4}, "its config.steps is 2, here it is 4"),
        ({"optim__learning_rate": 0.5}, "its config.optim.learning_rate is 0.001, here it is 0.5"),
        ({"model__width": 16}, "its config.model.width is 8, here it is 16"),
        ({"seed": 1}, "its config.seed is 0, here it is 1"),
    ],
)
def test_train_rejects_a_directory_of_another_run(changes, fact, run):
    before = directory_content(run)
    with rejects(run, None, says=fact):
        train(planted.config(**changes), run)
    assert directory_content(run) == before


@pytest.mark.loop
def test_train_accepts_moved_data(run):
    result = json.loads((run / "result.json").read_text())
    moved = planted.config(data__memory_gb=0.5, data__workers=1, data__dir="/elsewhere", data__manual_dir="/elsewhere")
    assert train(moved, run) == result


@pytest.mark.loop
def test_train_rejects_changed_data(run, monkeypatch):
    before = directory_content(run)
    planted.plant(monkeypatch, train=rows(), test=rows()[:19])
    with rejects(run, None, says="the data has changed"):
        train(planted.config(), run)
    assert directory_content(run) == before


@pytest.mark.loop
def test_train_rejects_a_checkpoint_of_another_architecture(run, monkeypatch):
    before = directory_content(run)
    shapes = TrainSetup.state_shapes

    def wider(setup):
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct([2 * size for size in x.shape], x.dtype), shapes(setup))

    monkeypatch.setattr(TrainSetup, "state_shapes", wider)  # as where the code of a model has changed
    for read in (lambda: train(planted.config(), run), lambda: open_run(run, [])):
        with rejects(run / "checkpoints" / "2", None, says="another architecture") as error:
            read()
        assert re.search(r"params/\S+ is \[.*16.*\] float32 in the model, \[.*8.*\] float32", error.value.message)
    assert directory_content(run) == before


@pytest.mark.loop
@pytest.mark.parametrize("content", ["", '{"seed": 0, "st', "[]", "null"])
def test_train_reports_a_truncated_config(content, run):
    (run / "config.json").write_text(content)
    before = directory_content(run)
    with rejects(run / "config.json", None):
        train(planted.config(), run)
    with rejects(run / "config.json", None):
        open_run(run, [])
    assert directory_content(run) == before


@pytest.mark.loop
def test_train_rejects_a_file_as_workdir(tmp_path, monkeypatch):
    plant(monkeypatch)
    (tmp_path / "file").write_text("mine")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        with rejects("--workdir", str(workdir)):
            train(planted.config(), workdir)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.loop
def test_train_restarts_without_a_checkpoint(run):
    result = json.loads((run / "result.json").read_text())
    shutil.rmtree(run / "checkpoints")
    (run / "result.json").unlink()
    restarted = train(planted.config(), run)
    assert restarted["test"] == result["test"]


@pytest.mark.loop
def test_train_creates_no_directory_for_an_invalid_model(tmp_path, monkeypatch):
    plant(monkeypatch)
    for changes, path, fact in (
        ({"model__encoders__audio__strides": (2, 2)}, "logmel_cnn.strides", "channels=(4,)"),
        ({"model__encoders__image__norm": "layers"}, "norm", ""),
        ({"data__targets__label__class_weights": (1.0, 2.0, 3.0)}, "class_weights", "3 entries for 2 classes"),
    ):
        with rejects(path, *changes.values(), says=fact):
            train(planted.config(**changes), tmp_path / "run")
        assert not (tmp_path / "run").exists()
