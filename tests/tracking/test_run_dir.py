"""A run directory in a bucket: the real client libraries with an emulated storage."""

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import fsspec
import fsspec.config
import pytest
from absl.testing import flagsaver
from etils import epath

from experiments import checkpoints, reproduce
from mmfusion.checkpoints.manager import load_verified
from mmfusion.distributed import mesh
from mmfusion.errors import Preempted
from mmfusion.files import RemoteFolder, write_json
from mmfusion.inference.evaluate import evaluate
from mmfusion.tracking import run_dir
from mmfusion.training.loop import train
from tests.errors import rejects
from tests.storage import asked_by_clients, serving
from tests.training.test_resume import assert_same_run

pytestmark = pytest.mark.usefixtures("traced_once")

SMALL = "fusion=concat,modalities=image"
CHANGES = {"steps": 4, "eval_every": 2, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def storage() -> Iterator[str]:
    """Yields the URL of an initially empty bucket."""
    with serving() as address, asked_by_clients(address):
        yield "gs://bucket"


def download(url: str, folder: Path) -> Path:
    """Downloads a directory of the bucket and returns the local copy."""
    files, top = fsspec.url_to_fs(url)
    files.invalidate_cache()
    for path in files.find(top):
        target = folder / path.removeprefix(top).lstrip("/")
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_bytes(files.cat_file(path))
    return folder


@pytest.mark.loop
def test_run_dir_in_a_bucket_gives_the_same_run(
    storage: str, tiny_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):  # fmt: skip
    config, url = tiny_config(SMALL, CHANGES), f"{storage}/run"
    train(config, tmp_path / "local")

    partial = epath.Path(url) / "checkpoints" / "2" / "meta" / "metadata"  # of a save that was killed
    partial.parent.mkdir(parents=True)
    partial.write_text("{")
    stops = iter([False] * 2 + [True])  # polled after every step: a signal at step 3
    with monkeypatch.context() as patch, pytest.raises(Preempted, match="saved at step 3"):
        patch.setattr(mesh.Partitioner, "should_stop", lambda *_: next(stops))
        train(config, url)
    remote = epath.Path(url)
    assert sorted(path.name for path in (remote / "checkpoints").iterdir())[-1] == "3"
    assert not (remote / "result.json").exists() and not (remote / "damaged-checkpoints").exists()
    result = train(config, url)  # as on a machine without local files
    assert json.loads((remote / "result.json").read_text())["test"] == result["test"]
    assert_same_run(download(url, tmp_path / "downloaded"), tmp_path / "local", 4)
    assert evaluate(url)["accuracy"] == result["test"]["accuracy"]
    write_json(f"{url}/evaluation.json", {"accuracy": 0.5})
    assert json.loads((remote / "evaluation.json").read_text()) == {"accuracy": 0.5}
    with flagsaver.flagsaver():
        checkpoints.main(["checkpoints", url])
        assert capsys.readouterr().out.count("│ valid │") >= 2
        checkpoints.main(["checkpoints", url, "--copy=4", f"--to={tmp_path}/copy"])
    assert load_verified(tmp_path / "copy")[1]["step"] == 4

    with flagsaver.flagsaver(), pytest.raises(SystemExit, match="0"):
        reproduce.main(["rerun", url, f"--again={tmp_path}/reproduced"])
    assert "bitwise identical" in capsys.readouterr().out

    corrupt = remote / "checkpoints" / "4" / "meta" / "metadata"
    corrupt_text = corrupt.read_text().replace('"step"', '"stop"', 1)
    corrupt.write_text(corrupt_text)
    resumed = train(config, url)  # from step 3 on
    assert resumed["test"] == result["test"]
    assert "4 is damaged" in capsys.readouterr().err
    assert (remote / "damaged-checkpoints" / "4-0" / "meta" / "metadata").read_text() == corrupt_text

    with rejects(url, None, says="its config.seed is 0, here it is 1"):
        train(tiny_config(f"{SMALL},seed=1", CHANGES), url)
    shutil.rmtree(tmp_path)


def test_run_dir_reports_an_unreachable_bucket_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for error, fact in (
        (ImportError("No module named 'gcsfs'"), "pip install gcsfs"),
        (ConnectionError("no route\nto host"), "no route to host"),
    ):

        def fail(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        with monkeypatch.context() as patch, rejects("gs://b/run", None, says=fact):
            patch.setattr(RemoteFolder, "names", fail)
            run_dir.open_run_dir("gs://b/run").__enter__()
    with run_dir.open_run_dir(tmp_path) as opened:
        assert (opened.folder, opened.bucket) == (tmp_path, None)
        opened.upload()
    assert list(tmp_path.iterdir()) == []
