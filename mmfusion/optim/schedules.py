"""Learning rates, evaluated on the host: the rate is an argument of the step, so it never recompiles."""

import math
from collections.abc import Mapping

from mmfusion.errors import UserError
from mmfusion.optim.optimizers import lookup


def learning_rate(config: Mapping, peak: float, step: int, total_steps: int, scale: float = 1.0) -> float:
    """Returns the learning rate of update `step` (0-based), a Python float for the step's argument.

    Args:
      config: `name` and every key of `schedule_options(name)`.
      peak: the rate after warmup.
      step: updates done so far.
      total_steps: updates of the whole run.
      scale: the plateau state's `scale`.

    Raises:
      UserError: if the name is unknown or an option is missing.
    """
    name = config["name"]
    missing = [key for key in schedule_options(name) if key not in config]
    if missing:
        message = f"is missing; {name!r} reads {', '.join(schedule_options(name))}"
        raise UserError(message, path=f"config.optim.schedule.{missing[0]}")
    return float(peak * scale * SCHEDULES[name][0](config, step, total_steps))


def schedule_options(name: str) -> dict:
    """Returns the default options of a schedule, by name; raises UserError if the name is unknown."""
    return dict(lookup(SCHEDULES, name, "config.optim.schedule.name")[1])


def _warmup(config, step, total_steps):
    # The first update already learns, and the one before the warmup's end has the peak rate.
    return min(1.0, (step + 1) / config["warmup_steps"]) if config["warmup_steps"] else 1.0


def _warmup_cosine(config, step, total_steps):
    start, end = config["warmup_steps"], config["end_factor"]
    progress = min(max((step - start) / max(total_steps - start, 1), 0.0), 1.0)
    return _warmup(config, step, total_steps) * (end + (1 - end) * 0.5 * (1 + math.cos(math.pi * progress)))


def _step(config, step, total_steps):
    passed = sum(step >= (b * total_steps if b < 1 else b) for b in config["boundaries"])
    return config["factor"] ** passed


# warmup_steps in updates, rising linearly from peak/warmup_steps; end_factor of the peak at total_steps; boundaries
# below 1 are shares of the run, from 1 on updates, and each multiplies the rate by factor; plateau: see plateau_update.
SCHEDULES = {
    "warmup_cosine": (_warmup_cosine, {"warmup_steps": 0, "end_factor": 0.0}),
    "constant": (_warmup, {"warmup_steps": 0}),
    "step": (_step, {"boundaries": (0.5, 0.75), "factor": 0.1}),
    "plateau": (_warmup, {"warmup_steps": 0, "factor": 0.5, "patience": 5, "min_delta": 0.0, "min_scale": 0.0}),
}


def plateau_start() -> dict:
    """Returns the plateau state before any evaluation: plain numbers that a checkpoint's JSON can hold."""
    return {"scale": 1.0, "best": None, "waited": 0}


def plateau_update(state: Mapping, value: float | None, config: Mapping, higher_is_better: bool = False) -> dict:
    """Returns the plateau state after an evaluation; `scale` multiplies the learning rate from then on.

    Args:
      state: what the last call returned, or `plateau_start()`.
      value: the watched score; None or a non-finite value is no improvement.
      config: after `patience` evaluations in a row none of which beats the best by more than `min_delta`, `scale`
        is multiplied by `factor`, down to `min_scale`.
      higher_is_better: the score's direction.
    """
    sign = 1 if higher_is_better else -1
    if (
        value is not None
        and math.isfinite(value)
        and (state["best"] is None or sign * (value - state["best"]) > config["min_delta"])
    ):
        return {"scale": state["scale"], "best": float(value), "waited": 0}
    if state["waited"] + 1 < config["patience"]:
        return {**state, "waited": state["waited"] + 1}
    return {**state, "scale": max(state["scale"] * config["factor"], config["min_scale"]), "waited": 0}
