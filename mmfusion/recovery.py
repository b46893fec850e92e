"""Numbers that go wrong: which updates count as wrong, and what is told of them where they are too many in a row."""

import dataclasses
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from mmfusion.bucket import Place
from mmfusion.logger import write_json

NOT_FINITE, SPIKE = "not finite", "a spike"
WINDOW, ENOUGH = 100, 20  # losses that a spike is judged by, at most and at least
DEVIATION = 1.4826  # a normal distribution's standard deviation in median absolute deviations
FILE = "wrong.json"


@dataclasses.dataclass
class WentWrong(Exception):
    """Too many updates in a row were wrong.

    Attributes:
      updates: those in a row that this process saw, oldest first: JSON values of each.
      first: the number of the first of them, counted from 1.
      rollbacks: how often the run had gone back before.
    """

    updates: Sequence[Mapping[str, Any]]
    first: int
    rollbacks: int


def unwatched() -> dict[str, Any]:
    """Returns what is known before the first update, JSON values.

    `skipped` and `spikes` count updates of the whole run; `row` is how many in a row were wrong up to now and `first`
    the first of these; `losses` are the newest that were not wrong.
    """
    return {"skipped": 0, "spikes": 0, "row": 0, "first": 0, "losses": []}


def watch(
    known: Mapping[str, Any], step: int, loss: float, skipped: bool, threshold: float
) -> tuple[dict[str, Any], str]:
    """Returns what is known after one more update, and what is wrong with that one ("": nothing).

    Args:
      known: what was known before it.
      step: its number, counted from 1.
      loss: before it.
      skipped: whether its loss or its gradient was not finite, so that it changed nothing.
      threshold: a loss is a spike that lies so many robust standard deviations above the median of the newest ones;
        0: none is.
    """
    losses, wrong = known["losses"], NOT_FINITE if skipped else ""
    if threshold and not skipped:
        if len(losses) >= ENOUGH:
            middle = statistics.median(losses)
            spread = DEVIATION * statistics.median(abs(x - middle) for x in losses)
            # losses that hardly differ shall not make a spike of the next one
            if loss > middle + threshold * max(spread, 1e-3 * abs(middle)):
                wrong = SPIKE
        if not wrong:
            losses = [*losses[1 - WINDOW :], loss]
    return {
        "skipped": known["skipped"] + (wrong == NOT_FINITE),
        "spikes": known["spikes"] + (wrong == SPIKE),
        "row": known["row"] + 1 if wrong else 0,
        "first": (known["first"] if known["row"] else step) if wrong else 0,
        "losses": losses,
    }, wrong


def said(error: WentWrong) -> str:
    """Returns what went wrong, in words."""
    kinds = {update["wrong"] for update in error.updates}
    what = "the loss was far above those before" if kinds == {SPIKE} else "the loss or its gradient was not finite"
    if kinds == {SPIKE, NOT_FINITE}:
        what += ", or far above those before,"
    last = error.updates[-1]["step"]
    return f"{what} in the {last - error.first + 1} updates up to step {last}"


def report(error: WentWrong, place: Place, primary: bool) -> str:
    """Writes what went wrong to `wrong.json` in the run's directory, and returns the line that says so."""
    if primary:
        write_json(
            place.folder / FILE, {"first": error.first, "rollbacks": error.rollbacks, "updates": list(error.updates)}
        )
    again = f", gone back {error.rollbacks} times before" * (error.rollbacks > 0)
    return (
        f"{said(error)}{again}: lower config.optim.learning_rate, or let it go back (config.recovery.rollbacks). The "
        f"checkpoints hold the last good state; {place.name}/{FILE} names the examples, and `python -m "
        f"experiments.replay {place.name}` takes the first of these updates again"
    )
