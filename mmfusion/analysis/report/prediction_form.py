"""The form of the demo page: an input per modality, the row that it stands for, and the answer as HTML.

It does not depend on the library that shows the page.
"""

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from ml_collections import ConfigDict

from mmfusion.analysis.report.explanation_pages import Card, card, render
from mmfusion.data.decoding import Reader
from mmfusion.data.modalities import feature_names
from mmfusion.errors import UserError
from mmfusion.inference.trained_model import TrainedModel

ARRAYS = ("embedding", "sequence", "graph")  # modality types whose values are uploaded as .npy or .json files
FORMS = {"image": "image", "audio": "audio", "images": "files", "video": "file", "text": "text", "knowledge": "text"}


class Field(NamedTuple):
    """An input of the page.

    Attributes:
      modality: the modality that it belongs to.
      feature: the feature that it is the value of.
      form: `text`, `number`, `choice`, `image`, `audio`, `file`, `files` or `array`.
      label: its name on the page.
      choices: of `choice`.
      hint: how to write the value.
    """

    modality: str
    feature: str
    form: str
    label: str
    choices: tuple[str, ...] = ()
    hint: str = ""


def fields(reader: Reader) -> list[Field]:
    """Returns the inputs for the modalities of a run: one each, or one per feature."""
    result = []
    for modality, options in reader.modalities.items():
        names = feature_names(options)
        for name in names:
            label = modality if name == modality or len(names) == 1 else f"{modality}: {name}"
            result.append(_field(modality, name, label, options, reader.fitted.get(modality)))
    return result


def _field(modality: str, name: str, label: str, options: Any, fitted: Any) -> Field:
    kind = options["kind"]
    if kind == "table":
        column = fitted[name]
        if "categories" in column:
            return Field(modality, name, "choice", label, tuple(column["categories"]))
        if "date" in column:
            return Field(modality, name, "text", label, hint="a date, such as 2024-05-31")
        if len(column["mean"]) > 1:
            return Field(modality, name, "text", label, hint=f"{len(column['mean'])} numbers, such as [0.1, 0.2]")
        return Field(modality, name, "number", label)
    if kind in ARRAYS:
        return Field(modality, name, "array", label, hint="a .npy or .json file")
    hints = {"video": "an animated GIF, WebP or PNG", "images": f"up to {options.get('count')} images"}
    return Field(modality, name, FORMS.get(kind, "array"), label, hint=hints.get(kind, ""))


def row_of(inputs: Sequence[Field], values: Sequence[Any]) -> dict[str, Any]:
    """Returns the values of the page as a row for `TrainedModel.predict`; an input that is left empty is absent.

    Raises:
      UserError: an uploaded array cannot be read.
    """
    row: dict[str, Any] = {}
    several = {field.modality for field in inputs if sum(other.modality == field.modality for other in inputs) > 1}
    for field, value in zip(inputs, values, strict=True):
        value = "" if value is None or value == [] else value
        if field.form == "array" and value:
            value = _array(Path(value), field.label)
        if field.modality in several:
            row.setdefault(field.modality, {})[field.feature] = value
        else:
            row[field.modality] = value
    return row


def _array(path: Path, label: str) -> Any:
    try:
        if path.suffix == ".npy":
            return np.load(path, allow_pickle=False)
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError("must be a .npy file of numbers, or a .json file", path=label, value=path.name) from error


def answers(model: TrainedModel, inputs: Sequence[Field], values: Sequence[Any], explain: bool) -> Iterator[str]:
    """Yields the HTML of the prediction for the form's values, and then with its explanation if that is asked for.

    An error of the values is shown in its place.
    """
    try:
        rows = [row_of(inputs, values)]
        predicted = model.predict(rows, contributions=True)
        explain = explain and not predicted.errors[0]
        yield render(page="part", card=card(None, None, predicted, 0, model.reader), busy=explain)
        if explain:
            (explanation,) = model.explain(rows)
            yield render(page="part", card=card(None, explanation, predicted, 0, model.reader), busy=False)
    except UserError as error:
        yield render(page="part", card=Card(None, (), str(error)), busy=False)


def about(config: ConfigDict, step: int) -> str:
    """Returns what the page says about a run and about inputs that are left empty."""
    text = f"{config.data.name} · {config.model.fusion.name} · step {step:,}. An input left empty is absent."
    if len(config.data.modalities) == 1 or config.data.missing or "modality_dropout" in config.objectives:
        return text
    return f"{text} Training removed no modality at random, so predictions without one may be poor and overconfident."
