"""How a run starts or resumes in its directory."""

import contextlib
import csv
import functools
import io
import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from mmfusion import config as configs
from mmfusion.checkpoints.manager import Checkpoints
from mmfusion.checkpoints.saver import Saver
from mmfusion.config import RunConfig
from mmfusion.data.dataset import Dataset
from mmfusion.distributed import hosts, mesh, platform
from mmfusion.files import write_text
from mmfusion.tracking import provenance
from mmfusion.tracking.logger import Logger
from mmfusion.tracking.run_dir import RunDir
from mmfusion.tracking.tables import model_table
from mmfusion.training import frozen_features, recovery, seal, warm_start
from mmfusion.training.progress import Meter, Progress, Trace
from mmfusion.training.run import TrainRun
from mmfusion.training.setup import TrainSetup, build_setup
from mmfusion.training.state import TrainState

PLAIN_LINES = 100  # about so many plain lines of progress in a run's whole log


@contextlib.contextmanager
def start_run(
    config: ConfigDict,
    directory: RunDir,
    dataset: Dataset,
    *,
    started: float,
    profile: bool = False,
    bad_steps: recovery.TooManyBadSteps | None = None,
) -> Iterator[TrainRun | dict[str, Any]]:
    """Yields a run that starts or resumes in its directory, or the result where it had finished before.

    Args:
      config, directory, dataset: of the run.
      started: `time.monotonic()` as the first attempt began.
      profile: write a JAX trace of a few early calls to `profile` in the directory.
      bad_steps: the steps before which it goes back to a checkpoint; None resumes from the newest.

    Raises:
      UserError: the data, the directory or a checkpoint is not what the config needs.
    """
    environment, workdir, values = provenance.environment(), directory.folder, configs.to_json(config)
    run = configs.read(config)
    setup = build_setup(run, dataset)
    primary = setup.partitioner.host_index == 0
    if run.deterministic:
        platform.check_determinism(setup.partitioner.platform)
    setup.state_shapes()  # a model that cannot be built is an error before anything is written
    workdir.mkdir(parents=True, exist_ok=True)
    if primary and not all((workdir / name).exists() for name in (seal.FILE, "result.json")):
        seal.write_config(workdir, values)  # keys that may change take effect as the run resumes
        if dataset.rejected:
            write_text(workdir / "rejected.csv", rejected_csv(dataset.rejected))
    with hosts.primary_first():
        check = functools.partial(seal.check_checkpoint, values, f"{directory.name}/{seal.FILE}")
        checkpoints = Checkpoints(directory.checkpoints, check=check)
        if bad_steps and primary:
            checkpoints.delete_from(bad_steps.first)
    if directory.bucket is None:
        hosts.check_shared(workdir)
    with contextlib.closing(checkpoints):
        state, progress, saved_meta, notes = restore_or_initialise(run, directory, dataset, setup, checkpoints)
        if progress.is_finished(run) and (workdir / "result.json").exists():
            if primary:
                print(f"train  finished before, at step {progress.step}; see {directory.name}/result.json")
            yield configs.read_json(workdir / "result.json")
            return
        if bad_steps:
            progress.rollbacks = bad_steps.rollbacks + 1
            progress.bad_steps |= {name: bad_steps.counts[name] for name in ("skipped", "spikes")}
        boundaries = (progress.step, run.steps, run.eval_every, run.checkpoint_every)
        reading = frozen_features.cached(run, dataset, setup, state)
        dataset, setup = reading.dataset, reading.setup
        k = mesh.steps_per_call(run.parallel.steps_per_call, setup.partitioner.platform, boundaries)
        meta = {"data": dataset.saved(), "config": values, "made_with": provenance.code(environment)}
        every = max(1, PLAIN_LINES // run.log_every)
        with (
            Logger(workdir, primary, progress.step, total_steps=run.steps, plain_every=every, config=values) as log,
            contextlib.closing(Trace(workdir / "profile")) as trace,
        ):
            if bad_steps:
                rate = run.recovery.lr_factor**progress.rollbacks
                log.print(
                    f"train  {recovery.summary(bad_steps)}: back to step {progress.step}, {rate:g} of the learning rate"
                )
            else:
                introduce(log, dataset, setup, progress.step, (*reading.notes, *notes))
                changed = provenance.changes(saved_meta["made_with"], meta["made_with"]) if saved_meta else ""
                if changed:
                    log.print(f"train  warning: {changed} since the last checkpoint: the run may continue differently")
            saver = Saver(checkpoints, directory.upload, log, run.recovery.failed_saves)
            meter = Meter(log, run, dataset.splits["train"], progress)
            yield TrainRun(
                run, values, directory, dataset, setup, state, progress, k, checkpoints, log, saver, meter, trace, meta,
                environment, started, profile, configs.selectable(config).get(run.select),
            )  # fmt: skip


def rejected_csv(rejected: Sequence[tuple[int, str, str]]) -> str:
    """Returns the rows that cannot be read as CSV."""
    text = io.StringIO()
    csv.writer(text).writerows([("row", "column", "reason"), *rejected])
    return text.getvalue()


def restore_or_initialise(
    config: RunConfig, directory: RunDir, dataset: Dataset, setup: TrainSetup, checkpoints: Checkpoints
) -> tuple[TrainState, Progress, dict[str, Any] | None, Sequence[str]]:
    """Returns state and progress of the newest good checkpoint, else of a new run.

    The third item is what the checkpoint held beside the state, None without one; the fourth are lines that say where
    encoders of a new run start from.
    """
    saved = checkpoints.restore_valid(setup.state_shapes())
    if saved is None:
        state, notes = warm_start.begin(
            config.model.encoders, setup.model, setup.init_on_host(config.seed), dataset.fitted
        )
        return setup.partitioner.put_state(state), Progress(), None, notes
    host_state, meta = saved
    dataset.check_unchanged(meta["data"], directory.name)
    # Through an identity program: restored arrays may silently refuse to be donated.
    state = jax.jit(lambda tree: tree)(setup.partitioner.put_state(host_state))
    return state, Progress(**meta["progress"]), meta, ()


def introduce(log: Logger, dataset: Dataset, setup: TrainSetup, step: int, notes: Sequence[str]) -> None:
    """Prints what is about to run: data, rows that could not be read, where encoders start from, and the model."""
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in dataset.splits.items())
    log.print(f"data   {dataset.name}: {sizes}")
    for split in dataset.splits.values():
        if split.bad:
            examples = "; ".join(itertools.islice(split.bad.values(), 3))
            log.print(f"data   {len(split.bad)} rows of {split.name} cannot be read and have weight 0: {examples}")
    for line in (*(f"data   {line}" for line in dataset.notes), *notes):
        log.print(line)
    log.print(model_table(setup.summary))
    if step:
        log.print(f"train  continued from step {step}")
