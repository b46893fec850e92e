"""A run with the packages of the optional sinks, where they are installed: pip install '.[wandb,mlflow]'."""

import json

import pytest

from mmfusion.config import check
from mmfusion.training.loop import train
from tests.tracking.test_logger import events

pytestmark = [pytest.mark.process, pytest.mark.thorough]  # W&B starts one; see tests/README.md
BLOCK, HEADER = 2**15, 7  # bytes of a block of W&B's file, and of its header and that of each record


def wandb_records(path):
    """Yields the records of an offline run: LevelDB's log format after 7 bytes, in parts of checksum, size and type."""
    from wandb.proto import wandb_internal_pb2

    data, position, record = path.read_bytes(), HEADER, b""
    while position + HEADER < len(data):
        if BLOCK - position % BLOCK < HEADER:  # the end of a block is padded
            position += BLOCK - position % BLOCK
        size, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6]
        record += data[position + HEADER : position + HEADER + size]
        position += HEADER + size
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


def train_twice(workdir, config):
    """Trains a run, and continues it at its end, as after a kill before its result was written; returns the result."""
    check(config)
    train(config, workdir)
    (workdir / "result.json").unlink()
    return train(config, workdir)


@pytest.fixture
def metrics(tmp_path, tiny_config, monkeypatch):
    """A function that trains with sinks, and returns the directory, the scalars that it must have, and the result."""

    def run(tracking):
        workdir, config = tmp_path / "tiny", tiny_config(changes={"tracking": tracking, "log_every": 2})
        result = train_twice(workdir, config)
        return workdir, {(step, tag): value for step, tag, value in events(workdir)}, result

    monkeypatch.chdir(tmp_path)
    return run


def test_wandb_has_the_metrics_of_an_offline_run_that_was_continued(metrics, monkeypatch):
    pytest.importorskip("wandb")
    monkeypatch.setenv("WANDB_MODE", "offline")
    workdir, expected, result = metrics("tensorboard+wandb")
    files = sorted(workdir.glob("wandb/offline-run-*/*.wandb"))
    assert len(files) == 2
    history, runs, summary = {}, [], {}
    for record in (record for path in files for record in wandb_records(path)):
        kind = record.WhichOneof("record_type")
        if kind == "run":
            runs.append(record.run)
        elif kind == "history":
            values = {
                item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item
            }
            summary |= values
            history |= {(values["step"], name): value for name, value in values.items()}
    assert {run.run_id for run in runs} == {json.loads((workdir / "wandb.json").read_text())["id"]}
    assert {(run.display_name, run.project) for run in runs} == {("tiny", "mmfusion")}
    config = {item.key: json.loads(item.value_json) for item in runs[0].config.update}
    assert config["model"]["width"] == 8
    for (step, name), value in expected.items():
        assert history[step, name] == pytest.approx(value, rel=1e-6)
    assert summary["test/accuracy"] == result["test"]["accuracy"]


def test_mlflow_has_the_metrics_of_a_run_that_was_continued(metrics, monkeypatch, tmp_path):
    mlflow = pytest.importorskip("mlflow")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path}/mlflow.db")
    mlflow.set_tracking_uri(f"sqlite:///{tmp_path}/mlflow.db")
    workdir, expected, result = metrics("tensorboard+mlflow")
    client = mlflow.MlflowClient()
    experiment = client.get_experiment_by_name("mmfusion")
    (run,) = client.search_runs([experiment.experiment_id])
    assert run.info.run_id == json.loads((workdir / "mlflow.json").read_text())["id"]
    assert (run.info.run_name, run.info.status) == ("tiny", "FINISHED")
    assert run.data.params["model.width"] == "8" and run.data.params["seed"] == "0"
    for (step, name), value in expected.items():
        saved = {metric.step: metric.value for metric in client.get_metric_history(run.info.run_id, name)}
        assert saved[step] == pytest.approx(value, rel=1e-6)
    assert run.data.metrics["test/accuracy"] == result["test"]["accuracy"]
