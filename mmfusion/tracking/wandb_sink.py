"""Scalars for Weights & Biases: online, or offline in the run's directory (`WANDB_MODE=offline`).

The environment variables of W&B hold: `WANDB_PROJECT`, `WANDB_ENTITY`, `WANDB_MODE`, `WANDB_API_KEY`.
"""

import json
import os
import uuid
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import wandb  # pyright: ignore[reportMissingImports]

from mmfusion.files import write_json

FILE = "wandb.json"
PROJECT = "mmfusion"


class WandbSink:
    """A run of W&B; its summary holds the last value of each scalar, and so the final evaluation's."""

    def __init__(self, run: Any):
        self._run = run
        run.define_metric("*", step_metric="step")  # W&B's own steps may not go back, as after a resume

    def write_scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Writes scalars by name."""
        self._run.log({**values, "step": step})

    def close(self, *, failed: bool = False) -> None:
        """Ends the run."""
        self._run.finish(exit_code=int(failed))


def open_sink(workdir: Path, config: Mapping[str, Any]) -> WandbSink:
    """Returns the sink of a directory's run, which a resumed run continues; `wandb.json` there has its id.

    Raises:
      RuntimeError: it would be online, and no one is logged in.
    """
    if wandb.setup().settings.mode == "online" and not wandb.login(prompt=False):
        raise RuntimeError("not logged in: run `wandb login`, or set WANDB_MODE=offline")
    path = workdir / FILE
    if not path.exists():
        write_json(path, {"id": uuid.uuid4().hex[:12]})
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        id=json.loads(path.read_text())["id"],
        name=workdir.absolute().name,
        config=dict(config),
        dir=str(workdir),
        resume="allow",
        reinit="create_new",  # an ablation trains several runs at a time
        settings=wandb.Settings(console="off", silent=True),
    )
    return WandbSink(run)
