"""The known-answer gate: `python -m experiments.known_answer [--fusions=all|a,b] [--output=FILE.md]`

Trains every strategy on tasks whose best rate is known, and exits 1 where one misses what it declares.
"""

import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from experiments import cli
from experiments.fusions import chosen

OUTPUT = flags.DEFINE_string("output", "", "a Markdown file to write")
MODALITIES = (2, 3)


def main(argv: Sequence[str]) -> None:
    cli.parse(argv)
    names = chosen(flags.FLAGS.fusions)
    cli.settle_compilation_cache()

    import jax
    import numpy as np
    from rich.console import Console
    from rich.table import Table

    from mmfusion.analysis import gate, known_answer
    from mmfusion.models.fusion import FUSIONS

    console, began = Console(), time.monotonic()
    rows, wrong = [], []
    for name in names:
        scores, bad = [], set()
        for modalities in MODALITIES:
            results, still = gate.learn(FUSIONS[name], modalities)
            wrong += [f"{name}: {one}" for one in gate.failures(FUSIONS[name], modalities, results, still)]
            bad |= {len(scores) + i for i, result in enumerate(results.values()) if result.failure}
            scores += [f"{result.score:.3f}" for result in results.values()]
        rows.append((name, scores, bad))
        marked = [f"[red]{score}[/red]" if i in bad else score for i, score in enumerate(scores)]
        console.print(f"{name:20}", " ".join(marked), highlight=False)
    seconds = time.monotonic() - began

    heads = [f"{cell.task}{' padded' * cell.padded}{' absent' * bool(cell.absent)} M={modalities}"
             for modalities in MODALITIES for cell in gate.CELLS]  # fmt: skip

    def floor(visible: tuple[int, ...] | None) -> list[str]:
        tables = [(known_answer.joint(cell.task, m, gate.DIAL), cell) for m in MODALITIES for cell in gate.CELLS]
        return [f"{known_answer.bayes_rate(table, cell.absent, visible):.3f}" for table, cell in tables]

    floors = {"majority": floor(()), "a alone": floor((0,)), "b alone": floor((1,)), "best possible": floor(None)}
    table = Table("", *heads)
    for name, scores, bad in rows:
        table.add_row(name, *(f"[red]{score}[/red]" if i in bad else score for i, score in enumerate(scores)))
    table.add_section()
    for name, scores in floors.items():
        table.add_row(name, *scores)
    Console(width=None if console.is_terminal else 210).print(table)
    for one in wrong:
        console.print(f"[red]{one}[/red]", highlight=False)
    console.print(f"{len(names)} strategies in {seconds:.0f} s, {len(wrong)} failures")
    if OUTPUT.value:
        lines = [
            f"`python -m experiments.known_answer --fusions={flags.FLAGS.fusions}`: {seconds:.0f} s on "
            f"{jax.devices()[0].device_kind} ({platform.machine()}), jax {jax.__version__}, numpy {np.__version__}.",
            "", "| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|",
            *(f"| {name} | " + " | ".join(scores) + " |" for name, scores, _ in rows),
            *(f"| *{name}* | " + " | ".join(scores) + " |" for name, scores in floors.items()),
            "", *([f"- {one}" for one in wrong] or ["Every strategy is what it declares."]),
        ]  # fmt: skip
        Path(OUTPUT.value).write_text("\n".join(lines) + "\n")
    if wrong:
        sys.exit(1)


if __name__ == "__main__":
    cli.run(main)
