"""A run's config, checkpoints and calibration belong together: a change of one is refused with what differs."""

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mmfusion.analysis import runs
from mmfusion.checkpoints.checksums import CHECKSUM
from mmfusion.errors import UserError
from mmfusion.inference.evaluate import evaluate
from mmfusion.inference.export import export
from mmfusion.inference.predict import predict
from mmfusion.inference.trained_model import TrainedModel, load
from mmfusion.training import seal
from mmfusion.training.loop import train
from mmfusion.training.replay import replay
from mmfusion.training.restore import open_run
from tests import planted
from tests.errors import rejects

pytestmark = [pytest.mark.loop, pytest.mark.usefixtures("traced_once")]

STEPS = {"steps": 4, "eval_every": 2, "checkpoint_every": 2}
RATE = {"optim__learning_rate": 0.1}


def config(**changes: Any) -> Any:
    return planted.config("text", **{**STEPS, **changes})


def plant(monkeypatch: pytest.MonkeyPatch) -> None:
    rows = [planted.row(i) for i in range(40)]
    planted.plant(monkeypatch, train=rows, test=rows[:20])


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Two finished runs that differ in their learning rate, which tests do not change."""
    folder = tmp_path_factory.mktemp("sealed")
    with pytest.MonkeyPatch.context() as monkeypatch:
        plant(monkeypatch)
        train(config(), folder / "own")
        train(config(**RATE), folder / "foreign")
    return {name: folder / name for name in ("own", "foreign")}


@pytest.fixture
def run(trained: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    plant(monkeypatch)
    shutil.copytree(trained["own"], tmp_path / "run")
    return tmp_path / "run"


def content(folder: Path) -> dict[Path, bytes]:
    return {path: path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def put(workdir: Path, section: str, key: str, value: Any, *, checksum: bool) -> None:
    """Changes a value of `config.json`, with the checksum of the new content or that of the old one."""
    values = json.loads((workdir / "config.json").read_text())
    values[section][key] = value
    if checksum:
        del values[CHECKSUM]
        seal.write_config(workdir, values)
    else:
        (workdir / "config.json").write_text(json.dumps(values))


def predict_one(workdir: Path) -> None:
    source = workdir.parent / "in.csv"
    source.write_text("text\nrow 1\n")
    predict(workdir, source, workdir.parent / "out.csv")


OPENED: dict[str, Callable[[Path], Any]] = {
    "resume": lambda workdir: train(config(), workdir),
    "evaluate": evaluate,
    "predict": predict_one,
    "load": load,
    "export": lambda workdir: export(workdir, workdir.parent / "exported"),
    "replay": lambda workdir: replay(workdir, 3),
    "reproduce": runs.read,
    "warm start": lambda workdir: train(
        config(model__encoders__text__init=f"run:{workdir}", steps=2), workdir.parent / "warm"
    ),
}


@pytest.mark.parametrize("opened", OPENED)
def test_config_with_another_value_is_refused_wherever_a_run_is_opened(opened: str, run: Path):
    put(run, "optim", "learning_rate", 0.1, checksum=False)
    before = content(run)
    fact = "is not what was written: optim.learning_rate is 0.1, the checkpoint was written with 0.001"
    with rejects(run / "config.json", None, says=fact):
        OPENED[opened](run)
    assert content(run) == before


@pytest.mark.parametrize("opened", [name for name in OPENED if name != "resume"])
def test_config_with_the_checksum_of_another_value_is_refused_by_the_checkpoints(opened: str, run: Path):
    put(run, "optim", "learning_rate", 0.1, checksum=True)
    writer = "result.json" if opened == "reproduce" else "the checkpoint of step"
    with rejects(run / "config.json", None, says=f"optim.learning_rate is 0.1, {writer}"):
        OPENED[opened](run)


def test_config_with_any_bit_flipped_is_refused_or_reads_the_same(run: Path):
    path, random = run / "config.json", np.random.default_rng(0)
    original = path.read_bytes()
    expected = seal.read_config(run, run / "checkpoints")
    refused = 0
    for _ in range(300):
        data = bytearray(original)
        data[random.integers(len(data))] ^= 1 << int(random.integers(8))
        path.write_bytes(data)
        try:
            found = seal.read_config(run, run / "nowhere")
        except UserError as error:
            assert "\n" not in str(error)
            refused += 1
        else:
            if found != expected:  # the name of the checksum itself: the file then is as one of an older version
                with pytest.raises(UserError, match=r"absent|no such key"):
                    evaluate(run)
    assert refused > 290


@pytest.mark.parametrize("name", ["2", "4", "3"])
def test_checkpoint_of_another_config_is_refused(name: str, trained: dict[str, Path], run: Path):
    shutil.rmtree(run / "checkpoints" / name, ignore_errors=True)
    (foreign,) = (trained["foreign"] / "checkpoints").glob("4")
    shutil.copytree(foreign, run / "checkpoints" / name)
    where, fact = run / "config.json", "optim.learning_rate is 0.001, the checkpoint of step 4 was written with 0.1"
    if name != "4":
        where, fact = run / "checkpoints" / name, "is the checkpoint of step 4: rename the folder to 4"
    for opened in ("resume", "evaluate", "predict", "replay"):
        with rejects(where, None, says=fact):
            OPENED[opened](run)


@pytest.mark.parametrize("opened", ["resume", "evaluate", "predict", "export", "replay"])
def test_checkpoint_with_the_name_of_another_step_is_refused(opened: str, run: Path):
    (run / "checkpoints" / "4").rename(run / "checkpoints" / "8")
    before = content(run)
    with rejects(run / "checkpoints" / "8", None, says="is the checkpoint of step 4: rename the folder to 4"):
        OPENED[opened](run)
    assert content(run) == before


def test_run_without_its_config_goes_on_under_that_config_only(run: Path, capsys: pytest.CaptureFixture[str]):
    (run / "config.json").unlink()
    before = content(run)
    with rejects(run, None, says="optim.learning_rate is 0.1, the checkpoint of step"):
        train(config(**RATE), run)
    assert content(run) == before
    assert train(config(data__dir="/elsewhere"), run)["steps"] == 4
    assert seal.read_config(run, run / "checkpoints")["data"]["dir"] == "/elsewhere"
    assert "warning" not in capsys.readouterr().err


def test_run_resumes_with_keys_that_may_change(run: Path):
    (run / "result.json").unlink()
    changed = config(data__dir="/elsewhere", recovery__failed_saves=7, data__memory_gb=1.0)
    assert train(changed, run)["steps"] == 4
    values = seal.read_config(run, run / "checkpoints")
    assert (values["data"]["dir"], values["recovery"]["failed_saves"]) == ("/elsewhere", 7)
    assert evaluate(run)["step"] in (2, 4)  # checkpoints from before the change


def test_run_of_an_older_version_is_read_with_a_warning(run: Path, capsys: pytest.CaptureFixture[str]):
    values = json.loads((run / "config.json").read_text())
    del values[CHECKSUM], values["early_stopping"]
    (run / "config.json").write_text(json.dumps(values))
    calibration = json.loads((run / "calibration.json").read_text())
    del calibration[CHECKSUM], calibration["checkpoint"]
    (run / "calibration.json").write_text(json.dumps(calibration))
    found = TrainedModel(open_run(run, [])).predict([{"text": "row 1"}])
    assert found.errors == [""]
    assert re.search(r"warning: .*config.json has no checksum", capsys.readouterr().err)


@pytest.mark.parametrize("kind", ["temperature", "of another checkpoint"])
def test_calibration_is_refused_if_it_is_not_what_was_written(kind: str, trained: dict[str, Path], run: Path):
    path = run / "calibration.json"
    if kind == "temperature":
        values = json.loads(path.read_text())
        values["tasks"]["label"]["temperature"] *= 2
        path.write_text(json.dumps(values))
    else:
        values = json.loads((trained["foreign"] / "calibration.json").read_text())
        del values[CHECKSUM]
        values["step"] = json.loads(path.read_text())["step"]
        path.write_text(json.dumps(seal.with_checksum(values)))
    with rejects(path, None, says="remove it, and it is fitted again"):
        load(run).predict([{"text": "row 1"}])
    path.unlink()
    assert load(run).predict([{"text": "row 1"}]).errors == [""]


def test_readonly_commands_skip_a_checkpoint_with_a_damaged_file_of_metrics(run: Path):
    random = np.random.default_rng(0)
    for path in (run / "checkpoints").glob("*/metrics/metrics"):
        original = path.read_bytes()
        for damaged in (b"", b"{", b"\xff", b"[]", b'{"score": "x"}', original.replace(b"score", b"sc\xfere")):
            path.write_bytes(damaged)
            assert open_run(run, []).step != int(path.parts[-3])
        for _ in range(20):
            data = bytearray(original)
            data[random.integers(len(data))] ^= 1 << int(random.integers(8))
            path.write_bytes(data)
            open_run(run, [])
        path.write_bytes(original)
