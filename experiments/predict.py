"""Predicts every row of a table with a run's best checkpoint; a row that cannot be read gets an error instead.

`python -m experiments.predict --workdir=DIR --input=FILE.csv --output=FILE.csv [--intervals=0.9]`
"""

from collections.abc import Sequence

from absl import flags

from experiments import cli

WORKDIR = flags.DEFINE_string("workdir", None, "the run's directory", required=True)
INPUT = flags.DEFINE_string(
    "input", None, "a table (.csv, .tsv, .jsonl, .json, .parquet) with a column per modality: text or file paths",
    required=True,
)  # fmt: skip
OUTPUT = flags.DEFINE_string("output", None, "the CSV file to write", required=True)
ALLOW_MISSING = flags.DEFINE_bool("allow-missing", False, "count columns that the table lacks as absent")
CALIBRATED = flags.DEFINE_bool("calibrated", True, "calibrate probabilities with the temperature fitted on validation")
INTERVALS = flags.DEFINE_float("intervals", None, "add intervals of this coverage, such as 0.9, for regression tasks")
SETS = flags.DEFINE_float("sets", None, "add sets of classes of this coverage, such as 0.9, for classification tasks")
CONTRIBUTIONS = flags.DEFINE_bool("contributions", False, "add each modality's contribution to each prediction")


def main(argv: Sequence[str]) -> None:
    cli.parse(argv)
    cli.enable_compilation_cache()

    from mmfusion.inference.predict import predict

    predicted, total, errors = predict(
        WORKDIR.value,
        INPUT.value,
        OUTPUT.value,
        allow_missing=ALLOW_MISSING.value,
        report=print,
        calibrated=CALIBRATED.value,
        intervals=INTERVALS.value,
        sets=SETS.value,
        contributions=CONTRIBUTIONS.value,
    )
    for error in errors:
        print(error)
    print(f"{OUTPUT.value}: {predicted} of {total} rows predicted, {total - predicted} with an error (column error)")


if __name__ == "__main__":
    cli.run(main)
