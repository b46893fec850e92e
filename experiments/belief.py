"""Simulates the claims of ablations under known truth: false claims, coverage of intervals and power.

`python -m experiments.belief [--times=1000] [--output=FILE.md]`

Prints each row as it is simulated. Exits with status 1 if a row is outside its bound by more than twice its error.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from experiments import cli

TIMES = flags.DEFINE_integer("times", 1_000, "simulations of each row", lower_bound=20)
OUTPUT = flags.DEFINE_string("output", "", "a Markdown file to write the table to")

HEAD = """# What the claims keep

`python -m experiments.belief --times={times} --output=FILE.md`; seed 0. A rate is within its bound where it is at most
twice the standard error of the simulation (±) from it. Bounds: 0.05 for false claims, 0.93 for nominal 95 % intervals,
0.8 for power. Rows without a bound are for comparison.

"""


def main(argv: Sequence[str]) -> None:
    cli.parse(argv)
    path = Path(cli.file_in_folder("--output", OUTPUT.value)) if OUTPUT.value else None

    from mmfusion.analysis.claims import simulations
    from mmfusion.files import write_text

    found = []
    for row in simulations.rows(TIMES.value):
        found.append(row)
        mark = "" if row.least is row.most is None else "holds" if row.holds else "DOES NOT HOLD"
        print(f"{row.what:<45}{row.setting:<52}{row.rate:.3f} ± {row.error:.3f}  {mark}", flush=True)
        if path:
            write_text(path, HEAD.format(times=TIMES.value) + simulations.table(found))
    sys.exit(cli.FAILED if any(not row.holds for row in found) else cli.DONE)


if __name__ == "__main__":
    cli.run(main)
