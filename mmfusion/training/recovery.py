"""Bad steps: which steps count as bad, and what happens after too many in a row."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from mmfusion.config import RunConfig
from mmfusion.data import pipeline
from mmfusion.data.dataset import Dataset
from mmfusion.data.split import Split
from mmfusion.files import write_json
from mmfusion.tracking.run_dir import RunDir

NOT_FINITE, SPIKE = "not finite", "a spike"
UNKNOWN = "before the run was resumed"  # which of the two it was is no longer known
FILE = "wrong.json"


@dataclasses.dataclass
class TooManyBadSteps(Exception):
    """Too many steps in a row were bad.

    Attributes:
      steps: those in a row that this process saw, oldest first, as JSON values.
      first: number of the first of them, counted from 1.
      rollbacks: how often the run had rolled back before.
      counts: see `no_bad_steps`.
    """

    steps: Sequence[Mapping[str, Any]]
    first: int
    rollbacks: int
    counts: Mapping[str, Any]


def no_bad_steps() -> dict[str, int]:
    """Returns the counts before the first step, JSON values.

    `skipped` and `spikes` count steps of the whole run, `consecutive` the bad steps in a row up to now; `first` is the
    number of the first of these.
    """
    return {"skipped": 0, "spikes": 0, "consecutive": 0, "first": 0}


def count_step(counts: Mapping[str, int], step: int, reason: str) -> dict[str, int]:
    """Returns the counts after one more step.

    Args:
      counts: before it.
      step: its number, counted from 1.
      reason: why it is bad, `NOT_FINITE` or `SPIKE`; "" where it is good.
    """
    return {
        "skipped": counts["skipped"] + (reason == NOT_FINITE),
        "spikes": counts["spikes"] + (reason == SPIKE),
        "consecutive": counts["consecutive"] + 1 if reason else 0,
        "first": (counts["first"] if counts["consecutive"] else step) if reason else 0,
    }


def summary(error: TooManyBadSteps) -> str:
    """Returns what was bad, as the start of a sentence."""
    reasons = {step["wrong"] for step in error.steps}
    if reasons == {SPIKE}:
        problem = "the loss was far above those before"
    elif reasons == {SPIKE, NOT_FINITE}:
        problem = "the loss or its gradient was not finite, or far above those before,"
    else:
        problem = "the loss or its gradient was not finite"
    last = error.steps[-1]["step"]
    return f"{problem} in the {last - error.first + 1} updates up to step {last}"


def check_may_roll_back(error: TooManyBadSteps, directory: RunDir, config: RunConfig, dataset: Dataset) -> None:
    """Raises FloatingPointError unless the run may roll back once more; the bad steps are then in `wrong.json`."""
    if error.rollbacks >= config.recovery.rollbacks:
        raise FloatingPointError(report(error, directory, config, dataset.splits["train"])) from error


def report(error: TooManyBadSteps, directory: RunDir, config: RunConfig, train: Split) -> str:
    """Writes the bad steps with the examples of each to `wrong.json` in the run's directory; returns an error line."""
    earlier = [{"step": step, "wrong": UNKNOWN} for step in range(error.first, error.steps[0]["step"])]
    updates = []
    for update in (*earlier, *error.steps):
        positions = pipeline.batch_positions(train, config.seed, update["step"] - 1, config.batch_size)
        updates.append({**update, "ids": train.take(positions).id.tolist()})
    if jax.process_index() == 0:
        write_json(directory.folder / FILE, {"first": error.first, "rollbacks": error.rollbacks, "updates": updates})
    again = f", rolled back {error.rollbacks} times before" if error.rollbacks else ""
    return (
        f"{summary(error)}{again}: allow a roll-back (config.recovery.rollbacks), or lower config.optim.learning_rate "
        f"in another directory. The checkpoints hold the last good state; {directory.name}/{FILE} lists the examples, "
        f"and `python -m experiments.debug_step {directory.name}` repeats the first of these updates"
    )
