"""Does to runs what machines do to them, and writes a table of what they survived.

`python -m tests.reliability [NAME ...] [--share=0.05] [--output=FILE.md] [--config.data.dir=DIR]`

Exit status 1 where something was not survived. A share below 1 does each fault less often. A file that the same machine
has written keeps its lines of the faults that are not named.
"""

import contextlib
import io
import math
import os
import platform
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from experiments import cli
from mmfusion.errors import UserError, nearest

SHARE = flags.DEFINE_float("share", 1.0, "of how often each fault is done", lower_bound=0.0, upper_bound=1.0)
OUTPUT = flags.DEFINE_string("output", "", "a Markdown file to write")
SHOWN = 5  # of what was not survived


def main(argv: Sequence[str]) -> None:
    places = [arg for arg in argv[1:] if arg.startswith("--config.data.")]
    names = cli.parse([arg for arg in argv if arg not in places], positional=True)
    cli.enable_compilation_cache()

    import jax

    from tests.reliability import faults, fuzz, runs

    # name -> what is done, how often, and what is expected
    table = {
        "kills": (faults.kills, 200, "kill -9 or SIGTERM at a random moment, five configs", "the same run to the bit"),
        "bit_flips": (faults.bit_flips, 100, "a bit flipped in a checkpoint", "what was saved, or an older one"),
        "failing_writes": (
            faults.failing_writes,
            10**6,
            "each write call fails once",
            "an error in one line, or none; the same run",
        ),
        "fuzzed_configs": (fuzz.fuzzed_configs, 1000, "a config made at random", "taken, or refused in a line"),
        "fuzzed_archives": (fuzz.fuzzed_archives, 1000, "an archive damaged or hostile", "as it was, or refused"),
        "nan_planted": (faults.nan_planted, 20, "NaN in an update", "skipped and counted"),
        "killed_hosts": (faults.killed_hosts, 20, "one of two hosts killed", "the other ends; the same run"),
        "killed_ablations": (faults.killed_ablations, 5, "kill -9 of an ablation at a random moment", "the same table"),
        "soak": (faults.soak, 7200, "seconds of training", "memory is flat"),
    }
    for name in names:
        if name not in table:
            raise UserError(f"fault {name!r}: {nearest(name, table)}")
    lines, lost = {}, 0
    for name in names or table:
        fault, times, what, expected = table[name]
        began = time.monotonic()
        times, outcomes = max(1, math.ceil(SHARE.value * times)), []
        quiet = io.StringIO()  # what runs in this process print
        with runs.scratch() as folder, contextlib.redirect_stdout(quiet), contextlib.redirect_stderr(quiet):
            for outcome in fault(times, folder, places):
                outcomes.append(outcome)
                if sys.__stdout__.isatty():
                    print(f"\r{name} {len(outcomes)}", end="\r", file=sys.__stdout__, flush=True)
        wrong = [said for survived, said in outcomes if not survived]
        # the soak's times are its seconds
        done, well = (times, times * (not wrong)) if name == "soak" else (len(outcomes), len(outcomes) - len(wrong))
        seconds = f"{time.monotonic() - began:.0f}"
        lines[name] = f"| {name} | {what} | {done:,} | {expected} | {well:,} | {seconds} | {_commit()} |"
        print(lines[name], flush=True)
        print("\n".join(f"  not survived: {said[:500]}" for said in wrong[:SHOWN]), end="\n" * bool(wrong), flush=True)
        lost += len(wrong)
    if OUTPUT.value:
        _write(Path(OUTPUT.value), lines, list(table), jax.__version__)
    sys.exit(1 if lost else 0)


def _commit() -> str:
    from mmfusion.tracking import provenance

    made_of = provenance.environment()["commit"]
    return made_of["id"][:7] + "+" * made_of["dirty"] if made_of else "unknown"


def _write(path: Path, lines: dict[str, str], order: list[str], version: str) -> None:
    machine = f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, jax {version}"
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
