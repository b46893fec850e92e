"""Saving while a run goes on: a few checkpoints in a row may fail before it stops."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from mmfusion.checkpoint import Checkpoints
from mmfusion.errors import UserError
from mmfusion.logger import Logger


@dataclasses.dataclass
class Saver:
    """Saves, and counts the saves in a row that failed.

    Attributes:
      checkpoints: where to.
      send: brings what was logged to where the run's directory is, where that is not here.
      log: is told of a failure.
      may_fail: how many in a row may, before the next one's error is raised.
    """

    checkpoints: Checkpoints
    send: Callable[[], None]
    log: Logger
    may_fail: int
    failed: list[UserError] = dataclasses.field(default_factory=list)

    def hear(self, *, wait: bool = False) -> None:
        """Takes note of how the newest save has ended, if it has."""
        outcome = self.checkpoints.outcome(wait=wait)
        if outcome is True:
            self.failed.clear()
        elif outcome:
            self._fail(outcome)

    def save(self, step: int, state: Any, meta: Mapping[str, Any], score: float | None, *, last: bool) -> None:
        """Saves a step; `last`: nothing may fail any more, and it returns when all is written.

        Raises:
          UserError: too many have failed, or the last one.
        """
        self.hear(wait=True)
        errors = []
        # What was logged first: a run goes on after its checkpoint. And then that, in which every host takes part.
        for write in (self._sync, self.send, lambda: self.checkpoints.save(step, state, meta, score)):
            try:
                write()
            except UserError as error:
                errors.append(error)
        if errors and last:
            raise errors[-1]
        if errors:
            self._fail(errors[-1])
        if last:
            self.finish()

    def _sync(self) -> None:
        try:
            self.log.sync()
        except OSError as error:
            raise UserError(f"cannot write what was logged: {error.strerror}") from error

    def finish(self) -> None:
        """Waits for what is under way; raises UserError where the newest step is not saved."""
        self.hear(wait=True)
        if self.failed:
            raise self.failed[-1]

    def _fail(self, error: UserError) -> None:
        self.failed.append(error)
        if len(self.failed) > self.may_fail:
            raise error
        self.log.print(
            f"train  warning: {error}; going on, this is failure {len(self.failed)} of {self.may_fail} allowed"
        )
