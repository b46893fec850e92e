"""The loop: open the data, build, restore or begin, step, validate, save, test once. In the order things happen."""

import contextlib
import dataclasses
import itertools
import sys
import threading
import time
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mmfusion import config as configs
from mmfusion import optim
from mmfusion.checkpoints.manager import Checkpoints
from mmfusion.checkpoints.saver import Saver
from mmfusion.data import dataset as datasets
from mmfusion.data import pipeline
from mmfusion.data.batch import Batch
from mmfusion.data.dataset import Dataset, Split
from mmfusion.distributed import hosts, mesh
from mmfusion.errors import Preempted, UserError
from mmfusion.files import DISK_FULL, write_json
from mmfusion.models.summary import summarize
from mmfusion.tracking import provenance, run_dir
from mmfusion.tracking.logger import Logger
from mmfusion.tracking.tables import model_table, results_table
from mmfusion.training import recovery, restore, warm_start
from mmfusion.training.evaluation import collect, head_losses, score
from mmfusion.training.progress import Meter, Progress, Trace
from mmfusion.training.setup import Parts, assemble
from mmfusion.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Call:
    """What a run asks for: the updates of one compiled call, answered by the state after it and the numbers `[K]`.

    Attributes:
      parts, accumulate: of the step.
      state: before it; it is donated.
      batches: K of them, on the devices.
      rates: learning rates `[K]`, on the devices.
    """

    parts: Parts
    accumulate: int
    state: TrainState
    batches: tuple[Batch, ...]
    rates: jax.Array


Run = Generator[Call, tuple[TrainState, Any], dict[str, Any]]  # returns what `result.json` holds


def train(
    config: ConfigDict, workdir: str | Path, *, profile: bool = False, dataset: Dataset | None = None
) -> dict[str, Any]:
    """Trains a checked config in a directory, or continues there, and tests the best checkpoint once.

    Args:
      config: see `mmfusion.config.check`.
      workdir: receives `config.json`, `metrics.jsonl`, TensorBoard events, `checkpoints/` and `result.json`; local, or
        in a bucket (`gs://...`).
      profile: write a JAX trace of a few early steps to `workdir/profile`.
      dataset: what `datasets.load` gives for this config, where it is at hand.

    Returns:
      What `result.json` holds.

    Raises:
      UserError: the data, the directory or a checkpoint is not what the config needs.
      FloatingPointError: too many updates in a row went wrong; `wrong.json` in the directory says which.
      Preempted: SIGTERM came; the run saved itself and the same command continues it.
    """
    with mesh.stop_on_sigterm() as stop, contextlib.closing(run(config, workdir, stop, profile, dataset)) as steps:
        answer = compiled = None
        while True:
            try:
                call = steps.send(answer)
            except StopIteration as end:
                return end.value
            compiled = compiled or call.parts.train_step(call.accumulate)
            with jax.transfer_guard("disallow"):
                answer = compiled(call.state, call.batches, call.rates)


def run(
    config: ConfigDict,
    workdir: str | Path,
    stop: threading.Event,
    profile: bool = False,
    dataset: Dataset | None = None,
    alone: bool = True,
) -> Run:
    """Does all of a run but the updates, which it asks for, so that one program can take those of several runs.

    Args:
      config, workdir, profile, dataset: as of `train`, whose errors these are, too.
      stop: set where the run shall save itself and stop.
      alone: whether its updates are taken by themselves, so that the time they take says how fast it is.
    """
    began = time.monotonic()
    with run_dir.open_run_dir(workdir) as directory:
        restore.check_owner(directory, config)
        wrong, rollbacks = None, config.recovery.rollbacks
        try:
            while True:
                try:
                    dataset = dataset or datasets.load(config.data, seed=config.seed)
                    result = yield from _attempt(config, directory, stop, profile, dataset, alone, began, wrong)
                    break
                except recovery.WentWrong as error:
                    if error.rollbacks >= rollbacks:
                        said = recovery.report(error, directory, config, dataset.splits["train"])
                        raise FloatingPointError(said) from error
                    wrong = error
        except OSError as error:
            path = Path(error.filename or "").absolute()
            ours = path.is_relative_to(directory.folder.absolute())  # it vanished, or may not be written
            if error.errno not in DISK_FULL and not ours:
                raise
            where = error.filename or directory.name
            raise UserError(
                f"cannot write {where}: {error.strerror}; what was saved is untouched, and the same command goes on"
            ) from error
        except BaseException:
            try:
                directory.upload()
            except UserError as error:  # why the run ends is to be told, not this
                print(f"warning: {error}", file=sys.stderr)
            raise
        directory.upload()
        return result


def _attempt(
    config: ConfigDict,
    directory: run_dir.RunDir,
    stop: threading.Event,
    profile: bool,
    dataset: Dataset,
    alone: bool,
    began: float,
    wrong: recovery.WentWrong | None,
) -> Run:
    """Does what `run` does, from the checkpoint before `wrong`, the newest one where nothing was."""
    made_with, workdir = provenance.environment(), directory.folder

    # Model
    parts = assemble(config, dataset)
    partitioner = parts.partitioner
    if config.deterministic:
        mesh.check_determinism(partitioner.platform)
    primary = partitioner.host_index == 0

    # Restore, or begin; a model that cannot be built is told of before anything is written
    shapes = parts.state_shapes()
    workdir.mkdir(parents=True, exist_ok=True)
    if primary and not (workdir / "result.json").exists():  # what may change of it is what it goes on with
        write_json(workdir / "config.json", configs.to_json(config))
    with hosts.primary_first():
        checkpoints = Checkpoints(directory.checkpoints)
        if wrong and primary:
            checkpoints.delete_from(wrong.first)
    if directory.bucket is None:
        hosts.check_shared(workdir)
    progress, begun = Progress(), []
    if (saved := checkpoints.restore_valid(shapes)) is None:
        drawn, begun = warm_start.begin(
            config.model.encoders, parts.model, parts.drawn_state(config.seed), dataset.fitted
        )
        state = partitioner.put_state(drawn)
    else:
        host_state, meta = saved
        dataset.check_unchanged(meta["data"], directory.name)
        # Through an identity program: restored arrays may silently refuse to be donated.
        state = jax.jit(lambda tree: tree)(partitioner.put_state(host_state))
        progress = Progress(**meta["progress"])
    if wrong:
        progress.rollbacks = wrong.rollbacks + 1
        progress.watched |= {name: wrong.watched[name] for name in ("skipped", "spikes")}
    first_step = progress.step
    k = mesh.steps_per_call(
        config.parallel.steps_per_call,
        partitioner.platform,
        (first_step, config.steps, config.eval_every, config.checkpoint_every),
    )
    meta = {"data": dataset.saved(), "config": configs.to_json(config), "made_with": provenance.code(made_with)}
    if progress.step >= config.steps and (workdir / "result.json").exists():
        checkpoints.close()
        if primary:
            print(f"train  finished before, at step {progress.step}: what it found is in {directory.name}/result.json")
        return configs.read_json(workdir / "result.json")

    run_eval = parts.eval_step()
    began_at = time.monotonic() - progress.seconds
    quiet = max(1, 100 // config.log_every)  # one plain line in about 100 steps

    def rows_of(split: Split, max_bad_fraction: float = config.data.max_bad_fraction) -> dict[str, Any]:
        return collect(
            run_eval, state, split, parts,
            batch_size=config.batch_size, workers=config.data.workers, max_bad_fraction=max_bad_fraction,
        )  # fmt: skip

    def blended(valid: dict[str, Any]) -> TrainState:
        """Returns the state with the weights of the heads that follow from their losses since the last validation."""
        seen = dataset.splits["train"].subset(len(dataset.splits["valid"]))
        losses = [head_losses(rows, parts.tasks) for rows in (rows_of(seen, 1.0), valid)]
        now = {head: (losses[0][head], losses[1][head]) for head in losses[0]}
        before, progress.heads = progress.heads or now, now
        weights = parts.objectives.blending.weights(before, now)
        if weights is None:
            return state
        heads = partitioner.replicate({head: np.float32(weight) for head, weight in weights.items()})
        return state.replace(balance={**state.balance, "heads": heads})

    with (
        contextlib.closing(checkpoints),
        Logger(workdir, primary, progress.step, total_steps=config.steps, plain_every=quiet) as log,
        contextlib.closing(Trace(workdir / "profile")) as trace,
    ):
        if wrong:
            rate = config.recovery.lr_factor**progress.rollbacks
            log.print(f"train  {recovery.said(wrong)}: back to step {progress.step}, {rate:g} of the learning rate")
        else:
            _introduce(log, config, dataset, parts, state, progress.step, begun)
            if saved and (changed := provenance.changes(saved[1].get("made_with"), meta["made_with"])):
                log.print(f"train  warning: {changed} since its last checkpoint: it may go on in another way")

        # Steps
        saver = Saver(checkpoints, directory.upload, log, config.recovery.failed_saves)
        if parts.objectives.blending and not progress.heads:
            state = blended(rows_of(dataset.splits["valid"]))
        meter = Meter(log, config, dataset.splits["train"], progress)
        for batches, devices in _calls(dataset.splits["train"], config, parts, first=progress.step, k=k):
            rates = progress.learning_rates(config, k)
            state, numbers = yield Call(parts, config.optim.accumulate, state, devices, partitioner.replicate(rates))
            compiled_now = progress.step == first_step
            if not compiled_now:
                meter.flush()
                saver.poll()
            meter.hold(progress.step, numbers, rates, batches)
            progress.step += k
            if profile and primary:
                trace.after_call(numbers)
            if compiled_now:
                jax.block_until_ready(numbers)
                progress.seconds_to_first_step = progress.seconds_to_first_step or time.monotonic() - began
                meter.start(progress.step)

            # Validate and save
            validate = progress.step % config.eval_every == 0 or progress.step == config.steps
            stopping = partitioner.should_stop(stop, progress.step, k)
            if not (validate or progress.step % config.checkpoint_every == 0 or stopping):
                continue
            meter.pause()
            scored = None
            if validate:  # also when stopping: a step that is due must be scored, for the next run begins after it
                rows = rows_of(dataset.splits["valid"])
                scores = score(rows, parts.tasks)
                log.log(progress.step, scores, "valid")
                scored = _selection_score(scores, config)
                if config.optim.schedule.name == "plateau":
                    progress.plateau = optim.plateau_update(
                        progress.plateau, scored, config.optim.schedule, higher_is_better=True
                    )
                if parts.objectives.blending:
                    state = blended(rows)
            progress.seconds = time.monotonic() - began_at
            own = {**meta, "progress": dataclasses.asdict(progress)}
            saved_at = saver.save(progress.step, partitioner.to_host(state), own, scored, last=stopping)
            if stopping:
                hosts.barrier()  # whoever ends ends the others, too
                raise Preempted(f"saved at step {saved_at} of {config.steps}; run the same command to continue")
            meter.start(progress.step)
        saver.finish()

        # Test, once, the checkpoint that validation chose
        host_state, chosen = checkpoints.restore_valid(shapes, best=True)
        state, best = partitioner.put_state(host_state), chosen["step"]
        result = {split: score(rows_of(dataset.splits[split]), parts.tasks) for split in ("valid", "test")}
        log.log(best, result["test"], "test")
        result |= {
            "parameters": sum(x.size for x in jax.tree.leaves(state.params)),
            "examples_per_second": progress.training_examples / max(progress.training_seconds, 1e-9) if alone else None,
            "seconds": time.monotonic() - began_at,
            "seconds_to_first_step": progress.seconds_to_first_step,
            "seed": config.seed,
            "config": configs.to_json(config),
            "steps": config.steps,
            "best_step": best,
            "skipped": progress.watched["skipped"],
            "spikes": progress.watched["spikes"],
            "rollbacks": progress.rollbacks,
            "select": config.select,
            "data": {
                "name": dataset.name,
                "fingerprint": dataset.fingerprint,
                "rows": dataset.rows,
                "content": dataset.content,
                "examples": {name: len(split) for name, split in dataset.splits.items()},
                "unreadable": {name: sorted(split.bad.values()) for name, split in dataset.splits.items()},
            },
            "device": f"{partitioner.num_devices} x {jax.devices()[0].device_kind}",
            **made_with,
        }
        log.sync()
        if primary:
            write_json(workdir / "result.json", result)
        log.print(results_table({split: result[split] for split in ("valid", "test")}))
    return result


def _calls(
    split: Split, config: ConfigDict, parts: Parts, *, first: int, k: int
) -> Iterator[tuple[tuple[Batch, ...], tuple[Batch, ...]]]:
    """Yields the host and the device batches of each compiled call, `k` of each."""
    partitioner = parts.partitioner
    batches = pipeline.train_batches(
        split, seed=config.seed, batch_size=config.batch_size, first=first, last=config.steps,
        host=partitioner.host_index, hosts=partitioner.num_hosts, workers=config.data.workers,
    )  # fmt: skip
    pairs = pipeline.to_device(batches, partitioner.put_batch)
    while call := tuple(itertools.islice(pairs, k)):
        own, devices = zip(*call, strict=True)
        yield own, devices


def _selection_score(scores: dict[str, Any], config: ConfigDict) -> float:
    """Returns the validation score to choose by, higher is better; NaN where it is undefined."""
    value = scores[config.select]
    if value is None:
        return float("nan")
    return value if configs.selectable(config)[config.select] else -value


def _introduce(
    log: Logger, config: ConfigDict, dataset: Dataset, parts: Parts, state: Any, step: int, begun: list[str]
) -> None:
    """Prints what is about to run: data, model, and what could not be read."""
    sizes = ", ".join(f"{len(split):,} {name}" for name, split in dataset.splits.items())
    log.print(f"data   {dataset.name}: {sizes}")
    for split in dataset.splits.values():
        if split.bad:
            named = "; ".join(itertools.islice(split.bad.values(), 3))
            log.print(f"data   {len(split.bad)} rows of {split.name} cannot be read and have weight 0: {named}")
    variables = {"params": state.params, "batch_stats": state.batch_stats}
    shapes = jax.eval_shape(lambda batch: parts.preprocess(batch, None), parts.example)
    for line in begun:
        log.print(line)
    log.print(model_table(summarize(parts.model, variables, shapes)))
    if step:
        log.print(f"train  continued from step {step}")
