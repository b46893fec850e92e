"""The training loop."""

import contextlib
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
from ml_collections import ConfigDict

from mmfusion import config as configs
from mmfusion.data import dataset as datasets
from mmfusion.data.dataset import Dataset
from mmfusion.distributed import mesh
from mmfusion.errors import UserError
from mmfusion.files import DISK_FULL
from mmfusion.tracking import run_dir
from mmfusion.training import recovery, restore
from mmfusion.training.run import TrainRun, start_run


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
      Preempted: SIGTERM came; the run is saved, and the same command continues it.
    """
    started, bad_steps = time.monotonic(), None
    with mesh.stop_on_sigterm() as stop, run_directory(workdir, config) as directory:
        typed = configs.read(config)
        dataset = dataset or datasets.load(typed.data, seed=typed.seed)
        while True:
            attempt = start_run(config, directory, dataset, started=started, profile=profile, bad_steps=bad_steps)
            try:
                with attempt as run:
                    if not isinstance(run, TrainRun):  # it had finished before
                        return run
                    train_step = run.setup.train_step()
                    for call in run.calls():
                        rates = run.setup.partitioner.replicate(call.rates)
                        with jax.transfer_guard("disallow"):
                            state, metrics = train_step(run.state, call.device_batches, rates)
                        run.after(call, state, metrics)
                        run.validate_and_save(stop)
                    return run.test()
            except recovery.TooManyBadSteps as error:
                bad_steps = recovery.roll_back_or_raise(error, directory, configs.read(config), dataset)


@contextlib.contextmanager
def run_directory(workdir: str | Path, config: ConfigDict) -> Iterator[run_dir.RunDir]:
    """Yields the directory of a run, and uploads what is left in it at the end, whatever that is.

    Raises:
      UserError: the directory belongs to another run, or cannot be written.
    """
    with run_dir.open_run_dir(workdir) as directory:
        restore.check_owner(directory, config)
        try:
            yield directory
        except OSError as error:
            path = Path(error.filename or "").absolute()
            own = path.is_relative_to(directory.folder.absolute())  # it vanished, or may not be written
            if error.errno not in DISK_FULL and not own:
                raise
            raise UserError(
                f"cannot write: {error.strerror}; what was saved is untouched, and the same command continues the run",
                path=error.filename or directory.name,
            ) from error
        except BaseException:
            try:
                directory.upload()
            except UserError as error:  # the first error is the one to report
                print(f"warning: {error}", file=sys.stderr)
            raise
        directory.upload()
