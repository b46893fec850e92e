"""Progress of a run: what its checkpoints remember, and metrics that are fetched and logged one call late.

K steps a call.
"""

import contextlib
import dataclasses
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmfusion import optim
from mmfusion.config import RunConfig
from mmfusion.data.batch import Batch
from mmfusion.data.split import Split, check_bad
from mmfusion.tracking.logger import Logger
from mmfusion.training import recovery


@dataclasses.dataclass
class Progress:
    """JSON values that a checkpoint holds beside the state.

    Attributes:
      step: steps taken.
      seconds: wall time over all attempts.
      seconds_to_first_step: of the first attempt, from its start.
      training_seconds, training_examples: of steps alone, without compilation, validation and saving.
      plateau: see `optim.plateau_update`.
      head_losses: the (training, validation) loss of each head at the last validation, where loss weights need it.
      bad_steps: counts of steps that were bad, see `recovery.no_bad_steps`.
      rollbacks: how often the run rolled back to an earlier checkpoint because of them.
      best_score: the best validation score so far, higher is better; None before there is one.
      without_improvement: validations since then.
      stopped: why training ended before its last step; empty while it has not.
    """

    step: int = 0
    seconds: float = 0.0
    seconds_to_first_step: float = 0.0
    training_seconds: float = 0.0
    training_examples: int = 0
    plateau: dict[str, Any] = dataclasses.field(default_factory=optim.plateau_start)
    head_losses: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    bad_steps: dict[str, int] = dataclasses.field(default_factory=recovery.no_bad_steps)
    rollbacks: int = 0
    best_score: float | None = None
    without_improvement: int = 0
    stopped: str = ""

    def is_finished(self, config: RunConfig) -> bool:
        """Returns whether no further step is to be taken."""
        return bool(self.stopped) or self.step >= config.steps

    def stop_early_if_due(self, config: RunConfig, score: float) -> None:
        """Counts a validation with this score, higher is better, and stops after `config.early_stopping` in vain."""
        if not config.early_stopping:
            return
        if math.isfinite(score) and (self.best_score is None or score > self.best_score):
            self.best_score, self.without_improvement = score, 0
            return
        self.without_improvement += 1
        if self.without_improvement >= config.early_stopping and self.step < config.steps:
            self.stopped = f"{config.select} has not improved in {self.without_improvement} validations"

    def learning_rates(self, config: RunConfig, k: int) -> np.ndarray:
        """Returns the learning rates `[K]` float32 of the next `k` steps."""
        section, schedule = config.optim, config.optim.schedule.to_dict()
        scale = self.plateau["scale"] * config.recovery.lr_factor**self.rollbacks
        steps = range(self.step, self.step + k)
        rates = [optim.learning_rate(schedule, section.learning_rate, step, config.steps, scale) for step in steps]
        return np.array(rates, np.float32)


class Meter:
    """Logs and checks metrics one call late, so that fetching them never blocks the device."""

    def __init__(self, log: Logger, config: RunConfig, split: Split, progress: Progress):
        self._log, self._config, self._split, self._progress = log, config, split, progress
        self._held: tuple[int, Any, np.ndarray, Sequence[Batch]] | None = None
        self._unreadable: set[int] = set()
        self._bad_steps: list[dict[str, Any]] = []  # the newest in a row

    def start(self, step: int) -> None:
        """Starts the clock at `step`: after compilation, and again after every pause."""
        self._began = self._last = (step, time.monotonic())

    def hold(self, first: int, metrics: Any, rates: np.ndarray, batches: Sequence[Batch]) -> None:
        """Keeps the metrics `[K]`, still on the device, of the call that started at step `first`."""
        self._held = first, metrics, rates, batches

    def flush(self) -> None:
        """Fetches and logs the metrics that are held.

        Raises:
          TooManyBadSteps: too many steps in a row were not finite, or were spikes of the loss.
          UserError: too many rows of a streamed split cannot be read.
        """
        if self._held is None:
            return
        (first, metrics, rates, batches), self._held = self._held, None
        metrics = jax.device_get(metrics)
        for k, (rate, batch) in enumerate(zip(rates, batches, strict=True)):
            step = first + k + 1
            values = {name: float(column[k]) for name, column in metrics.items()}
            self._check(step, values, float(rate), batch)
            if step % self._config.log_every == 0 or step == self._config.steps:
                extra = {"learning_rate": float(rate), "ids": int(values["ids"])}
                self._log.log(step, {**values, **extra, **self._pace(step)})

    def pause(self) -> None:
        """Flushes, and adds the time since `start` to the progress."""
        self.flush()
        (step, began), progress = self._began, self._progress
        progress.training_seconds += time.monotonic() - began
        progress.training_examples += (progress.step - step) * self._config.batch_size

    def _pace(self, step: int) -> dict[str, float]:
        last, then = self._last
        self._last = now = (step, time.monotonic())
        examples = (step - last) * self._config.batch_size
        return {"examples_per_second": examples / max(now[1] - then, 1e-9)} if step > last else {}

    def _check(self, step: int, values: dict[str, float], rate: float, batch: Batch) -> None:
        section, progress = self._config.recovery, self._progress
        reason = recovery.NOT_FINITE if values["skipped"] else recovery.SPIKE if values.get("spike") else ""
        progress.bad_steps = counts = recovery.count_step(progress.bad_steps, step, reason)
        recorded = {"loss": values["loss"], "grad_norm": values["grad_norm"], "learning_rate": rate}
        self._bad_steps = [*self._bad_steps, {"step": step, "wrong": reason, **recorded}] if reason else []
        if counts["consecutive"] >= section.max_consecutive_bad_steps:
            raise recovery.TooManyBadSteps(self._bad_steps, counts["first"], progress.rollbacks, counts)
        if not batch.weight.all():  # rows that could not be read, or padding in place of rows without a label
            self._unreadable |= set(batch.id[(batch.weight == 0) & (batch.id >= 0)].tolist())
            check_bad(self._split, self._unreadable, self._config.data.max_bad_fraction)


class Trace:
    """Writes a JAX trace of calls 3 to 6 of this attempt: after compilation, and early enough to be cheap."""

    FIRST, LAST = 2, 6

    def __init__(self, directory: Path):
        self._directory, self._calls, self._stack = directory, 0, contextlib.ExitStack()

    def after_call(self, result: Any) -> None:
        """Counts one call; starts or ends the trace around the computation of `result`."""
        self._calls += 1
        if self._calls in (self.FIRST, self.LAST):
            jax.block_until_ready(result)
            self.close()
        if self._calls == self.FIRST:
            self._stack.enter_context(jax.profiler.trace(str(self._directory)))

    def close(self) -> None:
        self._stack.close()
