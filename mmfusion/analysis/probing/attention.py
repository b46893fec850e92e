"""Where a trained model looks: some test examples with their inputs and attention weights.

H W picture · C channels · S audio samples · N tokens
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from mmfusion.analysis.probing.probe import sample_rows
from mmfusion.training.restore import open_run

EXAMPLES = 12


@dataclasses.dataclass(frozen=True)
class ExampleView:
    """A test example as a person would see it, and where the model looked.

    Attributes:
      id: the row's number in its source.
      target, predicted: names of classes, or numbers.
      inputs: modality -> picture `[H, W, C]` or frames `[T, H, W, C]` uint8, words (one a token, column or node), or
        samples `[S]`; absent ones are left out.
      attention: (query modality, key modality) -> weights `[N_query, N_key]`, the mean over heads, without the padding
        of modalities that have a token for each position; empty of strategies without attention.
    """

    id: int
    target: str
    predicted: str
    inputs: dict[str, Any]
    attention: dict[tuple[str, str], np.ndarray]


def examples(workdir: str | Path, count: int = EXAMPLES) -> list[ExampleView]:
    """Returns test examples of a finished run of one target, drawn by a fixed seed, at its best checkpoint."""
    run = open_run(workdir, ["test"])
    raw = sample_rows(run.dataset.splits["test"], count)
    (task,) = run.setup.tasks
    variables = {"params": run.state.params, "batch_stats": run.state.batch_stats}

    @jax.jit
    def forward(variables: Mapping[str, Any], batch: Any) -> Any:
        out: Any = run.setup.model.apply(variables, run.setup.preprocess(batch, None), train=False)
        return out.logits, {pair: weights.mean(axis=1) for pair, weights in out.attention.items()}

    logits, attention = jax.device_get(forward(variables, raw))
    reader = run.dataset.reader
    shown = []
    for i in range(len(raw.id)):
        there = [m for m in reader.modalities if raw.present[m][i]]
        masks = {m: raw.mask[m][i] for m in there if reader.modalities[m]["kind"] in BY_POSITION}
        inputs = {
            m: SHOWN[reader.modalities[m]["kind"]](raw.inputs[m][i], raw.mask[m][i], reader.fitted.get(m))
            for m in there
        }
        absent = {m for m in reader.modalities if m not in there}
        weights = {
            (q, k): _real(_real(w[i], masks.get(q), 0), masks.get(k), 1)
            for (q, k), w in attention.items()
            if not absent & {q, k}
        }
        names = run.dataset.class_names[task]
        said = (raw.targets[task][i], logits[task][i].argmax() if names else logits[task][i][0])
        target, predicted = (names[int(x)] if names else f"{float(x):.3g}" for x in said)
        shown.append(ExampleView(int(raw.id[i]), target, predicted, inputs, weights))
    return shown


def _real(weights: np.ndarray, mask: np.ndarray | jax.Array | None, axis: int) -> np.ndarray:
    """Leaves out the tokens of padding, where there is a token for each position."""
    if mask is None or weights.shape[axis] != len(mask):
        return weights
    return weights.compress(mask, axis)


def _table_words(row: np.ndarray, mask: np.ndarray, fitted: Mapping[str, Any]) -> list[str]:
    """Returns `name value` of each column that is there: numbers in training's deviations, categories by name."""
    words = []
    for name, column in fitted.items():
        if "categories" in column:
            words.append(lambda x, name=name, known=("?", *column["categories"]): f"{name} {known[int(x)]}")
        else:
            numbers = [name] if len(column["mean"]) == 1 else [f"{name}[{k}]" for k in range(len(column["mean"]))]
            words += [lambda x, label=label: f"{label} {x:+.1f}" for label in numbers]
    return [word(x) for word, x, real in zip(words, row, mask, strict=True) if real]


BY_POSITION = (
    "text",
    "video",
    "table",
    "graph",
    "knowledge",
)  # kinds whose encoders may give a token for each position
SHOWN = {  # (input, mask, fitted) -> what a person is shown
    "image": lambda x, mask, fitted: x,
    "text": lambda x, mask, fitted: [fitted.id_to_token(int(k)) for k in x[mask]],
    "audio": lambda x, mask, fitted: x[mask],
    "video": lambda x, mask, fitted: x[mask],
    "table": _table_words,
    "graph": lambda x, mask, fitted: [f"node {k}" for k in range(mask.sum())],
    "knowledge": lambda x, mask, fitted: [fitted.entities[k - 1] for k in x[mask, 0]],
}
