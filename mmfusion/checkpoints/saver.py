"""Saving while a run goes on: a few checkpoints in a row may fail before it stops, and the best of them is kept."""

import dataclasses
import math
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from mmfusion.checkpoints.manager import Checkpoints
from mmfusion.errors import Unreachable, UserError
from mmfusion.tracking.logger import Logger


@dataclasses.dataclass
class Saver:
    """Saves, on the first of several hosts, and counts the saves in a row that failed.

    Attributes:
      checkpoints: where to.
      upload: brings what was logged to where the run's directory is, where that is not here.
      log: is told of a failure.
      may_fail: how many in a row may, before the next one's error is raised.
      failed: the errors of those in a row.
      owed: the arguments of the save that failed whose score is best, since it may be what the run shall be judged by.
        No later one is saved before it: a run that goes on from there would not know of it.
    """

    checkpoints: Checkpoints
    upload: Callable[[], None]
    log: Logger
    may_fail: int
    failed: list[UserError] = dataclasses.field(default_factory=list)
    owed: tuple[int, Any, Mapping[str, Any], float] | None = None
    _newest: tuple[int, Any, Mapping[str, Any], float | None] | None = None

    def poll(self, *, wait: bool = False) -> None:
        """Takes note of how the newest save has ended, if it has."""
        outcome = self.checkpoints.outcome(wait=wait)
        if outcome is True:
            self.failed.clear()
        elif outcome:
            self._owe()
            self._fail(outcome)

    def save(self, step: int, state: Any, meta: Mapping[str, Any], score: float | None, *, last: bool) -> int:
        """Saves a step; returns the one that a run goes on from which stops now.

        Args:
          last: it stops, so wait until all is written; where that fails, an older checkpoint serves.

        Raises:
          UserError: too many have failed, or the last one, and no older one is there.
        """
        if self.checkpoints.readonly:
            return step
        self.poll(wait=True)
        # Copied, because the next step donates these buffers while the writer, or a second attempt, still reads them.
        self._newest = (step, jax.tree.map(np.array, state), meta, score)
        try:
            self._sync()  # first, since a run goes on after its checkpoint
            self.upload()
            self._save_owed()
            self.checkpoints.save(*self._newest)
            if last:
                self.checkpoints.wait()
                self.failed.clear()
        except UserError as error:
            self._owe()
            if not last:
                self._fail(error)
            elif (older := self.checkpoints.newest()) is None:
                raise
            else:
                self.log.print(f"train  warning: {error}")
                return older
        return step

    def _owe(self) -> None:
        """Keeps the newest save, which failed, where its score is better than that of another one that did."""
        score = self._newest[3]
        if score is not None and math.isfinite(score) and (self.owed is None or score > self.owed[3]):
            self.owed = self._newest

    def _save_owed(self) -> None:
        """Saves what is owed, if it is still the best; raises UserError where that fails again."""
        if not self.owed:
            return
        try:
            best = self.checkpoints.best()
            known = None if best is None else self.checkpoints.meta(best)["score"]
        except (OSError, Unreachable) as error:
            raise UserError(f"cannot read the checkpoints: {error}") from error
        if known is None or known < self.owed[3]:
            self.checkpoints.save(*self.owed)
            self.checkpoints.wait()
            self.log.print(f"train  the checkpoint of step {self.owed[0]} is written now")
        self.owed = None

    def _sync(self) -> None:
        try:
            self.log.sync()
        except OSError as error:
            raise UserError(f"cannot write what was logged: {error.strerror}") from error

    def finish(self) -> None:
        """Waits for what is under way; raises UserError where the newest step is not saved."""
        self.poll(wait=True)
        if self.failed:
            raise self.failed[-1]

    def _fail(self, error: UserError) -> None:
        self.failed.append(error)
        if len(self.failed) > self.may_fail:
            raise error
        self.log.print(
            f"train  warning: {error}; going on, this is failure {len(self.failed)} of {self.may_fail} allowed"
        )
