"""Numbers that go wrong: which updates count as wrong, and what is told of them where they are too many in a row."""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import jax
from ml_collections import ConfigDict

from mmfusion.data import pipeline
from mmfusion.data.dataset import Split
from mmfusion.files import write_json
from mmfusion.tracking.run_dir import RunDir

NOT_FINITE, SPIKE = "not finite", "a spike"
EARLIER = "before the run was continued"  # which of the two is not known any more
FILE = "wrong.json"


@dataclasses.dataclass
class WentWrong(Exception):
    """Too many updates in a row were wrong.

    Attributes:
      updates: those in a row that this process saw, oldest first: JSON values of each.
      first: the number of the first of them, counted from 1.
      rollbacks: how often the run had gone back before.
      watched: what is known after them, see `unwatched`.
    """

    updates: Sequence[Mapping[str, Any]]
    first: int
    rollbacks: int
    watched: Mapping[str, Any]


def unwatched() -> dict[str, Any]:
    """Returns what is known before the first update, JSON values.

    `skipped` and `spikes` count updates of the whole run; `row` is how many in a row were wrong up to now and `first`
    the first of these.
    """
    return {"skipped": 0, "spikes": 0, "row": 0, "first": 0}


def watch(known: Mapping[str, Any], step: int, wrong: str) -> dict[str, Any]:
    """Returns what is known after one more update.

    Args:
      known: what was known before it.
      step: its number, counted from 1.
      wrong: what is, of `NOT_FINITE` and `SPIKE`, or "": nothing.
    """
    return {
        "skipped": known["skipped"] + (wrong == NOT_FINITE),
        "spikes": known["spikes"] + (wrong == SPIKE),
        "row": known["row"] + 1 if wrong else 0,
        "first": (known["first"] if known["row"] else step) if wrong else 0,
    }


def said(error: WentWrong) -> str:
    """Returns what went wrong, in words."""
    kinds = {update["wrong"] for update in error.updates}
    what = "the loss was far above those before" if kinds == {SPIKE} else "the loss or its gradient was not finite"
    if kinds == {SPIKE, NOT_FINITE}:
        what += ", or far above those before,"
    last = error.updates[-1]["step"]
    return f"{what} in the {last - error.first + 1} updates up to step {last}"


def report(error: WentWrong, directory: RunDir, config: ConfigDict, train: Split) -> str:
    """Writes what went wrong, and each update's examples, to `wrong.json` in the run's directory; returns the line."""
    earlier = [{"step": step, "wrong": EARLIER} for step in range(error.first, error.updates[0]["step"])]
    updates = []
    for update in (*earlier, *error.updates):
        positions = pipeline.train_positions(
            config.seed, update["step"] - 1, size=len(train), batch_size=config.batch_size
        )
        updates.append({**update, "ids": train.take(positions).id.tolist()})
    if jax.process_index() == 0:
        write_json(directory.folder / FILE, {"first": error.first, "rollbacks": error.rollbacks, "updates": updates})
    again = f", gone back {error.rollbacks} times before" * (error.rollbacks > 0)
    return (
        f"{said(error)}{again}: let it go back (config.recovery.rollbacks), or lower config.optim.learning_rate in "
        f"another directory. The checkpoints hold the last good state; {directory.name}/{FILE} names the examples, and "
        f"`python -m experiments.debug_step {directory.name}` takes the first of these updates again"
    )
