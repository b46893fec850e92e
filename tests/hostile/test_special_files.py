"""Paths that lead to pipes, devices, folders and files without end, as inputs and as outputs."""

import csv
import gzip
import json
import os
import socket
import struct
import zipfile
from pathlib import Path

import numpy as np
import pytest

from experiments import cli
from mmfusion.config import defaults
from mmfusion.data import array_file, audio, knowledge, table_dataset, table_file, table_writer
from mmfusion.data.decoding import Reader
from mmfusion.data.regular_files import check_output, read_file
from mmfusion.inference import rows as input_rows
from mmfusion.inference.output_folder import check_new
from mmfusion.inference.predict import predict
from mmfusion.training.loop import train
from tests import planted
from tests.errors import rejects
from tests.hostile.limits import within

pytestmark = pytest.mark.usefixtures("traced_once")

GOOD = "good.png"


@pytest.fixture
def special(tmp_path):
    """Returns paths by name, relative to a folder, that are no regular file of a size that is read."""
    (tmp_path / GOOD).write_bytes(planted.png(100))
    os.mkfifo(tmp_path / "pipe.png")
    (tmp_path / "link.png").symlink_to("pipe.png")
    (tmp_path / "zero.png").symlink_to("/dev/zero")
    (tmp_path / "loop.png").symlink_to("loop.png")
    (tmp_path / "folder.png").mkdir()
    (tmp_path / "large.png").touch()
    os.truncate(tmp_path / "large.png", 1 << 40)  # takes no space
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(tmp_path / "socket.png"))
    names = ["pipe.png", "link.png", "zero.png", "loop.png", "folder.png", "large.png", "socket.png", "none.png"]
    return {**{name: name for name in names}, "device": "/dev/zero", "NUL": "a\0b.png", "long": "a" * 5000 + ".png"}


# --- Inputs ---


def test_read_file_reads_regular_files_only(special, tmp_path):
    assert read_file(tmp_path / GOOD) == planted.png(100)
    for path in special.values():
        with pytest.raises((OSError, ValueError)), within(5):
            read_file(tmp_path / path)
    with pytest.raises(OSError, match="more than 10"):
        read_file(tmp_path / GOOD, limit=10)


def test_rows_have_an_error_for_each_special_file(special, tmp_path):
    options = defaults.modality("image", "image", size=(8, 8)).to_dict()
    reader = Reader({"image": options}, {}, {}, {})
    paths = [*special.values(), GOOD]
    with within(10):
        ((_, errors),) = input_rows.batches(reader, [{"image": path} for path in paths], 16, tmp_path)
    assert [bool(error) for error in errors] == [True] * len(special) + [False]
    assert all("\n" not in error for error in errors)
    several = {"images": {**defaults.modality("images", "x", size=(8, 8), count=1).to_dict()}}
    with within(10):
        rows = [{"x": [path]} for path in paths]
        ((_, errors),) = input_rows.batches(Reader(several, {}, {}, {}), rows, 16, tmp_path)
    assert [bool(error) for error in errors] == [True] * len(special) + [False]


def test_table_rows_have_an_error_for_each_special_file(special, tmp_path):
    for path in special.values():
        with within(5):
            assert isinstance(table_dataset._read_file(str(tmp_path), path), OSError)
    assert table_dataset._read_file(str(tmp_path), GOOD) == planted.png(100)


def test_audio_and_triples_are_read_from_regular_files_only(special, tmp_path):
    for path in special.values():
        with pytest.raises((OSError, ValueError)), within(5):
            audio.decode(tmp_path / path, 1000)
        with rejects(str(tmp_path / path), None), within(5):
            knowledge.from_triples(str(tmp_path / path))


@pytest.mark.parametrize("suffix", [".csv", ".jsonl", ".json", ".npz", ".csv.gz"])
def test_open_table_refuses_special_files(suffix, tmp_path):
    os.mkfifo(tmp_path / f"pipe{suffix}")
    (tmp_path / f"zero{suffix}").symlink_to("/dev/zero")
    (tmp_path / f"folder{suffix}").mkdir()
    for path in (f"pipe{suffix}", f"zero{suffix}", f"folder{suffix}", f"a\0b{suffix}"):
        for read in (table_file.open_table, table_dataset.read_table):
            with rejects(str(tmp_path / path), None), within(5):
                read(tmp_path / path)


@pytest.mark.parametrize("name", ["line.csv.gz", "line.jsonl.gz", "header.csv.gz", "list.json.gz"])
def test_open_table_refuses_what_is_too_long_after_decompression(name, tmp_path, monkeypatch):
    monkeypatch.setattr(table_file, "CELL_CHARACTERS", 1000)
    monkeypatch.setattr(table_file, "JSON_CHARACTERS", 1000)
    start = {"line.csv.gz": "a,b\n", "line.jsonl.gz": '{"a": 1}\n', "list.json.gz": "["}.get(name, "")
    path = tmp_path / name
    path.write_bytes(gzip.compress((start + "1" * 5000).encode()))
    with rejects(str(path), None, says="longer than 1,000 characters"):
        list(table_file.open_table(path))


def test_open_table_refuses_arrays_larger_than_the_memory(tmp_path, monkeypatch):
    header = b"{'descr': '<f4', 'fortran_order': False, 'shape': (4611686018427387904,), }"
    member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(header) + 1) + header + b"\n"
    with zipfile.ZipFile(tmp_path / "header.npz", "w") as file:
        file.writestr("x.npy", member)
    np.savez(tmp_path / "declared.npz", x=np.arange(3))
    with rejects(str(tmp_path / "header.npz"), None):
        table_file.open_table(tmp_path / "header.npz")
    assert len(list(table_file.open_table(tmp_path / "declared.npz"))) == 3
    monkeypatch.setattr(array_file.os, "sysconf", lambda _: 10)  # pages, and bytes of one
    with rejects(str(tmp_path / "declared.npz"), None, says="100 of memory"):
        table_file.open_table(tmp_path / "declared.npz")


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Returns the directory of a finished run on images and texts."""
    workdir = tmp_path_factory.mktemp("run") / "run"
    with pytest.MonkeyPatch.context() as patch:
        rows = [planted.row(i) for i in range(40)]
        planted.plant(patch, train=rows, test=rows[:20])
        train(planted.config("image"), workdir)
    return workdir


@pytest.mark.loop
def test_predict_accounts_for_every_row(run, special, tmp_path):
    paths = [GOOD, *special.values(), GOOD]
    with (tmp_path / "in.csv").open("w", newline="") as file:
        csv.writer(file).writerows([("image", "name"), *((path, i) for i, path in enumerate(paths))])
    with within(60):
        predicted, total, errors = predict(run, tmp_path / "in.csv", tmp_path / "out.csv")
    assert (predicted, total, len(errors)) == (2, len(paths), 10)
    with (tmp_path / "out.csv").open(newline="") as file:
        written = list(csv.DictReader(file))
    assert [row["row"] for row in written] == [str(i) for i in range(len(paths))]
    assert [bool(row["error"]) for row in written] == [path != GOOD for path in paths]
    assert all(bool(row["label"]) != bool(row["error"]) for row in written)
    assert {row["error"].partition(": ")[0] for row in written} == {"", "image", "column 'image' has a NUL character"}


# --- Outputs ---


@pytest.fixture
def outputs(tmp_path):
    """Returns paths by name that must not be written."""
    (tmp_path / "in.csv").write_text("image\na.png\n")
    (tmp_path / "folder").mkdir()
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "to pipe").symlink_to("pipe")
    (tmp_path / "to device").symlink_to("/dev/null")
    (tmp_path / "loop").symlink_to("loop")
    (tmp_path / "to nowhere").symlink_to("none/file")
    (tmp_path / "to input").symlink_to("in.csv")
    os.link(tmp_path / "in.csv", tmp_path / "hard link")
    spelled = f"{tmp_path}/folder/.././in.csv"
    names = [
        "pipe",
        "to pipe",
        "to device",
        "loop",
        "to nowhere",
        "to input",
        "hard link",
        "folder",
        "in.csv",
        "no/file",
    ]
    return [*(f"{tmp_path}/{name}" for name in names), spelled, "/dev/null", "a\0b", f"{tmp_path}/{'a' * 300}"]


def listing(folder):
    """Returns what is in a folder: the type and the link of every path, and the text of files."""
    links = {path.name: os.readlink(path) if path.is_symlink() else "" for path in folder.iterdir()}
    texts = {name: folder.joinpath(name).read_text() for name in links if folder.joinpath(name).is_file()}
    return links, texts, {name: folder.joinpath(name).lstat().st_mode for name in links}


def test_check_output_refuses_what_is_no_new_or_regular_file(outputs, tmp_path):
    before = listing(tmp_path)
    for output in outputs:
        with rejects(f"--output={output}", None), within(5):
            check_output(output, "--output", [tmp_path / "in.csv"])
    assert listing(tmp_path) == before and Path("/dev/null").is_char_device()


def test_check_output_follows_links_to_files(tmp_path):
    (tmp_path / "old").write_text("old")
    (tmp_path / "link").symlink_to("old")
    (tmp_path / "new link").symlink_to("new")
    for path, target in (("old", "old"), ("link", "old"), ("new", "new"), ("new link", "new")):
        assert check_output(tmp_path / path, "--output") == Path(os.path.realpath(tmp_path)) / target


def test_predict_refuses_outputs_before_it_opens_the_run(outputs, tmp_path):
    before = listing(tmp_path)
    for output in outputs:
        with rejects(f"--output={output}", None), within(5):
            predict("no run", tmp_path / "in.csv", output)
    assert listing(tmp_path) == before


def test_commands_refuse_outputs(outputs, tmp_path):
    for output in outputs:
        with rejects(f"--plot={output}", None), within(5):
            cli.file_in_folder("--plot", output, [f"{tmp_path}/in.csv"])


@pytest.mark.parametrize("flag", ["output", "plot"])
def test_inspect_does_not_replace_its_table(flag, tmp_path, command):
    (tmp_path / "in.csv").write_text("x,label\n1,a\n2,b\n")
    (tmp_path / "link").symlink_to("in.csv")
    process = command("experiments.inspect", f"{tmp_path}/in.csv", f"--{flag}={tmp_path}/link")
    assert process.returncode == 2 and process.stderr.count("\n") == 1 and f"--{flag}=" in process.stderr
    assert (tmp_path / "in.csv").read_text().startswith("x,label")


def test_folders_of_results_are_new(outputs, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "to folder").symlink_to("empty")
    (tmp_path / "folder" / "file").touch()
    for path in ("pipe", "to pipe", "to device", "to nowhere", "to folder", "in.csv", "folder", "no/folder"):
        with rejects("--output=x", None), within(5):
            check_new(tmp_path / path, "--output=x")
    with rejects("--output=x", None):
        check_new(Path("/dev/null"), "--output=x")
    check_new(tmp_path / "empty", "--output=x")


def test_write_table_replaces_nothing(tmp_path):
    (tmp_path / "a.csv").symlink_to("none")
    os.mkfifo(tmp_path / "b.csv")
    (tmp_path / "c").symlink_to("none")
    for name, existing in (("a.csv", "a.csv"), ("b.csv", "b.csv"), ("c.csv", "c")):
        with rejects("--output", str(tmp_path / existing)), within(5):
            table_writer.write_table({}, {}, tmp_path / name)


@pytest.mark.loop
def test_predict_writes_through_no_planted_link(run, tmp_path, monkeypatch):
    (tmp_path / GOOD).write_bytes(planted.png(100))
    (tmp_path / "in.jsonl").write_text(json.dumps({"image": GOOD}) + "\n")
    (tmp_path / "mine").write_text("mine")
    (tmp_path / f".out.csv.{os.getpid()}").symlink_to("mine")
    predict(run, tmp_path / "in.jsonl", tmp_path / "out.csv")
    assert (tmp_path / "mine").read_text() == "mine" and "good.png" not in (tmp_path / "out.csv").read_text()
