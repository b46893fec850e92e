"""The model card of an exported run: its data, scores and known limits."""

import importlib.metadata
import platform
from collections.abc import Mapping, Sequence
from typing import Any

from scipy import stats

from mmfusion.training.calibration import Calibration
from mmfusion.training.restore import Run
from mmfusion.version import __version__

PACKAGES = ("jax", "flax", "numpy")
LOADING = """```python
import sys
sys.path.insert(0, "{folder}")  # this folder
from load_example import Model

model = Model("{folder}")
print(model([{{{row}}}]))  # a modality without a value is absent
```"""


def model_card(
    run: Run, result: Mapping[str, Any] | None, platforms: Sequence[str], calibration: Mapping[str, Calibration]
) -> str:
    """Returns the model card as Markdown.

    Args:
      run: an opened run.
      result: its `result.json`; None if it has not finished.
      platforms: those that its program runs on.
      calibration: of each task.
    """
    sections = {
        "Model": _model(run, platforms),
        "Data": _data(run, result),
        "Scores": _scores(run, result),
        "Modalities": _modalities(run),
        "Calibration": _calibration(run, calibration),
        "Limits": _limits(run, result),
        "Loading": _loading(run),
    }
    body = "\n\n".join(f"## {heading}\n\n{text}" for heading, text in sections.items())
    return f"# {' + '.join(sorted(run.config.data.modalities))} → {', '.join(run.setup.tasks)}\n\n{body}\n"


def _model(run: Run, platforms: Sequence[str]) -> str:
    model = run.config.model
    encoders = ", ".join(f"{section.name} ({m})" for m, section in sorted(model.encoders.items()))
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in PACKAGES)
    return (
        f"Encoders {encoders}; fusion {model.fusion.name}; width {model.width}. Step {run.step} of "
        f"{run.config.steps}, selected by validation {run.config.select}; seed {run.config.seed}.\n\n"
        f"Exported by mmfusion {__version__} with {versions}, Python {platform.python_version()}; the program runs on "
        f"{', '.join(platforms)}. The export does not run it."
    )


def _data(run: Run, result: Mapping[str, Any] | None) -> str:
    if result is None:
        return (
            f"`{run.dataset.name}`. Fingerprint and sizes are unknown, as the run has not finished. Licence: unknown."
        )
    data = result["data"]
    sizes = ", ".join(f"{count} {split}" for split, count in data["examples"].items())
    return f"`{data['name']}`, fingerprint `{data['fingerprint']}`; examples: {sizes}. Licence: unknown."


def _scores(run: Run, result: Mapping[str, Any] | None) -> str:
    if result is None:
        return "Not tested: the run has not finished."
    lines = ["| metric | valid | test | 95 % interval on test |", "|---|---|---|---|"]
    for name, value in result["test"].items():
        if isinstance(value, int | float) and name.rpartition("/")[2] != "examples":
            valid = result["valid"].get(name)
            shown = f"{valid:.4g}" if isinstance(valid, int | float) else ""
            lines.append(f"| {name} | {shown} | {value:.4g} | {_interval(run, name, value, result['test'])} |")
    return "\n".join(lines) + (
        "\n\nThe interval of an accuracy is Wilson's, over the test examples of this one run; it does not include the "
        "variation between seeds. Of the other metrics none was computed. The checkpoint was selected on validation, "
        "so that validation scores are optimistic. Losses, NLL, Brier score and ECE are those before calibration."
    )


def _interval(run: Run, name: str, value: float, scores: Mapping[str, Any]) -> str:
    tasks = run.setup.tasks
    task, _, metric = name.rpartition("/")
    kind = tasks[task or next(iter(tasks))].kind if task or len(tasks) == 1 else ""
    examples = scores[f"{task}/examples" if task else "examples"]
    if metric != "accuracy" or kind != "classification" or not examples:
        return ""
    found = stats.binomtest(round(value * examples), examples).proportion_ci(method="wilson")
    return f"{found.low:.4g} to {found.high:.4g}"


def _modalities(run: Run) -> str:
    lines = ["| modality | type | features |", "|---|---|---|"]
    for m, section in sorted(run.config.data.modalities.items()):
        options = section.to_dict()
        lines.append(f"| {m} | {options['kind']} | {options['feature']} |")
    return "\n".join(lines) + (
        "\n\nWhat each contributes to the scores is not known from this run alone; `python -m experiments.evaluate "
        "--modalities=...` and `python -m experiments.ablate` measure it."
    )


def _calibration(run: Run, calibration: Mapping[str, Calibration]) -> str:
    lines = [
        f"- {task}: temperature {calibration[task].temperature:.4g}"
        for task, spec in run.setup.tasks.items() if spec.kind != "regression"
    ]  # fmt: skip
    if not lines:
        return "There are no probabilities: the tasks are regression. Values have no intervals."
    return "\n".join(
        [*lines, "", "It is fitted on validation, and part of the program: `probabilities` are calibrated."]
    )


def _limits(run: Run, result: Mapping[str, Any] | None) -> str:
    unreadable = {split: len(bad) for split, bad in (result or {}).get("data", {}).get("unreadable", {}).items() if bad}
    lines = [
        "Not tested: data from other sources than the above, other languages, devices or times, inputs that were made "
        "to mislead, and differences between groups of people.",
        "Inputs of a kind that training did not have get a label and a probability like any other.",
    ]
    if not run.config.data.missing and len(run.config.data.modalities) > 1:
        lines.append("Training had no modalities removed, so that predictions without one are less reliable.")
    if unreadable:
        lines.append(f"Unreadable examples were left out: {unreadable}.")
    return "\n".join(f"- {line}" for line in lines)


def _loading(run: Run) -> str:
    example = {"text": '"a text"', "image": '"image.png"', "audio": '"recording.wav"'}
    values = []
    for m, section in sorted(run.config.data.modalities.items()):
        options = section.to_dict()
        names = options["feature"].split("+") if options["kind"] == "table" else [m]
        values += [f'"{name}": {example.get(options["kind"], "...")}' for name in names]
    return (
        LOADING.format(folder=".", row=", ".join(values))
        + "\n\n`pip install jax flatbuffers numpy safetensors pillow soundfile scipy tokenizers`. `load_example.py` "
        "reads images, texts, audio and tables; a modality of another type is given as arrays. `preprocessing.json` "
        "has all that it needs to know. `jax.export.deserialize` loads `model.stablehlo`, whose arguments are "
        "(weights, inputs, mask, present)."
    )
