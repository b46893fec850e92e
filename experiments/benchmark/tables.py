"""Makes `results/TABLES.md`: five datasets given as plain tables, beside the configs that read the same data by name.

`python -m experiments.benchmark.tables --archives=DIR --workdir=DIR [--names=leaf+views] [--seeds=3]`

Each dataset is written as a table (`to_table`), `inspect` writes its config, and `ablate` trains it and each modality
alone; `train` and `predict` then label the table's test rows. Nothing is edited in between. What is finished in
`--workdir` is kept.
"""

import csv
import json
import statistics
import subprocess
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from absl import app, flags

ARCHIVES = flags.DEFINE_string("archives", None, "folder of the datasets' archives (data.manual_dir)", required=True)
WORKDIR = flags.DEFINE_string("workdir", None, "where tables, configs and runs are kept", required=True)
NAMES = flags.DEFINE_string("names", "", "the datasets, joined by + (default: all)")
SEEDS = flags.DEFINE_integer("seeds", 3, "seeds of each method")

DATASETS = {  # name -> (the config that reads it by name, its label)
    "leaf": ("configs/leaf.py", "label"),
    "views": ("configs/digit_views.py:modalities=fou+zer+mor+pix+fac+kar", "label"),
    "digits": ("configs/av_digits.py", "label"),
    "fashion": ("configs/fashion.py", "season"),
    "imdb": ("configs/tfds.py:name=imdb_subset,image=,text=text", "label"),
}
PAGE = Path(__file__).parents[1] / "results" / "TABLES.md"


def command(*arguments: str) -> None:
    """Runs a command of this package, with its output shown."""
    print(f"$ python -m experiments.{' '.join(arguments)}", flush=True)
    subprocess.run([sys.executable, "-m", f"experiments.{arguments[0]}", *arguments[1:]], check=True)


def scores(config: str, folder: Path, *overrides: str) -> dict[str, list[float]]:
    """Trains a config and each of its modalities alone; returns per method the test accuracy of each seed."""
    separator = "," if ":" in config.rpartition("/")[2] else ":"
    found = defaultdict(list)
    if "imdb" in str(folder):  # one modality: nothing to ablate
        for seed in range(SEEDS.value):
            run = folder / f"seed={seed}"
            command("train", f"--config={config}{separator}seed={seed}", f"--workdir={run}", *overrides)
            found["concat"].append(json.loads((run / "result.json").read_text())["test"]["accuracy"])
        return found
    command(
        "ablate", f"--config={config}", "--fusions=concat", f"--seeds={SEEDS.value}", f"--workdir={folder}", *overrides
    )
    with (folder / "runs.csv").open() as file:
        for row in csv.DictReader(file):
            found[row["method"]].append(float(row["test/accuracy"]))
    return found


def predicted_accuracy(name: str, label: str, folder: Path) -> tuple[float, float]:
    """Trains the table's config, labels its test rows by `predict`, and returns that accuracy and the run's own."""
    table, run, rows = folder / f"{name}.csv", folder / "train", folder / f"{name}_test.csv"
    command("train", f"--config={folder / name}.py", f"--workdir={run}")
    with table.open(newline="") as source, rows.open("w", newline="") as target:
        reader = csv.DictReader(source)
        writer = csv.DictWriter(target, reader.fieldnames or ())
        writer.writeheader()
        writer.writerows(row for row in reader if row["split"] == "test")
    command("predict", f"--workdir={run}", f"--input={rows}", f"--output={folder / 'predicted.csv'}")
    with rows.open(newline="") as truth, (folder / "predicted.csv").open(newline="") as predicted:
        pairs = list(zip(csv.DictReader(truth), csv.DictReader(predicted), strict=True))
    correct = statistics.fmean(row[label] == prediction["label"] for row, prediction in pairs)
    return correct, json.loads((run / "result.json").read_text())["test"]["accuracy"]


def measure(name: str, config: str, label: str, folder: Path) -> None:
    """Measures one dataset and writes `measured.json` in its folder."""
    folder.mkdir(parents=True, exist_ok=True)
    archives = f"--config.data.manual_dir={ARCHIVES.value}"
    if not (folder / f"{name}.csv").exists():
        command("to_table", f"--config={config}", f"--output={folder / name}.csv", archives)
    command("inspect", f"{folder / name}.csv", f"--label={label}", f"--output={folder / name}.py")
    predicted, evaluated = predicted_accuracy(name, label, folder)
    measured = {
        "table": scores(f"{folder / name}.py", folder / "table_runs"),
        "config": scores(config, folder / "config_runs", archives),
        "predicted": predicted,
        "evaluated": evaluated,
    }
    (folder / "measured.json").write_text(json.dumps(measured, indent=1))


def shown(values: Sequence[float]) -> str:
    """Returns mean and standard deviation."""
    deviation = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
    return f"{statistics.fmean(values):.3f}{deviation}"


def page(measured: dict[str, dict]) -> str:
    """Returns the page with a row per dataset."""
    lines = [
        "# Datasets as plain tables",
        "",
        "Test accuracy, mean ± standard deviation over seeds, of the config that `experiments.inspect` writes for a",
        "table, with no line edited, beside the config that reads the same data by name; made by",
        "`python -m experiments.benchmark.tables`. `predict` labels the test rows; its accuracy is that of the run.",
        "",
        "| dataset | lines written | as a table | by name | best single modality of the table | `predict`, run |",
        "|---|---|---|---|---|---|",
    ]
    for name, values in measured.items():
        single = {method: scores for method, scores in values["table"].items() if method != "concat"}
        best = max(single, key=lambda method: statistics.fmean(single[method]), default="")
        lines.append(
            f"| {name} | 0 | {shown(values['table']['concat'])} | {shown(values['config']['concat'])} | "
            f"{f'{best} {shown(single[best])}' if best else 'it is the only one'} | "
            f"{values['predicted']:.4f}, {values['evaluated']:.4f} |"
        )
    return "\n".join([*lines, ""])


def main(argv: Sequence[str]) -> None:
    del argv
    workdir = Path(WORKDIR.value).absolute()
    for name in NAMES.value.split("+") if NAMES.value else DATASETS:
        if not (workdir / name / "measured.json").exists():
            measure(name, *DATASETS[name], workdir / name)
    done = {name: workdir / name / "measured.json" for name in DATASETS}
    PAGE.write_text(page({name: json.loads(path.read_text()) for name, path in done.items() if path.exists()}))


if __name__ == "__main__":
    app.run(main)
