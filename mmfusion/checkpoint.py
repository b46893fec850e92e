"""Checkpoints: state, position, config, tokenizers and class names together. The only file that imports Orbax."""

import json
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

from mmfusion.errors import UserError

STATE, META = "state", "meta"


class Checkpoints:
    """The checkpoints of one run: the newest two and the best one are kept.

    Two newest, since the last one may be half-written when the machine dies.
    """

    def __init__(self, directory: str | epath.Path):
        path = epath.Path(directory)
        self._directory = path if path.is_absolute() else path.absolute()  # gs://... is, but absolute() breaks it
        self._manager = ocp.CheckpointManager(
            self._directory,
            options=ocp.CheckpointManagerOptions(
                best_fn=_score,  # without it, scores are not written down
                preservation_policy=checkpoint_managers.AnyPreservationPolicy(
                    [
                        checkpoint_managers.LatestN(n=2),
                        checkpoint_managers.BestN(get_metric_fn=_rank, n=1, keep_checkpoints_without_metrics=False),
                    ]
                ),
                cleanup_tmp_directories=True,
            ),
        )

    def steps(self) -> list[int]:
        """Returns the steps that can be restored, in order."""
        return sorted(self._manager.all_steps())

    def newest(self) -> int | None:
        """Returns the newest step, or None where there is none."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """Returns the step of the best finite validation score, the newest where none has one."""
        saved = {step: metrics for step in self.steps() if (metrics := self._manager.metrics(step))}
        scored = [step for step, metrics in saved.items() if _score(metrics) > -math.inf]
        return max(scored, key=lambda step: _rank(saved[step]), default=self.newest())

    def save(self, step: int, state: Any, meta: Mapping[str, Any], score: float | None) -> None:
        """Saves a step unless it is there already; writing goes on in the background.

        Args:
          step: steps taken.
          state: a pytree of arrays, the same on every device.
          meta: JSON values: config, tokenizers, class names, schedule state.
          score: validation score, higher is better; None where this step was not validated.

        Raises:
          UserError: an earlier save failed (no space left, no permission); the older checkpoints are untouched.
        """
        if step in self.steps():
            return
        # Copied, because the next step donates these buffers while the writer still reads them.
        host = jax.tree.map(np.array, state)
        described = {**meta, "step": step, "tree": describe(host)}
        try:
            self._manager.save(
                step,
                args=ocp.args.Composite(**{STATE: ocp.args.StandardSave(host), META: ocp.args.JsonSave(described)}),
                metrics={"score": None if score is None or not math.isfinite(score) else score, "step": step},
            )
        except (OSError, ValueError) as error:
            raise _unsaved(self._directory, error) from error

    def meta(self, step: int) -> dict[str, Any]:
        """Returns what was saved beside the state of `step`."""
        return self._manager.restore(step, args=ocp.args.Composite(**{META: ocp.args.JsonRestore()}))[META]

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Returns the state of `step`, as host arrays shaped like `like`, and its meta.

        Raises:
          UserError: the checkpoint is of another architecture; the line shows where the trees differ.
        """
        meta = self.meta(step)
        if differences := compare(describe(like), meta["tree"]):
            shown = "; ".join(differences[:5]) + (f"; and {len(differences) - 5} more" if differences[5:] else "")
            raise UserError(f"checkpoint {self._directory}/{step} is of another architecture: {shown}")
        template = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), like)
        args = ocp.args.Composite(**{STATE: ocp.args.StandardRestore(template)})
        return self._manager.restore(step, args=args)[STATE], meta

    def wait(self) -> None:
        """Returns when everything saved is on disk; raises UserError where it could not be written."""
        try:
            self._manager.wait_until_finished()
        except (OSError, ValueError) as error:
            raise _unsaved(self._directory, error) from error

    def close(self) -> None:
        """Waits and lets go of the directory."""
        self.wait()
        self._manager.close()


def describe(tree: Any) -> dict[str, list[Any]]:
    """Returns `{path: [shape, dtype]}` of a pytree of arrays."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/"): [list(x.shape), str(x.dtype)] for path, x in leaves}


def compare(wanted: Mapping[str, Any], saved: Mapping[str, Any]) -> list[str]:
    """Returns a line for each leaf in which two descriptions differ, the model's parameters first."""
    lines = []
    for path in sorted({*wanted, *saved}, key=lambda p: (not p.startswith("params"), p)):
        if path not in saved:
            lines.append(f"{path} {wanted[path][0]} is in the model, not in the checkpoint")
        elif path not in wanted:
            lines.append(f"{path} {saved[path][0]} is in the checkpoint, not in the model")
        elif list(wanted[path]) != list(saved[path]):
            (shape, dtype), (saved_shape, saved_dtype) = wanted[path], saved[path]
            lines.append(f"{path} is {shape} {dtype} in the model, {saved_shape} {saved_dtype} in the checkpoint")
    return lines


def canonical(config: Mapping[str, Any]) -> Any:
    """Returns a config as JSON values, so that a saved one and a live one compare equal."""
    return json.loads(json.dumps(config, sort_keys=True))


def _score(metrics: Any) -> float:
    """A score to rank by: higher is better, and a missing or non-finite one is the worst."""
    score = (metrics or {}).get("score")
    return score if score is not None and math.isfinite(score) else -math.inf


def _rank(metrics: Mapping[str, Any]) -> tuple[float, int]:
    """The first of equal scores is the best one, whichever others are still there."""
    return _score(metrics), -metrics["step"]


def _unsaved(directory: epath.Path, error: OSError | ValueError) -> Exception:
    """Returns the error of a write that failed; arrays are written by a library that has only ValueError for it."""
    reason = getattr(error, "strerror", None) or str(error)
    if not isinstance(error, OSError):
        found = re.search(r"([^:\[\]]+) \[os_error_code=", reason)
        if found is None:
            return error
        reason = found[1].strip()
    return UserError(f"cannot write a checkpoint under {directory}: {reason}; older ones are untouched")
