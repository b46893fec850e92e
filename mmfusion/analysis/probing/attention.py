"""Test examples of a trained run with their inputs, predictions and attention weights.

H W image · T frames · C channels · S audio samples · N tokens
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
    """A test example in displayable form, with the model's attention weights.

    Attributes:
      id: the row's index in its source.
      target, predicted: class names, or values as text.
      inputs: modality -> image `[H, W, C]` uint8, frames `[T, H, W, C]` uint8, strings (one per token, column or node),
        or waveform `[S]`; absent modalities are left out.
      attention: (query modality, key modality) -> weights `[N_query, N_key]`, averaged over heads, without padding for
        modalities with one token per position; empty for strategies without attention.
    """

    id: int
    target: str
    predicted: str
    inputs: dict[str, Any]
    attention: dict[tuple[str, str], np.ndarray]


def examples(workdir: str | Path, count: int = EXAMPLES) -> list[ExampleView]:
    """Returns test examples of a finished run with one target at its best checkpoint, sampled with a fixed seed."""
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
    views = []
    for i in range(len(raw.id)):
        present = [m for m in reader.modalities if raw.present[m][i]]
        masks = {m: raw.mask[m][i] for m in present if reader.modalities[m]["kind"] in TOKEN_PER_POSITION}
        inputs = {
            m: DISPLAY[reader.modalities[m]["kind"]](raw.inputs[m][i], raw.mask[m][i], reader.fitted.get(m))
            for m in present
        }
        absent = {m for m in reader.modalities if m not in present}
        weights = {
            (q, k): without_padding(without_padding(w[i], masks.get(q), 0), masks.get(k), 1)
            for (q, k), w in attention.items()
            if not absent & {q, k}
        }
        names = run.dataset.class_names[task]
        values = (raw.targets[task][i], logits[task][i].argmax() if names else logits[task][i][0])
        target, predicted = (names[int(x)] if names else f"{float(x):.3g}" for x in values)
        views.append(ExampleView(int(raw.id[i]), target, predicted, inputs, weights))
    return views


def without_padding(weights: np.ndarray, mask: np.ndarray | jax.Array | None, axis: int) -> np.ndarray:
    """Returns the weights without padded tokens if there is one token per position."""
    if mask is None or weights.shape[axis] != len(mask):
        return weights
    return weights.compress(mask, axis)


def _table_strings(row: np.ndarray, mask: np.ndarray, fitted: Mapping[str, Any]) -> list[str]:
    """Returns `name value` for each column present: standardised numbers, categories by name."""
    formats = []
    for name, column in fitted.items():
        if "categories" in column:
            formats.append(lambda x, name=name, known=("?", *column["categories"]): f"{name} {known[int(x)]}")
        else:
            labels = [name] if len(column["mean"]) == 1 else [f"{name}[{k}]" for k in range(len(column["mean"]))]
            formats += [lambda x, label=label: f"{label} {x:+.1f}" for label in labels]
    return [to_text(x) for to_text, x, real in zip(formats, row, mask, strict=True) if real]


# Modality types whose encoders may return one token per position.
TOKEN_PER_POSITION = ("text", "video", "table", "graph", "knowledge", "embedding", "sequence", "images")
DISPLAY = {  # (input, mask, fitted) -> the displayable input
    "image": lambda x, mask, fitted: np.rint(x).astype(np.uint8),  # may be float32
    "text": lambda x, mask, fitted: [fitted.id_to_token(int(k)) for k in x[mask]],
    "audio": lambda x, mask, fitted: x[mask],
    "video": lambda x, mask, fitted: x[mask],
    "table": _table_strings,
    "graph": lambda x, mask, fitted: [f"node {k}" for k in range(mask.sum())],
    "knowledge": lambda x, mask, fitted: [fitted.entities[k - 1] for k in x[mask, 0]],
    "embedding": lambda x, mask, fitted: [f"vector of {len(x)} dimensions"],
    "sequence": lambda x, mask, fitted: [f"position {k}" for k in np.flatnonzero(mask)],
    "images": lambda x, mask, fitted: x[mask],
}
