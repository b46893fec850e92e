"""Scalars for MLflow, in a local store or a server (`MLFLOW_TRACKING_URI`, `MLFLOW_EXPERIMENT_NAME`)."""

import json
import os
import re
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import mlflow  # pyright: ignore[reportMissingImports]
from mlflow.entities import Metric, Param  # pyright: ignore[reportMissingImports]

from mmfusion.files import write_json

FILE = "mlflow.json"
EXPERIMENT = "mmfusion"
BATCH = 100  # parameters of a request
LENGTH = 500  # of a parameter's value
NOT_ALLOWED = re.compile(r"[^\w.\- /]")  # in names


class MlflowSink:
    """A run of MLflow, by a client of its own, as an ablation trains several runs at a time."""

    def __init__(self, client: Any, run_id: str):
        self._client, self._run_id = client, run_id

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars by name; MLflow shows the last value of each as the run's metric."""
        now = int(1000 * time.time())
        metrics = [Metric(NOT_ALLOWED.sub("_", name), value, now, step) for name, value in values.items()]
        self._client.log_batch(self._run_id, metrics=metrics)

    def close(self, *, failed: bool = False) -> None:
        """Ends the run."""
        self._client.set_terminated(self._run_id, "FAILED" if failed else "FINISHED")


def open_sink(workdir: Path, config: Mapping[str, Any]) -> MlflowSink:
    """Returns the sink of a directory's run, which a resumed run continues; `mlflow.json` there has its id."""
    client, path = mlflow.MlflowClient(), workdir / FILE
    if path.exists():
        run_id = json.loads(path.read_text())["id"]
        client.update_run(run_id, status="RUNNING")
        return MlflowSink(client, run_id)
    name = os.environ.get("MLFLOW_EXPERIMENT_NAME", EXPERIMENT)
    experiment = client.get_experiment_by_name(name)
    experiment_id = experiment.experiment_id if experiment else client.create_experiment(name)
    run_id = client.create_run(experiment_id, run_name=workdir.absolute().name).info.run_id
    write_json(path, {"id": run_id})
    parameters = [Param(NOT_ALLOWED.sub("_", key), str(value)[:LENGTH]) for key, value in _flat(config)]
    for start in range(0, len(parameters), BATCH):
        client.log_batch(run_id, params=parameters[start : start + BATCH])
    return MlflowSink(client, run_id)


def _flat(values: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yields the dotted path and the value of every key."""
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{path}{key}.")
        else:
            yield f"{path}{key}", value
