"""How far a run is: what its checkpoints remember, and the numbers of its steps, fetched one call late."""

import contextlib
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mmfusion import optim
from mmfusion.data.batch import Batch
from mmfusion.data.dataset import Split, check_bad
from mmfusion.tracking.logger import Logger
from mmfusion.training import recovery


@dataclasses.dataclass
class Progress:
    """JSON values that a checkpoint holds beside the state.

    Attributes:
      step: updates done.
      seconds: wall time, over all attempts.
      seconds_to_first_step: of the first attempt, from its start.
      training_seconds, training_examples: in steps alone, without compilation, validation and saving.
      plateau: see `optim.plateau_update`.
      heads: the (training, validation) loss of each head at the last validation, where Gradient-Blending asks for it.
      watched: updates whose numbers were wrong, see `recovery.watch`.
      rollbacks: times that the run went back to an earlier checkpoint for them.
    """

    step: int = 0
    seconds: float = 0.0
    seconds_to_first_step: float = 0.0
    training_seconds: float = 0.0
    training_examples: int = 0
    plateau: dict[str, Any] = dataclasses.field(default_factory=optim.plateau_start)
    heads: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)
    watched: dict[str, Any] = dataclasses.field(default_factory=recovery.unwatched)
    rollbacks: int = 0

    def learning_rates(self, config: ConfigDict, k: int) -> np.ndarray:
        """Returns the rates `[K]` float32 of the next `k` updates."""
        section, scale = config.optim, self.plateau["scale"] * config.recovery.lr_factor**self.rollbacks
        steps = range(self.step, self.step + k)
        rates = [
            optim.learning_rate(section.schedule, section.learning_rate, step, config.steps, scale) for step in steps
        ]
        return np.array(rates, np.float32)


class Meter:
    """Holds a call's numbers until the next call runs, so that the device never waits for the host; logs and checks."""

    def __init__(self, log: Logger, config: ConfigDict, split: Split, progress: Progress):
        self._log, self._config, self._split, self._progress = log, config, split, progress
        self._held: tuple[int, Any, np.ndarray, Sequence[Batch]] | None = None
        self._unreadable, self._wrong = set(), []

    def start(self, step: int) -> None:
        """Starts the clock at `step`: after compiling, and again after every pause."""
        self._began = self._last = (step, time.monotonic())

    def hold(self, first: int, metrics: Any, rates: np.ndarray, batches: Sequence[Batch]) -> None:
        """Keeps the numbers `[K]`, still on the device, of the call that started at step `first`."""
        self._held = first, metrics, rates, batches

    def flush(self) -> None:
        """Fetches and logs what is held.

        Raises:
          WentWrong: too many updates in a row were not finite, or were spikes of the loss.
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
        wrong = recovery.NOT_FINITE if values["skipped"] else recovery.SPIKE if values.get("spike") else ""
        progress.watched = recovery.watch(progress.watched, step, wrong)
        numbers = {"loss": values["loss"], "grad_norm": values["grad_norm"], "learning_rate": rate}
        self._wrong = [*self._wrong, {"step": step, "wrong": wrong, **numbers}] if wrong else []
        if progress.watched["row"] >= section.max_consecutive_bad_steps:
            raise recovery.WentWrong(self._wrong, progress.watched["first"], progress.rollbacks, progress.watched)
        if not batch.weight.all():  # training batches have no padding: these rows could not be read
            self._unreadable |= set(batch.id[batch.weight == 0].tolist())
            check_bad(self._split, self._unreadable, self._config.data.max_bad_fraction)


class Trace:
    """Writes a JAX trace of calls 3 to 6 of this attempt: late enough to be compiled, early enough to be cheap."""

    FIRST, LAST = 2, 6

    def __init__(self, directory: Path):
        self._directory, self._calls, self._stack = directory, 0, contextlib.ExitStack()

    def after_call(self, result: Any) -> None:
        """Counts one call; starts or ends the trace around `result`'s computation."""
        self._calls += 1
        if self._calls in (self.FIRST, self.LAST):
            jax.block_until_ready(result)
            self.close()
        if self._calls == self.FIRST:
            self._stack.enter_context(jax.profiler.trace(str(self._directory)))

    def close(self) -> None:
        self._stack.close()
