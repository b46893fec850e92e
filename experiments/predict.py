"""Predicts every row of a CSV file with a run's best checkpoint; bad rows are reported, not dropped."""

from collections.abc import Sequence

from absl import flags

from experiments import cli

WORKDIR = flags.DEFINE_string("workdir", None, "the run's directory", required=True)
INPUT = flags.DEFINE_string("input", None, "a CSV file: a column a modality, with text or paths", required=True)
OUTPUT = flags.DEFINE_string("output", None, "the CSV file to write", required=True)


def main(argv: Sequence[str]) -> None:
    cli.parse(argv)
    cli.enable_compilation_cache()

    from mmfusion.inference.predict import predict

    done, errors = predict(WORKDIR.value, INPUT.value, OUTPUT.value)
    for line in errors:
        print(line)
    print(f"{done} rows predicted, {len(errors)} could not be read: {OUTPUT.value}")


if __name__ == "__main__":
    cli.run(main)
