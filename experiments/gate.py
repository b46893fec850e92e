"""The known-answer gate: trains each strategy on tasks with known best accuracy and checks its declaration.

`python -m experiments.gate [--fusions=all|a,b] [--output=FILE.md] [--jobs=N]`. Exit status 1 if a strategy fails.
"""

import concurrent.futures
import multiprocessing
import os
import platform
import shlex
import sys
import time
from collections.abc import Iterator, Sequence

from absl import flags

from experiments import cli

FUSIONS = flags.DEFINE_string("fusions", "all", "comma-separated names or package.module:Class, or all")
OUTPUT = flags.DEFINE_string("output", "", "a Markdown file to write the table to")
JOBS = flags.DEFINE_integer(
    "jobs", 1, "number of processes, each of which checks one strategy at a time", lower_bound=1
)

MODALITIES = (1, 2, 3)
VARIANTS = {
    "moe, top 1": ("moe", {"gate": "top1"}),
    "film, 3×3": ("film", {"kernel": 3}),
}  # additional rows, if their strategy is selected
NAME, CELL = 20, 14  # widths of columns
HOW = (
    "Accuracy in percent on fresh examples: plain, with padded sequences (shown with two modalities only), with these "
    "and each modality absent in a quarter of the examples. A prediction within 0.1 of one half counts as half right."
)


def main(argv: Sequence[str]) -> None:
    cli.parse(argv)
    output = cli.output_file(OUTPUT.value)

    from mmfusion.models.fusion import fusion_classes

    names = list(fusion_classes(FUSIONS.value))
    names += [row for row, (strategy, _) in VARIANTS.items() if strategy in names]
    cli.enable_compilation_cache()

    from rich.console import Console
    from rich.text import Text

    from mmfusion.analysis.gate.gate import Size

    start = time.perf_counter()
    console = Console(highlight=False, soft_wrap=True, markup=False, emoji=False)
    heads = header()
    console.print(HOW)
    console.print(Text(line(heads), style="bold"))
    reports = {}
    for name, report in checked(names, JOBS.value):
        reports[name] = report
        text = Text(f"{name:<{NAME}}")
        for shown, wrong in row(report):
            text.append(f"{shown:<{CELL}}", style="red" if wrong else "")
        console.print(text)
    for cells in reference_rows(Size()):
        console.print(Text(line(cells), style="bold" if cells[0] == "Bayes rate" else "dim"))

    reasons = [f"{name}: {failure}" for name in names for failure in reports[name].failures]
    for reason in reasons:
        console.print(Text(reason, style="red"))
    seconds = time.perf_counter() - start
    verdict = f"{sum(not r.failures for r in reports.values())} of {len(names)} strategies hold what they declare"
    console.print(f"{verdict} ({seconds:.0f} s)")
    if output:
        output.write_text(markdown(names, reports, reasons, verdict, seconds, argv))
    if reasons:
        sys.exit(1)


def checked(names: Sequence[str], jobs: int) -> Iterator[tuple]:
    """Yields each strategy's name and report in order of completion."""
    if jobs == 1:
        yield from ((name, check(name)) for name in names)
        return
    # JAX does not support fork; spawned workers share the compilation cache.
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(jobs, spawn, initializer=cli.enable_compilation_cache) as pool:
        running = {pool.submit(check, name): name for name in names}
        for done in concurrent.futures.as_completed(running):
            yield running[done], done.result()


def check(name: str):
    """Returns the gate's report of a row: a strategy with its default options, or one of VARIANTS."""
    from mmfusion.analysis.gate import gate
    from mmfusion.models.fusion import FUSIONS
    from mmfusion.registry import lookup

    strategy, options = VARIANTS.get(name, (name, {}))
    try:
        return gate.check(lookup(FUSIONS, strategy, "--fusions"), options, modalities=MODALITIES)
    except Exception as error:  # a broken strategy must not stop the others
        return gate.Report((), (f"{type(error).__name__}: {' '.join(str(error).split())}",), 0.0)


def columns() -> list[tuple[int, str]]:
    """Returns the number of modalities and the task of each column."""
    from mmfusion.analysis.gate.synthetic_tasks import tasks

    return [(modalities, task) for modalities in MODALITIES for task in tasks(modalities)]


def header() -> list[str]:
    """Returns the column titles."""
    return ["strategy", *(f"M={modalities} {task}" for modalities, task in columns()), "otherwise", "seconds"]


def row(report) -> list[tuple[str, bool]]:
    """Returns the cells of a strategy's row without its name, each with whether it failed."""
    cells = []
    for column in columns():
        results = [cell for cell in report.cells if (cell.modalities, cell.task) == column]
        text = percent([cell.score for cell in results]) if results else "refused"
        cells.append((text, any(cell.failure for cell in results)))
    others = len(report.failures) - sum(bool(cell.failure) for cell in report.cells)
    return [*cells, (f"{others} wrong" if others else "holds", others > 0), (f"{report.seconds:.0f}", False)]


def reference_rows(size) -> list[list[str]]:
    """Returns the rows of exact rates: those of one modality alone, the majority rate, and the Bayes rate."""
    from mmfusion.analysis.gate.gate import variants
    from mmfusion.analysis.gate.synthetic_tasks import bayes_rate

    result = []
    for name, visible in (("A alone", ["a"]), ("B alone", ["b"]), ("majority", []), ("Bayes rate", None)):
        rates = [
            percent(
                [
                    bayes_rate(task, modalities, size.dial, size.absent if variant == "absent" else 0.0, visible)
                    for variant in variants(size, modalities)
                ]
            )
            for modalities, task in columns()
        ]
        result.append([name, *rates, "", ""])
    return result


def percent(rates: Sequence[float]) -> str:
    """Returns rates as integer percentages, separated by spaces."""
    return " ".join(f"{100 * rate:.0f}" for rate in rates)


def line(cells: Sequence[str]) -> str:
    """Returns cells padded to the column widths."""
    return f"{cells[0]:<{NAME}}" + "".join(f"{cell:<{CELL}}" for cell in cells[1:])


def markdown(names, reports, reasons: list[str], verdict: str, seconds: float, argv: Sequence[str]) -> str:
    """Returns the table as Markdown with its command, versions and machine."""
    import flax
    import jax

    heads = header()
    rows = [[name, *(f"**{s}**" if wrong else s for s, wrong in row(reports[name]))] for name in names]
    from mmfusion.analysis.gate.gate import Size

    rows += reference_rows(Size())
    table = "\n".join(f"| {' | '.join(cells)} |" for cells in (heads, ["---"] * len(heads), *rows))
    _, rest = cli.take_flag(list(argv), "output")
    command = shlex.join(["python", "-m", "experiments.gate", *rest[1:]])
    made = (
        f"`{command}`: {seconds:.0f} s; jax {jax.__version__}, flax {flax.__version__}, "
        f"Python {platform.python_version()}, {jax.devices()[0].device_kind}, {os.cpu_count()} cores"
    )
    wrong = "\n".join(f"- {reason}" for reason in reasons)
    return "\n\n".join(filter(None, ["# The known-answer gate", made, HOW, table, verdict, wrong])) + "\n"


if __name__ == "__main__":
    cli.run(main)
