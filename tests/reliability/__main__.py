"""Injects the faults of real machines into runs, and writes a table of what the runs survived.

`python -m tests.reliability [NAME ...] [--share=0.05] [--output=FILE.md] [--config.data.dir=DIR]`

Exit status 1 if a fault was not survived. A share below 1 injects each fault less often. A file that the same machine
has written keeps its lines of the other faults.
"""

import contextlib
import io
import math
import os
import platform
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from absl import flags

from experiments import cli
from mmfusion.errors import UserError
from tests.processes import ROOT

SHARE = flags.DEFINE_float(
    "share", 1.0, "share of the number of times that each fault is injected", lower_bound=0.0, upper_bound=1.0
)
OUTPUT = flags.DEFINE_string("output", "", "a Markdown file to write")
SHOWN = 5  # failures


class Fault(NamedTuple):
    """A fault: its function, how often it is injected, and texts for the table."""

    inject: Callable[[int, Path, Sequence[str]], Iterator[tuple[bool, str]]]
    times: int
    description: str
    expected: str


def fault_table() -> dict[str, Fault]:
    """Returns all faults by name."""
    from tests.reliability import faults, fuzz

    return {
        "kills": Fault(
            faults.kills, 200, "kill -9 or SIGTERM at a random moment, five configs", "the same run to the bit"
        ),
        "bit_flips": Fault(faults.bit_flips, 100, "a bit flipped in a checkpoint", "what was saved, or an older one"),
        "failing_writes": Fault(
            faults.failing_writes, 10**6, "each write call fails once", "an error in one line, or none; the same run"
        ),
        "fuzzed_configs": Fault(fuzz.fuzzed_configs, 1000, "a config made at random", "taken, or refused in a line"),
        "fuzzed_archives": Fault(fuzz.fuzzed_archives, 1000, "an archive damaged or hostile", "as it was, or refused"),
        "nan_planted": Fault(faults.nan_planted, 20, "NaN in an update", "skipped and counted"),
        "killed_hosts": Fault(faults.killed_hosts, 20, "one of two hosts killed", "the other ends; the same run"),
        "killed_ablations": Fault(
            faults.killed_ablations, 5, "kill -9 of an ablation at a random moment", "the same table"
        ),
        "soak": Fault(faults.soak, 7200, "seconds of training", "memory is flat"),
    }


def main(argv: Sequence[str]) -> None:
    locations = [arg for arg in argv[1:] if arg.startswith("--config.data.")]
    names = cli.parse([arg for arg in argv if arg not in locations], positional=True)
    os.chdir(ROOT)  # configs are named by their path in the repository
    cli.enable_compilation_cache()
    table = fault_table()
    for name in names:
        if name not in table:
            raise UserError("no such fault", path="fault", value=name, choices=table)
    lines, failed = {}, 0
    for name in names or table:
        lines[name], failures = run_fault(name, table[name], locations)
        print(lines[name], flush=True)
        for message in failures[:SHOWN]:
            print(f"  not survived: {message[:500]}", flush=True)
        failed += len(failures)
    if OUTPUT.value:
        _write(Path(OUTPUT.value), lines, list(table))
    sys.exit(1 if failed else 0)


def run_fault(name: str, fault: Fault, locations: Sequence[str]) -> tuple[str, list[str]]:
    """Injects a fault as often as `--share` asks, and returns its table line and the messages of what failed."""
    from tests.reliability import runs

    start = time.monotonic()
    times, outcomes = max(1, math.ceil(SHARE.value * fault.times)), []
    output = io.StringIO()  # hides what runs in this process print
    with runs.scratch() as folder, contextlib.redirect_stdout(output), contextlib.redirect_stderr(output):
        for outcome in fault.inject(times, folder, locations):
            outcomes.append(outcome)
            if sys.__stdout__ and sys.__stdout__.isatty():
                print(f"\r{name} {len(outcomes)}", end="\r", file=sys.__stdout__, flush=True)
    failures = [message for survived, message in outcomes if not survived]
    done, survived = len(outcomes), len(outcomes) - len(failures)
    if name == "soak":  # its times are seconds
        done, survived = times, 0 if failures else times
    seconds = time.monotonic() - start
    cells = (name, fault.description, f"{done:,}", fault.expected, f"{survived:,}", f"{seconds:.0f}", _commit())
    return f"| {' | '.join(cells)} |", failures


def _commit() -> str:
    from mmfusion.tracking import provenance

    commit = provenance.environment()["commit"]
    if not commit:
        return "unknown"
    return commit["id"][:7] + ("+" if commit["dirty"] else "")


def _write(path: Path, lines: dict[str, str], order: list[str]) -> None:
    import jax

    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, jax {jax.__version__}"
    growth = (
        "A run's memory grows by about 200 bytes per array and save: TensorStore 0.1.86 keeps what "
        "`KvStore.Spec.to_json` is asked. The soak ran with a workaround for it."
    )
    head = [
        "# What runs survive",
        "",
        f"`python -m tests.reliability [NAME ...] --output=FILE.md`; {machine}.",
        "",
        growth,
        "",
        "| name | fault | times | expected | survived | seconds | commit |",
        "| --- | --- | ---: | --- | ---: | ---: | --- |",
    ]
    old = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if old[: len(head)] == head:
        lines = {line.split(" | ")[0].removeprefix("| "): line for line in old[len(head) :]} | lines
    path.write_text("\n".join([*head, *(lines[name] for name in order if name in lines), ""]), encoding="utf-8")


if __name__ == "__main__":
    cli.run(main)
