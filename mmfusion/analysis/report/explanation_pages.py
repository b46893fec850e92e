"""Pages that explain predictions: one per row, an index, and their numbers."""

import itertools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from mmfusion.analysis.report.explanation_panels import Bar, Panel, number, panel
from mmfusion.analysis.report.templates import template_environment
from mmfusion.data.decoding import Reader
from mmfusion.files import write_json
from mmfusion.inference.contributions import MAX_SHAPLEY
from mmfusion.inference.explanations import BATCH, Explanation
from mmfusion.inference.output_folder import new_folder
from mmfusion.inference.predictions import Predictions, TaskPredictions
from mmfusion.inference.rows import Row
from mmfusion.inference.trained_model import TrainedModel

MAX_CLASSES = 6  # whose probabilities are shown
TEMPLATE = "explanation.html"


class Term(NamedTuple):
    """A term of the equation baseline + sums of the modalities = value."""

    label: str
    text: str
    value: float


class TaskCard(NamedTuple):
    """One task of a row: its prediction, its probabilities and contributions as bars, the equation, and the panels.

    Without an explanation the last five are empty.
    """

    task: str
    predicted: str
    probabilities: tuple[Bar, ...]
    contributions: tuple[Bar, ...]
    contributed_to: str
    output: str = ""
    terms: tuple[Term, ...] = ()
    value: str = ""
    gap: str = ""
    panels: tuple[Panel, ...] = ()


class Card(NamedTuple):
    """A row: its number, or None for a row without one, its tasks, and why it could not be explained."""

    number: int | None
    tasks: tuple[TaskCard, ...]
    error: str


def write_pages(
    model: TrainedModel, rows: Mapping[int, Row], folder: Path, target: Path, label: str, title: str, total: int
) -> None:
    """Writes the pages of rows to a folder, whole or not at all, a batch at a time.

    Row 7 has `row_00007.html`, which loads nothing, and its arrays in `row_00007.npz`: `attribution/TASK/MODALITY`,
    `attention/QUERY/KEY` and `input/MODALITY`. `index.html` lists the rows, and `explanations.json` has their sums,
    words and columns.

    Args:
      model: the model.
      rows: by number, what `TrainedModel.predict` takes.
      folder: the folder that file paths of the rows are relative to.
      target: the folder to write, which must not exist or be empty.
      label: what errors call it.
      title: of the pages, such as the input's name.
      total: the number of predicted rows, of which these are the first.

    Raises:
      UserError: the folder exists and is not empty, or cannot be written.
    """
    listed, summaries, numbers = [], [], list(rows)
    with new_folder(target, label) as made:
        for k, ((number, card), explanation) in enumerate(explained(model, rows, folder)):
            near = {"before": numbers[max(k - 1, 0) : k], "after": numbers[k + 1 : k + 2]}
            page = render(page="row", card=card, title=title, **near)
            (made / f"{_name(number)}.html").write_text(page, encoding="utf-8")
            if not card.error:
                np.savez_compressed(made / f"{_name(number)}.npz", **_arrays(explanation))
            listed.append(_listed(card))
            summaries.append(summary(card))
        index = render(page="index", cards=listed, title=title, total=total)
        (made / "index.html").write_text(index, encoding="utf-8")
        write_json(made / "explanations.json", summaries)


def explained(
    model: TrainedModel, rows: Mapping[int, Row], folder: Path
) -> Iterator[tuple[tuple[int, Card], Explanation]]:
    """Yields each row's number, card and explanation."""
    numbers = iter(rows)
    while batch := list(itertools.islice(numbers, BATCH)):
        values = [rows[number] for number in batch]
        predicted = model.predict(values, folder, contributions=True)
        for i, explanation in enumerate(model.explain(values, folder)):
            yield (batch[i], card(batch[i], explanation, predicted, i, model.reader)), explanation


def card(number: int | None, explanation: Explanation | None, predicted: Predictions, i: int, reader: Reader) -> Card:
    """Returns the card of a row.

    Args:
      number: its number, if it has one.
      explanation: of the row; None: the card has its prediction only.
      predicted: predictions of a batch with contributions.
      i: the row's position in the batch.
      reader: of the run.
    """
    if error := predicted.errors[i] or (explanation.error if explanation else ""):
        return Card(number, (), error)
    tasks = []
    for task, found in predicted.tasks.items():
        shown = TaskCard(
            task, _predicted(found, i), _probabilities(found, i), _contributions(found, i), _contributed_to(found, i)
        )
        tasks.append(_with_attribution(shown, explanation, reader) if explanation else shown)
    return Card(number, tuple(tasks), "")


def _with_attribution(shown: TaskCard, explanation: Explanation, reader: Reader) -> TaskCard:
    attribution = explanation.tasks[shown.task]
    totals = {m: attribution.total(m) for m in attribution.modalities}
    return shown._replace(
        output=f"log odds of {attribution.output}" if shown.probabilities else attribution.output,
        terms=(
            Term("baseline", number(attribution.baseline), 0.0),
            *(Term(m, number(value, "+"), value) for m, value in totals.items()),
        ),
        value=number(attribution.value),
        gap=number(attribution.gap, digits=1),
        panels=tuple(
            panel(explanation, attribution, m, options, reader.fitted.get(m))
            for m, options in reader.modalities.items()
        ),
    )


def _predicted(found: TaskPredictions, i: int) -> str:
    if found.values is not None:
        return number(found.values[i], digits=5)
    label = found.labels[i]
    return label if isinstance(label, str) else ", ".join(label) or "no label"


def _probabilities(found: TaskPredictions, i: int) -> tuple[Bar, ...]:
    if found.probabilities is None:
        return ()
    row = found.probabilities[i]
    order = np.argsort(-row, kind="stable")
    bars = [Bar(found.classes[k], float(row[k]), f"{row[k]:.1%}") for k in order[:MAX_CLASSES]]
    if found.type == "classification" and len(order) > MAX_CLASSES:
        rest = float(row[order[MAX_CLASSES:]].sum())
        bars.append(Bar(f"{len(order) - MAX_CLASSES} others", rest, f"{rest:.1%}"))
    return tuple(bars)


def _contributions(found: TaskPredictions, i: int) -> tuple[Bar, ...]:
    values = {m: float(x[i]) for m, x in (found.contributions or {}).items()}
    largest = max([abs(x) for x in values.values()] + [1e-12])
    scale = largest if found.type == "regression" else max(largest, 0.25)  # of probabilities, small ones look small
    return tuple(Bar(m, x / scale, number(x, "+")) for m, x in values.items())


def _contributed_to(found: TaskPredictions, i: int) -> str:
    method = "Shapley values of " if len(found.contributions or ()) <= MAX_SHAPLEY else "what is lost without it, of "
    if found.type == "regression":
        return f"{method}the value"
    if found.type == "multilabel":
        return f"{method}the mean probability of the labels"
    return f"{method}the probability of {found.labels[i]}"


def _listed(card: Card) -> Card:
    """Returns what the index shows of a card: per modality three pictures with attributions, and the first words."""
    return card._replace(tasks=tuple(task._replace(panels=tuple(map(_thumbnail, task.panels))) for task in card.tasks))


def _thumbnail(shown: Panel) -> Panel:
    pictures = tuple(p for p in shown.pictures if p.caption.startswith("attribution"))
    return Panel(shown.modality, pictures=pictures[:3], words=shown.words[:20])


def summary(card: Card) -> dict[str, Any]:
    """Returns the numbers of a card: its prediction, sums of modalities, words and columns."""
    tasks = {}
    for shown in card.tasks:
        words = {p.modality: [[word.text, word.value] for word in p.words] for p in shown.panels if p.words}
        columns = {p.modality: [[bar.label, bar.text] for bar in p.bars] for p in shown.panels if p.bars}
        tasks[shown.task] = {
            "predicted": shown.predicted, "explained": shown.output, "value": shown.value,
            "sums": {term.label: term.text for term in shown.terms}, "gap": shown.gap,
            "contributions": {bar.label: bar.text for bar in shown.contributions}, "words": words, "columns": columns,
        }  # fmt: skip
    return {"row": card.number, "error": card.error, "tasks": tasks}


def _arrays(explanation: Explanation) -> dict[str, Any]:
    arrays: dict[str, Any] = {f"input/{m}": x for m, x in explanation.inputs.items()}
    for task, attribution in explanation.tasks.items():
        arrays |= {f"attribution/{task}/{m}": share for m, share in attribution.modalities.items()}
    return arrays | {f"attention/{query}/{key}": x for (query, key), x in explanation.attention.items()}


def _name(number: int) -> str:
    return f"row_{number:05d}"


def render(**values: Any) -> str:
    """Returns the HTML of a page: `row`, `index`, or `part`, to be placed in another page."""
    environment = template_environment()
    environment.filters["name"] = _name
    return environment.get_template(TEMPLATE).render(**values)
