"""Fits classical baselines on simple features of a config's data.

`python -m experiments.baselines --config=configs/X.py[:arg=value,...] [--models=linear_svm,naive_bayes] [--trials=N]
[--output=FILE.md]`
"""

from collections.abc import Sequence

from absl import flags

from experiments import cli
from mmfusion.errors import UserError

MODELS = flags.DEFINE_list("models", [], "names of models (default: all)")
TRIALS = flags.DEFINE_integer("trials", 6, "settings that each model is tuned with on validation", lower_bound=1)
OUTPUT = flags.DEFINE_string("output", "", "a Markdown file to write the table to")
COLUMNS = ("model", "modalities", "selected on validation", "validation", "test", "seconds")


def main(argv: Sequence[str]) -> None:
    config = cli.parse_config(argv)
    output = cli.output_file(OUTPUT.value)

    from mmfusion import config as configs
    from mmfusion.analysis import baselines
    from mmfusion.data import dataset as datasets

    configs.check(config, 1)
    task, _, metric = configs.selected_metric(config).rpartition("/")
    first_task, *_ = config.data.targets
    task = task or first_task
    known = [model.name for model in baselines.MODELS[config.data.targets[task].kind]]
    for name in MODELS.value:
        if name not in known:
            raise UserError("no such model", path="--models", value=name, choices=known)
    dataset = datasets.load(configs.read(config).data, seed=config.seed)
    results = baselines.baselines(dataset, task, metric, config.seed, models=MODELS.value or known, trials=TRIALS.value)

    caption = (
        f"{metric} of {task!r}, {dataset.name} {dataset.rows}, each at the best of {TRIALS.value} settings, fitted "
        f"on at most {baselines.MAX_ROWS:,} training rows (rbf_svm: {baselines.SVM_ROWS:,})"
    )
    rows = [
        (
            result.name,
            " + ".join(result.modalities) or "none",
            ", ".join(f"{name} {value:g}" for name, value in result.selected.items()),
            f"{result.valid:.4f}",
            f"{result.test:.4f}",
            f"{result.seconds:.0f}",
        )
        for result in results
    ]
    cli.show_table(COLUMNS, rows, caption, output)


if __name__ == "__main__":
    cli.run(main)
