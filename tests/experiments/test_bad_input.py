"""User errors: one clear line or the documented behaviour, without lost or partially written files."""

import errno
import json
import shutil
import urllib.error
import zipfile

import numpy as np
import pytest

from configs import easy_vqa
from mmfusion.data.builders import archives
from mmfusion.data.builders.easy_vqa import easy_vqa_dataset_builder
from mmfusion.data.builders.shapes import shapes_dataset_builder
from mmfusion.data.dataset import holdout_split
from mmfusion.errors import UserError
from mmfusion.training.loop import train
from mmfusion.training.restore import open_run
from tests import planted, tiny

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
    ("defect", "message"),
    [
        ("missing", r"cannot be downloaded \(Name or service not known\): put \S+\.zip into .*manual_dir=FOLDER"),
        ("truncated", r"\.zip: is truncated or not a zip .*: download it again from https://"),
        ("another", r"\.zip: has 0 of the \d+ members used: download it again from https://"),
    ],
)  # fmt: skip
def test_train_reports_an_unusable_archive(defect, message, archive, tmp_path):
    if defect != "missing":
        write_another_zip(archive)
    if defect == "truncated":
        archive.write_bytes(archive.read_bytes()[:-50])
    with pytest.raises(UserError, match=message):
        train(easy_vqa_config(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "data").rglob("*.array_record*"))


@pytest.mark.loop
def test_train_rejects_an_archive_with_other_content(archive, tmp_path, monkeypatch):
    write_another_zip(archive)
    known = archives.dataclasses.replace(easy_vqa_dataset_builder.ARCHIVE, members=r"README\.md", count=1)
    monkeypatch.setattr(easy_vqa_dataset_builder, "ARCHIVE", known)
    with pytest.raises(
        UserError, match=r"is not the known archive \(fingerprint \w{12}, known \w{12}\): download it again"
    ):
        train(easy_vqa_config(tmp_path), tmp_path / "run")
    assert not (tmp_path / "run").exists()


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
    with pytest.raises(UserError, match=r"no space left while preparing 'shapes/match' under \S+/data"):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert not list((tmp_path / "data").rglob("*.array_record*"))


@pytest.mark.loop
@pytest.mark.parametrize("folder", ["/proc/none", "file/run"])
def test_train_reports_a_directory_that_cannot_be_created(tmp_path, monkeypatch, folder):
    (tmp_path / "file").write_text("")
    plant(monkeypatch)
    with pytest.raises(UserError, match=rf"{folder}.*(No such file|no folder that you may write to)"):
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


@pytest.mark.loop
@pytest.mark.parametrize("split", ["train", "test"])
@pytest.mark.parametrize("memory_gb", [1.0, 0.0])
def test_train_rejects_too_many_corrupt_files(memory_gb, split, tmp_path, monkeypatch):
    in_valid = holdout_split(range(ROWS), planted.SMALL["data.valid_fraction"])
    corrupt = {number: {"image": b"no image"} for number in range(20) if split == "test" or not in_valid[number]}
    plant(monkeypatch, **{split: corrupt})
    config = planted.config(data__max_bad_fraction=0.1, data__memory_gb=memory_gb)
    message = rf"max_bad_fraction=0\.1: \d+ of \d+ rows of split '{split}' cannot be read; .* the first: row \d+, image"
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "run")
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
    ("target", "message"),
    [
        ({"label": 2}, r"split 'train', row 8, target 'label': class 2 is outside 0 to 1; correct the data or"),
        (
            {"amount": np.float32("nan")},
            r"split 'train', row 8, target 'amount': a regression target must be one finite",
        ),
        ({"tags": [3]}, r"split 'train', row 8, target 'tags': classes \[3\] are outside 0 to 2"),
    ],
)
def test_train_rejects_an_invalid_target(target, message, memory_gb, tmp_path, monkeypatch):
    plant(monkeypatch, train={8: target})
    (task,) = target
    config = planted.config("text", tasks=task, data__memory_gb=memory_gb, steps=8, eval_every=8)
    with pytest.raises(UserError, match=message):
        train(config, tmp_path / "run")
    assert not (tmp_path / "run" / "result.json").exists()


@pytest.mark.loop
def test_train_rejects_an_empty_split_and_an_absent_modality(tmp_path, monkeypatch):
    planted.plant(monkeypatch, train=rows(), test=[])
    with pytest.raises(UserError, match=r"planted:test\S* has no examples"):
        train(planted.config(), tmp_path / "run")
    plant(monkeypatch, test={number: {"text": ""} for number in range(ROWS)})
    with pytest.raises(UserError, match=r"modalities\.text: absent in every row of split 'test'; .* leave it out"):
        train(planted.config(), tmp_path / "run")
    assert not (tmp_path / "run").exists()


# --- Directories ---


@pytest.mark.loop
@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"steps": 4}, r"belongs to another run: its config\.steps is 2, here it is 4; give another --workdir"),
        ({"optim__learning_rate": 0.5}, r"its config\.optim\.learning_rate is 0\.001, here it is 0\.5"),
        ({"model__width": 16}, r"its config\.model\.width is 8, here it is 16"),
        ({"seed": 1}, r"its config\.seed is 0, here it is 1"),
    ],
)
def test_train_rejects_a_directory_of_another_run(changes, message, run):
    before = directory_content(run)
    with pytest.raises(UserError, match=message):
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
    with pytest.raises(UserError, match=r"the data has changed since .*run was started .*: restore the data, or give"):
        train(planted.config(), run)
    assert directory_content(run) == before


@pytest.mark.loop
def test_train_rejects_a_checkpoint_of_another_architecture(run):
    saved = json.loads((run / "config.json").read_text())
    saved["model"]["width"] = 16
    (run / "config.json").write_text(json.dumps(saved))
    before = directory_content(run)
    message = (
        r"checkpoint .* has another architecture: params/\S+ is \[.*16.*\] float32 in the model, \[.*8.*\] float32 in"
    )
    with pytest.raises(UserError, match=message):
        train(planted.config(model__width=16), run)
    with pytest.raises(UserError, match=message):
        open_run(run, [])
    assert directory_content(run) == before


@pytest.mark.loop
@pytest.mark.parametrize("content", ["", '{"seed": 0, "st', "[]", "null"])
def test_train_reports_a_truncated_config(content, run):
    (run / "config.json").write_text(content)
    before = directory_content(run)
    with pytest.raises(UserError, match=r"config\.json"):
        train(planted.config(), run)
    with pytest.raises(UserError, match=r"config\.json"):
        open_run(run, [])
    assert directory_content(run) == before


@pytest.mark.loop
def test_train_rejects_a_file_as_workdir(tmp_path, monkeypatch):
    plant(monkeypatch)
    (tmp_path / "file").write_text("mine")
    for workdir in (tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(UserError, match=r"--workdir=\S+ (is a file; give a directory|cannot be made)"):
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
    for changes, message in (
        ({"model__encoders__audio__strides": (2, 2)}, r"logmel_cnn: channels=\(4,\) and strides=\(2, 2\) differ"),
        ({"model__encoders__image__norm": "layers"}, "norm='layers' is unknown"),
        ({"data__targets__label__class_weights": (1.0, 2.0, 3.0)}, "class_weights has 3 entries for 2 classes"),
    ):
        with pytest.raises(UserError, match=message):
            train(planted.config(**changes), tmp_path / "run")
        assert not (tmp_path / "run").exists()
