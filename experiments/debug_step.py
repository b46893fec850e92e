"""Repeats one training step of a run and shows its losses, gradients and non-finite inputs.

`python -m experiments.debug_step WORKDIR [--step=N] [--trust]`

The default is the first bad step of `wrong.json`, which a run writes when it stops because of divergence.
"""

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from absl import flags

from experiments import cli
from mmfusion.errors import UserError

if TYPE_CHECKING:
    from mmfusion.training.replay import Replayed

STEP = flags.DEFINE_integer(
    "step", 0, "the step to repeat, counted from 1 (default: the first bad step)", lower_bound=0
)
TRUST = flags.DEFINE_bool("trust", False, cli.TRUST_HELP, allow_override=True)
SHOWN = 5  # number of examples and parameters listed


def main(argv: Sequence[str]) -> None:
    directories = cli.parse(argv, positional=True)
    if len(directories) != 1:
        raise UserError("give the directory of a run: python -m experiments.debug_step WORKDIR")

    from mmfusion.training.replay import replay
    from mmfusion.training.restore import read_config, trust_run

    if TRUST.value:
        trust_run(directories[0])
    cli.prepare(read_config(directories[0]))
    print("\n".join(describe(replay(directories[0], STEP.value))))


def describe(update: "Replayed") -> list[str]:
    """Returns lines that describe a step."""
    numbers = update.numbers
    lines = [
        f"update {update.step}, from the state of step {update.since}",
        f"numbers    loss {numbers['loss']:.6g}  gradient norm {numbers['grad_norm']:.6g}  learning rate "
        f"{numbers['learning_rate']:.3g}" + "  skipped" * bool(numbers["skipped"]),
    ]
    if "loss" in update.recorded:
        then = {name: update.recorded[name] for name in ("loss", "grad_norm", "learning_rate")}
        now = {name: numbers[name] if math.isfinite(numbers[name]) else None for name in then}
        same = "the same" if then == now else f"not the same: loss {then['loss']}, gradient norm {then['grad_norm']}"
        lines.append(f"recorded   {same}; {update.recorded['wrong']}")
    elif update.recorded:
        lines.append(f"recorded   wrong {update.recorded['wrong']}")
    wrong = [name for name, x in update.gradients.items() if not math.isfinite(x)]
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" * (len(wrong) > SHOWN)
        lines.append(
            f"gradients  not finite: {len(wrong)} of {len(update.gradients)}: {', '.join(wrong[:SHOWN])}{more}"
        )
    else:
        largest = sorted(update.gradients.items(), key=lambda item: -item[1])[:SHOWN]
        lines.append("gradients  largest: " + ", ".join(f"{name} {x:.3g}" for name, x in largest))
    rows = sorted(update.losses.items(), key=lambda item: -item[1] if math.isfinite(item[1]) else -math.inf)
    lines.append("examples   by loss: " + ", ".join(f"{i} {x:.3g}" for i, x in rows[:SHOWN]))
    lines += [f"inputs     {m} not finite: {', '.join(map(str, ids))}" for m, ids in update.inputs.items()]
    return lines


if __name__ == "__main__":
    cli.run(main)
