"""A run whose directory is in a bucket: the client libraries themselves, and a stand-in for the storage they ask."""

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
from mmfusion.errors import Preempted, UserError
from mmfusion.files import RemoteFolder, write_json
from mmfusion.inference.evaluate import evaluate
from mmfusion.tracking import run_dir
from mmfusion.training.loop import train
from tests.storage import asked_by_clients, serving
from tests.training.test_resume import assert_same_run

pytestmark = pytest.mark.usefixtures("traced_once")

SMALL = "fusion=concat,modalities=image"
CHANGES = {"steps": 4, "eval_every": 2, "checkpoint_every": 2}


@pytest.fixture(scope="module")
def storage() -> Iterator[str]:
    """The address of a bucket, which is empty at first."""
    with serving() as address, asked_by_clients(address):
        yield "gs://bucket"


def fetched(url: str, folder: Path) -> Path:
    """Returns a local copy of a directory of the bucket."""
    files, top = fsspec.url_to_fs(url)
    files.invalidate_cache()
    for path in files.find(top):
        here = folder / path.removeprefix(top).lstrip("/")
        here.parent.mkdir(parents=True, exist_ok=True)
        here.write_bytes(files.cat_file(path))
    return folder


@pytest.mark.loop
def test_run_dir_in_a_bucket_holds_the_same_run(
    storage: str, tiny_config: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture,
):  # fmt: skip
    config, url = tiny_config(SMALL, CHANGES), f"{storage}/run"
    train(config, tmp_path / "here")

    half = epath.Path(url) / "checkpoints" / "2" / "meta" / "metadata"  # of one that a kill ended
    half.parent.mkdir(parents=True)
    half.write_text("{")
    stops = iter([False] * 2 + [True])  # asked for after every call: a signal at step 3
    with monkeypatch.context() as patch, pytest.raises(Preempted, match="saved at step 3"):
        patch.setattr(mesh.Partitioner, "should_stop", lambda *_: next(stops))
        train(config, url)
    there = epath.Path(url)
    assert sorted(path.name for path in (there / "checkpoints").iterdir())[-1] == "3"
    assert not (there / "result.json").exists() and not (there / "damaged-checkpoints").exists()
    result = train(config, url)  # as from a machine that has nothing of it
    assert json.loads((there / "result.json").read_text())["test"] == result["test"]
    assert_same_run(fetched(url, tmp_path / "there"), tmp_path / "here", 4)
    assert evaluate(url)["accuracy"] == result["test"]["accuracy"]
    write_json(f"{url}/evaluation.json", {"accuracy": 0.5})
    assert json.loads((there / "evaluation.json").read_text()) == {"accuracy": 0.5}
    with flagsaver.flagsaver():
        checkpoints.main(["checkpoints", url])
        assert capsys.readouterr().out.count("│ valid │") >= 2
        checkpoints.main(["checkpoints", url, "--copy=4", f"--to={tmp_path}/copy"])
    assert load_verified(tmp_path / "copy")[1]["step"] == 4

    with flagsaver.flagsaver(), pytest.raises(SystemExit, match="0"):
        reproduce.main(["rerun", url, f"--again={tmp_path}/again"])
    assert "bitwise identical" in capsys.readouterr().out

    damaged = there / "checkpoints" / "4" / "meta" / "metadata"
    spoilt = damaged.read_text().replace('"step"', '"stop"', 1)
    damaged.write_text(spoilt)
    whole = train(config, url)  # from step 3 on
    assert whole["test"] == result["test"]
    assert "4 is damaged" in capsys.readouterr().err
    assert (there / "damaged-checkpoints" / "4-0" / "meta" / "metadata").read_text() == spoilt

    with pytest.raises(UserError, match=f"{url} belongs to another run: its config.seed is 0, here it is 1"):
        train(tiny_config(f"{SMALL},seed=1", CHANGES), url)
    shutil.rmtree(tmp_path)


def test_run_dir_reports_an_unreachable_bucket_in_one_line(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    for error, said in (
        (ImportError("No module named 'gcsfs'"), "gs:// needs `pip install gcsfs`"),
        (ConnectionError("no route\nto host"), "gs://b/run cannot be reached: no route to host"),
    ):

        def fail(*_: Any, error: Exception = error, **__: Any) -> None:
            raise error

        with monkeypatch.context() as patch, pytest.raises(UserError, match=said):
            patch.setattr(RemoteFolder, "names", fail)
            run_dir.open_run_dir("gs://b/run").__enter__()
    with run_dir.open_run_dir(tmp_path) as place:
        assert (place.folder, place.bucket) == (tmp_path, None)
        place.upload()
    assert list(tmp_path.iterdir()) == []
