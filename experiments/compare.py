"""Compares finished runs: mean and standard deviation of the test score over seeds, best first.

`python -m experiments.compare RUN RUN ... [--metric=accuracy] [--output=FILE.md]`
"""

import math
import statistics
from collections.abc import Sequence

from absl import flags

from experiments import cli
from mmfusion import config as configs
from mmfusion.analysis.runs import Method, mean_and_deviation, methods, read
from mmfusion.errors import UserError

METRIC = flags.DEFINE_string(
    "metric", "", "a metric of result.json (default: config.select, which selects checkpoints)"
)
OUTPUT = flags.DEFINE_string("output", "", "a Markdown file to write the table to")
COLUMNS = ("method", "test", "worst seed", "seeds", "parameters", "seconds")


def main(argv: Sequence[str]) -> None:
    directories = cli.parse(argv, positional=True)
    output = cli.output_file(OUTPUT.value)
    if not directories:
        raise UserError("give directories of finished runs: python -m experiments.compare RUN RUN ...")
    found = methods([read(directory) for directory in directories])
    results = [run.result for method in found for run in method.runs]
    data = {(result["data"]["name"], result["data"]["rows"]) for result in results}
    contents = {str(result["data"]["content"]) for result in results}
    if len(data) > 1 or len(contents) > 1:
        raise UserError(f"the runs used different data: {', '.join(sorted([*map(' '.join, data), *contents]))}")
    config = found[0].runs[0].config
    metric = METRIC.value or configs.selected_metric(config)
    found.sort(key=lambda method: worst_last(method.scores("test", metric), higher=configs.selectable(config)[metric]))
    rows = [row(method, metric, higher=configs.selectable(config)[metric]) for method in found]

    caption = ", ".join(f"{name} {'/'.join(sorted({str(v) for v in values}))}" for name, values in {
        "data": [" ".join(one) for one in data],
        "metric": [f"{metric} of the test split"],
        "steps": [result["steps"] for result in results],
        "device": [result["device"] for result in results],
        **{name: [result["versions"][name] for result in results] for name in results[0]["versions"]},
    }.items())  # fmt: skip
    cli.show_table(COLUMNS, rows, caption, output)


def worst_last(scores: Sequence[float], *, higher: bool) -> float:
    """Returns a sort key for scores: best mean first, undefined last."""
    mean = statistics.fmean(scores)
    return math.inf if math.isnan(mean) else -mean if higher else mean


def row(method: Method, metric: str, *, higher: bool) -> list[str]:
    """Returns the table row of a method; `higher` is whether a higher score is better."""
    scores = method.scores("test", metric)
    mean, deviation = mean_and_deviation(scores)
    score = f"{mean:.4f}" + ("" if deviation is None else f" ± {deviation:.4f}")
    worst = f"{(min if higher else max)(scores):.4f}"
    if math.isnan(mean):
        score = worst = "undefined"
    seconds = statistics.fmean(run.result["seconds"] for run in method.runs)
    return [method.name, score, worst, str(len(scores)), f"{method.runs[0].result['parameters']:,}", f"{seconds:.0f}"]


if __name__ == "__main__":
    cli.run(main)
