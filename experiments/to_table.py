"""Writes the dataset of a config as a table of one's own: a CSV file, and a folder of its images and audio.

`python -m experiments.to_table --config=FILE --output=TABLE.csv`
"""

from collections.abc import Sequence

from absl import flags

from experiments import cli
from mmfusion.errors import UserError

OUTPUT = flags.DEFINE_string("output", "", "the table to write (.csv); its files are in the folder without .csv")


def main(argv: Sequence[str]) -> None:
    config = cli.parse_config(argv)
    if not OUTPUT.value:
        raise UserError("is required: give the table to write, such as --output=my.csv", path="--output")
    output = cli.file_in_folder("--output", OUTPUT.value)
    cli.prepare(config)

    from mmfusion import config as configs
    from mmfusion.data import sources
    from mmfusion.data.modalities import feature_names
    from mmfusion.data.table_writer import write_table

    configs.check(config)
    data = configs.read(config).data
    rates = {
        section.feature: section.options["stored_rate"] or section.options["rate"]
        for section in data.modalities.values()
        if section.kind == "audio"
    }
    columns = [name for section in data.modalities.values() for name in feature_names(section.to_dict())]
    columns += [target.feature for target in data.targets.values()] + [data.group] * bool(data.group)
    expressions = {split: getattr(data, split) for split in ("train", "valid", "test") if getattr(data, split)}
    opened = {
        split: sources.open_source(
            data.name, expression, data_dir=data.dir, manual_dir=data.manual_dir, seed=config.seed
        )
        for split, expression in expressions.items()
    }
    count = write_table(opened, {name: rates.get(name, 0) for name in columns}, output)
    print(f"{OUTPUT.value}: {count:,} rows of {', '.join(dict.fromkeys(columns))}")


if __name__ == "__main__":
    cli.run(main)
