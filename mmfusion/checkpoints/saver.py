"""Saves during training: a few in a row may fail, and the best checkpoint is written later where it could not be."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any, NamedTuple

import jax
import numpy as np

from mmfusion.checkpoints.manager import Checkpoints
from mmfusion.errors import Unreachable, UserError
from mmfusion.tracking.logger import Logger


class Save(NamedTuple):
    """The arguments of `Checkpoints.save`."""

    step: int
    state: Any
    meta: Mapping[str, Any]
    score: float | None


@dataclasses.dataclass
class Saver:
    """Saves on the primary host, and counts the saves in a row that failed.

    Attributes:
      checkpoints: where to save.
      upload: copies the log to the run's directory where that is in a bucket.
      log: receives a warning for each failure.
      max_failures: number of failures in a row after which the next one is raised.
      failures: their errors.
      pending_best: the failed save with the best score, which validation may choose in the end. The next save writes it
        first: a run that resumes from a later step would not know of it.
    """

    checkpoints: Checkpoints
    upload: Callable[[], None]
    log: Logger
    max_failures: int
    failures: list[UserError] = dataclasses.field(default_factory=list)
    pending_best: Save | None = None
    _latest: Save | None = None

    def poll(self, *, wait: bool = False) -> None:
        """Handles the result of the latest save if there is one; raises UserError after too many failures."""
        outcome = self.checkpoints.outcome(wait=wait)
        if isinstance(outcome, UserError):
            self._keep_best()
            self._fail(outcome)
        elif outcome:
            self.failures.clear()

    def save(self, step: int, state: Any, meta: Mapping[str, Any], score: float | None, *, last: bool) -> int:
        """Saves a step; returns the step from which a run that stops now will resume.

        Args:
          step, state, meta, score: see `Checkpoints.save`.
          last: whether the run stops. Then wait until all is written; an older checkpoint does where this one fails.

        Raises:
          UserError: too many saves have failed, or the last one and there is no older checkpoint.
        """
        if self.checkpoints.readonly:
            return step
        self.poll(wait=True)
        # Copied, because the next step donates these buffers while they are still written, or written again.
        self._latest = Save(step, jax.tree.map(np.array, state), meta, score)
        try:
            self._sync_log()  # a run resumes after its checkpoint, so the log must not be behind
            self.upload()
            self._save_pending_best()
            self.checkpoints.save(*self._latest)
            if last:
                self.checkpoints.wait()
                self.failures.clear()
        except UserError as error:
            self._keep_best()
            if not last:
                self._fail(error)
                return step
            older = self.checkpoints.newest()
            if older is None:
                raise
            self.log.print(f"train  warning: {error}")
            return older
        return step

    def finish(self) -> None:
        """Waits for the latest save; raises UserError where it failed."""
        self.poll(wait=True)
        if self.failures:
            raise self.failures[-1]

    def _keep_best(self) -> None:
        """Keeps the latest save, which failed, for the next one if no failed save before it has a better score."""
        if _score(self._latest) > _score(self.pending_best):
            self.pending_best = self._latest

    def _save_pending_best(self) -> None:
        """Writes the failed save with the best score, unless a checkpoint has a better one by now."""
        if self.pending_best is None:
            return
        try:
            best = self.checkpoints.best()
            score = None if best is None else self.checkpoints.meta(best)["score"]
        except (OSError, Unreachable) as error:
            raise UserError(f"cannot read the checkpoints: {error}") from error
        if score is None or score < _score(self.pending_best):
            self.checkpoints.save(*self.pending_best)
            self.checkpoints.wait()
            self.log.print(f"train  the checkpoint of step {self.pending_best.step} is written now")
        self.pending_best = None

    def _sync_log(self) -> None:
        try:
            self.log.sync()
        except OSError as error:
            raise UserError(f"cannot write the log: {error.strerror}") from error

    def _fail(self, error: UserError) -> None:
        self.failures.append(error)
        count = len(self.failures)
        if count > self.max_failures:
            raise error
        self.log.print(f"train  warning: {error}; going on, this is failure {count} of {self.max_failures} allowed")


def _score(save: Save | None) -> float:
    """Returns a score to compare failed saves by; one that was not validated is not worth keeping."""
    if save is None or save.score is None or not math.isfinite(save.score):
        return -math.inf
    return save.score
