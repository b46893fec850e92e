"""Benchmark of the ablation runner against the same runs in sequence, each in a new process."""

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from configs import quickstart
from experiments import cli
from mmfusion import config as configs
from mmfusion.analysis.ablation import plan, runner

FUSIONS, SEEDS, STEPS = ("concat", "gmu", "low_rank_tensor"), 4, 200
CHANGES = {"steps": STEPS, "eval_every": STEPS, "checkpoint_every": STEPS}
ROWS = {"train": "train[:8000]", "test": "test[:1000]"}


def ablation() -> list[dict[str, Any]]:
    """Returns one row: seconds for twenty runs, of three strategies and two single modalities with four seeds each.

    Both use the compilation cache, filled by one unmeasured run of each method.
    """
    trials = plan.build(_config, FUSIONS, SEEDS, {}).trials
    with tempfile.TemporaryDirectory() as folder:
        _one_by_one(trials[: len(trials) // SEEDS], Path(folder) / "warm")
        for _ in runner.run(trials[: len(trials) // SEEDS], Path(folder) / "pinned", 1, cli.prepare_worker):
            pass
        start = time.monotonic()
        errors = [
            error for _, error in runner.run(trials, Path(folder) / "plan", os.cpu_count() or 1, cli.prepare_worker)
        ]
        ours = time.monotonic() - start
        assert not any(errors), errors
        start = time.monotonic()
        _one_by_one(trials, Path(folder) / "each")
        reference = time.monotonic() - start
    return [
        {
            "name": "ablation", "ours": ours, "reference": reference, "unit": f"s for {len(trials)} trials",
            "ratio": ours / reference, "goal": "<= 0.6",
        }
    ]  # fmt: skip


def _config(fusion: str, seed: int, modalities: str) -> Any:
    given = {"fusion": fusion, "seed": str(seed), "modalities": modalities}
    config = quickstart.get_config(",".join(f"{key}={value}" for key, value in given.items() if value))
    config.update(CHANGES)
    config.data.update(ROWS)
    return config


def _one_by_one(trials: Any, folder: Path) -> None:
    for trial in trials:
        config = configs.from_json(trial.config)
        arg = f"fusion={config.model.fusion.name},seed={config.seed},modalities={'+'.join(config.data.modalities)}"
        subprocess.run(
            [sys.executable, "-m", "experiments.train", f"--config=configs/quickstart.py:{arg}",
             f"--workdir={folder / trial.name}", *(f"--config.{key}={value}" for key, value in CHANGES.items()),
             *(f"--config.data.{key}={value}" for key, value in ROWS.items())],
            check=True, stdout=subprocess.DEVNULL,
        )  # fmt: skip
