"""Predicts every row of a table with a run's best checkpoint; a row that cannot be read gets an error instead.

`python -m experiments.predict --workdir=DIR --input=FILE.csv --output=FILE.csv [--intervals=0.9] [--explain=DIR]`
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from absl import flags

from experiments import cli

if TYPE_CHECKING:
    from mmfusion.inference.rows import Row
    from mmfusion.inference.trained_model import TrainedModel

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
EXPLAIN = flags.DEFINE_string("explain", "", "the folder to write explanations to: a page per row, and their numbers")
EXPLAIN_ROWS = flags.DEFINE_integer("explain_rows", 32, "rows to explain at most, the first ones", lower_bound=1)
TRUST = flags.DEFINE_bool("trust", False, cli.TRUST_HELP, allow_override=True)
CONTRIBUTIONS = flags.DEFINE_bool("contributions", False, "add each modality's contribution to each prediction")


def main(argv: Sequence[str]) -> None:
    cli.parse(argv)
    cli.enable_compilation_cache()

    from mmfusion.inference.output_folder import check_new
    from mmfusion.inference.predict import predict
    from mmfusion.training.restore import trust_run

    if TRUST.value:
        trust_run(WORKDIR.value)
    if EXPLAIN.value:
        check_new(Path(EXPLAIN.value), f"--explain={EXPLAIN.value}")
    predicted, total, errors = predict(
        WORKDIR.value,
        INPUT.value,
        OUTPUT.value,
        allow_missing=ALLOW_MISSING.value,
        report=print,
        explain=_explain if EXPLAIN.value else None,
        explain_rows=EXPLAIN_ROWS.value,
        calibrated=CALIBRATED.value,
        intervals=INTERVALS.value,
        sets=SETS.value,
        contributions=CONTRIBUTIONS.value,
    )
    for error in errors:
        print(error)
    if EXPLAIN.value:
        explained = min(predicted, EXPLAIN_ROWS.value)
        more = "; --explain_rows=N explains more" if explained < predicted else ""
        print(f"{Path(EXPLAIN.value) / 'index.html'}: {explained} of {predicted} predicted rows explained{more}")
    print(f"{OUTPUT.value}: {predicted} of {total} rows predicted, {total - predicted} with an error (column error)")


def _explain(model: TrainedModel, rows: Mapping[int, Row], folder: Path, predicted: int) -> None:
    from mmfusion.analysis.report.explanation_pages import write_pages

    target = Path(EXPLAIN.value)
    write_pages(model, rows, folder, target, f"--explain={target}", Path(INPUT.value).name, predicted)


if __name__ == "__main__":
    cli.run(main)
