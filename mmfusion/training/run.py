"""One training run in its directory: how it starts or resumes, what it logs, validates and saves, and its final test.

The loops in `loop` and `replicas` take the steps; everything else that a run does is here. K steps a call.
"""

import dataclasses
import itertools
import time
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from mmfusion import optim
from mmfusion.checkpoints.manager import Checkpoints
from mmfusion.checkpoints.saver import Saver
from mmfusion.config import RunConfig
from mmfusion.data import pipeline
from mmfusion.data.batch import Batch
from mmfusion.data.dataset import Dataset
from mmfusion.data.split import Split
from mmfusion.distributed import hosts
from mmfusion.distributed.signals import Stop
from mmfusion.errors import Preempted
from mmfusion.files import write_json
from mmfusion.metrics import without_class_lists
from mmfusion.tracking.logger import Logger
from mmfusion.tracking.run_dir import RunDir
from mmfusion.tracking.tables import results_table
from mmfusion.training import calibration, outputs
from mmfusion.training.evaluation import collect, head_losses, score, selection_value, worse_than_mean
from mmfusion.training.progress import Meter, Progress, Trace
from mmfusion.training.setup import TrainSetup
from mmfusion.training.state import TrainState


@dataclasses.dataclass(frozen=True)
class Call:
    """The steps of one compiled call.

    Attributes:
      batches: K host batches.
      device_batches: the same on the devices.
      learning_rates: `[K]` float32.
    """

    batches: tuple[Batch, ...]
    device_batches: tuple[Batch, ...]
    learning_rates: np.ndarray


@dataclasses.dataclass
class TrainRun:
    """A run that takes steps: `for call in run.calls(): ...; run.advance(...)`, then `run.test()`.

    Attributes:
      config, directory, dataset, setup: what it is made of; `config_values` is the config as JSON values.
      state: on the devices; the step donates it.
      progress: what a checkpoint remembers beside the state.
      k: steps of a call.
      checkpoints, log, saver, meter, trace: where things go.
      meta: JSON values that each checkpoint holds.
      environment: see `provenance.environment`.
      started: `time.monotonic()` as the first attempt began.
      profile: trace a few early calls.
      higher_is_better: whether a higher value of the metric that selects the checkpoint is better; None: none does.
    """

    config: RunConfig
    config_values: dict[str, Any]
    directory: RunDir
    dataset: Dataset
    setup: TrainSetup
    state: TrainState
    progress: Progress
    k: int
    checkpoints: Checkpoints
    log: Logger
    saver: Saver
    meter: Meter
    trace: Trace
    meta: dict[str, Any]
    environment: dict[str, Any]
    started: float
    profile: bool
    higher_is_better: bool | None

    def __post_init__(self):
        self._eval_step = self.setup.compile_eval_step()
        self._resumed_at = time.monotonic() - self.progress.seconds
        self._first_step = self.progress.step
        if self.setup.spec.objectives.need_head_losses and not self.progress.head_losses:
            self._update_loss_weights(self._evaluate("valid"))

    def calls(self) -> Iterator[Call]:
        """Yields what is left of the run, one compiled call at a time."""
        split, config = self.dataset.splits["train"], self.config
        for host, device in read_calls(split, config, self.setup, first=self.progress.step, k=self.k):
            if self.progress.stopped:  # at the last validation, maybe before the run was resumed
                return
            yield Call(host, device, self.progress.learning_rates(config, self.k))

    def advance(self, call: Call, state: TrainState, metrics: Any) -> None:
        """Advances the run to the state after a call, and logs the metrics of the call before, which are ready by now.

        Raises:
          TooManyBadSteps, UserError: see `Meter.flush` and `Saver.poll`.
        """
        self.state, first_call = state, self.progress.step == self._first_step
        if not first_call:
            self.meter.flush()
            self.saver.poll()
        self.meter.hold(self.progress.step, metrics, call.learning_rates, call.batches)
        self.progress.step += self.k
        if self.profile and self.setup.partitioner.host_index == 0:
            self.trace.after_call(metrics)
        if first_call:
            jax.block_until_ready(metrics)
            if not self.progress.seconds_to_first_step:
                self.progress.seconds_to_first_step = time.monotonic() - self.started
            self.meter.start(self.progress.step)

    def validate_and_save_if_due(self, stop: Stop) -> None:
        """Validates and saves where the step is due for it, or where the run is asked to stop.

        Raises:
          Preempted: it was asked to stop and is saved.
          UserError: see `Saver.save`.
        """
        progress, config = self.progress, self.config
        stopping = self.setup.partitioner.should_stop(stop, progress.step, self.k)
        validate = progress.step % config.eval_every == 0 or progress.step == config.steps
        if not (validate or progress.step % config.checkpoint_every == 0 or stopping):
            return
        self.meter.pause()
        # Also when stopping: a step that is due must be scored, for the next run starts after it.
        selection_score = self._validate() if validate else None
        progress.seconds = time.monotonic() - self._resumed_at
        meta = {**self.meta, "progress": dataclasses.asdict(progress)}
        host_state = self.setup.partitioner.to_host(self.state)
        saved_at = self.saver.save(progress.step, host_state, meta, selection_score, last=stopping)
        if stopping:
            hosts.barrier()  # a host that ends, ends the others
            raise Preempted(f"saved at step {saved_at} of {config.steps}; run the same command to continue")
        self.meter.start(progress.step)

    def test(self, *, alone: bool = True) -> dict[str, Any]:
        """Tests the checkpoint that validation chose, once; writes the run's last files, and returns `result.json`.

        Args:
          alone: whether the steps ran by themselves, so that their time is that of this run.
        """
        self.saver.finish()
        progress, setup = self.progress, self.setup
        restored = self.checkpoints.restore_valid(setup.state_shapes(), best=True)
        assert restored is not None  # the last step was saved
        host_state, chosen = restored
        self.state = setup.partitioner.put_state(host_state)
        rows = {"valid": self._evaluate("valid")}
        test_labels = self.dataset.splits["test"].has_labels  # without any, all metrics are None
        rows["test"] = self._evaluate("test") if test_labels else jax.tree.map(lambda x: x[:0], rows["valid"])
        scores = {split: score(rows[split], setup.tasks, skip_empty=True) for split in rows}
        scores["valid"] = without_class_lists(scores["valid"])
        self.log.log(chosen["step"], without_class_lists(scores["test"]), "test")
        speed = progress.training_examples / max(progress.training_seconds, 1e-9)
        result = scores | {
            "parameters": sum(x.size for x in jax.tree.leaves(self.state.params)),
            "examples_per_second": speed if alone else None,
            "seconds": time.monotonic() - self._resumed_at,
            "seconds_to_first_step": progress.seconds_to_first_step,
            "seed": self.config.seed,
            "config": self.config_values,
            "steps": progress.step,
            "stopped": progress.stopped,
            "best_step": chosen["step"],
            "skipped": progress.bad_steps["skipped"],
            "spikes": progress.bad_steps["spikes"],
            "rollbacks": progress.rollbacks,
            "select": self.config.select,
            "data": self.dataset.described(),
            "device": f"{setup.partitioner.num_devices} x {jax.devices()[0].device_kind}",
            **self.environment,
        }
        self.log.sync()
        if setup.partitioner.host_index == 0:
            calibration.write(self.directory.folder, rows["valid"], setup.tasks, chosen)
            outputs.write(self.directory.folder, rows, setup.tasks)
            write_json(self.directory.folder / "result.json", result)
        self.log.print(results_table(scores))
        return result

    def _validate(self) -> float | None:
        rows = self._evaluate("valid")
        scores = score(rows, self.setup.tasks, skip_empty=True)
        self.log.log(self.progress.step, without_class_lists(scores), "valid")
        for line in worse_than_mean(scores, self.setup.tasks, self.progress.step, self.config):
            self.log.print(line)
        selection_score = None
        if self.higher_is_better is not None:
            selection_score = selection_value(scores, self.config.select, self.higher_is_better)
            self.progress.stop_early_if_due(self.config, selection_score)
        if self.progress.stopped:
            at = f"step {self.progress.step} of {self.config.steps}"
            self.log.print(f"train  stopped at {at}: {self.progress.stopped}")
        if self.config.optim.schedule.name == "plateau":
            self.progress.plateau = optim.plateau_update(
                self.progress.plateau, selection_score, self.config.optim.schedule.to_dict(), higher_is_better=True
            )
        if self.setup.spec.objectives.need_head_losses:
            self._update_loss_weights(rows)
        return selection_score

    def _evaluate(self, split: str) -> dict[str, Any]:
        return self._collect(self.dataset.splits[split], self.config.data.max_bad_fraction)

    def _collect(self, split: Split, max_bad_fraction: float) -> dict[str, Any]:
        return collect(
            self._eval_step, self.state, split, self.setup, batch_size=self.config.batch_size,
            workers=self.config.data.workers, max_bad_fraction=max_bad_fraction,
        )  # fmt: skip

    def _update_loss_weights(self, valid: dict[str, Any]) -> None:
        """Sets the loss weights that follow from the losses of each head since the last validation."""
        seen = self.dataset.splits["train"].subset(len(self.dataset.splits["valid"]))
        losses = [head_losses(rows, self.setup.tasks) for rows in (self._collect(seen, 1.0), valid)]
        now = {head: (losses[0][head], losses[1][head]) for head in losses[0]}
        before, self.progress.head_losses = self.progress.head_losses or now, now
        changed = self.setup.spec.objectives.on_validation(before, now)
        weights = jax.tree.map(np.float32, changed)
        replicated = self.setup.partitioner.replicate(weights)
        self.state = self.state.replace(loss_weights={**self.state.loss_weights, **replicated})


def read_calls(
    split: Split, config: RunConfig, setup: TrainSetup, *, first: int, k: int
) -> Iterator[tuple[tuple[Batch, ...], tuple[Batch, ...]]]:
    """Yields the host and the device batches of each compiled call from step `first` on, K of each."""
    partitioner = setup.partitioner
    batches = pipeline.train_batches(
        split, seed=config.seed, batch_size=config.batch_size, first=first, last=config.steps,
        host=partitioner.host_index, hosts=partitioner.num_hosts, workers=config.data.workers,
    )  # fmt: skip
    pairs = pipeline.to_device(batches, partitioner.put_batch)
    while call := tuple(itertools.islice(pairs, k)):
        host, device = zip(*call, strict=True)
        yield host, device
