"""Shows how a table of one's own would be read, and writes a config for it.

`python -m experiments.inspect TABLE [--label=COLUMN] [--columns=A+B] [--output=FILE.py] [--plot=FILE.png]`
"""

from collections.abc import Sequence
from pathlib import Path

from absl import flags

from experiments import cli
from mmfusion.errors import UserError

LABEL = flags.DEFINE_string("label", "", "the label's column, several joined by +; default: label, target, class or y")
COLUMNS = flags.DEFINE_string("columns", "", "the columns that are inputs, joined by +; default: all useful ones")
TASK = flags.DEFINE_enum("task", "", ("", "classification", "multilabel", "regression"), "default: by the label")
OUTPUT = flags.DEFINE_string("output", "", "the config file to write, in any folder")
PLOT = flags.DEFINE_string("plot", "", "the picture of sample rows to write (.png)")


def main(argv: Sequence[str]) -> None:
    tables = cli.parse(argv, positional=True)
    if len(tables) != 1:
        raise UserError("give one table, such as experiments.inspect my.csv --label=price", path="TABLE")

    from rich.console import Console

    from mmfusion.analysis.table_summary import columns_table, sample_figure, summary_lines
    from mmfusion.config import defaults
    from mmfusion.config.from_table import propose
    from mmfusion.config.render import render
    from mmfusion.files import write_text

    for flag, path in (("--output", OUTPUT.value), ("--plot", PLOT.value)):
        if path:
            cli.file_in_folder(flag, path, tables)
    config, args = defaults.begin("", "concat")
    proposal = propose(config, tables[0], LABEL.value, COLUMNS.value.split("+") if COLUMNS.value else (), TASK.value)
    defaults.finish(config, args)
    Console(markup=False, emoji=False).print(columns_table(proposal))
    for line in summary_lines(proposal, config):
        print(line)
    if PLOT.value:
        sample_figure(proposal, config).savefig(PLOT.value, dpi=120)
        print(f"{PLOT.value}: sample rows")
    if OUTPUT.value:
        docstring = f"How {Path(tables[0]).name} is read, proposed by experiments.inspect."
        write_text(Path(OUTPUT.value), render(config, docstring))
        print(f"{OUTPUT.value}: python -m experiments.train --config={OUTPUT.value} --workdir=DIR")


if __name__ == "__main__":
    cli.run(main)
