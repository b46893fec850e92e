"""Orbax's checkpoint manager with the options of a run: which checkpoints are kept, and which one is best."""

import math
from collections.abc import Mapping
from typing import Any

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint import checkpoint_managers

DELETED = "deleted"  # subfolder that old checkpoints are moved to before their files are deleted


class Manager(ocp.CheckpointManager):
    """Orbax's manager without its check for preemption, which all hosts have to do together: the loop does it."""

    def reached_preemption(self, step: int) -> bool:
        return False

    def metrics(self, step: int) -> Any:
        """Returns None where readonly: a damaged file of a step that is skipped must not end a reader."""
        return None if self._options.read_only else super().metrics(step)


def open_manager(directory: epath.Path, readonly: bool) -> Manager:
    """Returns a manager that keeps the newest two, the best one, and the newest one before a series of bad steps.

    Each host has a manager of its own, so that none waits for another.
    """
    host = jax.process_index()
    kept = [
        checkpoint_managers.LatestN(n=2),
        # Any comparable value works as the metric.
        checkpoint_managers.BestN(get_metric_fn=rank, n=1, keep_checkpoints_without_metrics=False),  # pyright: ignore[reportArgumentType]
        checkpoint_managers.BestN(get_metric_fn=_last_good, n=1, keep_checkpoints_without_metrics=False),
    ]
    return Manager(
        directory,
        options=ocp.CheckpointManagerOptions(
            read_only=readonly,
            create=False,
            multiprocessing_options=ocp.options.MultiprocessingOptions(
                primary_host=host, active_processes={host}, barrier_sync_key_prefix=f"host{host}"
            ),
            best_fn=score_or_worst,  # without it, metrics are not written
            preservation_policy=checkpoint_managers.AnyPreservationPolicy(kept),
            cleanup_tmp_directories=not readonly,
            # Otherwise writers wait 20 minutes for a folder that could not be created, and the process with them.
            async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
            # Moved before they are deleted: one that a kill leaves half deleted is not taken for a corrupt one.
            todelete_subdir=None if readonly or "://" in str(directory) else DELETED,
        ),
    )


def score_or_worst(metrics: Any) -> float:
    """Returns a score to rank by: a missing or non-finite one is the worst."""
    score = (metrics or {}).get("score")
    return score if score is not None and math.isfinite(score) else -math.inf


def _last_good(metrics: Mapping[str, Any]) -> int:
    return -1 if metrics.get("wrong") else metrics["step"]


def rank(metrics: Mapping[str, Any]) -> tuple[float, int]:
    """Ranks by score, and equal scores by step, the earliest best: independent of which others still exist."""
    return score_or_worst(metrics), -metrics["step"]
