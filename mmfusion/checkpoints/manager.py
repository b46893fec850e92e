"""Checkpoints of a run: saving, restoring and quarantine."""

import contextlib
import itertools
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
from etils import epath, epy

from mmfusion import files
from mmfusion.checkpoints.checksums import checksums, describe, differences, flatten, with_checksum
from mmfusion.checkpoints.verify import (
    META,
    CorruptCheckpoint,
    is_step,
    read_errors,
    read_meta,
    retention_metrics,
    validation_error,
    verify_checksums,
)
from mmfusion.distributed import hosts
from mmfusion.errors import UserError

with epy.lazy_imports():  # a third of a second
    import orbax.checkpoint as ocp

    from mmfusion.checkpoints import retention

STATE = "state"  # the item saved beside META
TEMPORARY = "orbax-checkpoint-tmp"  # in the names of folders that are not written completely
QUARANTINE = "damaged-checkpoints"  # folder for corrupt checkpoints, beside the folder of the others
T = TypeVar("T")


class Checkpoints:
    """The checkpoints of one run: the newest two, the best one, and the newest one before a series of bad steps.

    Two, because the newest may be incomplete when the machine dies. A corrupt one is moved to quarantine, a folder
    beside the others. With several hosts only the primary one writes, so that no host waits for another's failed
    write; the others are readonly.

    Args:
      directory: local or in a bucket, created if missing.
      readonly: whether nothing is written, moved or cleaned up; corrupt checkpoints are skipped.
      check: given the metadata of each checkpoint; raises UserError for one that is of another run.

    Raises:
      UserError: a checkpoint may not be read, has the name of another step or of none, or as `check` does; or a corrupt
        one cannot be moved.
      Unreachable: a checkpoint cannot be read for now.
    """

    def __init__(
        self,
        directory: str | epath.Path,
        *,
        readonly: bool = False,
        check: Callable[[Mapping[str, Any]], None] = lambda meta: None,
    ):
        self._directory = _absolute(directory)
        self.readonly = readonly or jax.process_index() > 0
        self._corrupt: set[int] = set()  # readonly: those that are skipped
        self._saving: int | None = None  # step of a save whose result is not known yet
        self._rolled_back = False  # whether `delete_from` has deleted all
        self._orbax: retention.Manager | None = None
        if not self.readonly:
            self._directory.mkdir(parents=True, exist_ok=True)
        for name in self._names():
            if not is_step(self._directory / name) or not ocp.utils.is_checkpoint_finalized(self._directory / name):
                continue  # in a bucket, an incomplete one has its final name already; Orbax deletes it
            if error := validation_error(self._directory / name):
                self._quarantine(int(name), f"checkpoint {self._directory}/{name} is damaged: {error}")
                continue
            meta = self.meta(int(name))
            if str(meta["step"]) != name:
                message = f"is the checkpoint of step {meta['step']}: rename the folder to {meta['step']}"
                raise UserError(message, path=f"{self._directory}/{name}")
            check(meta)
        if self._names():  # otherwise Orbax is imported and opened by the first save
            self._orbax = retention.open_manager(self._directory, self.readonly)
            if not self.readonly:
                self._delete_files()

    @property
    def _manager(self) -> "retention.Manager":
        """Orbax's manager, opened by the first save, and again after a failed one."""
        if self._orbax is None:
            try:
                self._directory.mkdir(parents=True, exist_ok=True)
                self._orbax = retention.open_manager(self._directory, self.readonly)
            except Exception as error:  # any exception of the storage's client library
                raise UserError(f"cannot be opened: {_reason(error)}", path=str(self._directory)) from error
        return self._orbax

    def steps(self) -> list[int]:
        """Returns the steps that can be restored, in order."""
        if self._orbax is None and not self._names():
            return []
        return sorted(set(self._manager.all_steps()) - self._corrupt)

    def newest(self) -> int | None:
        """Returns the newest step, or None."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Returns the step with the best finite validation score, the newest one if none has a score, or None."""
        metas = {step: self.meta(step) for step in self.steps()}  # Orbax's own copy of the score has no checksum
        scored = [step for step, meta in metas.items() if retention.score_or_worst(meta) > -math.inf]
        return max(scored, key=lambda step: retention.rank(metas[step]), default=self.newest())

    def save(self, step: int, state: Any, meta: Mapping[str, Any], score: float | None) -> None:
        """Starts to save a step that is not saved yet; it is written in the background, see `outcome`.

        Args:
          step: steps taken.
          state: a pytree of NumPy arrays, which must not change while they are written.
          meta: JSON values: config, tokenizers, class names, schedule state.
          score: validation score, higher is better; None where this step was not validated.

        Raises:
          UserError: it fails at once (no space left, no permission), or the older checkpoints have vanished.
        """
        known = self.steps()
        if step in known:
            return
        if known and not self._directory.exists():
            self._manager.reload()  # forgets them, so that the next save creates the folder
            raise UserError(f"is gone, and {len(known)} checkpoints with it", path=str(self._directory))
        try:
            self._start_save(step, state, meta, score)
        except Exception as error:  # any exception of the storage's client library
            raise self._save_error(error) from error

    def _start_save(self, step: int, state: Any, meta: Mapping[str, Any], score: float | None) -> None:
        self._saving = step
        finite = score if score is not None and math.isfinite(score) else None
        complete = {
            **meta,
            "step": step,
            "score": finite,
            "tree": describe(state),
            "sums": checksums(state),
        }
        checked = with_checksum(json.loads(json.dumps(complete)))  # as it will be read: tuples become lists
        started = self._manager.save(
            step,
            force=True,  # also where a newer one exists
            args=ocp.args.Composite(**{STATE: ocp.args.StandardSave(state), META: ocp.args.JsonSave(checked)}),
            metrics=retention_metrics(complete),
        )
        if not started:
            raise RuntimeError("Orbax did not start to save")

    def outcome(self, *, wait: bool = False) -> UserError | bool:
        """Returns the result of the last save, once: True, or its error; False while there is no new result.

        Args:
          wait: whether to wait for a save in progress.
        """
        if self._saving is None or (not wait and self._manager.is_saving_in_progress()):
            return False
        step, self._saving = self._saving, None
        try:
            self._manager.wait_until_finished()
            if "://" not in str(self._directory):
                files.sync(self._directory / str(step))  # it must survive a power loss before older ones are deleted
            self._delete_files()
        except Exception as error:
            return self._save_error(error)
        return True

    def _delete_files(self) -> None:
        """Deletes the files of checkpoints that are no longer kept."""
        if (self._directory / retention.DELETED).exists():
            (self._directory / retention.DELETED).rmtree(missing_ok=True)

    def _save_error(self, error: Exception) -> UserError:
        """Returns the error of a failed save as one line, after ending its writers and deleting its files."""
        self._saving = None
        if self._orbax is not None:
            for _ in range(3):  # each writer's error is raised once, and must not become the error of the next save
                with contextlib.suppress(Exception):
                    self._orbax.close()
                    break
            self._orbax = None
        with contextlib.suppress(OSError):  # a disk that cannot be written may not be cleaned up either
            for name in self._names():
                if TEMPORARY in name:
                    (self._directory / name).rmtree(missing_ok=True)
        message = f"cannot write a checkpoint: {_reason(error)}; older ones are untouched"
        return UserError(message, path=str(self._directory))

    def meta(self, step: int) -> dict[str, Any]:
        """Returns the metadata of a step; raises CorruptCheckpoint where it is not what was saved."""
        return read_meta(self._directory / str(step))

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Returns the state of a step, as host arrays with the shapes of `like`, and its metadata.

        Raises:
          CorruptCheckpoint: it is not what was saved.
          UserError: it has another architecture, with the differences in the message, or may not be read.
        """
        meta = self.meta(step)
        if lines := differences(describe(like), meta["tree"]):
            others = f"; and {len(lines) - 5} more" if len(lines) > 5 else ""
            raise UserError(
                f"the checkpoint has another architecture: {'; '.join(lines[:5])}{others}",
                path=f"{self._directory}/{step}",
            )
        template = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
        folder, args = self._directory / str(step), ocp.args.StandardRestore(template)
        with read_errors(folder):
            state = self._manager.restore(step, args=ocp.args.Composite(**{STATE: args}))[STATE]
        verify_checksums(folder, state, meta)
        return state, meta

    def restore_valid(self, like: Any, *, best: bool = False) -> tuple[Any, dict[str, Any]] | None:
        """Returns the newest or the best valid state and its metadata; None where there is no checkpoint.

        All hosts must call it, and all get the checkpoint that the primary host chooses.

        Raises:
          UserError: all are corrupt, or as `restore` does.
        """
        primary = jax.process_index() == 0
        found = self.first_valid(lambda step: self.restore(step, like), best=best) if primary else None
        step = hosts.broadcast_from_primary(found[1]["step"] if found else -1)
        return found if primary or step < 0 else self.restore(step, like)

    def first_valid(self, read: Callable[[int], T], *, best: bool = False) -> T | None:
        """Returns `read(step)` of the newest checkpoint, or of the best, for which it finds nothing corrupt.

        Corrupt ones are quarantined with a warning. None where there is no checkpoint.

        Raises:
          UserError: all are corrupt, or as `read` does.
        """
        while True:
            try:
                step = self.best() if best else self.newest()
                if step is None:
                    break
                return read(step)
            except CorruptCheckpoint as error:
                self._quarantine(error.step, str(error))
                self._manager.reload()
        quarantine = self._directory.parent / QUARANTINE
        if self._corrupt or (not self._rolled_back and quarantine.exists()):
            raise UserError(
                f"no checkpoint is intact (see {quarantine}): start in another directory", path=str(self._directory)
            )
        return None

    def delete_from(self, step: int) -> None:
        """Deletes the checkpoints of a step and of all later ones."""
        for later in [saved for saved in self.steps() if saved >= step]:
            self._manager.delete(later)
        self._rolled_back = not self.steps()
        self._delete_files()

    def _names(self) -> list[str]:
        return [path.name for path in self._directory.iterdir()] if self._directory.exists() else []

    def _quarantine(self, step: int, reason: str) -> None:
        """Moves a corrupt checkpoint away with a warning, or skips it where readonly."""
        if self.readonly:
            self._corrupt.add(step)
            print(f"warning: {reason}; using another one", file=sys.stderr)
            return
        quarantine = self._directory.parent / QUARANTINE
        try:
            quarantine.mkdir(parents=True, exist_ok=True)
            targets = (quarantine / f"{step}-{number}" for number in itertools.count())
            target = next(path for path in targets if not path.exists())
            print(f"warning: {reason}; moved to {target}, using another one", file=sys.stderr)
            files.move(self._directory / str(step), target)
        except OSError as error:
            raise UserError(f"{reason}; and it cannot be moved away: {error}") from error

    def wait(self) -> None:
        """Waits until the last save is on disk; raises UserError where it failed."""
        if isinstance(outcome := self.outcome(wait=True), UserError):
            raise outcome

    def close(self) -> None:
        """Waits for the last save and closes the directory; a failed save is printed, to not hide another error."""
        if isinstance(outcome := self.outcome(wait=True), UserError):
            print(f"warning: {outcome}", file=sys.stderr)
        if self._orbax is not None:
            self._orbax.close()


def load_verified(folder: epath.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the arrays of one checkpoint by path, and its metadata; changes nothing.

    Raises:
      CorruptCheckpoint: it is not what was saved.
      UserError: it may not be read.
    """
    folder = _absolute(folder)
    meta = read_meta(folder)
    with read_errors(folder), ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(folder / STATE)
    verify_checksums(folder, state, meta)
    return {path: np.asarray(leaf) for path, leaf in flatten(state).items()}, meta


def _reason(error: Exception) -> str:
    """Returns the message of an error in one line; of TensorStore's long ones, the part that is the reason."""
    message = getattr(error, "strerror", None) or str(error)
    if found := re.search(r"([^:\[\]]+) \[(?:os_error_code|tensorstore_spec)=", message):
        message = found[1]
    return " ".join(message.split())[:300]


def _absolute(folder: epath.PathLike) -> epath.Path:
    path = epath.Path(folder)
    return path if path.is_absolute() else path.absolute()  # gs://... is absolute, but absolute() breaks it
