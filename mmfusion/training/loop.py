"""The training loop."""

import time
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from mmfusion.config import fields
from mmfusion.data import dataset as datasets
from mmfusion.data.dataset import Dataset
from mmfusion.distributed import preemption
from mmfusion.training import recovery
from mmfusion.training.directory import run_directory
from mmfusion.training.run import TrainRun
from mmfusion.training.start import start_run


def train(
    config: ConfigDict, workdir: str | Path, *, profile: bool = False, dataset: Dataset | None = None
) -> dict[str, Any]:
    """Trains a checked config in a directory, or continues there, and tests the best checkpoint once.

    Args:
      config: see `mmfusion.config.check`.
      workdir: receives `config.json`, `metrics.jsonl`, TensorBoard events, `checkpoints/` and `result.json`; local, or
        in a bucket (`gs://...`).
      profile: write a JAX trace of a few early calls to `workdir/profile`.
      dataset: the loaded dataset of this config; None loads it.

    Returns:
      What `result.json` holds.

    Raises:
      UserError: the data, the directory or a checkpoint is not what the config needs.
      FloatingPointError: too many steps in a row were bad; `wrong.json` in the directory names them.
      Preempted: SIGTERM or Ctrl-C came; the run is saved, and the same command continues it.
    """
    started, bad_steps = time.monotonic(), None  # the bad steps before which the next attempt starts
    with preemption.stop_on_signal() as stop, run_directory(workdir, config) as directory:
        run_config = fields.read(config)
        dataset = dataset or datasets.load(run_config.data, seed=run_config.seed)
        while True:  # once, and once more after each roll-back
            attempt = start_run(config, directory, dataset, started=started, profile=profile, bad_steps=bad_steps)
            try:
                with attempt as run:
                    if not isinstance(run, TrainRun):  # it had finished before
                        return run
                    take_steps = run.setup.compile_train_step()
                    for call in run.calls():  # of K steps each
                        learning_rates = run.setup.partitioner.replicate(call.learning_rates)  # [K]
                        with jax.transfer_guard("disallow"):  # a hidden transfer would wait for the device
                            state, metrics = take_steps(run.state, call.device_batches, learning_rates)
                        run.advance(call, state, metrics)
                        run.validate_and_save_if_due(stop)
                    return run.test()
            except recovery.TooManyBadSteps as error:
                recovery.check_may_roll_back(error, directory, run_config, dataset)
                bad_steps = error
