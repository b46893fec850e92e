"""Predicts every row of a CSV file with a run's best checkpoint; an unreadable row gets an error instead.

`python -m experiments.predict --workdir=DIR --input=FILE.csv --output=FILE.csv`
"""

from collections.abc import Sequence

from absl import flags

from experiments import cli

WORKDIR = flags.DEFINE_string("workdir", None, "the run's directory", required=True)
INPUT = flags.DEFINE_string("input", None, "a CSV file with one column per modality: text or file paths", required=True)
OUTPUT = flags.DEFINE_string("output", None, "the CSV file to write", required=True)


def main(argv: Sequence[str]) -> None:
    cli.parse(argv)
    cli.enable_compilation_cache()

    from mmfusion.inference.predict import predict

    count, errors = predict(WORKDIR.value, INPUT.value, OUTPUT.value)
    for error in errors:
        print(error)
    print(f"{count} rows predicted, {len(errors)} could not be read: {OUTPUT.value}")


if __name__ == "__main__":
    cli.run(main)
