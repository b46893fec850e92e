"""Measures speed as ratios in one process, prints a table and writes `benchmark.json`.

`python -m experiments.benchmark [NAME ...] [--output=benchmark.json]`. Names: loop_overhead, ablation (default: all).
"""

import platform
from collections.abc import Sequence
from pathlib import Path

from absl import flags

from experiments import cli
from mmfusion.errors import UserError

OUTPUT = flags.DEFINE_string("output", "benchmark.json", "the file to write")


def main(argv: Sequence[str]) -> None:
    names = cli.parse(argv, positional=True)
    cli.enable_compilation_cache()

    import jax
    from rich.console import Console
    from rich.table import Table

    from experiments.benchmark.loop import loop_overhead
    from experiments.benchmark.plan import ablation
    from mmfusion.files import write_json

    benchmarks = {"loop_overhead": loop_overhead, "ablation": ablation}
    for name in names:
        if name not in benchmarks:
            raise UserError("no such benchmark", path="benchmark", value=name, choices=benchmarks)
    rows = [row for name in names or benchmarks for row in benchmarks[name]()]

    machine = f"{jax.device_count()} x {jax.devices()[0].device_kind}, {platform.machine()}, jax {jax.__version__}"
    table = Table("benchmark", "ours", "reference", "unit", "ratio", "goal", title=machine)
    for row in rows:
        table.add_row(
            row["name"],
            f"{row['ours']:.1f}",
            f"{row['reference']:.1f}",
            row["unit"],
            f"{row['ratio']:.3f}",
            row["goal"],
        )
    Console().print(table)
    write_json(Path(OUTPUT.value), {"machine": machine, "rows": rows})


if __name__ == "__main__":
    cli.run(main)
