"""Checkpoints: state, position, config, tokenizers and class names together. The only file that imports Orbax."""

import contextlib
import copy
import functools
import json
import math
import re
import sys
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers
from orbax.checkpoint._src.serialization import tensorstore_utils

from mmfusion import files
from mmfusion.checkpoints import checksums
from mmfusion.checkpoints.verify import META, CorruptCheckpoint, check_sums, meta_of, metrics_of, reading, unsound
from mmfusion.distributed import hosts
from mmfusion.errors import UserError

STATE = "state"  # the item that META is beside
GONE = "let-go"  # the folder of those that are being deleted
TEMPORARY = "orbax-checkpoint-tmp"  # in the names of what is not whole yet
ASIDE = "damaged-checkpoints"  # where those go that are damaged, beside the others' folder
T = TypeVar("T")


class _Manager(ocp.CheckpointManager):
    """Orbax's, which asks whether the machine is to be taken away only where all hosts do: in the loop."""

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """The checkpoints of one run: the newest two, the best one, and the newest one before updates that went wrong.

    Two newest, since the last one may be half-written when the machine dies. One that is not what was saved is set
    aside in a folder beside the others', or, where `readonly`, passed over: then nothing is moved or cleaned up. Of
    several hosts the first one alone writes, so that none waits for a write of another that fails; the others' are
    `readonly`.
    """

    def __init__(self, directory: str | epath.Path, *, readonly: bool = False):
        self._directory = _absolute(directory)
        self.readonly = readonly or jax.process_index() > 0
        self._damaged, self._begun = set(), None
        self._emptied = False
        if self.readonly:
            files.invalidate_listings(self._directory)
        else:
            self._directory.mkdir(parents=True, exist_ok=True)
        for step in self._folders():
            if not ocp.utils.is_checkpoint_finalized(self._directory / step):
                continue  # a kill left it half-written, in a bucket under its own name; Orbax takes it away
            if why := unsound(self._directory / step):
                self._set_aside(int(step), f"checkpoint {self._directory}/{step} is damaged: {why}")
        self._manager = _Manager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                read_only=self.readonly,
                create=False,
                multiprocessing_options=ocp.options.MultiprocessingOptions(
                    primary_host=jax.process_index(),
                    active_processes={jax.process_index()},
                    barrier_sync_key_prefix=f"host{jax.process_index()}",
                ),
                best_fn=_score,  # without it, scores are not written down
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                    [
                        checkpoint_managers.LatestN(n=2),
                        checkpoint_managers.BestN(get_metric_fn=_rank, n=1, keep_checkpoints_without_metrics=False),
                        checkpoint_managers.BestN(get_metric_fn=_sound, n=1, keep_checkpoints_without_metrics=False),
                    ]
                ),
                cleanup_tmp_directories=not self.readonly,
                # Else writers wait 20 minutes for a folder that could not be made, and the process with them.
                async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
                # Renamed first: what a kill leaves of one half deleted is not taken for a damaged one.
                todelete_subdir=None if self.readonly or "://" in str(self._directory) else GONE,
            ),
        )
        if not self.readonly:
            self._clear()

    def steps(self) -> list[int]:
        """Returns the steps that can be restored, in order."""
        return sorted(set(self._manager.all_steps()) - self._damaged)

    def newest(self) -> int | None:
        """Returns the newest step, or None where there is none."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Returns the step of the best finite validation score, the newest where none has one."""
        saved = {step: self.meta(step) for step in self.steps()}  # Orbax's own copy of the score has no seal
        scored = [step for step, metrics in saved.items() if _score(metrics) > -math.inf]
        return max(scored, key=lambda step: _rank(saved[step]), default=self.newest())

    def save(self, step: int, state: Any, meta: Mapping[str, Any], score: float | None) -> None:
        """Saves a step unless it is there already; writing goes on in the background, and `outcome` says how it ends.

        Args:
          step: steps taken.
          state: a pytree of NumPy arrays, which nobody changes while they are written.
          meta: JSON values: config, tokenizers, class names, schedule state.
          score: validation score, higher is better; None where this step was not validated.

        Raises:
          UserError: it fails at once (no space left, no permission), or the older ones are gone.
        """
        if step in (known := self.steps()):
            return
        if known and not self._directory.exists():
            self._manager.reload()  # it still knows them, and makes the folder anew
            raise UserError(f"{self._directory} is gone, and {len(known)} checkpoints with it")
        self._begun = step
        finite = score if score is not None and math.isfinite(score) else None
        described = {
            **meta,
            "step": step,
            "score": finite,
            "tree": checksums.describe(state),
            "sums": checksums.checksums(state),
        }
        sealed = checksums.sealed(json.loads(json.dumps(described)))  # tuples would come back as lists
        try:
            begun = self._manager.save(
                step,
                force=True,  # also where a newer one is there
                args=ocp.args.Composite(**{STATE: ocp.args.StandardSave(state), META: ocp.args.JsonSave(sealed)}),
                metrics=metrics_of(described),
            )
            if not begun:
                raise RuntimeError("it was not begun")
        except Exception as error:  # whatever the storage's library raises
            raise self._unsaved(error) from error

    def outcome(self, *, wait: bool = False) -> UserError | bool:
        """Returns, once, how the save that was begun last has ended: True, or its error; False: nothing is known anew.

        Args:
          wait: for one that goes on.
        """
        if self._begun is None or (not wait and self._manager.is_saving_in_progress()):
            return False
        step, self._begun = self._begun, None
        try:
            self._manager.wait_until_finished()
            if "://" not in str(self._directory):
                files.sync(self._directory / str(step))  # so that a power loss spares it once the next one is there
            self._clear()
        except Exception as error:
            return self._unsaved(error)
        return True

    def _clear(self) -> None:
        """Deletes what was let go."""
        if (self._directory / GONE).exists():
            (self._directory / GONE).rmtree(missing_ok=True)

    def _unsaved(self, error: Exception) -> UserError:
        """Returns what a write that failed means, and takes away what it left."""
        self._begun = None
        with contextlib.suppress(Exception):  # a save that failed may still write, and its next error is no later one's
            self._manager._checkpointer.wait_until_finished()  # the manager itself waits for whole saves alone
        with contextlib.suppress(OSError):  # where nothing can be written, nothing can be taken away
            for name in self._names():
                if TEMPORARY in name:
                    (self._directory / name).rmtree(missing_ok=True)
        with contextlib.suppress(OSError):
            self._manager.reload()  # it counts a step as saved that it began to save
        reason = getattr(error, "strerror", None) or str(error)
        # Arrays are written by a library of its own, which says much more.
        if found := re.search(r"([^:\[\]]+) \[(?:os_error_code|tensorstore_spec)=", reason):
            reason = found[1]
        reason = " ".join(reason.split())[:300]
        return UserError(f"cannot write a checkpoint under {self._directory}: {reason}; older ones are untouched")

    def meta(self, step: int) -> dict[str, Any]:
        """Returns what was saved beside the state of `step`; raises CorruptCheckpoint where it is not that."""
        return meta_of(self._directory / str(step))

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Returns the state of `step`, as host arrays shaped like `like`, and its meta.

        Raises:
          CorruptCheckpoint: it is not what was saved.
          UserError: the checkpoint is of another architecture, and the line shows where the trees differ; or it may not
            be read.
        """
        meta = self.meta(step)
        if differences := checksums.compare(checksums.describe(like), meta["tree"]):
            shown = "; ".join(differences[:5]) + (f"; and {len(differences) - 5} more" if differences[5:] else "")
            raise UserError(f"checkpoint {self._directory}/{step} is of another architecture: {shown}")
        template = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
        folder, args = self._directory / str(step), ocp.args.StandardRestore(template)
        with reading(folder):
            state = self._manager.restore(step, args=ocp.args.Composite(**{STATE: args}))[STATE]
        check_sums(folder, state, meta)
        return state, meta

    def restore_valid(self, like: Any, *, best: bool = False) -> tuple[Any, dict[str, Any]] | None:
        """Returns the newest state, or the best, that is not damaged, and its meta; None where there is none at all.

        Several hosts ask together, and all get the one that the first one finds.

        Raises:
          UserError: all are damaged, or as `restore` does.
        """
        first = jax.process_index() == 0
        found = self.first_valid(lambda step: self.restore(step, like), best=best) if first else None
        step = hosts.broadcast_from_primary(found[1]["step"] if found else -1)
        if first or step < 0:
            return found
        files.invalidate_listings(self._directory)
        return self.restore(step, like)

    def delete_from(self, step: int) -> None:
        """Deletes the checkpoints of a step and of all after it."""
        for later in [saved for saved in self.steps() if saved >= step]:
            self._manager.delete(later)
        self._emptied = not self.steps()
        self._clear()

    def first_valid(self, read: Callable[[int], T], *, best: bool = False) -> T | None:
        """Returns what `read(step)` gives of the newest checkpoint, or of the best, that is not damaged.

        Those before it are set aside, with a warning, in a folder beside the others'. None where there is none at all.

        Raises:
          UserError: all are damaged, or as `read` does.
        """
        while self.steps():
            try:
                return read(self.best() if best else self.newest())
            except CorruptCheckpoint as error:
                self._set_aside(error.step, str(error))
                self._manager.reload()
        if self._damaged or (not self._emptied and (self._directory.parent / ASIDE).exists()):
            aside = self._directory.parent / ASIDE
            raise UserError(
                f"no checkpoint under {self._directory} can be trusted (see {aside}): begin again in another directory"
            )
        return None

    def _names(self) -> list[str]:
        return [path.name for path in self._directory.iterdir()] if self._directory.exists() else []

    def _folders(self) -> list[str]:
        return [name for name in self._names() if name.isdigit()]

    def _set_aside(self, step: int, why: str) -> None:
        self._damaged.add(step)
        if self.readonly:
            print(f"warning: {why}; another one serves", file=sys.stderr)
            return
        aside = self._directory.parent / ASIDE
        try:
            aside.mkdir(parents=True, exist_ok=True)
            target = next(place for k in range(10**6) if not (place := aside / f"{step}-{k}").exists())
            print(f"warning: {why}; it goes to {target}, and another one serves", file=sys.stderr)
            files.move(self._directory / str(step), target)
        except OSError as error:
            raise UserError(f"{why}; and it cannot be moved away: {error}") from error
        self._damaged.remove(step)  # its number is free again

    def wait(self) -> None:
        """Returns when everything saved is on disk; raises UserError where it could not be written."""
        if isinstance(outcome := self.outcome(wait=True), UserError):
            raise outcome

    def close(self) -> None:
        """Waits and lets go of the directory; a save that fails is told, but stands in the way of no other error."""
        if isinstance(outcome := self.outcome(wait=True), UserError):
            print(f"warning: {outcome}", file=sys.stderr)
        self._manager.close()


def load_verified(folder: epath.PathLike) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """Returns the arrays of one checkpoint by path, and what was saved beside them; changes nothing.

    Raises:
      CorruptCheckpoint: it is not what was saved.
      UserError: it may not be read.
    """
    folder = _absolute(folder)
    meta = meta_of(folder)
    with reading(folder), ocp.StandardCheckpointer() as checkpointer:
        state = checkpointer.restore(folder / STATE)
    check_sums(folder, state, meta)
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): np.asarray(x) for path, x in leaves}, meta


def _asked_once(build: Callable[..., dict[str, Any]]) -> Callable[..., dict[str, Any]]:
    """Returns Orbax's builder of TensorStore specs, which then asks TensorStore once a folder instead of once an array.

    TensorStore 0.1.86, as all since 0.1.76, keeps some 200 bytes of each `KvStore.Spec.to_json` for ever, and Orbax
    0.12.8 calls it for each array of each save: a run that saves often would grow without end.
    """
    of_folder = functools.lru_cache(16)(build)

    @functools.wraps(build)
    def built(directory: str, name: str | None = None, *, use_ocdbt: bool = True, **options: Any) -> dict[str, Any]:
        if not use_ocdbt:
            return build(directory, name, use_ocdbt=False, **options)
        spec = copy.deepcopy(of_folder(directory, **options))  # its callers add to it
        return spec if name is None else {**spec, "path": name}

    return built


tensorstore_utils.build_kvstore_tspec = _asked_once(tensorstore_utils.build_kvstore_tspec)


def _absolute(folder: epath.PathLike) -> epath.Path:
    path = epath.Path(folder)
    return path if path.is_absolute() else path.absolute()  # gs://... is, but absolute() breaks it


def _score(metrics: Any) -> float:
    """A score to rank by: higher is better, and a missing or non-finite one is the worst."""
    score = (metrics or {}).get("score")
    return score if score is not None and math.isfinite(score) else -math.inf


def _sound(metrics: Mapping[str, Any]) -> int:
    return -1 if metrics.get("wrong") else metrics["step"]


def _rank(metrics: Mapping[str, Any]) -> tuple[float, int]:
    """The first of equal scores is the best one, whichever others are still there."""
    return _score(metrics), -metrics["step"]
