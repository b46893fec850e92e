"""How far a run is: what its checkpoints remember, and the numbers of its steps, fetched one call late."""

import contextlib
import dataclasses
import time
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict

from mmfusion import optim
from mmfusion.data.batch import Batch
from mmfusion.data.dataset import Split, check_bad
from mmfusion.logger import Logger

MAX_SKIPPED = 20  # updates in a row whose loss or gradient is not finite, before the run stops


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
    """

    step: int = 0
    seconds: float = 0.0
    seconds_to_first_step: float = 0.0
    training_seconds: float = 0.0
    training_examples: int = 0
    plateau: dict[str, Any] = dataclasses.field(default_factory=optim.plateau_start)
    heads: dict[str, tuple[float, float]] = dataclasses.field(default_factory=dict)

    def learning_rates(self, config: ConfigDict, k: int) -> np.ndarray:
        """Returns the rates `[K]` float32 of the next `k` updates."""
        section, scale = config.optim, self.plateau["scale"]
        steps = range(self.step, self.step + k)
        rates = [
            optim.learning_rate(section.schedule, section.learning_rate, step, config.steps, scale) for step in steps
        ]
        return np.array(rates, np.float32)


class Meter:
    """Holds a call's numbers until the next call runs, so that the device never waits for the host; logs and checks."""

    def __init__(self, log: Logger, config: ConfigDict, split: Split):
        self._log, self._config, self._split = log, config, split
        self._held: tuple[int, Any, np.ndarray, Sequence[Batch]] | None = None
        self._skipped, self._unreadable = 0, set()

    def start(self, step: int) -> None:
        """Starts the clock at `step`: after compiling, and again after every pause."""
        self._began = self._last = (step, time.monotonic())

    def hold(self, first: int, metrics: Any, rates: np.ndarray, batches: Sequence[Batch]) -> None:
        """Keeps the numbers `[K]`, still on the device, of the call that started at step `first`."""
        self._held = first, metrics, rates, batches

    def flush(self) -> None:
        """Fetches and logs what is held.

        Raises:
          FloatingPointError: too many updates in a row were not finite.
          UserError: too many rows of a streamed split cannot be read.
        """
        if self._held is None:
            return
        (first, metrics, rates, batches), self._held = self._held, None
        metrics = jax.device_get(metrics)
        for k, (rate, batch) in enumerate(zip(rates, batches, strict=True)):
            step = first + k + 1
            values = {name: float(column[k]) for name, column in metrics.items()}
            self._check(step, values, batch)
            if step % self._config.log_every == 0 or step == self._config.steps:
                extra = {"learning_rate": float(rate), "ids": zlib.crc32(batch.id.tobytes())}
                self._log.log(step, {**values, **extra, **self._pace(step)})

    def pause(self, progress: Progress) -> None:
        """Flushes, and adds the time since `start` to the progress."""
        self.flush()
        step, began = self._began
        progress.training_seconds += time.monotonic() - began
        progress.training_examples += (progress.step - step) * self._config.batch_size

    def _pace(self, step: int) -> dict[str, float]:
        last, then = self._last
        self._last = now = (step, time.monotonic())
        examples = (step - last) * self._config.batch_size
        return {"examples_per_second": examples / max(now[1] - then, 1e-9)} if step > last else {}

    def _check(self, step: int, values: dict[str, float], batch: Batch) -> None:
        self._skipped = self._skipped + 1 if values["skipped"] else 0
        if self._skipped >= MAX_SKIPPED:
            raise FloatingPointError(
                f"the loss or its gradient was not finite in the {MAX_SKIPPED} updates up to step {step}: "
                "lower config.optim.learning_rate; the checkpoints hold the last good state"
            )
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
